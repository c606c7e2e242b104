"""Configuration of QueryConditionedVQA, which answers questions about images, looking where they point."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig


@strict
class QueryConditionedVQAConfig(PreTrainedConfig):
    """QueryConditionedVQA: a text and a vision encoder, and layers in which the question looks at the image.

    Args:
        text_config: any text encoder of transformers' Auto classes, such as BERT.
        vision_config: any vision encoder or backbone of them, such as ViT, ResNet or QAViT.
        hidden_size: width of words, patches and question in the layers.
        num_layers: number of query-conditioned layers.
        num_attention_heads: heads of the patches' attention.
        intermediate_size: width of the layers' perceptron.
        conditioning: "words": patches attend to words and patches, are scaled and shifted by the question (FiLM, Perez
            et al., 2018) and weighed by their relevance; "vector": stacked attention (Yang et al., 2016), where one
            vector for the question looks at patches that it does not change.
        relevance_score: how well a patch suits the question: "dot" (scaled), "additive" (Bahdanau et al., 2015) or
            "bilinear".
        keep_patches: the later layers see only so many patches, those most relevant in the first; None: all.
        hidden_dropout_prob: dropout before the classifier.
        relevance_loss_weight: weight of the divergence of the last layer's relevance from where it should be.
        initializer_range: standard deviation of the layers' weights at the start; None gives each the inverse root of
            its fan-in. The encoders keep their own.

    `problem_type` "single_label_classification" (the default) trains by cross-entropy,
    "multi_label_classification" by binary cross-entropy on soft scores, as is usual on VQA v2.
    """

    model_type = "query_conditioned_vqa"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(
            AutoConfig,
            model_type="bert",
            init_kwargs={
                "vocab_size": 512,
                "hidden_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 128,
                "max_position_embeddings": 64,
            },
        ),
        "vision_config": SubConfigSpec(
            AutoConfig,
            model_type="resnet",
            init_kwargs={"embedding_size": 16, "hidden_sizes": [32], "depths": [1], "layer_type": "basic"},
        ),
    }
    keys_to_ignore_at_inference = [
        "loss_answer",
        "loss_relevance",
        "relevance",
        "word_attention",
        "image_features",
        "hidden_states",
        "attentions",
    ]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    image_size: int = 64
    hidden_size: int = 128
    num_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 256
    conditioning: Literal["words", "vector"] = "words"
    relevance_score: Literal["dot", "additive", "bilinear"] = "dot"
    keep_patches: int | None = None
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    relevance_loss_weight: float | int = 1.0
    initializer_range: float | None = None
    layer_norm_eps: float = 1e-6

    def validate_architecture(self):
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be divisible by 4 and by "
                f"num_attention_heads={self.num_attention_heads}."
            )
        if self.num_layers < 1:
            raise ValueError(f"num_layers={self.num_layers} must be at least 1.")
        if self.keep_patches is not None and self.keep_patches < 1:
            raise ValueError(f"keep_patches={self.keep_patches} must be at least 1, or None for all.")
        if self.problem_type == "regression":
            raise ValueError('problem_type="regression": answers are classes; choose single- or multi-label.')

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "QueryConditionedVQAConfig":
        """A named architecture.

        - `"small"`: images of 64 px, encoders to be trained from scratch.
        - `"as_described"`: small with the described stacked attention on one question vector.
        - `"base"`: BERT-base and ViT-B/16 at 224 px, for published weights (`from_encoders`).
        - `"micro"`: for tests; QAViT sees.

        Raises:
            ValueError: the name is none of these.
        """
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}; choose one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})


_SMALL: dict[str, Any] = {
    "text_config": {
        "model_type": "bert",
        "vocab_size": 512,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "max_position_embeddings": 64,
    },
    "vision_config": {
        "model_type": "resnet",
        "embedding_size": 32,
        "hidden_sizes": [64, 128],
        "depths": [2, 3],
        "layer_type": "basic",
        "out_features": ["stage2"],
    },
}

PRESETS: dict[str, dict[str, Any]] = {
    "small": _SMALL,
    "as_described": {**_SMALL, "conditioning": "vector"},
    "base": {
        "text_config": {"model_type": "bert"},
        "vision_config": {"model_type": "vit"},
        "image_size": 224,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "problem_type": "multi_label_classification",
    },
    "micro": {
        "text_config": {
            "model_type": "bert",
            "vocab_size": 80,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 32,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        "vision_config": {
            "model_type": "qavit",
            "image_size": 20,
            "patch_size": 4,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "window_size": 3,
            "num_channel_groups": 2,
            "dilation_factors": [1, 2],
            "global_bank_size": 4,
            "global_bank_rank": 4,
            "out_features": ["stage2"],
        },
        "image_size": 20,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "hidden_dropout_prob": 0.0,
    },
}

__all__ = ["QueryConditionedVQAConfig"]
