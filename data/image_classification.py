"""Images with their classes: named data sets, folders with a subfolder for each class, Hub data sets, `datasets`."""

from collections.abc import Mapping
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from regard.data.cifar import load_cifar10, load_cifar100
from regard.data.fashion_mnist import FOLDER, load_fashion_mnist
from regard.data.labelled_images import choose_split, drop_damaged, read_splits
from regard.processing.image_io import ImageReadError, find_images

SPLITS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
LAYOUT = "FOLDER/CLASS/IMAGE, or FOLDER/train/CLASS/IMAGE beside FOLDER/validation and FOLDER/test"
_LARGEST_VALIDATION = 5  # a fifth of the images
_NAMED = {"fashion-mnist": load_fashion_mnist, "cifar-10": load_cifar10, "cifar-100": load_cifar100}
_IMAGES, _LABELS = ("pixel_values", "image", "img"), ("label", "labels", "fine_label")


def load_labelled_images(
    source: str | Path | Dataset | DatasetDict,
    split: str,
    validation_size: int = 5000,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
) -> Dataset:
    """Images with classes as a data set of the columns `pixel_values` (PIL images of any mode and size) and `label`,
    a `ClassLabel` whose names are the same for every split.

    Images that cannot be read are left out, with a logged warning each that names the file.

    Args:
        source: "fashion-mnist" or "fashion-mnist:FOLDER", "cifar-10:PATH", "cifar-100:PATH" (see their modules); a
            folder of images, `FOLDER/CLASS/IMAGE` or `FOLDER/SPLIT/CLASS/IMAGE`; a `datasets` object, whose sole split
            is "train"; or whatever `datasets.load_dataset` takes: a name on the Hub, a folder of Parquet files.
        split: "train"; "validation", which is held out of the training images where the source has none (also called
            val or valid); or "test".
        validation_size: number of images held out; where that is more than a fifth of own images, a fifth.
        seed: chooses them.
        columns: the source's own names of columns, as `{"pixel_values": "photo", "label": "species"}`. An image column
            that is the only one or named `image` or `img`, and labels named `label`, `labels` or `fine_label`, need no
            mention.

    Raises:
        ValueError: there is no such split, column or class, a label is missing, or no image can be read.
        FileNotFoundError: there is no such folder or file, or no images in it.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}.")
    name, _, place = source.partition(":") if isinstance(source, str) else ("", "", "")
    if name in _NAMED and not (isinstance(source, str) and Path(source).is_dir()):
        if not place and name != "fashion-mnist":
            raise ValueError(f"{name}: say where it is, {name}:PATH")
        return _NAMED[name](split, place or FOLDER, validation_size, seed)

    columns = dict(columns or {})
    unknown = sorted(set(columns) - {"pixel_values", "label"})
    if unknown:
        raise ValueError(f"columns names {unknown}; it can name pixel_values, label")
    splits = _read_splits(source)
    present = {name: next((own for own in names if own in splits), None) for name, names in SPLITS.items()}
    own = present[split] or (present["train"] if split == "validation" else None)
    if own is None:
        raise ValueError(f"the data set has no split {split!r}, only {', '.join(splits)}")
    dataset = drop_damaged(_encode_labels(_choose_columns(splits, columns), own))
    if split != "test" and present["validation"] is None:
        size = min(validation_size, max(1, len(dataset) // _LARGEST_VALIDATION))
        dataset = dataset.select(choose_split(len(dataset), split, size, seed))
    return dataset.cast_column("pixel_values", Image())


def _read_splits(source: str | Path | Dataset | DatasetDict) -> dict[str, Dataset]:
    """The splits of a source by its own names for them."""
    if isinstance(source, (str, Path)) and (folder := Path(source).expanduser()).is_dir():
        if splits := _read_folder(folder):
            return splits
        if not any(path.suffix for path in folder.rglob("*") if path.is_file()):
            raise FileNotFoundError(f"{folder}: no images in this folder; put them as {LAYOUT}")
    return read_splits(source)


def _read_folder(folder: Path) -> dict[str, Dataset]:
    """The splits of a folder of images; none where it holds other files.

    (`imagefolder` would send dog/test_1.png to a split of its own, and trips over brackets in a folder's name.)
    """
    known = {name for names in SPLITS.values() for name in names}
    parts = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and path.name in known}
    listed = {}
    for split, part in (parts or {"train": folder}).items():
        try:
            files = find_images(part)
        except ImageReadError:
            continue
        listed[split] = [(file, file.relative_to(part).parts) for file in files]
    if not listed or any((folder / name).is_file() for name in ("metadata.jsonl", "metadata.csv")):
        return {}
    classes = sorted({parts[0] for files in listed.values() for _, parts in files if len(parts) > 1})
    if not classes:
        raise ValueError(f"{folder}: images, but no subfolder for each class; put them as {LAYOUT}")
    features = Features({"pixel_values": Image(decode=False), "label": ClassLabel(names=classes)})
    return {
        split: Dataset.from_dict(
            {
                "pixel_values": [str(file) for file, parts in files if len(parts) > 1],
                "label": [parts[0] for _, parts in files if len(parts) > 1],
            },
            features=features,
        )
        for split, files in listed.items()
    }


def _choose_columns(splits: Mapping[str, Dataset], columns: dict[str, str]) -> dict[str, Dataset]:
    """The columns this module names, with images not decoded."""
    features = next(iter(splits.values())).features
    if "pixel_values" not in columns:
        images = [name for name, kind in features.items() if isinstance(kind, Image)]
        named = [name for name in _IMAGES if name in features]
        columns["pixel_values"] = (images if len(images) == 1 else [*named, "pixel_values"])[0]
    columns.setdefault("label", next((name for name in _LABELS if name in features), "label"))
    for name, own in columns.items():
        if own not in features:
            raise ValueError(
                f"the data set has no column {own!r}, only {', '.join(features)}; "
                f"say which holds {name!r} by columns={{{name!r}: ...}}"
            )
    renaming = {own: name for name, own in columns.items() if own != name}
    return {
        split: dataset.select_columns(list(columns.values()))
        .rename_columns(renaming)
        .cast_column("pixel_values", Image(decode=False))
        for split, dataset in splits.items()
    }


def _encode_labels(splits: Mapping[str, Dataset], split: str) -> Dataset:
    """One split, with labels that are a `ClassLabel`: texts and whole numbers become one over all splits."""
    dataset, kind = splits[split], splits[split].features["label"]
    labels = dataset["label"][:]
    if any(label is None or label == -1 for label in labels):  # -1 is what the Hub's data sets have for "not told"
        raise ValueError(f"split {split!r} has images without a label")
    if isinstance(kind, ClassLabel):
        return dataset
    if not (isinstance(kind, Value) and kind.dtype.removeprefix("large_").startswith(("string", "int", "uint"))):
        raise ValueError(f"column 'label' holds {kind}, not classes")
    classes = sorted({label for part in splits.values() for label in part.unique("label") if label is not None})
    numbers = {label: number for number, label in enumerate(classes)}
    feature = ClassLabel(names=[str(label) for label in classes])
    return dataset.remove_columns("label").add_column("label", [numbers[label] for label in labels], feature=feature)


__all__ = ["LAYOUT", "SPLITS", "load_labelled_images"]
