"""Configuration of SequentialAttentionCounting, which counts what it is told, one by one, and points at each."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig

_BYTE_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@strict
class SequentialAttentionCountingConfig(PreTrainedConfig):
    """SequentialAttentionCounting: a vision-language backbone, a grid of fine cells, and a pointer with a memory.

    Args:
        vlm_config: any Qwen2-VL or Qwen2.5-VL.
        step_token_ids: the tokens `<x>`, `<y>` and `<done>`, which stand after the image; their embeddings are this
            model's own, so that the backbone's table need not hold them.
        hidden_size: width of cells and steps.
        cell_size: side of a fine cell in pixels of the prepared image; a power of two. At most one object is counted
            in a cell, so no larger than the smallest objects.
        stem_channels: channels after each halving of the image, down to cells.
        num_evidence_layers: layers in which the category changes the cells.
        use_memory, use_foveation, use_cross_attention, use_reasoning: whether a step has working memory (an LSTM over
            what has been counted), glimpses (Gaussian attention), attention to the objects counted, and refinement.
        num_glimpses: glimpses a step.
        num_reasoning_steps: refinements a step, with shared weights.
        num_attention_heads: heads of the attention to the objects counted.
        initial_gate: what each of the four is multiplied by at first. Not 0: then its weights would have no gradient.
        marking: "memory" marks what has been counted on the cells; "image" draws it on the image, which is encoded
            anew for each object, as described.
        max_memory_objects: most objects that are counted in one image; more are counted by tiles.
        done_threshold: probability of "no more" from which on counting ends.
        done_loss_weight, where_loss_weight, location_loss_weight, count_loss_weight: of the parts of the loss.
        initializer_range: standard deviation of the layers' weights at the start; None gives each the inverse root of
            its fan-in. The backbone keeps its own.
    """

    model_type = "sequential_attention_counting"
    sub_configs_defaults = {
        "vlm_config": SubConfigSpec(
            AutoConfig,
            model_type="qwen2_vl",
            init_kwargs={
                "text_config": {
                    "vocab_size": 512,
                    **_BYTE_TOKENS,
                    "bos_token_id": 1,
                    "eos_token_id": 2,
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
                },
                "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8},
                "image_token_id": 260,
                "vision_start_token_id": 261,
                "vision_end_token_id": 262,
                "video_token_id": 266,
            },
        ),
    }
    keys_to_ignore_at_inference = [
        "loss_done",
        "loss_where",
        "loss_x",
        "loss_y",
        "loss_count",
        "cell_points",
        "glimpses",
        "counted_attention",
        "memory_states",
    ]

    vlm_config: dict | PreTrainedConfig | None = None
    step_token_ids: list[int] | tuple[int, ...] = (263, 264, 265)
    hidden_size: int = 128
    cell_size: int = 8
    stem_channels: list[int] | tuple[int, ...] = (24, 48, 96)
    num_evidence_layers: int = 2
    use_memory: bool = True
    use_foveation: bool = True
    use_cross_attention: bool = True
    use_reasoning: bool = True
    num_glimpses: int = 4
    num_reasoning_steps: int = 3
    num_attention_heads: int = 4
    initial_gate: float | int = 0.1
    marking: Literal["memory", "image"] = "memory"
    max_memory_objects: int = 50
    done_threshold: float | int = 0.5
    done_loss_weight: float | int = 1.0
    where_loss_weight: float | int = 1.0
    location_loss_weight: float | int = 1.0
    count_loss_weight: float | int = 0.1
    hidden_act: str = "gelu"
    initializer_range: float | None = None
    layer_norm_eps: float = 1e-6

    def validate_architecture(self):
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be divisible by 4 and by "
                f"num_attention_heads={self.num_attention_heads}."
            )
        if self.cell_size != 2 ** len(self.stem_channels):
            raise ValueError(
                f"cell_size={self.cell_size} must be 2 to the power of the number of stem_channels, "
                f"{len(self.stem_channels)}."
            )
        if len(self.step_token_ids) != 3:
            raise ValueError(f"step_token_ids={self.step_token_ids} must name three tokens: <x>, <y> and <done>.")
        if self.max_memory_objects < 1:
            raise ValueError(f"max_memory_objects={self.max_memory_objects} must be at least 1.")
        if not 0 < self.done_threshold < 1:
            raise ValueError(f"done_threshold={self.done_threshold} must lie between 0 and 1.")

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "SequentialAttentionCountingConfig":
        """A named architecture.

        - `"tiny"`: a small Qwen2-VL that reads bytes, to be trained from scratch.
        - `"baseline"`: tiny without memory, foveation, attention to the counted and reasoning.
        - `"qwen2-vl-2b"`: for the published weights of Qwen2-VL-2B-Instruct (`from_vlm_pretrained`).
        - `"micro"`: for tests.

        Raises:
            ValueError: the name is none of these.
        """
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}; choose one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})


_TINY: dict[str, Any] = {
    "vlm_config": {
        "model_type": "qwen2_vl",
        "text_config": {
            "vocab_size": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        "vision_config": {"depth": 2, "embed_dim": 96, "hidden_size": 192, "num_heads": 3, "patch_size": 16},
        "image_token_id": 260,
        "vision_start_token_id": 261,
        "vision_end_token_id": 262,
        "video_token_id": 266,
    },
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    "baseline": {
        **_TINY,
        "use_memory": False,
        "use_foveation": False,
        "use_cross_attention": False,
        "use_reasoning": False,
    },
    "qwen2-vl-2b": {
        "vlm_config": {
            "model_type": "qwen2_vl",
            "text_config": {
                "vocab_size": 151936,
                "hidden_size": 1536,
                "intermediate_size": 8960,
                "num_hidden_layers": 28,
                "num_attention_heads": 12,
                "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
            },
            "vision_config": {"hidden_size": 1536},
            "tie_word_embeddings": True,
        },
        "step_token_ids": [151657, 151658, 151659],
        "hidden_size": 256,
        "stem_channels": [32, 64, 128],
    },
    "micro": {"hidden_size": 16, "stem_channels": [8, 8, 8], "num_attention_heads": 2, "max_memory_objects": 5},
}

__all__ = ["SequentialAttentionCountingConfig"]
