"""`regard evaluate` of a model that answers questions."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image

from regard.data.scenes import SceneDataset
from regard.evaluate_questions import Asker, choose_questions, score_asker
from regard_cli import main


def test_all_figures_by_type(tiny_vqa):
    data = SceneDataset("test", 60, image_size=64)
    done = []
    scores = score_asker(Asker(str(tiny_vqa), "cpu", None, 16), data, done.append)
    assert sum(done) == scores["questions"] == 60
    assert sum(part["questions"] for part in scores["by_type"].values()) == 60
    assert set(scores["by_type"]) == {data[row]["question_type"] for row in range(60)}
    for part in (scores, *scores["by_type"].values()):
        for name in ("accuracy", "shuffled_accuracy", "blind_accuracy"):
            assert 0 <= part[name] <= 1
        if part["pointed_questions"]:
            assert 0 < part["pointing_chance"] <= 1
            assert 0 <= part["pointing_accuracy"] <= 1
    mean = sum(part["accuracy"] * part["questions"] for part in scores["by_type"].values()) / 60
    assert scores["accuracy"] == pytest.approx(mean)
    assert scores["ms_per_question"] > 0


def test_what_is_right_counts_and_the_image_matters(tiny_vqa, monkeypatch):
    """A model that tells the colour of the image is right, but not about another image, nor about a grey one."""
    asker = Asker(str(tiny_vqa), "cpu", None, 4)
    colors = ("red", "blue", "green", "yellow")
    asker.answers = [*colors, *asker.answers[4:]]
    rows = [
        {"pixel_values": Image.new("RGB", (8, 8), color), "image_id": color, "question": "what color is it?",
         "answers": [color], "question_type": "color", "boxes": []}
        for color in colors
    ]  # fmt: skip
    features = {}
    model = asker.model

    def encode(pixel_values):
        number = [features.setdefault(tuple(image.mean((1, 2)).tolist()), len(features)) for image in pixel_values]
        return original(pixel_values) * 0 + pixel_values.new_tensor(number)[:, None, None]

    original = model.encode_image
    monkeypatch.setattr(model, "encode_image", encode)

    def head(patches, query, relevance, patch_mask):
        logits = patches.new_zeros(len(patches), model.config.num_labels)
        # The grey image was encoded first, so that the rows' images have the numbers from 1 on.
        number = seen["features"].mean((1, 2)).round().long()
        return logits.scatter(1, (number - 1).clamp(min=0)[:, None], 1.0)

    seen = {}
    by_question = model._by_question

    def watch(*args):
        out = by_question(*args)
        seen["features"] = out[0]
        return out

    monkeypatch.setattr(model, "_by_question", watch)
    monkeypatch.setattr(model.head, "forward", head)
    scores = score_asker(asker, rows)
    assert scores["accuracy"] == 1
    assert scores["shuffled_accuracy"] == 0
    assert scores["blind_accuracy"] == 0.25  # "red", always


def test_the_command_writes_a_report(tiny_vqa, tmp_path: Path, capsys):
    output = tmp_path / "evaluation.json"
    arguments = ["evaluate", str(tiny_vqa), "--dataset", "scenes", "--images", "30", "--output", str(output)]
    assert main([*arguments, "--batch-size", "10", "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert "other image" in table
    assert "count" in table
    report = json.loads(output.read_text())
    assert report["results"]["scenes"]["questions"] == 30
    assert report["split"] == "test"


def test_questions_must_be_named(tiny_vqa, capsys):
    assert main(["evaluate", str(tiny_vqa), "--tiers", "line"]) == 2
    assert "name some by --dataset" in capsys.readouterr().err
    with pytest.raises(ValueError, match="name some by --dataset"):
        choose_questions(Namespace(model="m", tiers=None, dataset=None, images=None, seed=0), "test")


def test_at_most_so_many_questions():
    options = Namespace(model="m", tiers=None, dataset="easy-vqa", images=12, seed=0)
    (data,) = choose_questions(options, "test").values()
    assert len(data) == 12
