"""What the pictures of several models are made of: an image as a panel, maps as heat on it, bars and a scale."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from regard.processing.image_io import to_pil
from regard.visualize import FAINT, INK, PAPER, load_font

MARGIN, PANEL, LISTS, LINE = 16, 232, 288, 20  # pixels
_BAR, _PERCENT = 122, 54
_FRAME, _TRACK = (208, 213, 219), (236, 239, 242)
# From little to much attention: dark violet, red, orange, pale yellow. Lightness grows evenly, so grey print keeps it.
_HEAT = np.array([(22, 11, 57), (87, 16, 110), (152, 40, 103), (209, 65, 73), (243, 125, 21), (252, 225, 130)])


def fit_panel(image: Image.Image) -> Image.Image:
    """The image, of any mode and size, in RGB and as large as a panel holds."""
    image = to_pil(image)
    scale = PANEL / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    way = Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.BICUBIC  # few pixels stay visible as such
    return image.resize(size, way, reducing_gap=3.0).convert("RGB")


def draw_panel(page: Image.Image, place: tuple[int, int], title: str, panel: Image.Image) -> None:
    """Put a panel, centred in the width of one, under its title."""
    x, y = place
    draw = ImageDraw.Draw(page)
    draw.text((x, y + LINE // 2), title, font=load_font(14), fill=INK, anchor="lm")
    left, top = x + (PANEL - panel.width) // 2, y + LINE
    page.paste(panel, (left, top))
    draw.rectangle((left - 1, top - 1, left + panel.width, top + panel.height), outline=_FRAME)


def heat(shown: Image.Image, grid: np.ndarray) -> Image.Image:
    """The image in grey under the colours of a map `(rows, columns)` that spans it, from a quarter of the even share or
    less to four times or more."""
    smooth = Image.fromarray(np.asarray(grid, dtype=np.float32)).resize(shown.size, Image.Resampling.BILINEAR)
    grey = np.asarray(shown.convert("L"), dtype=np.float32)[..., None]
    return Image.fromarray((0.35 * grey + 0.65 * heat_colour(np.asarray(smooth))).astype(np.uint8))


def heat_colour(share: np.ndarray) -> np.ndarray:
    """RGB `(..., 3)` of shares, 1 being the even one."""
    place = np.log2(np.maximum(share, 1e-6)) / 4 + 0.5
    stops = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(place, stops, channel) for channel in _HEAT.T], axis=-1)


def draw_bars(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    title: str,
    entries: Sequence[tuple[str, float, Any]],
    width: int = LISTS,
) -> int:
    """A title and, for each (label, value in [0, 1], colour), a line with a bar; returns where they end."""
    x, y = place
    start = x + width - _PERCENT - _BAR
    draw.text((x, y + LINE // 2), title, font=load_font(14), fill=INK, anchor="lm")
    for index, (label, value, colour) in enumerate(entries, start=1):
        middle = y + index * (LINE + 2) + LINE // 2
        draw.text((x, middle), shorten(label, start - x - 8), font=load_font(13), fill=INK, anchor="lm")
        draw.rectangle((start, middle - 5, start + _BAR, middle + 5), fill=_TRACK)
        draw.rectangle((start, middle - 5, start + round(_BAR * value), middle + 5), fill=colour)
        draw.text((x + width, middle), f"{100 * value:.1f} %", font=load_font(13), fill=INK, anchor="rm")
    return y + (len(entries) + 1) * (LINE + 2)


def draw_scale(draw: ImageDraw.ImageDraw, place: tuple[int, int], title: str) -> None:
    """The colours of heat."""
    x, y = place
    draw.text((x, y + LINE // 2), title, font=load_font(14), fill=INK, anchor="lm")
    top = y + LINE + 2
    colours = heat_colour(2.0 ** np.linspace(-2, 2, LISTS)).astype(int).tolist()
    for column, colour in enumerate(colours):
        draw.line((x + column, top, x + column, top + 10), fill=tuple(colour))
    for share, text, anchor in ((0, "a quarter", "ls"), (0.5, "even", "ms"), (1, "four times", "rs")):
        draw.text((x + share * LISTS, top + 25), text, font=load_font(12), fill=FAINT, anchor=anchor)


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other, on one page."""
    page = Image.new("RGB", (max(each.width for each in pictures), sum(each.height for each in pictures)), PAPER)
    top = 0
    for picture in pictures:
        page.paste(picture, (0, top))
        top += picture.height
    return page


def shorten(text: str, width: float, size: int = 13) -> str:
    """A text that fits a width in pixels, in one line of type of a size."""
    font, text = load_font(size), " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    length = bisect_right(range(1, len(text)), width, key=lambda end: font.getlength(f"{text[:end]}..."))
    return f"{text[:length]}..."


__all__ = [
    "LINE",
    "LISTS",
    "MARGIN",
    "PANEL",
    "draw_bars",
    "draw_panel",
    "draw_scale",
    "fit_panel",
    "heat",
    "heat_colour",
    "shorten",
    "stack",
]
