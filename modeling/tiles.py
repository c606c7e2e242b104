"""Counting beyond what a model counts at once: an image is cut into tiles, and the points found in them are merged.

To cut further, each tile is cut as if it were an image, and its points are merged before those of the image are.
"""

import math
from collections.abc import Sequence

import torch

Tile = tuple[int, int, int, int]


def split_tiles(width: int, height: int, overlap: float = 0.125) -> list[Tile]:
    """Two by two tiles of equal size that cover the image, `(x0, y0, x1, y1)` in pixels from its top left corner, row
    by row. A side that is too short to be cut stays whole, so that there may be two tiles, or one.

    Args:
        width, height: size of the image in pixels.
        overlap: what neighbours share at least, as share of a tile's width or height. Objects of up to this size lie
            whole in one of the tiles.

    Raises:
        ValueError: the image is empty, or `overlap` is not 0 or more and below 1.
    """
    if width < 1 or height < 1:
        raise ValueError(f"width and height must be at least 1, not {width} and {height}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be 0 or more and below 1, not {overlap}")
    columns, rows = _halves(width, overlap), _halves(height, overlap)
    return [(x0, y0, x1, y1) for y0, y1 in rows for x0, x1 in columns]


def _halves(side: int, overlap: float) -> list[tuple[int, int]]:
    length = math.ceil(side / (2 - overlap))
    return [(start, start + length) for start in sorted({0, side - length})]


@torch.no_grad()
def merge_points(
    tiles: Sequence[Tile], points: Sequence[torch.Tensor], scores: Sequence[torch.Tensor], radius: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The points of an image from those of its tiles, without those that several tiles found.

    Points of different tiles that are closer than `radius` are merged, the nearest first, and the one with the highest
    score stays; of equal scores the first. What is merged has at most one point of each tile: points of one tile stay
    apart, however close they are, and across two tiles they are matched one to one. Such points lie where the tiles
    overlap, or less than `radius` beyond, where a tile that shows half of an object may point at it.

    Args:
        tiles: `(x0, y0, x1, y1)` in pixels of the image.
        points: of each tile, `(points, 2)` in pixels from the tile's top left corner.
        scores: of each tile's points, `(points,)`.
        radius: in pixels.

    Returns:
        points `(points, 2)` in pixels from the image's top left corner, in the tiles' order, and their scores
        `(points,)`.

    Raises:
        ValueError: there are no tiles, numbers or shapes do not fit, or the radius is negative.
    """
    if not tiles or not len(tiles) == len(points) == len(scores):
        raise ValueError(
            f"give points and scores for each of one or more tiles: {len(tiles)} tiles, {len(points)} and {len(scores)}"
        )
    for found, score in zip(points, scores, strict=True):
        if found.ndim != 2 or found.shape[1] != 2 or score.shape != found.shape[:1]:
            raise ValueError(f"give points (points, 2) and scores (points,), not {found.shape} and {score.shape}")
    if not radius >= 0:
        raise ValueError(f"radius must be 0 or more, not {radius}")
    corners = [found.new_tensor(tile[:2], dtype=torch.float32) for tile, found in zip(tiles, points, strict=True)]
    placed = torch.cat([corner + found for corner, found in zip(corners, points, strict=True)])
    score = torch.cat(list(scores))
    tile_of = [i for i, found in enumerate(points) for _ in range(len(found))]

    distances = torch.cdist(placed, placed, compute_mode="donot_use_mm_for_euclid_dist")
    index = torch.tensor(tile_of, device=placed.device)
    close = ((distances < radius) & (index[:, None] < index)).nonzero()
    nearest = distances[close[:, 0], close[:, 1]].argsort(stable=True)
    groups = [[i] for i in range(len(tile_of))]
    for i, j in close[nearest].tolist():
        if {tile_of[k] for k in groups[i]}.isdisjoint(tile_of[k] for k in groups[j]):
            merged = groups[i] + groups[j]
            for k in merged:
                groups[k] = merged
    values = score.tolist()
    kept = [i for i, group in enumerate(groups) if i == min(group, key=lambda k: (-values[k], k))]
    return placed[kept], score[kept]


__all__ = ["merge_points", "split_tiles"]
