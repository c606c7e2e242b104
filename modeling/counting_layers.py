"""Layers of SequentialAttentionCounting, smallest first: fine cells and what the category makes of them, then what a
step of counting consults: working memory, glimpses, the objects counted so far, and refinement."""

from typing import Any, cast

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from regard.configuration.configuration_sequential_attention_counting import SequentialAttentionCountingConfig
from regard.modeling.attention import Attention
from regard.modeling.counting_outputs import CountingScene
from regard.modeling.layers import ChannelNorm, DepthwiseConv2d, sinusoidal_positions

NUM_STEP_TOKENS = 3  # <x>, <y>, <done>


class ResidualConv(nn.Module):
    """Two 3x3 convolutions beside the identity."""

    def __init__(self, channels: int, activation: str, eps: float):
        super().__init__()
        self.norm = ChannelNorm(channels, eps=eps)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.activation = ACT2FN[activation]
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + self.conv2(self.activation(self.conv1(self.norm(features))))


class FineStem(nn.Module):
    """An image `(batch, 3, height, width)` to cells `(batch, hidden_size, rows, columns)`, of `cell_size` pixels each.

    A backbone's merged patches are 28 or 32 pixels wide, and small objects share one.
    """

    def __init__(self, config: SequentialAttentionCountingConfig):
        super().__init__()
        layers, inside = [], 3
        for index, channels in enumerate(config.stem_channels):
            layers.append(nn.Conv2d(inside, channels, 3, stride=2, padding=1))
            # At half the image's size, where most pixels are, a residual convolution would cost as much as all else.
            repeats = min(index, 2)
            layers += [ResidualConv(channels, config.hidden_act, config.layer_norm_eps) for _ in range(repeats)]
            if not repeats:
                layers.append(ACT2FN[config.hidden_act])
            inside = channels
        self.layers = nn.Sequential(*layers)
        self.norm = ChannelNorm(inside, eps=config.layer_norm_eps)
        self.proj = nn.Conv2d(inside, config.hidden_size, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self.proj.weight.dtype).contiguous(memory_format=torch.channels_last)
        return self.proj(self.norm(self.layers(images)))


class EvidenceLayer(GradientCheckpointingLayer):
    """Cells `(rows, hidden_size, height, width)`, scaled and shifted by what is counted (FiLM), look at each other."""

    def __init__(self, config: SequentialAttentionCountingConfig):
        super().__init__()
        size = config.hidden_size
        self.norm = ChannelNorm(size, eps=config.layer_norm_eps)
        self.film = nn.Linear(size, 2 * size)
        self.neighbours = DepthwiseConv2d(size, 5)
        self.up_proj = nn.Conv2d(size, 2 * size, 1)
        self.activation = ACT2FN[config.hidden_act]
        self.down_proj = nn.Conv2d(2 * size, size, 1)

    def forward(self, cells: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        scale, shift = self.film(category)[..., None, None].chunk(2, dim=1)
        seen = self.norm(cells) * (1 + scale) + shift
        seen = seen + self.neighbours(seen).to(seen.dtype)
        return cells + self.down_proj(self.activation(self.up_proj(seen)))


def place_embedding(points: torch.Tensor, size: int) -> torch.Tensor:
    """Points in [0, 1], `(..., 2)`, as sines and cosines `(..., size)`."""
    return sinusoidal_positions(points * 64, size // 2).flatten(-2)


class CountedObject(nn.Module):
    """What is remembered of an object: how its cell looked, and where it was."""

    def __init__(self, config: SequentialAttentionCountingConfig):
        super().__init__()
        self.proj = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, cells: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        place = place_embedding(points, cells.shape[-1]).to(cells.dtype)
        return self.norm(self.proj(torch.cat((cells, place), dim=-1)))


class Gated(nn.Module):
    """What a part of a step adds, times a gate that starts small."""

    def __init__(self, config: SequentialAttentionCountingConfig):
        super().__init__()
        self.initial_gate = config.initial_gate
        self.gate = nn.Parameter(torch.full((1,), float(config.initial_gate)))


class WorkingMemory(Gated):
    """An LSTM over the objects counted."""

    def __init__(self, config: SequentialAttentionCountingConfig):
        super().__init__(config)
        size = config.hidden_size
        self.lstm = nn.LSTM(size, size, batch_first=True)
        self.proj = nn.Linear(size, NUM_STEP_TOKENS * size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """States `(rows, steps, hidden_size)` to what they add, `(rows, steps, 3, hidden_size)`."""
        return self.gate * self.proj(states).unflatten(-1, (NUM_STEP_TOKENS, -1))

    def remember(
        self, counted: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The state `(rows, hidden_size)` and the LSTM's cell after one more object, all of that shape."""
        lstm = cast(Any, self.lstm)  # whose own call takes four times as long for a single step
        weights = (lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0, lstm.bias_hh_l0)
        return torch.lstm_cell(counted, (hidden, cell), *weights)


class Foveation(Gated):
    """Glimpses: means of the cells under Gaussians that the step places, as wide as it wants."""

    def __init__(self, config: SequentialAttentionCountingConfig):
        super().__init__(config)
        size, self.num_glimpses = config.hidden_size, config.num_glimpses
        self.where = nn.Linear(NUM_STEP_TOKENS * size, 3 * self.num_glimpses)
        self.proj = nn.Linear(self.num_glimpses * size, NUM_STEP_TOKENS * size)

    def forward(
        self, steps: torch.Tensor, cells: torch.Tensor, places: torch.Tensor, cell_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            steps: `(rows, steps, 3, hidden_size)`.
            cells: `(rows, cells, hidden_size)`.
            places: centres of the cells in [0, 1], `(rows, cells, 2)`.
            cell_mask: True for a cell, `(rows, cells)`.

        Returns:
            what is added to `steps`, and the weights of the cells, `(rows, steps, glimpses, cells)`.
        """
        where = self.where(steps.flatten(2)).float().unflatten(-1, (self.num_glimpses, 3)).sigmoid()
        x, y, width = where.flatten(1, 2).unbind(-1)  # (rows, steps * glimpses), in shares of the image's sides
        across, down = x[..., None] - places[:, None, :, 0], y[..., None] - places[:, None, :, 1]
        distance = across * across + down * down  # (rows, steps * glimpses, cells)
        width = 0.03 + 0.3 * width[..., None]
        weights = (-distance / (2 * width * width)).masked_fill(~cell_mask[:, None], -1e4).softmax(-1)
        seen = (weights.to(cells.dtype) @ cells).unflatten(1, (*steps.shape[1:2], self.num_glimpses))
        added = self.gate * self.proj(seen.flatten(2)).unflatten(-1, (NUM_STEP_TOKENS, -1))
        return added, weights.unflatten(1, (-1, self.num_glimpses))


class CountedAttention(Gated):
    """Attention of a step to the objects counted before it, and to a token that stands for none."""

    def __init__(self, config: SequentialAttentionCountingConfig):
        super().__init__(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config, config.hidden_size, config.num_attention_heads)
        self.none_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))

    def forward(
        self, steps: torch.Tensor, counted: torch.Tensor, counted_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            steps: `(rows, steps, 3, hidden_size)`.
            counted: `(rows, objects, hidden_size)`.
            counted_mask: True for those counted before a step, `(rows, steps, objects)`; all are, if None.

        Returns:
            what is added to `steps`, and the weights of none and of the objects, `(rows, heads, steps * 3, 1 +
            objects)`, or None where the implementation gives none.
        """
        known = torch.cat((self.none_token.expand(counted.shape[0], -1, -1).to(counted.dtype), counted), dim=1)
        bias = None
        if counted_mask is not None:
            usable = nn.functional.pad(counted_mask, (1, 0), value=True)
            usable = usable[:, :, None].expand(-1, -1, NUM_STEP_TOKENS, -1).flatten(1, 2)[:, None]
            bias = torch.zeros(usable.shape, dtype=steps.dtype, device=steps.device).masked_fill(
                ~usable, torch.finfo(steps.dtype).min
            )
        memory = self.attention.project_memory(known, known)
        added, weights = self.attention(self.norm(steps).flatten(1, 2), memory, bias)
        return self.gate * added.unflatten(1, (-1, NUM_STEP_TOKENS)), weights


class SequentialReasoning(Gated):
    """Refines a step several times by the same perceptron over its three features."""

    def __init__(self, config: SequentialAttentionCountingConfig):
        super().__init__(config)
        size, self.num_steps = config.hidden_size, config.num_reasoning_steps
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.up_proj = nn.Linear(NUM_STEP_TOKENS * size, 2 * size)
        self.activation = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(2 * size, NUM_STEP_TOKENS * size)

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        for _ in range(self.num_steps):
            refined = self.down_proj(self.activation(self.up_proj(self.norm(steps).flatten(2))))
            steps = steps + self.gate * refined.unflatten(-1, (NUM_STEP_TOKENS, -1))
        return steps


class CellHeads(nn.Module):
    """What a cell says of itself: where it points, how sure it is that an object is there, and how far that reaches."""

    def __init__(self, config: SequentialAttentionCountingConfig):
        super().__init__()
        size = config.hidden_size
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.offset = nn.Linear(size, 2)
        self.score = nn.Linear(size, 1)
        self.density = nn.Linear(size, 1)
        self.reach = nn.Linear(size, 1)
        self.keys = nn.Linear(size, 2 * size, bias=False)
        self.suppression = nn.Parameter(torch.full((1,), 8.0))


class StepLayers(nn.Module):
    """What a step looks up before it points."""

    def __init__(self, config: SequentialAttentionCountingConfig):
        super().__init__()
        size = config.hidden_size
        self.counted = CountedObject(config) if config.use_memory or config.use_cross_attention else None
        self.memory = WorkingMemory(config) if config.use_memory else None
        self.foveation = Foveation(config) if config.use_foveation else None
        self.cross_attention = CountedAttention(config) if config.use_cross_attention else None
        self.reasoning = SequentialReasoning(config) if config.use_reasoning else None
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.query = nn.ModuleList([nn.Linear(size, size) for _ in range(2)])  # by <x> and <y>
        self.no_more = nn.Linear(size, 1)

    def forward(
        self,
        scene: CountingScene,
        states: torch.Tensor | None,
        counted: torch.Tensor | None,
        counted_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            states: of the working memory, `(rows, steps, hidden_size)`.
            counted: `(rows, objects, hidden_size)`.
            counted_mask: True for those counted before a step, `(rows, steps, objects)`. None: one step, after all.

        Returns:
            queries `(rows, steps, 2 * hidden_size)`, scores of "no more" `(rows, steps)`, glimpses and attention to
            the counted, or None.
        """
        number = 1 if counted_mask is None else counted_mask.shape[1]
        steps = cast(torch.Tensor, scene.steps)[:, None].expand(-1, number, -1, -1)
        glimpses = weights = None
        if self.memory is not None:
            steps = steps + self.memory(states)
        if self.foveation is not None:
            seen, glimpses = self.foveation(steps, scene.cells, scene.places, scene.cell_mask)
            steps = steps + seen
        if self.cross_attention is not None:
            recalled, weights = self.cross_attention(steps, counted, counted_mask)
            steps = steps + recalled
        if self.reasoning is not None:
            steps = self.reasoning(steps)
        x, y, done = self.norm(steps).unbind(2)
        queries = torch.cat([query(feature) for query, feature in zip(self.query, (x, y), strict=True)], dim=-1)
        return queries, self.no_more(done).squeeze(-1), glimpses, weights


__all__ = [
    "NUM_STEP_TOKENS",
    "CellHeads",
    "CountedAttention",
    "CountedObject",
    "EvidenceLayer",
    "FineStem",
    "Foveation",
    "Gated",
    "SequentialReasoning",
    "StepLayers",
    "WorkingMemory",
    "place_embedding",
]
