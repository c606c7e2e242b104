"""Metric of counting by pointing. `evaluate.load` takes the path of this file's folder, and needs no network.

The file stands alone (no import from regard), because `evaluate.load` copies it.

Points are `[x, y]` in pixels from the image's top left corner. The model points once at each object that it counts, so
that its count is the number of its points.
"""

from collections.abc import Sequence
from typing import NamedTuple

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

COUNT_RANGES = ((0, 4), (5, 19), (20, 49), (50, None))

_DESCRIPTION = """How well a model counts objects of a category by pointing at one after the other: the error of the
count, and whether each object has one point, over all images and by the number of objects."""

_CITATION = """@article{wang2021nwpu,
    title={{NWPU-Crowd}: A large-scale benchmark for crowd counting and localization},
    author={Wang, Qi and Gao, Junyu and Lin, Wei and Li, Xuelong},
    journal={IEEE Transactions on Pattern Analysis and Machine Intelligence},
    year={2021}
}"""

_INPUTS = """
Args:
    predictions (list[list[list[float]]]): each image's predicted points, [x, y] in pixels, maybe none.
    references (list[list[list[float]]]): each image's objects, by a point at each, maybe none.
    sizes (list[tuple[int, int]]): width and height of each image in pixels.
    radii (list[list[float]]): how far from each object a point may be, in pixels: half the diagonal of its box, say.
    max_distance (float): the same for all objects, as share of the image's shorter side. Give this or `radii`.
    count_estimates (list[float], optional): an estimate of each image's count made without pointing.

Returns:
    images: number of images.
    mae, rmse: mean absolute error of the counts, and the root of their mean squared error.
    exact_match: share of images with the right count.
    relative_error: mean of the absolute error over the number of objects, of the images that have objects.
    precision, recall, f1: of all images' points, objects, and both, the share matched one to one within the radius.
    location_error, location_error_share: mean distance of matched points from their objects, in pixels and as share of
        the image's shorter side.
    misses: number of objects without a match.
    double_counts: number of points without a match within the radius of an object, which another point has.
    stray_points: number of the other points without a match. Points - objects = double_counts + stray_points - misses.
    double_counted_images: share of images with double counts.
    estimate_difference: mean distance of `count_estimates`, where given, from the number of points.
    estimate_within_half, estimate_within_one: share of images where they differ by at most 0.5, and 1.
    by_range: the same for the images of 0-4, 5-19, 20-49 and 50+ objects, where there are any.

A mean or share of nothing is left out, such as the precision where there are no points.
"""


class _Image(NamedTuple):
    """What one image adds to the scores: numbers of points and objects, the matched points' distances in pixels, the
    shorter side in pixels, the number of double counts, and the estimate of the count (NaN where there is none)."""

    points: int
    objects: int
    distances: np.ndarray
    side: float
    double_counts: int
    estimate: float


def score_counts(
    predictions: Sequence[ArrayLike],
    references: Sequence[ArrayLike],
    sizes: ArrayLike,
    radii: Sequence[ArrayLike] | None = None,
    max_distance: float | None = None,
    count_estimates: ArrayLike | None = None,
) -> dict:
    """Score counts and points as the metric does; its `inputs_description` says what is in the result.

    Precision, recall and F1 are those of NWPU-Crowd (Wang et al., 2020, https://arxiv.org/abs/2001.03360), whose larger
    radius is half the diagonal of an object's box. As many points as can be are matched (`match_points`).

    Args:
        predictions: each image's points `(points, 2)` in pixels; empty where there are none.
        references: each image's objects `(objects, 2)`, alike.
        sizes: width and height of each image in pixels, `(images, 2)`.
        radii: how far in pixels a point may be from each object, `(objects,)` for each image.
        max_distance: the same for all objects, as share of the image's shorter side. Give this or `radii`.
        count_estimates: counts estimated without pointing, `(images,)`.

    Raises:
        ValueError: nothing to score, numbers or shapes do not fit, points are not finite, sizes or radii are not
            positive, or not one of `radii` and `max_distance` is given.
    """
    if len(predictions) != len(references):
        raise ValueError(f"give one list of points a reference: {len(predictions)} and {len(references)}")
    if not len(references):
        raise ValueError("there are no images to score")
    sizes = np.asarray(sizes, np.float64)
    if sizes.shape != (len(references), 2):
        raise ValueError(f"give the width and height of each of the {len(references)} images, not sizes {sizes.shape}")
    if not (np.isfinite(sizes) & (sizes > 0)).all():
        raise ValueError("sizes must be finite and above 0")
    if (radii is None) == (max_distance is None):
        raise ValueError("give either radii or max_distance")
    if max_distance is not None and not 0 < max_distance <= 1:
        raise ValueError(
            f"max_distance must be above 0 and at most 1, not {max_distance}: divide pixels by the image's shorter side"
        )
    if radii is not None and len(radii) != len(references):
        raise ValueError(f"give one list of radii an image: {len(radii)} and {len(references)}")
    estimates = np.full(len(references), np.nan)
    if count_estimates is not None:
        estimates = np.asarray(count_estimates, np.float64)
        if estimates.shape != (len(references),) or not np.isfinite(estimates).all():
            raise ValueError(f"count_estimates must be {len(references)} finite numbers, one an image, not {estimates}")

    images = []
    for i, side in enumerate(sizes.min(axis=1).tolist()):
        points, objects = _as_points(predictions[i], f"predictions[{i}]"), _as_points(references[i], f"references[{i}]")
        reach = np.full(len(objects), max_distance * side) if radii is None else np.asarray(radii[i], np.float64)
        if reach.shape != (len(objects),) or not (np.isfinite(reach) & (reach > 0)).all():
            raise ValueError(f"image {i} needs a positive radius for each of its {len(objects)} objects, not {reach}")
        distances = np.linalg.norm(points[:, None] - objects, axis=2)
        matched = match_points(distances, reach)
        # As many are matched as can be: a point left over near an object means that the object has another.
        double_counts = int((distances <= reach).any(axis=1).sum()) - len(matched[0])
        images.append(_Image(len(points), len(objects), distances[matched], side, double_counts, float(estimates[i])))
    by_range = {}
    for low, high in COUNT_RANGES:
        inside = [image for image in images if low <= image.objects and (high is None or image.objects <= high)]
        if inside:
            by_range[f"{low}-{high}" if high else f"{low}+"] = _summarize(inside)
    return {**_summarize(images), "by_range": by_range}


def match_points(distances: np.ndarray, radii: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the points and of the objects matched one to one, `(pairs,)` each: of the matchings with the most
    pairs within the objects' radii, one whose distances have the least sum.

    Args:
        distances: of each point from each object, `(points, objects)`.
        radii: `(objects,)`, in the unit of `distances`.
    """
    within = distances <= radii
    # A pair out of reach costs more than all the others together, so that no matching with fewer pairs is cheaper.
    limit = 1 + min(distances.shape) * distances.max(initial=0, where=within)
    points, objects = linear_sum_assignment(np.where(within, distances, limit))
    kept = within[points, objects]
    return points[kept], objects[kept]


def _summarize(images: Sequence[_Image]) -> dict:
    """The scores of some images, one at least."""
    points, objects, double_counts = (
        np.array([getattr(image, name) for image in images]) for name in ("points", "objects", "double_counts")
    )
    errors, filled = points - objects, objects > 0
    distances = np.concatenate([image.distances for image in images])
    shares = np.concatenate([image.distances / image.side for image in images])
    matched = len(distances)
    ratios = {
        "relative_error": ((np.abs(errors[filled]) / objects[filled]).sum(), filled.sum()),
        "precision": (matched, points.sum()),
        "recall": (matched, objects.sum()),
        "f1": (2 * matched, points.sum() + objects.sum()),
        "location_error": (distances.sum(), matched),
        "location_error_share": (shares.sum(), matched),
    }
    scores = {
        "images": len(images),
        "mae": float(np.abs(errors).mean()),
        "rmse": float(np.sqrt((errors**2).mean())),
        "exact_match": float((errors == 0).mean()),
        **{name: float(part / whole) for name, (part, whole) in ratios.items() if whole},
        "misses": int(objects.sum()) - matched,
        "double_counts": int(double_counts.sum()),
        "stray_points": int(points.sum() - double_counts.sum()) - matched,
        "double_counted_images": float((double_counts > 0).mean()),
    }
    differences = np.abs(points - np.array([image.estimate for image in images]))
    if not np.isnan(differences).any():
        scores["estimate_difference"] = float(differences.mean())
        scores["estimate_within_half"] = float((differences <= 0.5).mean())
        scores["estimate_within_one"] = float((differences <= 1).mean())
    return scores


def _as_points(points: ArrayLike, name: str) -> np.ndarray:
    points = np.asarray(points, np.float64)
    if not points.size:
        return np.zeros((0, 2))
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise ValueError(f"{name} must be finite points [[x, y], ...] in pixels, [] where there are none, not {points}")
    return points


def score_stopping(probabilities: ArrayLike, is_done: ArrayLike) -> dict[str, float]:
    """How well a model that counts one by one decides at each step whether it is done.

    The rates are per step, as found with the right objects counted before; `expected_count` tells what a rate of false
    stops means for a whole count.

    Args:
        probabilities: of being done, at the steps of any number of images, of any shape without padding. The model
            stops where they are above 0.5.
        is_done: whether no object was left at the step, of the same shape.

    Returns:
        done_accuracy: share of right decisions.
        false_stop_rate: share of stops among the steps that were not done. Left out without such steps.
        missed_stop_rate: share of the steps that were done without a stop. Left out without such steps.

    Raises:
        ValueError: there are no steps, the shapes differ, or probabilities are not 0 to 1.
    """
    probabilities, is_done = np.asarray(probabilities, np.float64), np.asarray(is_done, bool)
    if probabilities.shape != is_done.shape:
        raise ValueError(f"give one is_done a probability, not {is_done.shape} and {probabilities.shape}")
    if not is_done.size:
        raise ValueError("there are no steps to score")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("probabilities must be 0 to 1: take the sigmoid of logits, and leave out padding")
    stops = probabilities > 0.5
    scores = {"done_accuracy": float((stops == is_done).mean())}
    if not is_done.all():
        scores["false_stop_rate"] = float(stops[~is_done].mean())
    if is_done.any():
        scores["missed_stop_rate"] = float((~stops[is_done]).mean())
    return scores


def expected_count(objects: int, false_stop_rate: float) -> float:
    """Expected count of N `objects` by a model that points rightly, but falsely stops with probability p after each but
    the last: (1 - (1 - p)^N) / p, which is the sum of (1 - p)^k over k = 0 to N - 1.

    At a false-stop rate of 1 %, 10 objects are counted as 9.6, and 100 as 63.

    Raises:
        ValueError: `objects` is negative, or the rate is not 0 to 1.
    """
    if objects < 0:
        raise ValueError(f"objects must not be negative, as {objects} is")
    if not 0 <= false_stop_rate <= 1:
        raise ValueError(f"false_stop_rate must be 0 to 1, not {false_stop_rate}")
    # The sum keeps its digits where the rate is tiny, and has a value where it is 0.
    return sum(((1 - false_stop_rate) ** k for k in range(objects)), 0.0)


class ObjectCounting(evaluate.Metric):
    """`evaluate.Metric` of counted objects; see its `inputs_description`, or `score_counts`."""

    def _info(self):
        points = datasets.List(datasets.List(datasets.Value("float64")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": points, "references": points}),
        )

    def _compute(self, predictions, references, sizes, radii=None, max_distance=None, count_estimates=None):
        return score_counts(predictions, references, sizes, radii, max_distance, count_estimates)


__all__ = ["ObjectCounting", "expected_count", "match_points", "score_counts", "score_stopping"]
