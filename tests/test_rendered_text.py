import itertools
import json
import math
import subprocess
import sys
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFont

from regard.data.rendered_text import (
    FONTS_TABLE,
    IMAGE_SIZE,
    SPLITS,
    TIERS,
    TRAINING_TIERS,
    RenderedTextDataset,
    _Face,
    _fit,
    _SetApart,
    _turn,
)


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    """Arguments for fonts that are always here: Pillow's own, as the one font of each split."""
    folder = tmp_path_factory.mktemp("fonts")
    own = ImageFont.load_default(10)
    assert isinstance(own, ImageFont.FreeTypeFont)
    table = []
    for split in SPLITS:
        (folder / f"{split}.ttf").write_bytes(own.font_bytes)
        table.append({"family": "Own", "split": split, "package": "fonts-own", "files": [f"{split}.ttf", "absent.ttf"]})
    (folder / "table.json").write_text(json.dumps(table))
    return {"fonts_dirs": [folder], "fonts_table": folder / "table.json"}


def digest(sample):
    pixels = np.asarray(sample["pixel_values"])
    return zlib.crc32(repr((sample["text"], sample["boxes"], sample["tier"])).encode(), zlib.crc32(pixels.tobytes()))


def samples(count, *args, **kwargs):
    dataset = RenderedTextDataset(*args, **kwargs)
    return [dataset[index] for index in range(count)]


def is_printable(text):
    return all(32 <= ord(character) < 127 or character == "\n" for character in text)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("tier", TIERS)
def test_samples_keep_what_their_tier_says(tier, split, fonts):
    low, high = TIERS[tier].characters
    lengths = []
    for sample in samples(12 if tier == "dense" else 60, split, tier, seed=3, **fonts):
        text, boxes, image = sample["text"], sample["boxes"], sample["pixel_values"]
        assert (image.size, image.mode) == ((IMAGE_SIZE, IMAGE_SIZE), "L")
        assert (sample["tier"], sample["font"]) == (tier, f"{split}.ttf")
        assert low <= len(text) <= high
        assert len(boxes) == len(text)
        assert is_printable(text)
        assert text == text.strip()
        assert not any(pair in text for pair in ("  ", "\n\n", " \n", "\n "))
        assert all(0 <= x0 < x1 <= IMAGE_SIZE and 0 <= y0 < y1 <= IMAGE_SIZE for x0, y0, x1, y1 in boxes)
        assert ("\n" in text) <= (tier != "line")
        lengths.append(len(text))
    assert max(lengths) - min(lengths) > (high - low) / 3
    if tier == "noisy":
        assert all(character.isalnum() or character in " \n" for character in text)


@pytest.mark.parametrize(("tier", "like"), [("page", "block"), ("noisy_page", "noisy")])
def test_pages_are_full(tier, like, fonts):
    """Several times the characters of the tier that they prepare for, in the largest type that has room."""
    low, high = TRAINING_TIERS[tier].characters
    full, other = (samples(40, "train", name, seed=3, **fonts) for name in (tier, like))
    assert all(low <= len(sample["text"]) <= high for sample in full)
    assert sum(len(sample["text"]) for sample in full) > 1.8 * sum(len(sample["text"]) for sample in other)
    for sample in full:
        assert all(0 <= x0 < x1 <= IMAGE_SIZE and 0 <= y0 < y1 <= IMAGE_SIZE for x0, y0, x1, y1 in sample["boxes"])
        assert len(sample["boxes"]) == len(sample["text"])
    heights = [max(box[3] for box in sample["boxes"]) - min(box[1] for box in sample["boxes"]) for sample in full]
    assert np.median(heights) > (0.6 if tier == "noisy_page" else 0.75) * IMAGE_SIZE


def is_plain(sample) -> bool:
    border = np.asarray(sample["pixel_values"])[[0, -1]]
    return border.min() == border.max()


def assert_boxes_hold_their_characters(sample):
    pixels = np.asarray(sample["pixel_values"], np.int16)
    ink = abs(pixels - np.bincount(pixels.ravel()).argmax()) > 20
    seen = np.zeros_like(ink)
    for character, (x0, y0, x1, y1) in zip(sample["text"], sample["boxes"], strict=True):
        if character not in " \n":
            x0, y0, x1, y1 = int(x0), int(y0), math.ceil(x1), math.ceil(y1)
            assert ink[y0:y1, x0:x1].any(), character
            seen[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1] = True
    assert not (ink & ~seen).any()


@pytest.mark.parametrize("tier", ["line", "block", "dense"])
def test_each_box_holds_its_character(tier, fonts):
    """Ink in every box of a character that has any, and none farther than a pixel from such a box."""
    for sample in samples(8, "test", tier, seed=1, **fonts):
        assert_boxes_hold_their_characters(sample)


@pytest.mark.parametrize("set_apart", [_SetApart(-0.04, 0.6), _SetApart(0.12, 1.8)])
def test_letters_and_spaces_are_widened(set_apart, fonts):
    font = str(fonts["fonts_dirs"][0] / "test.ttf")
    plain = _Face(font, 20).pens("ab cd")
    spaced = _Face(font, 20).pens("ab cd", set_apart)
    widths, plain_widths = np.diff(spaced), np.diff(plain)
    assert widths[[0, 1, 3, 4]] == pytest.approx(plain_widths[[0, 1, 3, 4]] + 20 * set_apart.letter)
    assert widths[2] == pytest.approx(plain_widths[2] * set_apart.space)


def test_training_images_are_set_closer_or_further_apart(fonts, monkeypatch):
    drawn = []

    def fit(*arguments):
        drawn.append(arguments[-1])
        return _fit(*arguments)

    monkeypatch.setattr("regard.data.rendered_text._fit", fit)
    for sample in samples(100, "train", "line", **fonts):
        if drawn[-1] is not None and is_plain(sample):
            assert_boxes_hold_their_characters(sample)
    assert 15 < sum(one is not None for one in drawn) < 45
    drawn.clear()
    for split, tier in (("test", "line"), ("train", "noisy"), ("train", "dense")):
        list(samples(20, split, tier, **fonts))
    assert set(drawn) == {None}


def test_boxes_follow_the_pen_with_kerning_and_share_a_line_s_height(fonts):
    face = _Face(str(fonts["fonts_dirs"][0] / "test.ttf"), 20)
    for text in ("AVATAR To. We, LT yo", "plain"):
        assert face.pens(text) == pytest.approx([face.font.getlength(text[:end]) for end in range(len(text) + 1)])
    for sample in samples(10, "test", "block", **fonts):
        lines = sample["text"].split("\n")
        starts = itertools.accumulate((len(line) + 1 for line in lines), initial=0)
        for line, start in zip(lines, starts, strict=False):
            boxes = sample["boxes"][start : start + len(line) + 1]
            assert len({(y0, y1) for _, y0, _, y1 in boxes}) == 1
            assert all(left[2] == pytest.approx(right[0]) for left, right in itertools.pairwise(boxes))


@pytest.mark.parametrize("angle", [5.0, -3.0])
def test_boxes_turn_as_images_do(angle):
    for x, y in ((20, 100), (64, 64), (110, 30)):
        dot = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
        dot.paste(255, (x, y, x + 4, y + 6))
        turned = np.asarray(dot.rotate(angle, Image.Resampling.BICUBIC), np.float64)
        x0, y0, x1, y1 = _turn([x, y, x + 4, y + 6], math.radians(angle))
        assert (x1 - x0, y1 - y0) == pytest.approx((4, 6))
        rows, columns = np.indices(turned.shape) + 0.5
        centre = [(columns * turned).sum() / turned.sum(), (rows * turned).sum() / turned.sum()]
        assert centre == pytest.approx([(x0 + x1) / 2, (y0 + y1) / 2], abs=0.1)


def test_a_sample_depends_on_seed_split_and_index_alone(fonts):
    arguments = {"tiers": {"line": 1, "block": 1, "noisy": 1}, **fonts}
    dataset = RenderedTextDataset("train", seed=5, **arguments)
    again = RenderedTextDataset("train", seed=5, size=50, **arguments)
    digests = [digest(dataset[index]) for index in range(20)]
    assert [digest(again[index]) for index in reversed(range(20))] == digests[::-1]
    assert len(set(digests)) == 20
    for other in (RenderedTextDataset("train", seed=6, **arguments), RenderedTextDataset("test", seed=5, **arguments)):
        assert not {digest(other[index]) for index in range(20)} & set(digests)

    code = (
        "import sys, zlib, numpy as np\n"
        "from regard.data.rendered_text import RenderedTextDataset\n"
        "tiers = {'line': 1, 'block': 1, 'noisy': 1}\n"
        "data = RenderedTextDataset('train', tiers, seed=5, fonts_dirs=[sys.argv[1]], fonts_table=sys.argv[2])\n"
        "for i in (19, 7):\n"
        "    s = data[i]\n"
        "    pixels = zlib.crc32(np.asarray(s['pixel_values']).tobytes())\n"
        "    print(zlib.crc32(repr((s['text'], s['boxes'], s['tier'])).encode(), pixels))\n"
    )
    command = [sys.executable, "-c", code, str(fonts["fonts_dirs"][0]), str(fonts["fonts_table"])]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [int(line) for line in output.split()] == [digests[19], digests[7]]


def test_tiers_are_drawn_by_weight(fonts):
    drawn = Counter(sample["tier"] for sample in samples(200, "train", {"line": 3, "noisy": 1, "block": 0}, **fonts))
    assert set(drawn) == {"line", "noisy"}
    assert 120 < drawn["line"] < 180


def test_a_group_is_of_one_tier(fonts):
    drawn = [sample["tier"] for sample in samples(40, "train", {"line": 1, "noisy": 1}, group_size=4, **fonts)]
    groups = [set(drawn[start : start + 4]) for start in range(0, 40, 4)]
    assert all(len(group) == 1 for group in groups)
    assert set.union(*groups) == {"line", "noisy"}


def test_lengths_grow_by_the_steps_of_max_characters(fonts):
    steps = [(0, 2), (30, 16), (60, 40), (90, 1000)]
    dataset = RenderedTextDataset("train", {"line": 1, "block": 1}, max_characters=steps, **fonts)
    lengths = [len(dataset[index]["text"]) for index in range(150)]
    assert max(lengths[:30]) <= 2
    assert 2 < max(lengths[30:60]) <= 16
    assert 16 < max(lengths[60:90]) <= 40
    assert 40 < max(lengths[90:]) <= 128
    free = RenderedTextDataset("train", {"line": 1, "block": 1}, **fonts)
    assert [digest(dataset[index]) for index in range(90, 110)] == [digest(free[index]) for index in range(90, 110)]


def test_half_of_the_images_are_light_on_dark_and_all_have_contrast(fonts):
    light = 0
    for sample in samples(80, "test", "line", **fonts):
        pixels = np.asarray(sample["pixel_values"], np.int16)
        background = np.bincount(pixels.ravel()).argmax()
        ink = pixels.ravel()[abs(pixels - background).argmax()]
        assert abs(ink - background) >= 60  # thin strokes do not reach the full contrast of 90
        light += ink > background
    assert 24 < light < 56


def test_only_training_images_are_degraded_in_clean_tiers(fonts):
    assert all(is_plain(sample) for sample in samples(60, "test", "block", **fonts))
    assert 0.5 < np.mean([is_plain(sample) for sample in samples(100, "train", "block", **fonts)]) < 0.95


def test_streams_the_same_samples_in_any_number_of_shards(fonts):
    dataset = RenderedTextDataset("test", {"line": 1, "noisy": 1}, size=11, seed=4, **fonts)
    expected = [digest(dataset[index]) for index in range(11)]
    for num_shards in (1, 3):
        stream = dataset.as_iterable_dataset(num_shards)
        assert stream.num_shards == num_shards
        streamed = list(stream)
        for sample, index in zip(streamed, range(11), strict=True):
            np.testing.assert_allclose(sample["boxes"], dataset[index]["boxes"], rtol=1e-6)
            assert digest({**sample, "boxes": dataset[index]["boxes"]}) == expected[index]
    assert [sample["text"] for sample in stream.skip(7)] == [sample["text"] for sample in streamed[7:]]
    with pytest.raises(ValueError, match="num_shards is 12"):
        dataset.as_iterable_dataset(12)


def test_no_font_family_and_no_sentence_is_in_two_splits(fonts):
    table = json.loads(FONTS_TABLE.read_text())
    files = [name for row in table for name in row["files"]]
    assert len(files) == len(set(files))
    for key in ("family", "design"):
        splits = {row[key]: {other["split"] for other in table if other[key] == row[key]} for row in table}
        assert all(len(held) == 1 for held in splits.values()), key
    share = Counter(split for row in table for split in [row["split"]] * len(row["files"]))
    assert set(share) == set(SPLITS)
    assert min(share["validation"], share["test"]) > 50
    assert {row["split"] for row in table if "integrity" in row} == {"train"}

    corpora = [RenderedTextDataset(split, **fonts) for split in SPLITS]
    for first, second in itertools.combinations(corpora, 2):
        assert not set(first._sentences) & set(second._sentences)
        assert not {word.lower() for word in first._words} & {word.lower() for word in second._words}
    assert all(len(corpus._sentences) > 100 for corpus in corpora)


@pytest.mark.parametrize("split", SPLITS)
def test_installed_fonts_of_the_table(split):
    try:
        dataset = RenderedTextDataset(split, {"line": 1, "block": 1})
    except FileNotFoundError as error:
        pytest.skip(str(error)[:60])
    names = {name for row in json.loads(FONTS_TABLE.read_text()) if row["split"] == split for name in row["files"]}
    for index in range(40):
        sample = dataset[index]
        assert sample["font"] in names
        assert all(0 <= x0 < x1 <= 128 and 0 <= y0 < y1 <= 128 for x0, y0, x1, y1 in sample["boxes"])


def test_fonts_are_found_through_the_environment(fonts, monkeypatch):
    monkeypatch.setenv("REGARD_FONTS_DIR", str(fonts["fonts_dirs"][0]))
    assert RenderedTextDataset("train", fonts_table=fonts["fonts_table"])[0]["font"] == "train.ttf"


def test_missing_fonts_name_packages_to_install(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no font of the test split .*apt-get install .*fonts-liberation2"):
        RenderedTextDataset("test", fonts_dirs=[tmp_path])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "split is 'dev'; give one of train, validation, test"),
        ({"tiers": "lines"}, r"unknown tiers \['lines'\]; there are line, block, dense, noisy, page, noisy_page"),
        ({"tiers": {"line": 0}}, "weights"),
        ({"tiers": {"line": 1, "block": -1}}, "weights"),
        ({"max_characters": [(10, 20), (0, 10)]}, "max_characters must rise"),
        ({"max_characters": [(0, 0)]}, "limits of 1 or more"),
        ({"group_size": 0}, "group_size is 0; give 1 or more"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, fonts):
    with pytest.raises(ValueError, match=message):
        RenderedTextDataset(**arguments, **fonts)


def test_indices_end_at_the_size(fonts):
    dataset = RenderedTextDataset("train", size=3, **fonts)
    assert len(dataset) == 3
    assert dataset[2]["text"]
    with pytest.raises(IndexError, match="sample 3 of a data set of 3"):
        dataset[3]
