"""easy-VQA as it is installed, and the other sources in small folders of their true layout."""

import itertools
import json
import logging
import types
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage

from regard.data.labelled_images import open_stored
from regard.data.visual_questions import FEATURES, answer_vocabulary, first_look, load_visual_questions, run_program


def write_image(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.new("RGB", (8, 6), (shade, 0, 0)).save(path)
    return path


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def is_grouped(names: list[str]) -> bool:
    changes = sum(one != other for one, other in itertools.pairwise(names))
    return changes == len(set(names)) - 1


def test_easy_vqa_is_read_whole():
    train, validation, test = (load_visual_questions("easy-vqa", split) for split in ("train", "validation", "test"))
    assert len(train) + len(validation) == 38575
    assert len(test) == 9673
    held_out = set(validation["image_id"][:])
    assert len(held_out) == 500
    assert not held_out & set(train["image_id"][:])
    for dataset in (train, validation, test):
        assert dataset.features == FEATURES
        assert is_grouped(dataset["image_id"][:])
        assert set(dataset["question_type"][:]) == {"shape", "color", "yes/no"}
    row = dict(test[0])
    assert open_stored(row.pop("pixel_values")).size == (64, 64)
    expected = {"question": "what is the red shape?", "answers": ["triangle"], "question_type": "shape"}
    expected["boxes"] = [[2.0, 43.0, 14.0, 54.0]]  # the shape, found by its pixels
    assert row == {"image_id": "0", **expected}
    assert answer_vocabulary(train)[:2] == ["yes", "no"]
    assert len(answer_vocabulary(train)) == 13

    other = load_visual_questions("easy-vqa", "validation", validation_size=7, seed=1)
    assert len(set(other["image_id"][:])) == 7
    assert not set(other["image_id"][:]) <= held_out


def test_a_missing_or_damaged_easy_vqa_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install easy-vqa"):
        load_visual_questions("easy-vqa", "train")
    spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match=r"questions\.json: no such file; .*pip install"):
        load_visual_questions("easy-vqa", "test")
    write_json(tmp_path / "data/test/questions.json", [["what is it?", "circle"]])
    with pytest.raises(ValueError, match=r"questions\.json: damaged .*pip install"):
        load_visual_questions("easy-vqa", "test")
    write_json(tmp_path / "data/test/questions.json", [["what is it?", "circle", 3]])
    with pytest.raises(FileNotFoundError, match=r"none of the images of 1 questions .*3\.png"):
        load_visual_questions("easy-vqa", "test")


@pytest.fixture
def vqa(tmp_path: Path) -> Path:
    """Three questions about two images, those of one not side by side."""
    for part in ("train2014", "val2014", "test2015"):
        head = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": part, "license": {}}
        asked = ((9, "Is it red?", 90), (524291, "How many?", 5242910), (9, "What is it?", 91))
        questions = [{"image_id": image, "question": text, "question_id": number} for image, text, number in asked]
        write_json(tmp_path / f"v2_OpenEnded_mscoco_{part}_questions.json", {**head, "questions": questions})
        for image in (9, 524291):
            write_image(tmp_path / part / f"COCO_{part}_{image:012}.jpg")
        if part == "test2015":
            continue
        given = ((91, "other", "hat"), (90, "yes/no", "yes"), (5242910, "number", "2"))
        annotations = [
            {
                "question_type": "what",
                "multiple_choice_answer": answer,
                "answers": [
                    {"answer": answer if number < 8 else "other", "answer_confidence": "yes", "answer_id": number}
                    for number in range(1, 11)
                ],
                "image_id": 9,
                "answer_type": kind,
                "question_id": question,
            }
            for question, kind, answer in given
        ]
        write_json(tmp_path / f"v2_mscoco_{part}_annotations.json", {**head, "annotations": annotations})
    return tmp_path


def test_vqa_v2_is_read(vqa):
    for split, part in (("train", "train2014"), ("validation", "val2014")):
        dataset = load_visual_questions(f"vqa-v2:{vqa}", split)
        assert dataset["image_id"][:] == ["9", "9", "524291"]
        assert dataset["question"][:] == ["Is it red?", "What is it?", "How many?"]
        assert dataset["question_type"][:] == ["yes/no", "other", "number"]
        assert dataset["answers"][1] == ["hat"] * 7 + ["other"] * 3
        path = str(vqa / part / f"COCO_{part}_000000524291.jpg")
        assert dataset[2]["pixel_values"] == {"bytes": None, "path": path}
    test = load_visual_questions(f"vqa-v2:{vqa}", "test")
    assert (test["answers"][:], test["question_type"][:]) == ([[]] * 3, [""] * 3)
    assert answer_vocabulary(dataset) == ["other", "2", "hat", "yes"]
    assert answer_vocabulary(dataset, size=2) == ["other", "2"]
    assert answer_vocabulary(dataset, min_count=8) == ["other"]


def test_questions_without_their_image_are_left_out(vqa, caplog):
    (vqa / "val2014/COCO_val2014_000000000009.jpg").unlink()
    with caplog.at_level(logging.WARNING):
        dataset = load_visual_questions(f"vqa-v2:{vqa}", "validation")
    assert dataset["question"][:] == ["How many?"]
    assert [record.getMessage() for record in caplog.records] == [
        f"left out: {vqa / 'val2014/COCO_val2014_000000000009.jpg'}: no such file"
    ]
    (vqa / "val2014/COCO_val2014_000000524291.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"none of the images of 3 questions .*visualqa\.org/download\.html"):
        load_visual_questions(f"vqa-v2:{vqa}", "validation")


def test_missing_or_damaged_vqa_v2_says_what_to_fetch(vqa, tmp_path):
    with pytest.raises(ValueError, match="vqa-v2:FOLDER"):
        load_visual_questions("vqa-v2", "train")
    with pytest.raises(ValueError, match="train, validation, test"):
        load_visual_questions(f"vqa-v2:{vqa}", "val")
    with pytest.raises(FileNotFoundError, match=r"annotations\.json: no such file; .*visualqa\.org/download\.html"):
        load_visual_questions(f"vqa-v2:{tmp_path / 'none'}", "train")
    questions, annotations = (
        vqa / f"v2_{name}.json" for name in ("OpenEnded_mscoco_train2014_questions", "mscoco_train2014_annotations")
    )
    whole = questions.read_text(), annotations.read_text()
    for path, content in (
        (questions, whole[0][:-20]),
        (questions, "[]"),
        (questions, whole[1]),
        (questions, whole[0].replace("91}", "92}")),
        (annotations, whole[1].replace("answer_type", "type")),
        (annotations, "\xff"),
    ):
        questions.write_text(whole[0])
        annotations.write_text(whole[1])
        path.write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match=rf"{path.name}: damaged .*; fetch it from https://visualqa\.org"):
            load_visual_questions(f"vqa-v2:{vqa}", "train")
    questions.write_text('{"questions": []}')
    annotations.write_text(whole[1])
    with pytest.raises(ValueError, match="no questions"):
        load_visual_questions(f"vqa-v2:{vqa}", "train")


def node(function: str, *inputs: int, value: str = "") -> dict[str, Any]:
    return {"function": function, "inputs": list(inputs), "value_inputs": [value] if value else []}


def thing(color: str, shape: str, x: int) -> dict[str, Any]:
    place = {"3d_coords": [0.1, 0.2, 0.3], "pixel_coords": [x, 40, 9.5], "rotation": 12.0}
    return {"color": color, "shape": shape, "size": "small", "material": "metal", **place}


SCENE = {
    "objects": [thing("red", "cube", 10), thing("red", "sphere", 20), thing("blue", "cube", 30)],
    "relationships": {"left": [[], [0], [0, 1]], "right": [[1, 2], [2], []], "front": [[]] * 3, "behind": [[]] * 3},
}
RED, BLUE = (
    [node("scene"), node("filter_color", 0, value="red")],
    [node("scene"), node("filter_color", 0, value="blue")],
)
BESIDE = [*BLUE, node("unique", 1), node("relate", 2, value="left"), node("filter_shape", 3, value="cube")]
SAME = [*BLUE, node("unique", 1), node("same_shape", 2), node("unique", 3), node("query_color", 4)]
TWO = [*RED, node("count", 1), node("scene"), node("filter_color", 3, value="blue"), node("count", 4)]


@pytest.mark.parametrize(
    ("program", "answer", "referred"),
    [
        ([*RED, node("count", 1)], "2", [0, 1]),
        ([*RED, node("exist", 1)], "yes", [0, 1]),
        ([*RED, node("filter_shape", 1, value="cone"), node("exist", 2)], "no", []),
        ([*BLUE, node("unique", 1), node("query_shape", 2)], "cube", [2]),
        ([*BESIDE, node("unique", 4), node("query_color", 5)], "red", [0]),
        (SAME, "red", [0]),
        ([*TWO, node("greater_than", 2, 5)], "yes", [0, 1, 2]),
        ([*TWO, node("less_than", 2, 5)], "no", [0, 1, 2]),
        ([*TWO, node("equal_integer", 2, 5)], "no", [0, 1, 2]),
        ([*SAME, *BLUE[:1], node("query_color", 2), node("equal_color", 5, 7)], "no", [0, 2]),
        (
            [*BESIDE, *RED[:1], node("filter_shape", 5, value="sphere"), node("union", 4, 6), node("count", 7)],
            "2",
            [0, 1],
        ),
        (
            [*BESIDE, *RED[:1], node("filter_color", 5, value="red"), node("intersect", 4, 6), node("count", 7)],
            "1",
            [0],
        ),
    ],
)
def test_programs_of_clevr(program, answer, referred):
    assert run_program(program, SCENE) == (answer, referred)
    named_type = [
        {"type": entry["function"], "inputs": entry["inputs"], "value_inputs": entry["value_inputs"]}
        for entry in program
    ]
    assert run_program(named_type, SCENE) == (answer, referred)


@pytest.mark.parametrize(
    ("program", "looked"),
    [
        ([*RED, node("count", 1)], [0, 1]),
        ([*BLUE, node("unique", 1), node("query_shape", 2)], [2]),
        ([*BESIDE, node("unique", 4), node("query_color", 5)], [2]),  # what the others are left of
        ([*BESIDE, node("count", 4)], [2]),
        (SAME, [2]),
        ([*TWO, node("greater_than", 2, 5)], [0, 1]),  # one side
        ([*SAME, *BLUE[:1], node("query_color", 2), node("equal_color", 5, 7)], [0]),
        (
            [*BESIDE, *RED[:1], node("filter_shape", 5, value="sphere"), node("union", 4, 6), node("count", 7)],
            [0, 1],
        ),
    ],
)
def test_what_to_look_at_first(program, looked):
    assert first_look(program, SCENE) == looked


def test_a_wrong_program_is_an_error():
    with pytest.raises(ValueError, match="2 objects fit a description that should fit one"):
        run_program([*RED, node("unique", 1)], SCENE)
    for program in (
        [],
        [node("juggle", 0)],
        [node("scene"), node("juggle", 0)],
        [node("scene"), node("filter_color", 0)],
    ):
        with pytest.raises(ValueError, match="no program of CLEVR's"):
            run_program(program, SCENE)


@pytest.fixture
def clevr(tmp_path: Path) -> Path:
    for part in ("train", "val", "test"):
        name = f"CLEVR_{part}_000000.png"
        write_image(tmp_path / "images" / part / name)
        entry = {"split": part, "image_index": 0, "image_filename": name}
        questions = [
            {**entry, "question": text, "question_index": index, "question_family_index": 3}
            | ({} if part == "test" else {"answer": answer, "program": program})
            for index, (text, answer, program) in enumerate(
                [
                    ("How many red things?", "2", [*RED, node("count", 1)]),
                    ("More red than blue?", "yes", [*TWO, node("greater_than", 2, 5)]),
                    ("What color is the other cube?", "red", SAME),
                ]
            )
        ]
        write_json(tmp_path / f"questions/CLEVR_{part}_questions.json", {"info": {}, "questions": questions})
        if part != "test":
            scenes = [{**entry, **SCENE, "directions": {}}]
            write_json(tmp_path / f"scenes/CLEVR_{part}_scenes.json", {"info": {}, "scenes": scenes})
    return tmp_path


def test_clevr_is_read(clevr):
    for split in ("train", "validation"):
        dataset = load_visual_questions(f"clevr:{clevr}", split)
        assert dataset["answers"][:] == [["2"], ["yes"], ["red"]]
        assert dataset["question_type"][:] == ["count", "compare_integer", "query_color"]
        assert (dataset["image_id"][:], dataset["boxes"][:]) == (["0"] * 3, [[]] * 3)
    test = load_visual_questions(f"clevr:{clevr}", "test")
    assert (test["answers"][:], test["question_type"][:]) == ([[]] * 3, [""] * 3)
    assert open_stored(test[0]["pixel_values"]).size == (8, 6)


def test_clevr_with_boxes(clevr):
    path = clevr / "scenes/CLEVR_val_scenes.json"
    content = json.loads(path.read_text())
    boxes = [[x, 1.5, x + 2, 3.5] for x in (0, 2, 4)]
    for entry, box in zip(content["scenes"][0]["objects"], boxes, strict=True):
        entry["bbox"] = box
    write_json(path, content)
    read = load_visual_questions(f"clevr:{clevr}", "validation")
    assert read["boxes"][:] == [boxes[:2], boxes, boxes[:1]]
    path = clevr / "questions/CLEVR_val_questions.json"
    questions = json.loads(path.read_text())
    questions["questions"][0]["referred_objects"] = [2]
    write_json(path, questions)
    assert load_visual_questions(f"clevr:{clevr}", "validation")["boxes"][0] == boxes[2:]
    questions["questions"][0]["referred_objects"] = [3]
    write_json(path, questions)
    with pytest.raises(ValueError, match="damaged"):
        load_visual_questions(f"clevr:{clevr}", "validation")


def test_missing_or_damaged_clevr_says_what_to_fetch(clevr, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"questions\.json: no such file; .*cs\.stanford\.edu"):
        load_visual_questions(f"clevr:{tmp_path / 'none'}", "train")
    (clevr / "scenes/CLEVR_train_scenes.json").write_text("<html>")
    with pytest.raises(ValueError, match=r"scenes\.json: damaged .*cs\.stanford\.edu"):
        load_visual_questions(f"clevr:{clevr}", "train")


def table(folder: Path, **columns: Any) -> Dataset:
    """Six questions about three images."""
    paths = [str(write_image(folder / f"{index % 3}.png", shade=index % 3)) for index in range(6)]
    rows = Dataset.from_dict({"image": paths, "question": [f"number {index}?" for index in range(6)], **columns})
    return rows.cast_column("image", Image())


def test_columns_of_datasets_objects(tmp_path):
    once = table(tmp_path, answer=list("abcdef"))
    dataset = load_visual_questions(DatasetDict(train=once, val=once), "validation")
    assert dataset.features == FEATURES
    assert dataset["question"][:] == [f"number {index}?" for index in (0, 3, 1, 4, 2, 5)]
    assert dataset["answers"][:] == [[letter] for letter in "adbecf"]
    assert is_grouped(dataset["image_id"][:])
    assert dataset["boxes"][:] == [[]] * 6

    train, validation = (load_visual_questions(once, split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (4, 2)
    assert not set(train["image_id"][:]) & set(validation["image_id"][:])
    with pytest.raises(ValueError, match="no split 'test', only train"):
        load_visual_questions(once, "test")

    def answers(**columns: Any) -> list[list[str]]:
        return load_visual_questions(DatasetDict(test=table(tmp_path, **columns)), "test")["answers"][:]

    expected = [["x", "y"]] * 6
    assert answers(answers=expected) == expected
    assert answers(answers=[[{"answer": "x"}, {"answer": "y"}]] * 6) == expected
    assert answers(multiple_choice_answer=["x"] * 6) == [["x"]] * 6
    assert answers(answer=[None] * 6) == answers() == [[]] * 6
    with pytest.raises(ValueError, match=r"answers are strings, .* not 3"):
        answers(label=[3] * 6)
    classes = table(tmp_path, label=[0, 1, -1] * 2).cast_column("label", ClassLabel(names=["x", "y"]))
    read = load_visual_questions(DatasetDict(test=classes), "test")
    assert read["answers"][:] == [["x"]] * 2 + [["y"]] * 2 + [[]] * 2

    own = table(tmp_path, said=["x"] * 6, image_id=[7] * 6, answer_type=["other"] * 6, boxes=[[[0, 1, 2, 3]]] * 6)
    read = load_visual_questions(
        DatasetDict(test=own), "test", columns={"answers": "said", "question_type": "question"}
    )
    row = dict(read[1])
    assert row.pop("pixel_values")["path"].endswith("1.png")
    assert row == {
        "image_id": "7",
        "question": "number 1?",
        "answers": ["x"],
        "question_type": "number 1?",
        "boxes": [[0, 1, 2, 3]],
    }
    again = load_visual_questions(DatasetDict(test=read), "test")
    assert again[:] == read[:]


def test_wrong_columns_are_named(tmp_path):
    rows = table(tmp_path)
    with pytest.raises(ValueError, match=r"no column 'question', only image, sentence; .*columns=\{'question': ...\}"):
        load_visual_questions(rows.rename_column("question", "sentence"), "train")
    with pytest.raises(ValueError, match="no column 'said'"):
        load_visual_questions(rows, "train", columns={"answers": "said"})
    with pytest.raises(ValueError, match=r"columns names \['answer'\]"):
        load_visual_questions(rows, "train", columns={"answer": "said"})
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        load_visual_questions(tmp_path / "none", "train")


def test_rows_without_an_image_are_left_out(tmp_path, caplog):
    rows = table(tmp_path, answer=list("abcdef"))
    (tmp_path / "1.png").unlink()
    with caplog.at_level(logging.WARNING):
        dataset = load_visual_questions(DatasetDict(test=rows), "test")
    assert dataset["answers"][:] == [["a"], ["d"], ["c"], ["f"]]
    assert [record.getMessage() for record in caplog.records] == [f"left out: {tmp_path / '1.png'}: no such file"]
    features = Features(image=Image(), question=Value("string"), answers=List(Value("string")))
    empty = Dataset.from_dict({"image": [None], "question": ["?"], "answers": [["x"]]}, features=features)
    with pytest.raises(FileNotFoundError, match="none of the images of 1 questions"):
        load_visual_questions(DatasetDict(test=empty), "test")


def test_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "parquet").mkdir()
    table(tmp_path / "images", answer=list("abcdef")).to_parquet(tmp_path / "parquet/test-00000-of-00001.parquet")
    dataset = load_visual_questions(str(tmp_path / "parquet"), "test")
    assert dataset["answers"][:] == [[letter] for letter in "adbecf"]
    assert len(set(dataset["image_id"][:])) == 3
    assert open_stored(dataset[4]["pixel_values"]).getpixel((0, 0)) == (2, 0, 0)
