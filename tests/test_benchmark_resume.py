"""benchmarks/resume.py, with one kill."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def benchmark(root: Path, monkeypatch) -> Any:
    monkeypatch.syspath_prepend(root / "benchmarks")
    spec: Any = importlib.util.spec_from_file_location("resume_benchmark", root / "benchmarks" / "resume.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_kill(benchmark, tmp_path, capsys):
    assert benchmark.main(["--kills", "1", "--steps", "6", "--output", str(tmp_path / "out.json")]) == 0
    assert capsys.readouterr().out.startswith("| Kills | In the middle of a save |")
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(results["kills"]) == 1
    assert results["ended"] >= 1


def test_other_weights_are_noticed(benchmark, tmp_path):
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 1.0000001)):
        (tmp_path / name).mkdir()
        save_file({"weight": torch.tensor([0.0, value])}, tmp_path / name / "model.safetensors")
    assert benchmark.is_equal(tmp_path / "a", tmp_path / "b")
    assert not benchmark.is_equal(tmp_path / "a", tmp_path / "c")
