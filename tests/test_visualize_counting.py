"""Pictures of counts: a numbered disc at each object, the path, the count, on any image."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from regard.panels import stack
from regard.visualize_counting import draw_count


def result_of(*points: tuple[float, float], **changes) -> dict[str, Any]:
    found = [{"x": x, "y": y, "score": 0.9} for x, y in points]
    return {"category": "cats", "count": len(found), "count_estimate": 2.3, "points": found, **changes}


def test_discs_lie_at_the_objects_blue_first_and_red_last():
    picture = np.asarray(draw_count(Image.new("RGB", (560, 400), "white"), result_of((100, 50), (300, 350)))).astype(
        int
    )
    assert picture.shape == (434, 560, 3)
    for (x, y), colour in (((100, 50), (37, 99, 235)), ((300, 350), (220, 38, 38))):
        assert (abs(picture[y - 7 : y + 7, x - 7 : x + 7] - colour).sum(-1) < 9).mean() > 0.3
    assert (picture[:400, 400:] == 255).all()
    assert picture[200, 190:210].min() < 255  # the path from one to the other


def test_the_count_the_truth_and_the_estimate_are_told():
    image = Image.new("RGB", (600, 100), "white")
    plain = np.asarray(draw_count(image, result_of((9, 9))))[100:]
    told = np.asarray(draw_count(image, result_of((9, 9)), truth=3))[100:]
    assert (plain < 128).any()
    assert (told != plain).any()


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (600, 3), (3, 600), (2000, 1500)])
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_any_image_is_drawn(size, mode):
    picture = draw_count(Image.new(mode, size), result_of((0, 0), size))
    assert picture.mode == "RGB"
    assert max(picture.size) < 1300


@pytest.mark.parametrize("category", ["🟥👩‍👩‍👧", "قطط", "a\x00b\n\x1b[2J", "x" * 9999])
def test_any_category_is_drawn(category):
    assert draw_count(Image.new("L", (64, 64)), result_of((3, 3), category=category)).width < 1300


def test_none_and_many_are_drawn():
    assert draw_count(Image.new("L", (64, 64)), result_of()).size == (560, 594)
    many = result_of(*[(x, y) for x in range(0, 500, 20) for y in range(0, 400, 20)])
    assert draw_count(Image.new("L", (500, 400)), many).mode == "RGB"


def test_pictures_are_stacked():
    page = stack([Image.new("RGB", (10, 20), "red"), Image.new("RGB", (30, 5), "blue")])
    assert page.size == (30, 25)
    assert page.getpixel((0, 24)) == (0, 0, 255)
    assert page.getpixel((20, 0)) == (255, 255, 255)
