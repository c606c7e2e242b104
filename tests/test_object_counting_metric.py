"""The metric of counting by pointing: known values, naive loops, and the same through `evaluate.load` without a
network."""

import itertools
import json
import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.metrics.object_counting import object_counting
from regard.metrics.object_counting.object_counting import (
    ObjectCounting,
    expected_count,
    match_points,
    score_counts,
    score_stopping,
)

# Two objects: one with a point 5 away and another 6 away, one missed; a stray point; then an empty image, rightly so;
# then one object with its point 1 away.
PREDICTIONS = [[[13, 14], [10, 16], [90, 40]], [], [[50, 51]]]
REFERENCES = [[[10, 10], [40, 40]], [], [[50, 50]]]
SIZES = [(100, 50), (20, 20), (200, 100)]
RADII = [[6, 10], [], [1]]
ESTIMATES = [2.5, 0.25, 2.5]


def row(number):
    """Objects far apart."""
    return [[10.0 * i, 0.0] for i in range(number)]


def test_known_values():
    result = score_counts(PREDICTIONS, REFERENCES, SIZES, RADII, count_estimates=ESTIMATES)
    expected = {
        "images": 3,
        "mae": pytest.approx(1 / 3),
        "rmse": pytest.approx(math.sqrt(1 / 3)),
        "exact_match": pytest.approx(2 / 3),
        "relative_error": pytest.approx((1 / 2 + 0) / 2),
        "precision": pytest.approx(2 / 4),
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(4 / 7),
        "location_error": pytest.approx((5 + 1) / 2),
        "location_error_share": pytest.approx((5 / 50 + 1 / 100) / 2),
        "misses": 1,
        "double_counts": 1,
        "stray_points": 1,
        "double_counted_images": pytest.approx(1 / 3),
        "estimate_difference": pytest.approx((0.5 + 0.25 + 1.5) / 3),
        "estimate_within_half": pytest.approx(2 / 3),
        "estimate_within_one": pytest.approx(2 / 3),
    }
    assert result == {**expected, "by_range": {"0-4": expected}}


def test_one_radius_for_all():
    """A tenth of the shorter sides: 5, 2 and 10 pixels."""
    result = score_counts(PREDICTIONS, REFERENCES, SIZES, max_distance=0.1)
    assert (result["misses"], result["double_counts"], result["stray_points"]) == (1, 0, 2)
    assert "estimate_difference" not in result
    wide = score_counts(PREDICTIONS, REFERENCES, SIZES, max_distance=1)
    assert (wide["misses"], wide["double_counts"], wide["stray_points"]) == (0, 1, 0), "90, 40 is just 50 away"
    assert wide["location_error"] == pytest.approx((5 + math.hypot(30, 24) + 1) / 3), "6 + hypot(27, 26) is more"


def test_each_count_is_in_one_range():
    counts = [0, 4, 5, 19, 20, 49, 50, 120]
    references = [row(count) for count in counts]
    predictions = [row(count + extra) for count, extra in zip(counts, [1, 0, 0, 2, 0, 4, 0, 5], strict=True)]
    result = score_counts(predictions, references, [(2000, 100)] * 8, max_distance=0.01)
    found = {name: (scores["images"], scores["mae"]) for name, scores in result["by_range"].items()}
    assert found == {"0-4": (2, 0.5), "5-19": (2, 1), "20-49": (2, 2), "50+": (2, 2.5)}
    assert (result["images"], result["mae"]) == (8, 1.5)
    assert result["by_range"]["0-4"]["relative_error"] == 0, "of the image with objects"
    assert result["by_range"]["50+"]["precision"] == pytest.approx(170 / 175)
    assert list(score_counts([row(7)], [row(6)], [(9, 9)], max_distance=0.1)["by_range"]) == ["5-19"]


def test_scores_of_nothing_are_left_out():
    undefined = {"relative_error", "precision", "recall", "f1", "location_error", "location_error_share"}
    result = score_counts([[]], [[]], [(10, 10)], [[]])
    assert not undefined & result.keys()
    assert (result["mae"], result["exact_match"], result["misses"], result["stray_points"]) == (0, 1, 0, 0)
    blind = score_counts([[]], [[[1, 2]]], [(10, 10)], [[3]])
    assert undefined - blind.keys() == {"precision", "location_error", "location_error_share"}
    assert (blind["mae"], blind["relative_error"], blind["recall"], blind["f1"], blind["misses"]) == (1, 1, 0, 0, 1)
    seeing = score_counts([[[1, 2]]], [[]], [(10, 10)], [[]])
    assert undefined - seeing.keys() == {"relative_error", "recall", "location_error", "location_error_share"}
    assert (seeing["precision"], seeing["f1"], seeing["stray_points"], seeing["double_counts"]) == (0, 0, 1, 0)


def test_one_point_on_the_edge_of_the_radius():
    result = score_counts([[[3, 4]]], [[[0, 0]]], [(10, 10)], [[5]])
    assert (result["f1"], result["location_error"], result["location_error_share"]) == (1, 5, 0.5)
    assert score_counts([[[3, 4]]], [[[0, 0]]], [(10, 10)], [[4.999]])["f1"] == 0


def test_double_counts():
    """Points at the same object, and points of neighbours within each other's radius."""
    one = score_counts([[[5, 5]] * 4], [[[5, 5]]], [(10, 10)], [[1]])
    assert (one["double_counts"], one["double_counted_images"], one["stray_points"], one["misses"]) == (3, 1, 0, 0)
    close = score_counts([row(3)], [row(3)], [(100, 100)], [[25] * 3])
    assert (close["double_counts"], close["double_counted_images"], close["location_error"]) == (0, 0, 0)
    # A point near both of two objects counts once.
    both = score_counts([[[0, 0], [10, 0], [5, 0]]], [[[0, 0], [10, 0]]], [(100, 100)], [[6, 6]])
    assert (both["double_counts"], both["precision"]) == (1, pytest.approx(2 / 3))


def test_most_pairs_come_before_least_distance():
    # The nearest pair (0.5) would leave the other point without an object.
    distances, radii = np.array([[2.0, 0.5], [9.0, 2.0]]), np.array([3.0, 3.0])
    points, objects = match_points(distances, radii)
    assert (points.tolist(), objects.tolist()) == ([0, 1], [0, 1])
    assert match_points(np.array([[1.0, 1.0]]), radii)[0].tolist() == [0], "a tie"
    assert [len(indices) for indices in match_points(np.zeros((0, 2)), radii)] == [0, 0]
    assert [len(indices) for indices in match_points(np.zeros((3, 0)), np.zeros(0))] == [0, 0]


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_matches_against_all_matchings(data):
    """On a coarse grid, where distances are often equal or just the radius."""
    place = st.tuples(st.integers(0, 4), st.integers(0, 4))
    points, objects = (data.draw(st.lists(place, max_size=5)) for _ in range(2))
    radii = [data.draw(st.sampled_from([1.0, 2.0, 3.0])) for _ in objects]
    best = (0, 0.0)
    for number in range(1, min(len(points), len(objects)) + 1):
        for left in itertools.combinations(range(len(points)), number):
            for right in itertools.permutations(range(len(objects)), number):
                pairs = [(math.dist(points[i], objects[j]), radii[j]) for i, j in zip(left, right, strict=True)]
                if all(distance <= radius for distance, radius in pairs):
                    best = min(best, (-number, sum(distance for distance, _ in pairs)))
    distances = np.array([[math.dist(point, item) for item in objects] for point in points])
    distances = distances.reshape(len(points), len(objects))
    left, right = match_points(distances, np.array(radii))
    assert len(set(left)) == len(set(right)) == len(left) == -best[0]
    assert distances[left, right].sum() == pytest.approx(best[1])


def test_against_loops():
    """Many images of points at random, some of them twice."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(40, 100, (30, 2))
    references = [(generator.random((generator.integers(0, 30), 2)) * size) for size in sizes]
    predictions = [
        np.concatenate(
            [found[generator.random(len(found)) < 0.8] + generator.normal(0, 1, 2) for _ in range(1 + i % 2)]
        )
        for i, found in enumerate(references)
    ]
    estimates = [len(found) + generator.normal() for found in predictions]
    result = score_counts(predictions, references, sizes, max_distance=0.05, count_estimates=estimates)

    errors = [len(p) - len(r) for p, r in zip(predictions, references, strict=True)]
    assert result["mae"] == pytest.approx(sum(map(abs, errors)) / 30)
    assert result["rmse"] == pytest.approx(math.sqrt(sum(error**2 for error in errors) / 30))
    assert result["exact_match"] == errors.count(0) / 30
    relative = [abs(error) / len(r) for error, r in zip(errors, references, strict=True) if len(r)]
    assert result["relative_error"] == pytest.approx(sum(relative) / len(relative))
    assert sum(errors) == result["double_counts"] + result["stray_points"] - result["misses"]
    matched = sum(map(len, predictions)) - result["double_counts"] - result["stray_points"]
    assert matched == sum(map(len, references)) - result["misses"]
    precision, recall = matched / sum(map(len, predictions)), matched / sum(map(len, references))
    assert (result["precision"], result["recall"]) == pytest.approx((precision, recall))
    assert result["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    stray = sum(
        all(math.dist(point, item) > 0.05 * min(size) for item in r)
        for p, r, size in zip(predictions, references, sizes, strict=True)
        for point in p
    )
    assert result["stray_points"] == stray
    assert result["double_counts"] > 50
    differences = [abs(len(p) - estimate) for p, estimate in zip(predictions, estimates, strict=True)]
    assert result["estimate_difference"] == pytest.approx(sum(differences) / 30)
    assert result["estimate_within_half"] == sum(difference <= 0.5 for difference in differences) / 30
    assert result["estimate_within_one"] == sum(difference <= 1 for difference in differences) / 30
    assert sum(scores["double_counts"] for scores in result["by_range"].values()) == result["double_counts"]
    tensors = [[torch.tensor(found) for found in side] for side in (predictions, references)]
    estimates = torch.tensor(estimates, dtype=torch.float64)
    assert score_counts(*tensors, torch.tensor(sizes), max_distance=0.05, count_estimates=estimates) == result


def test_loads_by_path(monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    expected = score_counts(PREDICTIONS, REFERENCES, SIZES, RADII, count_estimates=ESTIMATES)
    metric = evaluate.load(str(Path(object_counting.__file__).parent))
    metric.add(prediction=PREDICTIONS[0], reference=REFERENCES[0])
    metric.add_batch(predictions=PREDICTIONS[1:], references=REFERENCES[1:])
    assert metric.compute(sizes=SIZES, radii=RADII, count_estimates=ESTIMATES) == expected
    assert json.loads(json.dumps(expected)) == expected
    arrays = [[np.array(found, np.float32).reshape(-1, 2) for found in side] for side in (PREDICTIONS, REFERENCES)]
    result = ObjectCounting().compute(predictions=arrays[0], references=arrays[1], sizes=SIZES, max_distance=0.1)
    assert result == score_counts(PREDICTIONS, REFERENCES, SIZES, max_distance=0.1)
    result = ObjectCounting().compute(predictions=[[], []], references=[[], []], sizes=SIZES[:2], max_distance=0.1)
    assert result == score_counts([[], []], [[], []], SIZES[:2], max_distance=0.1)


def test_stopping():
    # Three objects and one: stops at the second step, misses the fourth; then it is right.
    probabilities, is_done = [0.1, 0.6, 0.5, 0.4, 0.2, 0.9], [False, False, False, True, False, True]
    expected = {
        "done_accuracy": pytest.approx(4 / 6),
        "false_stop_rate": pytest.approx(1 / 4),
        "missed_stop_rate": pytest.approx(1 / 2),
    }
    assert score_stopping(probabilities, is_done) == expected
    batch = torch.tensor(probabilities).view(2, 3), torch.tensor(is_done).view(2, 3)
    assert score_stopping(*batch) == expected
    assert score_stopping([0.5], [False]) == {"done_accuracy": 1, "false_stop_rate": 0}
    assert score_stopping([0.5], [True]) == {"done_accuracy": 0, "missed_stop_rate": 1}
    json.dumps(score_stopping(probabilities, is_done))


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
def test_expected_count(rate):
    assert expected_count(0, rate) == 0
    assert expected_count(1, rate) == 1
    for objects in (2, 10, 100):
        assert expected_count(objects, rate) == pytest.approx((1 - (1 - rate) ** objects) / rate)
    counts = np.minimum(np.random.default_rng(0).geometric(rate, 100_000), 10)
    assert expected_count(10, rate) == pytest.approx(counts.mean(), rel=0.01)


def test_expected_count_of_tiny_rates():
    assert expected_count(40, 0) == 40
    assert expected_count(3, 1e-12) == pytest.approx(3 - 3e-12, abs=1e-15)


def test_errors():
    point, size = [[[1.0, 2.0]]], [(10, 10)]
    with pytest.raises(ValueError, match="one list of points a reference: 1 and 2"):
        score_counts(point, point * 2, size * 2, max_distance=0.1)
    with pytest.raises(ValueError, match="no images"):
        score_counts([], [], [], max_distance=0.1)
    with pytest.raises(ValueError, match=r"each of the 1 images, not sizes \(2, 2\)"):
        score_counts(point, point, size * 2, max_distance=0.1)
    for side in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="sizes must be finite and above 0"):
            score_counts(point, point, [(10, side)], max_distance=0.1)
    for options in ({}, {"radii": [[1]], "max_distance": 0.1}):
        with pytest.raises(ValueError, match="either radii or max_distance"):
            score_counts(point, point, size, **options)
    for distance in (0, 16, float("nan")):
        with pytest.raises(ValueError, match="divide pixels"):
            score_counts(point, point, size, max_distance=distance)
    with pytest.raises(ValueError, match="one list of radii an image: 2 and 1"):
        score_counts(point, point, size, [[1], [1]])
    for radii in ([], [1, 1], [0], [float("inf")]):
        with pytest.raises(ValueError, match="image 0 needs a positive radius for each of its 1 objects"):
            score_counts(point, point, size, [radii])
    for points in ([1.0, 2.0], [[1.0, 2.0, 3.0]], [[1.0, float("nan")]]):
        with pytest.raises(ValueError, match=r"predictions\[0\] must be finite points"):
            score_counts([points], point, size, max_distance=0.1)
        with pytest.raises(ValueError, match=r"references\[0\] must be finite points"):
            score_counts(point, [points], size, max_distance=0.1)
    for estimates in ([1.0, 2.0], [float("nan")]):
        with pytest.raises(ValueError, match="count_estimates must be 1 finite numbers"):
            score_counts(point, point, size, max_distance=0.1, count_estimates=estimates)
    with pytest.raises(ValueError, match=r"not \(1,\) and \(2,\)"):
        score_stopping([0.1, 0.2], [True])
    with pytest.raises(ValueError, match="no steps"):
        score_stopping([], [])
    for probability in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="take the sigmoid"):
            score_stopping([probability], [True])
    with pytest.raises(ValueError, match="must not be negative"):
        expected_count(-1, 0.1)
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="false_stop_rate must be 0 to 1"):
            expected_count(3, rate)
