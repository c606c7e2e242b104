"""What the readers of images with labels, questions or points share."""

import io
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from datasets.exceptions import DatasetNotFoundError
from PIL import Image as PILImage

from regard.processing.image_io import ImageReadError, open_image

logger = logging.getLogger(__name__)


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


def open_stored(value: Any) -> PILImage.Image:
    """An image as `datasets` stores it: `{"path", "bytes"}`, a path, bytes, or a PIL image.

    Raises:
        ImageReadError: it cannot be read; the message names it.
    """
    if not isinstance(value, dict):
        return open_image(value)
    if value["bytes"] is None:
        return open_image(value["path"])
    try:
        return open_image(value["bytes"])
    except ImageReadError as error:
        raise ImageReadError(f"{value['path']}: {error}" if value["path"] else str(error)) from error


def open_or_warn(value: Any) -> PILImage.Image | None:
    """`open_stored`, or None and a logged warning where that fails."""
    try:
        return open_stored(value)
    except ImageReadError as error:
        logger.warning("left out: %s", error)
        return None


def load_named(source: str, **options) -> Any:
    """`load_dataset`, with an error that a misspelt folder, too, can be recognised by.

    Raises:
        FileNotFoundError: there is no such data set, or the Hub cannot be reached.
    """
    try:
        return load_dataset(source, **options)
    except (ConnectionError, DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"{source}: no such folder, nor a data set on the Hub that can be reached ({error})"
        ) from error


def read_splits(source: str | Path | Dataset | DatasetDict) -> dict[str, Dataset]:
    """The splits, by the source's own names, of a `datasets` object, whose sole split is "train", or of what
    `load_dataset` takes.

    Raises:
        FileNotFoundError: there is no such folder, nor a data set on the Hub that can be reached.
    """
    if isinstance(source, Dataset):
        return {"train": source}
    if not isinstance(source, DatasetDict):
        folder = Path(source).expanduser()
        if not folder.is_dir() and (isinstance(source, Path) or source.startswith((".", "/", "~"))):
            raise FileNotFoundError(f"{source}: no such folder")
        source = cast(DatasetDict, load_named(str(folder if folder.is_dir() else source)))
    return {str(split): dataset for split, dataset in source.items()}


def drop_damaged(dataset: Dataset) -> Dataset:
    """Without the images that cannot be read, each named in a warning; `pixel_values` must not be decoded yet.

    Raises:
        ValueError: none can be read.
    """
    with ThreadPoolExecutor() as pool:
        readable = pool.map(lambda value: open_or_warn(value) is not None, dataset["pixel_values"])
        kept = [index for index, good in enumerate(readable) if good]
    if not kept:
        raise ValueError(f"none of the {len(dataset)} images can be read")
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


__all__ = [
    "choose_split",
    "drop_damaged",
    "labelled_images",
    "load_named",
    "open_or_warn",
    "open_stored",
    "read_splits",
]
