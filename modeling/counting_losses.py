"""Losses of SequentialAttentionCounting: whether any object is left, which cells hold one, and where in them it is.

Each is given as a sum and the number of what was added up; the model's loss is made of their means.
"""

import math

import torch
from torch import nn

from regard.modeling.counting_outputs import CountingScene, SequentialAttentionCountingOutput

Sums = dict[str, tuple[torch.Tensor, torch.Tensor | int]]
VISITED = 1e4  # taken from the score of a cell that has been pointed at


def nearest_cell(scene: CountingScene, points: torch.Tensor) -> torch.Tensor:
    """The cell that each point lies in, `(rows, points)`, of points in [0, 1] `(rows, points, 2)`."""
    rows, columns = scene["grid"][:, None].unbind(-1)
    x, y = (points * scene["sides"][:, None]).long().unbind(-1)
    return y.clamp(min=0).minimum(rows - 1) * columns + x.clamp(min=0).minimum(columns - 1)


def offsets_between(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y from each of `(rows, n, 2)` to each of `(rows, m, 2)`: `(rows, n, m)` both, which is several times faster
    to compute with than one tensor whose last dimension is 2."""
    (x, y), (to_x, to_y) = first.unbind(-1), second.unbind(-1)
    return to_x[:, None] - x[..., None], to_y[:, None] - y[..., None]


def done_and_where_losses(
    scene: CountingScene,
    outputs: SequentialAttentionCountingOutput,
    steps: torch.Tensor,
    suppression: torch.Tensor,
    counted_mask: torch.Tensor,
    objects: torch.Tensor,
    point_objects: torch.Tensor,
    done_log_odds: torch.Tensor | None,
) -> Sums:
    """`loss_done` and `loss_where`; see `SequentialAttentionCountingOutput`.

    Args:
        steps: points counted before each step, `(rows, steps)`, -1 for padding.
        suppression: taken from the cells' scores at each step, `(rows, steps, cells)`.
        counted_mask: True for the points counted before each step, `(rows, steps, points)`.
        objects, point_objects, done_log_odds: as the model's `forward` takes them.
    """
    cells = nearest_cell(scene, objects)[:, None].expand(-1, steps.shape[1], -1)
    numbers = torch.arange(objects.shape[1], device=objects.device)
    is_counted = (point_objects[:, None, :, None] == numbers) & counted_mask[..., None]
    left = (objects[:, None, :, 0] >= 0) & ~is_counted.any(2)  # (rows, steps, objects)
    # An object in a cell that has been pointed at cannot be pointed at any more.
    left &= suppression.gather(2, cells) < VISITED / 2
    valid, is_done = steps >= 0, ~left.any(2)

    done_logits = outputs["done_logits"]
    if done_log_odds is not None:
        done_logits = done_logits + done_log_odds[:, None]
    wrong = nn.functional.binary_cross_entropy_with_logits(done_logits, is_done.float(), reduction="none")
    hits = outputs["pointer_logits"].log_softmax(-1).gather(2, cells)
    surprise = -(hits * left).sum(2) / left.sum(2).clamp(min=1)
    wanted = valid & ~is_done
    return {
        "loss_done": ((wrong * valid).sum(), valid.sum()),
        "loss_where": ((surprise * wanted).sum(), wanted.sum()),
    }


def location_losses(scene: CountingScene, objects: torch.Tensor) -> Sums:
    """`loss_x` and `loss_y`, of the cells of objects and those beside: where an object lies on an edge, either may be
    pointed at."""
    points, places, sides = scene["points"], scene["places"], scene["sides"][:, None]
    if objects.shape[1]:
        x, y = offsets_between(objects * sides, places * sides)
        apart = torch.maximum(x.abs(), y.abs())  # (rows, objects, cells)
        distance, nearest = apart.masked_fill(objects[..., :1] < 0, math.inf).min(1)
        beside = (distance <= 1.5) & scene["cell_mask"]
        targets = objects.gather(1, nearest[..., None].expand(-1, -1, 2))
    else:
        beside, targets = torch.zeros_like(scene["cell_mask"]), places
    error = nn.functional.smooth_l1_loss(points * sides, targets * sides, reduction="none", beta=0.1)
    loss_x, loss_y = (error * beside[..., None]).sum((0, 1)).unbind()
    return {"loss_x": (loss_x, beside.sum()), "loss_y": (loss_y, beside.sum())}


def count_loss(scene: CountingScene, objects: torch.Tensor) -> Sums:
    """`loss_count`: of logarithms, so that one object more or less counts for less among many."""
    number = (objects[..., 0] >= 0).sum(1).float()
    estimate = scene["count_estimate"].log1p()
    error = nn.functional.smooth_l1_loss(estimate, number.log1p(), beta=0.1, reduction="sum")
    return {"loss_count": (error, len(number))}


__all__ = ["VISITED", "count_loss", "done_and_where_losses", "location_losses", "nearest_cell", "offsets_between"]
