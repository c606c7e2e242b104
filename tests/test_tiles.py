"""Tiles of an image: what they cover, and how the points found in them are merged, beside a naive reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.modeling.tiles import merge_points, split_tiles

LEFT, RIGHT = (0, 0, 60, 50), (40, 0, 100, 50)


def merge(tiles, points, scores, radius):
    """`merge_points` of lists."""
    merged, kept = merge_points(
        tiles, [torch.tensor(found).reshape(-1, 2) for found in points], [torch.tensor(s) for s in scores], radius
    )
    assert merged.dtype == torch.float32
    assert len(merged) == len(kept)
    return merged.tolist(), kept.tolist()


def test_known_tiles():
    assert split_tiles(150, 75) == [(0, 0, 80, 40), (70, 0, 150, 40), (0, 35, 80, 75), (70, 35, 150, 75)]
    assert split_tiles(4, 2, 0) == [(0, 0, 2, 1), (2, 0, 4, 1), (0, 1, 2, 2), (2, 1, 4, 2)]
    assert split_tiles(3, 2) == [(0, 0, 2, 2), (1, 0, 3, 2)], "the height is too short to be cut"
    assert split_tiles(1, 1) == [(0, 0, 1, 1)]


@given(st.integers(1, 500), st.integers(1, 500), st.floats(0, 0.9))
@settings(max_examples=100, deadline=None)
def test_tiles_cover_the_image_and_overlap(width, height, overlap):
    tiles = split_tiles(width, height, overlap)
    assert len(set(tiles)) == len(tiles)
    sizes = {(x1 - x0, y1 - y0) for x0, y0, x1, y1 in tiles}
    assert len(sizes) == 1
    tile_width, tile_height = sizes.pop()
    for axis, side, length in ((0, width, tile_width), (1, height, tile_height)):
        spans = sorted({(tile[axis], tile[axis + 2]) for tile in tiles})
        assert (spans[0][0], spans[-1][1]) == (0, side)
        if len(spans) == 2:
            assert spans[0][1] - spans[1][0] >= overlap * length - 1e-9
    assert {(x, y) for x0, y0, x1, y1 in tiles for x in (x0, x1 - 1) for y in (y0, y1 - 1)} >= {
        (x, y) for x in (0, width - 1) for y in (0, height - 1)
    }


@given(st.integers(8, 400), st.floats(0, 0.9), st.data())
@settings(max_examples=100, deadline=None)
def test_objects_of_the_overlap_lie_whole_in_a_tile(side, overlap, data):
    tiles = split_tiles(side, side, overlap)
    size = overlap * (tiles[0][2] - tiles[0][0])
    x, y = (data.draw(st.floats(0, side - size)) for _ in range(2))
    assert any(
        x0 - 1e-6 <= x and x + size <= x1 + 1e-6 and y0 - 1e-6 <= y and y + size <= y1 + 1e-6
        for x0, y0, x1, y1 in tiles
    )


def test_known_merges():
    # At 50 both found the same object, at 5 and 95 one of them another.
    points = [[[5.0, 9.0], [50.0, 20.0]], [[11.0, 21.0], [55.0, 9.0]]]
    assert merge([LEFT, RIGHT], points, [[0.5, 0.6], [0.9, 0.4]], 3) == (
        [[5, 9], [51, 21], [95, 9]],
        pytest.approx([0.5, 0.9, 0.4]),
    )
    assert merge([LEFT, RIGHT], points, [[0.5, 0.9], [0.9, 0.4]], 3)[0] == [[5, 9], [50, 20], [95, 9]], "equal scores"
    assert len(merge([LEFT, RIGHT], points, [[0.5, 0.6], [0.9, 0.4]], math.sqrt(2))[0]) == 4, "closer than the radius"
    assert len(merge([LEFT, RIGHT], points, [[0.5, 0.6], [0.9, 0.4]], 0)[0]) == 4


def test_points_of_one_tile_stay_apart():
    points = [[[50.0, 20.0], [51.0, 20.0]], [[10.0, 20.0], [11.0, 20.0]]]
    assert merge([LEFT, RIGHT], points, [[0.9, 0.1], [0.2, 0.8]], 30) == (
        [[50, 20], [51, 20]],
        pytest.approx([0.9, 0.8]),
    )
    assert len(merge([LEFT], points[:1], [[0.9, 0.1]], 30)[0]) == 2
    # The points of the second tile and the third are near each other, but each belongs to one of the first tile's two.
    tiles = [LEFT, LEFT, LEFT]
    points = [[[50.0, 20.0], [52.0, 20.0]], [[50.5, 20.0]], [[51.5, 20.0]]]
    assert merge(tiles, points, [[0.1, 0.1], [0.2], [0.3]], 5)[0] == [[50.5, 20], [51.5, 20]]


def test_four_tiles_see_the_centre():
    tiles = split_tiles(150, 150)
    points = [[[75.0 - x0, 75.0 - y0]] for x0, y0, _, _ in tiles]
    assert merge(tiles, points, [[0.1], [0.4], [0.3], [0.2]], 1) == ([[75, 75]], pytest.approx([0.4]))


def test_no_points():
    assert merge([LEFT, RIGHT], [[], []], [[], []], 5) == ([], [])
    assert merge([LEFT, RIGHT], [[], [[1.0, 2.0]]], [[], [0.5]], 5) == ([[41, 2]], [0.5])


def test_half_precision_does_not_round_places():
    points = [torch.empty(0, 2, dtype=torch.bfloat16), torch.tensor([[0.5, 1.25]], dtype=torch.bfloat16)]
    merged, _ = merge_points([LEFT, (4001, 0, 4100, 100)], points, [torch.empty(0), torch.ones(1)], 2)
    assert merged.tolist() == [[4001.5, 1.25]]


def naive_merge(tiles, points, scores, radius):
    """Groups joined while any two may be, those with the nearest points first."""
    placed = [
        (i, x + tile[0], y + tile[1], score)
        for i, (tile, found, values) in enumerate(zip(tiles, points, scores, strict=True))
        for (x, y), score in zip(found, values, strict=True)
    ]
    groups = [{i} for i in range(len(placed))]
    while True:
        joins = [
            (math.dist(placed[i][1:3], placed[j][1:3]), i, j, a, b)
            for a in range(len(groups))
            for b in range(len(groups))
            for i in groups[a]
            for j in groups[b]
            if i < j and not {placed[k][0] for k in groups[a]} & {placed[k][0] for k in groups[b]}
        ]
        joins = [join for join in joins if join[0] < radius]
        if not joins:
            break
        *_, a, b = min(joins)
        groups = [group for k, group in enumerate(groups) if k not in (a, b)] + [groups[a] | groups[b]]
    kept = sorted(min(group, key=lambda k: (-placed[k][3], k)) for group in groups)
    return [list(placed[k][1:3]) for k in kept], [placed[k][3] for k in kept]


@given(st.data(), st.sampled_from([0.5, 1.5, 3.0, 8.0]))
@settings(max_examples=100, deadline=None)
def test_against_a_naive_merge(data, radius):
    """Points on a coarse grid, so that many distances and scores are equal."""
    tiles = split_tiles(15, 15)
    point, score = st.tuples(st.integers(0, 7), st.integers(0, 7)), st.sampled_from([0.25, 0.5, 0.75])
    found = [data.draw(st.lists(st.tuples(point, score), max_size=4)) for _ in tiles]
    points = [[[float(x), float(y)] for (x, y), _ in sample] for sample in found]
    scores = [[value for _, value in sample] for sample in found]
    assert merge(tiles, points, scores, radius) == naive_merge(tiles, points, scores, radius)


def count(objects, box, depth):
    """Points and scores of a perfect counter, in pixels from the box's corner, which cuts the box `depth` times."""
    x0, y0, x1, y1 = box
    if depth == 0:
        inside = (objects >= torch.tensor([x0, y0])) & (objects < torch.tensor([x1, y1]))
        found = objects[inside.all(1)] - torch.tensor([x0, y0])
        return found, torch.ones(len(found))
    tiles = split_tiles(x1 - x0, y1 - y0)
    found = [count(objects, (x0 + a, y0 + b, x0 + c, y0 + d), depth - 1) for a, b, c, d in tiles]
    return merge_points(tiles, [points for points, _ in found], [scores for _, scores in found], radius=1)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_tiles_of_tiles_count_each_object_once(depth):
    grid = torch.cartesian_prod(torch.arange(0.0, 200, 7), torch.arange(0.0, 120, 7))
    merged, _ = count(grid, (0, 0, 200, 120), depth)
    assert sorted(merged.tolist()) == grid.tolist()


def test_errors():
    for size in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            split_tiles(*size)
    for overlap in (-0.1, 1):
        with pytest.raises(ValueError, match=f"below 1, not {overlap}"):
            split_tiles(5, 5, overlap)
    point, score = torch.zeros(1, 2), torch.zeros(1)
    with pytest.raises(ValueError, match="0 tiles, 0 and 0"):
        merge_points([], [], [], 1)
    with pytest.raises(ValueError, match="2 tiles, 1 and 2"):
        merge_points([LEFT, RIGHT], [point], [score, score], 1)
    for points, scores in ((torch.zeros(0), torch.zeros(0)), (point, torch.zeros(2)), (torch.zeros(1, 3), score)):
        with pytest.raises(ValueError, match=r"give points \(points, 2\) and scores"):
            merge_points([LEFT], [points], [scores], 1)
    for radius in (-1, float("nan")):
        with pytest.raises(ValueError, match="0 or more"):
            merge_points([LEFT], [point], [score], radius)
