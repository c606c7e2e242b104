"""Rows with images from each kind of source, read lazily, with images left alone until they are wanted."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, Value
from PIL import Image as PILImage

from regard.data.image_rows import ImageRows, RowsError
from regard.processing.image_io import ImageReadError


@pytest.fixture
def dataset(folder: Path) -> Dataset:
    """The images of the folder, stored in the rows, with questions."""
    files = sorted(folder.rglob("*.png"))
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    features = Features(photo=Image(), question=Value("string"), number=Value("int64"))
    rows = {"photo": images, "question": ["one?", "two?", "three?"], "number": [7, 8, 9]}
    return Dataset.from_dict(rows, features=features)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def same_pixels(image: PILImage.Image, path: Path) -> bool:
    with PILImage.open(path) as expected:
        return bool(np.array_equal(np.asarray(image), np.asarray(expected)))


def test_a_folder_of_images(folder):
    rows = ImageRows(str(folder))
    names = ["a/one.png", "a/two.png", "b/one.png"]
    assert list(rows) == list(rows) == [{"image": name, "id": name} for name in names]
    assert rows.total == 3
    assert all(same_pixels(rows.open(row["image"]), folder / row["id"]) for row in rows)
    assert [row["id"] for row in ImageRows(folder, split="a")] == ["one.png", "two.png"]
    with pytest.raises(ValueError, match="no subfolder 'c'"):
        ImageRows(folder, split="c")


def test_the_version_changes_with_the_files(folder):
    version = ImageRows(folder).version
    assert ImageRows(folder).version == version
    os.utime(folder / "a/one.png")
    assert ImageRows(folder).version == version
    (folder / "a/one.png").rename(folder / "a/0.png")
    renamed = ImageRows(folder).version
    (folder / "b/one.png").write_bytes(b"")
    assert len({version, renamed, ImageRows(folder).version}) == 3


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_files_of_rows(folder, name):
    table = Dataset.from_dict({"file_name": ["a/one.png", "b/one.png"], "question": ["what?", "007"], "other": [1, 2]})
    path = folder / name
    {
        ".jsonl": lambda: write_rows(path, table.to_list()),
        ".json": lambda: table.to_json(path),
        ".csv": lambda: table.to_csv(path, index=False),
        ".parquet": lambda: table.to_parquet(path),
    }[path.suffix]()
    rows = ImageRows(str(path), inputs=["question"])
    assert list(rows) == [
        {"image": "a/one.png", "id": "a/one.png", "question": "what?"},
        {"image": "b/one.png", "id": "b/one.png", "question": "007"},
    ]
    assert same_pixels(rows.open("b/one.png"), folder / "b/one.png")
    with pytest.raises(ValueError, match="has no split 'test'"):
        ImageRows(path, split="test")


def test_metadata_in_a_folder(folder):
    write_rows(folder / "metadata.jsonl", [{"file_name": "b/one.png"}])
    rows = ImageRows(folder)
    assert [row["id"] for row in rows] == ["b/one.png"]
    assert same_pixels(rows.open("b/one.png"), folder / "b/one.png")


def test_data_sets_in_folders_and_in_memory(dataset, folder, tmp_path):
    (tmp_path / "files").mkdir()
    dataset.to_parquet(tmp_path / "files/train-0.parquet")
    dataset.select([2]).to_parquet(tmp_path / "files/test-0.parquet")
    DatasetDict(train=dataset, test=dataset.select([2])).save_to_disk(tmp_path / "saved")
    expected = [(file.name, file) for file in sorted(folder.rglob("*.png"))]
    sources = [(tmp_path / "files", "train"), (str(tmp_path / "saved"), "train"), (dataset, None)]
    for source, split in [*sources, (dataset.to_iterable_dataset(), None)]:
        rows = ImageRows(source, split, inputs=["question"])
        read = list(rows)
        assert [row["question"] for row in read] == ["one?", "two?", "three?"]
        for row, (name, path) in zip(read, expected, strict=True):
            assert row["id"] == name
            assert isinstance(row["image"]["bytes"], bytes)  # stored, not opened
            assert same_pixels(rows.open(row["image"]), path)
    for source, _ in sources[:2]:
        assert [row["id"] for row in ImageRows(source, "test")] == ["one.png"]
        with pytest.raises(ValueError, match="several splits"):
            ImageRows(source)
        with pytest.raises(ValueError, match="no split 'dev', only"):
            ImageRows(source, "dev")


def test_columns_of_other_names(dataset):
    rows = ImageRows(dataset, columns={"id": "number", "question": "question"}, inputs=["question"])
    assert [row["id"] for row in rows] == ["7", "8", "9"]
    with pytest.raises(ValueError, match=r"no column 'words', only photo, question, number; .*--columns question="):
        ImageRows(dataset, columns={"question": "words"}, inputs=["question"])
    with pytest.raises(ValueError, match="names answer; it can name image, id"):
        ImageRows(dataset, columns={"answer": "words"})


def test_rows_are_read_as_they_are_asked_for():
    asked = []

    def endless():
        for number in itertools.count():
            asked.append(number)
            yield {"image": f"{number}.png"}

    rows = iter(ImageRows(IterableDataset.from_generator(endless)))
    asked.clear()  # the names of the columns were asked for
    assert [next(rows)["id"] for _ in range(3)] == ["0.png", "1.png", "2.png"]
    assert len(asked) <= 4


def test_images_of_any_address(folder):
    path = folder / "a/one.png"
    rows = ImageRows(folder)
    for image in (str(path), path.as_uri(), path.read_bytes(), {"path": path.as_uri(), "bytes": None}):
        assert same_pixels(rows.open(image), path)
    for image, reason in {
        None: "no image in this row",
        "absent.png": "absent.png: no such file",
        "file:///absent.png": "cannot be fetched",
        "nothing://absent.png": "cannot be fetched",
        5: "an image is a path",
    }.items():
        with pytest.raises(ImageReadError, match=reason):
            rows.open(image)


def test_what_is_no_text_is_none_or_mended(tmp_path, make_image):
    path = write_rows(
        tmp_path / "rows.jsonl", [{"image": "a", "question": "\ud800"}, {"image": "a", "question": ["b"]}, {}]
    )
    assert [row["question"] for row in ImageRows(path, inputs=["question"])] == ["?", None, None]
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    os.rename(make_image(tmp_path / "images/plain.png"), name)
    (row,) = ImageRows(tmp_path)
    assert row["id"].startswith("caf")
    row["id"].encode()
    assert ImageRows(tmp_path).open(row["image"]).size == (96, 64)


def test_what_is_wrong_is_named(tmp_path):
    for source in ("./absent", "absent.jsonl", tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=r"absent.*: no such file or folder"):
            ImageRows(source)
    (tmp_path / "rows.txt").touch()
    with pytest.raises(ValueError, match=r"rows\.txt: not a file of rows"):
        ImageRows(tmp_path / "rows.txt")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl: no rows"):
        ImageRows(tmp_path / "empty.jsonl")
    (tmp_path / "torn.jsonl").write_text('{"image": "1.png"}\n{"image": "2.p')
    rows = iter(ImageRows(tmp_path / "torn.jsonl"))
    assert next(rows)["id"] == "1.png"
    with pytest.raises(RowsError, match=r"torn\.jsonl: cannot be read on .*line 2: not JSON"):
        next(rows)
