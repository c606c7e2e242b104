"""Attention over a grid of tokens `(batch, rows, columns, hidden_size)`: in groups of them, and over their channels."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from regard.modeling.attention import attend


class Partition(NamedTuple):
    """How a grid is cut into groups of equal size, with padding at the bottom and right where it does not divide.

    Args:
        groups: rows and columns of groups.
        cells: rows and columns of tokens in a group.
        interleaved: a group's tokens stand `groups` apart (dilation), not side by side (windows).
    """

    groups: tuple[int, int]
    cells: tuple[int, int]
    interleaved: bool

    @classmethod
    def windows(cls, rows: int, columns: int, largest: int) -> "Partition":
        """Windows of equal size, at most `largest` tokens a side: as few as possible, each with as little padding."""
        groups = -(-rows // largest), -(-columns // largest)
        return cls(groups, (-(-rows // groups[0]), -(-columns // groups[1])), interleaved=False)

    @classmethod
    def dilated(cls, rows: int, columns: int, rate: int) -> "Partition":
        """Tokens whose rows and columns differ by multiples of `rate`."""
        return cls((rate, rate), (-(-rows // rate), -(-columns // rate)), interleaved=True)

    def _shape(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, ...]]:
        """What rows and columns unfold to, and the order that puts groups before cells."""
        if self.interleaved:
            rows, columns = zip(self.cells, self.groups, strict=True)
            return rows, columns, (0, 2, 4, 1, 3, 5)
        rows, columns = zip(self.groups, self.cells, strict=True)
        return rows, columns, (0, 1, 3, 2, 4, 5)

    def split(self, grid: torch.Tensor) -> torch.Tensor:
        """`(batch, rows, columns, dim)` to `(batch * groups, cells, dim)`; padding is zero."""
        below, right = (g * c - side for g, c, side in zip(self.groups, self.cells, grid.shape[1:3], strict=True))
        if below or right:
            grid = nn.functional.pad(grid, (0, 0, 0, right, 0, below))
        rows, columns, order = self._shape()
        grid = grid.unflatten(2, columns).unflatten(1, rows).permute(order)
        return grid.flatten(3, 4).flatten(0, 2)

    def merge(self, groups: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """`(batch * groups, cells, dim)` back to `(batch, rows, columns, dim)`."""
        grid = groups.unflatten(1, self.cells).unflatten(0, (-1, *self.groups))
        order = (0, 3, 1, 4, 2, 5) if self.interleaved else (0, 1, 3, 2, 4, 5)
        return grid.permute(order).flatten(3, 4).flatten(1, 2)[:, :rows, :columns]

    def real(self, rows: int, columns: int, device: torch.device) -> torch.Tensor | None:
        """1 for a token of the grid, 0 for padding, `(groups, cells, 1)`; None where nothing is padded."""
        if self.groups[0] * self.cells[0] == rows and self.groups[1] * self.cells[1] == columns:
            return None
        return self.split(torch.ones(1, rows, columns, 1, device=device))


def pool_grid(grid: torch.Tensor, size: int) -> torch.Tensor:
    """Average `(batch, rows, columns, dim)` down to `size` tokens (a square number) where there are more."""
    rows, columns = grid.shape[1:3]
    if rows * columns <= size:
        return grid
    side = math.isqrt(size)
    pooled = nn.functional.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), (min(side, rows), min(side, columns)))
    return pooled.permute(0, 2, 3, 1)


class GridAttention(nn.Module):
    """Self-attention in groups of a grid's tokens; the heads are divided over several ways of grouping.

    There is no output projection: what uses several such attentions mixes them.

    Args:
        config: the model's configuration; names the attention implementation.
        hidden_size: width of the tokens.
        num_attention_heads: number of heads; divides `hidden_size`.
        partitions: one or several functions of rows and columns.
        pool_size: a group's keys and values are averaged to this many, a square number, where there are more.
    """

    is_causal = False

    def __init__(
        self,
        config: PreTrainedConfig,
        hidden_size: int,
        num_attention_heads: int,
        partitions: Sequence[Callable[[int, int], Partition]],
        pool_size: int,
    ):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.partitions = partitions
        self.pool_size = pool_size
        # Of 4 heads and 3 partitions the first gets two; each head's query, key and value stand side by side.
        heads = [len(range(i, num_attention_heads, len(partitions))) for i in range(len(partitions))]
        self.widths = [3 * self.head_dim * number for number in heads]
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)

    def forward(self, grid: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        """
        Returns:
            the output `(batch, rows, columns, hidden_size)` and for each partition the weights
            `(batch, groups, heads, cells, keys)` (None where the implementation gives none).
        """
        rows, columns = grid.shape[1:3]
        outputs, weights = [], []
        for heads, cut in zip(self.qkv_proj(grid).split(self.widths, dim=-1), self.partitions, strict=True):
            partition = cut(rows, columns)
            qkv = partition.split(heads).unflatten(-1, (-1, 3, self.head_dim))
            query, key, value = qkv.permute(3, 0, 2, 1, 4)  # each (batch * groups, heads, cells, head_dim)
            real = partition.real(rows, columns, grid.device)
            if query.shape[2] > self.pool_size:
                key, value, real = self._pool(qkv, partition, real)
            mask = None
            if real is not None:
                mask = torch.zeros_like(real, dtype=query.dtype).masked_fill(real == 0, torch.finfo(query.dtype).min)
                mask = mask[:, None, None, :, 0].repeat(grid.shape[0], 1, 1, 1)  # (batch * groups, 1, 1, keys)
            output, weight = attend(self, query, key, value, mask)
            outputs.append(partition.merge(output.flatten(2), rows, columns))
            weights.append(None if weight is None else weight.unflatten(0, (grid.shape[0], -1)))
        return torch.cat(outputs, dim=-1), tuple(weights)

    def _pool(
        self, qkv: torch.Tensor, partition: Partition, real: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values of fewer tokens, each the mean of the real ones in its place."""
        heads = qkv.shape[2]
        pooled = pool_grid(qkv[..., 1:, :].flatten(2).unflatten(1, partition.cells), self.pool_size).flatten(1, 2)
        if real is not None:
            real = pool_grid(real.unflatten(1, partition.cells), self.pool_size).flatten(1, 2)  # share of real tokens
            share = real.clamp(min=torch.finfo(real.dtype).eps).to(pooled.dtype)
            pooled = (pooled.unflatten(0, (-1, share.shape[0])) / share).flatten(0, 1)
        key, value = pooled.unflatten(-1, (heads, 2, self.head_dim)).permute(3, 0, 2, 1, 4)
        return key, value, real


def _length(vectors: torch.Tensor) -> torch.Tensor:
    """Length along the last dimension, which is kept; never 0."""
    return torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp(min=1e-12)


class ChannelAttention(nn.Module):
    """Attention of channels to those of their group (Ali et al., 2021, XCiT): every token gets the same mixture of its
    channels, chosen by how they agree over the whole grid. Costs as many operations as there are tokens.

    The map is a few channels square, so that it is always computed eagerly.

    Args:
        hidden_size: number of channels.
        num_groups: groups of channels; divides `hidden_size`.
    """

    def __init__(self, hidden_size: int, num_groups: int):
        super().__init__()
        self.num_groups = num_groups
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.temperature = nn.Parameter(torch.ones(num_groups, 1, 1))

    def forward(self, grid: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """
        Returns:
            the output `(batch, rows, columns, hidden_size)` and the weights `(batch, groups, channels, channels)`.
        """
        qkv = self.qkv_proj(grid).flatten(1, 2).transpose(1, 2).contiguous()  # a channel's tokens side by side
        query, key, value = qkv.unflatten(1, (3, self.num_groups, -1)).unbind(1)  # (batch, groups, channels, tokens)
        query = query * (self.temperature / _length(query))
        scores = query @ (key / _length(key)).transpose(-1, -2)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)  # (batch, groups, channels, channels)
        output = (weights @ value).flatten(1, 2).transpose(1, 2)  # (batch, tokens, channels)
        return output.unflatten(1, grid.shape[1:3]), (weights,)


__all__ = ["ChannelAttention", "GridAttention", "Partition", "pool_grid"]
