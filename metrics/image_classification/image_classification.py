"""Metric of image classification. `evaluate.load` takes the path of this file's folder, and needs no network.

The file stands alone (no import from regard), because `evaluate.load` copies it.
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike

_DESCRIPTION = """How well images were classified: the share of images whose class comes first, the share whose class is
among the first five, and the former for the images of each class."""

_INPUTS = """
Args:
    predictions (list[list[float]]): logits or scores of each image for each class.
    references (list[int]): the class of each image.
    names (list[str], optional): the classes' names. Default: their numbers.

Returns:
    top1: share of images whose class has the highest logit.
    top5: share of images whose class has one of the five highest logits.
    images: number of images.
    by_class: for each class that has images, by name, the share of them whose class comes first.
"""


def rank_classes(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """The place `(images,)` of each image's class in the order of its logits, from 0; of equal logits the first class
    comes first, and NaN comes last.

    Args:
        logits: `(images, classes)`.
        labels: the class of each image, `(images,)`.

    Raises:
        ValueError: there are no images, the shapes do not fit, or a label is not a class.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"give logits (images, classes) and labels (images,), not {logits.shape} and {labels.shape}")
    if not labels.size:
        raise ValueError("there are no images to score")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels must be 0 to {logits.shape[1] - 1}, not {labels.min()} to {labels.max()}")
    order = np.argsort(-logits, axis=1, kind="stable")
    return (order == labels[:, None]).argmax(axis=1)


def score_classes(logits: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """`{"top1", "top5"}`: the shares of images whose class has the highest, or one of the five highest logits.

    Args:
        logits, labels: see `rank_classes`.
    """
    ranks = rank_classes(logits, labels)
    return {"top1": float((ranks < 1).mean()), "top5": float((ranks < 5).mean())}


class ImageClassification(evaluate.Metric):
    """`evaluate.Metric` of classified images; see its `inputs_description`, or `score_classes`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, names: Sequence[str] | None = None):
        labels = np.asarray(references)
        first = rank_classes(predictions, labels) == 0
        return {
            **score_classes(predictions, labels),
            "images": len(labels),
            "by_class": {
                str(label) if names is None else names[label]: float(first[labels == label].mean())
                for label in np.unique(labels).tolist()
            },
        }


__all__ = ["ImageClassification", "rank_classes", "score_classes"]
