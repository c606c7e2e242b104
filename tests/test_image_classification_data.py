"""Images with classes, read from folders, Parquet and `datasets` objects, and the named data sets."""

import gzip
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from regard.data import fashion_mnist
from regard.data.image_classification import load_labelled_images
from regard.processing.image_processing_qavit import QAViTImageProcessor


def write_images(folder: Path, count: int, shade: int = 0) -> list[Path]:
    """Images that differ in size."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"test_{index}.png" for index in range(count)]
    for index, path in enumerate(paths):
        PILImage.new("RGB", (8 + index, 8), (shade, index, 0)).save(path)
    return paths


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten cats and ten dogs, in a folder whose name is a pattern."""
    for shade, name in enumerate(("dog", "cat")):
        write_images(tmp_path / "own [1]" / name, 10, shade)
    return tmp_path / "own [1]"


def rows_of(dataset: Dataset) -> list[tuple[str, bytes]]:
    names = dataset.features["label"].names
    return sorted((names[row["label"]], row["pixel_values"].tobytes()) for row in map(dict, dataset))


def test_a_folder_of_classes(folder: Path):
    train, validation = (load_labelled_images(str(folder), split) for split in ("train", "validation"))
    assert train.features == Features({"pixel_values": Image(), "label": ClassLabel(names=["cat", "dog"])})
    assert (len(train), len(validation)) == (16, 4), "at most a fifth is held out"
    shown = [(path.parent.name, PILImage.open(path).tobytes()) for path in folder.glob("*/*.png")]
    assert sorted(rows_of(train) + rows_of(validation)) == sorted(shown)
    assert rows_of(load_labelled_images(folder, "validation")) == rows_of(validation)
    assert rows_of(load_labelled_images(folder, "validation", seed=1)) != rows_of(validation)
    assert len(load_labelled_images(folder, "validation", validation_size=3)) == 3
    with pytest.raises(ValueError, match="no split 'test', only train"):
        load_labelled_images(folder, "test")
    with pytest.raises(ValueError, match="split='all' must be one of train, validation, test"):
        load_labelled_images(folder, "all")


@pytest.mark.parametrize("validation", ["validation", "val", "valid"])
def test_a_folder_of_splits(tmp_path: Path, validation: str):
    for split, names in (("train", "ab"), (validation, "a"), ("test", "ac")):
        for name in names:
            write_images(tmp_path / split / name, 2)
    sizes = [len(load_labelled_images(tmp_path, split)) for split in ("train", "validation", "test")]
    assert sizes == [4, 2, 4]
    assert load_labelled_images(tmp_path, "train").features["label"].names == ["a", "b", "c"]
    assert [name for name, _ in rows_of(load_labelled_images(tmp_path, "test"))] == ["a", "a", "c", "c"]


def test_damaged_images_are_left_out_with_a_warning(folder: Path, caplog):
    damaged = folder / "cat/test_3.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    (folder / "dog/test_0.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        train, validation = (load_labelled_images(folder, split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (15, 3)
    for path in (damaged, folder / "dog/test_0.png"):
        assert any(str(path) in record.getMessage() for record in caplog.records)
    assert len(rows_of(train)) == 15


def test_any_kind_of_image_reaches_the_model(tmp_path: Path):
    (tmp_path / "a").mkdir()
    grey = PILImage.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    grey.save(tmp_path / "a/grey.png")
    grey.convert("P").save(tmp_path / "a/palette.png")
    grey.convert("RGBA").save(tmp_path / "a/alpha.png")
    grey.convert("CMYK").save(tmp_path / "a/cmyk.jpg")
    PILImage.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "a/deep.png")
    dataset = load_labelled_images(tmp_path, "train", validation_size=1)
    dataset = [*dataset["pixel_values"], *load_labelled_images(tmp_path, "validation", 1)["pixel_values"]]
    assert {image.mode for image in dataset} >= {"L", "P", "RGBA", "CMYK"}
    pixels = QAViTImageProcessor(size=8)(images=dataset, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (5, 3, 8, 8)


def table(paths: list[Path], **columns) -> Dataset:
    return Dataset.from_dict({"image": [str(path) for path in paths], **columns}).cast_column("image", Image())


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    paths = write_images(tmp_path / "images", 6)
    (tmp_path / "parquet").mkdir()
    table(paths, label=["b", "a", "b", "b", "a", "b"]).to_parquet(tmp_path / "parquet/train-00000-of-00001.parquet")
    table(paths[:3], label=["c", "b", "c"]).to_parquet(tmp_path / "parquet/test-00000-of-00001.parquet")
    train, test = (load_labelled_images(tmp_path / "parquet", split) for split in ("train", "test"))
    assert train.features["label"].names == test.features["label"].names == ["a", "b", "c"]
    assert test["label"][:] == [2, 1, 2]
    assert len(train) == 5
    assert test[1]["pixel_values"].size == (9, 8)


def test_columns_of_datasets_objects(tmp_path: Path):
    paths = write_images(tmp_path, 10)
    by_number = table(paths, labels=[10, 2] * 5, other=range(10))
    dataset = load_labelled_images(by_number, "validation", validation_size=2)
    assert dataset.features["label"].names == ["2", "10"]
    assert dataset.column_names == ["pixel_values", "label"]
    fine = by_number.remove_columns("labels").add_column("fine_label", ["x"] * 10)
    assert load_labelled_images(fine, "train").features["label"].names == ["x"]
    other = load_labelled_images(by_number.rename_column("image", "photo"), "train", columns={"label": "other"})
    assert other.features["label"].names == [str(number) for number in range(10)]
    both = DatasetDict(train=fine, test=fine.select([0]))
    assert len(load_labelled_images(both, "test")) == 1

    two = fine.add_column("second", [str(path) for path in paths]).cast_column("second", Image())
    assert load_labelled_images(two, "train")[0]["pixel_values"].size[1] == 8
    two = two.rename_column("image", "first")
    with pytest.raises(ValueError, match=r"no column 'pixel_values', only .*columns=\{'pixel_values': ...\}"):
        load_labelled_images(two, "train")
    assert len(load_labelled_images(two, "train", columns={"pixel_values": "second"})) == 8


def test_wrong_labels_are_named(tmp_path: Path):
    paths = write_images(tmp_path, 2)
    with pytest.raises(ValueError, match="no column 'label', only image, class"):
        load_labelled_images(table(paths, **{"class": ["a", "b"]}), "train")
    with pytest.raises(ValueError, match="'train' has images without a label"):
        load_labelled_images(table(paths, label=["a", None]), "train")
    with pytest.raises(ValueError, match="'train' has images without a label"):
        load_labelled_images(table(paths, label=[-1, 2]), "train")
    with pytest.raises(ValueError, match=r"column 'label' holds .*float"):
        load_labelled_images(table(paths, label=[0.5, 1.0]).cast_column("label", Value("float32")), "train")
    with pytest.raises(ValueError, match=r"columns names \['labels'\]"):
        load_labelled_images(table(paths, label=["a", "b"]), "train", columns={"labels": "label"})


def test_wrong_folders_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        load_labelled_images(tmp_path / "absent", "train")
    (tmp_path / "empty/cat").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no images in this folder; put them as FOLDER/CLASS/IMAGE"):
        load_labelled_images(tmp_path / "empty", "train")
    write_images(tmp_path / "flat", 2)
    with pytest.raises(ValueError, match="no subfolder for each class; put them as FOLDER/CLASS/IMAGE"):
        load_labelled_images(tmp_path / "flat", "train")
    for name in ("one.png", "two.png"):
        (tmp_path / "bad/cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / "bad/cat" / name).write_text("no image")
    with pytest.raises(ValueError, match="none of the 2 images can be read"):
        load_labelled_images(tmp_path / "bad", "train")


def test_named_data_sets(tmp_path: Path):
    for prefix, number in (("train", 20), ("t10k", 6)):
        for kind, shape in (("images-idx3", (number, 28, 28)), ("labels-idx1", (number,))):
            content = bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + bytes(np.prod(shape))
            (tmp_path / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    source = f"fashion-mnist:{tmp_path}"
    sizes = [len(load_labelled_images(source, split, validation_size=5)) for split in ("train", "validation", "test")]
    assert sizes == [15, 5, 6]
    with pytest.raises(FileNotFoundError, match="fetch the python version"):
        load_labelled_images(f"cifar-100:{tmp_path / 'absent'}", "train")
    with pytest.raises(ValueError, match="cifar-10: say where it is, cifar-10:PATH"):
        load_labelled_images("cifar-10", "train")


@pytest.mark.skipif(not fashion_mnist.FOLDER.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_fashion_mnist_as_debian_has_it():
    labels = fashion_mnist.read_idx(fashion_mnist.FOLDER / "train-labels-idx1-ubyte.gz", dimensions=1)
    assert np.bincount(labels).tolist() == [6000] * 10
    test, validation = (load_labelled_images("fashion-mnist", split) for split in ("test", "validation"))
    assert (len(test), len(validation)) == (10_000, 5000)
    assert np.bincount(test["label"][:]).tolist() == [1000] * 10
    names = test.features["label"].names
    assert [names[label] for label in test["label"][:5]] == ["Ankle boot", "Pullover", "Trouser", "Trouser", "Shirt"]
    for data in (test, validation):
        assert (data[0]["pixel_values"].mode, data[0]["pixel_values"].size) == ("L", (28, 28))
        assert 0 < np.asarray(data[0]["pixel_values"]).mean() < 255
