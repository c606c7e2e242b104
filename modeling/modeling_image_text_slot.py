"""ImageTextSlot: reads all characters of an image in one pass, with their number.

A ConvNeXt-style encoder turns the image into cells of 4x8 pixels; up to 1,024 slots, one a token, read them by
cross-attention, all at once. What is unusual: the slots do not search. A head counts how many characters are centred in
each cell and on which line the cell lies; adding the counts up in reading order gives each cell the index of its
characters, and slot i looks where the index is i. The sum is the number of characters, so the counter and the reading
agree. Slots see only their neighbours, so that those past the end of the text need not be computed.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import ModelOutput, can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from regard.configuration.configuration_image_text_slot import SECOND_LOOK, ImageTextSlotConfig
from regard.modeling.attention import Attention
from regard.modeling.image_text_slot_blocks import MOST_NEAR, NOWHERE, near_cells, number_of_blocks, with_neighbours
from regard.modeling.image_text_slot_counter import CellCounter, CellCounts, Gaze
from regard.modeling.image_text_slot_crop import common_size, find_ink, group_by_size, uncut, within
from regard.modeling.image_text_slot_encoder import ConvBlock, ImageTextSlotEncoder, normalize_contrast
from regard.modeling.image_text_slot_second_look import (
    MOST_DOUBTS,
    Look,
    false_sightings,
    second_look_features,
    second_thoughts,
    seen_tokens,
    splice,
)
from regard.modeling.layers import SwiGLU, sinusoidal_positions, sinusoidal_positions_2d
from regard.modeling.losses import WeightedLosses

OCCUPANCY_FLOOR = 1e-4  # the share of a character that every cell keeps, so that an empty one stays visible


@dataclass
class ImageTextSlotOutput(ModelOutput):
    """
    Args:
        loss: weighted sum of the parts, a scalar; given `labels`.
        loss_ce: cross-entropy of the slots.
        loss_count: Huber loss of the number of tokens.
        loss_cells: cross-entropy of the characters' presence in the counter's frames, a character.
        loss_lines: smooth L1 loss of the line positions, in cell heights.
        loss_characters: cross-entropy of the characters named in their cells.
        loss_look: negative log of the mean attention of each slot on its character's cell.
        num_items: how many tokens, images, characters or cells each part of the loss is a mean over, by its name.
        logits: `(batch, slots, vocab_size)`.
        count_pred: expected number of tokens, start and end included, `(batch, 1)`.
        occupancy: expected number of characters in each cell, `(batch, cells)`; None with a pooled counter.
        hidden_states: slots after each decoder step, `(batch, slots, hidden_size)`, on request.
        attentions: cross-attention `(batch, heads, slots, memory)` of each decoder step, on request (eager only); the
            memory is the cells row by row, then, where cells are counted, the start and the end.
    """

    loss: torch.Tensor | None = None
    loss_ce: torch.Tensor | None = None
    loss_count: torch.Tensor | None = None
    loss_cells: torch.Tensor | None = None
    loss_lines: torch.Tensor | None = None
    loss_characters: torch.Tensor | None = None
    loss_look: torch.Tensor | None = None
    num_items: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    count_pred: torch.Tensor | None = None
    occupancy: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class ImageTextSlotReading:
    """
    Args:
        sequences: for each image the token ids `(tokens,)`, start and end included.
        scores: for each image the probability of each of these tokens, `(tokens,)`.
        boxes: for each image the region each token was read from, `(tokens, 4)`: left, top, right, bottom as shares of
            the square image; NaN for start and end.
        count_pred: number of tokens by the counter, start and end included, `(batch, 1)`; a whole number where cells
            are counted.
    """

    sequences: list[torch.Tensor]
    scores: list[torch.Tensor]
    boxes: list[torch.Tensor]
    count_pred: torch.Tensor


class MemoryGrid(NamedTuple):
    """Rows and columns of memory cells, and the part of each image that they cover, `(batch, 4)`: left, top, right,
    bottom as shares of the image; None for all of it. Parts are of one size, on edges of the last stage's cells."""

    rows: int
    columns: int
    part: torch.Tensor | None = None


class SlotDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm: each slot looks at the memory, then at its neighbours, then thinks."""

    def __init__(self, config: ImageTextSlotConfig):
        super().__init__()
        slot = config.slot_config
        self.mixing_radius = slot.mixing_radius
        self.cross_norm = nn.LayerNorm(slot.hidden_size, eps=config.layer_norm_eps)
        self.cross_attention = Attention(config, slot.hidden_size, slot.num_attention_heads)
        self.mixing = Attention(config, slot.hidden_size, slot.num_attention_heads) if slot.mixing_radius else None
        self.mixing_norm = nn.LayerNorm(slot.hidden_size, eps=config.layer_norm_eps) if slot.mixing_radius else None
        self.mlp_norm = nn.LayerNorm(slot.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SwiGLU(slot.hidden_size, slot.intermediate_size)

    def forward(
        self,
        slots: torch.Tensor,
        memory: tuple[torch.Tensor, torch.Tensor],
        position_bias: torch.Tensor | None,
        neighbours: torch.Tensor | None,
        need_weights: bool = False,
        blocks: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The slots `(batch, slots, hidden_size)` and the weights of their look. `neighbours`, a mask `(batch, 1, kept,
        slots)`, says how many slots to go on with: the first ones."""
        looked, weights = self.cross_attention(
            self.cross_norm(slots), memory, attention_mask=position_bias, need_weights=need_weights
        )
        slots = slots + looked
        if self.mixing is not None and self.mixing_norm is not None and neighbours is not None:
            kept = neighbours.shape[2]
            normed = self.mixing_norm(slots)
            keys, values = (
                with_neighbours(states.transpose(1, 2), blocks, self.mixing_radius).transpose(1, 2)
                for states in self.mixing.project_memory(normed, normed)
            )
            mixed, _ = self.mixing(normed[:, :kept], (keys, values), attention_mask=neighbours)
            slots = slots[:, :kept] + mixed
        return slots + self.mlp(self.mlp_norm(slots)), weights


class ImageTextSlotPreTrainedModel(WeightedLosses, PreTrainedModel):
    config: ImageTextSlotConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the losses are means of their own
    _no_split_modules = ["ConvBlock", "ContextLayer"]  # the decoder is called by its parts, which FSDP must not gather
    _supports_sdpa = True  # flash and flex attention take no dense additive bias
    _can_record_outputs = {
        "hidden_states": SlotDecoderLayer,
        "attentions": OutputRecorder(Attention, index=1, layer_name="cross_attention"),
    }
    no_weight_decay = ("slots", "boundaries")  # learned tokens, read by regard's trainers
    backbone_modules = ()  # likewise

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, std=std or module.weight[0].numel() ** -0.5)
        elif isinstance(module, ConvBlock):
            init.constant_(module.layer_scale, self.config.encoder_config.layer_scale_init_value)
        elif isinstance(module, ImageTextSlotModel):
            init.trunc_normal_(module.slots, std=0.02)
            if module.boundaries is not None:
                init.trunc_normal_(module.boundaries, std=0.02)


class ImageTextSlotModel(ImageTextSlotPreTrainedModel):
    """Image to text: encoder, counter, slots and the classifier of their tokens."""

    def __init__(self, config: ImageTextSlotConfig):
        super().__init__(config)
        encoder, slot = config.encoder_config, config.slot_config
        memory_size = encoder.hidden_sizes[encoder.memory_stage]
        self.encoder = ImageTextSlotEncoder(config)
        self.memory_norm = nn.LayerNorm(memory_size, eps=config.layer_norm_eps)
        self.memory_proj = nn.Linear(memory_size, slot.hidden_size)
        self.counts_cells = config.counter_config.source == "cells"
        self.counter = CellCounter(config, memory_size) if self.counts_cells else nn.Linear(memory_size, 1)
        self.slots = nn.Parameter(torch.zeros(config.num_slots, slot.hidden_size))
        guided = slot.position_sharpness > 0
        self.boundaries = nn.Parameter(torch.zeros(2, slot.hidden_size)) if guided else None  # start, end of the text
        self.distance_proj = nn.Linear(6, slot.hidden_size) if guided else None
        self.decoder = SlotDecoderLayer(config)
        self.slot_norm = nn.LayerNorm(slot.hidden_size, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(slot.hidden_size, config.vocab_size)
        self.slot_limit: int | None = None  # while training, slots past it are not computed
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.entries[0]

    def _check_shape(self, pixel_values: torch.Tensor):
        encoder = self.config.encoder_config
        height, width = encoder.total_stride
        if pixel_values.dim() != 4 or pixel_values.shape[1] != encoder.num_channels:
            raise ValueError(
                f"pixel_values must be (batch, {encoder.num_channels}, height, width), got {tuple(pixel_values.shape)}."
            )
        if pixel_values.shape[2] % height or pixel_values.shape[3] % width:
            raise ValueError(
                f"Image sides {tuple(pixel_values.shape[2:])} must be divisible by {height} and {width}; resize it."
            )

    def encode(self, pixel_values: torch.Tensor, part: torch.Tensor | None = None) -> tuple[torch.Tensor, MemoryGrid]:
        """Memory `(batch, cells, memory_size)` of images `(batch, channels, height, width)`, or of a `part` of each
        (see `MemoryGrid`).

        Raises:
            ValueError: the image has another number of channels, or sides that the encoder's stride does not divide.
        """
        self._check_shape(pixel_values)
        features = self.encoder(pixel_values.to(self.memory_proj.weight.dtype), part)
        memory = self.memory_norm(features.flatten(2).transpose(1, 2))  # (batch, cells, memory_size)
        return memory, MemoryGrid(features.shape[2], features.shape[3], part)

    def _memory_states(self, memory: torch.Tensor, grid: MemoryGrid) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that slots look at: the cells, then, where the gaze is led, start and end of the text."""
        values = self.memory_proj(memory)
        positions = sinusoidal_positions_2d(
            grid.rows, grid.columns, values.shape[-1], values.device, grid.part
        )  # ([batch,] cells, hidden_size)
        keys = values + positions.to(values.dtype)
        if self.boundaries is not None:
            boundaries = self.boundaries.to(values.dtype).expand(memory.shape[0], -1, -1)
            keys, values = torch.cat((keys, boundaries), 1), torch.cat((values, boundaries), 1)
        return self.decoder.cross_attention.project_memory(keys, values)

    def _decode(
        self,
        memory_states: tuple[torch.Tensor, torch.Tensor],
        index: torch.Tensor,
        gaze: tuple[torch.Tensor, ...] | None,
        need_weights: bool = False,
        blocks: int = 1,
        needed: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits `(batch, slots, vocab_size)` of some slots and the weights of their last look.

        Args:
            memory_states: keys and values, `(batch, heads, memory, head_dim)`.
            index: of the slots, `(batch, slots)`, or `(1, slots)` of all images alike; neighbours stand side by side.
            gaze: where the slots are to look: see `Gaze`, whose first three parts are used.
            need_weights: return the weights; else None.
            blocks: so many rows of the batch, one after another, are blocks of one image's slots.
            needed: of so many slots, the first ones, the logits are wanted; the others are only felt. None, as it must
                be with several blocks: of all.
        """
        slot = self.config.slot_config
        keys = memory_states[0]
        slots = nn.functional.embedding(index, self.slots)
        if slot.slot_positions:
            slots = slots + sinusoidal_positions(index, slot.hidden_size).to(slots.dtype)
        slots = slots.expand(keys.shape[0], -1, -1)
        position_bias = None
        if gaze is not None:
            position_bias, distance = self._gaze(*gaze[:3], index)
            slots = slots + self.distance_proj(distance.to(slots.dtype))
            position_bias = position_bias[:, None]  # (batch, 1, slots, memory): the same for all heads
        neighbours = None
        if slot.mixing_radius:
            beside = with_neighbours(index, blocks, slot.mixing_radius, NOWHERE)
            far = (index[:, :, None] - beside[:, None]).abs() > slot.mixing_radius
            neighbours = torch.zeros(far.shape, device=far.device).masked_fill(far, torch.finfo(keys.dtype).min)
            neighbours = neighbours[:, None]  # (batch, 1, slots, slots and those beside the block)
        weights = None
        for steps_left in reversed(range(slot.num_decoder_steps)):
            there = slots.shape[1]
            kept = there if needed is None else min(there, needed + steps_left * slot.mixing_radius)
            slots, weights = self.decoder(
                slots,
                memory_states,
                None if position_bias is None else position_bias[:, :, :there],
                None if neighbours is None else neighbours[:, :, :kept, : None if blocks > 1 else there],
                need_weights and not steps_left,
                blocks,
            )
        return self.classifier(self.slot_norm(slots)), weights

    def _gaze(
        self, coordinates: torch.Tensor, occupancy: torch.Tensor, count: torch.Tensor, index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bias of each slot's attention `(batch, slots, memory)` and what the slot is told of its distance to the
        place it is sent to, `(batch, slots, 6)`. The memory is the cells, then the start, then the end of the text.
        `index` is that of the slots, `(batch, slots)` or `(1, slots)`."""
        start = torch.zeros_like(count)
        coordinates = torch.cat((coordinates, start, count - 1), dim=1)[:, None]  # (batch, 1, memory)
        occupancy = torch.cat((occupancy, start + 1, start + 1), dim=1)[:, None]
        offset = index[..., None] - coordinates  # (batch, slots, memory)
        outside = (offset.abs() - ((occupancy - 1) / 2).clamp(min=0)).clamp(min=0)
        sharpness = self.config.slot_config.position_sharpness
        bias = occupancy.clamp(OCCUPANCY_FLOOR, 1.0).log() - sharpness * outside.square()
        distance = (bias.softmax(-1) * offset).sum(-1, keepdim=True).clamp(-2, 2)  # (batch, slots, 1)
        waves = distance * torch.tensor([0.5, 1.0, 2.0], device=distance.device) * torch.pi
        return bias, torch.cat((waves.sin(), waves.cos()), dim=-1)

    def _count(self, memory: torch.Tensor, grid: MemoryGrid) -> tuple[torch.Tensor, CellCounts | None]:
        """Expected number of tokens `(batch, 1)` and, where cells are counted, what each holds."""
        if not self.counts_cells:
            return self.counter(memory.mean(1)).float(), None
        cells = self.counter(memory, grid.rows, grid.columns)
        return cells.logits.sigmoid().sum((1, 2))[:, None] + 2, cells

    @can_return_tuple
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        character_positions: torch.Tensor | None = None,
        part: torch.Tensor | None = None,
        **kwargs,
    ) -> ImageTextSlotOutput:
        """
        Args:
            pixel_values: `(batch, 1, height, width)`.
            labels: token ids `(batch, tokens)` from start to end, then -100; as many slots are computed as there are
                columns, all `num_slots` without labels.
            attention_mask: 1 for a real token, `(batch, tokens)`; from the labels if not given.
            character_positions: for each token the horizontal and vertical centre of its character, and the height of
                its line at the vertical middle, as shares of the image `(batch, tokens, 3)`; -1 where unknown.
            part: read this part of each image only; see `MemoryGrid`.
        """
        memory, grid = self.encode(pixel_values, part)
        count_pred, cells = self._count(memory, grid)
        targets = None
        if labels is not None:
            if labels.shape[1] > self.config.num_slots:
                raise ValueError(f"labels have {labels.shape[1]} columns, the model {self.config.num_slots} slots.")
            attention_mask = labels.ge(0) if attention_mask is None else attention_mask
            if cells is not None and character_positions is not None:
                targets = self._cell_targets(character_positions, labels, grid)
        gaze = None
        if cells is not None and self.config.slot_config.position_sharpness > 0:
            if self.training and targets is not None and attention_mask is not None:
                *places, seen = self._teach(targets, attention_mask, cells)
                gaze = tuple(places)
                if seen is not None and labels is not None:
                    labels = self._labels_seen(labels, seen, self.config.pad_token_id)
                    targets["cell"] = self._labels_seen(targets["cell"], seen, -1)
            else:
                gaze = self.counter.gaze(cells.logits.sigmoid(), cells.line_offset)
        window = self._window(labels)
        need_weights = targets is not None and self.config.look_loss_weight > 0
        index = torch.arange(window.start, window.stop, device=memory.device)[None]
        logits, weights = self._decode(self._memory_states(memory, grid), index, gaze, need_weights)
        losses: dict[str, Any] = {}
        if labels is not None:
            looked = weights if need_weights else None
            losses = self._losses(logits, window, count_pred, labels, attention_mask, memory, cells, targets, looked)
        occupancy = None if cells is None else self.counter.by_cell(cells.logits.sigmoid())
        return ImageTextSlotOutput(**losses, logits=logits, count_pred=count_pred, occupancy=occupancy)

    def _window(self, labels: torch.Tensor | None) -> range:
        """The slots to compute: as many as there are columns of labels, all without; in training perhaps some only."""
        columns, window = self.config.num_slots if labels is None else labels.shape[1], self.config.training_slots
        if self.training and self.slot_limit is not None:
            columns = min(columns, self.slot_limit)
        if not self.training or window is None or window >= columns:
            return range(columns)
        filled = columns if labels is None else min(columns, int(labels.ge(0).any(0).sum()))
        start = random.randrange(max(filled - window, 0) + 1)
        return range(start, start + window)

    def _cell_targets(self, positions: torch.Tensor, labels: torch.Tensor, grid: MemoryGrid) -> dict[str, torch.Tensor]:
        """What the boxes say of the cells, each `(batch, cells)`: `counts`, `coordinates`, `lines` (distance of the
        line below the cell's centre in cell heights), `characters` (the token where there is but one, else -100);
        besides `frames`, 1 where a character is centred, `(batch, rows, frames)`, `cell` `(batch, tokens)` (-1 where
        unknown) and `known` `(batch,)`."""
        rows, columns = grid.rows, grid.columns
        placed = positions[..., 0].ge(0)  # (batch, tokens)
        if grid.part is not None:
            positions = torch.where(placed[..., None], within(positions, grid.part), positions)
        row = (positions[..., 1] * rows).floor().clamp(0, rows - 1)
        column = (positions[..., 0] * columns).floor().clamp(0, columns - 1)
        cell = torch.where(placed, row * columns + column, -1).long()
        target = torch.where(placed, cell, rows * columns)  # the unplaced go to a cell of their own, cut off below
        index = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)

        def per_cell(values: torch.Tensor) -> torch.Tensor:
            sums = values.new_zeros(labels.shape[0], rows * columns + 1)
            return sums.scatter_add(1, target, values)[:, :-1]

        counts = per_cell(placed.float())
        per_row = columns * self.config.counter_config.frames_per_cell
        frame = row * per_row + (positions[..., 0] * per_row).floor().clamp(0, per_row - 1)
        frames = positions.new_zeros(labels.shape[0], rows * per_row + 1)
        frames = frames.scatter(1, torch.where(placed, frame, rows * per_row).long(), 1.0)[:, :-1]
        line = positions[..., 2] * rows - row - 0.5
        return {
            "counts": counts,
            "frames": frames.unflatten(1, (rows, per_row)),
            "coordinates": per_cell(index.float() * placed) / counts.clamp(min=1),
            "lines": per_cell(line * placed) / counts.clamp(min=1),
            "characters": torch.where(counts == 1, per_cell(labels.clamp(min=0).float()).long(), -100),
            "cell": cell,
            "known": placed.any(1),
        }

    def _teach(
        self,
        targets: dict[str, torch.Tensor],
        attention_mask: torch.Tensor,
        cells: CellCounts,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Where the slots are sent in training: to the true places, but in the share `1 - teacher_forcing` of the
        images (and where the true ones are unknown) to the predicted ones, unless these are more than half a character
        off. In a share of these, `false_sightings`, some are sent to characters that are not there.

        Returns:
            coordinates and occupancy `(batch, cells)`, number of tokens `(batch, 1)`, and the token that each slot sees
            `(batch, slots)`, -1 where there is none; None where each sees its own.
        """
        coordinates, counts = targets["coordinates"].clone(), targets["counts"].clone()
        count = attention_mask.sum(1, keepdim=True).to(counts.dtype)
        free = (torch.rand(len(counts), device=counts.device) >= self.config.teacher_forcing) | ~targets["known"]
        expected = cells.logits[free].sigmoid(), cells.line_offset[free]
        predicted, numbers, count_pred, whole, doubts = self.counter.gaze(*expected)
        error = (predicted - coordinates[free]).abs().masked_fill(counts[free] == 0, 0).amax(1, keepdim=True)
        right = torch.maximum(error, (count_pred - count[free]).abs()) <= 0.5
        close = right | ~targets["known"][free, None]
        fooled = right & targets["known"][free, None] & (torch.rand_like(error) < self.config.false_sightings)
        change = false_sightings(whole, doubts) * fooled
        seen = None
        if change.any():
            slots = min(attention_mask.shape[1] + int(change.sum(1).max()), self.config.num_slots)
            seen = torch.arange(slots, device=counts.device).repeat(len(counts), 1)
            seen[free] = seen_tokens(whole, change, slots)
            predicted, numbers, count_pred, *_ = self.counter.gaze(*expected, change)
        coordinates[free] = torch.where(close, predicted, coordinates[free])
        counts[free] = torch.where(close, numbers, counts[free])
        count[free] = torch.where(close, count_pred, count[free])
        return coordinates, counts, count, seen

    @staticmethod
    def _labels_seen(labels: torch.Tensor, seen: torch.Tensor, void: int) -> torch.Tensor:
        """What is known of the tokens `(batch, tokens)`, for the slots that see them (see `_teach`), `(batch, slots)`:
        `void` where a slot sees none, -100 past the tokens."""
        labels = nn.functional.pad(labels, (0, max(seen.shape[1] - labels.shape[1], 0)), value=-100)
        return torch.where(seen < 0, void, labels.gather(1, seen.clamp(min=0)))

    def _losses(
        self, logits, window, count_pred, labels, attention_mask, memory, cells, targets, weights
    ) -> dict[str, Any]:
        counter = self.config.counter_config
        count = attention_mask.sum(1, keepdim=True).to(count_pred.dtype)
        scale = count.sqrt() if counter.normalize_loss else 1.0
        error = nn.functional.huber_loss(count_pred / scale, count / scale, reduction="sum")
        sums: dict[str, Any] = {
            "loss_ce": self._slot_loss(logits, labels, window),
            "loss_count": (error, len(count)),
        }
        if targets is not None:
            counts, known = targets["counts"], targets["known"]
            occupied = counts > 0
            wrong = nn.functional.binary_cross_entropy_with_logits(cells.logits, targets["frames"], reduction="none")
            sums["loss_cells"] = (wrong.sum((1, 2)) * known).sum(), counts.sum()
            lines = nn.functional.smooth_l1_loss(cells.line_offset, targets["lines"], reduction="none")
            sums["loss_lines"] = (lines * occupied).sum(), occupied.sum()
            if self.config.character_loss_weight:
                single = targets["characters"] != -100
                named = self.classifier(self.slot_norm(self.memory_proj(memory[single]))).float()
                cross_entropy = nn.functional.cross_entropy(named, targets["characters"][single], reduction="sum")
                sums["loss_characters"] = cross_entropy, single.sum()
            if weights is not None:
                cell = targets["cell"][:, window.start : window.stop]
                placed = cell >= 0
                look = weights.mean(1).gather(2, cell.clamp(min=0)[..., None]).squeeze(-1)  # (batch, slots)
                sums["loss_look"] = -(look.float().clamp(min=1e-6).log() * placed).sum(), placed.sum()
        return self.average(sums)

    def loss_weights(self) -> dict[str, float]:
        config = self.config
        return {
            "loss_ce": 1.0,
            "loss_count": config.counter_config.loss_weight,
            "loss_cells": config.cell_loss_weight,
            "loss_lines": config.line_loss_weight,
            "loss_characters": config.character_loss_weight,
            "loss_look": config.look_loss_weight,
        }

    def _slot_loss(
        self, logits: torch.Tensor, labels: torch.Tensor, window: range
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of the real tokens, and their number; the first slots after the end count a little, as
        padding."""
        config = self.config
        ended = (labels < 0).cumsum(1)[:, window.start : window.stop]
        labels = labels[:, window.start : window.stop]
        real = labels >= 0
        padded = ~real & (ended <= config.pad_slots)
        weight = real.float() + config.pad_loss_weight * padded
        loss = nn.functional.cross_entropy(
            logits.float().flatten(0, 1),
            torch.where(real, labels, config.pad_token_id).flatten(),
            reduction="none",
            label_smoothing=config.label_smoothing,
        )
        return (loss * weight.flatten()).sum(), weight.sum()

    @torch.no_grad()
    def read(self, pixel_values: torch.Tensor, max_slots: int | None = None, crop: bool = True) -> ImageTextSlotReading:
        """Read images `(batch, 1, height, width)`: their tokens, how sure each is and where it was seen.

        Only the slots that the predicted number asks for are computed, with as many more as their neighbours can
        feel; the result is that of computing all. Images are read in groups whose parts with ink are of one size.
        Where the counter is in doubt, and the configuration's `second_look` says how to choose, the characters are
        read with one more or one less as well, and the better reading is kept. Slots that find no character where they
        were sent are left out.

        Args:
            max_slots: most tokens of one image, start and end included; `num_slots` if None.
            crop: read the part of each image that holds ink, by the configuration's `crop_margin`; else whole images.

        Raises:
            ValueError: `max_slots` leaves no room for start and end.
        """
        config = self.config
        if max_slots is not None and max_slots < 2:
            raise ValueError(f"max_slots={max_slots} must be at least 2: start and end are tokens too.")
        limit = config.num_slots if max_slots is None else min(max_slots, config.num_slots)
        readings: dict[int, tuple[torch.Tensor, ...]] = {}
        for index, part in self.parts(pixel_values, crop):
            tokens, scores, boxes, length, count_pred = self.read_slots(
                pixel_values[index], limit, look_again=True, part=part
            )
            kept = torch.arange(tokens.shape[1], device=tokens.device) < length[:, None]  # (batch, slots)
            if self.counts_cells:  # no character was there after all
                void = kept & (tokens == config.pad_token_id)
                kept, count_pred = kept & ~void, count_pred - void.sum(1, keepdim=True)
            rows = [[row[keep] for row, keep in zip(found, kept, strict=True)] for found in (tokens, scores, boxes)]
            readings |= zip(index.tolist(), zip(*rows, count_pred, strict=True), strict=True)
        sequences, scores, boxes, count_pred = zip(*(readings[i] for i in range(len(readings))), strict=True)
        return ImageTextSlotReading(list(sequences), list(scores), list(boxes), torch.stack(count_pred))

    def random_parts(self, pixel_values: torch.Tensor) -> torch.Tensor | None:
        """A part of each image, all of one size, that holds its ink, `(batch, 4)`: see `MemoryGrid`. Drawn anew each
        time; None where `read` does not crop."""
        encoder = self.config.encoder_config
        if encoder.crop_margin is None:
            return None
        parts, cells = self._ink(pixel_values, encoder.crop_margin)
        return common_size(parts, *cells) / parts.new_tensor(cells * 2)

    def parts(
        self, pixel_values: torch.Tensor, crop: bool = True
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Indices of images that are read together, and the part of each that is (see `MemoryGrid`)."""
        encoder = self.config.encoder_config
        if not crop or encoder.crop_margin is None:
            yield torch.arange(len(pixel_values), device=pixel_values.device), None
            return
        parts, cells = self._ink(pixel_values, encoder.crop_margin)
        for index in group_by_size(parts):
            yield index, parts[index] / parts.new_tensor(cells * 2)

    def _ink(self, pixel_values: torch.Tensor, margin: int) -> tuple[torch.Tensor, tuple[int, int]]:
        """See `find_ink`, and how many columns and rows of cells an image has."""
        self._check_shape(pixel_values)
        height, width = self.config.encoder_config.total_stride
        parts = find_ink(normalize_contrast(pixel_values), (height, width), margin)
        return parts, (pixel_values.shape[3] // width, pixel_values.shape[2] // height)

    @torch.no_grad()
    def read_slots(
        self, pixel_values: torch.Tensor, limit: int, look_again: bool = False, part: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """What `read` cuts to each image's length.

        Args:
            limit: most tokens of one image; at most `num_slots`.
            look_again: settle doubts about the number by a second look, as `read` does.
            part: read this part of each image only; see `MemoryGrid`.

        Returns:
            tokens `(batch, slots)`, their scores `(batch, slots)` and boxes `(batch, slots, 4)`, how many tokens to
            keep `(batch,)`, and `count_pred` `(batch, 1)`.
        """
        config = self.config
        choice = config.counter_config.second_look if look_again else None
        look, other = self.looks(pixel_values, limit, twice=choice is not None, part=part)
        if other is not None and choice is not None:
            features = second_look_features(look, other)
            weights = features.new_tensor([choice[name] for name in SECOND_LOOK])
            preferred = features @ weights[:-1] + weights[-1] > 0
            look = splice(look, other, preferred & (look.numbers != other.numbers))
        tokens, length = look.tokens, look.count.round().long().clamp(2, limit)
        if self.counts_cells:  # the end token and the counter nearly agree: within two slots the token decides
            index = torch.arange(tokens.shape[1], device=tokens.device)
            ends = (tokens == config.eos_token_id) & ((index + 1 - length).abs() <= 2)
            first = torch.where(ends.any(1), ends.int().argmax(1) + 1, length[:, 0])
            length = first.clamp(max=limit)[:, None]
        special = (tokens == config.bos_token_id) | (tokens == config.eos_token_id)
        return tokens, look.scores, look.boxes.masked_fill(special[..., None], torch.nan), length[:, 0], look.count

    @torch.no_grad()
    def looks(
        self, pixel_values: torch.Tensor, limit: int, twice: bool, part: torch.Tensor | None = None
    ) -> tuple[Look, Look | None]:
        """What the slots read.

        Args:
            pixel_values: `(batch, 1, height, width)`.
            limit: most tokens of one image that are asked for; at most `num_slots`.
            twice: where the counter is in doubt, look again, with the numbers on the other side.
            part: look at this part of each image only; see `MemoryGrid`.

        Returns:
            the first look, and the second if there is one.
        """
        memory, grid = self.encode(pixel_values, part)
        count_pred, cells = self._count(memory, grid)
        memory_states = self._memory_states(memory, grid)
        if cells is None or self.boundaries is None:
            nowhere = count_pred.new_zeros(memory.shape[0], 0)
            return Look(count_pred, nowhere, nowhere, *self._look(memory_states, grid, count_pred, None, limit)), None
        numbers = cells.logits.sigmoid(), cells.line_offset
        limit += MOST_DOUBTS if twice else 0  # so many may be dropped before

        gaze = self.counter.gaze(*numbers)
        first = Look(gaze.count, gaze.numbers, gaze.doubts, *self._look(memory_states, grid, gaze.count, gaze, limit))
        if not twice or not (change := second_thoughts(first.doubts)).any():
            return first, None
        gaze = self.counter.gaze(*numbers, change)
        seen = self._look_again(memory_states, grid, first.numbers, gaze, limit)
        return first, Look(gaze.count, gaze.numbers, gaze.doubts, *seen)

    def _needed_slots(self, count: torch.Tensor, limit: int, beyond: int = 0) -> int:
        """How many slots are wanted for numbers of tokens `(batch, 1)`, and so many beyond; a symbol when exported."""
        slots = count.round().long().clamp(2, limit).max() + 2 + beyond
        return slots.clamp(max=self.config.num_slots).item()  # pyright: ignore[reportReturnType]

    def _look(
        self,
        memory_states: tuple[torch.Tensor, torch.Tensor],
        grid: MemoryGrid,
        count: torch.Tensor,
        gaze: Gaze | None,
        limit: int,
    ) -> tuple[torch.Tensor, ...]:
        """What the slots that are needed for a number of tokens `(batch, 1)` see: the last four parts of `Look`."""
        slot = self.config.slot_config
        num_slots = self._needed_slots(count, limit, slot.reach)  # so far those are felt that are not wanted
        cells = torch.arange(grid.rows * grid.columns, device=count.device)[None]
        exported = torch.compiler.is_compiling()
        needed = None if exported else self._needed_slots(count, limit)
        blocks = 1 if exported else number_of_blocks(num_slots, slot.mixing_radius, self.config.num_slots)
        if gaze is not None and blocks > 1:
            size = -(-num_slots // blocks)
            image = torch.arange(count.shape[0], device=count.device).repeat_interleave(blocks)
            start = (torch.arange(blocks, device=count.device) * size).repeat(count.shape[0])
            near = self._near_cells(gaze, image, start, size)
            if near.shape[1] <= MOST_NEAR * cells.shape[1]:
                memory_states, near_gaze, grid = self._windows(memory_states, grid, gaze, image, near)
                index = start[:, None] + torch.arange(size, device=count.device)
                seen = self._see(memory_states, index, near_gaze, near, grid, blocks)
                return tuple(part.unflatten(0, (-1, blocks)).flatten(1, 2)[:, :needed] for part in seen)
        index = torch.arange(num_slots, device=count.device)[None]
        return self._see(memory_states, index, gaze, cells, grid, needed=needed)

    def _look_again(
        self,
        memory_states: tuple[torch.Tensor, torch.Tensor],
        grid: MemoryGrid,
        numbers: torch.Tensor,
        gaze: Gaze,
        limit: int,
    ) -> tuple[torch.Tensor, ...]:
        """As `_look`, but only what is seen of the groups of characters whose numbers are no longer these, `(batch,
        groups)`, and of one character on either side of each, need be right: windows of slots around them are computed,
        where that is less."""
        image, group = (gaze.numbers != numbers).nonzero(as_tuple=True)
        if not image.numel():
            return self._look(memory_states, grid, gaze.count, gaze, limit)
        size = gaze.numbers[image, group].long()
        last = gaze.numbers.cumsum(1)[image, group].long() + 1  # the one behind the group
        first = last - size - 1
        reach, needed = self.config.slot_config.reach, self._needed_slots(gaze.count, limit)
        num_slots = self._needed_slots(gaze.count, limit, reach)
        length = int(size.amax()) + 2 + 2 * reach
        if length > num_slots or size.numel() * length >= gaze.count.shape[0] * num_slots:
            return self._look(memory_states, grid, gaze.count, gaze, limit)
        start = (first - reach).clamp(0, num_slots - length)
        near = self._near_cells(gaze, image, start, length)
        memory_states, near_gaze, near_grid = self._windows(memory_states, grid, gaze, image, near)
        index = start[:, None] + torch.arange(length, device=start.device)
        seen = self._see(memory_states, index, near_gaze, near, near_grid)
        right = (index >= first[:, None]) & (index <= last[:, None]) & (index < needed)
        row, column = right.nonzero(as_tuple=True)
        place = image[row], index[row, column]
        return tuple(
            part.new_ones(gaze.count.shape[0], needed, *part.shape[2:]).index_put(place, part[row, column])
            for part in seen
        )

    def _near_cells(self, gaze: Gaze, image: torch.Tensor, start: torch.Tensor, size: int) -> torch.Tensor:
        """Of windows of `size` slots from `start` on, `(windows,)`, in that `image`, `(windows,)`, the cells near
        them, `(windows, near)`."""
        sharpness = self.config.slot_config.position_sharpness
        return near_cells(gaze.coordinates[image], gaze.held[image], start, size, sharpness)

    def _windows(
        self,
        memory_states: tuple[torch.Tensor, torch.Tensor],
        grid: MemoryGrid,
        gaze: Gaze,
        image: torch.Tensor,
        near: torch.Tensor,
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...], MemoryGrid]:
        """What windows of slots in that `image`, `(windows,)`, are given: memory and gaze at the cells `near` them,
        `(windows, near)`, and the grid."""
        boundaries = near.new_tensor([0, 1]) + gaze.coordinates.shape[1]
        memory = torch.cat((near, boundaries.expand(near.shape[0], -1)), 1)
        keys, values = (states.transpose(1, 2)[image[:, None], memory].transpose(1, 2) for states in memory_states)
        grid = grid._replace(part=None if grid.part is None else grid.part[image])
        coordinates, held = (part[image[:, None], near] for part in gaze[:2])
        return (keys, values), (coordinates, held, gaze.count[image]), grid

    def _see(
        self,
        memory_states: tuple[torch.Tensor, torch.Tensor],
        index: torch.Tensor,
        gaze: tuple[torch.Tensor, ...] | None,
        cells: torch.Tensor,
        grid: MemoryGrid,
        blocks: int = 1,
        needed: int | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The last four parts of `Look`, of slots that are given these `cells`, `(batch, cells)`; see `_decode`."""
        logits, weights = self._decode(memory_states, index, gaze, True, blocks, needed)
        probabilities = logits.float().softmax(-1)
        scores, tokens = probabilities.max(-1)
        assert weights is not None
        boxes = self._regions(weights[:, :, :needed].float().mean(1), cells, grid.rows, grid.columns)
        boxes = boxes if grid.part is None else uncut(boxes, grid.part)
        return tokens, scores, boxes, probabilities[..., self.config.pad_token_id]

    def generate(self, pixel_values: torch.Tensor, max_slots: int | None = None, **kwargs) -> list[torch.Tensor]:
        """Token ids of each image from start to end, `(tokens,)` a row: the arg-max of all slots, in one pass.

        Raises:
            ValueError: an option of decoding loops (`num_beams`, ...) is given: there is no loop here.
        """
        if kwargs:
            raise ValueError(f"{', '.join(kwargs)}: ImageTextSlot reads in one pass and has no such option.")
        return self.read(pixel_values, max_slots=max_slots).sequences

    @staticmethod
    def _regions(weights: torch.Tensor, cells: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Boxes `(batch, slots, 4)` around what each slot looked at, from weights `(batch, slots, memory)`: the mean
        of the centres of its `cells` `(batch, cells)`, which the memory begins with, and their spread, at least one
        cell."""
        centre = torch.stack(((cells % columns + 0.5) / columns, (cells // columns + 0.5) / rows), dim=-1)
        weights = weights[..., : cells.shape[1]]
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
        mean = weights @ centre  # (batch, slots, 2)
        variance = weights @ centre.square() - mean.square()
        variance = (variance - 1e-6).clamp(min=0)  # a spread below a thousandth of the side is rounding
        half = variance.sqrt() + centre.new_tensor([0.5 / columns, 0.5 / rows])
        return torch.cat((mean - half, mean + half), dim=-1).clamp(0, 1)


__all__ = ["ImageTextSlotModel", "ImageTextSlotOutput", "ImageTextSlotPreTrainedModel", "ImageTextSlotReading"]
