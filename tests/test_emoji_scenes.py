"""Generated scenes of emoji: what is drawn is what is told, and no two splits have a category in common."""

import json
import pickle
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from regard.data import emoji_scenes
from regard.data.counting import reading_order
from regard.data.emoji_scenes import CATEGORIES_TABLE, MIN_VISIBLE, EmojiSceneDataset, categories

SPLITS = ("train", "validation", "test")


def code(emoji: str) -> str:
    return "-".join(f"{ord(character):04x}" for character in emoji)


@pytest.fixture(scope="module")
def style(tmp_path_factory) -> str:
    """Discs and ovals of many colours in the layout of the npm package, so that no font is needed."""
    folder = tmp_path_factory.mktemp("package")
    images = folder / "img/twitter/64"
    images.mkdir(parents=True)
    for split in SPLITS:
        for category in categories(split):
            red, green, blue, tall, *_ = zlib.crc32(category.emoji.encode()).to_bytes(4)
            image = Image.new("RGBA", (64, 64))
            ImageDraw.Draw(image).ellipse((2, 2, 62, 62) if tall % 2 else (14, 2, 50, 62), (red, green, blue, 255))
            image.save(images / f"{code(category.emoji)}.png", compress_level=0)
    return f"twitter:{folder}"


@pytest.fixture
def noto() -> str:
    try:
        emoji_scenes._font()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return "noto"


def digest(row: dict[str, Any]) -> tuple:
    return (zlib.crc32(row["pixel_values"].tobytes()), *(str(row[name]) for name in row if name != "pixel_values"))


def test_rows_are_a_function_of_seed_split_and_index(style):
    dataset = EmojiSceneDataset("train", 12, seed=3, style=style)
    rows = [digest(dataset[index]) for index in range(12)]
    assert len(set(rows)) == 12
    again = pickle.loads(pickle.dumps(dataset))
    assert [digest(again[index]) for index in reversed(range(12))] == rows[::-1]
    loader = DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=list)
    assert [digest(row) for batch in loader for row in batch] == rows
    for other in (EmojiSceneDataset("train", 12, seed=4, style=style), EmojiSceneDataset("test", 12, 3, style=style)):
        assert not {row[0] for row in rows} & {digest(other[index])[0] for index in range(12)}


def test_splits_have_no_category_name_or_family_in_common():
    rows = json.loads(CATEGORIES_TABLE.read_text("utf-8"))
    assert Counter(row["split"] for row in rows) == {"train": 167, "validation": 57, "test": 58}
    names = [name for split in SPLITS for category in categories(split) for name in category.names]
    assert len(names) == len(set(names))
    assert len({row["emoji"] for row in rows}) == len(rows)
    families = [{category.family for category in categories(split)} for split in SPLITS]
    assert not families[0] & families[1] | families[0] & families[2] | families[1] & families[2]


def test_names_are_singular_and_plural():
    names = {category.noun: category.names for split in SPLITS for category in categories(split)}
    assert names["cat"] == ("cat face", "cat faces", "cat", "cats")
    assert names["mouse"][-2:] == ("mouse", "mice")
    assert names["knife"] == ("kitchen knife", "kitchen knives", "knife", "knives")
    assert names["sheep"] == ("ewe", "ewes", "sheep")
    assert names["wolf"] == ("wolf", "wolves")
    assert names["die"] == ("die", "dice")
    assert names["apple"] == ("red apple", "red apples", "apple", "apples")
    assert all(name == name.strip() and "_" not in name for forms in names.values() for name in forms)


def test_a_category_is_asked_for_by_all_its_names_in_training_and_by_one_elsewhere(style):
    settings = {"size": 150, "max_objects": 1, "max_distractors": 2, "image_size": 64, "style": style}
    forms = {split: Counter() for split in SPLITS}
    for split in SPLITS:
        position = {name: at - len(own.names) for own in categories(split) for at, name in enumerate(own.names)}
        dataset = EmojiSceneDataset(split, **settings)
        forms[split].update(position[dataset[index]["category"]] for index in range(150))
    assert set(forms["train"]) == {-4, -3, -2, -1}
    assert set(forms["validation"]) == set(forms["test"]) == {-1}


@pytest.mark.parametrize("split", SPLITS)
def test_what_is_told_of_a_row_is_so(split, style):
    dataset = EmojiSceneDataset(split, 60, seed=7, style=style)
    by_name = {name: own for own in categories(split) for name in own.names}
    for index in range(60):
        row = dataset[index]
        names = ["pixel_values", "image_id", "category", "count", "points", "boxes"]
        assert list(row) == [*names, "others", "others_names", "others_points", "absent"]
        assert (row["pixel_values"].mode, row["pixel_values"].size) == ("RGB", (224, 224))
        assert row["image_id"] == str(index)
        assert row["count"] == len(row["points"]) == len(row["boxes"]) <= 50
        assert reading_order(row["points"], 224) == list(range(row["count"]))
        for (x, y), (x0, y0, x1, y1) in zip(row["points"], row["boxes"], strict=True):
            assert 0 <= x0 < x < x1 <= 224
            assert 0 <= y0 < y < y1 <= 224
            assert max(x1 - x0, y1 - y0) < 68
        assert len(row["others"]) <= 3
        assert row["count"] or row["others"]
        assert [by_name[name].noun for name in row["others_names"]] == row["others"]
        assert len(row["others_points"]) == len(row["others"])
        for points in row["others_points"]:
            assert points
            assert reading_order(points, 224) == list(range(len(points)))
            assert np.array(points).shape[1] == 2
            assert not {tuple(point) for point in points} & {tuple(point) for point in row["points"]}
        named = [row["category"], *row["others_names"], row["absent"]]
        present = [by_name[name].family for name in named]
        assert len(set(present)) == len(present)
        assert split == "train" or all(name == by_name[name].names[-1] for name in named)


def test_other_categories_are_where_their_points_are(style):
    """The middle of a disc has its category's colour, in differing light."""
    dataset = EmojiSceneDataset("test", 40, seed=6, max_objects=4, max_distractors=10, style=style)
    by_name = {own.names[-1]: own for own in categories("test")}
    for index in range(40):
        row = dataset[index]
        pixels = np.asarray(row["pixel_values"], np.float32)
        groups = zip([row["category"], *row["others_names"]], [row["points"], *row["others_points"]], strict=True)
        for name, points in groups:
            color = emoji_scenes._mean_color(style, by_name[name].emoji)
            middles = [pixels[int(y), int(x)] for x, y in points]
            assert all(np.abs(middle - color).max() < 45 for middle in middles)


def test_rows_of_a_seed_stay_what_they_are(style):
    """They were so before a row told of other and of absent categories; what is trained on should not change unseen."""
    dataset = EmojiSceneDataset("train", 6, seed=11, style=style)
    rows = [dataset[index] for index in range(6)]
    assert [(row["category"], row["count"], row["others"]) for row in rows] == [
        ("sandwich", 40, ["tiger", "peach", "letter"]),
        ("cat face", 11, []),
        ("kites", 7, []),
        ("hammer", 35, []),
        ("cow faces", 1, ["apple", "television", "peach"]),
        ("burgers", 17, ["rhino", "egg"]),
    ]
    means = [np.asarray(row["pixel_values"]).mean() for row in rows]
    assert means == pytest.approx([201.87, 212.22, 189.46, 218.94, 140.97, 184.30], abs=0.5)


def test_new_scenes_of_trained_categories(style):
    settings = {"size": 30, "seed": 0, "style": style}
    dataset = EmojiSceneDataset("test", categories="train", **settings)
    trained = {own.names[-1] for own in categories("train")}
    rows = [dataset[index] for index in range(30)]
    assert all({row["category"], *row["others_names"], row["absent"]} <= trained for row in rows)
    seen = EmojiSceneDataset("train", **settings)
    assert not {digest(row)[0] for row in rows} & {digest(seen[index])[0] for index in range(30)}
    assert digest(EmojiSceneDataset("test", categories="test", **settings)[4]) == digest(
        EmojiSceneDataset("test", **settings)[4]
    )


def test_grounds_are_of_the_kinds_asked_for(style):
    def spread(grounds: tuple[str, ...]) -> np.ndarray:
        """Of neighbouring pixels in a corner without objects, by row."""
        dataset = EmojiSceneDataset(
            "test", 12, image_size=128, max_objects=1, max_distractors=0, style=style, grounds=grounds
        )
        images = [np.asarray(dataset[index]["pixel_values"], np.float32) for index in range(12)]
        return np.array([np.median(np.abs(np.diff(image, axis=0))) for image in images])

    assert (spread(("plain",)) == 0).all()
    assert (spread(("noise",)) > 1).all()
    assert 0 < (spread(("plain", "noise")) == 0).mean() < 1


class Recorded(emoji_scenes._Scene):
    """A scene that keeps each object's mask, in the order they are laid."""

    def __init__(self, ground: np.ndarray):
        super().__init__(ground)
        self.masks: list[np.ndarray] = []
        scenes.append(self)

    def lay(self, patch: np.ndarray, size: float, candidates: np.ndarray) -> bool:
        laid = super().lay(patch, size, candidates)
        if laid:
            left, top, right, bottom = self.windows[-1]
            self.masks.append(np.zeros(self.owner.shape, bool))
            self.masks[-1][top:bottom, left:right] = patch[3] >= 64
        return laid


scenes: list[Recorded] = []


def test_every_object_stays_visible_and_boxes_hold_just_what_is_visible(style, monkeypatch):
    monkeypatch.setattr(emoji_scenes, "_Scene", Recorded)
    dataset = EmojiSceneDataset("train", 8, seed=2, min_objects=40, style=style)
    overlaps = 0
    for index in range(8):
        scenes.clear()
        row = dataset[index]
        masks = np.array(scenes[0].masks)
        assert len(masks) >= row["count"]
        uppermost = len(masks) - 1 - masks[::-1].argmax(0)
        boxes = set()
        for place, mask in enumerate(masks):
            seen = mask & (uppermost == place)
            assert seen.sum() >= MIN_VISIBLE * mask.sum()
            overlaps += seen.sum() < mask.sum()
            rows, columns = np.nonzero(seen)
            boxes.add((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        assert {tuple(box) for box in row["boxes"]} <= boxes
    assert overlaps > 20


def test_objects_are_where_the_points_are(style):
    """Each disc differs from the ground, and the ground is the rest."""
    dataset = EmojiSceneDataset("train", 30, seed=5, min_objects=2, max_objects=12, max_distractors=0, style=style)
    for index in range(30):
        row = dataset[index]
        pixels = np.asarray(row["pixel_values"], np.float32)
        outside = np.ones((224, 224), bool)
        for x0, y0, x1, y1 in row["boxes"]:
            outside[int(y0) : int(y1), int(x0) : int(x1)] = False
        centres = np.array(
            [pixels[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2].mean((0, 1)) for x, y in row["points"]]
        )
        spread = np.linalg.norm(centres - centres.mean(0), axis=1).max()
        ground = pixels[outside].mean(0)
        assert np.linalg.norm(centres.mean(0) - ground) > 25
        assert spread < 90  # one colour, in differing light


def test_counts_are_drawn_from_the_ranges(style):
    def counts(**settings: Any) -> Counter:
        dataset = EmojiSceneDataset("test", 200, image_size=64, max_distractors=1, style=style, **settings)
        return Counter(dataset[index]["count"] for index in range(200))

    assert set(counts(max_objects=2)) == {0, 1, 2}
    assert set(counts(count_ranges=((0, 0), (3, 4)))) == {0, 3, 4}
    found = counts(min_objects=3, max_objects=6, count_ranges=((0, 4), (5, 6), (6, 300)))
    assert set(found) == {3, 4, 5, 6}
    assert found[6] < 90  # most of the last range is left out


def test_absent_categories(style):
    dataset = EmojiSceneDataset("validation", 20, max_objects=0, style=style)
    rows = [dataset[index] for index in range(20)]
    assert all(row["count"] == 0 and row["points"] == row["boxes"] == [] and row["others"] for row in rows)
    assert all(np.asarray(row["pixel_values"]).std((0, 1)).max() > 1 for row in rows)
    alone = EmojiSceneDataset("validation", 20, max_objects=0, max_distractors=0, style=style)
    assert alone[3]["others"] == []


@pytest.mark.parametrize("image_size", [64, 320])
def test_sizes_grow_with_the_image(image_size, style):
    dataset = EmojiSceneDataset("train", 5, image_size=image_size, min_objects=20, max_objects=30, style=style)
    for index in range(5):
        row = dataset[index]
        assert row["pixel_values"].size == (image_size, image_size)
        sizes = [max(x1 - x0, y1 - y0) / image_size * 224 for x0, y0, x1, y1 in row["boxes"]]
        assert 8 < np.median(sizes) < 48


def test_the_font_draws_every_category(noto):
    drawn = [emoji_scenes._emoji(noto, category.emoji).tobytes() for split in SPLITS for category in categories(split)]
    assert len(set(drawn)) == 282
    row = EmojiSceneDataset("test", 3, min_objects=30)[2]
    assert row["count"] >= 30


def test_wrong_arguments():
    with pytest.raises(ValueError, match="train, validation, test"):
        EmojiSceneDataset("val")
    with pytest.raises(ValueError, match="image_size=32"):
        EmojiSceneDataset(image_size=32)
    with pytest.raises(ValueError, match="min_objects=5, max_objects=3"):
        EmojiSceneDataset(min_objects=5, max_objects=3)
    with pytest.raises(ValueError, match="no count from 60 to 70"):
        EmojiSceneDataset(min_objects=60, max_objects=70)
    with pytest.raises(ValueError, match="categories='val' must be"):
        EmojiSceneDataset("test", categories="val")
    for grounds in ((), ("plain", "grass")):
        with pytest.raises(ValueError, match="some of plain, gradient"):
            EmojiSceneDataset(grounds=grounds)
    with pytest.raises(ValueError, match="noto or twitter:FOLDER"):
        EmojiSceneDataset(style="apple")


def test_a_row_that_is_not_there(style):
    with pytest.raises(IndexError, match="row 7"):
        EmojiSceneDataset(size=7, style=style)[7]


def test_missing_fonts_and_images_say_how_to_get_them(style, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="npm pack emoji-datasource-twitter"):
        EmojiSceneDataset(style=f"twitter:{tmp_path}")
    (tmp_path / "img/twitter/64").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no such file; fetch .*npm pack"):
        EmojiSceneDataset(style=f"twitter:{tmp_path}")[0]

    monkeypatch.setattr(emoji_scenes, "FONTS_DIRS", (str(tmp_path),))
    monkeypatch.delenv("REGARD_FONTS_DIR", raising=False)
    emoji_scenes._font.cache_clear()
    with pytest.raises(FileNotFoundError, match="apt-get install --no-install-recommends fonts-noto-color-emoji"):
        EmojiSceneDataset()
    EmojiSceneDataset(style=style)[0]  # which needs no font


def test_the_font_is_among_the_packages_of_make_fonts(root: Path):
    assert "fonts-noto-color-emoji" in (root / "data/apt-packages.txt").read_text().split()
