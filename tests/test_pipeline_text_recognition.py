"""`pipeline("text-recognition")` on a tiny model with random weights: kinds of input, batches, saving, errors."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, ViTConfig, ViTModel, pipeline

from regard import ImageTextSlotConfig, ImageTextSlotImageProcessor, ImageTextSlotProcessor, build_byte_tokenizer
from regard.modeling.modeling_image_text_slot import ImageTextSlotModel
from regard.pipelines.text_recognition import TextRecognitionPipeline
from regard.processing.image_io import ImageReadError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint folder, as in model_cards, whose readings are long and differ from image to image."""
    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model = ImageTextSlotModel(ImageTextSlotConfig.from_preset("tiny")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.get_parameter("counter.presence.bias").fill_(-3)  # most frames hold no character
    model.save_pretrained(path)
    ImageTextSlotProcessor(ImageTextSlotImageProcessor(), build_byte_tokenizer()).save_pretrained(path)
    return path


def load_reader(folder, **parameters):
    # pyright knows the stock tasks only
    return pipeline("text-recognition", model=str(folder), device="cpu", **parameters)  # pyright: ignore


@pytest.fixture(scope="module")
def reader(folder):
    return load_reader(folder)


@pytest.fixture(scope="module")
def expected(reader, images):
    """The readings of the images, one by one."""
    results = [reader(image) for image in images]
    assert len({len(result["text"]) for result in results}) > 2, "the tests need readings of several lengths"
    return results


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    shapes = [(128, 128), (40, 100), (300, 20, 3), (7, 9), (128, 64)]
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


def check(result, size):
    assert set(result) == {"text", "score", "characters"}
    assert result["text"] == "".join(item["character"] for item in result["characters"])
    assert 0 <= result["score"] <= 1
    for item in result["characters"]:
        assert set(item) == {"character", "score", "box"}
        x0, y0, x1, y1 = item["box"]
        assert 0 <= x0 <= x1 <= size[0]
        assert 0 <= y0 <= y1 <= size[1]
    json.dumps(result)


def same(left, right):
    assert left["text"] == right["text"]
    assert left["score"] == pytest.approx(right["score"], abs=1e-4)
    for a, b in zip(left["characters"], right["characters"], strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-4)
        assert a["box"] == pytest.approx(b["box"], abs=1e-2)


def test_finds_its_processor_by_the_folder(reader, images, expected):
    assert type(reader) is TextRecognitionPipeline
    assert type(reader.processor) is ImageTextSlotProcessor
    for result, image in zip(expected, images, strict=True):
        check(result, image.size)


def test_equals_model_and_processor(folder, images, expected):
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        reading = model.read(processor(images=images, return_tensors="pt")["pixel_values"])
    results = processor.post_process(reading, [(image.height, image.width) for image in images])
    for left, right in zip(results, expected, strict=True):
        same(left, right)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_batches(reader, images, expected, batch_size):
    results = reader(images, batch_size=batch_size)
    assert isinstance(results, list)
    for left, right in zip(results, expected, strict=True):
        same(left, right)


def test_kinds_of_input(reader, images, tmp_path):
    image, path = images[2], tmp_path / "image.png"
    image.save(path)
    expected = reader(image)
    array = np.asarray(image)
    for one in (path, str(path), path.read_bytes(), array, torch.from_numpy(array.copy()), {"image": image}):
        same(reader(one), expected)
        same(reader([one])[0], expected)
    same(reader({"pixel_values": path, "text": "x"}), expected)
    assert reader([]) == []
    assert len(reader((image, image))) == 2


def test_iterables_are_read_as_asked(reader, images, expected):
    taken = []

    def source():
        for index, image in enumerate(images):
            taken.append(index)
            yield image

    results = reader(source())
    same(next(iter(results)), expected[0])
    assert len(taken) < len(images)
    for make in (lambda: iter(images), lambda: (image for image in images)):
        for batch_size in (1, 2):
            for left, right in zip(reader(make(), batch_size=batch_size), expected, strict=True):
                same(left, right)


def test_data_sets(reader, images):
    greys = [image.convert("L") for image in images]
    rows = datasets.Dataset.from_dict({"pixel_values": greys, "text": [""] * 5})
    rows = rows.cast_column("pixel_values", datasets.Image())
    expected = reader(greys)
    for data in (rows, rows.to_iterable_dataset(), rows["pixel_values"]):
        for batch_size in (1, 2):
            for left, right in zip(reader(data, batch_size=batch_size), expected, strict=True):
                same(left, right)


def test_max_slots(reader, folder, images, expected):
    assert max(len(result["characters"]) for result in expected) > 4
    for limit in (2, 4):
        limited = load_reader(folder, max_slots=limit)
        for results in (reader(images, max_slots=limit), limited(images)):
            assert max(len(result["characters"]) for result in results) <= limit
    with pytest.raises(ValueError, match="max_slots must be at least 2"):
        reader(images, max_slots=1)
    with pytest.raises(TypeError, match="beams"):
        reader(images, beams=3)


def test_save_and_load(reader, images, tmp_path):
    reader.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    again = load_reader(tmp_path)
    same(again(images[0]), reader(images[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoint_on_a_cpu(folder, images, tmp_path, dtype):
    AutoModel.from_pretrained(folder).to(dtype).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    half = load_reader(tmp_path)
    assert half.dtype == torch.float32
    check(half(images[0]), images[0].size)


def test_unreadable_images_are_named(reader, images, tmp_path):
    path = tmp_path / "broken.png"
    images[0].save(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ImageReadError, match=r"broken\.png"):
        reader([images[0], path], batch_size=2)
    with pytest.raises(ImageReadError, match=r"missing\.png: no such file"):
        reader(str(tmp_path / "missing.png"))
    with pytest.raises(ValueError, match="pixel_values or image, but has"):
        reader({"picture": images[0]})
    with pytest.raises(ValueError, match="array of 2 images"):
        reader(np.zeros((2, 5, 5, 3), dtype=np.uint8))
    with pytest.raises(TypeError, match="not int"):
        reader(7)


def test_needs_processor_and_reader(folder):
    model = AutoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="needs a processor"):
        TextRecognitionPipeline(model=model)
    classifier = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(ValueError, match="ViTModel has no read method"):
        TextRecognitionPipeline(model=classifier, processor=AutoProcessor.from_pretrained(folder))


def test_a_model_learns_on_after_its_pipeline_has_used_it(folder, images):
    """The pipeline computes in inference mode, whose tensors no gradient may pass."""
    reader = load_reader(folder)
    reader(images[0])
    inputs = reader.processor(images=images[:1], text=["word"], return_tensors="pt")
    reader.model.train()(**inputs).loss.backward()
