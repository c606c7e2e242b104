"""Generated scenes of flat objects with questions about them, after CLEVR (Johnson et al., 2017).

Row `i` of a [`SceneDataset`] is a pure function of its seed, split and `i`, and so are the scene graph and the boxes of
the objects that the answer is read off: it is known where a model has to look. Questions are CLEVR's programs, which
`run_program` answers from the scene graph, and are drawn so that they cannot be answered without the image.
"""

import functools
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from regard.data.image_classification import SPLITS
from regard.data.visual_questions import first_look, run_program

IMAGE_SIZE = 128
COLORS = {
    "red": (214, 40, 40),
    "green": (38, 150, 48),
    "blue": (40, 80, 220),
    "yellow": (250, 222, 40),
    "purple": (140, 50, 190),
    "cyan": (60, 214, 220),
    "brown": (122, 72, 30),
    "gray": (105, 105, 105),
}
SHAPES = ("circle", "square", "triangle", "star", "ring")
SIZES = ("small", "large")
MATERIALS = ("plain", "striped", "dotted")
ATTRIBUTES = {"size": SIZES, "color": tuple(COLORS), "material": MATERIALS, "shape": SHAPES}  # as adjectives stand
RELATIONS = ("left", "right", "above", "below")
QUESTION_TYPES = (
    *(f"query_{name}" for name in ATTRIBUTES),
    "relate",
    "exist",
    "count",
    "compare_number",
    "equal_attribute",
)
MAX_COUNT = 5
ANSWERS = ("yes", "no", *map(str, range(MAX_COUNT + 1)), *COLORS, *SHAPES, *SIZES, *MATERIALS)

_SCALE = 3  # objects are drawn this much larger, and reduced
# Lengths are in pixels of an image of 128.
_RADII = {"small": 10.0, "large": 17.0}
_GAP = 2.0
_EDGE = 2.0
_CLEARLY = 10.0  # how much farther left, right, above or below a centre is than another
_TRIES = 600
_TRIES_PER_TARGET = 120
_OUTER = {"circle": 0.92, "square": 1.1, "triangle": 1.12, "star": 1.12, "ring": 0.98}  # so that areas look alike
_RING_HOLE = 0.42
_STAR_WAIST = 0.5
_WORDS = {"color": ("color", "color", "color", "colour"), "material": ("material", "pattern")}
_COMPARISONS = {
    "greater_than": ("are there more {} than {}?", "is the number of {} greater than the number of {}?"),
    "less_than": ("are there fewer {} than {}?", "is the number of {} less than the number of {}?"),
    "equal_integer": ("are there equally many {} and {}?", "is the number of {} the same as the number of {}?"),
}
_PLACES = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}


class SceneDataset(Dataset):
    """Images of three to eight objects, with questions about them.

    Row `i` is question `i % questions_per_image` about image `i // questions_per_image`, in the columns of
    `load_visual_questions`, with `pixel_values` a PIL image, mode "RGB": `{"pixel_values", "image_id", "question",
    "answers": [one string], "question_type", "boxes": [[x0, y0, x1, y1], ...] in pixels, "first_boxes": the
    same}`. The last images drawn are kept, so read the questions of an image one after the other.

    Objects have a shape, colour, size and material (`ATTRIBUTES`) and hardly overlap. The types of questions, nearly
    equally frequent, and what their boxes hold:

    - "query_color", "query_shape", "query_size", "query_material": of the one object described; its box;
    - "relate": the same, of the one object that fits a description and is left of, right of, above or below another;
      its box alone. The description without the place would fit several;
    - "exist": the boxes of all that fit; none where the answer is no;
    - "count": of a description, or of all on one side of an object, 0 to 5; the boxes of those counted;
    - "compare_number": of two descriptions, more, fewer or equally many; the boxes of both sets;
    - "equal_attribute": of two objects, for one of the four attributes; both boxes.

    `first_boxes` hold what to look at before that: the other object of "relate" and of a "count" on one side of it, the
    first side of "compare_number" and "equal_attribute"; else they are the `boxes`.

    Yes and no, numbers, and the values of each attribute are drawn first, equally often, and the question to fit them.

    Args:
        split: "train", "validation" or "test"; no two have an image in common.
        size: number of rows.
        seed: any integer.
        questions_per_image: no two of an image ask the same.
        image_size: height and width in pixels; all lengths grow with it.

    Raises:
        ValueError: there is no such split, or a number is too small.
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 1_000_000,
        seed: int = 0,
        questions_per_image: int = 10,
        image_size: int = IMAGE_SIZE,
    ):
        if split not in SPLITS:
            raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}.")
        if size < 0 or questions_per_image < 1 or image_size < 32:
            raise ValueError(
                f"size={size} must be 0 or more, questions_per_image={questions_per_image} 1 or more, and "
                f"image_size={image_size} 32 or more."
            )
        self.split, self.size, self.seed = split, size, seed
        self.questions_per_image, self.image_size = questions_per_image, image_size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, question = divmod(index, self.questions_per_image)
        drawn = self._drawn(index)
        text, answer, kind, referred, program = drawn.questions[question]
        boxes = [list(entry["bbox"]) for entry in drawn.graph["objects"]]
        return {
            "pixel_values": drawn.image.copy(),
            "image_id": str(number),
            "question": text,
            "answers": [answer],
            "question_type": kind,
            "boxes": [boxes[place] for place in referred],
            "first_boxes": [boxes[place] for place in first_look(program, drawn.graph)],
        }

    def scene(self, index: int) -> dict[str, Any]:
        """The scene graph of row `index` as CLEVR writes it, which is not to be changed: `{"objects": [{"shape",
        "color", "size", "material", "rotation" in degrees, "pixel_coords": [x, y, 0], "3d_coords": the same, "bbox":
        [x0, y0, x1, y1]}, ...], "relationships": {"left": [indices of the objects left of object 0, ...], ...}}`."""
        return self._drawn(index).graph

    def _drawn(self, index: int) -> "_Scene":
        if not 0 <= index < self.size:
            raise IndexError(f"row {index} of a data set of {self.size}")
        number = index // self.questions_per_image
        return _draw_scene(self.seed, self.split, number, self.questions_per_image, self.image_size)


def write_clevr(
    folder: str | Path,
    split: str,
    images: int,
    seed: int = 0,
    questions_per_image: int = 10,
    image_size: int = IMAGE_SIZE,
) -> None:
    """Write a `SceneDataset` in CLEVR's layout, for `load_visual_questions("clevr:FOLDER", split)`.

    Beyond CLEVR's keys objects have "bbox", and questions "referred_objects" (indices) and "question_type". Relations
    are "left", "right", "above" and "below". Depth is 0.

    Args:
        folder: made where it is missing; the other splits in it stay.
        split: "train", "validation" or "test".
        images: number of images.
        seed, questions_per_image, image_size: as for `SceneDataset`.
    """
    dataset = SceneDataset(split, images * questions_per_image, seed, questions_per_image, image_size)
    folder, part = Path(folder), "val" if split == "validation" else split
    for name in (f"images/{part}", "scenes", "questions"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    scenes: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    for number in range(images):
        drawn = dataset._drawn(number * questions_per_image)
        entry = {"split": part, "image_index": number, "image_filename": f"CLEVR_{part}_{number:06}.png"}
        drawn.image.save(folder / "images" / part / entry["image_filename"])
        scenes.append({**entry, **drawn.graph})
        for question in drawn.questions:
            questions.append(
                {
                    **entry,
                    "question_index": len(questions),
                    "question": question.text,
                    "answer": question.answer,
                    "question_type": question.kind,
                    "referred_objects": question.referred,
                    "program": question.program,
                }
            )
    for name, entries in (("scenes", scenes), ("questions", questions)):
        content = {"info": {"split": part}, name: entries}
        (folder / name / f"CLEVR_{part}_{name}.json").write_text(json.dumps(content))


class _Question(NamedTuple):
    text: str
    answer: str
    kind: str
    referred: list[int]
    program: list[dict[str, Any]]


class _Scene(NamedTuple):
    image: Image.Image
    graph: dict[str, Any]
    questions: list[_Question]


@functools.lru_cache(maxsize=64)
def _draw_scene(seed: int, split: str, number: int, questions: int, image_size: int) -> _Scene:
    rng = random.Random(f"{seed}/{split}/{number}")
    objects = _place(rng, image_size)
    image = _draw(rng, objects, image_size)
    graph = {"objects": objects, "relationships": {relation: _related(objects, relation) for relation in RELATIONS}}
    return _Scene(image, graph, _ask(rng, graph, questions, image_size))


def _place(rng: random.Random, image_size: int) -> list[dict[str, Any]]:
    """Objects with all but their boxes."""
    unit = image_size / 128
    # Few values in a scene, so that many objects share one, and a description seldom fits a single object.
    palettes = {
        "size": SIZES,
        "color": rng.sample(list(COLORS), rng.randint(2, 6)),
        "material": rng.sample(MATERIALS, rng.randint(2, 3)),
        "shape": rng.sample(SHAPES, rng.randint(2, 5)),
    }
    number = rng.choice((3, 4, 5, 5, 6, 6, 7, 7, 8, 8))
    objects: list[dict[str, Any]] = [
        {name: rng.choice(values) for name, values in palettes.items()} for _ in range(number)
    ]
    radii = [_RADII[entry["size"]] * rng.uniform(0.95, 1.05) * unit for entry in objects]
    gap = _GAP * unit
    centres: dict[int, tuple[float, float]] = {}
    while len(centres) < len(objects):  # ever closer, so that it ends
        centres.clear()
        for index in sorted(range(len(objects)), key=lambda index: -radii[index]):
            edge = radii[index] * max(_OUTER.values()) + _EDGE * unit
            for _ in range(20):
                centre = rng.uniform(edge, image_size - edge), rng.uniform(edge, image_size - edge)
                if all(math.dist(centre, at) > radii[index] + radii[other] + gap for other, at in centres.items()):
                    centres[index] = centre
                    break
            else:
                break
        gap -= 0.1 * unit
    for index, entry in enumerate(objects):
        place = [*(round(value, 2) for value in centres[index]), 0.0]
        entry |= {"rotation": round(rng.uniform(-15, 15), 1), "pixel_coords": place, "3d_coords": place}
        entry["radius"] = radii[index] * _OUTER[entry["shape"]]
    return objects


def _related(objects: Sequence[Mapping[str, Any]], relation: str) -> list[list[int]]:
    axis, sign = RELATIONS.index(relation) // 2, -1 if relation in ("left", "above") else 1
    along = [sign * entry["pixel_coords"][axis] for entry in objects]
    return [[other for other, place in enumerate(along) if place > own] for own in along]


def _draw(rng: random.Random, objects: Sequence[dict[str, Any]], image_size: int) -> Image.Image:
    """The image; the objects get their boxes, and lose the radius they are drawn with."""
    generator = np.random.default_rng(rng.getrandbits(64))
    ground = _background(rng, generator, image_size)
    canvas = ground.resize((image_size * _SCALE, image_size * _SCALE), Image.Resampling.NEAREST)
    for entry in objects:
        radius = entry.pop("radius") * _SCALE
        side = 2 * math.ceil(radius) + 4
        line = round(image_size / 128 * _SCALE)
        mask, inside = (_shape(entry["shape"], side, radius, entry["rotation"], width) for width in (0, line))
        light = rng.randint(-16, 16)
        color = tuple(min(255, max(0, part + light + rng.randint(-5, 5))) for part in COLORS[entry["color"]])
        patch = _material(rng, entry["material"], color, side, image_size / 128 * _SCALE)
        left, top = (round(value * _SCALE - side / 2) for value in entry["pixel_coords"][:2])
        outline = tuple(channel // 2 for channel in color)
        canvas.paste(outline, (left, top), mask)
        canvas.paste(patch, (left, top), inside)
        x0, y0, x1, y1 = mask.getbbox() or (0, 0, side, side)
        box = (left + x0, top + y0, left + x1, top + y1)
        entry["bbox"] = [round(edge / _SCALE, 2) for edge in box]
    pixels = np.asarray(canvas.reduce(_SCALE), np.float32)
    pixels = pixels + rng.uniform(2, 6) * generator.standard_normal((image_size, image_size, 1), np.float32)
    return Image.fromarray((np.clip(pixels, 0, 255) + 0.5).astype(np.uint8))


def _background(rng: random.Random, generator: np.random.Generator, image_size: int) -> Image.Image:
    """Light grey, with a tint, a slope and soft clouds."""
    level = rng.uniform(165, 225) + generator.uniform(-6, 6, 3)
    ramp = np.linspace(-1, 1, image_size)
    slope = rng.uniform(-14, 14) * ramp[:, None] + rng.uniform(-14, 14) * ramp[None, :]
    coarse = Image.fromarray(generator.normal(0, rng.uniform(1, 7), (9, 9)).astype(np.float32))
    clouds = np.asarray(coarse.resize((image_size, image_size), Image.Resampling.BICUBIC))
    pixels = level + (slope + clouds)[:, :, None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _shape(shape: str, side: int, radius: float, degrees: float, line: int) -> Image.Image:
    """A mask, `side` wide and high, of a shape without the outermost `line` pixels."""
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    middle = side / 2
    if shape in ("circle", "ring"):
        draw.circle((middle, middle), radius - line, fill=255)
        if shape == "ring":
            draw.circle((middle, middle), radius * _RING_HOLE + line, fill=0)
        return mask
    corners = {"square": 4, "triangle": 3, "star": 10}[shape]
    points = []
    for corner in range(corners):
        angle = math.radians(degrees - 90 + 360 * corner / corners + (45 if shape == "square" else 0))
        reach = radius * (_STAR_WAIST if shape == "star" and corner % 2 else 1)
        points.append((middle + reach * math.cos(angle), middle + reach * math.sin(angle)))
    draw.polygon(points, fill=255)
    if line:
        draw.line([*points, *points[:2]], fill=0, width=2 * line, joint="curve")
    return mask


def _material(rng: random.Random, material: str, color: tuple[int, ...], side: int, unit: float) -> Image.Image:
    """A patch, `side` wide and high: plain, or with stripes or dots, dark on light colours and light on dark ones."""
    patch = Image.new("RGB", (side, side), color)
    if material == "plain":
        return patch
    draw = ImageDraw.Draw(patch)
    light = 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2] > 150
    ink = tuple(round(channel * 0.3) if light else round(channel + (255 - channel) * 0.8) for channel in color)
    step = (5.0 if material == "striped" else 5.5) * unit
    angle = math.radians(rng.uniform(0, 180))
    along, across = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))
    rows = range(-math.ceil(0.75 * side / step), math.ceil(0.75 * side / step) + 1)
    start = side / 2 + rng.uniform(0, step)
    for row in rows:
        x, y = (start + row * step * part for part in across)
        if material == "striped":
            ends = [(x - side * along[0], y - side * along[1]), (x + side * along[0], y + side * along[1])]
            draw.line(ends, fill=ink, width=round(0.44 * step))
        else:
            for place in rows:
                shift = (place + row % 2 / 2) * step
                draw.circle((x + shift * along[0], y + shift * along[1]), 0.3 * step, fill=ink)
    return patch


def _ask(rng: random.Random, graph: Mapping[str, Any], number: int, image_size: int) -> list[_Question]:
    writer = _Writer(rng, graph, _CLEARLY * image_size / 128)
    questions: list[_Question] = []
    for turn in itertools.count():
        question = writer.write(rng.choice(QUESTION_TYPES))
        # Where more are asked for than the scene has, they repeat.
        if question and (turn > 20 * number or all(question.program != other.program for other in questions)):
            questions.append(question)
            if len(questions) == number:
                break
    return questions


class _Program(list[dict[str, Any]]):
    """Nodes in CLEVR's form; each method gives the index of the node it ends in."""

    def add(self, function: str, *inputs: int, value: str = "") -> int:
        self.append({"function": function, "inputs": list(inputs), "value_inputs": [value] if value else []})
        return len(self) - 1

    def select(self, description: Mapping[str, str], start: int | None = None) -> int:
        place = self.add("scene") if start is None else start
        for name, value in description.items():
            place = self.add(f"filter_{name}", place, value=value)
        return place

    def one(self, description: Mapping[str, str]) -> int:
        return self.add("unique", self.select(description))


class _Writer:
    """Writes questions about a scene, each a text and a program."""

    def __init__(self, rng: random.Random, graph: Mapping[str, Any], margin: float):
        self.rng, self.graph, self.margin = rng, graph, margin
        self.objects: Sequence[Mapping[str, Any]] = graph["objects"]
        self.descriptions: dict[tuple[int, str], list[dict[str, str]]] = {}

    def write(self, kind: str) -> _Question | None:
        """A question of a type, if one is found. What is asked and the answer come first, so that none is usual."""
        what = kind.removeprefix("query_")
        if kind in ("relate", "equal_attribute"):
            what = self.rng.choice(list(ATTRIBUTES))
        elif kind == "compare_number":
            what = self.rng.choice(list(_COMPARISONS))
        answers = ("yes", "no")
        if kind == "count":
            answers = [str(count) for count in range(MAX_COUNT + 1)]
        elif kind == "relate" or kind.startswith("query_"):
            answers = ATTRIBUTES[what]
        draft = getattr(self, "_query" if kind.startswith("query_") else f"_{kind}")
        target = ""
        for attempt in range(_TRIES):
            if attempt % _TRIES_PER_TARGET == 0:
                target = self.rng.choice(answers)
            drafted: tuple[str, _Program] | None = draft(what, target)
            if drafted is not None:
                text, program = drafted
                answer, referred = run_program(program, self.graph)
                if answer == target:
                    return _Question(text, answer, kind, referred, program)
        return None

    def _query(self, attribute: str, target: str) -> tuple[str, _Program] | None:
        index = self._having(attribute, target)
        description = None if index is None else self._describe(index, attribute)
        if description is None:
            return None
        program = _Program()
        program.add(f"query_{attribute}", program.one(description))
        return self._what(attribute, self._name(description)), program

    def _relate(self, attribute: str, target: str) -> tuple[str, _Program] | None:
        index = self._having(attribute, target)
        if index is None:
            return None
        other = self.rng.choice([place for place in range(len(self.objects)) if place != index])
        relation = self.rng.choice(RELATIONS)
        others = [name for name in ATTRIBUTES if name != attribute]
        description = self._part(index, self.rng.sample(others, self.rng.choice((0, 1, 1, 2))))
        fitting = [place for place in self._fitting(description) if place != other]
        beside = self.graph["relationships"][relation][other]
        if len(fitting) < 2 or [place for place in fitting if place in beside] != [index]:
            return None
        reference = self._reference(other, relation, fitting)
        if reference is None:
            return None
        program = _Program()
        where = program.add("relate", program.one(reference), value=relation)
        program.add(f"query_{attribute}", program.add("unique", program.select(description, where)))
        that = self.rng.choice((" ", " that is "))
        return self._what(attribute, self._name(description) + that + self._where(relation, reference)), program

    def _exist(self, _: str, target: str) -> tuple[str, _Program] | None:
        names = self.rng.sample(list(ATTRIBUTES), self.rng.choice((1, 2, 2, 3)))
        if {*names} <= {"size", "material"}:  # there is nearly always one
            return None
        description = self._part(self.rng.randrange(len(self.objects)), names)
        if target == "no":
            description = self._change(description)
        program = _Program()
        program.add("exist", program.select(description))
        one, many = self._name(description), self._name(description, plural=True)
        return self._choose(
            f"is there a {one}?", f"are there any {many}?", f"does the image contain a {one}?", f"is a {one} present?"
        ), program

    def _count(self, _: str, target: str) -> tuple[str, _Program] | None:
        description = self._part(
            self.rng.randrange(len(self.objects)), self.rng.sample(list(ATTRIBUTES), self.rng.choice((0, 1, 1, 1, 2)))
        )
        program, where, start = _Program(), "", None
        if self.rng.random() < 0.4:
            other, relation = self.rng.randrange(len(self.objects)), self.rng.choice(RELATIONS)
            reference = self._reference(other, relation, self._fitting(description))
            if reference is None:
                return None
            start = program.add("relate", program.one(reference), value=relation)
            where = f" {self._where(relation, reference)}"
        elif target == "0" and description:
            description = self._change(description)
        program.add("count", program.select(description, start))
        many = self._name(description, plural=True)
        return self._choose(
            f"how many {many} are{where or ' there'}?",
            f"what is the number of {many}{where}?",
            f"how many {many}{where} are in the image?",
        ), program

    def _compare_number(self, function: str, target: str) -> tuple[str, _Program] | None:
        names = self.rng.sample(list(ATTRIBUTES), self.rng.choice((1, 1, 2)))
        one, other = (self._part(self.rng.randrange(len(self.objects)), names) for _ in range(2))
        if self.rng.random() < 0.3:
            other = self._change(other)
        if self.rng.random() < 0.5:
            one, other = other, one
        if one == other:
            return None
        program = _Program()
        counts = [program.add("count", program.select(description)) for description in (one, other)]
        program.add(function, *counts)
        first, second = (self._name(description, plural=True) for description in (one, other))
        text = self._choose(*_COMPARISONS[function])
        return text.format(first, second), program

    def _equal_attribute(self, attribute: str, target: str) -> tuple[str, _Program] | None:
        pair = self.rng.sample(range(len(self.objects)), 2)
        one, other = (self._describe(index, attribute) for index in pair)
        if one is None or other is None:
            return None
        program = _Program()
        values = [program.add(f"query_{attribute}", program.one(description)) for description in (one, other)]
        program.add(f"equal_{attribute}", *values)
        first, second, word = self._name(one), self._name(other), self._word(attribute)
        return self._choose(
            f"do the {first} and the {second} have the same {word}?",
            f"is the {first} the same {word} as the {second}?",
            f"does the {first} have the same {word} as the {second}?",
        ), program

    def _having(self, attribute: str, value: str) -> int | None:
        """An object with a value of an attribute."""
        having = [index for index, entry in enumerate(self.objects) if entry[attribute] == value]
        return self.rng.choice(having) if having else None

    def _part(self, index: int, names: Sequence[str]) -> dict[str, str]:
        return {name: self.objects[index][name] for name in ATTRIBUTES if name in names}

    def _change(self, description: Mapping[str, str]) -> dict[str, str]:
        """Likewise, with another value of one attribute."""
        name = self.rng.choice(list(description))
        return {**description, name: self.rng.choice([v for v in ATTRIBUTES[name] if v != description[name]])}

    def _fitting(self, description: Mapping[str, str]) -> list[int]:
        wanted = description.items()
        return [
            index for index, entry in enumerate(self.objects) if all(entry[name] == value for name, value in wanted)
        ]

    def _describe(self, index: int, without: str = "") -> dict[str, str] | None:
        """A description that fits an object alone, rather short, without one of the attributes."""
        if (index, without) not in self.descriptions:
            names = [name for name in ATTRIBUTES if name != without]
            parts = [part for count in range(1, len(names) + 1) for part in itertools.combinations(names, count)]
            descriptions = [self._part(index, part) for part in parts]
            alone = [description for description in descriptions if self._fitting(description) == [index]]
            self.descriptions[index, without] = alone
        alone = self.descriptions[index, without]
        return min(alone, key=lambda description: len(description) + 1.5 * self.rng.random(), default=None)

    def _reference(self, index: int, relation: str, others: Sequence[int]) -> dict[str, str] | None:
        """A description of an object, unless it is in doubt on which side of it one of the others is."""
        axis = RELATIONS.index(relation) // 2
        places = [entry["pixel_coords"][axis] for entry in self.objects]
        if any(abs(places[other] - places[index]) < self.margin for other in others if other != index):
            return None
        return self._describe(index)

    def _choose(self, *texts: str) -> str:
        return self.rng.choice(texts)

    def _word(self, attribute: str) -> str:
        return self.rng.choice(_WORDS.get(attribute, (attribute,)))

    def _name(self, description: Mapping[str, str], plural: bool = False) -> str:
        adjectives = [value for name, value in description.items() if name != "shape"]
        noun = description.get("shape") or self.rng.choice(("thing", "object"))
        return " ".join([*adjectives, f"{noun}s" if plural else noun])

    def _where(self, relation: str, reference: Mapping[str, str]) -> str:
        return f"{self.rng.choice(_PLACES[relation])} the {self._name(reference)}"

    def _what(self, attribute: str, name: str) -> str:
        word = self._word(attribute)
        return self._choose(
            f"what {word} is the {name}?", f"what is the {word} of the {name}?", f"the {name} is what {word}?"
        )


__all__ = [
    "ANSWERS",
    "ATTRIBUTES",
    "IMAGE_SIZE",
    "QUESTION_TYPES",
    "RELATIONS",
    "SceneDataset",
    "write_clevr",
]
