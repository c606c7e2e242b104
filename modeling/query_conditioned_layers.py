"""Layers of QueryConditionedVQA, smallest first: scores of relevance, attention to words and patches, the layer in
which a question looks at an image, the described one beside it, and the head that answers."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from regard.configuration.configuration_query_conditioned_vqa import QueryConditionedVQAConfig
from regard.modeling.attention import attend


def masked_softmax(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dimension where `mask` is true; even where it is true nowhere."""
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.float().softmax(-1).to(scores.dtype)


class RelevanceScore(nn.Module):
    """How well each of `(batch, items, hidden_size)` suits a query `(batch, hidden_size)`: scores `(batch, items)`."""

    def __init__(self, kind: str, hidden_size: int):
        super().__init__()
        self.kind = kind
        self.scaling = hidden_size**-0.5  # of bilinear scores too, which saturate without it
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.q_proj = nn.Linear(hidden_size, hidden_size) if kind != "bilinear" else None
        self.score = nn.Linear(hidden_size, 1, bias=False) if kind == "additive" else None

    def forward(self, query: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        if self.q_proj is not None:
            query = self.q_proj(query)
        keys = self.k_proj(items)
        if self.score is not None:
            return self.score((query[:, None] + keys).tanh()).squeeze(-1)
        return (keys @ query[..., None]).squeeze(-1) * self.scaling


class JointAttention(nn.Module):
    """Patches attend to words and patches. What the words give passes a gate of each head that starts at zero, so that
    at first an image is seen as if nothing had been asked (QA-ViT)."""

    is_causal = False

    def __init__(self, config: QueryConditionedVQAConfig):
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.head_dim = size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size, bias=False)  # a key bias cancels in the softmax
        self.v_proj = nn.Linear(size, size)
        self.o_proj = nn.Linear(size, size)
        self.word_gate = nn.Parameter(torch.zeros(config.num_attention_heads, 1, 1))

    def _split_heads(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (batch, heads, tokens, head_dim)

    def forward(
        self, patches: torch.Tensor, words: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        both = torch.cat((words, patches), dim=1)
        key, value = self._split_heads(self.k_proj(both)), self._split_heads(self.v_proj(both))
        gate = self.word_gate.tanh().expand(-1, words.shape[1], -1)
        gate = torch.cat((gate, gate.new_ones(len(gate), patches.shape[1], 1)), dim=1)  # (heads, words + patches, 1)
        query = self._split_heads(self.q_proj(patches))
        output, weights = attend(self, query, key, value * gate, attention_mask)
        return self.o_proj(output.flatten(2)), weights


class QueryConditionedLayer(GradientCheckpointingLayer):
    """The question chooses words, changes the patches by them, and looks."""

    def __init__(self, config: QueryConditionedVQAConfig):
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.query_norm = nn.LayerNorm(size, eps=eps)
        self.word_score = RelevanceScore("dot", size)
        self.word_proj = nn.Linear(size, size)
        self.film = nn.Linear(size, 2 * size)
        self.attention_norm = nn.LayerNorm(size, eps=eps)
        self.attention = JointAttention(config)
        self.mlp_norm = nn.LayerNorm(size, eps=eps)
        self.mlp = nn.Sequential(
            nn.Linear(size, config.intermediate_size),
            ACT2FN[config.hidden_act],
            nn.Linear(config.intermediate_size, size),
        )
        self.look_norm = nn.LayerNorm(size, eps=eps)
        self.patch_score = RelevanceScore(config.relevance_score, size)
        self.look_proj = nn.Linear(size, size)
        self.relevance_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        patches: torch.Tensor,
        query: torch.Tensor,
        words: torch.Tensor,
        word_mask: torch.Tensor,
        patch_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            patches: `(questions, patches, hidden_size)`.
            query: what is being looked for, `(questions, hidden_size)`.
            words: `(questions, words, hidden_size)`.
            word_mask, patch_mask: True where there is one, `(questions, words)` and `(questions, patches)`.

        Returns:
            patches and query afterwards, relevance `(questions, patches)` and word attention `(questions, words)`.
        """
        chosen = masked_softmax(self.word_score(self.query_norm(query), words), word_mask)
        query = query + self.word_proj((chosen[:, None] @ words).squeeze(1))
        scale, shift = self.film(query)[:, None].chunk(2, dim=-1)
        usable = word_mask if patch_mask is None else torch.cat((word_mask, patch_mask), dim=1)
        bias = torch.zeros(usable.shape, device=usable.device).masked_fill(~usable, torch.finfo(patches.dtype).min)
        if patch_mask is None:
            bias = nn.functional.pad(bias, (0, patches.shape[1]))
        conditioned = self.attention_norm(patches) * (1 + scale) + shift
        patches = patches + self.attention(conditioned, words, bias[:, None, None])[0]
        patches = patches + self.mlp(self.mlp_norm(patches))
        seen = self.look_norm(patches)
        relevance = masked_softmax(self.patch_score(query, seen), patch_mask)
        query = query + self.look_proj((relevance[:, None] @ seen).squeeze(1))
        # 1 for the most relevant patch; the gate decides how far the others fade.
        share = relevance / relevance.amax(-1, keepdim=True)
        patches = patches * (1 + self.relevance_gate.tanh() * (share - 1))[..., None]
        return patches, query, relevance, chosen


class StackedAttentionLayer(GradientCheckpointingLayer):
    """One vector for the question looks at patches that it does not change, and adds what it saw to itself (Yang et
    al., 2016)."""

    def __init__(self, config: QueryConditionedVQAConfig):
        super().__init__()
        self.patch_score = RelevanceScore(config.relevance_score, config.hidden_size)
        self.look_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        patches: torch.Tensor,
        query: torch.Tensor,
        words: torch.Tensor,
        word_mask: torch.Tensor,
        patch_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `QueryConditionedLayer`; the question vector is the words' mean, so that the word attention is even."""
        relevance = masked_softmax(self.patch_score(query, patches), patch_mask)
        query = query + self.look_proj((relevance[:, None] @ patches).squeeze(1))
        return patches, query, relevance, word_mask / word_mask.sum(-1, keepdim=True)


class EvidenceGate(nn.Linear):
    """Which patches are evidence; starts nearly closed, because few are."""


class AnswerHead(nn.Module):
    """Query, what it last looked at, how the two match, and a sum over all patches that bear on it -> logits.

    Concatenated, query and patch are hardly ever compared ("is there a teal shape?" stayed at its prior where shapes
    and colours were named without an error): their product compares them. A mean cannot count: the sum, of patches
    weighed by a gate of each, can. The described head has neither.
    """

    def __init__(self, config: QueryConditionedVQAConfig):
        super().__init__()
        size = config.hidden_size
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        compares = config.conditioning == "words"
        self.match_proj = nn.Linear(size, size) if compares else None
        self.evidence_gate = EvidenceGate(size, config.num_attention_heads) if compares else None
        self.evidence = nn.Linear(size, size) if compares else None
        self.fusion = nn.Linear((4 if compares else 2) * size, size)
        self.fusion_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(size, config.num_labels)  # pyright: ignore[reportArgumentType]

    def forward(
        self, patches: torch.Tensor, query: torch.Tensor, relevance: torch.Tensor, patch_mask: torch.Tensor | None
    ) -> torch.Tensor:
        patches = self.norm(patches)
        looked = (relevance[:, None] @ patches).squeeze(1)
        parts = [query, looked]
        if self.match_proj is not None:
            parts.append(self.match_proj(query) * looked)
        if self.evidence_gate is not None:
            gate = self.evidence_gate(patches).sigmoid()  # (questions, patches, heads)
            if patch_mask is not None:
                gate = gate * patch_mask[..., None]
            evidence = self.evidence(patches).unflatten(-1, (gate.shape[-1], -1))  # (questions, patches, heads, width)
            parts.append((gate[..., None] * evidence).sum(1).flatten(1))
        fused = self.fusion(torch.cat(parts, dim=-1))
        return self.classifier(self.dropout(self.activation(self.fusion_norm(fused))))


__all__ = [
    "AnswerHead",
    "EvidenceGate",
    "JointAttention",
    "QueryConditionedLayer",
    "RelevanceScore",
    "StackedAttentionLayer",
    "masked_softmax",
]
