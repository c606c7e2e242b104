"""Where the characters of an image stand, in reading order: the part of ImageTextSlot that counts.

Each memory cell is cut into frames, so narrow that one character at most is centred in each, and every frame says
whether there is one. Lines are the peaks of the characters' distribution over the height; the frames of all lines, one
line after another, are summed up, and the sums made whole wherever a gap between two characters shows.
"""

from typing import NamedTuple

import torch
from torch import nn

from regard.modeling.image_text_slot_encoder import ConvBlock

LINE_BINS = 8  # bins a row of cells in which lines are looked for
LEAST_LINE = 0.5  # expected characters at one height that make a line, at least; those beside it count in part
STEPS = 64  # coordinates are in 64ths of a character: rounding errors of sums end here, and do not reach the slots
LEAST_BREAK = 0.05  # expected characters behind the last certain one of a line that make its newline, at least
GAP = 0.15  # a frame with fewer expected characters than this, and than its neighbours, is a gap between two characters


class CellCounts(NamedTuple):
    """Logits of a character's centre in each frame `(batch, rows, frames)`, and how far below each cell's centre its
    line crosses the image's vertical middle, in cell heights `(batch, cells)`."""

    logits: torch.Tensor
    line_offset: torch.Tensor


class Gaze(NamedTuple):
    """Where the slots are to look.

    Args:
        coordinates: index of the token that each cell holds `(batch, cells)`; a cell that holds several tokens lies
            between their indices.
        held: how many tokens each cell holds `(batch, cells)`.
        count: number of tokens, start and end included, `(batch, 1)`.
        numbers: whole number of characters in each group of frames from gap to gap, in reading order, `(batch,
            groups)`.
        doubts: how many more were expected there, `(batch, groups)`.
    """

    coordinates: torch.Tensor
    held: torch.Tensor
    count: torch.Tensor
    numbers: torch.Tensor
    doubts: torch.Tensor


class CellCounter(nn.Module):
    """Counts the characters of each cell and finds the line they stand on."""

    def __init__(self, config, memory_size: int):
        super().__init__()
        counter = config.counter_config
        self.frames_per_cell = counter.frames_per_cell
        self.expand = nn.Linear(memory_size, counter.frames_per_cell * counter.hidden_size)
        self.blocks = nn.Sequential(
            *[ConvBlock(config.encoder_config, counter.hidden_size, 0.0) for _ in range(counter.depth)]
        )
        self.norm = nn.LayerNorm(counter.hidden_size, eps=config.layer_norm_eps)
        self.presence = nn.Linear(counter.hidden_size, 1)
        self.line = nn.Linear(memory_size, 1)

    def forward(self, memory: torch.Tensor, rows: int, columns: int) -> CellCounts:
        """Counts of a memory `(batch, rows * columns, memory_size)`."""
        frames = self.expand(memory).unflatten(1, (rows, columns)).unflatten(-1, (self.frames_per_cell, -1))
        frames = self.blocks(frames.flatten(2, 3).permute(0, 3, 1, 2))  # (batch, hidden_size, rows, frames)
        features = self.norm(frames.permute(0, 2, 3, 1))
        with torch.autocast(memory.device.type, enabled=False):  # what is added up over all cells needs its last digits
            logits = nn.functional.linear(features.float(), self.presence.weight.float(), self.presence.bias.float())
            offset = nn.functional.linear(memory.float(), self.line.weight.float(), self.line.bias.float())
        return CellCounts(logits.squeeze(-1), offset.squeeze(-1))

    def by_cell(self, frames: torch.Tensor) -> torch.Tensor:
        """Sums of frames `(batch, rows, frames)` in each cell `(batch, cells)`."""
        return frames.unflatten(-1, (-1, self.frames_per_cell)).sum(-1).flatten(1)

    @torch.no_grad()
    def gaze(self, numbers: torch.Tensor, line_offset: torch.Tensor, change: torch.Tensor | None = None) -> Gaze:
        """Where the slots are to look.

        Args:
            numbers: expected number of characters in each frame `(batch, rows, frames)`.
            line_offset: see `CellCounts`.
            change: added to the whole numbers, `(batch, groups)`.
        """
        _, rows, frames = numbers.shape
        line = self._find_lines(self.by_cell(numbers), line_offset, rows)
        line = line.unflatten(1, (rows, -1)).repeat_interleave(self.frames_per_cell, dim=2)
        place = (line * frames + torch.arange(frames, device=line.device)).flatten(1)  # a line seen in two rows is one
        profile = numbers.new_zeros(numbers.shape[0], rows * LINE_BINS * frames)
        profile = profile.scatter_add(1, place, numbers.flatten(1))
        coordinates, stretch, whole_numbers, expected = self._whole_numbers(profile, frames, change)
        whole = numbers.flatten(1) * stretch.gather(1, place)
        coordinates = coordinates.gather(1, place) + 0.5  # half a token for the start
        held = self.by_cell(whole.view_as(numbers))
        weights = whole + 1e-6  # an empty cell lies in the middle of its frames
        centre = self.by_cell((weights * coordinates).view_as(numbers)) / self.by_cell(weights.view_as(numbers))
        count = whole_numbers.sum(1, keepdim=True) + 2
        return Gaze((centre * STEPS).round() / STEPS, held, count, whole_numbers, expected - whole_numbers)

    @staticmethod
    def _find_lines(occupancy: torch.Tensor, line_offset: torch.Tensor, rows: int) -> torch.Tensor:
        """The line of each cell `(batch, cells)`: the height of the nearest line in bins from the top. Heights are
        taken where lines cross the image's vertical middle, so that they may be tilted."""
        cells, bins = torch.arange(occupancy.shape[1], device=occupancy.device), rows * LINE_BINS
        height = (cells * rows // occupancy.shape[1] + 0.5 + line_offset) * LINE_BINS
        height = height.floor().long().clamp(0, bins - 1)
        density = occupancy.new_zeros(occupancy.shape[0], bins).scatter_add(1, height, occupancy)
        kernel = density.new_tensor([[[1.0, 2.0, 3.0, 2.0, 1.0]]]) / 3
        density = nn.functional.conv1d(density[:, None], kernel, padding=2)  # (batch, 1, bins)
        index = torch.arange(bins, device=density.device)
        density = density - index * 1e-5  # of equal neighbours the first is the peak
        peak = (density == nn.functional.max_pool1d(density, LINE_BINS - 1, 1, LINE_BINS // 2 - 1)).squeeze(1)
        peak &= density.squeeze(1) > LEAST_LINE
        distance = (index[:, None] - index).abs() + bins * ~peak[:, None]  # (batch, bins, peaks)
        return distance.argmin(-1).gather(1, height)

    @staticmethod
    def _whole_numbers(
        profile: torch.Tensor, frames: int, change: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Expected numbers made whole, so that small errors do not add up along the text: from gap to gap there is a
        whole number of characters. (One on the edge between two frames, half in each, thus counts as one.)

        A newline has no ink, and its place is the hardest to be sure of; but that a line is not the last one says that
        it is there. So the last sign of a character in such a line counts as one, however faint.

        Args:
            profile: expected number of characters in each frame in reading order, `(batch, lines * frames)`.
            frames: number of frames of a line.
            change: see `gaze`.

        Returns:
            the number of characters before the middle of each frame, the factor to multiply its own number with, and of
            each group the whole and the expected number, all like `profile`: groups are numbered in reading order, and
            past the last one all is 0.
        """
        before, after = profile.roll(1, dims=1), profile.roll(-1, dims=1)
        ends = (profile < GAP) & (profile <= before) & (profile <= after)
        ends[:, frames - 1 :: frames] = True
        group = ends.long().cumsum(1) - ends.long()
        soft = torch.zeros_like(profile).scatter_add(1, group, profile)  # (batch, groups)
        lines = profile.unflatten(1, (-1, frames)).sum(2) > LEAST_LINE
        ended = (lines.flip(1).cumsum(1).flip(1) > 1) & lines  # another line follows, (batch, lines)
        sign = (soft.gather(1, group) >= LEAST_BREAK).unflatten(1, (-1, frames))
        last = frames - 1 - sign.flip(2).int().argmax(2)  # its last frame that shows any sign of a character
        last = group.unflatten(1, (-1, frames)).gather(2, last[..., None]).squeeze(2)
        whole = soft.round()
        whole = whole.scatter_reduce(1, last, (ended & sign.any(2)).to(whole.dtype), "amax")
        if change is not None:
            whole = (whole + change).clamp(min=0)
        stretch = (whole / soft.clamp(min=1e-6)).gather(1, group)
        passed = profile.unflatten(1, (-1, frames)).cumsum(2).flatten(1) - profile  # since the start of the line
        start = torch.full_like(profile, float(frames)).scatter_reduce(1, group, passed, "amin").gather(1, group)
        places = (whole.cumsum(1) - whole).gather(1, group) + (passed - start + profile / 2) * stretch
        return places, stretch, whole, soft


__all__ = ["CellCounter", "CellCounts", "Gaze"]
