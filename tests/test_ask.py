"""`regard ask`: what it prints and draws of questions. Files, errors and batches are those of `regard read`; see
test_cli."""

import csv
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from regard.ask import Answerer
from regard_cli import main

QUESTIONS = ["what colour is it?", "is it red?", "how many are there?"]
NAMES = ("a/one.png", "a/two.png", "b/one.png")
ANSWER = r"(yes|no|red|blue|two|a very long answer) +[ \d]\d\.\d %"


@pytest.fixture
def ask(tiny_vqa: Path):
    """`regard ask ...` with the tiny model, in this process."""
    return lambda *arguments: main(["ask", *map(str, arguments), "--model", str(tiny_vqa), "--device", "cpu"])


def test_one_question_gives_its_answer_on_a_line(ask, folder, capsys):
    assert ask(folder / "a/one.png", QUESTIONS[0]) == 0
    captured = capsys.readouterr()
    assert re.fullmatch(ANSWER + "\n", captured.out)
    assert captured.err == ""
    assert ask(folder / "a/one.png", QUESTIONS[0], "--top-k", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(re.fullmatch(ANSWER, line) for line in lines)
    assert len({len(line) for line in lines}) == 1


def test_several_questions_stand_above_their_answers(ask, folder, capsys):
    assert ask(folder / "a/one.png", *QUESTIONS[:2], "it\n is\tred?") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == [*QUESTIONS[:2], "it is red?"]
    assert all(re.fullmatch("  " + ANSWER, line) for line in lines[1::2])


def test_a_folder_gets_headers_and_a_bar(ask, folder, capsys):
    assert ask(folder, QUESTIONS[0]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[::3] == [f"==> {folder / name} <==" for name in NAMES]
    assert "3/3" in captured.err
    assert ask(folder, *QUESTIONS) == 0
    assert capsys.readouterr().out.count(QUESTIONS[2]) == 3


def test_json_lines_and_csv_agree(ask, folder, capsys, tmp_path):
    assert ask(folder, *QUESTIONS, "--json", "--top-k", 100, "--output", tmp_path / "out.jsonl") == 0
    assert capsys.readouterr().out == ""
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["path"] for line in lines] == [str(folder / name) for name in NAMES]
    for line in lines:
        assert list(line) == ["path", "questions"]
        assert [entry["question"] for entry in line["questions"]] == QUESTIONS
        for entry in line["questions"]:
            scores = [answer["score"] for answer in entry["answers"]]
            assert scores == sorted(scores, reverse=True)
            assert len(scores) == 6
            assert sum(scores) == pytest.approx(1, abs=1e-3)
    for batch_size in (1, 2, 16):
        assert ask(folder, *QUESTIONS, "--csv", "--top-k", 2, "--batch-size", batch_size, "--threads", 1) == 0
        header, *rows = csv.reader(io.StringIO(capsys.readouterr().out, newline=""))
        assert header == ["path", "question", "rank", "answer", "score"]
        expected = [
            (line["path"], entry["question"], str(rank), answer["answer"], answer["score"])
            for line in lines
            for entry in line["questions"]
            for rank, answer in enumerate(entry["answers"][:2], start=1)
        ]
        assert [tuple(row[:4]) for row in rows] == [row[:4] for row in expected]
        assert [float(row[4]) for row in rows] == pytest.approx([row[4] for row in expected], abs=2e-4)


def test_each_image_is_encoded_once_and_answers_are_the_models(tiny_vqa, folder, monkeypatch):
    questions = [f"{question}{mark}" for question in QUESTIONS for mark in ("", "?", " red?")] + ["what?"]
    answerer = Answerer(str(tiny_vqa), "cpu", None, 8, questions)
    config: Any = answerer.model.config
    encoded, encode = [], answerer.model.encode_image
    monkeypatch.setattr(answerer.model, "encode_image", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    images = [Image.open(folder / name) for name in NAMES]
    results = answerer.run([answerer.prepare(image) for image in images])
    assert encoded == [3]
    for image, result in zip(images, results, strict=True):
        assert isinstance(result, dict)
        for question, entry in zip(questions, result["questions"], strict=True):
            with torch.no_grad():
                inputs = answerer.processor(images=image, text=question, return_tensors="pt")
                expected = answerer.model(**inputs).logits.softmax(-1)[0]
            assert entry["question"] == question
            assert entry["answers"][0]["answer"] == config.id2label[int(expected.argmax())]
            assert entry["answers"][0]["score"] == pytest.approx(expected.max().item(), abs=1e-5)


def test_several_right_answers_have_probabilities_of_their_own(tiny_vqa, folder, tmp_path, capsys):
    model = AutoModel.from_pretrained(tiny_vqa)
    with torch.no_grad():
        model.head.classifier.bias.fill_(3)
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(tiny_vqa).save_pretrained(tmp_path)
    assert main(["ask", str(folder / "a/one.png"), "what?", "--model", str(tmp_path), "--top-k", "6", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["questions"]
    assert sum(answer["score"] for answer in entry["answers"]) > 2


@pytest.mark.parametrize("question", ["🟥 red? 👩‍👩‍👧", "ما لون هذا؟", "מה הצבע?", "?", "is it red? " * 99])
def test_any_text_is_a_question(ask, folder, capsys, tmp_path, question):
    assert ask(folder / "a/one.png", question, "--json", "--draw", tmp_path / "seen") == 0
    assert json.loads(capsys.readouterr().out)["questions"][0]["question"] == question
    assert (tmp_path / "seen/one.png").is_file()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_any_image(ask, tmp_path, capsys, mode):
    for number, size in enumerate(((1, 1), (300, 2))):
        Image.new(mode, size).save(tmp_path / f"{number}.png")
    assert ask(tmp_path, QUESTIONS[0], "--csv", "--draw", tmp_path / "seen") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_empty_questions_are_refused(ask, folder, capsys):
    for arguments in (["is it red?", ""], [" \t"]):
        with pytest.raises(SystemExit, match="2"):
            ask(folder, *arguments)
        assert "a question is empty; ask something" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        ask(folder, os.fsdecode(b"caf\xe9?"))
    assert "is not UTF-8" in capsys.readouterr().err


def test_an_image_where_a_question_should_be_is_named(ask, folder, capsys):
    assert ask(folder / "a/one.png", folder / "a/two.png", "is it red?") == 2
    error = capsys.readouterr().err
    assert f"regard: {folder / 'a/two.png'}: an image where a question should be; put several" in error
    assert ask(folder / "a/one.png", "what is in two.png?", "nowhere.png", "what? " * 99 + ".png") == 0


def test_bad_files_are_named_and_the_others_answered(ask, folder, capsys, tmp_path):
    (folder / "a/broken.png").write_bytes((folder / "a/one.png").read_bytes()[:60])
    assert ask(folder, *QUESTIONS, "--csv", "--draw", tmp_path / "seen") == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1 + 3 * 3
    assert f"regard: {folder / 'a/broken.png'}: " in captured.err
    assert {str(path.relative_to(tmp_path / "seen")) for path in (tmp_path / "seen").rglob("*.png")} == set(NAMES)
    assert ask(folder / "missing.png", QUESTIONS[0]) == 2
    assert "missing.png: no such file" in capsys.readouterr().err


def test_drawings_show_every_question(ask, folder, tmp_path, capsys):
    assert ask(folder / "a/one.png", QUESTIONS[0], "--draw", tmp_path / "one") == 0
    plain = capsys.readouterr().out
    assert ask(folder / "a/one.png", *QUESTIONS, "--draw", tmp_path / "three", "--top-k", 2) == 0
    with Image.open(tmp_path / "one/one.png") as one, Image.open(tmp_path / "three/one.png") as three:
        assert three.height > 2.5 * one.height
        assert one.width == three.width
    capsys.readouterr()
    assert ask(folder / "a/one.png", QUESTIONS[0]) == 0
    assert capsys.readouterr().out == plain
