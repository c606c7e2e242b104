"""Fashion-MNIST (Xiao et al., 2017): 70,000 grey images of clothes, 28 px, ten classes, as Debian packages it.

`apt-get install dataset-fashion-mnist` puts the four IDX files where this module looks for them.
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
from datasets import Dataset

from regard.data.labelled_images import choose_split, labelled_images

FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def load_fashion_mnist(split: str, folder: str | Path = FOLDER, validation_size: int = 5000, seed: int = 0) -> Dataset:
    """Images as the columns `pixel_values` (grey) and `label`.

    Args:
        split: "train"; "validation", which is held out of the training images; or "test".
        folder: where the four `.gz` files are.
        validation_size: number of images held out.
        seed: chooses them.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or there is no such split.
    """
    prefix = "t10k" if split == "test" else "train"
    images = read_idx(Path(folder) / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)
    labels = read_idx(Path(folder) / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1)
    if len(images) != len(labels) or labels.max(initial=0) >= len(CLASSES):
        raise ValueError(_damaged(Path(folder), f"{len(images)} images, {len(labels)} labels up to {labels.max()}"))
    if split != "test":
        chosen = choose_split(len(images), split, validation_size, seed)
        images, labels = images[chosen], labels[chosen]
    return labelled_images(images, labels.tolist(), CLASSES)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of bytes in a gzipped IDX file: two zeros, 8 for bytes, the number of dimensions, each as four bytes
    from the highest on, then the elements.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: no such file; install it by `apt-get install dataset-fashion-mnist`, or name the folder it is in"
        ) from error
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(_damaged(path, str(error))) from error
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(_damaged(path, f"it begins with {content[:4]!r}"))
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != np.prod(shape, dtype=object):
        raise ValueError(_damaged(path, f"{len(content) - start} bytes for an array of {shape}"))
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _damaged(path: Path, reason: str) -> str:
    return f"{path}: damaged ({reason}); replace it by `apt-get install --reinstall dataset-fashion-mnist`"


__all__ = ["CLASSES", "load_fashion_mnist", "read_idx"]
