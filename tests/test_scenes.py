"""Generated scenes: what is drawn, what is asked, and that both are written and read as CLEVR."""

import json
import pickle
import re
import zlib
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from regard.data.labelled_images import open_stored
from regard.data.scenes import ANSWERS, ATTRIBUTES, QUESTION_TYPES, SceneDataset, write_clevr
from regard.data.visual_questions import FEATURES, load_visual_questions

ATTRIBUTE_OF = {value: name for name, values in ATTRIBUTES.items() for value in values}
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


def digest(row: dict[str, Any]) -> tuple:
    return (zlib.crc32(row["pixel_values"].tobytes()), *(str(row[name]) for name in FEATURES if name != "pixel_values"))


@pytest.fixture(scope="module")
def asked() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows with their scene graphs."""
    dataset = SceneDataset("train", 2000, seed=5)
    return [(dataset[index], dataset.scene(index)) for index in range(len(dataset))]


def test_rows_are_a_function_of_seed_split_and_index():
    dataset = SceneDataset("train", 60, seed=3)
    rows = [digest(dataset[index]) for index in range(60)]
    again = pickle.loads(pickle.dumps(dataset))
    assert [digest(again[index]) for index in reversed(range(60))] == rows[::-1]
    loader = DataLoader(SceneDataset("train", 60, seed=3), batch_size=10, num_workers=2, collate_fn=list)
    assert [digest(row) for batch in loader for row in batch] == rows
    assert [len({row[0] for row in rows[start : start + 10]}) for start in range(0, 60, 10)] == [1] * 6
    assert [row[1] for row in rows] == [str(index // 10) for index in range(60)]

    images = {row[0] for row in rows}
    for other in (SceneDataset("train", 60, seed=4), SceneDataset("validation", 60, 3), SceneDataset("test", 60, 3)):
        assert not images & {digest(other[index])[0] for index in range(0, 60, 10)}


def test_settings():
    dataset = SceneDataset(size=7, questions_per_image=3, image_size=96)
    assert len(dataset) == 7
    assert dataset[6]["pixel_values"].size == (96, 96)
    assert [dataset[index]["image_id"] for index in range(7)] == ["0", "0", "0", "1", "1", "1", "2"]
    many = SceneDataset(size=400, questions_per_image=400)  # more than a scene has
    assert len({many[index]["question"] for index in range(400)}) > 100
    with pytest.raises(IndexError, match="row 7"):
        dataset[7]
    with pytest.raises(ValueError, match="train, validation, test"):
        SceneDataset("val")
    with pytest.raises(ValueError, match="questions_per_image=0"):
        SceneDataset(questions_per_image=0)


def test_a_row_can_be_changed():
    dataset = SceneDataset(size=10)
    before = digest(dataset[0])
    row = dataset[0]
    row["pixel_values"].paste(0, (0, 0, 128, 128))
    for box in row["boxes"]:
        box.clear()
    assert digest(dataset[0]) == before


def test_boxes_hold_their_objects(asked):
    for row, scene in asked[::10]:
        pixels = np.asarray(row["pixel_values"], np.float32)
        assert pixels.shape == (128, 128, 3)
        corners = np.array([pixels[:3, :3], pixels[:3, -3:], pixels[-3:, :3], pixels[-3:, -3:]])
        ground = corners.mean((0, 1, 2))
        assert 3 <= len(scene["objects"]) <= 8
        outside = np.ones((128, 128), bool)
        for entry in scene["objects"]:
            x0, y0, x1, y1 = entry["bbox"]
            assert 0 <= x0 < x1 <= 128
            assert 0 <= y0 < y1 <= 128
            low, high = {"small": (14, 24), "large": (25, 42)}[entry["size"]]
            assert low < max(x1 - x0, y1 - y0) < high
            x, y, _ = entry["pixel_coords"]
            assert x0 < x < x1
            assert y0 < y < y1
            inside = np.s_[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))]
            outside[inside] = False
            differs = np.abs(pixels[inside] - ground).max(-1) > 40
            assert differs.mean() > 0.15
            assert differs[:3].any()  # the box is tight
            assert differs[-3:].any()
            assert differs[:, :3].any()
            assert differs[:, -3:].any()
        assert (np.abs(pixels[outside] - ground).max(-1) > 90).mean() < 0.001


def fitting(words: str, objects: list[dict[str, Any]]) -> list[int]:
    """The objects that a phrase such as "small red stars" describes."""
    singular = [word.removesuffix("s") for word in words.split() if word not in ("the", "a", "any", "that", "is")]
    values = [word for word in singular if word not in ("thing", "object")]
    assert all(value in ATTRIBUTE_OF for value in values), words
    return [
        index for index, entry in enumerate(objects) if all(entry[ATTRIBUTE_OF[value]] == value for value in values)
    ]


def place(words: str, objects: list[dict[str, Any]]) -> list[int]:
    """Likewise for a phrase such as "red things to the left of the small star"."""
    words = words.replace("to the left", "left").replace("to the right", "right")
    found = re.fullmatch(r"(.*?)(?: are)? (left of|right of|above|below) (.*)", words)
    if not found:
        return fitting(words, objects)
    (reference,) = fitting(found[3], objects)
    axis, sign = SIDES[found[2]]
    distance = {
        index: sign * (objects[index]["pixel_coords"][axis] - objects[reference]["pixel_coords"][axis])
        for index in fitting(found[1], objects)
        if index != reference
    }
    assert all(abs(pixels) >= 10 for pixels in distance.values())  # none in doubt
    return [index for index, pixels in distance.items() if pixels > 0]


WORD = "(color|colour|shape|size|material|pattern)"
FORMS = {
    "query": (rf"what {WORD} is the (.*)\?", rf"what is the {WORD} of the (.*)\?", rf"the (.*) is what {WORD}\?"),
    "exist": (
        r"is there a (.*)\?",
        r"are there any (.*)\?",
        r"does the image contain a (.*)\?",
        r"is a (.*) present\?",
    ),
    "count": (
        r"how many (.*) are there\?",
        r"what is the number of (.*)\?",
        r"how many (.*) are in the image\?",
        r"how many (.*)\?",
    ),
    "more": (r"are there more (.*) than (.*)\?", r"is the number of (.*) greater than the number of (.*)\?"),
    "fewer": (r"are there fewer (.*) than (.*)\?", r"is the number of (.*) less than the number of (.*)\?"),
    "equal": (r"are there equally many (.*) and (.*)\?", r"is the number of (.*) the same as the number of (.*)\?"),
    "same": (
        rf"do the (.*) and the (.*) have the same {WORD}\?",
        rf"is the (.*) the same {WORD} as the (.*)\?",
        rf"does the (.*) have the same {WORD} as the (.*)\?",
    ),
}


def answer(question: str, kind: str, objects: list[dict[str, Any]]) -> tuple[str, list[int]]:
    """The answer, and the objects it is read off, from the words alone."""
    forms = {"exist": ["exist"], "count": ["count"], "compare_number": ["more", "fewer", "equal"]}
    forms = forms.get(kind, ["same"] if kind == "equal_attribute" else ["query"])
    form, found = next(
        (form, found.groups())
        for form in forms
        for pattern in FORMS[form]
        if (found := re.fullmatch(pattern, question))
    )
    words = [words for words in found if not re.fullmatch(WORD, words)]
    sets = [place(words, objects) for words in words]
    meant = sorted({index for part in sets for index in part})
    if form in ("query", "same"):
        (attribute,) = (word for word in found if re.fullmatch(WORD, word))
        attribute = {"colour": "color", "pattern": "material"}.get(attribute, attribute)
        values = [objects[index][attribute] for (index,) in sets]
        return values[0] if form == "query" else "yes" if values[0] == values[1] else "no", meant
    counts = [len(part) for part in sets]
    if form == "count":
        return str(counts[0]), meant
    if form == "exist":
        return "yes" if counts[0] else "no", meant
    difference = counts[0] - counts[1]
    return "yes" if {"more": difference > 0, "fewer": difference < 0, "equal": difference == 0}[form] else "no", meant


def test_answers_and_boxes_follow_from_the_words(asked):
    for row, scene in asked:
        objects, kind = scene["objects"], row["question_type"]
        expected, meant = answer(row["question"], kind, objects)
        assert (row["answers"], row["boxes"]) == ([expected], [objects[index]["bbox"] for index in meant])
        if kind.startswith("query_"):
            assert ATTRIBUTE_OF[expected] == kind.removeprefix("query_")
        if kind == "relate" or kind.startswith("query_"):
            assert len(row["boxes"]) == 1
        if kind == "exist" or kind.startswith("query_"):
            assert row["first_boxes"] == row["boxes"]
        if kind in ("compare_number", "equal_attribute"):
            assert all(box in row["boxes"] for box in row["first_boxes"])
        if kind in ("relate", "equal_attribute"):
            assert len(row["first_boxes"]) == 1
        if kind == "relate":  # the place matters
            assert row["first_boxes"] != row["boxes"]
            words = re.split(" (?:left|right|above|below|to the|that is) ?", row["question"])[0]
            words = re.sub(rf"what |is |the |{WORD} (of )?", "", words)
            assert len(fitting(words, objects)) > 1


def test_no_two_questions_of_an_image_are_the_same(asked):
    texts = defaultdict(set)
    for row, _ in asked:
        texts[row["image_id"]].add(row["question"])
    assert {len(questions) for questions in texts.values()} == {10}


def test_answers_are_balanced(asked):
    counts = defaultdict(Counter)
    for row, _ in asked:
        counts[row["question_type"]].update(row["answers"])
    assert set(counts) == set(QUESTION_TYPES)
    assert {answer for counter in counts.values() for answer in counter} == set(ANSWERS)
    largest = {"relate": 0.25, "count": 0.3, "query_color": 0.25, "query_shape": 0.35, "query_material": 0.5}
    for kind, counter in counts.items():
        assert counter.total() > 100
        assert max(counter.values()) < largest.get(kind, 0.62) * counter.total()


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_clevr_round_trip(tmp_path, split):
    write_clevr(tmp_path, split, images=4, seed=2, questions_per_image=6)
    read = load_visual_questions(f"clevr:{tmp_path}", split)
    dataset = SceneDataset(split, 24, seed=2, questions_per_image=6)
    assert read.features == FEATURES
    assert len(read) == 24
    row: Any
    for index, row in enumerate(read):
        row["pixel_values"] = open_stored(row["pixel_values"])
        assert digest(row) == digest(dataset[index])


def test_boxes_are_found_by_the_program_too(tmp_path):
    write_clevr(tmp_path, "train", images=10)
    read = load_visual_questions(f"clevr:{tmp_path}", "train")
    path = tmp_path / "questions/CLEVR_train_questions.json"
    content = json.loads(path.read_text())
    for question in content["questions"]:
        del question["referred_objects"], question["question_type"]
    path.write_text(json.dumps(content))
    again = load_visual_questions(f"clevr:{tmp_path}", "train")
    assert again["boxes"][:] == read["boxes"][:]
    types = {
        "count",
        "exist",
        "compare_integer",
        *(f"{kind}_{name}" for kind in ("query", "equal") for name in ATTRIBUTES),
    }
    assert set(again["question_type"]) <= types
