"""SequentialAttentionCountingProcessor: the layout of rows, any image, marks, errors, saving, tokens like Qwen's."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, Qwen2VLImageProcessorPil, TokenizersBackend

from regard.modeling.counting_outputs import CountedObjects
from regard.processing.processing_sequential_attention_counting import (
    STEP_TOKENS,
    VISION_TOKENS,
    SequentialAttentionCountingProcessor,
)
from regard.processing.tokenization_byte import build_byte_tokenizer


def make_processor(**settings) -> Any:
    images = Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64})
    return SequentialAttentionCountingProcessor(
        images, build_byte_tokenizer(reserved=[*VISION_TOKENS, *STEP_TOKENS]), **settings
    )


@pytest.fixture(scope="module")
def processor() -> Any:
    return make_processor()


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [Image.effect_noise(size, 80) for size in ((40, 40), (60, 20), (9, 64))]


def as_bytes(text: str) -> list[int]:
    return [4 + byte for byte in text.encode()]


def test_a_row_is_category_image_and_steps(processor, images):
    inputs = processor(images=images[0], text="cats", return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert inputs["pixel_values"].shape == (16, 3 * 2 * 8 * 8)
    assert inputs["input_ids"].tolist() == [[*as_bytes("cats"), 261, *[260] * 4, 262, 263, 264, 265]]
    assert processor.step_token_ids == [263, 264, 265]
    assert set(inputs) == {"pixel_values", "image_grid_thw", "input_ids", "attention_mask"}


def test_rows_are_padded_on_the_right_and_spaces_are_one(processor, images):
    inputs = processor(images=images, text=["cats", " red\n  apples ", "a"], return_tensors="np")
    lengths = inputs["attention_mask"].sum(1)
    merged = inputs["image_grid_thw"].prod(1) // 4
    assert lengths.tolist() == [length + 5 + number for length, number in zip((4, 10, 1), merged, strict=True)]
    assert (inputs["input_ids"][inputs["attention_mask"] == 0] == processor.tokenizer.pad_token_id).all()
    assert inputs["input_ids"][1, :10].tolist() == as_bytes("red apples")
    assert (inputs["attention_mask"][:, :-1] >= inputs["attention_mask"][:, 1:]).all()


@pytest.mark.parametrize("text", ["<done>", "<|image_pad|>", "<|vision_start|> cats <x>", "<|pad|>"])
def test_a_category_cannot_spell_a_special_token(processor, images, text):
    inputs = processor(images=images[0], text=text)
    assert inputs["input_ids"][0].tolist() == [*as_bytes(text), 261, *[260] * 4, 262, 263, 264, 265]


def test_a_prompt_stands_round_the_category(images):
    inputs = make_processor(prompt="count the {category}!")(images=images[0], text="{category} cats")
    assert inputs["input_ids"][0].tolist()[:-9] == as_bytes("count the {category} cats!")


def test_many_categories_are_about_one_image_or_named_ones(processor, images):
    one = processor(images=images[0], text=["cats", "dogs"], return_tensors="pt")
    assert len(one["input_ids"]) == 2
    assert len(one["image_grid_thw"]) == 1
    several = processor(images=images, text=["cats", "dogs", "x"], image_index=[2, 0, 2], return_tensors="pt")
    assert several["image_index"].tolist() == [2, 0, 2]
    merged = several["image_grid_thw"].prod(1) // 4
    assert (several["input_ids"] == 260).sum(1).tolist() == [merged[2], merged[0], merged[2]]
    later = processor(text=["cats", "dogs", "x"], image_grid_thw=several["image_grid_thw"], image_index=[2, 0, 2])
    assert later["input_ids"].tolist() == several["input_ids"].tolist()
    assert set(processor(images=images)) == {"pixel_values", "image_grid_thw"}


@pytest.mark.parametrize("size", [(1, 1), (300, 1), (1, 999), (3, 600), (640, 480)])
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_any_image(processor, size, mode):
    inputs = processor(images=Image.new(mode, size), text="cats", return_tensors="pt")
    assert inputs["image_grid_thw"].prod() == len(inputs["pixel_values"])
    assert torch.isfinite(inputs["pixel_values"]).all()


def test_kinds_of_images(processor, images, tmp_path):
    images[1].save(tmp_path / "image.png")
    wanted = processor(images=images[1], text="cats")["pixel_values"]
    array = np.asarray(images[1])
    for given in (str(tmp_path / "image.png"), array, torch.tensor(array), np.stack([array] * 3)[None], [images[1]]):
        np.testing.assert_array_equal(processor(images=given, text="cats")["pixel_values"], wanted)


def test_marks_are_points_padded(processor, images):
    inputs = processor(images=images[:2], text=["cats", "dogs"], marks=[[[0.1, 0.2], [0.3, 0.4]], []])
    np.testing.assert_allclose(inputs["points"], [[[0.1, 0.2], [0.3, 0.4]], [[-1, -1], [-1, -1]]], rtol=1e-6)
    assert processor(images=images[0], text="cats", marks=[[]])["points"].shape == (1, 0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give images, text"),
        ({"text": "cats"}, "text alone needs image_grid_thw"),
        ({"images": 1, "text": ""}, "text 0 is ''"),
        ({"images": 1, "text": ["cats", None]}, "text 1 is None"),
        ({"images": 2, "text": ["cats"] * 3}, "2 images, but 3 texts"),
        ({"images": 2, "text": ["cats"] * 3, "image_index": [0, 1]}, "for each of 3 texts"),
        ({"images": 2, "text": ["cats"], "image_index": [2]}, "one of the 2 images"),
        ({"images": 1, "text": ["cats"], "marks": [[], []]}, "1 texts, but 2 lists"),
    ],
)
def test_what_does_not_agree_is_named(processor, images, arguments, message):
    if "images" in arguments:
        arguments = {**arguments, "images": images[: arguments["images"]]}
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_results_are_in_pixels(processor):
    counted = CountedObjects(torch.tensor([[0.5, 0.25]]), torch.tensor([0.75]), 1.5, True)
    empty = CountedObjects(torch.zeros(0, 2), torch.zeros(0), 7.0, False)
    one, none = processor.post_process([counted, empty], [(80, 40), (10, 10)])
    assert one == {
        "count": 1,
        "count_estimate": 1.5,
        "agrees": True,
        "points": [{"x": 20.0, "y": 20.0, "score": 0.75}],
        "complete": True,
    }
    assert none == {"count": 0, "count_estimate": 7.0, "agrees": False, "points": [], "complete": False}


def test_saved_and_loaded(images, tmp_path):
    processor = make_processor(prompt="how many {category}?")
    processor.save_pretrained(tmp_path)
    loaded: Any = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is SequentialAttentionCountingProcessor
    assert loaded.prompt == processor.prompt
    assert loaded.step_token_ids == processor.step_token_ids
    given = {"images": images, "text": ["cats", "dogs", "red apples"]}
    for name, value in processor(**given).items():
        np.testing.assert_array_equal(loaded(**given)[name], value)


def qwen_tokenizer() -> TokenizersBackend:
    """A word-level stand-in with Qwen2-VL's special tokens, without the steps'."""
    words = ["<|endoftext|>", "cats", "dogs", "<", ">", "done", "x"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="x"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = TokenizersBackend(tokenizer_object=backend, pad_token="<|endoftext|>", unk_token="x")
    tokenizer.add_tokens(list(VISION_TOKENS), special_tokens=True)
    return tokenizer


def test_step_tokens_are_added_to_a_tokenizer_that_lacks_them(images, tmp_path):
    image_processor = Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 1024, "longest_edge": 4096})
    processor: Any = SequentialAttentionCountingProcessor(image_processor, qwen_tokenizer())
    assert processor.step_token_ids == [10, 11, 12]
    row = processor(images=images[0], text="cats")["input_ids"][0].tolist()
    assert row == [1, 8, *[7] * 4, 9, 10, 11, 12]
    processor.save_pretrained(tmp_path)
    loaded: Any = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.step_token_ids == [10, 11, 12]
    assert len(loaded.tokenizer) == 13
