"""Pictures of readings: sizes, colours, and each character where it was seen."""

import numpy as np
import pytest
from PIL import Image

from regard.visualize import confidence_colour, draw_reading

RED, BLUE = confidence_colour(0.0), confidence_colour(1.0)


def reading_of(text, boxes, scores=None):
    scores = scores or [1.0] * len(text)
    characters = [
        {"character": character, "score": score, "box": box}
        for character, score, box in zip(text, scores, boxes, strict=True)
    ]
    return {"text": text, "score": 0.5, "characters": characters}


def panels(picture, width, height, beside):
    """The image as shown, and the drawing, as arrays."""
    second = (32 + width, 16) if beside else (16, 32 + height)
    return [np.asarray(picture.crop((x, y, x + width, y + height))).astype(int) for x, y in ((16, 16), second)]


def where(panel, colour):
    """Centre (x, y) of the pixels of a colour."""
    rows, columns = np.nonzero(abs(panel - colour).max(-1) < 3)
    return (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2


@pytest.mark.parametrize(("size", "beside"), [((64, 64), True), ((40, 64), True), ((64, 20), False)])
def test_characters_stand_where_they_were_seen(size, beside):
    image = Image.new("L", size, 255)
    boxes = [[4, 4, 12, 12], [40, 4, 48, 12]] if size[0] == 64 else [[4, 4, 12, 12], [20, 40, 28, 48]]
    picture = draw_reading(image, reading_of("HI", boxes, [0.0, 1.0]), scale=8)
    width, height = size[0] * 8, size[1] * 8
    shown, drawn = panels(picture, width, height, beside)
    assert (shown == 255).all()
    for colour, (x0, y0, x1, y1) in zip((RED, BLUE), boxes, strict=True):
        assert where(drawn, colour) == pytest.approx((4 * (x0 + x1), 4 * (y0 + y1)), abs=12)


@pytest.mark.parametrize("background", [0, 40, 200, 255])
def test_dark_and_light(background):
    pixels = np.full((32, 32), background, dtype=np.uint8)
    pixels[20:28] = 255 - background
    picture = draw_reading(Image.fromarray(pixels), reading_of("o", [[4, 4, 16, 16]]), scale=10)
    shown, drawn = panels(picture, 320, 320, True)
    assert (shown[:150] == background).all(), "the image itself keeps its colours"
    assert drawn[250:255].min() > 180, "type is drawn on light ground"
    assert abs(drawn - BLUE).max(-1).min() < 3


@pytest.mark.parametrize("size", [(1, 1), (2000, 3), (3, 2000), (1, 600), (128, 128), (6000, 4000)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16", "CMYK"])
def test_any_image(size, mode):
    width, height = size
    picture = draw_reading(Image.new(mode, size), reading_of("ab", [[0, 0, width, height]] * 2))
    assert picture.mode == "RGB"
    assert max(picture.size) <= 2 * 640 + 100


def test_scale():
    image, reading = Image.new("L", (100, 100)), reading_of("", [])
    assert draw_reading(image, reading, scale=2).width == 2 * 200 + 3 * 16
    assert draw_reading(image, reading).width == 2 * 640 + 3 * 16
    assert draw_reading(image, reading, scale=1000).width == 2 * 4096 + 3 * 16
    assert draw_reading(image, reading, scale=0.01).size[0] >= 320
    for scale in (0, -1):
        with pytest.raises(ValueError, match="scale must be above 0"):
            draw_reading(image, reading, scale=scale)


def test_marks_for_what_has_no_glyph():
    box = [[10, 10, 22, 22]]
    image = Image.new("L", (32, 32), 255)
    drawings = {}
    for character in " \n漢\ufffd\x07\U0001f642e\t":
        _, drawn = panels(draw_reading(image, reading_of(character, box), scale=10), 320, 320, True)
        assert where(drawn, BLUE) == pytest.approx((160, 160), abs=30)
        drawings[character] = drawn
    assert not np.array_equal(drawings["e"], drawings["漢"])
    assert not np.array_equal(drawings[" "], drawings["\n"])
    for character in "\ufffd\x07\U0001f642":
        assert np.array_equal(drawings[character], drawings["漢"])


def test_unknown_places_are_left_out():
    nan = float("nan")
    image = Image.new("L", (32, 32), 255)
    empty = draw_reading(image, reading_of("", []))
    lost = draw_reading(image, reading_of("ab", [[nan] * 4, [nan] * 4]))
    np.testing.assert_array_equal(panels(empty, 640, 640, True)[1], panels(lost, 640, 640, True)[1])


def test_colours_of_confidence():
    assert confidence_colour(-1) == RED
    assert confidence_colour(2) == BLUE
    middle = np.array([confidence_colour(score) for score in np.linspace(0, 1, 11)])
    assert (abs(np.diff(middle, axis=0)).max(1) > 5).all(), "each step is seen"


def test_inputs_are_not_changed():
    image = Image.new("RGBA", (20, 20), (1, 2, 3, 100))
    before, reading = image.tobytes(), reading_of("ab", [[0, 0, 9, 9], [9, 0, 18, 9]])
    kept = reading_of("ab", [[0, 0, 9, 9], [9, 0, 18, 9]])
    draw_reading(image, reading)
    assert image.tobytes() == before
    assert reading == kept
