"""Configuration of QAViT, the image classifier and backbone with four attentions side by side."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

BRANCHES = ("window", "dilated", "channel", "bank")
_COUNTS = (
    "image_size patch_size num_channels embed_dim depth num_heads compress_ratio bottleneck_ratio window_size "
    "num_channel_groups global_bank_size global_bank_rank kv_pool_size"
).split()


@strict
class QAViTConfig(BackboneConfigMixin, PreTrainedConfig):
    """QAViT: window, dilated, channel and bank attention side by side in compressed tokens.

    Args:
        image_size: side of the square image in pixels; every other size that the patch divides works too.
        patch_size: side of a patch in pixels.
        stem: "patch" projects each patch by itself; "conv" reaches the patches by overlapping 3x3 convolutions of
            stride 2, for which `patch_size` must be a power of two. What small networks learn most from on small
            images (Lu et al., 2022, DHVT).
        embed_dim: width of a token.
        depth: number of blocks.
        num_heads: heads of the window, dilated and bank attentions.
        compress_ratio: the attentions work on tokens of width `embed_dim / compress_ratio`.
        bottleneck_ratio: what the branches found passes a perceptron of width `embed_dim / bottleneck_ratio`.
        mlp_ratio: width of the convolutional feed-forward over `embed_dim`.
        branches: which of "window", "dilated", "channel" and "bank" are there.
        window_size: largest side of an attention window in tokens. Windows of one grid are equal, so that few tokens
            are padding: a side of 14 is cut into 7 and 7, one of 8 into 4 and 4.
        dilation_factors: the dilated branch's heads are divided over these rates; at rate r a token sees all tokens
            whose row and column differ from its own by multiples of r.
        num_channel_groups: groups of channels that attend to one another.
        channel_attention: "channels": every channel attends to those of its group (Ali et al., 2021, XCiT); "tokens":
            the groups are the heads of ordinary attention over all tokens.
        global_bank_size: tokens of the bank that carries what was seen from block to block.
        global_bank_rank: width of the low-rank gateway through which the bank is written and read.
        bank_written: blocks write to the bank; otherwise each reads the same learned tokens.
        kv_pool_size: keys and values are averaged down to this many, a square number, where there are more.
        fusion: "token": each token weighs its branches; "static": one weight for each branch of a block.
        ffn_shortcut: the feed-forward's convolution has a shortcut and a norm.
        share_attention: all blocks use one set of attention projections (their norms, fusion and perceptrons differ).
        layer_scale_init_value: LayerScale at the start.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 over the blocks.
        initializer_range: standard deviation of all weights at the start; None gives each layer the inverse root of
            its fan-in, because 0.02 is that of layers 2,500 wide and hardly passes anything on in narrow ones.
        out_features: names of the hidden states that a backbone returns: "stem", "stage1", "stage2", ... Default: the
            last one, also after a change of `depth`.
        out_indices: their indices, in place of names.
    """

    model_type = "qavit"
    attribute_map = {"hidden_size": "embed_dim", "num_hidden_layers": "depth", "num_attention_heads": "num_heads"}
    keys_to_ignore_at_inference = ["bank", "fusion_weights", "hidden_states", "attentions"]

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    stem: Literal["patch", "conv"] = "patch"
    embed_dim: int = 256
    depth: int = 12
    num_heads: int = 4
    compress_ratio: int = 4
    bottleneck_ratio: int = 2
    mlp_ratio: float | int = 0.5
    branches: list[str] | tuple[str, ...] = BRANCHES
    window_size: int = 7
    dilation_factors: list[int] | tuple[int, ...] = (1, 2, 3)
    num_channel_groups: int = 8
    channel_attention: Literal["channels", "tokens"] = "channels"
    global_bank_size: int = 16
    global_bank_rank: int = 16
    bank_written: bool = True
    kv_pool_size: int = 64
    fusion: Literal["token", "static"] = "token"
    ffn_shortcut: bool = True
    share_attention: bool = False
    hidden_act: str = "gelu"
    layer_scale_init_value: float | int = 1.0
    drop_path_rate: float | int = 0.0
    initializer_range: float | None = None
    layer_norm_eps: float = 1e-6
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value):
        # `from_pretrained(folder, depth=8)` sets the depth of a configuration that is complete.
        moves_last = self.attribute_map.get(name, name) == "depth" and self.out_features == self.stage_names[-1:]
        super().__setattr__(name, value)
        if moves_last:
            self.set_output_features_output_indices(out_features=None, out_indices=None)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if self.out_features == self.stage_names[-1:]:  # the default, which a later depth moves
            del output["out_features"], output["out_indices"]
        return output

    def validate_architecture(self):
        for name in _COUNTS:
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if self.embed_dim * self.mlp_ratio < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} must make a feed-forward at least 1 wide.")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={self.drop_path_rate} must be at least 0 and below 1.")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} must be divisible by patch_size={self.patch_size}.")
        if self.stem == "conv" and (self.patch_size == 1 or self.patch_size & (self.patch_size - 1)):
            raise ValueError(f'stem="conv" needs a patch_size that is a power of two, not {self.patch_size}.')
        if self.embed_dim % self.compress_ratio or self.embed_dim % self.bottleneck_ratio:
            raise ValueError(
                f"embed_dim={self.embed_dim} must be divisible by compress_ratio={self.compress_ratio} and "
                f"bottleneck_ratio={self.bottleneck_ratio}."
            )
        if self.compressed_dim % self.num_heads or self.compressed_dim % self.num_channel_groups:
            raise ValueError(
                f"The compressed width {self.compressed_dim} must be divisible by num_heads={self.num_heads} and "
                f"num_channel_groups={self.num_channel_groups}."
            )
        if not self.branches or len(set(self.branches)) < len(self.branches) or set(self.branches) - set(BRANCHES):
            raise ValueError(f"branches={self.branches} must name one or more of {', '.join(BRANCHES)}, each once.")
        if not 1 <= len(self.dilation_factors) <= self.num_heads or min(self.dilation_factors) < 1:
            raise ValueError(
                f"dilation_factors={self.dilation_factors} must be 1 or more each, and no more of them than "
                f"num_heads={self.num_heads}."
            )
        if math.isqrt(self.kv_pool_size) ** 2 != self.kv_pool_size:
            raise ValueError(f"kv_pool_size={self.kv_pool_size} must be a square number such as 64.")
        self.verify_out_features_out_indices()

    @property
    def compressed_dim(self) -> int:
        """Width of the tokens that the attentions work on."""
        return self.embed_dim // self.compress_ratio

    @property
    def stage_names(self) -> list[str]:
        """Names of the hidden states that a backbone can return."""
        return ["stem", *(f"stage{block}" for block in range(1, self.depth + 1))]

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "QAViTConfig":
        """A named architecture.

        - `"tiny"`: the default, 224 px in patches of 16; 2.55 million parameters with 100 classes (described: 2.47).
        - `"small"`: wider and deeper; its blocks share their attention projections, which makes 5.31 million parameters
          with 100 classes (described: 5.29) in place of 7.25 million.
        - `"tiny-32"`: for images of 32 px (28 px work too), patches of 4, convolutional stem. As many parameters as
          tiny, in half as many blocks with feed-forwards four times as wide.
        - `"as_described"`: tiny as the design was first described, as far as it can be built. It keeps attention of
          the channel groups over tokens, one static weight for each branch, a bank that learns nothing from the image,
          a feed-forward convolution without shortcut and norm, and weights that start at 0.02. It does not keep what
          breaks the contract: a bank that leaks from one batch into the next, keys and values projected to a fixed
          number, which ties a model to one image size and expands windows of 49 tokens to 64, and projections that
          make 13 million parameters.
        - `"micro"`: for tests.

        Raises:
            ValueError: the name is none of these.
        """
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}; choose one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})


PRESETS: dict[str, dict] = {
    "tiny": {},
    "small": {"embed_dim": 384, "num_heads": 6, "depth": 16, "share_attention": True},
    "tiny-32": {"image_size": 32, "patch_size": 4, "stem": "conv", "depth": 6, "mlp_ratio": 2},
    "as_described": {
        "channel_attention": "tokens",
        "fusion": "static",
        "bank_written": False,
        "ffn_shortcut": False,
        "initializer_range": 0.02,
    },
    "micro": {
        "image_size": 20,
        "patch_size": 4,
        "embed_dim": 64,
        "depth": 2,
        "window_size": 3,
        "num_channel_groups": 4,
        "global_bank_size": 4,
        "global_bank_rank": 4,
        "kv_pool_size": 9,
    },
}

__all__ = ["BRANCHES", "QAViTConfig"]
