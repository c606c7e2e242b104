"""QAViT: an image classifier and backbone whose blocks look in four ways at once.

A block compresses its tokens to a quarter of their width, once, and there looks side by side within windows, over
dilated groups of the whole grid, over channels, and at a bank of 16 tokens. What is unusual: the bank belongs to the
image; each block reads what the earlier ones wrote and writes what it saw, through one low-rank gateway, with ordinary
gradients. Each token weighs what the branches found, and the output says how. There is no position table and no class
token: the convolutions in the feed-forwards tell where a token stands, so that any size works that the patch divides.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import ModelOutput, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from regard.configuration.configuration_qavit import QAViTConfig
from regard.modeling.attention import attend
from regard.modeling.grid_attention import ChannelAttention, GridAttention, Partition, pool_grid
from regard.modeling.layers import ChannelNorm, DepthwiseConv2d, DropPath


@dataclass
class QAViTOutput(ModelOutput):
    """
    Args:
        loss: cross-entropy, a scalar; given `labels`.
        logits: `(batch, num_labels)`; of the classifier only.
        last_hidden_state: tokens, row by row, after the last norm, `(batch, tokens, embed_dim)`.
        pooler_output: their mean, `(batch, embed_dim)`.
        bank: what the blocks wrote, `(batch, global_bank_size, compressed_dim)`; None without that branch.
        fusion_weights: what each token gives each branch, in the order of `config.branches`; they sum to 1,
            `(batch, depth, tokens, branches)`.
        hidden_states: tokens before the first and after each block, `(batch, tokens, embed_dim)`, on request.
        attentions: on request, eager only: for each block and branch a tuple of maps. Window: one
            `(batch, windows, heads, tokens, keys)`; dilated: the same for each rate; channel: one
            `(batch, groups, channels, channels)`; bank: the reading `(batch, heads, tokens, global_bank_size)` and the
            writing `(batch, heads, global_bank_size, tokens)`, whose tokens may be pooled.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    bank: torch.Tensor | None = None
    fusion_weights: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[tuple[tuple[torch.Tensor, ...], ...], ...] | None = None


class QAViTEmbeddings(nn.Sequential):
    """Image `(batch, channels, height, width)` to patches `(batch, embed_dim, rows, columns)`."""

    def __init__(self, config: QAViTConfig):
        layers: list[nn.Module] = []
        width, kernel_size = config.num_channels, config.patch_size
        if config.stem == "conv":
            for halvings in range(config.patch_size.bit_length() - 1, 0, -1):
                previous, width = width, config.embed_dim >> halvings
                layers.append(nn.Conv2d(previous, width, 3, stride=2, padding=1))
                layers += [ChannelNorm(width, eps=config.layer_norm_eps), ACT2FN[config.hidden_act]]
            kernel_size = 1
        super().__init__(*layers, nn.Conv2d(width, config.embed_dim, kernel_size, stride=kernel_size))


class QAViTBankGateway(nn.Module):
    """The bank's first tokens and the low-rank gateway that all blocks read and write it through."""

    is_causal = False

    def __init__(self, config: QAViTConfig):
        super().__init__()
        dim, rank = config.compressed_dim, config.global_bank_rank
        self.config = config
        self.head_dim = dim // config.num_heads
        self.scaling = self.head_dim**-0.5
        self.tokens = nn.Parameter(torch.zeros(config.global_bank_size, dim))
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.read_down = nn.Linear(dim, rank, bias=False)
        self.read_up = nn.Linear(rank, 2 * dim, bias=False)
        if config.bank_written:
            self.write_query = nn.Linear(dim, dim, bias=False)
            self.write_down = nn.Linear(dim, rank, bias=False)
            self.write_up = nn.Linear(rank, 2 * dim, bias=False)
            self.write_out = nn.Linear(dim, dim)

    def split_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (batch, heads, tokens, head_dim)

    def read(self, bank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(batch, heads, bank tokens, head_dim)` of the bank."""
        key, value = self.read_up(self.read_down(self.norm(bank))).chunk(2, dim=-1)
        return self.split_heads(key), self.split_heads(value)

    def write(self, bank: torch.Tensor, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The bank after it has looked at a grid `(batch, rows, columns, compressed_dim)`, and the weights."""
        seen = pool_grid(self.write_down(grid), self.config.kv_pool_size).flatten(1, 2)  # (batch, keys, rank)
        key, value = self.write_up(seen).chunk(2, dim=-1)
        query = self.split_heads(self.write_query(self.norm(bank)))
        output, weights = attend(self, query, self.split_heads(key), self.split_heads(value))
        return bank + self.write_out(output.flatten(2)), weights


class QAViTBankAccess(nn.Module):
    """Reads the bank, then writes to it."""

    is_causal = False

    def __init__(self, config: QAViTConfig):
        super().__init__()
        self.config = config
        self.scaling = (config.compressed_dim // config.num_heads) ** -0.5
        self.q_proj = nn.Linear(config.compressed_dim, config.compressed_dim, bias=False)

    def forward(
        self, grid: torch.Tensor, bank: torch.Tensor, gateway: QAViTBankGateway
    ) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...], torch.Tensor]:
        query = gateway.split_heads(self.q_proj(grid).flatten(1, 2))
        output, read = attend(self, query, *gateway.read(bank))
        output = output.flatten(2).unflatten(1, grid.shape[1:3])  # (batch, rows, columns, compressed_dim)
        if not self.config.bank_written:
            return output, (read,), bank
        bank, written = gateway.write(bank, grid)
        return output, (read, written), bank


class QAViTBranches(nn.Module):
    """Compresses a grid of tokens and looks at it in every way that `config.branches` names."""

    def __init__(self, config: QAViTConfig):
        super().__init__()
        dim, heads, groups, pool = (
            config.compressed_dim,
            config.num_heads,
            config.num_channel_groups,
            config.kv_pool_size,
        )
        windows = [partial(Partition.windows, largest=config.window_size)]
        dilated = [partial(Partition.dilated, rate=rate) for rate in config.dilation_factors]
        whole = [partial(Partition.dilated, rate=1)]
        make = {
            "window": lambda: GridAttention(config, dim, heads, windows, pool),
            "dilated": lambda: GridAttention(config, dim, heads, dilated, pool),
            "channel": lambda: (
                ChannelAttention(dim, groups)
                if config.channel_attention == "channels"
                else GridAttention(config, dim, groups, whole, pool)
            ),
            "bank": lambda: QAViTBankAccess(config),
        }
        self.compress = nn.Linear(config.embed_dim, dim)
        self.branches = nn.ModuleDict({name: make[name]() for name in config.branches})

    def forward(
        self, grid: torch.Tensor, bank: torch.Tensor | None, gateway: QAViTBankGateway | None
    ) -> tuple[torch.Tensor, tuple | None, torch.Tensor, torch.Tensor | None]:
        """What the branches found `(batch, rows, columns, branches, compressed_dim)`, their maps or None, the
        compressed grid `(batch, rows, columns, compressed_dim)` and the bank."""
        compressed = self.compress(grid)
        found, attentions = [], []
        for name, branch in self.branches.items():
            if name == "bank":
                output, weights, bank = branch(compressed, bank, gateway)
            else:
                output, weights = branch(compressed)
            found.append(output)
            attentions.append(weights)
        whole = all(weight is not None for weights in attentions for weight in weights)
        return torch.stack(found, dim=-2), tuple(attentions) if whole else None, compressed, bank


class QAViTGate(nn.Linear):
    """Starts at zero: all branches weigh the same at first."""


class QAViTFusion(nn.Module):
    """Weighs what the branches found and passes it through the bottleneck."""

    def __init__(self, config: QAViTConfig):
        super().__init__()
        number, dim = len(config.branches), config.compressed_dim
        bottleneck = config.embed_dim // config.bottleneck_ratio
        by_token = config.fusion == "token"
        # The softmax over a single branch is 1 and would teach nothing.
        self.gate = QAViTGate(dim, number) if by_token and number > 1 else None
        self.gate_logits = nn.Parameter(torch.zeros(number)) if not by_token and number > 1 else None
        self.down_proj = nn.Linear(number * dim, bottleneck)
        self.activation = ACT2FN[config.hidden_act]
        self.up_proj = nn.Linear(bottleneck, config.embed_dim)

    def forward(self, found: torch.Tensor, compressed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mixture `(batch, rows, columns, embed_dim)` and the weights `(batch, rows, columns, branches)`."""
        number = found.shape[-2]
        if self.gate is not None:
            weights = self.gate(compressed).softmax(-1)
        elif self.gate_logits is not None:
            weights = self.gate_logits.softmax(-1).expand(found.shape[:-1])
        else:
            weights = found.new_ones(found.shape[:-1])
        mixed = (found * (number * weights)[..., None]).flatten(-2)  # even weights leave the branches as they are
        return self.up_proj(self.activation(self.down_proj(mixed))), weights


class QAViTFeedForward(nn.Module):
    """CCF-FFN: a depth-wise convolution between two projections, `(batch, rows, columns, embed_dim)`."""

    def __init__(self, config: QAViTConfig):
        super().__init__()
        width = int(config.embed_dim * config.mlp_ratio)
        self.up_proj = nn.Linear(config.embed_dim, width)
        self.conv = DepthwiseConv2d(width, 3, shortcut=config.ffn_shortcut)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.ffn_shortcut else None
        self.activation = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(width, config.embed_dim)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        mixed = self.conv(self.up_proj(grid).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.norm is not None:
            mixed = self.norm(mixed)
        return self.down_proj(self.activation(mixed))


class QAViTLayer(GradientCheckpointingLayer):
    """Pre-norm block: the branches and their fusion, then the feed-forward."""

    def __init__(self, config: QAViTConfig, drop_path_rate: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.branches = None if config.share_attention else QAViTBranches(config)
        self.fusion = QAViTFusion(config)
        self.attention_scale = nn.Parameter(torch.ones(config.embed_dim))
        self.mlp_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.mlp = QAViTFeedForward(config)
        self.mlp_scale = nn.Parameter(torch.ones(config.embed_dim))
        self.drop_path = DropPath(drop_path_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        bank: torch.Tensor | None,
        columns: int,
        gateway: QAViTBankGateway | None,
        shared: QAViTBranches | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        grid = hidden_states.unflatten(1, (-1, columns))  # (batch, rows, columns, embed_dim)
        branches = shared if self.branches is None else self.branches
        found, _, compressed, bank = branches(self.attention_norm(grid), bank, gateway)
        mixed, weights = self.fusion(found, compressed)
        grid = grid.addcmul(self.drop_path(mixed), self.attention_scale)
        grid = grid.addcmul(self.drop_path(self.mlp(self.mlp_norm(grid))), self.mlp_scale)
        return grid.flatten(1, 2), bank, weights.flatten(1, 2)


class QAViTPreTrainedModel(PreTrainedModel):
    config: QAViTConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean of its own
    _no_split_modules = ["QAViTLayer"]
    _input_embed_layer = "embeddings"
    _supports_sdpa = True
    _supports_flash_attn = True
    _can_record_outputs = {"hidden_states": QAViTLayer, "attentions": OutputRecorder(QAViTBranches, index=1)}
    no_weight_decay = ("tokens",)  # the bank's; read by regard's trainers
    backbone_modules = ()  # likewise

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, QAViTGate):
            init.zeros_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, std=std or module.weight[0].numel() ** -0.5)
        elif isinstance(module, QAViTLayer):
            init.constant_(module.attention_scale, self.config.layer_scale_init_value)
            init.constant_(module.mlp_scale, self.config.layer_scale_init_value)
        elif isinstance(module, QAViTFusion) and module.gate_logits is not None:
            init.zeros_(module.gate_logits)
        elif isinstance(module, ChannelAttention):
            init.ones_(module.temperature)
        elif isinstance(module, QAViTBankGateway):
            init.trunc_normal_(module.tokens, std=0.02)


class QAViTModel(QAViTPreTrainedModel):
    """Image to tokens, without a head."""

    def __init__(self, config: QAViTConfig):
        super().__init__(config)
        self.embeddings = QAViTEmbeddings(config)
        self.gateway = QAViTBankGateway(config) if "bank" in config.branches else None
        self.shared = QAViTBranches(config) if config.share_attention else None
        rates = [config.drop_path_rate * block / max(config.depth - 1, 1) for block in range(config.depth)]
        self.layers = nn.ModuleList([QAViTLayer(config, rate) for rate in rates])
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> QAViTOutput:
        """
        Args:
            pixel_values: `(batch, num_channels, height, width)`; the patch size divides both sides.

        Raises:
            ValueError: the image has another number of channels, or sides that the patch size does not divide.
        """
        channels, patch = self.config.num_channels, self.config.patch_size
        if pixel_values.dim() != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values must be (batch, {channels}, height, width), got {tuple(pixel_values.shape)}."
            )
        if pixel_values.shape[2] % patch or pixel_values.shape[3] % patch:
            raise ValueError(f"Image sides {tuple(pixel_values.shape[2:])} must be divisible by {patch}; resize it.")
        embedded = self.embeddings(pixel_values.to(self.norm.weight.dtype))
        # A patch projection gives channels first in memory, and every residual sum after it would keep that order.
        hidden_states = embedded.flatten(2).transpose(1, 2).contiguous()  # (batch, tokens, embed_dim)
        bank = self.gateway.tokens.expand(pixel_values.shape[0], -1, -1) if self.gateway is not None else None
        fusion_weights = []
        for layer in self.layers:
            hidden_states, bank, weights = layer(hidden_states, bank, embedded.shape[3], self.gateway, self.shared)
            fusion_weights.append(weights)
        hidden_states = self.norm(hidden_states)
        return QAViTOutput(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states.mean(1),
            bank=bank,
            fusion_weights=torch.stack(fusion_weights, dim=1),
        )


class QAViTForImageClassification(QAViTPreTrainedModel):
    """A linear classifier of the mean token."""

    def __init__(self, config: QAViTConfig):
        super().__init__(config)
        self.model = QAViTModel(config)
        self.classifier = nn.Linear(config.embed_dim, config.num_labels)  # pyright: ignore[reportArgumentType]
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs) -> QAViTOutput:
        """
        Args:
            pixel_values: `(batch, num_channels, height, width)`; the patch size divides both sides.
            labels: classes `(batch,)`, or the share of each class `(batch, num_labels)` where images are mixed.
        """
        outputs: Any = self.model(pixel_values, **kwargs)
        outputs.logits = self.classifier(outputs.pooler_output)
        if labels is not None:
            outputs.loss = nn.functional.cross_entropy(outputs.logits.float(), labels)
        return outputs


class QAViTBackbone(BackboneMixin, QAViTPreTrainedModel):
    """Feature maps `(batch, embed_dim, rows, columns)` of the blocks that `out_features` or `out_indices` name."""

    def __init__(self, config: QAViTConfig):
        super().__init__(config)
        self.num_features = [config.embed_dim] * (config.depth + 1)
        self.model = QAViTModel(config)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BackboneOutput:
        outputs: Any = self.model(pixel_values, **kwargs)
        columns = pixel_values.shape[3] // self.config.patch_size
        feature_maps = tuple(
            self.model.norm(hidden_state).transpose(1, 2).unflatten(2, (-1, columns))
            for stage, hidden_state in zip(self.stage_names, outputs.hidden_states, strict=True)
            if stage in self.out_features
        )
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "QAViTBackbone",
    "QAViTForImageClassification",
    "QAViTModel",
    "QAViTOutput",
    "QAViTPreTrainedModel",
]
