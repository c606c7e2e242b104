"""Generated images of text, with the place of every character.

Sample `i` of a [`RenderedTextDataset`] is a pure function of its seed, split, tiers and `i` (given the fonts and word
lists installed), so a training resumes by skipping indices and a benchmark is stated by one line. No design of type and
no sentence stands in two splits: fonts are divided by `rendered_text_fonts.json` (family by family, clones of one
design together), sentences and words by a hash.

Fonts and word lists come from Debian packages:
`xargs apt-get install -y --no-install-recommends < data/apt-packages.txt`. Two thirds of the fonts to train with are
web fonts: `python -m regard.data.web_fonts`.
"""

import functools
import itertools
import json
import math
import os
import random
import re
import string
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from datasets import IterableDataset

IMAGE_SIZE = 128
SPLITS = ("train", "validation", "test")
FONTS_TABLE = Path(__file__).with_name("rendered_text_fonts.json")
FONTS_DIRS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
WORD_LIST = Path("/usr/share/dict/american-english")
FORTUNES = Path("/usr/share/games/fortunes")
_NO_PROSE = set("ascii-art drugs ethnic knghtbrd men-women politics songs-poems translate-me zippy".split())
_CRUDE = re.compile(
    r"\b(sex|porn|rape|virgin|erotic|orgasm|nud[ei]|naked|breast|penis|vagina|clitor|genital|testic|masturb|prostitut|whor"
    r"|slut|bitch|bastard|damn|fuck|shit|piss|arse|ass(es)?\b|asshole|cunt|cock|dick\b|tits?\b|fart|bra\b|boob|nigg|fag"
    r"|negro|nazi|squaw|suicid)",
    re.IGNORECASE,
)
_MARGIN = 2
_MIN_X_HEIGHT = 3
_PRINTABLE = "".join(map(chr, range(32, 127)))
_INK = _PRINTABLE[1:]
_ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Tier:
    """Lengths in characters (line breaks included), type sizes in pixels per em, spacings in line heights; whether
    lines are broken, images tilted, blurred and noisy, and the type as large as the image lets it be."""

    characters: tuple[int, int]
    sizes: tuple[int, int]
    spacing: tuple[float, float] = (1.0, 1.4)
    wrap: bool = True
    degraded: bool = False
    filled: bool = False


TIERS = {
    "line": Tier(characters=(1, 24), sizes=(9, 28), wrap=False),
    "block": Tier(characters=(25, 128), sizes=(9, 16)),
    "dense": Tier(characters=(129, 512), sizes=(6, 9), spacing=(1.0, 1.1)),
    "noisy": Tier(characters=(4, 24), sizes=(10, 20), degraded=True),
}
# To learn from only: an image costs the same however little text it holds, so these are full of it.
TRAINING_TIERS = {
    "page": Tier(characters=(60, 300), sizes=(9, 24), filled=True),
    "noisy_page": Tier(characters=(30, 150), sizes=(10, 20), degraded=True, filled=True),
}
_ALL_TIERS = {**TIERS, **TRAINING_TIERS}


class RenderedTextDataset(Dataset):
    """Images of 128x128 grey pixels with printable ASCII text, and the box of each character.

    A sample is `{"pixel_values": PIL image, mode "L", "text": str, "boxes": [[x0, y0, x1, y1], ...], "tier": str,
    "font": file name}`. `text` has a newline where a line ends. There is one box per character, newlines included, in
    pixels: from the pen position to the next one, and from the line's ascent to its descent (of printable ASCII), so
    all characters of a line share their vertical centre. A newline's box is the four pixels after its line. In a tilted
    image boxes stay upright, about the turned centre.

    Tiers: `line` (1 to 24 characters, 9 to 28 px), `block` (25 to 128, wrapped, 9 to 16 px), `dense` (129 to 512, 6 to
    9 px, at least 3 px per lower-case x), `noisy` (4 to 24 letters and digits in groups, 10 to 20 px, tilted by up to 5
    degrees, blurred by up to 1 px, noise of up to 25 of 255 grey levels). In the train split three in ten images of
    `line`, `block` and `page` are slightly degraded as well, and in three in ten letters and words are set closer or
    further apart than the font has them. `page` and `noisy_page` are to learn from: like `block` and `noisy`, but the
    text fills the image, so that each holds several times more to learn.

    Args:
        split: "train", "validation" or "test".
        tiers: a tier's name, or tier -> weight.
        size: number of samples.
        seed: any integer.
        max_characters: steps `(index, limit)` in rising order: from sample `index` on, texts are no longer than
            `limit`, whatever the tier (before the first step: no limit).
        group_size: this many samples in a row are of one tier, so that a batch has texts of like lengths.
        fonts_dirs: folders searched (with their subfolders) for the split's fonts; default: the system's folders, and
            those in the environment variable REGARD_FONTS_DIR.
        fonts_table: JSON list of `{"family", "split", "package", "files"}`, and `"integrity"` where the package is
            npm's; default: `rendered_text_fonts.json`.

    Raises:
        ValueError: a split, tier, weight or step is wrong.
        FileNotFoundError: none of the split's fonts is found.
    """

    def __init__(
        self,
        split: str = "train",
        tiers: str | Mapping[str, float] = "line",
        size: int = 1_000_000,
        seed: int = 0,
        max_characters: Sequence[tuple[int, int]] | None = None,
        group_size: int = 1,
        fonts_dirs: Sequence[str | Path] | None = None,
        fonts_table: str | Path = FONTS_TABLE,
    ):
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; give one of {', '.join(SPLITS)}")
        weights = {tiers: 1.0} if isinstance(tiers, str) else dict(tiers)
        unknown = sorted(set(weights) - set(_ALL_TIERS))
        if unknown:
            raise ValueError(f"unknown tiers {unknown}; there are {', '.join(_ALL_TIERS)}")
        if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise ValueError(f"the weights of tiers must not be negative, nor all zero; got {weights}")
        steps = [(int(index), int(limit)) for index, limit in max_characters or ()]
        if steps != sorted(steps) or any(limit < 1 for _, limit in steps):
            raise ValueError(f"max_characters must rise by index, with limits of 1 or more; got {steps}")
        if group_size < 1:
            raise ValueError(f"group_size is {group_size}; give 1 or more")
        self.split, self.tiers, self.size, self.seed, self.max_characters = split, weights, size, seed, steps
        self.group_size = group_size
        self.families = _find_fonts(split, _fonts_dirs(fonts_dirs), str(fonts_table))
        self._sentences, self._words = _corpus(split)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(f"sample {index} of a data set of {self.size}")
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        group = random.Random(f"{self.seed}/{self.split}/tier/{index // self.group_size}")
        name = group.choices(list(self.tiers), list(self.tiers.values()))[0]
        tier = _ALL_TIERS[name]
        path = rng.choice(rng.choice(self.families))
        limit = min(tier.characters[1], self._limit(index))
        low = min(tier.characters[0], limit)
        varied = self.split == "train" and name in ("line", "block", "page")
        while True:
            text = self._text(rng, name, rng.randint(low, limit))
            sample = _render(rng, text, tier, path, low, limit, varied)
            if sample is not None:
                return {**sample, "tier": name, "font": os.path.basename(path)}

    def as_iterable_dataset(self, num_shards: int = 1) -> "IterableDataset":
        """The same samples, in the same order, as a streaming `datasets.IterableDataset` of `num_shards` shards."""
        from datasets import Features, Image, IterableDataset, List, Value

        if not 1 <= num_shards <= max(1, self.size):
            raise ValueError(f"num_shards is {num_shards}; give 1 to {self.size}, the number of samples")
        bounds = [self.size * shard // num_shards for shard in range(num_shards + 1)]
        features = Features(
            pixel_values=Image(mode="L"),
            text=Value("string"),
            boxes=List(List(Value("float32"))),
            tier=Value("string"),
            font=Value("string"),
        )
        shards = list(itertools.pairwise(bounds))
        return IterableDataset.from_generator(self._samples, features=features, gen_kwargs={"shards": shards})

    def _samples(self, shards: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        for start, stop in shards:
            for index in range(start, stop):
                yield self[index]

    def _limit(self, index: int) -> int:
        step = bisect_right(self.max_characters, index, key=lambda step: step[0]) - 1
        return self.max_characters[step][1] if step >= 0 else IMAGE_SIZE * IMAGE_SIZE

    def _text(self, rng: random.Random, tier: str, length: int) -> str:
        if _ALL_TIERS[tier].degraded:
            return _cut(_groups(rng, length, (2, 8), _ALPHANUMERIC), length)
        kind = rng.random()
        if kind < 0.55:
            text = rng.choice(self._sentences)
            start = rng.randrange(len(text)) if rng.random() < 0.5 else 0
            text = text[text.find(" ", start) + 1 :] if start else text
            while len(text) < length:
                text = f"{text} {rng.choice(self._sentences)}"
        elif kind < 0.75:
            text = _word(rng, self._words)
            while len(text) < length:
                text = f"{text} {_word(rng, self._words)}"
        else:
            text = _groups(rng, length, (1, 10), rng.choice((_INK, _INK, _ALPHANUMERIC, string.digits + ".,-+/:$%")))
        return _cut(text, length)


def _cut(text: str, length: int) -> str:
    """At most `length` characters, at the end of a word where one ends in the last fifth; never empty."""
    text = text.strip()
    if len(text) > length:
        end = text.rfind(" ", 0, length + 1)
        text = text[: end if end > 0.8 * length else length].strip()
    return text


def _groups(rng: random.Random, length: int, sizes: tuple[int, int], alphabet: str) -> str:
    groups, left = [], length
    while left > 0:
        groups.append("".join(rng.choices(alphabet, k=min(left, rng.randint(*sizes)))))
        left -= len(groups[-1]) + 1
    return " ".join(groups)


def _word(rng: random.Random, words: Sequence[str]) -> str:
    kind = rng.random()
    if kind < 0.06:
        word = str(rng.randrange(10 ** rng.randint(1, 6)))
    elif kind < 0.14:
        a, b, c = rng.randrange(100), rng.randrange(60), rng.randrange(1000, 10_000)
        word = rng.choice(
            (
                f"{a}.{b:02}",
                f"${a}.{b:02}",
                f"{a}%",
                f"{a % 24}:{b:02}",
                f"{c}-{a % 12 + 1:02}-{b % 28 + 1:02}",
                f"#{c}",
                f"+{c}",
            )
        )
    else:
        word = rng.choice(words)
        case = rng.random()
        if case < 0.2:
            word = word.capitalize()
        elif case < 0.32:
            word = word.upper()
        elif case < 0.36:
            word = "".join(rng.choice((letter.lower(), letter.upper())) for letter in word)
        elif case < 0.42:
            word = f"{word}{rng.choice('-_/@&=.')}{rng.choice(words)}"
    mark = rng.random()
    if mark < 0.2:
        word += rng.choice(",.,.;:!?")
    elif mark < 0.26:
        word = rng.choice(("({})", '"{}"', "'{}'", "[{}]", "<{}>", "{{{}}}", "*{}*")).format(word)
    return word


def _split_of(text: str) -> str:
    """Three quarters of all texts are train, a tenth validation, the rest test."""
    part = zlib.crc32(text.encode()) % 20
    return "train" if part < 15 else "validation" if part < 17 else "test"


@functools.lru_cache(maxsize=len(SPLITS))
def _corpus(split: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The split's sentences and words, from CPython's manual and, where installed, `fortunes` and `wamerican`."""
    from pydoc_data.topics import topics

    paragraphs = [part for topic in topics.values() for part in topic.split("\n\n") if not part.startswith("   ")]
    for path in sorted(FORTUNES.glob("*")):
        if path.suffix == "" and path.name not in _NO_PROSE:
            paragraphs += path.read_text("utf-8", "replace").split("\n%\n")
    sentences = {
        sentence: None
        for paragraph in paragraphs
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z\"'(])", " ".join(paragraph.split()))
        if 20 <= len(sentence) <= 300 and sentence.isascii() and sentence.isprintable() and "***" not in sentence
        if not re.search(r"([-=+_*~.#|/\\^]) ?\1 ?\1 ?\1", sentence) and not _CRUDE.search(sentence)
    }
    words = (
        WORD_LIST.read_text("utf-8").split() if WORD_LIST.is_file() else re.findall(r"[A-Za-z]+", " ".join(sentences))
    )
    words = {word: None for word in words if word.isascii() and not word.endswith("'s") and not _CRUDE.search(word)}
    return (
        tuple(sentence for sentence in sentences if _split_of(sentence) == split),
        tuple(word for word in words if _split_of(word.lower()) == split),
    )


def _fonts_dirs(fonts_dirs: Sequence[str | Path] | None) -> tuple[str, ...]:
    if fonts_dirs is not None:
        return tuple(str(folder) for folder in fonts_dirs)
    extra = [folder for folder in os.environ.get("REGARD_FONTS_DIR", "").split(os.pathsep) if folder]
    return (*extra, *(os.path.expanduser(folder) for folder in FONTS_DIRS))


@functools.lru_cache
def _find_fonts(split: str, fonts_dirs: tuple[str, ...], fonts_table: str) -> tuple[tuple[str, ...], ...]:
    """Paths of the split's fonts that are here, one tuple a family, in the table's order."""
    found: dict[str, str] = {}
    for folder in fonts_dirs:
        for parent, _, names in os.walk(folder, followlinks=True):
            for name in names:
                path = os.path.join(parent, name)
                if name not in found or path < found[name]:
                    found[name] = path
    table = [row for row in json.loads(Path(fonts_table).read_text("utf-8")) if row["split"] == split]
    families = [tuple(found[name] for name in row["files"] if name in found) for row in table]
    families = tuple(family for family in families if family)
    if not families:
        packages = " ".join(sorted({row["package"] for row in table if "integrity" not in row}))
        raise FileNotFoundError(
            f"no font of the {split} split is in {', '.join(fonts_dirs)}. Install some (`apt-get install "
            f"--no-install-recommends {packages}`), or name folders that have them in fonts_dirs or REGARD_FONTS_DIR"
        )
    return families


@dataclass(frozen=True)
class _Metrics:
    """A font's measures for printable ASCII, per pixel of type size."""

    ascent: float
    descent: float
    x_height: float
    mean_advance: float


@functools.cache
def _metrics(path: str) -> _Metrics:
    size = 64
    font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    _, top, _, bottom = font.getbbox(_INK, anchor="ls")
    x_height = -font.getbbox("x", anchor="ls")[1]
    return _Metrics(-top / size, bottom / size, x_height / size, font.getlength("etaoinshrdlu 0Te") / 16 / size)


class _Face:
    """One font at one size: ascent and descent of printable ASCII in whole pixels, and a line's pen positions."""

    def __init__(self, path: str, size: int):
        self.font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
        metrics = _metrics(path)
        self.ascent, self.descent = math.ceil(metrics.ascent * size), math.ceil(metrics.descent * size)
        self.height = self.ascent + self.descent
        self._advances: dict[str, float] = {}
        self._inks: dict[str, tuple[float, float]] = {}

    def _advance(self, characters: str) -> float:
        advance = self._advances.get(characters)
        if advance is None:
            advance = self._advances[characters] = self.font.getlength(characters)
        return advance

    def pens(self, text: str, set_apart: "_SetApart | None" = None) -> list[float]:
        """Pen positions before each character and after the last, in pixels, kerned as Pillow's basic layout does."""
        advances = [self._advance(character) for character in text]
        if self.font.getlength(text) != sum(advances):
            for i, (a, b) in enumerate(itertools.pairwise(text)):
                advances[i] = self._advance(a + b) - self._advance(b)
        if set_apart is not None:
            letter, space = set_apart.letter * self.font.size, set_apart.space
            widths = zip(advances, text, strict=True)
            advances = [max(1.0, width * space if character == " " else width + letter) for width, character in widths]
        return [0.0, *itertools.accumulate(advances)]

    def overhang(self, character: str) -> tuple[float, float]:
        """Pixels of ink left of the pen and right of the next pen position; 0 where there are none."""
        ink = self._inks.get(character)
        if ink is None:
            left, _, right, _ = self.font.getbbox(character, anchor="ls")
            ink = self._inks[character] = (max(0.0, -left), max(0.0, right - self._advance(character)))
        return ink

    def lines(self, text: str, pens: list[float], width: float) -> list["_Line"]:
        """Lines of at most `width` pixels, broken at spaces, and inside words that are wider than a line."""
        lines, start = [], 0
        while start < len(text):
            end = len(text)
            if pens[-1] - pens[start] > width:
                end = max(start + 1, bisect_right(pens, pens[start] + width) - 1)
                space = text.rfind(" ", start, end + 1)
                end = space if space > start else end
            own = [pen - pens[start] for pen in pens[start:end]]
            lines.append(_Line(text[start:end], [*own, own[-1] + self._advance(text[end - 1])]))
            start = end + 1 if text[end : end + 1] == " " else end
        return lines


class _SetApart(NamedTuple):
    """How letters and words are spaced: what is added after a letter, in font sizes, and by what spaces are widened."""

    letter: float
    space: float


class _Line(NamedTuple):
    """A line's text, and its pen positions in pixels: 0 before the first character, ..., its width after the last."""

    text: str
    pens: list[float]


_face = functools.lru_cache(maxsize=1024)(_Face)


@dataclass(frozen=True)
class _Layout:
    """Lines in one size, `step` pixels apart, with ink from `left` to `right` pixels of the first pen position."""

    face: _Face
    lines: list[_Line]
    step: int
    left: float
    right: float

    @property
    def height(self) -> int:
        return self.step * (len(self.lines) - 1) + self.face.height

    @property
    def text(self) -> str:
        return "\n".join(line.text for line in self.lines)


def _lay_out(face: _Face, lines: list[_Line], spacing: float) -> _Layout:
    left = -max(face.overhang(line.text[0])[0] for line in lines)
    right = max(line.pens[-1] + face.overhang(line.text[-1])[1] for line in lines)
    return _Layout(face, lines, round(spacing * face.height), left, right)


def _fit(
    rng: random.Random,
    text: str,
    tier: Tier,
    path: str,
    room: float,
    scale: int,
    low: int,
    limit: int,
    set_apart: _SetApart | None,
) -> _Layout | None:
    """The text in a random size that fits in a square of `room` pixels, shortened where even the smallest does not."""
    metrics = _metrics(path)
    smallest, largest = tier.sizes
    smallest = max(smallest, min(largest, math.ceil(_MIN_X_HEIGHT / metrics.x_height)))
    spacing = rng.uniform(*tier.spacing)
    narrow = 1.0 if tier.characters[0] > 128 or tier.filled else rng.uniform(0.55, 1.0)
    while len(text) >= low:
        width = len(text) * (metrics.mean_advance + (set_apart.letter if set_apart else 0.0))
        if tier.wrap:
            fitting = 0.95 * room / math.sqrt(width * spacing * (metrics.ascent + metrics.descent))
        else:
            fitting = room / width
        most_legible = max(smallest, min(largest, int(fitting / scale)))
        size = most_legible if tier.filled else rng.randint(smallest, most_legible)
        while size >= smallest:
            face = _face(path, size * scale)
            pens = face.pens(text, set_apart)
            most = room * narrow if tier.degraded else min(room * narrow, max(room / 3, 0.8 * pens[-1]))
            lines = face.lines(text, pens, most) if tier.wrap else [_Line(text, pens)]
            layout = _lay_out(face, lines, spacing)
            if layout.height <= room and layout.right - layout.left <= room and len(layout.text) <= limit:
                return layout
            if tier.wrap and narrow < 0.95:
                narrow = 0.95
            else:
                size -= 1
        text = _cut(text, min(len(text) - 1, int(0.92 * len(text))))
    return None


def _greys(rng: random.Random) -> tuple[int, int]:
    """Foreground and background, at least 90 levels apart, light on dark in half of the cases."""
    if rng.random() < 0.35:
        dark, light = rng.randint(0, 30), rng.randint(225, 255)
    else:
        dark = rng.randint(0, 165)
        light = rng.randint(dark + 90, 255)
    return (dark, light) if rng.random() < 0.5 else (light, dark)


def _render(
    rng: random.Random, text: str, tier: Tier, path: str, low: int, limit: int, varied: bool
) -> dict[str, Any] | None:
    """Image, text and boxes, or None where the text cannot be set with `low` to `limit` characters."""
    angle = blur = noise = slope = stroke = 0.0
    scale, set_apart = 1, None
    if tier.degraded:
        angle, blur, noise = rng.uniform(-5, 5), rng.uniform(0, 1), rng.uniform(0, 25)
    elif varied and rng.random() < 0.3:
        scale = rng.choice((1, 2, 3))
        angle = rng.uniform(-2, 2) if rng.random() < 0.3 else 0.0
        blur = rng.uniform(0, 0.7) if rng.random() < 0.5 else 0.0
        noise = rng.uniform(0, 10) if rng.random() < 0.5 else 0.0
        slope = rng.uniform(-20, 20) if rng.random() < 0.4 else 0.0
        stroke = rng.uniform(0.1, 0.4) if rng.random() < 0.3 else 0.0
    if varied and rng.random() < 0.3:
        set_apart = _SetApart(rng.uniform(-0.04, 0.12), rng.uniform(0.6, 1.8))
    radians = math.radians(angle)
    margin = _MARGIN + math.ceil(IMAGE_SIZE / 2 * abs(math.sin(radians)))
    room = (IMAGE_SIZE - 2 * margin) * scale
    layout = _fit(rng, text, tier, path, room, scale, low, limit, set_apart)
    if layout is None:
        return None

    face, side = layout.face, IMAGE_SIZE * scale
    x0 = margin * scale + rng.randint(0, int(room - layout.right + layout.left)) - layout.left
    y0 = margin * scale + rng.randint(0, room - layout.height)
    align = rng.choices((0.0, 0.5, 1.0), (0.7, 0.2, 0.1))[0]
    longest = max(line.pens[-1] for line in layout.lines)

    ink = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(ink)
    boxes: list[list[float]] = []
    for row, (line, pens) in enumerate(layout.lines):
        x = round(x0 + align * (longest - pens[-1]))
        y = y0 + row * layout.step
        pieces = [(0.0, line)] if set_apart is None else zip(pens, line, strict=False)
        for pen, piece in pieces:
            place = (x + pen, y + face.ascent)
            draw.text(place, piece, fill=255, font=face.font, anchor="ls", stroke_width=stroke * scale)
        boxes += [[x + start, y, x + end, y + face.height] for start, end in itertools.pairwise(pens)]
        if row + 1 < len(layout.lines):
            boxes.append([x + pens[-1], y, x + pens[-1] + 4 * scale, y + face.height])
    if scale > 1:
        ink = ink.reduce(scale)
        boxes = [[edge / scale for edge in box] for box in boxes]
    if angle:
        ink = ink.rotate(angle, Image.Resampling.BICUBIC)
        boxes = [_turn(box, radians) for box in boxes]
    boxes = [[x0, y0, min(x1, float(IMAGE_SIZE)), y1] for x0, y0, x1, y1 in boxes]

    foreground, background = _greys(rng)
    if slope:
        ramp = np.linspace(-0.5, 0.5, IMAGE_SIZE, dtype=np.float32) * slope
        ground = np.clip(background + (ramp[None, :] if rng.random() < 0.5 else ramp[:, None]), 0, 255)
        image = _image(ground + (foreground - ground) * (np.asarray(ink, np.float32) / 255))
    else:
        image = ink.point([round(background + (foreground - background) * level / 255) for level in range(256)])
    if blur:
        image = image.filter(ImageFilter.GaussianBlur(blur))
    if noise:
        generator = np.random.default_rng(rng.getrandbits(64))
        image = _image(np.asarray(image) + noise * generator.standard_normal((IMAGE_SIZE, IMAGE_SIZE), np.float32))
    return {"pixel_values": image, "text": layout.text, "boxes": boxes}


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(pixels, 0, 255) + 0.5).astype(np.uint8))


def _turn(box: list[float], radians: float) -> list[float]:
    """The box, upright, about its centre turned counter-clockwise round the image's centre."""
    centre = IMAGE_SIZE / 2
    x, y = (box[0] + box[2]) / 2 - centre, (box[1] + box[3]) / 2 - centre
    dx = x * math.cos(radians) + y * math.sin(radians) - x
    dy = y * math.cos(radians) - x * math.sin(radians) - y
    return [box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy]


__all__ = ["IMAGE_SIZE", "SPLITS", "TIERS", "RenderedTextDataset", "Tier"]
