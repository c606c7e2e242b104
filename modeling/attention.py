"""Multi-head attention through transformers' attention interface (eager, sdpa, ... by `attn_implementation`)."""

from typing import Any

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot-product attention that returns its weights; query, key, value: `(batch, heads, tokens, head_dim)`."""
    weights = query * scaling @ key.transpose(-1, -2)  # (batch, heads, queries, keys)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    need_weights: bool = False,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by the implementation that `module.config` names, scaled by `module.scaling`.

    Args:
        query, key, value: `(batch, heads, tokens, head_dim)`.
        attention_mask: added to the scores, broadcast to `(batch, heads, queries, keys)`. Flash kernels take none, so
            under them a call that has one goes to sdpa.
        need_weights: return the weights under every implementation (computes them eagerly).

    Returns:
        the output `(batch, queries, heads, head_dim)` and the weights `(batch, heads, queries, keys)` or None.
    """
    config: Any = module.config
    implementation = config._attn_implementation or "eager"
    if need_weights:
        implementation = "eager"
    elif attention_mask is not None and is_flash_attention_requested(requested_attention_implementation=implementation):
        implementation = "sdpa"
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    if attention_mask is not None:
        attention_mask = attention_mask.to(query.dtype)
    return attention(module, query, key, value, attention_mask, scaling=module.scaling, **kwargs)


class Attention(nn.Module):
    """Attention of `(batch, queries, hidden_size)` to a memory, or to itself.

    Args:
        config: the model's configuration; names the attention implementation.
        hidden_size: width of queries, memory and output.
        num_attention_heads: number of heads; divides `hidden_size`.
    """

    is_causal = False

    def __init__(self, config: PreTrainedConfig, hidden_size: int, num_attention_heads: int):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)  # a key bias cancels in the softmax
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def _split_heads(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (batch, heads, tokens, head_dim)

    def project_memory(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(batch, heads, tokens, head_dim)` of a memory, to be used by several calls."""
        return self._split_heads(self.k_proj(keys)), self._split_heads(self.v_proj(values))

    def forward(
        self,
        hidden_states: torch.Tensor,
        memory: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        need_weights: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: queries `(batch, queries, hidden_size)`.
            memory: what `project_memory` gave; the queries themselves if None.
            attention_mask: added to the scores, broadcast to `(batch, heads, queries, keys)`.
            need_weights: return the weights under every implementation (computes them eagerly).

        Returns:
            the output `(batch, queries, hidden_size)` and the weights `(batch, heads, queries, keys)` or None.
        """
        key, value = memory if memory is not None else self.project_memory(hidden_states, hidden_states)
        query = self._split_heads(self.q_proj(hidden_states))
        output, weights = attend(self, query, key, value, attention_mask, need_weights, **kwargs)
        return self.o_proj(output.flatten(2)), weights


__all__ = ["Attention", "attend", "eager_attention_forward"]
