"""Questions about images: easy-VQA, VQA v2, CLEVR, Hub data sets and `datasets` objects, as one flat table.

Sources: easy-VQA (Zhou, 2019), which the PyPI package `easy-vqa` holds; VQA v2 (Goyal et al., 2017), from
https://visualqa.org/download.html; CLEVR (Johnson et al., 2017), from https://cs.stanford.edu/people/jcjohns/clevr/.
"""

import hashlib
import importlib.util
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value

from regard.data.image_classification import SPLITS
from regard.data.labelled_images import choose_split, read_splits

logger = logging.getLogger(__name__)
T = TypeVar("T")

FEATURES = Features(
    {
        "pixel_values": Image(decode=False),
        "image_id": Value("string"),
        "question": Value("string"),
        "answers": List(Value("string")),
        "question_type": Value("string"),
        "boxes": List(List(Value("float64"))),
    }
)
VQA_ADDRESS = "https://visualqa.org/download.html"
CLEVR_ADDRESS = "https://cs.stanford.edu/people/jcjohns/clevr/"
_EASY_VQA_FETCH = "install it by `pip install --force-reinstall easy-vqa`"
_EASY_VQA_SHAPES = ("circle", "rectangle", "triangle")
_EASY_VQA_CONTRAST = 40  # how far a shape differs from the background, of 255
_VQA_PARTS = {"train": "train2014", "validation": "val2014", "test": "test2015"}
_CLEVR_PARTS = {"train": "train", "validation": "val", "test": "test"}
_CLEVR_COMPARISONS = ("equal_integer", "less_than", "greater_than")
_LARGEST_VALIDATION = 5  # a fifth of the images
_ALIASES = {
    "pixel_values": ("pixel_values", "image", "img"),
    "image_id": ("image_id",),
    "question": ("question",),
    "answers": ("answers", "answer", "multiple_choice_answer", "label"),
    "question_type": ("answer_type", "question_type"),
    "boxes": ("boxes",),
}


def load_visual_questions(
    source: str | Path | Dataset | DatasetDict,
    split: str,
    validation_size: int = 500,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
) -> Dataset:
    """Questions about images, one a row; the rows of an image follow each other, so that it can be decoded once.

    The columns are:

    - `pixel_values`: the image, not decoded: `{"path", "bytes"}`, one of which is None;
    - `image_id`: string, the same for all questions of an image;
    - `question`: string;
    - `answers`: list of strings as they were given, ten in VQA v2 and one elsewhere; empty where the split has none;
    - `question_type`: string; VQA v2: its answer type, "yes/no", "number" or "other"; easy-VQA: "yes/no", "shape" or
      "color"; CLEVR: the question's own "question_type" where it has one (see `regard.data.scenes.write_clevr`), or
      else the last function of its program, with "compare_integer" for those that compare numbers; "" where unknown;
    - `boxes`: list of `[x0, y0, x1, y1]`, in pixels of the image as it is stored, of the objects that the question
      refers to; empty where unknown. easy-VQA's one shape is found by its pixels. Of scenes in CLEVR's format those
      have them whose objects have a "bbox"; the objects are the question's "referred_objects" where it has these, or
      else what `run_program` finds.

    Questions whose image is missing are left out, with one logged warning for each image, which names the file.

    Args:
        source: "easy-vqa"; "vqa-v2:FOLDER", with the questions' and annotations' JSON files, and the folders train2014,
            val2014 and test2015 of images; "clevr:FOLDER", with the folders images, questions and scenes; a `datasets`
            object, whose sole split is "train"; or whatever `datasets.load_dataset` takes: a name on the Hub, a
            folder of Parquet files.
        split: "train"; "validation", which is held out of the training images where the source has none (also called
            val or valid); or "test".
        validation_size: number of images held out, with all their questions; at most a fifth of the images.
        seed: chooses them.
        columns: for `datasets` and `load_dataset`, the source's own names of columns, as `{"question": "sentence"}`.
            Images named `image` or `img`, and answers named `answers`, `answer`, `multiple_choice_answer` or `label`,
            need no mention. Answers are a string, a class, or a list of strings or of `{"answer": string}`.

    Raises:
        ValueError: there is no such split or column, a file is damaged, or answers are of no known form.
        FileNotFoundError: there is no such folder or file, or no image of any question.
        ModuleNotFoundError: the package easy-vqa is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}.")
    name, _, place = source.partition(":") if isinstance(source, str) else ("", "", "")
    if isinstance(source, str) and name in _NAMED and not Path(source).is_dir():
        if not place and name != "easy-vqa":
            raise ValueError(f"{name}: say where it is, {name}:FOLDER")
        dataset, held_out = _NAMED[name](Path(place).expanduser(), split)
    else:
        dataset, held_out = _load_columns(source, split, dict(columns or {}))
    dataset = _group_by_image(dataset)
    return _hold_out(dataset, split, validation_size, seed) if held_out else dataset


def answer_vocabulary(
    dataset: Dataset, size: int | None = None, min_count: int = 1, normalize: Callable[[str], str] = str
) -> list[str]:
    """The answers of a data set, the most frequent first, and by the alphabet where they are equally frequent.

    Args:
        dataset: with the column `answers`, each of which counts.
        size: number of answers kept; default: all.
        min_count: how often an answer must have been given.
        normalize: makes answers equal that mean the same.
    """
    counts = Counter(normalize(answer) for answers in dataset["answers"][:] for answer in answers)
    kept = [answer for answer, count in counts.items() if count >= min_count]
    return sorted(kept, key=lambda answer: (-counts[answer], answer))[:size]


def run_program(program: Sequence[Mapping[str, Any]], scene: Mapping[str, Any]) -> tuple[str, list[int]]:
    """Answer one of CLEVR's questions from the scene (Johnson et al., 2017, appendix A).

    Args:
        program: nodes `{"function", "inputs", "value_inputs"}`, whose inputs are the indices of earlier nodes.
        scene: `{"objects": [{"color", "material", "shape", "size"}, ...], "relationships": {name: [indices of the
            objects that are, for example, left of object 0, ...]}}`.

    Returns:
        The answer, and the indices of the objects that it is read off: those queried, counted, found or compared.

    Raises:
        ValueError: the program is damaged, or describes as unique what is not.
    """
    outputs, referred = _trace(program, scene)
    answer = outputs[-1]
    return {True: "yes", False: "no"}[answer] if isinstance(answer, bool) else str(answer), referred[-1]


def first_look(program: Sequence[Mapping[str, Any]], scene: Mapping[str, Any]) -> list[int]:
    """The objects to look at before those that the answer is read off: of a relation what the others are related to, of
    a comparison one side; else the same objects.

    Args:
        program, scene: as for `run_program`.
    """
    _, referred = _trace(program, scene)
    for node, found in zip(reversed(program), reversed(referred), strict=True):
        function = node.get("function") or node["type"]
        if function.startswith(("relate", "same", "equal", "greater", "less")):
            return referred[node["inputs"][0]]
        if function.startswith(("union", "intersect")):
            return found
    return referred[-1]


def _trace(program: Sequence[Mapping[str, Any]], scene: Mapping[str, Any]) -> tuple[list[Any], list[list[int]]]:
    """What each node gives, and the objects that it is read off."""
    outputs: list[Any] = []
    referred: list[list[int]] = []
    try:
        for node in program:
            function, values = node.get("function") or node["type"], node.get("value_inputs") or ()
            inputs = [outputs[index] for index in node["inputs"]]
            output = _run(function, values, inputs, scene)
            outputs.append(output)
            before = (referred[index] for index in node["inputs"])
            referred.append(
                output if isinstance(output, list) else sorted({index for part in before for index in part})
            )
        _ = outputs[-1]
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"no program of CLEVR's ({error!r}): {program}") from error
    return outputs, referred


def _run(function: str, values: Sequence[str], inputs: Sequence[Any], scene: Mapping[str, Any]) -> Any:
    objects = scene["objects"]
    if function == "scene":
        return list(range(len(objects)))
    kind, _, attribute = function.partition("_")
    first = inputs[0]
    match kind:
        case "filter":
            return [index for index in first if objects[index][attribute] == values[0]]
        case "unique":
            if len(first) != 1:
                raise ValueError(f"{len(first)} objects fit a description that should fit one")
            return first
        case "relate":
            return sorted(scene["relationships"][values[0]][first[0]])
        case "same":
            own = objects[first[0]][attribute]
            return [index for index, other in enumerate(objects) if other[attribute] == own and index != first[0]]
        case "union":
            return sorted({*first, *inputs[1]})
        case "intersect":
            return sorted({*first} & {*inputs[1]})
        case "count":
            return len(first)
        case "exist":
            return bool(first)
        case "query":
            return objects[first[0]][attribute]
        case "equal":
            return first == inputs[1]
        case "less":
            return first < inputs[1]
        case "greater":
            return first > inputs[1]
    raise KeyError(function)


def _load_easy_vqa(_: Path, split: str) -> tuple[Dataset, bool]:
    found = importlib.util.find_spec("easy_vqa")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("easy-vqa is in a package of its own; install it by `pip install easy-vqa`")
    folder = Path(found.origin).parent / "data" / ("test" if split == "test" else "train")

    def rows(content: Any) -> Iterable[dict[str, Any]]:
        boxes: dict[str, list[int]] = {}
        for question, answer, number in content:
            kind = "yes/no" if answer in ("yes", "no") else "shape" if answer in _EASY_VQA_SHAPES else "color"
            image = f"{folder}/images/{number}.png"
            if image not in boxes and Path(image).is_file():
                boxes[image] = _box_of_shape(image)
            yield _row(image, number, question, [answer], kind, [boxes[image]] if image in boxes else [])

    return _existing(_read_json(folder / "questions.json", _EASY_VQA_FETCH, rows), _EASY_VQA_FETCH), split != "test"


def _box_of_shape(path: str) -> list[int]:
    """`[x0, y0, x1, y1]` of the one shape in an image of easy-VQA: what differs from the pale background."""
    with PIL.Image.open(path) as image:
        image = image.convert("RGB")
        colors: Any = image.getcolors(image.width * image.height)
        _, background = max(colors)
    pixels = np.asarray(image, dtype=np.int16)
    rows, columns = np.nonzero(np.abs(pixels - np.array(background)).max(2) > _EASY_VQA_CONTRAST)
    return [int(edge) for edge in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


def _load_vqa_v2(folder: Path, split: str) -> tuple[Dataset, bool]:
    part, fetch = _VQA_PARTS[split], f"fetch it from {VQA_ADDRESS}"
    annotations: dict[int, tuple[list[str], str]] = {}
    if split != "test":

        def annotated(content: Any) -> Iterable[tuple[int, tuple[list[str], str]]]:
            for entry in content["annotations"]:
                answers = [answer["answer"] for answer in entry["answers"]]
                yield entry["question_id"], (answers, entry["answer_type"])

        annotations = dict(_read_json(folder / f"v2_mscoco_{part}_annotations.json", fetch, annotated))

    def rows(content: Any) -> Iterable[dict[str, Any]]:
        for entry in content["questions"]:
            number = entry["image_id"]
            answers, kind = ([], "") if split == "test" else annotations[entry["question_id"]]
            yield _row(f"{folder}/{part}/COCO_{part}_{number:012}.jpg", number, entry["question"], answers, kind)

    path = folder / f"v2_OpenEnded_mscoco_{part}_questions.json"
    return _existing(_read_json(path, fetch, rows), fetch), False


def _load_clevr(folder: Path, split: str) -> tuple[Dataset, bool]:
    part, fetch = _CLEVR_PARTS[split], f"fetch CLEVR v1.0 from {CLEVR_ADDRESS}"
    path = folder / "scenes" / f"CLEVR_{part}_scenes.json"
    scenes: dict[str, Any] = {}
    if path.is_file():  # the test split of CLEVR v1.0 has none

        def located(content: Any) -> Iterable[tuple[str, Any]]:
            for scene in content["scenes"]:
                if all("bbox" in entry for entry in scene["objects"]):
                    yield scene["image_filename"], scene

        scenes = dict(_read_json(path, fetch, located))

    def rows(content: Any) -> Iterable[dict[str, Any]]:
        for entry in content["questions"]:
            name, program = entry["image_filename"], entry.get("program")
            answers = [entry["answer"]] if "answer" in entry else []
            kind = entry["question_type"] if "question_type" in entry else _clevr_type(program) if program else ""
            boxes = []
            if name in scenes and (program or "referred_objects" in entry):
                scene = scenes[name]
                meant = entry["referred_objects"] if "referred_objects" in entry else run_program(program, scene)[1]
                boxes = [scene["objects"][index]["bbox"] for index in meant]
            image = f"{folder}/images/{part}/{name}"
            yield _row(image, entry["image_index"], entry["question"], answers, kind, boxes)

    path = folder / "questions" / f"CLEVR_{part}_questions.json"
    return _existing(_read_json(path, fetch, rows), fetch), False


def _clevr_type(program: Sequence[Mapping[str, Any]]) -> str:
    function = program[-1].get("function") or program[-1]["type"]
    return "compare_integer" if function in _CLEVR_COMPARISONS else function


_NAMED = {"easy-vqa": _load_easy_vqa, "vqa-v2": _load_vqa_v2, "clevr": _load_clevr}


def _row(
    image: str,
    number: int,
    question: str,
    answers: list[str],
    question_type: str,
    boxes: Sequence[Sequence[float]] = (),
) -> dict[str, Any]:
    return {
        "pixel_values": image,
        "image_id": str(number),
        "question": question,
        "answers": answers,
        "question_type": question_type,
        "boxes": [list(box) for box in boxes],
    }


def _read_json(path: Path, fetch: str, entries: Callable[[Any], Iterable[T]]) -> list[T]:
    """What `entries` takes from a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or not of the form that `entries` expects.
    """
    try:
        return list(entries(json.loads(path.read_bytes())))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file; {fetch}") from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error!r}); {fetch}") from error


def _existing(rows: list[dict[str, Any]], fetch: str) -> Dataset:
    """The rows whose images there are."""
    if not rows:
        raise ValueError(f"the file holds no questions; {fetch}")
    paths = dict.fromkeys(row["pixel_values"] for row in rows)
    listed = {folder: _names(folder) for folder in {os.path.dirname(path) for path in paths}}
    missing = {path for path in paths if os.path.basename(path) not in listed[os.path.dirname(path)]}
    if len(missing) == len(paths):
        raise FileNotFoundError(f"none of the images of {len(rows)} questions is there, as {min(paths)}; {fetch}")
    for path in paths:
        if path in missing:
            logger.warning("left out: %s: no such file", path)
    return Dataset.from_list([row for row in rows if row["pixel_values"] not in missing], features=FEATURES)


def _names(folder: str) -> set[str]:
    return {entry.name for entry in os.scandir(folder)} if os.path.isdir(folder) else set()


def _load_columns(
    source: str | Path | Dataset | DatasetDict, split: str, columns: dict[str, str]
) -> tuple[Dataset, bool]:
    """A split of a `datasets` object or of what `load_dataset` takes, and whether validation is held out of it."""
    unknown = sorted(set(columns) - set(FEATURES))
    if unknown:
        raise ValueError(f"columns names {unknown}; it can name {', '.join(FEATURES)}")
    splits = read_splits(source)
    present = {name: next((own for own in names if own in splits), None) for name, names in SPLITS.items()}
    own = present[split] or (present["train"] if split == "validation" else None)
    if own is None:
        raise ValueError(f"the data set has no split {split!r}, only {', '.join(splits)}")
    return _choose_columns(splits[own], columns), split != "test" and present["validation"] is None


def _choose_columns(dataset: Dataset, columns: dict[str, str]) -> Dataset:
    """The columns this module names, of the rows that have an image."""
    features = dataset.features
    for name, aliases in _ALIASES.items():
        columns.setdefault(name, next((alias for alias in aliases if alias in features), ""))
        if columns[name] not in features and (columns[name] or name in ("pixel_values", "question")):
            raise ValueError(
                f"the data set has no column {columns[name] or name!r}, only {', '.join(features)}; "
                f"say which holds {name!r} by columns={{{name!r}: ...}}"
            )
    own = {name: column for name, column in columns.items() if column}
    dataset = dataset.select_columns(sorted(set(own.values()))).cast_column(own["pixel_values"], Image(decode=False))
    names = [_name_of(image) for image in dataset[own["pixel_values"]]]
    kept = [index for index, name in enumerate(names) if name]
    if not kept:
        raise FileNotFoundError(f"none of the images of {len(dataset)} questions is there")
    missing = (index for index, name in enumerate(names) if not name)
    for lost in dict.fromkeys(_lost(index, dataset[index][own["pixel_values"]]) for index in missing):
        logger.warning("left out: %s", lost)

    def column(name: str) -> list[Any]:
        return dataset[own[name]][:] if name in own else [None] * len(dataset)

    answers, classes = column("answers"), features.get(own.get("answers", ""))
    if isinstance(classes, ClassLabel):
        answers = [None if answer is None or answer < 0 else classes.int2str(answer) for answer in answers]
    added = {
        "image_id": [str(value) for value in (column("image_id") if "image_id" in own else names)],
        "question": column("question"),
        "answers": [_answers(value) for value in answers],
        "question_type": [value or "" for value in column("question_type")],
        "boxes": [value or [] for value in column("boxes")],
    }
    chosen = dataset.select_columns([own["pixel_values"]])
    if own["pixel_values"] != "pixel_values":
        chosen = chosen.rename_column(own["pixel_values"], "pixel_values")
    for name, values in added.items():
        chosen = chosen.add_column(name, values, feature=FEATURES[name])
    return chosen.select(kept)


def _lost(index: int, image: Mapping[str, Any] | None) -> str:
    return f"{image['path']}: no such file" if image and image["path"] else f"question {index}: it has no image"


def _name_of(image: Mapping[str, Any] | None) -> str:
    """What tells an image from others: its path, or a digest of its bytes; "" where it is missing."""
    if image is None:
        return ""
    if image["bytes"] is not None:
        return hashlib.sha1(image["bytes"], usedforsecurity=False).hexdigest()
    path = image["path"] or ""
    return path if "://" in path or os.path.isfile(path) else ""  # an address is inside an archive, or on the Hub


def _answers(value: Any) -> list[str]:
    """The answers of a question, in any of the forms that data sets have."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping) and "answer" in value:
        return _answers(value["answer"])
    if isinstance(value, list):
        return [answer for part in value for answer in _answers(part)]
    raise ValueError(f'answers are strings, or lists of strings or of {{"answer": string}}, not {value!r}')


def _group_by_image(dataset: Dataset) -> Dataset:
    first: dict[str, int] = {}
    places = [first.setdefault(name, len(first)) for name in dataset["image_id"][:]]
    order = sorted(range(len(places)), key=places.__getitem__)
    return dataset if places == sorted(places) else dataset.select(order)


def _hold_out(dataset: Dataset, split: str, validation_size: int, seed: int) -> Dataset:
    """The rows of the images that belong to "train" or "validation"."""
    names = dataset["image_id"][:]
    images = list(dict.fromkeys(names))
    size = min(validation_size, max(1, len(images) // _LARGEST_VALIDATION))
    chosen = {images[index] for index in choose_split(len(images), split, size, seed)}
    return dataset.select([index for index, name in enumerate(names) if name in chosen])


__all__ = [
    "CLEVR_ADDRESS",
    "FEATURES",
    "VQA_ADDRESS",
    "answer_vocabulary",
    "first_look",
    "load_visual_questions",
    "run_program",
]
