"""The metric of relevance maps, deletion and insertion: known values, naive loops, and loading without a network."""

import json
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

from regard.metrics.attention_maps import attention_maps
from regard.metrics.attention_maps.attention_maps import (
    AttentionMaps,
    attention_iou,
    boxes_to_map,
    energy_in_boxes,
    pointing_accuracy,
    pointing_chance,
    spearman,
)
from regard.metrics.attention_maps.deletion_insertion import deletion_insertion

# Two rows and four columns; centres at 1/4, 3/4 and at 1/8, 3/8, 5/8, 7/8.
MAPS = [[[0, 1, 2, 5], [0, 0, 0, 0]], [[4, 0, 0, 0], [2, 2, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 9]]]
RIGHT, LEFT, CORNER = [0.5, 0, 1, 1], [0, 0, 0.5, 1], [0.75, 0.5, 1, 1]
BOXES = [[RIGHT], [[0.3, 0, 1, 1]], []]


@pytest.fixture
def many():
    """Random maps with ties, targets, and boxes (some samples without)."""
    generator = np.random.default_rng(0)
    maps, targets = generator.integers(0, 4, (2, 12, 3, 5)).astype(float)
    corners = np.sort(generator.random((12, 2, 2, 2)), axis=2)
    boxes = [[corner.ravel().tolist() for corner in sample[: i % 3]] for i, sample in enumerate(corners)]
    return maps, targets, boxes


def test_pointing_game():
    assert pointing_accuracy(MAPS, BOXES) == 0.5, "the second map points left of its box, the third has none"
    assert pointing_accuracy(MAPS[2:], [[LEFT, CORNER]]) == 1
    assert pointing_chance((2, 4), BOXES) == pytest.approx((4 / 8 + 6 / 8) / 2)
    assert pointing_accuracy([[[3, 3, 3, 0]]], [[[0, 0, 0.5, 1]]]) == pytest.approx(2 / 3), "ties"
    assert pointing_accuracy([[[7]]], [[[0.4, 0.5, 0.6, 0.7]]]) == 1, "a centre on the box's edge"
    assert pointing_accuracy(MAPS[:1], [[[0.8, 0.2, 0.85, 0.3]]]) == 0, "a box between the centres"


def test_energy():
    assert energy_in_boxes(MAPS, BOXES) == pytest.approx((7 / 8 + 2 / 8) / 2)
    assert energy_in_boxes(np.zeros((1, 2, 2)), [[RIGHT]]) == 0
    assert energy_in_boxes(MAPS, [[LEFT, LEFT, RIGHT]] * 3) == 1, "overlapping boxes count once"


def test_box_scores_against_loops(many):
    maps, _, boxes = many
    points, chances, energies = [], [], []
    for grid, sample in zip(maps, boxes, strict=True):
        if not sample:
            continue
        cells = [(grid[row, column], row, column) for row in range(3) for column in range(5)]
        hits = [
            any(x0 <= (column + 0.5) / 5 <= x1 and y0 <= (row + 0.5) / 3 <= y1 for x0, y0, x1, y1 in sample)
            for _, row, column in cells
        ]
        best = [hit for (value, _, _), hit in zip(cells, hits, strict=True) if value == grid.max()]
        points.append(sum(best) / len(best))
        chances.append(sum(hits) / 15)
        energies.append(sum(value for (value, _, _), hit in zip(cells, hits, strict=True) if hit) / grid.sum())
    assert len(points) == 8
    assert pointing_accuracy(maps, boxes) == pytest.approx(np.mean(points))
    assert pointing_chance((3, 5), boxes) == pytest.approx(np.mean(chances))
    assert energy_in_boxes(maps, boxes) == pytest.approx(np.mean(energies))
    even = np.full_like(maps, 0.1)
    for score in (pointing_accuracy, energy_in_boxes):
        assert score(even, boxes) == pytest.approx(pointing_chance((3, 5), boxes))


def test_iou():
    # Means 1, 1 and 9/8: above are {2, 3}, {0, 4, 5} and {7} of the cells.
    targets = [[[0, 0, 1, 0], [0, 0, 0, 0]], [[1, 1, 0, 0], [1, 1, 0, 0]], [[1, 0, 0, 0], [0, 0, 0, 0]]]
    assert attention_iou(MAPS, targets) == pytest.approx((1 / 2 + 3 / 4 + 0) / 3)
    assert attention_iou(MAPS, np.array(MAPS) * 100.0) == 1
    assert attention_iou(np.full((1, 3, 7), 0.1), np.full((1, 3, 7), 0.1)) == 0, "constant maps"


def test_spearman():
    assert spearman([[[1, 2, 3]]], [[[10, 20, 900]]]) == pytest.approx(1)
    assert spearman([[[1, 2, 3]]], [[[3, 2, 1]]]) == pytest.approx(-1)
    # Ranks 1.5, 1.5, 3, 4 and 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5).
    assert spearman([[[0, 0], [5, 6]]], [[[1, 2], [3, 4]]]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert spearman(np.full((2, 2, 2), 0.1), [[[1, 2], [3, 4]]] * 2) == 0, "constant maps"


def test_map_scores_against_loops(many):
    maps, targets, _ = many

    def ranks(values):
        return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]

    ious, correlations = [], []
    for left, right in zip(maps.reshape(12, -1).tolist(), targets.reshape(12, -1).tolist(), strict=True):
        above = [{i for i, value in enumerate(grid) if value > sum(grid) / 15} for grid in (left, right)]
        ious.append(len(above[0] & above[1]) / len(above[0] | above[1]))
        correlations.append(np.corrcoef(ranks(left), ranks(right))[0, 1])
    assert attention_iou(maps, targets) == pytest.approx(np.mean(ious))
    assert spearman(maps, targets) == pytest.approx(np.mean(correlations))
    assert spearman(torch.tensor(maps), torch.tensor(targets)) == pytest.approx(np.mean(correlations))


def test_boxes_to_map():
    assert boxes_to_map([], 2, 3).tolist() == [[0] * 3] * 2
    assert boxes_to_map([[0, 0, 1, 1]], 2, 4) == pytest.approx(np.full((2, 4), 1 / 8))
    assert boxes_to_map([[0.25, 0, 0.75, 0.5]], 1, 2) == pytest.approx(np.array([[0.5, 0.5]]))
    # The first box is in the first cell, a third of the second in the second cell.
    target = boxes_to_map([[0.1, 0.1, 0.2, 0.2], [0.4, 0, 0.7, 1]], 1, 2)
    assert target == pytest.approx(np.array([[0.5 + 0.5 / 3, 1 / 3]]))


def test_boxes_to_map_against_a_fine_grid():
    boxes = [[0.1, 0.25, 0.65, 0.8], [0.5, 0.0, 0.95, 0.35]]
    y, x = (np.arange(600)[:, None] + 0.5) / 600, (np.arange(600) + 0.5) / 600
    fine = sum(
        inside / inside.sum() / 2 for x0, y0, x1, y1 in boxes for inside in [(y0 < y) & (y < y1) & (x0 < x) & (x < x1)]
    )
    coarse = np.asarray(fine).reshape(3, 200, 5, 120).sum(axis=(1, 3))
    assert boxes_to_map(boxes, 3, 5) == pytest.approx(coarse)


def test_metric_of_boxes(monkeypatch, many):
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    maps, _, boxes = many
    kept = [i for i in range(12) if boxes[i]]
    targets = [boxes_to_map(boxes[i], 3, 5) for i in kept]
    expected = {
        "pointing_accuracy": pointing_accuracy(maps, boxes),
        "pointing_chance": pointing_chance((3, 5), boxes),
        "energy_in_boxes": energy_in_boxes(maps, boxes),
        "iou": attention_iou(maps[kept], targets),
        "spearman": spearman(maps[kept], targets),
        "samples": 8,
    }
    assert AttentionMaps().compute(predictions=maps, references=boxes) == expected
    metric = evaluate.load(str(Path(attention_maps.__file__).parent))
    metric.add(prediction=maps[0], reference=boxes[0])  # no boxes
    metric.add_batch(predictions=maps[1:].tolist(), references=boxes[1:])
    assert metric.compute() == expected
    assert json.loads(json.dumps(expected)) == expected


def test_metric_of_maps(monkeypatch, many):
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    maps, targets, _ = many
    metric = evaluate.load(str(Path(attention_maps.__file__).parent), "maps")
    metric.add_batch(predictions=maps, references=targets)
    assert metric.compute() == {
        "iou": attention_iou(maps, targets),
        "spearman": spearman(maps, targets),
        "samples": 12,
    }
    with pytest.raises(ValueError, match='must be "maps", or left out for boxes'):
        AttentionMaps("points")


@pytest.mark.parametrize("function", [pointing_accuracy, energy_in_boxes])
def test_errors_of_boxes(function):
    with pytest.raises(ValueError, match=r"not \(2, 4\)"):
        function(MAPS[0], [[RIGHT]] * 2)
    with pytest.raises(ValueError, match="1 and 3"):
        function(MAPS, [[RIGHT]])
    with pytest.raises(ValueError, match="no sample has a box"):
        function(MAPS, [[], [], []])
    with pytest.raises(ValueError, match="no maps"):
        function(np.zeros((0, 2, 2)), [])
    for box in ([0, 0, 20, 20], [0.5, 0, 0.5, 1], [0, 0, 1], [0, float("nan"), 1, 1], [-0.1, 0, 1, 1]):
        with pytest.raises(ValueError, match="shares of the image"):
            function(MAPS[:1], [[box]])
        with pytest.raises(ValueError, match="shares of the image"):
            boxes_to_map([box], 2, 2)


@pytest.mark.parametrize("function", [attention_iou, spearman])
def test_errors_of_maps(function):
    with pytest.raises(ValueError, match=r"maps' shape \(3, 2, 4\), not \(1, 2, 4\)"):
        function(MAPS, MAPS[:1])
    with pytest.raises(ValueError, match="no maps"):
        function(np.zeros((0, 2, 2)), np.zeros((0, 2, 2)))
    with pytest.raises(ValueError, match="at least 1"):
        function(np.zeros((1, 0, 2)), np.zeros((1, 0, 2)))
    for number in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite and not negative"):
            function(MAPS[:1], np.full((1, 2, 4), number))


def test_errors_of_shapes():
    with pytest.raises(ValueError, match="at least 1"):
        pointing_chance((2, 0), [[RIGHT]])
    with pytest.raises(ValueError, match="at least 1"):
        boxes_to_map([RIGHT], 0, 2)
    with pytest.raises(ValueError, match="no sample has a box"):
        AttentionMaps().compute(predictions=MAPS, references=[[], [], []])


def mean_of_top_left(images):
    """A model that sees the mean of the image's top left quarter."""
    return images[:, :, : images.shape[2] // 2, : images.shape[3] // 2].mean(dim=(1, 2, 3))


def test_deletion_and_insertion():
    images = torch.zeros(2, 3, 4, 4)
    images[:, :, :2, :2] = 1
    maps = torch.tensor([[[3.0, 2], [1, 0]], [[0, 1], [2, 3]]])  # right, and the wrong way round
    result = deletion_insertion(mean_of_top_left, images, maps, steps=4, baseline=torch.tensor(0.0))
    assert result["shares"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert result["deletion"].tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert result["insertion"].tolist() == [[0, 1, 1, 1, 1], [0, 0, 0, 0, 1]]
    assert result["deletion_auc"].tolist() == [0.125, 0.875]
    assert result["insertion_auc"].tolist() == [0.875, 0.125]
    by_mean = deletion_insertion(mean_of_top_left, images, maps, steps=4)
    assert by_mean["deletion"].tolist() == [[1, 0.25, 0.25, 0.25, 0.25], [1, 1, 1, 1, 0.25]]
    for shape in ((3, 1, 1), (2, 3, 4, 4), (1, 1, 4, 4)):
        again = deletion_insertion(mean_of_top_left, images, maps, steps=4, baseline=torch.zeros(shape))
        assert all(torch.equal(again[name], result[name]) for name in result)


@pytest.mark.parametrize("steps", [1, 4, 6])
def test_deletion_and_insertion_against_loops(steps):
    """Of a grid that divides neither side, by a score that weighs every pixel."""
    generator = torch.Generator().manual_seed(0)
    images, weights = torch.rand(3, 2, 7, 8, generator=generator), torch.rand(2, 7, 8, generator=generator)
    maps = torch.randint(0, 4, (3, 2, 3), generator=generator)
    result = deletion_insertion(lambda batch: (batch * weights).sum(dim=(1, 2, 3)), images, maps, steps)
    for sample in range(3):
        relevance = maps[sample].flatten().tolist()
        ranked = sorted(range(6), key=lambda cell, relevance=relevance: -relevance[cell])
        for step in range(steps + 1):
            first = ranked[: round(6 * step / steps)]
            deleted, inserted = images[sample].clone(), images[sample].clone()
            for y in range(7):
                for x in range(8):
                    cell = int((y + 0.5) / 7 * 2) * 3 + int((x + 0.5) / 8 * 3)
                    (deleted if cell in first else inserted)[:, y, x] = images[sample].mean(dim=(1, 2))
            assert result["deletion"][sample, step].item() == pytest.approx((deleted * weights).sum().item())
            assert result["insertion"][sample, step].item() == pytest.approx((inserted * weights).sum().item())
    counts = [round(6 * step / steps) / 6 for step in range(steps + 1)]
    assert result["shares"].tolist() == pytest.approx(counts)
    assert result["deletion_auc"].numpy() == pytest.approx(np.trapezoid(result["deletion"].numpy(), counts))


def test_errors_of_deletion_and_insertion():
    images, maps = torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 2)
    for wrong in ((images[0], maps), (images[:1], maps), (images[:0], maps[:0]), (images, maps[0])):
        with pytest.raises(ValueError, match="none of them empty"):
            deletion_insertion(mean_of_top_left, *wrong, steps=4)
    with pytest.raises(ValueError, match="5 x 2 cells are finer than images of 4 x 4"):
        deletion_insertion(mean_of_top_left, images, torch.zeros(2, 5, 2))
    for steps in (0, 5):
        with pytest.raises(ValueError, match="steps must be 1 to 4"):
            deletion_insertion(mean_of_top_left, images, maps, steps)
    with pytest.raises(ValueError, match="finite"):
        deletion_insertion(mean_of_top_left, images, maps / 0, steps=4)
    with pytest.raises(ValueError, match=r"baseline \(2, 1, 1\) must expand"):
        deletion_insertion(mean_of_top_left, images, maps, 4, torch.zeros(2, 1, 1))
    with pytest.raises(ValueError, match=r"shape \(2,\), one number an image, not \(2, 3\)"):
        deletion_insertion(lambda batch: batch.mean(dim=(2, 3)), images, maps, steps=4)
