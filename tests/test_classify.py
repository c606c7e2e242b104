"""`regard classify`: what it prints and draws, and which models it takes. Files, errors and batches are those of
`regard read`; see test_cli."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from regard.classify import Classifier
from regard_cli import main


@pytest.fixture
def classify(tiny_classifier: Path):
    """`regard classify ...` with the tiny model, in this process."""
    return lambda *arguments: main(
        ["classify", "--model", str(tiny_classifier), "--device", "cpu", *map(str, arguments)]
    )


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A tiny classifier of transformers' own."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)
    config.id2label = {0: "yes", 1: "no"}
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_one_image_gives_a_line_for_each_class(classify, folder, capsys):
    assert classify(folder / "a/one.png") == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == 3
    assert all(re.fullmatch(r"(Bag|Coat|Hat|Ring|Shoe|Tie) +[ \d]\d\.\d %", line) for line in lines)
    assert len({len(line) for line in lines}) == 1
    assert captured.err == ""


def test_several_images_get_headers(classify, folder, capsys):
    assert classify(folder, "--top-k", 1) == 0
    lines = capsys.readouterr().out.splitlines()
    headers = [line for line in lines if line.startswith("==> ")]
    assert headers == [f"==> {folder / name} <==" for name in ("a/one.png", "a/two.png", "b/one.png")]
    assert len([line for line in lines if line.endswith(" %")]) == 3


def test_json_lines_and_csv_agree(classify, folder, capsys, tmp_path):
    assert classify(folder, "--json", "--top-k", 100, "--output", tmp_path / "out.jsonl") == 0
    assert capsys.readouterr().out == ""
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == [str(folder / name) for name in ("a/one.png", "a/two.png", "b/one.png")]
    for line in lines:
        assert list(line) == ["path", "labels"]
        scores = [entry["score"] for entry in line["labels"]]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == 6
        assert sum(scores) == pytest.approx(1, abs=1e-3)
    assert classify(folder, "--csv", "--batch-size", 2) == 0
    header, *rows = csv.reader(io.StringIO(capsys.readouterr().out, newline=""))
    assert header == ["path", "rank", "label", "score"]
    assert rows == [
        [line["path"], str(rank), entry["label"], f"{entry['score']:.4f}"]
        for line in lines
        for rank, entry in enumerate(line["labels"][:3], start=1)
    ]


def test_the_probabilities_are_the_models(tiny_classifier, folder):
    classifier = Classifier(str(tiny_classifier), "cpu", None, 8)
    image = Image.open(folder / "a/one.png")
    (result,) = classifier.run([classifier.prepare(image)])
    assert isinstance(result, dict)
    with torch.no_grad():
        inputs = classifier.processor(images=image, return_tensors="pt")
        expected = classifier.model(**inputs).logits.softmax(-1)[0]
    assert result["labels"][0]["score"] == pytest.approx(expected.max().item(), abs=1e-6)
    assert result["labels"][0]["label"] == classifier.names[int(expected.argmax())]


def test_bad_files_are_named_and_the_others_classified(classify, folder, capsys):
    (folder / "a/empty.png").touch()
    assert classify(folder, "--csv", "--top-k", 1) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1 + 3
    assert f"regard: {folder / 'a/empty.png'}: empty" in captured.err


def test_every_verb_refuses_the_others_models(folder, tiny_checkpoint, tiny_classifier, tiny_vqa, capsys):
    assert main(["classify", str(folder), "--model", str(tiny_checkpoint)]) == 2
    assert "a image_text_slot model does not classify images; name another" in capsys.readouterr().err
    assert main(["read", str(folder), "--model", str(tiny_classifier)]) == 2
    assert "a qavit model does not read text; name another" in capsys.readouterr().err
    assert main(["ask", str(folder), "what?", "--model", str(tiny_classifier)]) == 2
    assert "a qavit model does not answer questions; name another" in capsys.readouterr().err
    for verb, task in (("read", "read text"), ("classify", "classify images")):
        assert main([verb, str(folder), "--model", str(tiny_vqa)]) == 2
        assert f"a query_conditioned_vqa model does not {task}; name another" in capsys.readouterr().err


def test_drawings_show_where_it_looked(classify, folder, tmp_path, capsys):
    assert classify(folder, "--draw", tmp_path / "seen", "--csv") == 0
    drawn = capsys.readouterr().out
    assert {str(path.relative_to(tmp_path / "seen")) for path in (tmp_path / "seen").rglob("*.png")} == {
        "a/one.png",
        "a/two.png",
        "b/one.png",
    }
    with Image.open(tmp_path / "seen/a/one.png") as picture:
        assert picture.width > 2 * 232
    assert classify(folder, "--csv") == 0
    assert capsys.readouterr().out == drawn


def test_other_classifiers_do_but_are_not_drawn(vit, folder, tmp_path, capsys):
    arguments = ["classify", str(folder / "a/one.png"), "--model", str(vit), "--device", "cpu", "--json"]
    assert main(arguments) == 0
    labels = json.loads(capsys.readouterr().out)["labels"]
    assert {entry["label"] for entry in labels} == {"yes", "no"}
    assert main([*arguments, "--draw", str(tmp_path / "seen")]) == 2
    assert "a vit model does not tell where it looked; leave out --draw" in capsys.readouterr().err
    assert not (tmp_path / "seen").exists()
