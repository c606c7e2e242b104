"""Objects to be counted, each with a point: FSC-147, own images with a file of points, Hub data sets and `datasets`.

FSC-147 (Ranjan et al., 2021) is at https://github.com/cvlab-stonybrook/LearningToCountEverything.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value

from regard.data.image_classification import SPLITS
from regard.data.labelled_images import choose_split, open_or_warn, open_stored, read_splits
from regard.processing.image_io import ImageReadError

logger = logging.getLogger(__name__)

FEATURES = Features(
    {
        "pixel_values": Image(decode=False),
        "image_id": Value("string"),
        "category": Value("string"),
        "points": List(List(Value("float64"))),
        "count": Value("int64"),
    }
)
FSC_147_ADDRESS = "https://github.com/cvlab-stonybrook/LearningToCountEverything"
POINTS_FILE = "points.jsonl"
READING_ROWS = 7

_EXAMPLE = '{"file_name": "1.jpg", "category": "apples", "points": [[12, 30.5], [80, 41]]}'
_FSC_147_PARTS = {"train": "train", "validation": "val", "test": "test"}
_LARGEST_VALIDATION = 5  # a fifth of the images
_SHOWN = 10  # problems in an error
_ALIASES = {
    "pixel_values": ("pixel_values", "image", "img"),
    "image_id": ("image_id",),
    "category": ("category", "class", "label"),
    "points": ("points",),
}


def load_counting(
    source: str | Path | Dataset | DatasetDict,
    split: str,
    validation_size: int = 500,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    min_objects: int = 0,
    max_objects: int | None = None,
) -> Dataset:
    """Images with the points of all objects of a category, a category of an image a row.

    The columns are:

    - `pixel_values`: the image, not decoded: `{"path", "bytes"}`, one of which is None;
    - `image_id`: string, the same for all rows of an image;
    - `category`: string, as it was given;
    - `points`: list of `[x, y]`, one for each object, in pixels of the image, upright as `open_image` reads it, in the
      order they were given in; `reading_order` sorts them;
    - `count`: the number of points.

    Rows whose image is missing or cannot be read are left out, with one logged warning for each image, which names it;
    all images are read for that, once, now.

    Args:
        source: "fsc-147:FOLDER", with annotation_FSC147_384.json, Train_Test_Val_FSC_147.json, ImageClasses_FSC147.txt
            and the images in images_384_VarV2; a folder of images with `points.jsonl`, or with a subfolder of such kind
            for each split (see `validate_points`); a `datasets` object, whose sole split is "train"; or whatever
            `datasets.load_dataset` takes: a name on the Hub, a folder of Parquet files.
        split: "train"; "validation", which is held out of the training images where the source has none (also called
            val or valid); or "test".
        validation_size: number of images held out, with all their rows; at most a fifth of the images.
        seed: chooses them.
        columns: for `datasets` and `load_dataset`, the source's own names of columns, as `{"points": "clicks"}`. Images
            named `image` or `img`, and categories named `class` or `label`, need no mention.
        min_objects, max_objects: leave out the rows with fewer or more points; default: none.

    Raises:
        ValueError: there is no such split or column, a file is damaged, `points.jsonl` has problems, of which the first
            ten are told, or no row remains.
        FileNotFoundError: there is no such folder or file.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}.")
    if min_objects < 0 or (max_objects is not None and max_objects < min_objects):
        raise ValueError(f"min_objects={min_objects} must be 0 or more, and max_objects={max_objects} no less.")
    name, _, place = source.partition(":") if isinstance(source, str) else ("", "", "")
    if name == "fsc-147" and not Path(str(source)).is_dir():
        if not place:
            raise ValueError("fsc-147: say where it is, fsc-147:FOLDER")
        dataset = _drop_unreadable(_load_fsc_147(Path(place).expanduser(), split))
    else:
        splits = _read_splits(source)
        present = {name: next((own for own in names if own in splits), None) for name, names in SPLITS.items()}
        own = present[split] or (present["train"] if split == "validation" else None)
        if own is None:
            raise ValueError(f"the data set has no split {split!r}, only {', '.join(splits)}")
        found = splits[own]
        if isinstance(found, Path):
            dataset = _read_points(found)
        else:
            dataset = _drop_unreadable(_choose_columns(found, dict(columns or {})))
        if split != "test" and present["validation"] is None:
            dataset = _hold_out(dataset, split, validation_size, seed)
    most = math.inf if max_objects is None else max_objects
    kept = [index for index, count in enumerate(dataset["count"][:]) if min_objects <= count <= most]
    if not kept:
        wanted = f"{min_objects} or more" if max_objects is None else f"{min_objects} to {max_objects}"
        raise ValueError(
            f"none of the {len(dataset)} rows of split {split!r} has {wanted} objects; mend min_objects or max_objects"
        )
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


def validate_points(path: str | Path) -> list[str]:
    """What is wrong with a file of points, one problem a string: the file, the line, the problem and the mend.

    Each line is an object: {"file_name": "1.jpg", "category": "apples", "points": [[12, 30.5], [80, 41]]}, with the
    image's name relative to the file's folder, and points `[x, y]` in pixels from the upper left corner of the image as
    it is seen upright. An image has one line for each category that was counted in it; where there is nothing of it,
    "points" is []. Other keys are ignored.

    Args:
        path: the file, or the folder whose `points.jsonl` it is.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(path).expanduser()
    path = path / POINTS_FILE if path.is_dir() else path
    _, problems, unreadable = _check_points(path)
    return [f"{path}, line {line}: {text}" for line, text in sorted(problems + unreadable)]


def reading_order(points: Sequence[Sequence[float]], height: float) -> list[int]:
    """The indices of points in the order they are counted in: the image is divided into `READING_ROWS` rows of equal
    height, read from the top, and within each from left to right; then from the top, where points are above each other.

    Args:
        points: `[x, y]`, in any unit.
        height: of the image, in the same unit.
    """
    rows = [min(READING_ROWS - 1, int(READING_ROWS * y / height)) for _, y in points]
    return sorted(range(len(points)), key=lambda index: (rows[index], *points[index]))


def _load_fsc_147(folder: Path, split: str) -> Dataset:
    fetch = f"fetch FSC-147 from {FSC_147_ADDRESS}"
    names, annotations, classes = (
        "Train_Test_Val_FSC_147.json",
        "annotation_FSC147_384.json",
        "ImageClasses_FSC147.txt",
    )
    place = folder / names
    try:
        chosen = json.loads(place.read_bytes())[_FSC_147_PARTS[split]]
        place = folder / classes
        lines = place.read_text("utf-8").splitlines()
        categories: dict[str, str] = {}
        for line in filter(None, lines):
            name, category = line.split("\t")
            categories[name] = category.strip()
        categories = {name: categories[name] for name in chosen}
        place = folder / annotations
        content = json.loads(place.read_bytes())
        rows = [
            _row(str(folder / "images_384_VarV2" / name), name, categories[name], content[name]["points"])
            for name in chosen
        ]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{place}: no such file; {fetch}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{place}: damaged ({error!r}); {fetch}") from error
    return Dataset.from_list(rows, features=FEATURES)


def _row(image: Any, image_id: str, category: str, points: Sequence[Sequence[float]]) -> dict[str, Any]:
    points = [[float(x), float(y)] for x, y in points]
    return {
        "pixel_values": image,
        "image_id": image_id,
        "category": category,
        "points": points,
        "count": len(points),
    }


def _read_splits(source: str | Path | Dataset | DatasetDict) -> Mapping[str, Dataset | Path]:
    """The splits of a source by its own names for them: data sets or files of points."""
    if isinstance(source, (str, Path)) and (folder := Path(source).expanduser()).is_dir():
        if (folder / POINTS_FILE).is_file():
            return {"train": folder / POINTS_FILE}
        names = [name for names in SPLITS.values() for name in names]
        files = {name: folder / name / POINTS_FILE for name in names if (folder / name / POINTS_FILE).is_file()}
        if files:
            return files
        if not any(folder.rglob("*.parquet")):
            raise FileNotFoundError(
                f"{folder}: no {POINTS_FILE} in this folder, nor in folders {', '.join(SPLITS)} of it; "
                f"write one object a line, such as {_EXAMPLE}"
            )
    return read_splits(source)


def _read_points(path: Path) -> Dataset:
    rows, problems, unreadable = _check_points(path)
    if problems:
        lines = [f"{path}, line {line}: {text}" for line, text in sorted(problems)]
        more = f"\n... and {len(lines) - _SHOWN} more; validate_points lists all" if len(lines) > _SHOWN else ""
        raise ValueError("\n".join(lines[:_SHOWN]) + more)
    for text in dict.fromkeys(text for _, text in unreadable):
        logger.warning("left out: %s", text)
    if not rows:
        raise ValueError(f"{path}: none of the {len(unreadable)} images can be read")
    return Dataset.from_list(rows, features=FEATURES)


def _check_points(path: Path) -> tuple[list[dict[str, Any]], list[tuple[int, str]], list[tuple[int, str]]]:
    """The rows whose images can be read; problems of lines by their numbers; likewise the lines with other images."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; write one object a line, such as {_EXAMPLE}")
    entries: dict[int, dict[str, Any]] = {}
    problems: list[tuple[int, str]] = []
    first: dict[tuple[str, str], int] = {}
    for line, content in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not content.strip():
            continue
        try:
            entry = _parse_line(content)
            if not (path.parent / entry["file_name"]).is_file():
                raise ValueError(
                    f"there is no image {path.parent / entry['file_name']}; mend file_name, or add the image"
                )
        except ValueError as error:
            problems.append((line, str(error)))
            continue
        earlier = first.setdefault((entry["file_name"], entry["category"]), line)
        if earlier == line:
            entries[line] = entry
        else:
            problems.append(
                (
                    line,
                    f"same file_name and category as line {earlier}; keep one line, with the points of all its objects",
                )
            )
    if not entries and not problems:
        problems.append((1, f"the file is empty; write one object a line, such as {_EXAMPLE}"))

    images = list(dict.fromkeys(str(path.parent / entry["file_name"]) for entry in entries.values()))
    with ThreadPoolExecutor() as pool:
        sizes = dict(zip(images, pool.map(_size, images), strict=True))
    rows: list[dict[str, Any]] = []
    unreadable: list[tuple[int, str]] = []
    for line, entry in entries.items():
        image = str(path.parent / entry["file_name"])
        size = sizes[image]
        if isinstance(size, ImageReadError):
            unreadable.append((line, str(size)))
            continue
        for number, (x, y) in enumerate(entry["points"], start=1):
            if not (0 <= x <= size[0] and 0 <= y <= size[1]):
                problems.append(
                    (
                        line,
                        f"point {number}, [{x}, {y}], is outside the image, {size[0]} pixels wide and {size[1]} high; "
                        "mend or remove it",
                    )
                )
        rows.append(_row(image, entry["file_name"], entry["category"], entry["points"]))
    return rows, problems, unreadable


def _parse_line(content: bytes) -> dict[str, Any]:
    """An object with a file name, a category and points.

    Raises:
        ValueError: it is none; the message says why, and the mend.
    """
    try:
        entry = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start}); save the file as such") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}); write {_EXAMPLE}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"not an object; write {_EXAMPLE}")
    for key in ("file_name", "category", "points"):
        if key not in entry:
            raise ValueError(f"no {key!r}, only {', '.join(map(repr, entry)) or 'nothing'}; write {_EXAMPLE}")
    for key in ("file_name", "category"):
        if not isinstance(entry[key], str) or not entry[key].strip():
            raise ValueError(f"{key} is {json.dumps(entry[key])}, not a name; write {_EXAMPLE}")
    if not isinstance(entry["points"], list):
        raise ValueError(f"points is {json.dumps(entry['points'])}, not a list of [x, y]; write {_EXAMPLE}")
    for number, point in enumerate(entry["points"], start=1):
        if not _is_point(point):
            raise ValueError(f"point {number} is {json.dumps(point)}, not two numbers; write [x, y], in pixels")
    return entry


def _is_point(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(part, int | float) and not isinstance(part, bool) and -1e9 < part < 1e9 for part in value)
    )


def _size(image: str) -> tuple[int, int] | ImageReadError:
    try:
        return open_stored(image).size
    except ImageReadError as error:
        return error


def _choose_columns(dataset: Dataset, columns: dict[str, str]) -> Dataset:
    """The columns this module names, of the rows that have an image."""
    unknown = sorted(set(columns) - set(_ALIASES))
    if unknown:
        raise ValueError(f"columns names {unknown}; it can name {', '.join(_ALIASES)}")
    features = dataset.features
    for name, aliases in _ALIASES.items():
        columns.setdefault(name, next((alias for alias in aliases if alias in features), ""))
        if columns[name] not in features and (columns[name] or name != "image_id"):
            raise ValueError(
                f"the data set has no column {columns[name] or name!r}, only {', '.join(features)}; "
                f"say which holds {name!r} by columns={{{name!r}: ...}}"
            )
    image, classes = columns["pixel_values"], features[columns["category"]]
    chosen = dataset.select_columns([image]).cast_column(image, Image(decode=False))
    if image != "pixel_values":
        chosen = chosen.rename_column(image, "pixel_values")
    categories, points = dataset[columns["category"]][:], dataset[columns["points"]][:]
    if isinstance(classes, ClassLabel):
        categories = [None if label is None or label < 0 else classes.int2str(label) for label in categories]
    for index, (category, clicks) in enumerate(zip(categories, points, strict=True)):
        if not isinstance(category, str) or not category.strip():
            raise ValueError(f"row {index}: {columns['category']} is {category!r}, not the name of a category")
        if not isinstance(clicks, list) or not all(map(_is_point, clicks)):
            raise ValueError(f"row {index}: {columns['points']} is {clicks!r}, not a list of [x, y] in pixels")
    names = dataset[columns["image_id"]][:] if columns["image_id"] else map(_identity, chosen["pixel_values"])
    added = {
        "image_id": list(map(str, names)),
        "category": categories,
        "points": points,
        "count": list(map(len, points)),
    }
    for name, values in added.items():
        chosen = chosen.add_column(name, values, feature=FEATURES[name])
    return chosen


def _identity(image: Mapping[str, Any] | None) -> str:
    """What tells an image from others: a digest of its bytes, or its path."""
    if image is None:
        return ""
    if image["bytes"] is not None:
        return hashlib.sha1(image["bytes"], usedforsecurity=False).hexdigest()
    return image["path"] or ""


def _hold_out(dataset: Dataset, split: str, validation_size: int, seed: int) -> Dataset:
    """The rows of the images that belong to "train" or "validation"."""
    names = dataset["image_id"][:]
    images = list(dict.fromkeys(names))
    if len(images) < 2:
        raise ValueError(f"train and validation need two images or more, not {len(images)}")
    size = min(validation_size, max(1, len(images) // _LARGEST_VALIDATION))
    chosen = {images[index] for index in choose_split(len(images), split, size, seed)}
    return dataset.select([index for index, name in enumerate(names) if name in chosen])


def _drop_unreadable(dataset: Dataset) -> Dataset:
    """Without the rows whose image cannot be read, which is tried and told once for each image.

    Raises:
        ValueError: none can be read.
    """
    images = {_identity(image): image for image in dataset["pixel_values"]}

    def readable(item: tuple[str, Any]) -> bool:
        name, image = item
        if not name:
            logger.warning("left out: a row without an image")
        return bool(name) and open_or_warn(image) is not None

    with ThreadPoolExecutor() as pool:
        good = dict(zip(images, pool.map(readable, images.items()), strict=True))
    kept = [index for index, image in enumerate(dataset["pixel_values"]) if good[_identity(image)]]
    if not kept:
        raise ValueError(f"none of the {len(images)} images can be read")
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


__all__ = [
    "FEATURES",
    "FSC_147_ADDRESS",
    "POINTS_FILE",
    "READING_ROWS",
    "load_counting",
    "reading_order",
    "validate_points",
]
