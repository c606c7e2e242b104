"""Pictures that show what was read, and from where."""

import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import median
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from regard.processing.image_io import to_pil

PAPER, INK, FAINT = (255, 255, 255), (38, 43, 51), (150, 158, 168)
# Confidences and their colours: told apart with red-green blindness too, and dark enough on white.
_STOPS = (0.0, 0.5, 0.8, 1.0)
_COLOURS = ((206, 34, 52), (226, 134, 16), (30, 146, 138), (16, 76, 150))
_MARGIN, _LONGEST, _SHORTEST, _LARGEST = 16, 640, 48, 4096
_REPLACEMENT = "\ufffd"


def draw_reading(image: Image.Image, reading: Mapping[str, Any], scale: float | None = None) -> Image.Image:
    """Draw an image and, beside or below it, each character that was read from it, where the model looked.

    Colour tells confidence, from red (unsure) over amber and teal to blue (sure). A dot is a space, an arrow a line
    break, and a small box a character that Pillow's built-in font lacks.

    Args:
        image: the image that was read, of any mode and size.
        reading: what the pipeline "text-recognition" returns: `text`, `score` and `characters`, whose boxes are in
            pixels of `image`.
        scale: pixels of the picture for a pixel of the image; default: the longest side becomes 640.

    Returns:
        An RGB picture; its panels are at most 4,096 pixels long, whatever the scale.

    Raises:
        ValueError: `scale` is not above 0.
    """
    seen = to_pil(image)
    longest = max(seen.size)
    if scale is None:
        scale = _LONGEST / longest
    elif not scale > 0:
        raise ValueError(f"scale must be above 0, but is {scale}")
    scale = min(scale, _LARGEST / longest)
    width, height = (max(1, round(side * scale)) for side in seen.size)
    enlarged = seen.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0).convert("RGB")

    panel = (max(width, _SHORTEST), max(height, _SHORTEST))
    offset = ((panel[0] - width) // 2, (panel[1] - height) // 2)
    left = Image.new("RGB", panel, _border_colour(enlarged))
    left.paste(enlarged, offset)
    right = _draw_characters(_ghost(left), reading["characters"], scale, offset)

    beside = panel[1] >= panel[0] * 0.75
    body = (2 * panel[0] + _MARGIN, panel[1]) if beside else (panel[0], 2 * panel[1] + _MARGIN)
    caption = _draw_caption(reading, max(body[0], 320))
    page = Image.new("RGB", (max(body[0], 320) + 2 * _MARGIN, body[1] + caption.height + 3 * _MARGIN), PAPER)
    page.paste(left, (_MARGIN, _MARGIN))
    second = (_MARGIN + panel[0] + _MARGIN, _MARGIN) if beside else (_MARGIN, _MARGIN + panel[1] + _MARGIN)
    page.paste(right, second)
    frame = ImageDraw.Draw(page)
    for x, y in ((_MARGIN, _MARGIN), second):
        frame.rectangle((x - 1, y - 1, x + panel[0], y + panel[1]), outline=(208, 213, 219))
    page.paste(caption, (_MARGIN, 2 * _MARGIN + body[1]))
    return page


def confidence_colour(score: float) -> tuple[int, int, int]:
    """RGB of a confidence in [0, 1]: red, amber, teal, blue."""
    red, green, blue = (round(float(np.interp(score, _STOPS, channel))) for channel in zip(*_COLOURS, strict=True))
    return red, green, blue


def _border_colour(image: Image.Image) -> tuple[int, int, int]:
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    red, green, blue = np.median(border, axis=0).astype(int).tolist()
    return red, green, blue


def _ghost(image: Image.Image) -> Image.Image:
    """The image as a faint light background: a dark page is inverted, so that coloured type is legible on it."""
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    if np.median(grey) < 128:
        grey = 255 - grey
    return Image.fromarray((255 - 0.2 * (255 - grey)).astype(np.uint8)).convert("RGB")


def _draw_characters(
    page: Image.Image, characters: Sequence[Mapping[str, Any]], scale: float, offset: tuple[int, int]
) -> Image.Image:
    draw = ImageDraw.Draw(page)
    for line in _lines(characters):
        boxes = np.array([item["box"] for item in line], dtype=np.float64) * scale  # (characters, 4)
        boxes += [*offset, *offset]
        size = _type_size(boxes)
        for item, (x0, y0, x1, y1) in zip(line, boxes, strict=True):
            if not np.isfinite([x0, y0, x1, y1]).all():
                continue
            centre, colour = ((x0 + x1) / 2, (y0 + y1) / 2), confidence_colour(item["score"])
            _draw_character(draw, item["character"], centre, size, colour)
    return page


def _lines(characters: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    lines = [[]]
    for item in characters:
        lines[-1].append(item)
        if item["character"] == "\n":
            lines.append([])
    return [line for line in lines if line]


def _type_size(boxes: np.ndarray) -> int:
    """Type size in pixels that fits the characters' pitch, and, where there is none, the regions' height."""
    heights = boxes[:, 3] - boxes[:, 1]
    height = float(np.nanmedian(heights)) if np.isfinite(heights).any() else 12.0
    steps = np.diff((boxes[:, 0] + boxes[:, 2]) / 2)
    pitches = [float(step) for step in steps if step > 0.5]
    size = 1.9 * median(pitches) if pitches else height
    return round(min(max(size, 7.0), max(2.0 * height, 7.0), 160.0))


def _draw_character(draw: ImageDraw.ImageDraw, character: str, centre, size: int, colour) -> None:
    x, y = centre
    half = max(2.0, 0.22 * size)
    if character in " \t\u00a0\u3000":
        radius = max(1.0, 0.07 * size)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif character in "\n\r":
        line = max(1, round(0.06 * size))
        draw.line((x + half, y - half, x + half, y + half / 2, x - half, y + half / 2), fill=colour, width=line)
        draw.line((x, y, x - half, y + half / 2, x, y + half), fill=colour, width=line)
    elif _can_draw(character):
        draw.text((x, y), character, font=load_font(size), fill=colour, anchor="mm")
    else:
        draw.rectangle((x - half, y - 1.5 * half, x + half, y + 1.5 * half), outline=colour, width=max(1, size // 16))


def _draw_caption(reading: Mapping[str, Any], width: int) -> Image.Image:
    characters = reading["characters"]
    number = f"{len(characters):,} character{'' if len(characters) == 1 else 's'}"
    caption = Image.new("RGB", (width, 22), PAPER)
    draw = ImageDraw.Draw(caption)
    draw.text(
        (0, 11), f"{number}, confidence {100 * reading['score']:.0f} %", font=load_font(15), fill=INK, anchor="lm"
    )
    bar, right = 72, width - 34
    for x in range(bar):
        draw.line((right - bar + x, 6, right - bar + x, 15), fill=confidence_colour(x / (bar - 1)))
    draw.text((right - bar - 6, 11), "0", font=load_font(13), fill=FAINT, anchor="rm")
    draw.text((right + 6, 11), "100", font=load_font(13), fill=FAINT, anchor="lm")
    return caption


@lru_cache(maxsize=64)
def load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in font in a size in pixels."""
    return ImageFont.load_default(size)


@lru_cache(maxsize=4096)
def _can_draw(character: str) -> bool:
    """Whether the built-in font has a glyph of its own for the character, and not its stand-in for missing ones."""
    if character == _REPLACEMENT or len(character) != 1 or unicodedata.category(character)[0] in "CZ":
        return False
    return _glyph(character) not in (_glyph("\U0010fffe"), _glyph(""))


def _glyph(character: str) -> bytes:
    picture = Image.new("L", (64, 48))
    ImageDraw.Draw(picture).text((16, 8), character, font=load_font(32), fill=255)
    return picture.tobytes()


__all__ = ["confidence_colour", "draw_reading", "load_font"]
