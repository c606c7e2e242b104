"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): 60,000 colour images, 32 px, read from their "python version".

That version is a set of pickles, and a pickle can run any program. The unpickler here knows containers, numbers, text
and arrays of bytes; it refuses everything else before it is called.
"""

import io
import pickle
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from regard.data.labelled_images import choose_split, labelled_images

ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar.html"
_TRAINING_BATCHES = [f"data_batch_{index}" for index in range(1, 6)]


def load_cifar10(split: str, source: str | Path, validation_size: int = 5000, seed: int = 0) -> Dataset:
    """CIFAR-10 as the columns `pixel_values` (RGB) and `label`, ten classes.

    Args:
        split: "train"; "validation", which is held out of the training images; or "test".
        source: `cifar-10-python.tar.gz`, or the folder `cifar-10-batches-py` that was in it.
        validation_size: number of images held out.
        seed: chooses them.

    Raises:
        FileNotFoundError: the source, or a file in it, is missing.
        ValueError: a file is damaged or holds what no such file does, or there is no such split.
    """
    batches = ["test_batch"] if split == "test" else _TRAINING_BATCHES
    return _load(Path(source), split, batches, b"labels", "batches.meta", b"label_names", validation_size, seed)


def load_cifar100(split: str, source: str | Path, validation_size: int = 5000, seed: int = 0) -> Dataset:
    """CIFAR-100, likewise, with its hundred fine classes; the source is `cifar-100-python.tar.gz`, or the folder
    `cifar-100-python` that was in it."""
    batches = ["test"] if split == "test" else ["train"]
    return _load(Path(source), split, batches, b"fine_labels", "meta", b"fine_label_names", validation_size, seed)


def _load(
    source: Path,
    split: str,
    batches: Sequence[str],
    label_key: bytes,
    meta: str,
    names_key: bytes,
    validation_size: int,
    seed: int,
) -> Dataset:
    files = _read_files(source, [*batches, meta])
    names = _entry(source, meta, files[meta], names_key, list)
    images, labels = [], []
    for name in batches:
        data = _entry(source, name, files[name], b"data", np.ndarray)
        classes = _entry(source, name, files[name], label_key, list)
        if data.ndim != 2 or data.shape[1] != 3 * 32 * 32 or len(data) != len(classes):
            raise ValueError(_damaged(source, name, f"images {data.shape}, {len(classes)} labels"))
        if not all(type(label) is int and 0 <= label < len(names) for label in classes):
            raise ValueError(_damaged(source, name, f"a label is not one of {len(names)}"))
        images.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += classes
    whole, numbers = np.concatenate(images), np.array(labels)
    if split != "test":
        chosen = choose_split(len(whole), split, validation_size, seed)
        whole, numbers = whole[chosen], numbers[chosen]
    return labelled_images(np.ascontiguousarray(whole), numbers.tolist(), [name.decode() for name in names])


def _read_files(source: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The bytes of files in a folder, or in a `.tar.gz` of one folder."""
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder; fetch the python version from {ADDRESS}")
    try:
        if source.is_dir():
            files = {name: (source / name).read_bytes() for name in names if (source / name).is_file()}
        else:
            files = {}
            with tarfile.open(source) as archive:
                for member in archive:
                    name = member.name.rpartition("/")[2]
                    stream = archive.extractfile(member) if name in names else None
                    if stream is not None:
                        files[name] = stream.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{source}: damaged ({error}); fetch it again from {ADDRESS}") from error
    missing = sorted(set(names) - set(files))
    if missing:
        raise FileNotFoundError(f"{source}: lacks {', '.join(missing)}; fetch the python version from {ADDRESS}")
    return files


def _entry(source: Path, name: str, content: bytes, key: bytes, kind: type) -> Any:
    try:
        value = load_restricted(content)[key]
        if not isinstance(value, kind):
            raise TypeError(f"{key.decode()} is not of type {kind.__name__}")
    except Exception as error:  # damaged pickles raise nearly everything
        raise ValueError(_damaged(source, name, f"{type(error).__name__}: {error}")) from error
    return value


def _damaged(source: Path, name: str, reason: str) -> str:
    return f"{source}: {name} is damaged ({reason}); fetch it again from {ADDRESS}"


def load_restricted(content: bytes) -> Any:
    """Unpickle containers, numbers, text and arrays of unsigned bytes; Python 2's text comes back as bytes.

    Raises:
        pickle.UnpicklingError: the pickle names anything else.
    """
    return _RestrictedUnpickler(io.BytesIO(content), encoding="bytes").load()


class _RestrictedUnpickler(pickle.Unpickler):
    """Replaces the four names that a pickled array of bytes holds by functions that make nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): _empty_array,
            ("numpy._core.multiarray", "_reconstruct"): _empty_array,
            ("numpy", "ndarray"): "ndarray",  # an argument of the one above; a text cannot be called
            ("numpy", "dtype"): _byte_type,
            ("_codecs", "encode"): _latin_bytes,  # how Python 3 writes bytes in an old protocol
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}, which no such file needs")
        return allowed[module, name]


def _empty_array(*arguments: Any) -> np.ndarray:
    return np.empty(0, dtype=np.uint8)  # the pickle sets shape and bytes next


def _byte_type(name: str | bytes, *arguments: Any) -> np.dtype:
    if name not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"the pickle holds an array of {name!r}, not of bytes")
    return np.dtype("u1", copy=True)


def _latin_bytes(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"the pickle encodes text as {encoding!r}")
    return text.encode("latin1")


__all__ = ["load_cifar10", "load_cifar100", "load_restricted"]
