"""What SequentialAttentionCounting passes on: encoded images, scenes, its memory, steps, and counts."""

from dataclasses import dataclass

import torch
from transformers.utils.generic import ModelOutput


@dataclass
class SequentialAttentionCountingOutput(ModelOutput):
    """
    Args:
        loss: weighted sum of the parts, a scalar; given `objects`.
        loss_done: cross-entropy of "no more", mean over steps.
        loss_where: cross-entropy of the cells, which should share the probability evenly among those of the objects
            left, mean over the steps where any is.
        loss_x, loss_y: smooth L1 distance of the points of cells at objects from them, in cells.
        loss_count: smooth L1 distance of the logarithms of 1 + `count_estimate` and 1 + the true number.
        num_items: how many steps, cells or rows each part of the loss is a mean over, by its name.
        pointer_logits: scores of the cells, less what is counted, `(rows, steps, cells)`.
        done_logits: log-odds of "no more", `(rows, steps)`.
        x, y: where the next object is, in [0, 1], `(rows, steps)`.
        done: probability of "no more", `(rows, steps)`.
        count_estimate: number of objects, estimated without pointing, `(rows,)`.
        cell_points: where each cell points, `(rows, cells, 2)`, in [0, 1].
        glimpses: weights of the cells in each glimpse, `(rows, steps, glimpses, cells)`, on request.
        counted_attention: attention to none and to the objects counted, `(rows, steps, heads, 3, 1 + objects)`, on
            request.
        memory_states: working memory, `(rows, steps, hidden_size)`, on request.
    """

    loss: torch.Tensor | None = None
    loss_done: torch.Tensor | None = None
    loss_where: torch.Tensor | None = None
    loss_x: torch.Tensor | None = None
    loss_y: torch.Tensor | None = None
    loss_count: torch.Tensor | None = None
    num_items: dict[str, torch.Tensor] | None = None
    pointer_logits: torch.Tensor | None = None
    done_logits: torch.Tensor | None = None
    x: torch.Tensor | None = None
    y: torch.Tensor | None = None
    done: torch.Tensor | None = None
    count_estimate: torch.Tensor | None = None
    cell_points: torch.Tensor | None = None
    glimpses: torch.Tensor | None = None
    counted_attention: torch.Tensor | None = None
    memory_states: torch.Tensor | None = None


@dataclass
class CountingImages(ModelOutput):
    """Images before any category; can be given back in place of `pixel_values`.

    Args:
        tokens: merged patches of the vision encoder, `(images, tokens, vlm hidden_size)`, row by row, then padding.
        cells: `(images, cells, hidden_size)`, likewise.
        grid: rows and columns of the cells, `(images, 2)`.
        image_grid_thw: of the patches, `(images, 3)`.
    """

    tokens: torch.Tensor | None = None
    cells: torch.Tensor | None = None
    grid: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None


@dataclass
class CountingScene(ModelOutput):
    """What a category makes of an image, one row for each pair; steps of counting need no more.

    Args:
        cells: `(rows, cells, hidden_size)`, row by row, then padding.
        cell_mask: True for a cell, `(rows, cells)`.
        places: centres of the cells in [0, 1], `(rows, cells, 2)`.
        points: where each cell points, `(rows, cells, 2)`, in [0, 1].
        scores: of the cells, before any step, `(rows, cells)`.
        keys: of the cells, `(rows, cells, 2 * hidden_size)`.
        reach: how near to an object's point a cell must point to be of it, in cells, `(rows, cells)`.
        grid: rows and columns of the cells, `(rows, 2)`.
        sides: width and height of the image in cells, `(rows, 2)`; where they do not fill the last ones, less.
        steps: features of `<x>`, `<y>`, `<done>`, `(rows, 3, hidden_size)`.
        count_estimate: `(rows,)`.
    """

    cells: torch.Tensor | None = None
    cell_mask: torch.Tensor | None = None
    places: torch.Tensor | None = None
    points: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    reach: torch.Tensor | None = None
    grid: torch.Tensor | None = None
    sides: torch.Tensor | None = None
    steps: torch.Tensor | None = None
    count_estimate: torch.Tensor | None = None

    def select(self, rows: torch.Tensor) -> "CountingScene":
        """The scenes of some rows, by index or mask."""
        return CountingScene(**{name: value[rows] for name, value in self.items()})


@dataclass
class CountedObjects:
    """A count.

    Args:
        points: the objects in the order they were counted, `(objects, 2)`: x and y in [0, 1].
        scores: probability that one was left, before each was counted, `(objects,)`.
        count_estimate: number estimated without pointing.
        complete: whether counting ended because none was left, rather than at the limit.
    """

    points: torch.Tensor
    scores: torch.Tensor
    count_estimate: float
    complete: bool

    @property
    def count(self) -> int:
        return len(self.points)

    @property
    def agrees(self) -> bool:
        """Whether the count is within 1, or a tenth, of the estimate."""
        return abs(self.count - self.count_estimate) <= max(1.0, 0.1 * self.count)


@dataclass
class CountingMemory(ModelOutput):
    """What counting remembers between two steps, one row for each image and category; all rows have counted alike many.

    Args:
        hidden, cell: state of the working memory, `(rows, hidden_size)`.
        counted: objects counted, `(rows, objects, hidden_size)`.
        points: where they are, in [0, 1], `(rows, objects, 2)`.
        suppression: what is taken from the pointer's scores where it has been, `(rows, cells)`.
    """

    hidden: torch.Tensor | None = None
    cell: torch.Tensor | None = None
    counted: torch.Tensor | None = None
    points: torch.Tensor | None = None
    suppression: torch.Tensor | None = None

    def select(self, rows: torch.Tensor) -> "CountingMemory":
        """The memory of some rows, by index or mask."""
        return CountingMemory(**{name: value[rows] for name, value in self.items()})


__all__ = [
    "CountedObjects",
    "CountingImages",
    "CountingMemory",
    "CountingScene",
    "SequentialAttentionCountingOutput",
]
