import json
import logging
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Image, IterableDataset, Value
from PIL import Image as PILImage

from regard.data.text_images import load_text_images
from regard.processing.image_io import ImageReadError

TEXTS = ["one", "two\nlines", "007"]


def write_images(folder, count=3):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        PILImage.new("RGB", (20 + index, 10), (index * 50, 0, 0)).save(folder / f"{index}.png")
    return [f"{index}.png" for index in range(count)]


def write_jsonl(folder, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def read(*args, **kwargs) -> list[dict[str, Any]]:
    return [dict(row) for row in load_text_images(*args, **kwargs)]


def rows_of(dataset):
    return [(row["pixel_values"].size, row["text"]) for row in dataset]


EXPECTED = [((20 + index, 10), text) for index, text in enumerate(TEXTS)]


@pytest.fixture
def folder(tmp_path):
    """Three images with their texts, in metadata.jsonl."""
    names = write_images(tmp_path / "own")
    write_jsonl(tmp_path / "own", [{"file_name": name, "text": text} for name, text in zip(names, TEXTS, strict=True)])
    return tmp_path / "own"


@pytest.mark.parametrize("streaming", [False, True])
def test_folder_with_json_lines(folder, streaming):
    dataset = load_text_images(folder, streaming=streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    assert rows_of(dataset) == EXPECTED
    assert set(next(iter(dataset))) == {"pixel_values", "text"}
    assert next(iter(dataset))["pixel_values"].mode == "RGB"


def test_folder_with_csv_keeps_texts_as_written(tmp_path):
    write_images(tmp_path)
    lines = ["file_name,text,boxes", '0.png,"a ""b"", c",', '1.png,"two\nlines",', "2.png,007,", "0.png,NA,"]
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n", "utf-8-sig")
    dataset = load_text_images(str(tmp_path))
    assert list(dataset["text"]) == ['a "b", c', "two\nlines", "007", "NA"]
    assert dataset.column_names == ["pixel_values", "text"]


def test_boxes_come_along(tmp_path):
    write_images(tmp_path, 2)
    boxes = [[0, 0, 4.5, 8], [4.5, 0, 9, 8]]
    write_jsonl(tmp_path, [{"file_name": "0.png", "text": "ab", "boxes": boxes}, {"file_name": "1.png", "text": "c"}])
    assert [row["boxes"] for row in read(tmp_path)] == [boxes, None]
    write_images(tmp_path / "csv", 1)
    (tmp_path / "csv" / "metadata.csv").write_text(f'file_name,text,boxes\n0.png,ab,"{boxes}"\n')
    assert read(tmp_path / "csv")[0]["boxes"] == boxes


def test_folder_with_a_subfolder_for_each_split(tmp_path):
    for split, text in (("train", "a"), ("test", "b")):
        write_images(tmp_path / split, 1)
        write_jsonl(tmp_path / split, [{"file_name": "0.png", "text": text}])
    assert list(load_text_images(tmp_path, split="test")["text"]) == ["b"]
    with pytest.raises(ValueError, match=r"has several splits \(test, train\); name one"):
        load_text_images(tmp_path)


def test_folder_without_subfolders_is_the_train_split(folder):
    assert len(read(folder, split="train")) == 3
    with pytest.raises(ValueError, match="has no subfolder 'test'"):
        load_text_images(folder, split="test")


def test_datasets_objects(folder):
    images = Features(image=Image(), text=Value("string"), other=Value("int64"))
    table = {"image": [str(folder / f"{index}.png") for index in range(3)], "text": TEXTS, "other": [1, 2, 3]}
    dataset = Dataset.from_dict(table, features=images)
    assert rows_of(load_text_images(dataset)) == EXPECTED
    assert rows_of(load_text_images(dataset, streaming=True)) == EXPECTED
    assert rows_of(load_text_images(dataset.to_iterable_dataset(num_shards=3))) == EXPECTED
    assert load_text_images(dataset).column_names == ["pixel_values", "text"]


def test_a_stream_of_unknown_features(folder):
    def generate():
        for index, text in enumerate(TEXTS):
            with PILImage.open(folder / f"{index}.png") as image:
                yield {"photo": image.copy(), "text": text}

    stream = IterableDataset.from_generator(generate)
    assert stream.features is None
    assert rows_of(load_text_images(stream, columns={"pixel_values": "photo"})) == EXPECTED
    with pytest.raises(ValueError, match="no column 'pixel_values', only photo, text"):
        load_text_images(stream)


def test_what_load_dataset_takes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    table = {"image": [str(folder / f"{index}.png") for index in range(3)], "transcription": TEXTS}
    dataset = Dataset.from_dict(table, features=Features(image=Image(), transcription=Value("string")))
    (tmp_path / "parquet").mkdir()
    for split in ("train", "test"):
        dataset.to_parquet(tmp_path / "parquet" / f"{split}-00000-of-00001.parquet")
    columns = {"text": "transcription"}
    for streaming in (False, True):
        loaded = load_text_images(tmp_path / "parquet", "test", columns, streaming)
        assert isinstance(loaded, IterableDataset) == streaming
        assert rows_of(loaded) == EXPECTED
    with pytest.raises(ValueError, match=r"has several splits \(train, test\); name one as split"):
        load_text_images(tmp_path / "parquet", columns=columns)
    with pytest.raises(ValueError, match=r"no column 'text', only image, transcription; .*columns=\{'text': ...\}"):
        load_text_images(tmp_path / "parquet", "test")


@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_images_are_left_out_with_a_warning(folder, streaming, caplog):
    content = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING):
        dataset = load_text_images(folder, streaming=streaming)
        assert rows_of(dataset) == [EXPECTED[0], EXPECTED[2]]
    assert [record.getMessage() for record in caplog.records if str(folder / "1.png") in record.getMessage()]
    if isinstance(dataset, Dataset):
        assert len(dataset) == 2

    dataset = load_text_images(folder, streaming=streaming, skip_damaged=False)
    with pytest.raises(ImageReadError, match=r"own/1\.png: "):
        rows_of(dataset)


def test_a_damaged_image_inside_a_table_is_named(caplog):
    images = [{"path": "inner/bad.png", "bytes": b"not an image"}, {"path": None, "bytes": b""}]
    dataset = Dataset.from_dict({"pixel_values": images, "text": ["a", "b"]})
    with pytest.raises(ValueError, match="none of the 2 images can be read"):
        load_text_images(dataset)
    assert "inner/bad.png" in caplog.text


def test_images_come_upright_and_flat(tmp_path):
    image = PILImage.fromarray(np.zeros((10, 30), np.uint8))
    exif = image.getexif()
    exif[274] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    PILImage.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    write_jsonl(tmp_path, [{"file_name": name, "text": "a"} for name in ("turned.jpg", "clear.png")])
    turned, clear = (row["pixel_values"] for row in read(tmp_path))
    assert (turned.size, turned.mode) == ((10, 30), "L")
    assert clear.getpixel((0, 0)) == (255, 255, 255)


GOOD = {"file_name": "0.png", "text": "a"}


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([GOOD, "{oops"], ValueError, r"metadata\.jsonl, line 2: not JSON"),
        ([GOOD, "", "[1]"], ValueError, "line 3: not an object"),
        ([{"file_name": "0.png", "label": "a"}], ValueError, "line 1: no string 'text'; found file_name, label"),
        ([{"file_name": "0.png", "text": 7}], ValueError, "line 1: no string 'text'; found file_name, text"),
        ([GOOD, {"text": "a"}], ValueError, "line 2: no string 'file_name'; found text"),
        ([{"file_name": "9.png", "text": "a"}], FileNotFoundError, r"line 1: there is no image .*9\.png"),
        ([{**GOOD, "boxes": [[0, 0, 1, 1]] * 2}], ValueError, "line 1: 2 boxes for 1 characters"),
        ([{**GOOD, "boxes": [[0, 0, 1]]}], ValueError, "line 1: 1 boxes for 1 characters; give one"),
        ([{**GOOD, "boxes": [3]}], ValueError, "line 1: boxes are not a list"),
        ([{**GOOD, "boxes": "[[0, 0"}], ValueError, "line 1: boxes are not a list"),
        ([""], ValueError, "no rows"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, rows, error, message):
    write_images(tmp_path, 1)
    write_jsonl(tmp_path, rows)
    with pytest.raises(error, match=message):
        load_text_images(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"file_name,text\n0.png,a,b\n", r"metadata\.csv, line 2: not 2 fields"),
        (b"file_name,text\n0.png,a\n0.png\n", "line 3: not 2 fields"),
        (b'file_name,text\n0.png,"a\n', "line 2: not CSV"),
        (b"file_name;text\n0.png;a\n", "line 2: no string 'file_name'; found file_name;text"),
        (b"file_name,text\n0.png,\xe9\n", "not UTF-8"),
    ],
)
def test_a_wrong_csv_line_is_named(tmp_path, content, message):
    write_images(tmp_path, 1)
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_text_images(tmp_path)


def test_wrong_sources_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        load_text_images(tmp_path / "absent")
    (folder / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(ValueError, match=r"has both metadata\.jsonl and metadata\.csv"):
        load_text_images(folder)
    for name in ("metadata.csv", "metadata.jsonl"):
        (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"images, but no metadata\.jsonl or metadata\.csv"):
        load_text_images(folder)
    with pytest.raises(ValueError, match=r"columns names \['texts'\]"):
        load_text_images(folder, columns={"texts": "a"})
    table = Dataset.from_dict({"pixel_values": [str(folder / "0.png")], "text": [3], "boxes": [[]]})
    with pytest.raises(ValueError, match=r"column 'text' holds .*int64.*, not strings"):
        load_text_images(table)
