"""`pipeline("visual-question-answering")` on a tiny untrained model: kinds of input, batches, saving, errors."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, ViTConfig, ViTModel, pipeline

from regard import VisualQuestionAnsweringPipeline
from regard.processing.image_io import ImageReadError

QUESTIONS = ["what colour is it?", "is it red?", "how many are there?", "what?", "is it red or is it red or red?"]


def load_asker(folder: Path, **parameters) -> VisualQuestionAnsweringPipeline:
    # pyright knows the stock tasks only
    return pipeline("visual-question-answering", model=str(folder), device="cpu", **parameters)  # pyright: ignore


@pytest.fixture(scope="module")
def ask(tiny_vqa) -> VisualQuestionAnsweringPipeline:
    return load_asker(tiny_vqa)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    shapes = [(40, 40, 3), (30, 50), (1, 1, 3), (60, 20, 4), (25, 25, 3)]
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


@pytest.fixture(scope="module")
def rows(images) -> list[dict]:
    """Of one question, of several, of a list of one."""
    questions = [QUESTIONS[0], QUESTIONS[1:4], QUESTIONS[2], [QUESTIONS[4]], QUESTIONS]
    return [{"image": image, "question": asked} for image, asked in zip(images, questions, strict=True)]


@pytest.fixture(scope="module")
def expected(ask, rows) -> list:
    return [ask(row) for row in rows]


def same(left, right):
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left["answer"] == right["answer"]
        assert left["score"] == pytest.approx(right["score"], abs=1e-5)
    else:
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            same(one, other)


def test_one_question(ask, images):
    result = ask(image=images[0], question=QUESTIONS[0])
    assert [set(answer) for answer in result] == [{"answer", "score"}]
    same(ask(images[0], QUESTIONS[0]), result)
    same(ask({"image": images[0], "question": QUESTIONS[0]}), result)
    json.dumps(result)
    model, processor = ask.model, ask.processor
    with torch.no_grad():
        logits = model(**processor(images=images[0], text=QUESTIONS[0], return_tensors="pt")).logits[0]
    assert result[0]["answer"] == model.config.id2label[int(logits.argmax())]
    assert result[0]["score"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)


def test_many_questions_are_as_many_single_ones_and_encode_the_image_once(ask, images, monkeypatch):
    questions = [f"{question} {end}" for question in QUESTIONS for end in ("is it?", "")]
    assert len(questions) == 10
    single = [ask(images[0], question, top_k=3) for question in questions]
    encoded = []
    encode = ask.model.encode_image
    monkeypatch.setattr(ask.model, "encode_image", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    same(ask(image=images[0], question=questions, top_k=3), single)
    assert encoded == [1]
    same(ask(images[0], questions[:1], top_k=3), single[:1])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_batches_change_nothing(ask, rows, expected, batch_size):
    same(ask(rows, batch_size=batch_size), expected)
    same(list(ask((row for row in rows), batch_size=batch_size)), expected)
    same(ask(tuple(rows[:3]), batch_size=batch_size), expected[:3])


def test_iterables_are_asked_as_wanted(ask, rows, expected):
    taken = []

    def source():
        for index, row in enumerate(rows):
            taken.append(index)
            yield row

    same(next(iter(ask(source()))), expected[0])
    assert len(taken) < len(rows)


def test_data_sets(ask, images, rows, expected):
    data = datasets.Dataset.from_dict(
        {"pixel_values": [image.convert("RGB") for image in images], "question": [QUESTIONS[0]] * 5, "answer": [""] * 5}
    ).cast_column("pixel_values", datasets.Image())
    wanted = [ask(image.convert("RGB"), QUESTIONS[0]) for image in images]
    for each in (data, data.to_iterable_dataset()):
        same(list(ask(each, batch_size=2)), wanted)

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return rows[index]

    same(list(ask(Rows(), batch_size=2, num_workers=1)), expected)


def test_kinds_of_image(ask, images, tmp_path):
    image, path = images[1], tmp_path / "image.png"
    image.save(path)
    array = np.asarray(image)
    wanted = ask(image, QUESTIONS[0])
    same(ask(image.convert("RGB"), QUESTIONS[0]), wanted)
    for one in (path, str(path), path.read_bytes(), path.as_uri().replace("file://", ""), array, torch.tensor(array)):
        same(ask(one, QUESTIONS[0]), wanted)
        same(ask({"pixel_values": one, "question": QUESTIONS[0]}), wanted)
    red = np.full((3, 8, 8), 0, dtype=np.uint8)
    red[0] = 255
    same(ask(red, QUESTIONS[0]), ask(Image.new("RGB", (8, 8), "red"), QUESTIONS[0]))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_any_mode_and_a_single_pixel(ask, mode):
    for size in ((1, 1), (3, 200)):
        assert len(ask(Image.new(mode, size), QUESTIONS[0])) == 1


@pytest.mark.parametrize(
    "question", ["🟥 red? 👩‍👩‍👧", "ما لون هذا؟", "מה הצבע?", "何色ですか", "?", "\x00", "it\nis", "x" * 9999]
)
def test_any_text_is_a_question(ask, images, question):
    same(ask(images[0], [question, QUESTIONS[0]])[0], ask(images[0], question))


def test_a_long_question_is_cut_off(ask, images):
    start = "is it red? " * 20
    same(ask(images[0], start + "how many are there?"), ask(images[0], start))


def test_top_k(ask, tiny_vqa, images):
    three = ask(images[0], QUESTIONS[0], top_k=3)
    assert [answer["score"] for answer in three] == sorted((answer["score"] for answer in three), reverse=True)
    same(three[:1], ask(images[0], QUESTIONS[0]))
    same(load_asker(tiny_vqa, top_k=3)(images[0], QUESTIONS[0]), three)
    everything = ask(images[0], QUESTIONS[0], top_k=99)
    assert len(everything) == 6
    assert sum(answer["score"] for answer in everything) == pytest.approx(1)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="top_k must be at least 1"):
            ask(images[0], QUESTIONS[0], top_k=wrong)
    with pytest.raises(TypeError, match="beams"):
        ask(images[0], QUESTIONS[0], beams=3)


def test_several_right_answers_have_probabilities_of_their_own(tiny_vqa, images, tmp_path):
    model = AutoModel.from_pretrained(tiny_vqa)
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(tiny_vqa).save_pretrained(tmp_path)
    ask = load_asker(tmp_path, top_k=6)
    with torch.no_grad():
        logits = model(**ask.processor(images=images[0], text=QUESTIONS[0], return_tensors="pt")).logits[0]
    scores = [answer["score"] for answer in ask(images[0], QUESTIONS[0])]
    assert scores == pytest.approx(logits.sigmoid().sort(descending=True).values.tolist(), abs=1e-5)


def test_save_and_load(ask, images, tmp_path):
    ask.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    same(load_asker(tmp_path)(images[0], QUESTIONS), ask(images[0], QUESTIONS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoint_on_a_cpu(tiny_vqa, images, tmp_path, dtype):
    AutoModel.from_pretrained(tiny_vqa).to(dtype).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(tiny_vqa).save_pretrained(tmp_path)
    half = load_asker(tmp_path)
    assert half.dtype == torch.float32
    assert 0 <= half(images[0], QUESTIONS[0])[0]["score"] <= 1


def test_what_is_missing_is_named(ask, images, tmp_path):
    assert ask([]) == []
    with pytest.raises(ValueError, match="no image"):
        ask(question=QUESTIONS[0])
    for asked in (images[0], {"image": images[0]}, {"image": images[0], "question": None}, "photo.png"):
        with pytest.raises(ValueError, match="no question"):
            ask(asked)
    for asked in ("", " \n", [""]):
        with pytest.raises(ValueError, match=r"question 0 is .*: ask something"):
            ask(images[0], asked)
    with pytest.raises(ValueError, match="question 1 is None: ask something"):
        ask(images[0], ["what?", None])
    with pytest.raises(ValueError, match="list of questions is empty"):
        ask(images[0], [])
    with pytest.raises(ValueError, match="pixel_values or image, but has"):
        ask({"picture": images[0], "question": QUESTIONS[0]})
    with pytest.raises(ValueError, match="list of dicts"):
        ask(images, QUESTIONS[0])
    with pytest.raises(ImageReadError, match=r"missing\.png: no such file"):
        ask(str(tmp_path / "missing.png"), QUESTIONS[0])
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(ImageReadError, match=r"broken\.png"):
        ask([{"image": images[0], "question": "what?"}, {"image": tmp_path / "broken.png", "question": "what?"}])
    with pytest.raises(TypeError, match="not int"):
        ask(7)


def test_needs_processor_and_a_model_that_answers(tiny_vqa):
    with pytest.raises(ValueError, match=r"needs a processor.*visual-question-answering"):
        VisualQuestionAnsweringPipeline(model=AutoModel.from_pretrained(tiny_vqa))
    vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(ValueError, match="ViTModel answers no questions"):
        VisualQuestionAnsweringPipeline(model=vit, processor=AutoProcessor.from_pretrained(tiny_vqa))


def test_a_model_learns_on_after_its_pipeline_has_used_it(tiny_vqa, images):
    """The pipeline computes in inference mode, whose tensors no gradient may pass."""
    ask = load_asker(tiny_vqa)
    ask(image=images[0], question=QUESTIONS[0])
    assert ask.processor is not None
    inputs = ask.processor(images=images[:1], text=QUESTIONS[:1], return_tensors="pt")
    ask.model.train()(**inputs, labels=torch.tensor([0])).loss.backward()
