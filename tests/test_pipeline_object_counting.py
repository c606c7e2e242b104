"""`pipeline("object-counting")` on a tiny untrained model: kinds of input, batches, tiles, saving, errors."""

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, ViTConfig, ViTModel, pipeline

from regard import ObjectCountingPipeline
from regard.modeling.counting_outputs import CountedObjects
from regard.pipelines.object_counting import LEAST_TILE, MAX_CUTS
from regard.processing.image_io import ImageReadError

CATEGORIES = ["cats", "dogs", "red apples", "x", "a rather long name of something to be counted"]
KEYS = ["category", "count", "count_estimate", "agrees", "points", "complete", "tiled"]


def load_counter(folder: Path, **parameters) -> Any:
    # pyright knows the stock tasks only
    return pipeline("object-counting", model=str(folder), device="cpu", **parameters)  # pyright: ignore


@pytest.fixture(scope="module")
def count(tiny_counter) -> Any:
    return load_counter(tiny_counter)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    shapes = [(40, 40, 3), (30, 50), (1, 1, 3), (60, 20, 4), (70, 90, 3)]
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


@pytest.fixture(scope="module")
def rows(images) -> list[dict]:
    """Of one category, of several, of a list of one; the last is cut into tiles."""
    asked = [CATEGORIES[0], CATEGORIES[1:4], CATEGORIES[2], [CATEGORIES[4]], CATEGORIES[:2]]
    return [{"image": image, "category": category} for image, category in zip(images, asked, strict=True)]


@pytest.fixture(scope="module")
def expected(count, rows) -> list:
    return [count(row) for row in rows]


def same(left, right):
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for name, value in left.items():
            same(value, right[name])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            same(one, other)
    else:
        assert left == (pytest.approx(right, abs=1e-3) if isinstance(left, float) else right)


class Scripted:
    """Stands in for a model's `count`: what it finds depends on the size of the image, in pixels per object."""

    def __init__(self, monkeypatch, pipe: Any, at_once: int):
        self.at_once, self.images = at_once, []
        self.processor = pipe.processor
        monkeypatch.setattr(pipe.model, "count", self.count)
        call = type(pipe.processor).__call__

        def watch(processor, images=None, **kwargs):
            self.images = images if isinstance(images, list) else [images]
            return call(processor, images=images, **kwargs)

        monkeypatch.setattr(type(pipe.processor), "__call__", watch)

    def count(self, image_index=None, input_ids=None, max_objects=None, **kwargs) -> list[CountedObjects]:
        most, results = max_objects or self.at_once, []
        for image in image_index.tolist():
            pixels = np.asarray(self.images[image])[..., 0] > 128
            y, x = pixels.nonzero()
            order = range(min(most, len(x)))
            points = torch.tensor([[(x[i] + 0.5) / pixels.shape[1], (y[i] + 0.5) / pixels.shape[0]] for i in order])
            results.append(CountedObjects(points.reshape(-1, 2), torch.ones(len(order)), 9.0, len(x) <= most))
        return results


def dots(size: tuple[int, int], step: int) -> tuple[Image.Image, list[tuple[float, float]]]:
    """An image with white pixels on a grid, and where they are."""
    image, points = Image.new("RGB", size), []
    for y in range(step // 2, size[1], step):
        for x in range(step // 2, size[0], step):
            image.putpixel((x, y), (255, 255, 255))
            points.append((x + 0.5, y + 0.5))
    return image, points


def test_one_category(count, images):
    result = count(image=images[0], category="cats")
    assert list(result) == KEYS
    assert result["count"] == len(result["points"]) > 0
    for point in result["points"]:
        assert 0 <= point["x"] <= 40
        assert 0 <= point["y"] <= 40
        assert 0.5 <= point["score"] <= 1
    same(count(images[0], "cats"), result)
    same(count({"image": images[0], "category": "cats"}), result)
    json.dumps(result)
    inputs = count.processor(images=images[0], text="cats", return_tensors="pt")
    (found,) = count.processor.post_process(count.model.count(**inputs), [(40, 40)])
    same({**found, "category": "cats", "tiled": False}, {name: result[name] for name in [*found, "category", "tiled"]})


def test_many_categories_are_as_many_single_ones_and_encode_the_image_once(count, images, monkeypatch):
    single = [count(images[0], category) for category in CATEGORIES]
    encoded, encode = [], count.model.encode_image
    monkeypatch.setattr(count.model, "encode_image", lambda *args: encoded.append(len(args[1])) or encode(*args))
    same(count(image=images[0], category=CATEGORIES), single)
    assert encoded == [1]
    same(count(images[0], CATEGORIES[:1]), single[:1])


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_batches_change_nothing(count, rows, expected, batch_size):
    same(count(rows, batch_size=batch_size), expected)
    same(list(count((row for row in rows), batch_size=batch_size)), expected)


def test_data_sets(count, images, expected):
    data = datasets.Dataset.from_dict(
        {"pixel_values": [image.convert("RGB") for image in images[:3]], "category": ["cats"] * 3, "points": [[]] * 3}
    ).cast_column("pixel_values", datasets.Image())
    wanted = [count(image.convert("RGB"), "cats") for image in images[:3]]
    same(list(count(data.to_iterable_dataset(), batch_size=2)), wanted)


def test_kinds_of_image(count, images, tmp_path):
    image, path = images[1], tmp_path / "image.png"
    image.save(path)
    array = np.asarray(image)
    wanted = count(image, "cats")
    for one in (path, str(path), path.read_bytes(), array, torch.tensor(array), image.convert("RGB")):
        same(count(one, "cats"), wanted)


def test_points_are_in_pixels_of_the_upright_image(count, images, tmp_path):
    upright = images[0].resize((30, 50))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    same(count(tmp_path / "turned.png", "cats"), count(upright, "cats"))


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_any_mode_a_single_pixel_and_a_line(count, mode):
    for size in ((1, 1), (40, 1), (3, 20)):
        assert count(Image.new(mode, size), "cats", tile=False)["count"] <= 5


@pytest.mark.parametrize("category", ["🟥 red? 👩‍👩‍👧", "قطط", "猫", "?", "\x00", "red\napples", "<done>", "x" * 999])
def test_any_text_is_a_category(count, images, category):
    same(count(images[0], [category, "cats"])[0], count(images[0], category))


def test_limits(count, tiny_counter, images):
    several = count(images[0], "cats")["count"]
    assert several > 1
    less = count(images[0], "cats", max_objects=1, tile=False)
    assert (less["count"], less["complete"], less["tiled"]) == (1, False, False)
    same(load_counter(tiny_counter, max_objects=1, tile=False)(images[0], "cats"), less)
    assert count(images[0], "cats", done_threshold=0.01)["count"] == 0
    more = count(images[0], "cats", done_threshold=0.99, max_objects=30, tile=False)
    assert more["count"] > several
    for limit in ({"max_objects": 0}, {"done_threshold": 0.0}, {"done_threshold": 1}):
        with pytest.raises(ValueError, match=next(iter(limit))):
            count(images[0], "cats", **limit)


# Tiles.


def test_more_objects_than_the_model_counts_are_found_in_tiles(count, monkeypatch):
    """500 objects, 40 at once: each is found once, at its place, though tiles overlap."""
    image, points = dots((250, 200), 10)
    assert len(points) == 500
    Scripted(monkeypatch, count, at_once=40)
    result = count(image, "dots")
    assert (result["count"], result["tiled"], result["complete"], result["agrees"]) == (500, True, True, False)
    found = np.array(sorted((round(point["x"], 1), round(point["y"], 1)) for point in result["points"]))
    np.testing.assert_allclose(found, sorted(points), atol=0.2)


def test_where_tiles_do_not_suffice_a_warning_says_so_and_it_ends(count, monkeypatch, caplog):
    image, points = dots((250, 200), 5)
    scripted = Scripted(monkeypatch, count, at_once=5)
    calls = []
    monkeypatch.setattr(count.model, "count", lambda **given: calls.append(1) or scripted.count(**given))
    with caplog.at_level(logging.WARNING):
        result = count(image, ["dots"])[0]
    assert not result["complete"]
    assert 64 <= result["count"] < len(points)
    assert "dots: counting ended at" in caplog.text
    assert "250x200 pixels, which is not cut further; enlarge it" in caplog.text
    assert len(calls) <= 1 + sum(4**cut for cut in range(MAX_CUTS))


@pytest.mark.parametrize(
    ("shrinks", "found", "estimate", "warned"),
    [(3.1, 0, 0, True), (2.9, 0, 0, False), (3.1, 9, 9, False), (1.3, 9, 5, True), (1.2, 9, 5, False)],
)
def test_objects_lost_because_an_image_is_shrunk_are_told(shrinks, found, estimate, warned, count, monkeypatch, caplog):
    result = CountedObjects(torch.rand(found, 2), torch.ones(found), float(estimate), complete=True)
    monkeypatch.setattr(count.model, "count", lambda **given: [result])
    monkeypatch.setattr(count, "_shrinks", lambda image, grid: shrinks)
    with caplog.at_level(logging.WARNING):
        assert count(Image.new("RGB", (60, 50)), "ants")["count"] == found
    message = f"ants: {found} found, about {estimate} at a glance, in an image of 60x50 pixels"
    assert (message in caplog.text) == warned


def test_how_much_an_image_is_shrunk(count):
    patch = count.processor.image_processor.patch_size
    assert count._shrinks(Image.new("RGB", (30 * patch, patch)), torch.tensor([1, 2, 10])) == 3


def test_only_what_did_not_end_is_counted_in_tiles(count, images, monkeypatch):
    limits = [3, 100]

    def scripted(input_ids, image_index=None, **kwargs):
        rows.append(len(input_ids))
        return [
            CountedObjects(torch.full((1, 2), 0.5), torch.ones(1), 1.0, len(rows) > 1 or limits[row] > 50)
            for row in range(len(input_ids))
        ]

    rows: list[int] = []
    monkeypatch.setattr(count.model, "count", scripted)
    first, second = count(images[4], CATEGORIES[:2])
    assert rows == [2, 4]  # both in the image, one in four tiles
    assert (first["tiled"], second["tiled"]) == (True, False)
    assert (first["count"], second["count"]) == (4, 1)


def test_a_small_image_is_not_cut(count, monkeypatch, caplog):
    image, _ = dots((2 * LEAST_TILE - 1, 40), 4)
    Scripted(monkeypatch, count, at_once=5)
    result = count(image, "dots")
    assert (result["count"], result["tiled"], result["complete"]) == (5, False, False)
    assert "counting ended at 5" in caplog.text
    caplog.clear()
    assert count(image, "dots", tile=False)["count"] == 5
    assert caplog.text == ""


# Saving and errors.


def test_saved_and_loaded(count, images, tmp_path):
    count.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    same(load_counter(tmp_path)(images[0], CATEGORIES), count(images[0], CATEGORIES))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoint_on_a_cpu(tiny_counter, images, tmp_path, dtype):
    AutoModel.from_pretrained(tiny_counter).to(dtype).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(tiny_counter).save_pretrained(tmp_path)
    half = load_counter(tmp_path)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    assert half(images[0], "cats")["count"] >= 0


def test_what_is_missing_is_named(count, images, tmp_path):
    assert count([]) == []
    with pytest.raises(ValueError, match="no image"):
        count(category="cats")
    for asked in (images[0], {"image": images[0]}, {"image": images[0], "category": None}, "photo.png"):
        with pytest.raises(ValueError, match="no category"):
            count(asked)
    for asked in ("", " \n", [""]):
        with pytest.raises(ValueError, match=r"text 0 is .*: name what to count"):
            count(images[0], asked)
    with pytest.raises(ValueError, match="list of categories is empty"):
        count(images[0], [])
    with pytest.raises(ValueError, match="pixel_values or image, but has"):
        count({"picture": images[0], "category": "cats"})
    with pytest.raises(ValueError, match="list of dicts"):
        count(images, "cats")
    with pytest.raises(ImageReadError, match=r"missing\.png: no such file"):
        count(str(tmp_path / "missing.png"), "cats")
    with pytest.raises(TypeError, match="not int"):
        count(7)


def test_needs_processor_and_a_model_that_counts(tiny_counter):
    with pytest.raises(ValueError, match=r"needs a processor.*object-counting"):
        ObjectCountingPipeline(model=AutoModel.from_pretrained(tiny_counter))
    vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(ValueError, match="ViTModel does not count"):
        ObjectCountingPipeline(model=vit, processor=AutoProcessor.from_pretrained(tiny_counter))


def test_a_model_learns_on_after_its_pipeline_has_used_it(tiny_counter, images):
    """The pipeline computes in inference mode, whose tensors no gradient may pass."""
    counter = load_counter(tiny_counter)
    counter(image=images[0], category=CATEGORIES[0])
    inputs = counter.processor(images=images[:1], text=CATEGORIES[:1], return_tensors="pt")
    point, owner = torch.full((1, 1, 2), 0.5), torch.zeros(1, 1, dtype=torch.long)
    counter.model.train()(**inputs, points=point, objects=point, point_objects=owner).loss.backward()
