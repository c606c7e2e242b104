"""Rows that name an image each, one after the other, however many: folders of images, files of rows, `datasets`."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import fsspec
import PIL.Image
from datasets import (
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
)
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from regard.data.labelled_images import open_stored
from regard.data.text_images import METADATA_FILES, read_rows
from regard.processing.image_io import IMAGE_SUFFIXES, ImageReadError, find_images

_IMAGES = ("pixel_values", "image", "img", "file_name")
_DATA_SUFFIXES = {".arrow", ".parquet", ".tar"}  # a folder with these is a data set, whatever pictures lie beside them
_BUILDERS = {".json": "json", ".parquet": "parquet"}
_FILES = (".jsonl", ".csv", *_BUILDERS)
_ADDRESSES = ("http://", "https://", "data:")


class RowsError(ValueError):
    """Rows that cannot be read on. The message names their source and the reason."""


class ImageRows:
    """The rows of a source, in its order, as `{"image", "id", **inputs}`: read as they are asked for, images unopened.

    `image` is what `open` takes; the others are strings, or None: `id` the image's path as the source has it, or a
    column of its own; inputs are None where they are no string. Iterating raises RowsError.

    `total` is the number of rows, or None where only reading tells. `version` changes when the source's files do (their
    names or sizes), and is the commit of a data set of the Hub; None is unknown.

    Args:
        source: a folder of images, which are searched and sorted as `find_images` does; a file of rows, or a folder
            with metadata.jsonl or metadata.csv; a folder that `datasets.save_to_disk` has written; whatever
            `datasets.load_dataset` takes: a name on the Hub, a folder of Parquet files; or a `datasets` object. Files
            are .jsonl, .json, .csv and .parquet; paths of images in them are relative to their folder.
        split: which split of the source; of images or metadata in a folder, its subfolder of that name.
        config: the configuration of a data set of the Hub that has several.
        columns: the source's own names of columns, as `{"image": "photo", "id": "number", "question": "sentence"}`.
            Images named `pixel_values`, `image`, `img` or `file_name`, or the only ones, need no mention.
        inputs: columns that must be there beside the image.

    Raises:
        ValueError: the source lacks a column, a split must be chosen, or it is of no known kind.
        OSError: the source is not there, or cannot be read.
    """

    def __init__(
        self,
        source: str | Path | Dataset | IterableDataset,
        split: str | None = None,
        config: str | None = None,
        columns: Mapping[str, str] | None = None,
        inputs: Sequence[str] = (),
    ):
        self.base: Path | None = None
        self.version: str | None = None
        self.total: int | None = None
        self.source = source
        self._features: dict[str, Any] = {}
        self._read: Callable[[], Iterable[Mapping[str, Any]]]
        if isinstance(source, (Dataset, IterableDataset)):
            self._stream(source)
        elif (path := Path(source).expanduser()).is_file():
            self._open_file(path, split)
        elif path.is_dir():
            self._open_folder(path, split, config)
        elif isinstance(source, Path) or source.startswith((".", "/", "~")) or path.suffix in _FILES:
            raise FileNotFoundError(f"{source}: no such file or folder")
        else:
            self.version = HfApi().dataset_info(source).sha
            data = load_dataset(source, config, streaming=True, revision=self.version)
            self._stream(_choose_split(source, data, split))
        self._columns = self._choose_columns(dict(columns or {}), inputs)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        empty = True
        try:
            for row in self._read():
                empty = False
                yield self._normalize({name: row.get(own) for name, own in self._columns.items()})
        except (OSError, ValueError, HTTPError) as error:
            raise RowsError(f"{self.source}: cannot be read on ({error})") from error
        if empty:
            raise RowsError(f"{self.source}: no rows")

    def _normalize(self, row: dict[str, Any]) -> dict[str, Any]:
        image = row.pop("image")
        if "id" not in row:
            path = image.get("path") if isinstance(image, dict) else image
            row["id"] = None if isinstance(path, str) and path.startswith("data:") else path
        elif isinstance(row["id"], int):
            row["id"] = str(row["id"])
        return {"image": image} | {
            # names of files and escapes in JSON need not be UTF-8
            name: value.encode(errors="replace").decode() if isinstance(value, str) else None
            for name, value in row.items()
        }

    def open(self, image: Any) -> PIL.Image.Image:
        """Open the image of a row, as `regard.processing.image_io.open_image` does.

        Raises:
            ImageReadError: there is none, or it cannot be read; the message names it.
        """
        if isinstance(image, dict) and image.get("bytes") is None:
            image = image.get("path")
        if image is None:
            raise ImageReadError("no image in this row")
        if isinstance(image, str) and not image.startswith(_ADDRESSES):
            if "://" in image:  # such as hf://, and files in an archive
                try:
                    with cast(Any, fsspec.open(image, "rb")) as file:
                        image = {"path": image, "bytes": file.read()}
                except (OSError, ValueError, ImportError, HTTPError) as error:
                    raise ImageReadError(f"{image}: cannot be fetched ({error}); check the address") from error
            elif self.base is not None:
                image = str(self.base / image)
        try:
            return open_stored(image)
        except TypeError as error:
            raise ImageReadError(str(error)) from error

    def _open_file(self, path: Path, split: str | None):
        if split not in (None, "train"):
            raise ValueError(f"{path}: a file, which has no split {split!r}; leave it out")
        self.base, self.version = path.parent, _version(path.parent, [path])
        if path.suffix in (".jsonl", ".csv"):  # `datasets` would guess types by content: the question 007 becomes 7
            self._read = lambda: (row for _, row in read_rows(path))
        elif builder := _BUILDERS.get(path.suffix):
            self._stream(load_dataset(builder, data_files=str(path), split="train", streaming=True))
        else:
            raise ValueError(f"{path}: not a file of rows; give .jsonl, .json, .csv or .parquet, or a folder of images")

    def _open_folder(self, path: Path, split: str | None, config: str | None):
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path)))
        suffixes = {file.suffix.lower() for file in files}
        if suffixes & _DATA_SUFFIXES or not suffixes & IMAGE_SUFFIXES:
            self.base, self.version = path, _version(path, files)
            saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
            data = load_from_disk(path) if saved else load_dataset(str(path), config, streaming=True)
            self._stream(_choose_split(path, data, split))
            return
        folder = path / split if split is not None and (path / split).is_dir() else path
        if folder == path and split not in (None, "train"):
            raise ValueError(f"{path} has no subfolder {split!r}; leave --split out to take all")
        if metadata := [folder / name for name in METADATA_FILES if (folder / name).is_file()]:
            self._open_file(metadata[0], None)
            return
        images = find_images(folder)
        self.base, self.version, self.total = folder, _version(folder, images), len(images)
        names = [str(image.relative_to(folder)) for image in images]
        self._read = lambda: ({"image": name} for name in names)

    def _stream(self, data: Dataset | IterableDataset):
        """Read rows of `datasets`, with images as they are stored: whoever skips a row shall not decode its image."""
        splits = data.info.splits or {}
        self.total = len(data) if isinstance(data, Dataset) else None
        if self.total is None and str(data.split) in splits:
            self.total = splits[str(data.split)].num_examples or None
        self._features = dict(data.features or {})
        for name, kind in self._features.items():
            if isinstance(kind, Image):
                data = data.cast_column(name, Image(decode=False))
        self._read = lambda: cast(Iterable[Mapping[str, Any]], data)

    def _choose_columns(self, columns: dict[str, str], inputs: Sequence[str]) -> dict[str, str]:
        known = ("image", "id", *inputs)
        if unknown := sorted(set(columns) - set(known)):
            raise ValueError(f"columns names {', '.join(unknown)}; it can name {', '.join(known)}")
        features = self._features
        present = list(features or next(iter(self._read()), {}))
        if not present:
            raise ValueError(f"{self.source}: no rows")
        images = [name for name, kind in features.items() if isinstance(kind, Image)]
        named = [name for name in _IMAGES if name in present]
        columns.setdefault("image", (images if len(images) == 1 else [*named, "image"])[0])
        columns |= {name: columns.get(name, name) for name in inputs}
        for name, own in columns.items():
            if own not in present:
                raise ValueError(
                    f"{self.source}: no column {own!r}, only {', '.join(present)}; say which holds {name!r} by "
                    f"--columns {name}=..."
                )
        return columns


def _choose_split(source: str | Path, data: Any, split: str | None) -> Dataset | IterableDataset:
    if not isinstance(data, (DatasetDict, IterableDatasetDict)):
        return data
    names = [str(name) for name in data]
    if split is None and len(names) > 1:
        raise ValueError(f"{source} has several splits ({', '.join(names)}); name one by --split")
    if split is not None and split not in names:
        raise ValueError(f"{source} has no split {split!r}, only {', '.join(names)}")
    return data[split or names[0]]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _version(base: Path, files: Iterable[Path]) -> str:
    """A digest of the names and sizes of files; not of their times, which copies on other machines need not share."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(base)}\0{file.stat().st_size}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


__all__ = ["ImageRows", "RowsError"]
