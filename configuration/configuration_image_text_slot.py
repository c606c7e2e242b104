"""Configuration of ImageTextSlot, the reader of all characters in one pass."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

# What a second look weighs: see `second_look_features`, then a bias.
SECOND_LOOK = ("rounding", "sureness", "repetitions", "void", "other_void", "larger", "bias")


@strict
class ImageTextSlotEncoderConfig(PreTrainedConfig):
    """The ConvNeXt-style image encoder.

    Args:
        hidden_sizes: channels of each stage.
        depths: number of convolution blocks of each stage.
        strides: `(vertical, horizontal)` stride at the entry of each stage; the first is that of the stem.
        stem_kernel_size: kernel of the stem; larger than its stride, the patches overlap.
        kernel_size: kernel of the blocks' convolution.
        depthwise: depth-wise convolution as in ConvNeXt; dense otherwise (on CPUs with matrix units a dense 3x3 costs
            less time than a depth-wise 7x7, and learns more).
        expansion: width of a block's perceptron over its channels.
        layer_scale_init_value: LayerScale at the start. ConvNeXt's 1e-6 slows a network this shallow.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 over the blocks.
        normalize_contrast: give every image mean 0, deviation 1 and ink brighter than paper before the stem.
        crop_margin: `ImageTextSlotModel.read` reads the part of an image that holds ink, with so many pixels of paper
            around it at least; None: the whole image.
        memory_stage: the stage whose cells become the slots' memory.
        num_context_layers: self-attention layers over the cells of the last stage, so that each knows the whole page.
        num_attention_heads: heads of those layers.
        context_expansion: width of those layers' perceptron over their channels.
        fusion_depth: blocks after the last stage has been added to the memory stage.
    """

    model_type = "image_text_slot_encoder"
    base_config_key = "encoder_config"

    num_channels: int = 1
    hidden_sizes: list[int] | tuple[int, ...] = (32, 64, 128, 256)
    depths: list[int] | tuple[int, ...] = (1, 1, 3, 0)
    strides: list[list[int] | tuple[int, int]] | tuple[list[int] | tuple[int, int], ...] = (
        (2, 2),
        (2, 2),
        (2, 1),
        (2, 2),
    )
    stem_kernel_size: int = 5
    kernel_size: int = 3
    depthwise: bool = False
    expansion: int = 2
    layer_scale_init_value: float = 1.0
    drop_path_rate: float | int = 0.0
    normalize_contrast: bool = True
    crop_margin: int | None = 8
    memory_stage: int = 2
    num_context_layers: int = 2
    num_attention_heads: int = 4
    context_expansion: int = 4
    fusion_depth: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6

    def validate_architecture(self):
        if not len(self.hidden_sizes) == len(self.depths) == len(self.strides):
            raise ValueError(
                f"hidden_sizes ({len(self.hidden_sizes)}), depths ({len(self.depths)}) and strides "
                f"({len(self.strides)}) must name the same number of stages."
            )
        if self.crop_margin is not None and self.crop_margin < 0:
            raise ValueError(f"crop_margin={self.crop_margin} must be 0 or more, or None for whole images.")
        if not 0 <= self.memory_stage < len(self.hidden_sizes):
            raise ValueError(f"memory_stage={self.memory_stage} is not one of the {len(self.hidden_sizes)} stages.")
        if self.num_context_layers and self.hidden_sizes[-1] % self.num_attention_heads:
            raise ValueError(
                f"The last of hidden_sizes ({self.hidden_sizes[-1]}) must be divisible by "
                f"num_attention_heads={self.num_attention_heads}."
            )

    @property
    def cell_stride(self) -> tuple[int, int]:
        """Height and width in pixels of one memory cell."""
        height = width = 1
        for vertical, horizontal in self.strides[: self.memory_stage + 1]:
            height, width = height * vertical, width * horizontal
        return height, width

    @property
    def total_stride(self) -> tuple[int, int]:
        """Height and width in pixels of one cell of the last stage; image sides must be divisible by them."""
        height = width = 1
        for vertical, horizontal in self.strides:
            height, width = height * vertical, width * horizontal
        return height, width


@strict
class ImageTextSlotAttentionConfig(PreTrainedConfig):
    """The slots and the decoder layer that fills them.

    Args:
        hidden_size: width of a slot.
        num_attention_heads: heads of cross-attention and slot self-attention.
        intermediate_size: width of the SwiGLU.
        num_decoder_steps: how often the one decoder layer is applied (its weights are shared).
        mixing_radius: a slot attends to this many neighbours on either side; 0 switches slot self-attention off.
        slot_positions: add sinusoidal positions to the learned slots.
        position_sharpness: weight of the squared distance between a slot's index and a cell's reading-order
            coordinate, subtracted from the attention scores; 0 leaves the slots to search by themselves.
    """

    model_type = "image_text_slot_attention"
    base_config_key = "slot_config"

    hidden_size: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 832
    num_decoder_steps: int = 2
    mixing_radius: int = 8
    slot_positions: bool = True
    position_sharpness: float | int = 4.0

    @property
    def reach(self) -> int:
        """How far off a slot can be felt, in slots."""
        return self.mixing_radius * self.num_decoder_steps

    def validate_architecture(self):
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be divisible by 4 and by "
                f"num_attention_heads={self.num_attention_heads}."
            )
        if self.num_decoder_steps < 1:
            raise ValueError(f"num_decoder_steps={self.num_decoder_steps} must be at least 1.")


@strict
class ImageTextSlotCounterConfig(PreTrainedConfig):
    """The counter of tokens.

    Args:
        source: "cells" counts the characters centred in each memory cell and adds them up, which also gives each cell
            its reading-order coordinate; "pooled" regresses the number from the mean of the memory.
        frames_per_cell: frames that a cell is cut into, side by side, each with one character at most.
        hidden_size: width of a frame.
        depth: number of convolution blocks over the frames.
        normalize_loss: divide the error by the square root of the true number before the Huber loss.
        loss_weight: weight of that loss.
        second_look: weights by which `ImageTextSlotModel.read` chooses, where a number was rounded by more than a
            quarter, between it and the one on the other side, by their names in `SECOND_LOOK`; None: no second look.
            `benchmarks/calibrate_counter.py` fits them.
    """

    model_type = "image_text_slot_counter"
    base_config_key = "counter_config"

    source: Literal["cells", "pooled"] = "cells"
    frames_per_cell: int = 2
    hidden_size: int = 64
    depth: int = 3
    normalize_loss: bool = True
    loss_weight: float | int = 0.1
    second_look: dict[str, float | int] | None = None

    def validate_architecture(self):
        if self.second_look is not None and set(self.second_look) != set(SECOND_LOOK):
            raise ValueError(
                f"second_look has weights of {', '.join(sorted(self.second_look)) or 'nothing'}, but needs those of "
                f"{', '.join(SECOND_LOOK)}, or None: fit them with benchmarks/calibrate_counter.py."
            )


@strict
class ImageTextSlotConfig(PreTrainedConfig):
    """ImageTextSlot: every character of an image in one pass, with their number.

    Args:
        image_size: side of the square image in pixels; other sides divisible by the encoder's stride work too.
        vocab_size: bytes, special tokens and reserved entries of the byte tokenizer.
        num_slots: most tokens that one image can give.
        label_smoothing: of the slots' cross-entropy.
        pad_slots: how many slots after the end token learn to answer with the padding token.
        pad_loss_weight: their weight beside a character's 1.
        cell_loss_weight: weight of the counts by cell.
        line_loss_weight: weight of the cells' line positions.
        character_loss_weight: weight of naming a cell's character right in the memory.
        look_loss_weight: weight of the cross-attention supervision: a slot is to look at its character's cell.
        training_slots: in training only so many slots are computed, from a random one on; None: all that the texts
            need. Slots see only their neighbours, so that few of them teach as well as all, for less.
        initializer_range: standard deviation of all weights at the start; None gives each layer the inverse root of its
            fan-in. ConvNeXt's 0.02 is that of layers 2,500 wide; with it these narrow ones hardly pass anything on.
            Learned tokens start at 0.02 either way.
        teacher_forcing: share of training images (of those whose character positions are known) for which the slots
            are told the true coordinates; the others get the predicted ones where these are nearly right.
        false_sightings: share of these others in which some characters are counted that are not there; their slots
            learn to answer with the padding token.
    """

    model_type = "image_text_slot"
    sub_configs_defaults = {  # pyright: ignore[reportAssignmentType]  (classes become SubConfigSpec)
        "encoder_config": ImageTextSlotEncoderConfig,
        "slot_config": ImageTextSlotAttentionConfig,
        "counter_config": ImageTextSlotCounterConfig,
    }
    keys_to_ignore_at_inference = [
        "loss_ce",
        "loss_count",
        "loss_cells",
        "loss_lines",
        "loss_characters",
        "loss_look",
        "hidden_states",
        "attentions",
    ]

    encoder_config: dict | ImageTextSlotEncoderConfig | None = None
    slot_config: dict | ImageTextSlotAttentionConfig | None = None
    counter_config: dict | ImageTextSlotCounterConfig | None = None
    image_size: int = 128
    vocab_size: int = 512
    num_slots: int = 1024
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2
    label_smoothing: float | int = 0.1
    pad_slots: int = 4
    pad_loss_weight: float | int = 0.1
    cell_loss_weight: float | int = 1.0
    line_loss_weight: float | int = 0.5
    character_loss_weight: float | int = 1.0
    look_loss_weight: float | int = 0.0
    teacher_forcing: float | int = 0.5
    false_sightings: float | int = 0.5
    training_slots: int | None = None
    initializer_range: float | None = None
    layer_norm_eps: float = 1e-6

    def validate_architecture(self):
        height, width = self.encoder_config.total_stride
        if self.image_size % height or self.image_size % width:
            raise ValueError(
                f"image_size={self.image_size} must be divisible by the encoder's stride {height}x{width}."
            )
        if self.training_slots is not None and self.training_slots < 1:
            raise ValueError(f"training_slots={self.training_slots} must be at least 1, or None for all.")
        if self.slot_config.position_sharpness and self.counter_config.source != "cells":
            raise ValueError('position_sharpness > 0 needs counter_config.source="cells": it uses their coordinates.')

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "ImageTextSlotConfig":
        """A named architecture: `"5m"` (the default), `"as_described"` (stride 32, one look, a pooled counter) or
        `"tiny"` (for tests).

        Raises:
            ValueError: the name is none of these.
        """
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}; choose one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})


PRESETS: dict[str, dict] = {
    "5m": {},
    "as_described": {
        "encoder_config": {
            "hidden_sizes": (80, 160, 320, 640),
            "depths": (2, 2, 2, 2),
            "strides": ((4, 4), (2, 2), (2, 2), (2, 2)),
            "stem_kernel_size": 4,
            "kernel_size": 7,
            "depthwise": True,
            "expansion": 4,
            "layer_scale_init_value": 1e-6,
            "normalize_contrast": False,
            "crop_margin": None,
            "memory_stage": 3,
            "num_context_layers": 0,
            "fusion_depth": 0,
        },
        "slot_config": {"num_decoder_steps": 1, "mixing_radius": 0, "slot_positions": False, "position_sharpness": 0},
        "counter_config": {"source": "pooled", "normalize_loss": False},
        "initializer_range": 0.02,
        "pad_slots": 0,
        "character_loss_weight": 0,
    },
    "tiny": {
        "encoder_config": {
            "hidden_sizes": (8, 16, 32, 32),
            "depths": (1, 1, 1, 0),
            "num_context_layers": 1,
            "context_expansion": 2,
            "fusion_depth": 1,
        },
        "slot_config": {"hidden_size": 32, "intermediate_size": 48, "mixing_radius": 2},
        "counter_config": {"hidden_size": 16, "depth": 1},
        "num_slots": 64,
    },
}

__all__ = [
    "SECOND_LOOK",
    "ImageTextSlotAttentionConfig",
    "ImageTextSlotConfig",
    "ImageTextSlotCounterConfig",
    "ImageTextSlotEncoderConfig",
]
