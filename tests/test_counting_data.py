"""Objects to be counted: FSC-147's layout, own files of points and what is wrong with them, and `datasets` objects."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage

from regard.data.counting import FEATURES, load_counting, reading_order, validate_points
from regard.data.labelled_images import open_stored


def save(path: Path, size: tuple[int, int] = (40, 20), **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.new("RGB", size, "green").save(path, **options)
    return str(path)


@pytest.fixture
def fsc(tmp_path: Path) -> Path:
    """FSC-147 as it is unpacked, with four images."""
    names = {"train": ["2.jpg", "3.jpg"], "val": ["190.jpg"], "test": ["285.jpg"]}
    points = {"2.jpg": [[10.5, 3], [20, 19.9]], "3.jpg": [[1, 2]] * 5, "190.jpg": [[5, 6]], "285.jpg": [[7, 8], [9, 1]]}
    classes = {"2.jpg": "sea shells", "3.jpg": "hot air balloons", "190.jpg": "grapes", "285.jpg": "legos"}
    annotations = {}
    for name, own in points.items():
        save(tmp_path / "images_384_VarV2" / name, (60, 384))
        corners = [[[1, 1], [1, 4], [4, 4], [4, 1]]]
        annotations[name] = {
            "H": 768,
            "W": 120,
            "box_examples_coordinates": corners,
            "box_examples_path": [],
            "density_path": f"gt_density_map_adaptive_384_VarV2/{name[:-4]}.npy",
            "density_path_fixed": "",
            "img_path": name,
            "points": own,
            "r": [3],
            "ratio_h": 0.5,
            "ratio_w": 0.5,
        }
    (tmp_path / "annotation_FSC147_384.json").write_text(json.dumps(annotations))
    (tmp_path / "Train_Test_Val_FSC_147.json").write_text(json.dumps({**names, "val_coco": [], "test_coco": []}))
    (tmp_path / "ImageClasses_FSC147.txt").write_text("".join(f"{name}\t{own}\n" for name, own in classes.items()))
    return tmp_path


def test_fsc_147(fsc):
    train = load_counting(f"fsc-147:{fsc}", "train")
    assert train.features == FEATURES
    assert train["image_id"][:] == ["2.jpg", "3.jpg"]
    assert train["category"][:] == ["sea shells", "hot air balloons"]
    assert train["count"][:] == [2, 5]
    assert train["points"][0] == [[10.5, 3.0], [20.0, 19.9]]
    assert open_stored(train[0]["pixel_values"]).size == (60, 384)
    assert load_counting(f"fsc-147:{fsc}", "validation")["category"][:] == ["grapes"]
    assert load_counting(f"fsc-147:{fsc}", "test")["points"][:] == [[[7.0, 8.0], [9.0, 1.0]]]
    assert load_counting(f"fsc-147:{fsc}", "train", min_objects=3)["count"][:] == [5]
    assert load_counting(f"fsc-147:{fsc}", "train", max_objects=4)["count"][:] == [2]
    with pytest.raises(
        ValueError, match=r"none of the 2 rows of split 'train' has 9 or more objects; mend min_objects"
    ):
        load_counting(f"fsc-147:{fsc}", "train", min_objects=9)


def test_fsc_147_with_images_missing_or_damaged(fsc, caplog):
    (fsc / "images_384_VarV2/3.jpg").unlink()
    with caplog.at_level(logging.WARNING):
        assert load_counting(f"fsc-147:{fsc}", "train")["image_id"][:] == ["2.jpg"]
    (message,) = caplog.messages
    assert message.startswith("left out: ")
    assert "3.jpg: no such file" in message
    (fsc / "images_384_VarV2/2.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 2 images can be read"):
        load_counting(f"fsc-147:{fsc}", "train")


@pytest.mark.parametrize(
    "name", ["annotation_FSC147_384.json", "Train_Test_Val_FSC_147.json", "ImageClasses_FSC147.txt"]
)
def test_fsc_147_with_files_missing_or_damaged(fsc, name):
    (fsc / name).write_text("{")
    with pytest.raises(ValueError, match=rf"{name}: damaged .* fetch FSC-147"):
        load_counting(f"fsc-147:{fsc}", "train")
    (fsc / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}: no such file; fetch FSC-147"):
        load_counting(f"fsc-147:{fsc}", "train")


def write(folder: Path, *lines: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "points.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8")
    return path


def line(name: str = "1.png", category: str = "apples", points: Any = ((1, 2),)) -> dict[str, Any]:
    return {"file_name": name, "category": category, "points": points}


def test_own_images_with_points(tmp_path):
    for number in range(1, 6):
        save(tmp_path / f"images/{number}.png")
    lines = [line(f"images/{number}.png", points=[[0, 0], [40, 20]]) for number in range(1, 6)]
    path = write(tmp_path, *lines, "", line("images/1.png", "pears", []), line("images/2.png", "Äpfel", [[3.5, 4]]))
    assert validate_points(path) == validate_points(str(tmp_path)) == []
    train, validation = load_counting(tmp_path, "train"), load_counting(str(tmp_path), "validation")
    assert train.features == FEATURES
    assert len(set(train["image_id"])) == 4
    assert len(set(validation["image_id"])) == 1
    assert not set(train["image_id"]) & set(validation["image_id"])
    rows: list[Any] = [*train, *validation]
    assert sorted((row["image_id"], row["category"], row["count"]) for row in rows) == [
        ("images/1.png", "apples", 2),
        ("images/1.png", "pears", 0),
        ("images/2.png", "apples", 2),
        ("images/2.png", "Äpfel", 1),
        *((f"images/{number}.png", "apples", 2) for number in (3, 4, 5)),
    ]
    assert all(open_stored(row["pixel_values"]).size == (40, 20) for row in rows)
    with pytest.raises(ValueError, match="no split 'test', only train"):
        load_counting(tmp_path, "test")


def test_own_images_with_folders_of_splits(tmp_path):
    for split, category in (("train", "apples"), ("val", "pears"), ("test", "plums")):
        save(tmp_path / split / "1.png")
        write(tmp_path / split, line(category=category))
    found = [load_counting(tmp_path, split)["category"][:] for split in ("train", "validation", "test")]
    assert found == [["apples"], ["pears"], ["plums"]]


def test_what_is_wrong_with_points_is_told(tmp_path):
    save(tmp_path / "1.png")
    save(tmp_path / "turned.jpg", exif=turned())
    (tmp_path / "damaged.png").write_bytes(b"no image")
    path = write(
        tmp_path,
        '\ufeff{"file_name": "1.png"',
        [1, 2],
        {"file_name": "1.png", "points": []},
        line(),
        line("2.png"),
        line(category=" "),
        line(category="a", points={"x": 1}),
        line(category="b", points=[[1, 2], [3]]),
        line(category="c", points=[[1, "2"]]),
        line(category="d", points=[[1, float("nan")]]),
        line(category="e", points=[[True, 1]]),
        line(category="f", points=[[1, 2], [41, 2], [1, -0.5]]),
        line(points=[[3, 4]]),
        line("damaged.png"),
        line("turned.jpg", points=[[19, 39]]),
        line("turned.jpg", "g", points=[[39, 19]]),
    )
    expected = {
        1: "not JSON (Expecting ',' delimiter at column 22); write {",
        2: "not an object; write {",
        3: "no 'category', only 'file_name', 'points'; write {",
        5: f"there is no image {tmp_path}/2.png; mend file_name",
        6: 'category is " ", not a name; write {',
        7: 'points is {"x": 1}, not a list of [x, y]; write {',
        8: "point 2 is [3], not two numbers; write [x, y]",
        9: 'point 1 is [1, "2"], not two numbers',
        10: "point 1 is [1, NaN], not two numbers",
        11: "point 1 is [true, 1], not two numbers",
        12: "point 2, [41, 2], is outside the image, 40 pixels wide and 20 high; mend or remove it",
        13: "same file_name and category as line 4; keep one line",
        14: f"{tmp_path}/damaged.png: not an image in a known format; convert it to PNG or JPEG",
        16: "point 1, [39, 19], is outside the image, 20 pixels wide and 40 high",
    }
    problems = validate_points(path)
    assert len(problems) == len(expected) + 1  # two points of line 12
    for number, text in expected.items():
        assert any(problem.startswith(f"{path}, line {number}: {text}") for problem in problems), (text, problems)
    with pytest.raises(ValueError, match=r"line 1: not JSON") as caught:
        load_counting(tmp_path, "train")
    lines = str(caught.value).splitlines()
    assert lines == [
        *problems[:10],
        "... and 4 more; validate_points lists all",
    ]  # an image that cannot be read is none


def turned() -> PILImage.Exif:
    exif = PILImage.Exif()
    exif[0x0112] = 6
    return exif


def test_files_of_points_that_cannot_be_read(tmp_path):
    save(tmp_path / "1.png")
    path = write(tmp_path)
    assert validate_points(path) == [
        f'{path}, line 1: the file is empty; write one object a line, such as {{"file_name": "1.jpg", "category": '
        '"apples", "points": [[12, 30.5], [80, 41]]}'
    ]
    path.write_bytes(json.dumps(line(category="Äpfel"), ensure_ascii=False).encode("latin-1"))
    (problem,) = validate_points(path)
    assert "line 1: not UTF-8 text" in problem
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl: no such file; write one object a line"):
        validate_points(tmp_path / "absent.jsonl")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_counting(tmp_path / "absent", "train")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no points\.jsonl in this folder"):
        load_counting(tmp_path, "train")


def test_images_that_cannot_be_read_are_left_out_with_a_warning_each(tmp_path, caplog):
    for name in ("1.png", "2.png"):
        save(tmp_path / "test" / name)
    (tmp_path / "test/damaged.png").write_bytes(b"no image")
    path = write(
        tmp_path / "test", line("1.png"), line("damaged.png"), line("damaged.png", "pears"), line("2.png", "pears")
    )
    with caplog.at_level(logging.WARNING):
        assert load_counting(tmp_path, "test")["image_id"][:] == ["1.png", "2.png"]
    (message,) = caplog.messages
    assert "damaged.png: not an image" in message
    write(path.parent, line("damaged.png"))
    with pytest.raises(ValueError, match="none of the 1 images can be read"):
        load_counting(tmp_path, "test")


def png(color: str) -> bytes:
    stream = io.BytesIO()
    PILImage.new("RGB", (8, 8), color).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture
def table() -> Dataset:
    """Six images, two rows each, in columns of other names; one image is no image."""
    colors = ["red", "green", "blue", "black", "white", "grey"]
    images = [{"bytes": png(color), "path": None} for color in colors] + [{"bytes": b"no image", "path": "x.png"}]
    features = Features(
        image=Image(decode=False),
        label=ClassLabel(names=["cars", "bikes"]),
        clicks=List(List(Value("int32"))),
        extra=Value("int64"),
    )
    return Dataset.from_dict(
        {
            "image": [image for image in images for _ in range(2)],
            "label": [0, 1] * 7,
            "clicks": [[[1, 2]] * count for count in range(14)],
            "extra": [0] * 14,
        },
        features=features,
    )


def test_datasets_objects(table, caplog):
    settings: dict[str, Any] = {"columns": {"points": "clicks"}, "seed": 1}
    with caplog.at_level(logging.WARNING):
        train = load_counting(table, "train", **settings)
    assert len(caplog.messages) == 1
    validation = load_counting(table, "validation", **settings)
    assert train.features == FEATURES
    assert (len(train), len(validation)) == (10, 2)
    assert not set(train["image_id"]) & set(validation["image_id"])
    assert sorted([*train["count"], *validation["count"]]) == list(range(12))
    assert set(train["category"]) == {"cars", "bikes"}
    assert open_stored(train[0]["pixel_values"]).size == (8, 8)
    both = DatasetDict({"train": table, "test": table})
    assert load_counting(both, "test", **settings, min_objects=10, max_objects=11)["count"][:] == [10, 11]


def test_a_folder_of_parquet_files(table, tmp_path):
    table.rename_column("clicks", "points").to_parquet(str(tmp_path / "train.parquet"))
    assert len(load_counting(tmp_path, "train")) == 10


def test_wrong_arguments_and_columns(table):
    with pytest.raises(ValueError, match="train, validation, test"):
        load_counting(table, "dev")
    with pytest.raises(ValueError, match="min_objects=3"):
        load_counting(table, "train", min_objects=3, max_objects=2)
    with pytest.raises(ValueError, match="fsc-147:FOLDER"):
        load_counting("fsc-147", "train")
    with pytest.raises(ValueError, match=r"no column 'points', only image, .* by columns={'points': \.\.\.}"):
        load_counting(table, "train")
    with pytest.raises(ValueError, match="columns names"):
        load_counting(table, "train", columns={"boxes": "clicks"})
    with pytest.raises(ValueError, match=r"row 0: extra is 0, not a list of \[x, y\]"):
        load_counting(table, "train", columns={"points": "extra"})
    with pytest.raises(ValueError, match="row 0: extra is 0, not the name of a category"):
        load_counting(table, "train", columns={"points": "clicks", "category": "extra"})
    with pytest.raises(ValueError, match="need two images or more, not 1"):
        load_counting(table.select(range(2)), "train", columns={"points": "clicks"})


def test_reading_order():
    points = [[50, 60], [10, 15], [90, 0], [5, 100], [5, 99.9], [20, 14.2], [10, 13]]
    rows = [[[10, 13], [20, 14.2], [90, 0]], [[10, 15]], [[50, 60]], [[5, 99.9], [5, 100]]]
    assert [points[place] for place in reading_order(points, 100)] == [point for row in rows for point in row]
    assert reading_order([], 100) == []
