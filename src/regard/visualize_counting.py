"""Pictures of counting: the path of the gaze over the image, a number at each object, and the count."""

from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageDraw

from regard.processing.image_io import to_pil
from regard.visualize import INK, load_font

_LEAST, _MOST = 560, 1120  # pixels of a picture's longer side
_BAND = 34
_FIRST, _LAST = (37, 99, 235), (220, 38, 38)  # from the first object to the last: blue to red


def draw_count(image: Image.Image, result: Mapping[str, Any], truth: int | None = None) -> Image.Image:
    """Draw a count.

    Args:
        image: the image that was counted in, of any mode and size.
        result: of the pipeline "object-counting": `category`, `count`, `count_estimate`, and `points` in pixels.
        truth: the true number, to be told beside the count.

    Returns:
        the image, enlarged or reduced, with a numbered disc at each point, blue at first and red at last, joined in
        the order of counting; below it the count, and the estimate made without pointing.
    """
    image = to_pil(image)
    scale = min(max(1.0, _LEAST / max(image.size)), _MOST / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    page = Image.new("RGB", (max(size[0], _LEAST // 2), size[1] + _BAND), "white")
    page.paste(image.resize(size, Image.Resampling.BICUBIC).convert("RGB"))
    draw = ImageDraw.Draw(page)
    points = [(point["x"] * scale, point["y"] * scale) for point in result["points"]]
    colours = [_between(index / max(1, len(points) - 1)) for index in range(len(points))]
    for start, end, colour in zip(points, points[1:], colours[1:], strict=False):
        draw.line((*start, *end), fill=colour, width=2)
    radius = 9 if len(points) <= 60 else 6
    for number, ((x, y), colour) in enumerate(zip(points, colours, strict=True), start=1):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline="white", width=1)
        draw.text((x, y), str(number), font=load_font(radius + 1), fill="white", anchor="mm")
    text = f"{result['category']}: {result['count']}"
    if truth is not None:
        text += f" (there are {truth})"
    text += f", about {result['count_estimate']:.1f} at a glance"
    draw.text((8, size[1] + _BAND // 2), text, font=load_font(16), fill=INK, anchor="lm")
    return page


def _between(share: float) -> tuple[int, ...]:
    return tuple(round(first + share * (last - first)) for first, last in zip(_FIRST, _LAST, strict=True))


__all__ = ["draw_count"]
