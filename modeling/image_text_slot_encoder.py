"""The encoder of ImageTextSlot: a grey image to the features of its memory cells.

ConvNeXt-style stages (Liu et al., 2022), then self-attention over the cells of the last stage, whose result is added to
those of the memory stage. Unusual: the image's contrast is normalised first, ink always brighter than paper, and the
3x3 convolutions are dense, which on CPUs takes less time than depth-wise 7x7 ones.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from regard.configuration.configuration_image_text_slot import ImageTextSlotConfig
from regard.modeling.attention import Attention
from regard.modeling.image_text_slot_crop import cut
from regard.modeling.layers import ChannelNorm, DepthwiseConv2d, DropPath, sinusoidal_positions_2d


class ConvBlock(GradientCheckpointingLayer):
    """ConvNeXt's residual block (Liu et al., 2022), depth-wise or dense; `(batch, channels, height, width)`."""

    def __init__(self, config, hidden_size: int, drop_path_rate: float):
        super().__init__()
        if config.depthwise:
            self.conv = DepthwiseConv2d(hidden_size, config.kernel_size)
        else:
            self.conv = nn.Conv2d(hidden_size, hidden_size, config.kernel_size, padding=config.kernel_size // 2)
        self.norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.up_proj = nn.Linear(hidden_size, config.expansion * hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.expansion * hidden_size, hidden_size)
        self.layer_scale = nn.Parameter(torch.full((hidden_size,), config.layer_scale_init_value))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        branch = self.norm(self.conv(hidden_states).permute(0, 2, 3, 1))  # (batch, height, width, channels)
        branch = self.drop_path(self.down_proj(self.activation(self.up_proj(branch))))
        return torch.addcmul(hidden_states, branch.permute(0, 3, 1, 2), self.layer_scale[:, None, None])


class ContextLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer over all cells of a stage; `(batch, cells, channels)`."""

    def __init__(self, config, encoder_config):
        super().__init__()
        hidden_size = encoder_config.hidden_sizes[-1]
        self.attention_norm = nn.LayerNorm(hidden_size, eps=encoder_config.layer_norm_eps)
        self.attention = Attention(config, hidden_size, encoder_config.num_attention_heads)
        self.mlp_norm = nn.LayerNorm(hidden_size, eps=encoder_config.layer_norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, encoder_config.context_expansion * hidden_size),
            ACT2FN[encoder_config.hidden_act],
            nn.Linear(encoder_config.context_expansion * hidden_size, hidden_size),
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states))[0]
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


def _mean(images: torch.Tensor) -> torch.Tensor:
    return images.mean((1, 2, 3), keepdim=True)


def normalize_contrast(
    pixel_values: torch.Tensor, mean: Callable[[torch.Tensor], torch.Tensor] = _mean
) -> torch.Tensor:
    """Images `(batch, channels, height, width)` at mean 0 and deviation 1, inverted where the rarer pixels, which are
    the ink, are the darker ones: a third moment below 0. `mean` is how each image's is taken, `(batch, 1, 1, 1)`."""
    pixel_values = pixel_values.float()
    centred = pixel_values - mean(pixel_values)
    deviation = mean(centred.square()).sqrt()
    ink_is_dark = mean(centred.pow(3)) < 0
    return torch.where(ink_is_dark, -centred, centred) / (deviation + 0.05)  # 0.05: an empty image stays nearly empty


class ImageTextSlotEncoder(nn.Module):
    """Image `(batch, channels, height, width)` to the memory stage's features `(batch, dim, rows, columns)`."""

    def __init__(self, config: ImageTextSlotConfig):
        super().__init__()
        encoder = config.encoder_config
        blocks = sum(encoder.depths) + encoder.fusion_depth
        rates = [encoder.drop_path_rate * block / max(blocks - 1, 1) for block in range(blocks)]
        self.normalize_contrast = encoder.normalize_contrast
        self.memory_stage = encoder.memory_stage
        self.entries, self.stages = nn.ModuleList(), nn.ModuleList()
        previous = encoder.num_channels
        for stage, (hidden_size, depth, stride) in enumerate(
            zip(encoder.hidden_sizes, encoder.depths, encoder.strides, strict=True)
        ):
            if stage == 0:
                kernel = encoder.stem_kernel_size
                padding = ((kernel - stride[0] + 1) // 2, (kernel - stride[1] + 1) // 2)
                conv = nn.Conv2d(previous, hidden_size, kernel, (stride[0], stride[1]), padding)
                entry = nn.Sequential(conv, ChannelNorm(hidden_size, eps=encoder.layer_norm_eps))
            else:
                conv = nn.Conv2d(previous, hidden_size, (stride[0], stride[1]), (stride[0], stride[1]))
                entry = nn.Sequential(ChannelNorm(previous, eps=encoder.layer_norm_eps), conv)
            self.entries.append(entry)
            self.stages.append(nn.Sequential(*[ConvBlock(encoder, hidden_size, rates.pop(0)) for _ in range(depth)]))
            previous = hidden_size
        self.context = nn.ModuleList([ContextLayer(config, encoder) for _ in range(encoder.num_context_layers)])
        memory_size = encoder.hidden_sizes[encoder.memory_stage]
        last = len(encoder.hidden_sizes) - 1
        self.context_norm = nn.LayerNorm(previous, eps=encoder.layer_norm_eps) if self.memory_stage < last else None
        self.context_proj = nn.Linear(previous, memory_size) if self.memory_stage < last else None
        self.fusion = nn.Sequential(
            *[ConvBlock(encoder, memory_size, rates.pop(0)) for _ in range(encoder.fusion_depth)]
        )

    def forward(self, pixel_values: torch.Tensor, part: torch.Tensor | None = None) -> torch.Tensor:
        """Features of the images, or of a part of each, `(batch, 4)`: left, top, right, bottom as shares of it, on
        edges of the last stage's cells."""
        if self.normalize_contrast:
            pixel_values = normalize_contrast(pixel_values).to(pixel_values.dtype)
        if part is not None:
            pixel_values = cut(pixel_values, part)
        hidden_states, memory = pixel_values, pixel_values
        for index, (entry, stage) in enumerate(zip(self.entries, self.stages, strict=True)):
            hidden_states = stage(entry(hidden_states))
            if index == self.memory_stage:
                memory = hidden_states
        if self.context:
            height, width = hidden_states.shape[2:]
            cells = hidden_states.flatten(2).transpose(1, 2)  # (batch, cells, channels)
            cells = cells + sinusoidal_positions_2d(height, width, cells.shape[-1], cells.device, part).to(cells.dtype)
            for layer in self.context:
                cells = layer(cells)
            hidden_states = cells.transpose(1, 2).unflatten(2, (height, width))
        if self.context_proj is None:
            return self.fusion(hidden_states)
        context = self.context_proj(self.context_norm(hidden_states.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.fusion(memory + nn.functional.interpolate(context, memory.shape[2:], mode="nearest"))


__all__ = ["ContextLayer", "ConvBlock", "ImageTextSlotEncoder", "normalize_contrast"]
