"""Pictures of answers: words joined from tokens, heat where the model looked, and any image and question."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, BertTokenizer

from regard import QueryConditionedVQAConfig, QueryConditionedVQAModel
from regard.panels import shorten
from regard.visualize import load_font
from regard.visualize_question import draw_answer, explain, join_words, visualize

EVEN = np.full((5, 5), 1 / 25)


def result_of(**changes) -> dict[str, Any]:
    return {
        "question": "what colour is it?",
        "answers": [{"answer": "red", "score": 0.75}, {"answer": "an answer that is far too long", "score": 0.25}],
        "relevance": np.stack([EVEN, EVEN]),
        "rolled_up": EVEN,
        "gradient": EVEN,
        "words": ["[CLS]", "what", "colour", "is", "it", "?", "[SEP]"],
        "word_attention": np.full((2, 7), 1 / 7),
        **changes,
    }


@pytest.fixture(scope="module")
def model(tiny_vqa: Path) -> Any:
    return QueryConditionedVQAModel.from_pretrained(tiny_vqa).eval()


@pytest.fixture(scope="module")
def processor(tiny_vqa: Path) -> Any:
    return AutoProcessor.from_pretrained(tiny_vqa)


def test_pieces_are_joined_to_words_as_asked(processor):
    question = "Is RED coloured?"
    places = [place for place, word in enumerate(processor.tokenizer(question).word_ids()) if word == 2]
    assert len(places) > 1
    attention = np.random.default_rng(0).dirichlet(np.ones(places[-1] + 3), 2)
    words, shares = join_words(processor.tokenizer, question, attention)
    assert words == ["[CLS]", "Is", "RED", "coloured", "?", "[SEP]"]
    np.testing.assert_allclose(shares[:, [0, 4, 5]], attention[:, [0, -2, -1]])
    np.testing.assert_allclose(shares[:, 3], attention[:, places].sum(1))
    np.testing.assert_allclose(shares.sum(1), 1)


def test_words_of_berts_own_tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nsnow\n##man\n?\n")
    tokenizer = BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    words, shares = join_words(tokenizer, "Snowman ⛄?", np.array([[0.1, 0.2, 0.3, 0.15, 0.05, 0.2]]))
    assert words == ["[CLS]", "Snowman", "⛄", "?", "[SEP]"]
    np.testing.assert_allclose(shares, [[0.1, 0.5, 0.15, 0.05, 0.2]])


def test_what_is_explained_is_what_the_model_did(model, processor):
    image = Image.effect_noise((50, 30), 80)
    questions = ["is it red?", "what colour is it or is it red?", "how many?"]
    results = explain(model, processor, image, questions, top_k=2)
    assert [result["question"] for result in results] == questions
    with torch.no_grad():
        for result in results:
            inputs = processor(images=image.convert("RGB"), text=result["question"], return_tensors="pt")
            outputs = model(**inputs)
            assert result["answers"][0]["score"] == pytest.approx(outputs.logits.softmax(-1).max().item(), abs=1e-5)
            assert len(result["answers"]) == 2
            np.testing.assert_allclose(result["relevance"].reshape(2, 25), outputs.relevance[0], atol=1e-5)
            assert result["word_attention"].shape == (2, len(result["words"]))
            np.testing.assert_allclose(result["word_attention"][:, 0], outputs.word_attention[0, :, 0], atol=1e-5)
            for name in ("rolled_up", "gradient"):
                assert result[name].shape == (5, 5)
                assert result[name].sum() == pytest.approx(1, abs=1e-4)
            np.testing.assert_allclose(result["word_attention"].sum(1), 1, atol=1e-5)
    with pytest.raises(ValueError, match=r"model\.eval"):
        explain(QueryConditionedVQAModel(model.config).train(), processor, image, questions)


@pytest.mark.parametrize(
    "changes",
    [
        {"keep_patches": 5},
        {"conditioning": "vector", "num_layers": 3},
        {"vision_config": {"model_type": "vit", "image_size": 20, "patch_size": 5, "hidden_size": 12}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_kind_of_model_is_explained(processor, changes):
    config = QueryConditionedVQAConfig.from_preset("micro", num_labels=4, **changes)
    half: Any = QueryConditionedVQAModel(config).eval()
    half.to(torch.bfloat16)
    (result,) = explain(half, processor, Image.effect_noise((50, 30), 80), ["is it red?"])
    side = 4 if "vision_config" in changes else 5
    assert result["relevance"].shape == (config.num_layers, side, side)
    assert draw_answer(Image.new("L", (50, 30)), result).width < 1300


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (600, 3), (3, 600), (2000, 1500)])
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_any_image_is_drawn(size, mode):
    picture = draw_answer(Image.new(mode, size), result_of())
    assert picture.mode == "RGB"
    assert max(picture.size) < 1300


@pytest.mark.parametrize(
    "question",
    [
        "🟥 red? 👩‍👩‍👧",
        "ما لون هذا؟",
        "מה הצבע של הכדור?",
        "何色ですか",
        "?",
        "a\x00b\n\x1b[2J",
        "x" * 9999,
        "is it red? " * 99,
    ],
)
def test_any_question_is_drawn(model, processor, question):
    picture = visualize(model, processor, Image.effect_noise((30, 40), 80), question)
    assert picture.width < 1300
    assert picture.height < 1000


def test_many_questions_stand_below_each_other(model, processor, make_image, tmp_path):
    path = make_image(tmp_path / "image.png")
    one = visualize(model, processor, str(path), "is it red?")
    three = visualize(model, processor, path.read_bytes(), ["is it red?"] * 3)
    assert three.size == (one.width, 3 * one.height)
    parts = np.asarray(three).astype(int).reshape(3, *np.asarray(one).shape)
    assert abs(parts - np.asarray(one)).max() <= 3  # heat differs by rounding


def test_heat_lies_where_the_model_looked():
    """On a wide image and a square grid: the top right cell of twenty-five."""
    spot = np.full((5, 5), 1e-4)
    spot[0, 4] = 1
    dark = result_of(relevance=np.stack([EVEN * 0] * 2), rolled_up=EVEN * 0, gradient=EVEN * 0)
    bright = {**dark, "relevance": np.stack([EVEN * 0, spot])}
    image = Image.new("RGB", (232, 100), (128, 128, 128))
    difference = np.abs(np.asarray(draw_answer(image, bright)).astype(int) - np.asarray(draw_answer(image, dark))).sum(
        -1
    )
    rows, columns = np.nonzero(difference > 200)
    assert columns.max() - columns.min() < 80
    assert rows.max() - rows.min() < 40
    left = 16 + 2 * (232 + 16)  # the third panel, the second layer's
    assert left + 232 - 80 < columns.mean() < left + 232
    assert columns.max() == left + 231


def test_chosen_words_are_light():
    attention = np.full((2, 7), 0.01)
    attention[0, 2] = attention[1, 5] = 0.94
    picture = draw_answer(Image.new("L", (64, 64)), result_of(word_attention=attention))
    rows = np.asarray(picture.convert("RGB")).astype(int)[-100:]
    light = (abs(rows - (252, 225, 130)).sum(-1) < 9).any(0).nonzero()[0]
    assert len(light) > 20, "one word in each layer"
    steps = np.diff(light)
    assert (steps > 1).sum() >= 1


def test_texts_are_shortened_to_a_width():
    assert shorten("short  one", 200) == "short one"
    long = shorten("a long text that does not fit " * 200, 200)
    assert long.endswith("...")
    assert 180 < load_font(13).getlength(long) <= 200
    assert shorten("xyz", 1) in ("...", "x...")
