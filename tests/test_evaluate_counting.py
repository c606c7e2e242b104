"""`regard evaluate` of a model that counts."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from regard.data.emoji_scenes import EmojiSceneDataset, categories
from regard.evaluate import format_table
from regard.evaluate_counting import COLUMNS, CountScorer, choose_counting, generate_scenes, score_counter
from regard_cli import main


@pytest.fixture
def scorer(tiny_counter) -> Any:
    return CountScorer(str(tiny_counter), "cpu", None, 2)


def make_rows(size: tuple[int, int] = (40, 40)) -> list[dict[str, Any]]:
    points = ([[5.0, 5.0], [30.0, 9.0]], [], [[20.0, 20.0]])
    return [{"pixel_values": Image.new("RGB", size, "gray"), "category": "cats", "points": each} for each in points]


def test_kinds_of_scenes_are_what_they_say():
    kinds = generate_scenes("test", 4)
    assert list(kinds) == [
        *(f"{whose} {counts}" for whose in ("trained", "held-out") for counts in ("0-4", "5-20", "20-50")),
        "absent",
        "two in turn",
    ]
    names = {split: {name for each in categories(split) for name in each.names} for split in ("train", "test")}
    for kind, whose, low, high in (("trained 5-20", "train", 5, 20), ("held-out 20-50", "test", 20, 50)):
        for index in range(4):
            row = kinds[kind][index]
            assert row["category"] in names[whose]
            assert low <= len(row["points"]) <= high
    for index in range(4):
        row = kinds["absent"][index]
        assert row["points"] == []
        assert "others_names" not in row
        row = kinds["two in turn"][index]
        assert row["points"]
        assert row["others_points"][0]
    assert len({kinds["two in turn"][index]["pixel_values"].tobytes() for index in range(4)}) == 4
    assert all("held-out" not in kind for kind in generate_scenes("train", 1))


def test_all_figures(scorer):
    done = []
    scores = score_counter(scorer, make_rows(), done.append)
    assert sum(done) == scores["images"] == 3
    assert set(COLUMNS) - {"location_error_share"} <= set(scores)
    assert set(scores["by_range"]) == {"0-4"}
    assert 0 <= scores["false_stop_rate"] <= 1
    assert scores["ms_per_image"] > 0


def test_what_is_right_is_scored_as_right(scorer, monkeypatch):
    rows = make_rows()
    found = iter(rows)

    def count(asked, batch_size):
        return [
            [{"points": [{"x": x, "y": y} for x, y in next(found)["points"]], "count_estimate": 1.0}] for _ in asked
        ]

    monkeypatch.setattr(scorer, "count", count)
    scores = score_counter(scorer, rows)
    assert (scores["mae"], scores["exact_match"], scores["location_error_share"]) == (0, 1, 0)
    assert scores["estimate_difference"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("marking", ["memory", "image"])
def test_it_is_asked_after_each_of_the_true_objects(tiny_counter, tmp_path, marking):
    model: Any = AutoModel.from_pretrained(tiny_counter)
    model.config.marking = marking
    model.save_pretrained(tmp_path)
    processor: Any = AutoProcessor.from_pretrained(tiny_counter)
    processor.save_pretrained(tmp_path)
    scorer = CountScorer(str(tmp_path), "cpu", None, 4)
    rows = make_rows()
    done, is_done = scorer.ask_done(rows)
    assert is_done.tolist() == [False, False, True, True, False, True]
    inputs = processor(images=rows[0]["pixel_values"], text="cats", marks=[[[5 / 40, 5 / 40]]], return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**inputs).done
    np.testing.assert_allclose(done[1], expected[0, 0], rtol=1e-4)
    many = [{**rows[0], "points": [[float(x), 3.0] for x in range(20)]}]
    assert scorer.ask_done(many)[1].tolist() == [False] * 6  # as far as five objects


def test_the_command_writes_a_report(tiny_counter, tmp_path: Path, capsys):
    lines = []
    for number in range(3):
        Image.new("RGB", (40, 30 + number), "gray").save(tmp_path / f"{number}.png")
        points = [[3 * place, 5] for place in range(4 * number)]
        lines.append(json.dumps({"file_name": f"{number}.png", "category": "cats", "points": points}))
    (tmp_path / "test").mkdir()
    for number in range(3):
        (tmp_path / f"{number}.png").rename(tmp_path / f"test/{number}.png")
    (tmp_path / "test/points.jsonl").write_text("\n".join(lines))
    output = tmp_path / "evaluation.json"
    arguments = ["evaluate", str(tiny_counter), "--dataset", str(tmp_path), "--output", str(output)]
    assert main([*arguments, "--device", "cpu", "--batch-size", "2"]) == 0
    table = capsys.readouterr().out
    assert "false stop" in table
    assert "  5-19" in table
    report = json.loads(output.read_text())
    assert report["results"][tmp_path.name]["images"] == 3
    assert report["split"] == "test"


def test_generated_scenes_have_a_row_each(scorer):
    kinds = generate_scenes("test", 1)
    scorer.count._postprocess_params["tile"] = False
    scores = {name: score_counter(scorer, kinds[name]) for name in ("held-out 0-4", "absent", "two in turn")}
    assert [part["images"] for part in scores.values()] == [1, 1, 2]
    table = format_table(scores, COLUMNS).splitlines()
    assert len(table) == 4
    assert " - " in table[2]  # nothing is there to be pointed at


def test_objects_must_be_named(tiny_counter, capsys):
    assert main(["evaluate", str(tiny_counter), "--tiers", "line"]) == 2
    assert "name some by --dataset (emoji, fsc-147:FOLDER" in capsys.readouterr().err
    options = Namespace(model="m", tiers=None, dataset="emoji", images=12, seed=3)
    chosen = choose_counting(options, "validation")
    assert {len(data) for data in chosen.values()} == {12}
    assert isinstance(chosen["absent"].scenes, EmojiSceneDataset)
