"""Generated scenes of emoji to be counted: how many of a named category there are, and where.

Row `i` of an [`EmojiSceneDataset`] is a pure function of its seed, split, settings and `i` (given the font installed).
`emoji_scenes.json` lists the categories: 282 emoji chosen to be told apart when small, each with its English short
name (Unicode CLDR), a plain noun, the singulars and plurals it is asked for by (see `emoji_names.py`), its split (about
60, 20 and 20 % of animals, plants, food, vehicles, objects and symbols) and its family of look-alikes. A family is in
one split, so that nothing like a test category is trained on, and a scene has one category of a family, so that what
is asked for is never in doubt; "cars", for example, holds all that a car might mean, fire engines included.

The emoji are those of Noto Color Emoji, the Debian package `fonts-noto-color-emoji` (SIL OFL 1.1), or Twitter's
(CC-BY-4.0), from the npm package `emoji-datasource-twitter`.
"""

import functools
import itertools
import json
import math
import operator
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

from regard.data.counting import reading_order
from regard.data.image_classification import SPLITS
from regard.data.rendered_text import FONTS_DIRS

IMAGE_SIZE = 224
COUNT_RANGES = ((0, 4), (5, 20), (20, 50))
MIN_VISIBLE = 0.6
GROUNDS = ("plain", "gradient", "noise", "clouds", "pattern")
CATEGORIES_TABLE = Path(__file__).with_name("emoji_scenes.json")
FONT = "NotoColorEmoji.ttf"
FONT_PACKAGE = "fonts-noto-color-emoji"
TWITTER_PACKAGE = "emoji-datasource-twitter"

_FONT_SIZE = 109  # the only one that this font of bitmaps has
_OPAQUE = 64  # alpha from which on a pixel belongs to an object
# Lengths are in pixels of an image of 224.
_SMALLEST, _USUAL, _LARGEST = 10.0, 14.0, 48.0
_FILLED = 0.5  # at most this part of an image is covered by the squares round its objects
_APART = 0.4  # of the sum of two objects' sizes: their centres are no closer
_DEGREES = 30.0
_MOST = 150
_CANDIDATES = 48
_LEVELS = (12, 17, 24, 34, 48, 68, 96, 136)  # sizes that sprites are kept in, to be drawn from the next larger one


class EmojiSceneDataset(Dataset):
    """Images of emoji, with the name of a category to be counted and a point for each object of it.

    A row is `{"pixel_values": PIL image, mode "RGB", "image_id": str, "category": str, "count": int, "points": [[x, y],
    ...], "boxes": [[x0, y0, x1, y1], ...], "others": [str, ...], "others_names": [str, ...], "others_points": [[[x, y],
    ...], ...], "absent": str}`, in pixels of the image. `boxes` hold what is visible of each object asked for, `points`
    are the boxes' centres, and both stand in `reading_order`. `others` are the plain nouns of the other categories
    present, `others_names` the names to ask for them by, and `others_points` the points of each one's objects. `absent`
    names a category of which, and of whose look-alikes, there is nothing.

    A category is asked for by its short name or plain noun, singular or plural, at random ("cat face", "cat faces",
    "cat", "cats") in the train split, and by the plural of its noun ("cats") in the others.

    Objects are 10 to 48 pixels long in an image of 224, the shorter the more there are, turned by up to 30 degrees, and
    slightly vary in brightness and colour. They may overlap: of the pixels of each object at least `MIN_VISIBLE`
    are not covered by others, and the centres of two are at least 0.4 of the sum of their sizes apart. Up to three
    other categories stand among them, and at least one where what is asked for is absent (both within
    `max_distractors`). The ground is plain, a gradient, noise, clouds, or a pattern of stripes or checks.

    Args:
        split: "train", "validation" or "test"; no two have a category in common, or draw the same rows.
        size: number of rows.
        seed: any integer.
        image_size: height and width in pixels; sizes of objects grow with it.
        min_objects, max_objects: how many objects of the category there are, at least and at most.
        count_ranges: ranges `(lowest, highest)` of counts, inclusive. One of them is drawn, each equally often, and the
            count from within it; counts below `min_objects` or above `max_objects` are left out, and their share with
            them.
        max_distractors: how many objects of other categories there are at most.
        style: "noto"; or "twitter:FOLDER", FOLDER being the unpacked npm package.
        categories: the split whose categories are drawn; default: `split`. "test" with the categories of "train" gives
            new scenes of what was trained on.
        grounds: kinds of ground that are drawn, of `GROUNDS`.

    Raises:
        ValueError: there is no such split, style or ground, or a number is too small or too large.
        FileNotFoundError: the font or the folder is missing; the message says how to get it.
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 1_000_000,
        seed: int = 0,
        image_size: int = IMAGE_SIZE,
        min_objects: int = 0,
        max_objects: int = 50,
        count_ranges: Sequence[tuple[int, int]] = COUNT_RANGES,
        max_distractors: int = 30,
        style: str = "noto",
        categories: str | None = None,
        grounds: Sequence[str] = GROUNDS,
    ):
        for name, value in (("split", split), ("categories", categories or split)):
            if value not in SPLITS:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(SPLITS)}.")
        if not grounds or set(grounds) - set(GROUNDS):
            raise ValueError(f"grounds={grounds!r} must be some of {', '.join(GROUNDS)}.")
        if size < 0 or image_size < 64:
            raise ValueError(f"size={size} must be 0 or more, and image_size={image_size} 64 or more.")
        if not 0 <= min_objects <= max_objects <= _MOST or not 0 <= max_distractors <= _MOST:
            raise ValueError(
                f"min_objects={min_objects}, max_objects={max_objects} and max_distractors={max_distractors} must be "
                f"between 0 and {_MOST}, and the first no more than the second."
            )
        self.counts = [
            [count for count in range(low, high + 1) if min_objects <= count <= max_objects]
            for low, high in count_ranges
        ]
        self.weights = [
            len(counts) / max(1, high - low + 1) for counts, (low, high) in zip(self.counts, count_ranges, strict=True)
        ]
        if not any(self.counts):
            raise ValueError(f"count_ranges={count_ranges} has no count from {min_objects} to {max_objects}.")
        self.split, self.size, self.seed, self.image_size = split, size, seed, image_size
        self.max_distractors, self.style = max_distractors, style
        self.categories, self.grounds = categories or split, tuple(grounds)
        _check_style(style)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(f"row {index} of a data set of {self.size}")
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        count = rng.choice(rng.choices(self.counts, self.weights)[0])
        most = min(3, self.max_distractors)
        others = rng.randint(0 if count else min(1, most), most)
        target, *distractors = _choose_categories(rng, self.categories, others + 1)
        most = rng.choice((min(10, self.max_distractors), self.max_distractors))
        numbers = [count, *_share(rng, rng.randint(others, most), others)]
        present = (target, *distractors)
        objects = [category for category, number in zip(present, numbers, strict=True) for _ in range(number)]
        image, boxes = _draw(rng, objects, self.style, self.image_size, self.grounds)
        groups = []
        for number in numbers:
            group, boxes = boxes[:number], boxes[number:]
            order = reading_order([_centre(box) for box in group], self.image_size)
            groups.append([group[place] for place in order])
        # Anything more is drawn after these, so that a seed's images, counts and categories stay what they are.
        name, *others_names = [self._name(rng, category) for category in present]
        absent = _choose_categories(rng, self.categories, 1, present)[0]
        points, *others_points = [[_centre(box) for box in group] for group in groups]
        return {
            "pixel_values": image,
            "image_id": str(index),
            "category": name,
            "count": count,
            "points": points,
            "boxes": groups[0],
            "others": [category.noun for category in distractors],
            "others_names": others_names,
            "others_points": others_points,
            "absent": self._name(rng, absent),
        }

    def _name(self, rng: random.Random, category: "Category") -> str:
        return rng.choice(category.names) if self.split == "train" else category.names[-1]


class Category(NamedTuple):
    """A row of `emoji_scenes.json`: its short name, plain noun, family of look-alikes, and the names it is asked for
    by, the plural of the noun last."""

    emoji: str
    name: str
    noun: str
    family: str
    names: tuple[str, ...]


@functools.cache
def categories(split: str) -> tuple[Category, ...]:
    """The categories of "train", "validation" or "test"."""
    rows = json.loads(CATEGORIES_TABLE.read_text("utf-8"))
    return tuple(
        Category(row["emoji"], row["name"], row["noun"], row["family"], tuple(row["names"]))
        for row in rows
        if row["split"] == split
    )


def _choose_categories(rng: random.Random, split: str, number: int, besides: Sequence[Category] = ()) -> list[Category]:
    """Categories of different families, and of others than those `besides`."""
    chosen = {category.family: category for category in besides}
    while len(chosen) < len(besides) + number:
        category = rng.choice(categories(split))
        chosen.setdefault(category.family, category)
    return list(chosen.values())[len(besides) :]


def _share(rng: random.Random, total: int, parts: int) -> list[int]:
    """How many of `total` each part gets, at least one."""
    cuts = [0, *sorted(rng.sample(range(1, total), parts - 1)), total] if parts else [0]
    return [end - start for start, end in itertools.pairwise(cuts)]


class _Scene:
    """A picture that objects are laid on, each as long as it leaves enough of those below visible."""

    def __init__(self, ground: np.ndarray):
        self.pixels = ground.transpose(2, 0, 1).copy()  # by channel, which numpy computes on some times faster
        self.owner = np.full(ground.shape[:2], -1, np.int16)  # the uppermost object of each pixel
        self.placed = np.empty((0, 3), np.float32)  # x, y and size
        self.windows: list[tuple[int, int, int, int]] = []  # left, top, right, bottom
        self.areas: list[int] = []
        self.visible: list[int] = []

    def lay(self, patch: np.ndarray, size: float, candidates: np.ndarray) -> bool:
        """Lay an object at the first of some centres where it can be, if there is one.

        Args:
            patch: `(4, height, width)`, premultiplied by alpha, 0 to 255.
            size: its longer side before it was turned.
            candidates: `(n, 2)`, x and y.
        """
        height, width = patch.shape[1:]
        corners = np.rint(candidates - (width / 2, height / 2)).astype(int)
        limit = np.subtract(self.owner.shape[::-1], (width, height))
        fitting = ((corners >= 0) & (corners <= limit)).all(1)
        x, y, sizes = self.placed.T
        apart = (candidates[:, :1] - x) ** 2 + (candidates[:, 1:] - y) ** 2
        fitting &= (apart >= (_APART * (sizes + size)) ** 2).all(1)
        mask = patch[3] >= min(_OPAQUE, patch[3].max())
        for index in np.flatnonzero(fitting):
            left, top = corners[index]
            inside = np.s_[top : top + height, left : left + width]
            below = self.owner[inside][mask]
            covered = np.bincount(below + 1).tolist()[1:]
            if all(
                seen - lost >= MIN_VISIBLE * area
                for lost, seen, area in zip(covered, self.visible, self.areas, strict=False)
                if lost
            ):
                self.visible[: len(covered)] = map(operator.sub, self.visible, covered)
                self.owner[inside][mask] = len(self.areas)
                ground = self.pixels[:, *inside]
                ground *= 1 - patch[3] / 255
                ground += patch[:3]
                self.areas.append(int(mask.sum()))
                self.visible.append(self.areas[-1])
                self.windows.append((left, top, left + width, top + height))
                self.placed = np.append(self.placed, [(left + width / 2, top + height / 2, size)], 0)
                return True
        return False

    def box(self, index: int) -> list[float]:
        """The extent of what is visible of an object."""
        left, top, right, bottom = self.windows[index]
        seen = self.owner[top:bottom, left:right] == index
        columns, rows = np.flatnonzero(seen.any(0)), np.flatnonzero(seen.any(1))
        return [float(edge) for edge in (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)]


def _centre(box: Sequence[float]) -> list[float]:
    x0, y0, x1, y1 = box
    return [(x0 + x1) / 2, (y0 + y1) / 2]


def _draw(
    rng: random.Random, objects: Sequence[Category], style: str, image_size: int, grounds: Sequence[str]
) -> tuple[Image.Image, list[list[float]]]:
    """The image, and the objects' boxes."""
    generator = np.random.default_rng(rng.getrandbits(64))
    unit = image_size / IMAGE_SIZE
    colors = np.array([_mean_color(style, category.emoji) for category in dict.fromkeys(objects)] or [(0, 0, 0)])
    scene = _Scene(_background(rng, generator, image_size, colors, grounds))
    largest = min(_LARGEST, IMAGE_SIZE * math.sqrt(_FILLED / max(1, len(objects))))
    usual = rng.uniform(min(_USUAL, largest), largest)
    spread = rng.choice((1.1, 1.25, 1.6))
    middles = generator.uniform(0.2, 0.8, (rng.randint(1, 3), 2)) * image_size
    clustered = rng.random() < 0.3
    order = list(range(len(objects)))
    rng.shuffle(order)
    for index in order:
        size = min(_LARGEST, max(_SMALLEST, usual * spread ** rng.uniform(-1, 1))) * unit
        degrees = rng.uniform(-_DEGREES, _DEGREES)
        light = rng.uniform(0.88, 1.1) * generator.uniform(0.95, 1.05, 3)
        while True:
            candidates = generator.uniform(0, image_size, (_CANDIDATES, 2))
            if clustered:
                spots = middles[generator.integers(len(middles), size=_CANDIDATES // 2)]
                candidates[: len(spots)] = spots + generator.normal(0, image_size / 8, spots.shape)
            if scene.lay(_patch(style, objects[index].emoji, size, degrees, light), size, candidates):
                break
            size *= 0.9  # ever smaller, so that it ends
    laid = [scene.box(place) for place in range(len(objects))]
    boxes = [box for _, box in sorted(zip(order, laid, strict=True))]
    return Image.fromarray((np.clip(scene.pixels, 0, 255) + 0.5).astype(np.uint8).transpose(1, 2, 0).copy()), boxes


def _patch(style: str, emoji: str, size: float, degrees: float, light: np.ndarray) -> np.ndarray:
    """`(4, height, width)`, premultiplied by alpha: a sprite, its longer side `size` pixels, turned, in a light."""
    level = next((level for level in _LEVELS if level >= size), _LEVELS[-1])
    sprite = _sprite(style, emoji, level)
    scale, angle = level / size, math.radians(degrees)
    along, across = math.cos(angle), math.sin(angle)
    width = math.ceil((sprite.width * along + sprite.height * abs(across)) / scale)
    height = math.ceil((sprite.height * along + sprite.width * abs(across)) / scale)
    a, b, d, e = (scale * part for part in (along, across, -across, along))
    matrix = (
        a, b, (sprite.width - a * width - b * height) / 2,
        d, e, (sprite.height - d * width - e * height) / 2,
    )  # fmt: skip
    turned = sprite.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    pixels = np.asarray(turned).transpose(2, 0, 1).astype(np.float32, order="C")
    pixels[:3] = np.minimum(pixels[:3] * light[:, None, None], pixels[3])
    return pixels


@functools.lru_cache(maxsize=8192)
def _sprite(style: str, emoji: str, level: int) -> Image.Image:
    """An emoji, its longer side `level` pixels, with a transparent pixel all round; mode "RGBa"."""
    whole = _emoji(style, emoji)
    scale = level / max(whole.size)
    size = (max(1, round(whole.width * scale)), max(1, round(whole.height * scale)))
    sprite = Image.new("RGBa", (size[0] + 2, size[1] + 2))
    sprite.paste(whole.resize(size, Image.Resampling.HAMMING), (1, 1))
    return sprite


@functools.lru_cache(maxsize=1024)
def _mean_color(style: str, emoji: str) -> tuple[float, ...]:
    pixels = np.asarray(_emoji(style, emoji), np.float64).reshape(-1, 4).sum(0)
    return tuple(255 * pixels[:3] / pixels[3])


@functools.lru_cache(maxsize=1024)
def _emoji(style: str, emoji: str) -> Image.Image:
    """An emoji as large as there is one, cut to its extent; mode "RGBa"."""
    name, _, folder = style.partition(":")
    if name == "twitter":
        image = _read_twitter(Path(folder).expanduser(), emoji)
    else:
        image = Image.new("RGBA", (2 * _FONT_SIZE, 2 * _FONT_SIZE))
        # Without the variation selector, which basic layout would draw.
        ImageDraw.Draw(image).text((20, 20), emoji.rstrip("\ufe0f"), font=_font(), embedded_color=True)
    extent = image.getbbox()
    if extent is None:
        raise ValueError(f"{emoji}: not in {FONT}; install a newer {FONT_PACKAGE}, 2.042 or later")
    return image.crop(extent).convert("RGBa")


def _read_twitter(folder: Path, emoji: str) -> Image.Image:
    paths = [
        folder / "img/twitter/64" / ("-".join(f"{ord(character):04x}" for character in form) + ".png")
        for form in dict.fromkeys((emoji, emoji.rstrip("\ufe0f")))
    ]
    for path in paths:
        if path.is_file():
            with Image.open(path) as image:
                return image.convert("RGBA")
    raise FileNotFoundError(f"{paths[0]}: no such file; {_fetch_twitter()}")


def _fetch_twitter() -> str:
    return (
        f"fetch the images by `npm pack {TWITTER_PACKAGE} && tar -xzf {TWITTER_PACKAGE}-*.tgz`, which makes `package`"
    )


def _check_style(style: str) -> None:
    name, _, folder = style.partition(":")
    if style == "noto":
        _font()
    elif name != "twitter" or not folder:
        raise ValueError(f"style={style!r} must be noto or twitter:FOLDER.")
    elif not (Path(folder).expanduser() / "img/twitter/64").is_dir():
        raise FileNotFoundError(f"{folder}: no folder img/twitter/64 in it; {_fetch_twitter()}, and name that")


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    folders = [*filter(None, os.environ.get("REGARD_FONTS_DIR", "").split(os.pathsep)), *FONTS_DIRS]
    for folder in folders:
        for path in sorted(Path(folder).expanduser().rglob(FONT)):
            return ImageFont.truetype(str(path), _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    raise FileNotFoundError(
        f"{FONT} is not in {', '.join(folders)}. Install it (`apt-get install --no-install-recommends "
        f"{FONT_PACKAGE}`), or name a folder that has it in REGARD_FONTS_DIR"
    )


def _background(
    rng: random.Random, generator: np.random.Generator, image_size: int, colors: np.ndarray, grounds: Sequence[str]
) -> np.ndarray:
    """`(image_size, image_size, 3)`, of muted colours that differ from those of the objects."""

    def color() -> np.ndarray:
        levels = generator.uniform(70, 235, (6, 1)) + generator.uniform(-40, 40, (6, 3))
        nearest = np.linalg.norm(levels[:, None] - colors, axis=-1).min(1)
        return levels[nearest.argmax()]

    first = color()
    kind = rng.choice(grounds)
    pixels = np.empty((image_size, image_size, 3), np.float32)
    pixels[:] = first
    ramp = np.linspace(-0.5, 0.5, image_size, dtype=np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    slope = math.cos(angle) * ramp[None, :] + math.sin(angle) * ramp[:, None]
    if kind == "gradient":
        pixels += slope[..., None] * (color() - first).astype(np.float32)
    elif kind == "noise":
        channels = rng.choice((1, 3))
        grain = generator.standard_normal((image_size, image_size, channels), np.float32)
        pixels += rng.uniform(4, 12) * grain
    elif kind == "clouds":
        for cells in (rng.randint(3, 8), rng.randint(12, 40)):
            coarse = Image.fromarray(generator.normal(0, rng.uniform(4, 14), (cells, cells)).astype(np.float32))
            pixels += np.asarray(coarse.resize((image_size, image_size), Image.Resampling.BICUBIC))[..., None]
    elif kind == "pattern":
        waves = rng.uniform(4, 16)
        stripes = np.sin(2 * math.pi * waves * slope)
        if rng.random() < 0.5:
            crossing = math.cos(angle) * ramp[:, None] - math.sin(angle) * ramp[None, :]
            stripes = stripes * np.sin(2 * math.pi * waves * crossing)
        if rng.random() < 0.5:
            stripes = np.clip(4 * stripes, -1, 1)
        pixels += rng.uniform(6, 20) * stripes[..., None]
    return pixels


__all__ = [
    "CATEGORIES_TABLE",
    "COUNT_RANGES",
    "GROUNDS",
    "IMAGE_SIZE",
    "MIN_VISIBLE",
    "Category",
    "EmojiSceneDataset",
    "categories",
]
