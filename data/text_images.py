"""Own images with their texts: Hub data sets, `datasets` objects, and folders of images beside a metadata file."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, List, Value

from regard.data.labelled_images import drop_damaged, load_named, open_or_warn, open_stored
from regard.processing.image_io import ImageReadError, find_images

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
_COLUMNS = ("pixel_values", "text", "boxes")
_BOXES = List(List(Value("float32")))


def load_text_images(
    source: str | Path | Dataset | IterableDataset,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    streaming: bool = False,
    skip_damaged: bool = True,
) -> Dataset | IterableDataset:
    """Images with texts as a data set of the columns `pixel_values`, `text` and, where the source has them, `boxes`.

    An image is decoded when its sample is read, to a PIL image of any size, upright, mode "L" or "RGB". A text has a
    newline where a line ends. `boxes` holds one `[x0, y0, x1, y1]` in pixels of the image for each character of the
    text, newlines included.

    Args:
        source: a `datasets` object; a folder of images with `metadata.jsonl` or `metadata.csv`, whose rows hold
            `file_name` (relative to the folder), `text` and optionally `boxes` (in CSV: as JSON); or whatever
            `datasets.load_dataset` takes: a name on the Hub, a folder of Parquet files.
        split: which split of the source; in a folder of images, its subfolder of that name.
        columns: the source's own names of columns, as `{"pixel_values": "photo", "text": "transcription"}`. An image
            column named `image` needs no mention.
        streaming: give an `IterableDataset`, which reads as it goes.
        skip_damaged: leave out samples whose image cannot be read, with a logged warning each that names the file. A
            `Dataset` reads all its images for that, once, now; an `IterableDataset` leaves them out as it reads. If
            false, such a sample raises `ImageReadError` when it is read.

    Raises:
        ValueError: the source lacks a column, a split must be chosen, a row of the metadata is wrong, or no image can
            be read. The message names the column, or the file and line.
        FileNotFoundError: there is no such folder, or no metadata in it, or a row names an image that is not there.
    """
    columns = dict(columns or {})
    unknown = sorted(set(columns) - set(_COLUMNS))
    if unknown:
        raise ValueError(f"columns names {unknown}; it can name {', '.join(_COLUMNS)}")
    if isinstance(source, (Dataset, IterableDataset)):
        dataset = source
    elif (folder := _image_folder(source, split)) is not None:
        dataset = _read_folder(folder, columns)
        columns = {}
    else:
        dataset = load_named(str(Path(source).expanduser()), split=split, streaming=streaming)
        if isinstance(dataset, dict):
            raise ValueError(f"{source} has several splits ({', '.join(map(str, dataset))}); name one as split")
    if streaming and isinstance(dataset, Dataset):
        dataset = dataset.to_iterable_dataset()
    dataset = _choose_columns(dataset, columns)
    if isinstance(dataset, IterableDataset):
        return dataset.map(_decode, fn_kwargs={"skip_damaged": skip_damaged}, batched=True, batch_size=16)
    return (drop_damaged(dataset) if skip_damaged else dataset).with_transform(_decode)


def _image_folder(source: str | Path, split: str | None) -> Path | None:
    """The folder with the images of `split`, or None where `source` is for `datasets.load_dataset`."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if isinstance(source, Path) or source.startswith((".", "/", "~")):
            raise FileNotFoundError(f"{source}: no such folder")
        return None
    if split is not None and (folder / split).is_dir():
        return _image_folder(folder / split, None)
    inner = sorted(path.parent.name for name in METADATA_FILES for path in folder.glob(f"*/{name}"))
    if any((folder / name).is_file() for name in METADATA_FILES):
        if split not in (None, "train"):
            raise ValueError(f"{folder} has no subfolder {split!r}; without subfolders, all images are split 'train'")
        return folder
    if inner:
        raise ValueError(f"{folder} has several splits ({', '.join(inner)}); name one as split")
    try:
        find_images(folder)
    except ImageReadError:
        return None
    raise FileNotFoundError(
        f"{folder}: images, but no {' or '.join(METADATA_FILES)}. Add a metadata.jsonl with one line for each image, "
        'such as {"file_name": "1.png", "text": "its text"}'
    )


def _read_folder(folder: Path, columns: dict[str, str]) -> Dataset:
    """Rows of the metadata file. (`imagefolder` would guess types by content: the text 007 of a CSV becomes 7.)"""
    found = [folder / name for name in METADATA_FILES if (folder / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} has both {' and '.join(METADATA_FILES)}; keep one")
    names = {"file_name": columns.get("pixel_values", "file_name"), "text": columns.get("text", "text")}
    boxes_name = columns.get("boxes", "boxes")
    table: dict[str, list[Any]] = {"pixel_values": [], "text": [], "boxes": []}
    try:
        for place, row in read_rows(found[0]):
            for name in names.values():
                if not isinstance(row.get(name), str):
                    raise ValueError(f"{place}: no string {name!r}; found {', '.join(map(str, row)) or 'nothing'}")
            image, text = folder / row[names["file_name"]], row[names["text"]]
            if not image.is_file():
                raise FileNotFoundError(f"{place}: there is no image {image}")
            table["pixel_values"].append(str(image))
            table["text"].append(text)
            table["boxes"].append(_boxes(row.get(boxes_name), text, place))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{found[0]}: not UTF-8 text ({error.reason} at byte {error.start}); save it as such"
        ) from error
    if not table["text"]:
        raise ValueError(f"{found[0]}: no rows")
    features = Features(pixel_values=Image(decode=False), text=Value("string"), boxes=_BOXES)
    if all(boxes is None for boxes in table["boxes"]):
        del table["boxes"], features["boxes"]
    return Dataset.from_dict(table, features=features)


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `file, line n` and the row, for each row of a JSON lines or CSV file; values of a CSV are strings.

    Raises:
        ValueError: a row is damaged; the message names the file and line.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            reader = csv.DictReader(file, restkey="", strict=True)
            while True:
                try:
                    row = next(reader, None)
                except csv.Error as error:
                    raise ValueError(f"{path}, line {reader.reader.line_num}: not CSV ({error})") from error
                if row is None:
                    return
                place = f"{path}, line {reader.line_num}"
                if "" in row or None in row.values():
                    raise ValueError(
                        f"{place}: not {len(reader.fieldnames or ())} fields as the first line has; "
                        "put a text that holds commas or quotes into double quotes"
                    )
                yield place, row
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{place}: not JSON ({error.msg} at column {error.colno})") from error
                if not isinstance(row, dict):
                    raise ValueError(f'{place}: not an object such as {{"file_name": "1.png", "text": "its text"}}')
                yield place, row


def _boxes(value: Any, text: str, place: str) -> list[list[float]] | None:
    if value is None or value == "":
        return None
    try:
        boxes = [[float(edge) for edge in box] for box in (json.loads(value) if isinstance(value, str) else value)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: boxes are not a list of [x0, y0, x1, y1]") from error
    if len(boxes) != len(text) or any(len(box) != 4 for box in boxes):
        raise ValueError(f"{place}: {len(boxes)} boxes for {len(text)} characters; give one [x0, y0, x1, y1] for each")
    return boxes


def _choose_columns(dataset: Dataset | IterableDataset, columns: dict[str, str]) -> Dataset | IterableDataset:
    """The columns this module names, with images not decoded."""
    if dataset.features is None:
        assert isinstance(dataset, IterableDataset)
        present = list(next(iter(dataset), {}))
    else:
        present = list(dataset.features)
    if "pixel_values" not in columns and "pixel_values" not in present and "image" in present:
        columns = {**columns, "pixel_values": "image"}
    chosen = {name: columns.get(name, name) for name in _COLUMNS}
    for name, own in chosen.items():
        if own not in present and (name != "boxes" or "boxes" in columns):
            raise ValueError(
                f"the data set has no column {own!r}, only {', '.join(present) or 'none'}; "
                f"say which holds {name!r} by columns={{{name!r}: ...}}"
            )
    renaming = {own: name for name, own in chosen.items() if own in present}
    dataset = dataset.select_columns(list(renaming))
    dataset = dataset.rename_columns({own: name for own, name in renaming.items() if own != name})
    if dataset.features is None:
        return dataset
    kind = dataset.features["text"]
    if not (isinstance(kind, Value) and kind.dtype in ("string", "large_string")):
        raise ValueError(f"column {chosen['text']!r} holds {kind}, not strings")
    return dataset.cast_column("pixel_values", Image(decode=False))


def _decode(batch: dict[str, list[Any]], skip_damaged: bool = False) -> dict[str, list[Any]]:
    if "pixel_values" not in batch:
        return batch
    images = [(open_or_warn if skip_damaged else open_stored)(value) for value in batch["pixel_values"]]
    batch = {**batch, "pixel_values": images}
    kept = [row for row, image in enumerate(images) if image is not None]
    return {name: [values[row] for row in kept] for name, values in batch.items()}


__all__ = ["METADATA_FILES", "load_text_images", "read_rows"]
