"""Metric of attention and other relevance maps. `evaluate.load` takes the path of this file's folder, and needs no
network.

The file stands alone (no import from regard), because `evaluate.load` copies it.

Maps are grids of patches `(rows, columns)` over the whole image, with a relevance of 0 or more in each cell, in any
unit. Boxes are `[x0, y0, x1, y1]` in shares of the image's width and height, from its top left corner.
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike

Box = Sequence[float]

_DESCRIPTION = """How well relevance maps fit where a model should have looked: boxes around what a question asks for,
or maps of where people looked."""

_CITATION = """@article{zhang2018top,
    title={Top-down neural attention by excitation backprop},
    author={Zhang, Jianming and Bargal, Sarah Adel and Lin, Zhe and Brandt, Jonathan and Shen, Xiaohui and
        Sclaroff, Stan},
    journal={International Journal of Computer Vision},
    year={2018}
}
@inproceedings{wang2020score,
    title={{Score-CAM}: Score-weighted visual explanations for convolutional neural networks},
    author={Wang, Haofan and Wang, Zifan and Du, Mengnan and Yang, Fan and Zhang, Zijian and Ding, Sirui and
        Mardziel, Piotr and Hu, Xia},
    booktitle={CVPR Workshops},
    year={2020}
}"""

_INPUTS = """
Args:
    predictions (list[list[list[float]]]): each sample's relevance map, (rows, columns), the same for all.
    references (list[list[list[float]]]): each sample's boxes, [x0, y0, x1, y1] in shares of the image, maybe none; or,
        of evaluate.load(path, "maps"), its target map, (rows, columns).

Returns:
    pointing_accuracy: share of samples whose highest cell has its centre in a box. With boxes only.
    pointing_chance: the same, expected of a cell drawn at random. With boxes only.
    energy_in_boxes: share of a map's sum within the boxes, mean over samples. With boxes only.
    iou: intersection over union of the cells above the map's mean and those above the target's, mean over samples. The
        target of boxes gives each the same mass (`boxes_to_map`).
    spearman: rank correlation of the map's cells with the target's, mean over samples.
    samples: number of samples scored. Those without boxes are left out.
"""


def pointing_accuracy(maps: ArrayLike, boxes: Sequence[Sequence[Box]]) -> float:
    """The pointing game (Zhang et al., 2016, https://arxiv.org/abs/1608.00507): share of samples whose highest cell has
    its centre in one of the boxes, here without a margin.

    Where cells share the maximum, the sample counts with the share of them that lie in the boxes. A box too small to
    hold a centre is never hit; `pointing_chance` tells what a random cell gets.

    Args:
        maps: `(samples, rows, columns)`, not negative.
        boxes: each sample's boxes; samples without any are left out.

    Raises:
        ValueError: shapes or numbers do not fit, or no sample has a box.
    """
    maps, inside = _with_boxes(maps, boxes)
    highest = maps == maps.max(axis=(1, 2), keepdims=True)
    return float(((highest & inside).sum(axis=(1, 2)) / highest.sum(axis=(1, 2))).mean())


def pointing_chance(shape: tuple[int, int], boxes: Sequence[Sequence[Box]]) -> float:
    """Expected `pointing_accuracy` of a cell drawn at random: the mean share of cells with their centres in the boxes.
    It is the `energy_in_boxes` of an even map, too.

    Args:
        shape: the maps' `(rows, columns)`.
        boxes: each sample's boxes; samples without any are left out.

    Raises:
        ValueError: shapes or numbers do not fit, or no sample has a box.
    """
    _, inside = _with_boxes(np.ones((len(boxes), *shape)), boxes)
    return float(inside.mean())


def energy_in_boxes(maps: ArrayLike, boxes: Sequence[Sequence[Box]]) -> float:
    """The energy-based pointing game (Wang et al., 2020, https://arxiv.org/abs/1910.01279): share of a map's sum in
    cells whose centres lie in the boxes, mean over samples. A map of zeros counts as 0.

    Args:
        maps: `(samples, rows, columns)`, not negative.
        boxes: each sample's boxes; samples without any are left out.

    Raises:
        ValueError: shapes or numbers do not fit, or no sample has a box.
    """
    maps, inside = _with_boxes(maps, boxes)
    return float(_ratio((maps * inside).sum(axis=(1, 2)), maps.sum(axis=(1, 2))).mean())


def attention_iou(maps: ArrayLike, targets: ArrayLike) -> float:
    """Intersection over union of a map's cells above its own mean and the target's above its own, mean over samples.

    A constant map has no such cells, and counts as 0.

    Args:
        maps, targets: `(samples, rows, columns)`, not negative.

    Raises:
        ValueError: shapes or numbers do not fit, or there are no samples.
    """
    maps, targets = _pair(maps, targets)
    above, wanted = _above_mean(maps), _above_mean(targets)
    return float(_ratio((above & wanted).sum(axis=(1, 2)), (above | wanted).sum(axis=(1, 2))).mean())


def spearman(maps: ArrayLike, targets: ArrayLike) -> float:
    """Spearman's rank correlation of a map's cells with the target's, -1 to 1, mean over samples. Equal cells share the
    mean of their ranks. Where the map or the target is constant, the sample counts as 0.

    Args:
        maps, targets: `(samples, rows, columns)`, not negative.

    Raises:
        ValueError: shapes or numbers do not fit, or there are no samples.
    """
    maps, targets = _pair(maps, targets)
    ranks, wanted = _centred_ranks(maps), _centred_ranks(targets)
    norm = np.sqrt((ranks**2).sum(axis=1) * (wanted**2).sum(axis=1))
    return float(_ratio((ranks * wanted).sum(axis=1), norm).mean())


def boxes_to_map(boxes: Sequence[Box], rows: int, columns: int) -> np.ndarray:
    """The target map `(rows, columns)` of one sample's boxes, of sum 1: each box has the same mass, spread evenly over
    its area. Without boxes, zeros.

    Raises:
        ValueError: a box is not `[x0, y0, x1, y1]` in shares of the image, or there are no cells.
    """
    target = np.zeros(_checked_shape((rows, columns)))
    for x0, y0, x1, y1 in _checked_boxes(boxes):
        overlaps = []
        for low, high, cells in ((y0, y1, rows), (x0, x1, columns)):
            edges = np.linspace(0, 1, cells + 1)
            overlap = np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None)
            overlaps.append(overlap / overlap.sum())
        target += np.outer(*overlaps) / len(boxes)
    return target


def _with_boxes(maps: ArrayLike, boxes: Sequence[Sequence[Box]]) -> tuple[np.ndarray, np.ndarray]:
    """The maps of samples that have boxes, and which of their cells have their centres in them."""
    maps = _checked_maps(maps)
    if len(boxes) != len(maps):
        raise ValueError(f"give a list of boxes a map, empty where there are none: {len(boxes)} and {len(maps)}")
    kept = [i for i, sample in enumerate(boxes) if len(sample)]
    if not kept:
        raise ValueError("no sample has a box to score")
    y, x = ((np.arange(cells) + 0.5) / cells for cells in maps.shape[1:])
    inside = np.zeros((len(kept), *maps.shape[1:]), bool)
    for mask, i in zip(inside, kept, strict=True):
        for x0, y0, x1, y1 in _checked_boxes(boxes[i]):
            mask |= np.outer((y0 <= y) & (y <= y1), (x0 <= x) & (x <= x1))
    return maps[kept], inside


def _pair(maps: ArrayLike, targets: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    maps, targets = _checked_maps(maps), _checked_maps(targets)
    if maps.shape != targets.shape:
        raise ValueError(f"give targets of the maps' shape {maps.shape}, not {targets.shape}")
    return maps, targets


def _above_mean(maps: np.ndarray) -> np.ndarray:
    """The cells above their map's mean; none of a constant map, whose mean may be rounded to less than its cells."""
    constant = maps.max(axis=(1, 2), keepdims=True) == maps.min(axis=(1, 2), keepdims=True)
    return (maps > maps.mean(axis=(1, 2), keepdims=True)) & ~constant


def _centred_ranks(maps: np.ndarray) -> np.ndarray:
    """`(samples, cells)`: each cell's rank, less the mean rank."""
    ranks = np.empty((len(maps), maps[0].size))
    for row, values in zip(ranks, maps, strict=True):
        _, place, counts = np.unique(values.ravel(), return_inverse=True, return_counts=True)
        row[:] = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks - (ranks.shape[1] + 1) / 2


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole`, and 0 where `whole` is 0."""
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)


def _checked_maps(maps: ArrayLike) -> np.ndarray:
    maps = np.asarray(maps, dtype=np.float64)
    if maps.ndim != 3:
        raise ValueError(f"give maps (samples, rows, columns), not {maps.shape}")
    if not len(maps):
        raise ValueError("there are no maps to score")
    _checked_shape(maps.shape[1:])
    if not (np.isfinite(maps) & (maps >= 0)).all():
        raise ValueError("maps must be finite and not negative: clip them, or take their absolute values")
    return maps


def _checked_shape(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"maps need rows and columns of at least 1, not {tuple(shape)}")
    return shape[0], shape[1]


def _checked_boxes(boxes: Sequence[Box]) -> Sequence[Box]:
    for box in boxes:
        if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise ValueError(
                f"a box must be [x0, y0, x1, y1] in shares of the image, 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, "
                f"not {list(box)}: divide pixels by the image's width and height, and clip"
            )
    return boxes


class AttentionMaps(evaluate.Metric):
    """`evaluate.Metric` of relevance maps; see its `inputs_description`, or the functions of this file.

    Args:
        config_name: "maps" where the references are target maps. Default: they are boxes.
    """

    def _info(self):
        if self.config_name not in ("default", "maps"):
            raise ValueError(f'config_name must be "maps", or left out for boxes, not {self.config_name!r}')
        numbers = datasets.List(datasets.List(datasets.Value("float64")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": numbers, "references": numbers}),
        )

    def _compute(self, predictions, references):
        maps = _checked_maps(predictions)
        if self.config_name == "maps":
            scores, targets = {}, references
        else:
            scores = {
                "pointing_accuracy": pointing_accuracy(maps, references),
                "pointing_chance": pointing_chance(maps.shape[1:], references),
                "energy_in_boxes": energy_in_boxes(maps, references),
            }
            kept = [i for i, boxes in enumerate(references) if boxes]
            maps, targets = maps[kept], [boxes_to_map(references[i], *maps.shape[1:]) for i in kept]
        return {
            **scores,
            "iou": attention_iou(maps, targets),
            "spearman": spearman(maps, targets),
            "samples": len(maps),
        }


__all__ = [
    "AttentionMaps",
    "attention_iou",
    "boxes_to_map",
    "energy_in_boxes",
    "pointing_accuracy",
    "pointing_chance",
    "spearman",
]
