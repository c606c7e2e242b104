"""benchmarks/count_ablations.py and calibrate_done.py, with a model that knows nothing."""

import importlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from regard import SequentialAttentionCountingConfig, SequentialAttentionCountingModel
from regard.data import emoji_scenes
from regard.train import parse_settings


@pytest.fixture
def bench(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    try:
        emoji_scenes._font()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module("count_ablations")


@pytest.fixture
def calibration(bench) -> Any:
    return importlib.import_module("calibrate_done")


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A model of the preset micro, with its processor."""
    recipe, *arguments = parse_settings(
        ["--model", "sequential_attention_counting", "--preset", "micro", "--output_dir", str(tmp_path), "--use_cpu"]
    )
    trainer = recipe.build(*arguments)
    trainer.model.save_pretrained(tmp_path / "micro")
    trainer.processing_class.save_pretrained(tmp_path / "micro")
    return str(tmp_path / "micro")


def test_runs_have_the_modules_that_they_name(bench):
    def modules(name: str) -> set[str]:
        config = SequentialAttentionCountingConfig.from_preset("micro", **bench.RUNS[name][0])
        look = SequentialAttentionCountingModel(config).look
        return {module for module in bench.MODULES if getattr(look, module) is not None}

    assert modules("baseline") == set()
    assert modules("baseline + cross-attention") == {"cross_attention"}
    assert all(modules(name) == set(bench.MODULES) for name in bench.RUNS if name.startswith("all"))
    assert {mode for name, (_, mode) in bench.RUNS.items() if "alternating" in name} == {"alternating"}


@pytest.mark.parametrize("name", ["baseline", "all, alternating, marked in the image"])
def test_a_run_trains_and_is_scored(name, bench, checkpoint):
    threads = torch.get_num_threads()
    try:
        row = bench.train(name, checkpoint, steps=1, images=2, seed=0, bf16=False)
    finally:
        torch.set_num_threads(threads)
    assert row["mae"] >= 0
    assert row["training_seconds"] > 0
    assert (row["step_parameters"] > 2000) is ("all" in name)


def test_table_and_report(bench, tmp_path, capsys, monkeypatch):
    def train(name: str, **settings: Any) -> dict[str, Any]:
        return {"mae": len(name), "step_parameters": settings["steps"]}

    monkeypatch.setattr(bench, "train", train)
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda jobs, context: ThreadPoolExecutor(jobs))
    output = tmp_path / "results.json"
    assert bench.main(["any", "--only", "baseline", "all", "--output", str(output)]) == 0
    assert "| baseline | 8.00 | – |" in capsys.readouterr().out
    report = json.loads(output.read_text())
    assert report["command"] == f"python benchmarks/count_ablations.py any --only baseline all --output {output}"
    assert list(report["results"]) == ["baseline", "all"]


class Scorer:
    """Counts up to three of everything, ever less sure that one is left."""

    batch_size = 2

    class collate:
        @staticmethod
        def questions(row: Any) -> list[tuple[str, list[Any]]]:
            return [(name, [[0, 0]] * number) for name, number in row["true"].items()]

    @staticmethod
    def count(asked: Any, done_threshold: float, **_: Any) -> Any:
        scores = [score for score in (0.95, 0.65, 0.15) if 1 - score < done_threshold]
        points = [{"x": 1.0, "y": 1.0, "score": score} for score in scores]
        return [[{"points": points} for _ in row["category"]] for row in asked]


def test_counts_by_threshold_follow_from_one_pass(calibration):
    rows = [{"pixel_values": None, "true": {"cats": 2, "dogs": 0}}, {"pixel_values": None, "true": {"owls": 3}}] * 2
    errors = calibration.count_errors(Scorer, rows, lambda images: None)
    assert errors.shape == (len(calibration.THRESHOLDS), 6)
    by_threshold = dict(zip(calibration.THRESHOLDS, errors.tolist(), strict=True))
    assert by_threshold[0.1] == [-1, 1, -2] * 2  # stops after the first
    assert by_threshold[0.5] == [0, 2, -1] * 2
    assert by_threshold[0.9] == [1, 3, 0] * 2


def test_a_threshold_is_chosen_and_saved(calibration, checkpoint, tmp_path, capsys):
    arguments = [checkpoint, "--images", "1", "--threads", "1", "--save", str(tmp_path / "saved")]
    threads = torch.get_num_threads()
    try:
        assert calibration.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "| threshold | trained 0-4: exact | MAE |" in printed
    best = float(printed.rsplit(": ", 1)[1])
    config = SequentialAttentionCountingConfig.from_pretrained(tmp_path / "saved")
    assert config.done_threshold == best
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {value.dtype for name, value in saved.items() if name.startswith("vlm.")} == {torch.float16}
    assert saved["heads.score.weight"].dtype == torch.float32  # what is new stays in full precision
