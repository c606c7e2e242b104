"""What the readers of labelled images share."""

import io
from collections.abc import Iterable, Sequence

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage


def labelled_images(images: Iterable[np.ndarray], labels: Sequence[int], names: Sequence[str]) -> Dataset:
    """A data set of the columns `pixel_values` (image) and `label` (class), with the images stored as PNG.

    Args:
        images: each `(height, width)` or `(height, width, 3)`, uint8.
        labels: the class of each image, an index into `names`.
        names: the classes.
    """

    def png(pixels: np.ndarray) -> dict[str, bytes]:
        stream = io.BytesIO()
        PILImage.fromarray(pixels).save(stream, format="PNG", compress_level=1)
        return {"bytes": stream.getvalue()}

    features = Features({"pixel_values": Image(), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"pixel_values": [png(image) for image in images], "label": list(labels)}, features)


def choose_split(number: int, split: str, validation_size: int, seed: int) -> np.ndarray:
    """Which of `number` training images belong to "train", or to "validation", which is held out of them by `seed`.

    Raises:
        ValueError: the split is neither, or the images do not suffice.
    """
    if split not in ("train", "validation"):
        raise ValueError(f'split={split!r} must be "train", "validation" or "test".')
    if not 0 < validation_size < number:
        raise ValueError(f"validation_size={validation_size} must be between 1 and {number - 1}.")
    order = np.random.default_rng(seed).permutation(number)
    return np.sort(order[:validation_size] if split == "validation" else order[validation_size:])


__all__ = ["choose_split", "labelled_images"]
