"""QueryConditionedVQA: answers a question about an image, looking where the question points.

Any text encoder gives words, any vision encoder patches; in the layers between, the question chooses words, scales and
shifts the patches (FiLM, Perez et al., 2018), lets them attend to the words beside themselves (QA-ViT, Ganz et al.,
2024), and looks at those that suit it. What is unusual: where it looks is one distribution over the patches for each
layer, returned as `relevance`, through which the patches reach the answer, and which can be taught. The image is
encoded without the question, so that many questions of one image cost one encoding.
"""

import copy
import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoBackbone, AutoConfig, AutoModel, PreTrainedConfig
from transformers import initialization as init
from transformers.backbone_utils import BackboneConfigMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import ModelOutput, can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from regard.configuration.configuration_query_conditioned_vqa import QueryConditionedVQAConfig
from regard.modeling.layers import sinusoidal_positions_2d
from regard.modeling.losses import WeightedLosses
from regard.modeling.query_conditioned_layers import (
    AnswerHead,
    EvidenceGate,
    JointAttention,
    QueryConditionedLayer,
    StackedAttentionLayer,
)


@dataclass
class QueryConditionedVQAOutput(ModelOutput):
    """
    Args:
        loss: weighted sum of the parts, a scalar; given `labels`.
        loss_answer: cross-entropy, or binary cross-entropy summed over the answers, of the questions' mean.
        loss_relevance: divergence (KL) of relevance from its target, mean over the targets that are known; given
            `relevance_targets`.
        num_items: how many questions each part of the loss is a mean over, by its name.
        logits: `(questions, num_labels)`.
        relevance: where each layer looked, `(questions, num_layers, patches)`; sums to 1 over the patches.
        word_attention: the words by which each layer chose, `(questions, num_layers, words)`; likewise.
        image_features: patches before any question, `(images, patches, hidden_size)`, row by row; can be given back.
        hidden_states: patches after each layer, `(questions, patches, hidden_size)`, on request.
        attentions: attention of the patches to words, then patches, `(questions, heads, patches, words + patches)`, of
            each layer, on request (eager only). Empty with `conditioning="vector"`.
    """

    loss: torch.Tensor | None = None
    loss_answer: torch.Tensor | None = None
    loss_relevance: torch.Tensor | None = None
    num_items: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    relevance: torch.Tensor | None = None
    word_attention: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class QueryConditionedEncoderOutput(ModelOutput):
    """
    Args:
        last_hidden_state: patches after the last layer, `(questions, kept patches, hidden_size)`.
        query: what was looked for at last, and what was seen, `(questions, hidden_size)`.
        kept: the patches that the later layers saw, `(questions, kept patches)`; None: all.
        relevance, word_attention, hidden_states, attentions: as `QueryConditionedVQAOutput` has them.
    """

    last_hidden_state: torch.Tensor | None = None
    query: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    relevance: torch.Tensor | None = None
    word_attention: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def build_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """The encoder of a configuration, without the pooling layer that some have and nothing here would train."""
    if isinstance(config, BackboneConfigMixin):
        return AutoBackbone.from_config(config)
    return AutoModel.from_config(config, **_without_pooling(config))


def _without_pooling(config: PreTrainedConfig) -> dict[str, bool]:
    model_class = AutoModel._model_mapping[type(config)]
    pooled = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if pooled else {}


def load_encoder(source: str) -> PreTrainedModel:
    """Likewise, with published weights from a folder or a Hub repository, in float32 whatever they are stored in.

    Raises:
        OSError: there are none, or none in safetensors: nothing is unpickled.
    """
    config = AutoConfig.from_pretrained(source)
    options = {"dtype": torch.float32, "use_safetensors": True}
    if isinstance(config, BackboneConfigMixin):
        # AutoBackbone.from_pretrained takes repositories only.
        return AutoBackbone._model_mapping[type(cast(PreTrainedConfig, config))].from_pretrained(source, **options)
    return AutoModel.from_pretrained(source, **options, **_without_pooling(config))


class QueryConditionedVQAPreTrainedModel(WeightedLosses, PreTrainedModel):
    config: QueryConditionedVQAConfig
    base_model_prefix = "vqa"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the losses are means of their own
    _no_split_modules = ["QueryConditionedLayer", "StackedAttentionLayer"]
    _supports_sdpa = True  # flash attention takes no mask
    no_weight_decay = ("tokens", "cls_token", "position_embeddings")  # of encoders; read by regard's trainers
    backbone_modules = ("text_model", "vision_model")  # likewise

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std or module.weight[0].numel() ** -0.5)
        elif isinstance(module, JointAttention):
            init.zeros_(module.word_gate)
        elif isinstance(module, QueryConditionedLayer):
            init.zeros_(module.relevance_gate)
        if isinstance(module, EvidenceGate):
            init.constant_(module.bias, -4.0)


class QueryConditionedEncoder(QueryConditionedVQAPreTrainedModel):
    """The layers in which the question looks."""

    _can_record_outputs = {
        "hidden_states": OutputRecorder(QueryConditionedLayer, index=0),
        "attentions": OutputRecorder(JointAttention, index=1),
    }

    def __init__(self, config: QueryConditionedVQAConfig):
        super().__init__(config)
        layer_class = QueryConditionedLayer if config.conditioning == "words" else StackedAttentionLayer
        self.layers = nn.ModuleList([layer_class(config) for _ in range(config.num_layers)])
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        patches: torch.Tensor,
        words: torch.Tensor,
        word_mask: torch.Tensor,
        patch_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> QueryConditionedEncoderOutput:
        """
        Args:
            patches: `(questions, patches, hidden_size)`.
            words: `(questions, words, hidden_size)`.
            word_mask, patch_mask: True where there is one, `(questions, words)` and `(questions, patches)`.
        """
        weights = word_mask[..., None].to(words.dtype)
        query = (words * weights).sum(1) / weights.sum(1).clamp(min=1)
        kept, relevances, attentions = None, [], []
        for layer in self.layers:
            patches, query, relevance, chosen = layer(patches, query, words, word_mask, patch_mask)
            everywhere = relevance
            if kept is not None:
                everywhere = torch.zeros_like(relevances[0]).scatter(1, kept, relevance)
            elif self.config.keep_patches is not None and len(self.layers) > 1:
                kept = relevance.topk(min(self.config.keep_patches, relevance.shape[1]), sorted=False).indices
                patches = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[2]))
                patch_mask = None if patch_mask is None else patch_mask.gather(1, kept)
            relevances.append(everywhere)
            attentions.append(chosen)
        return QueryConditionedEncoderOutput(
            last_hidden_state=patches,
            query=query,
            kept=kept,
            relevance=torch.stack(relevances, dim=1),
            word_attention=torch.stack(attentions, dim=1),
        )


class QueryConditionedVQAModel(QueryConditionedVQAPreTrainedModel):
    """Questions about images to answers, with where each layer looked."""

    def __init__(self, config: QueryConditionedVQAConfig):
        super().__init__(config)
        text, vision, size = cast(Any, config.text_config), cast(Any, config.vision_config), config.hidden_size
        self.text_model = build_encoder(text)
        self.vision_model = build_encoder(vision)
        self.text_proj = nn.Linear(text.hidden_size, size)
        is_backbone = isinstance(vision, BackboneConfigMixin)
        channels: Any = cast(Any, self.vision_model).channels[-1] if is_backbone else vision.hidden_size
        self.patch_norm = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.vision_proj = nn.Linear(channels, size)
        self.encoder = QueryConditionedEncoder(config)
        self.head = AnswerHead(config)
        self.post_init()

    @classmethod
    def from_encoders(
        cls, config: QueryConditionedVQAConfig, text: str | None = None, vision: str | None = None
    ) -> "QueryConditionedVQAModel":
        """A new model around published encoders.

        Args:
            config: of the rest; its `text_config` and `vision_config` give way to those of the encoders.
            text, vision: folders or Hub repositories; None leaves the configuration's, new.
        """
        config = copy.deepcopy(config)
        encoders = {
            name: load_encoder(source) for name, source in (("text", text), ("vision", vision)) if source is not None
        }
        for name, encoder in encoders.items():
            setattr(config, f"{name}_config", encoder.config)
        model = cls(config)
        for name, encoder in encoders.items():
            setattr(model, f"{name}_model", encoder)
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patches `(images, patches, hidden_size)` of images `(images, channels, height, width)`, row by row."""
        # Convolutions on a CPU are faster so, and others do not mind.
        pixel_values = pixel_values.to(self.vision_proj.weight.dtype, memory_format=torch.channels_last)
        outputs: Any = self.vision_model(pixel_values)
        if isinstance(self.config.vision_config, BackboneConfigMixin):
            features = outputs.feature_maps[-1]  # (images, channels, rows, columns)
            rows, columns = features.shape[2:]
            features = features.flatten(2).transpose(1, 2)
        else:
            patch_size = self.config.vision_config.patch_size
            rows, columns = (side // patch_size for side in pixel_values.shape[2:])
            features = outputs.last_hidden_state[:, -rows * columns :]  # class and register tokens stand before
        positions = sinusoidal_positions_2d(rows, columns, self.config.hidden_size, features.device)
        return self.vision_proj(self.patch_norm(features)) + positions.to(features.dtype)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        patch_mask: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        relevance_targets: torch.Tensor | None = None,
        **kwargs,
    ) -> QueryConditionedVQAOutput:
        """
        Args:
            pixel_values: `(images, channels, height, width)`.
            input_ids: questions `(questions, words)`.
            attention_mask: 1 for a word, 0 for padding, `(questions, words)`; all are words if not given.
            patch_mask: True for the patches that may be looked at, `(images, patches)`.
            image_features: what `encode_image` gave, in place of `pixel_values`.
            image_index: the image of each question, `(questions,)`; without it question i is about image i, and a
                single image is that of all questions.
            labels: answers `(questions,)`, or the score of each answer `(questions, num_labels)`.
            relevance_targets: where the last layer should look, `(questions, patches)`, or the first and the last one,
                `(questions, 2, patches)`. Each sums to 1, or to 0 where unknown.

        Raises:
            ValueError: an input is missing, or numbers do not agree.
        """
        if input_ids is None or (pixel_values is None) == (image_features is None):
            raise ValueError("Give input_ids, and either pixel_values or image_features.")
        if image_features is None:
            assert pixel_values is not None
            image_features = self.encode_image(pixel_values)
        patches, patch_mask = self._by_question(input_ids.shape[0], image_index, image_features, patch_mask)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        words = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        words, word_mask = self.text_proj(words), attention_mask.bool()
        seen: Any = self.encoder(patches, words, word_mask, patch_mask, **kwargs)
        relevance = seen.relevance[:, -1]
        if seen.kept is not None:
            relevance = relevance.gather(1, seen.kept)
            patch_mask = None if patch_mask is None else patch_mask.gather(1, seen.kept)
        logits = self.head(seen.last_hidden_state, seen.query, relevance, patch_mask)
        return QueryConditionedVQAOutput(
            **self._losses(logits, seen.relevance, labels, relevance_targets),
            logits=logits,
            relevance=seen.relevance,
            word_attention=seen.word_attention,
            image_features=image_features,
            hidden_states=seen.hidden_states,
            attentions=seen.attentions,
        )

    def _by_question(
        self, questions: int, image_index: torch.Tensor | None, *by_image: torch.Tensor | None
    ) -> list[torch.Tensor | None]:
        """Rows of images as rows of questions."""
        images = by_image[0]
        assert images is not None
        if image_index is not None:
            if image_index.shape[0] != questions:
                raise ValueError(f"image_index names {image_index.shape[0]} images for {questions} questions.")
            return [None if rows is None else rows[image_index] for rows in by_image]
        if images.shape[0] == 1:
            return [None if rows is None else rows.expand(questions, *rows.shape[1:]) for rows in by_image]
        if images.shape[0] != questions:
            raise ValueError(f"{questions} questions about {images.shape[0]} images: image_index must say which.")
        return list(by_image)

    def _losses(
        self,
        logits: torch.Tensor,
        relevance: torch.Tensor,
        labels: torch.Tensor | None,
        relevance_targets: torch.Tensor | None,
    ) -> dict[str, Any]:
        if labels is None:
            return {}
        logits = logits.float()
        if self.config.problem_type == "multi_label_classification":
            if labels.dim() == 1:
                labels = nn.functional.one_hot(labels, logits.shape[1])
            wrong = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
            wrong = wrong.sum()
        else:
            if labels.dim() == 2:
                labels = labels / labels.sum(1, keepdim=True).clamp(min=1e-6)
            wrong = nn.functional.cross_entropy(logits, labels, reduction="sum")
        sums: dict[str, Any] = {"loss_answer": (wrong, len(logits))}
        if relevance_targets is not None:
            taught = relevance[:, [0, -1]] if relevance_targets.dim() == 3 else relevance[:, -1]
            known = relevance_targets.sum(-1) > 0
            divergence = nn.functional.kl_div(taught.float().clamp(min=1e-8).log(), relevance_targets, reduction="none")
            sums["loss_relevance"] = divergence.sum(-1).mul(known).sum(), known.sum()
        return self.average(sums)

    def loss_weights(self) -> dict[str, float]:
        return {"loss_answer": 1.0, "loss_relevance": self.config.relevance_loss_weight}


__all__ = ["QueryConditionedVQAModel", "QueryConditionedVQAOutput", "QueryConditionedVQAPreTrainedModel"]
