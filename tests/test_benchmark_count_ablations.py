"""benchmarks/count_ablations.py: its runs differ as their names say, and each trains what it has."""

import importlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

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
