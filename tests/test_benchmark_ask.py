"""benchmarks/ask.py, on an untrained model and few questions."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def ask(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    spec: Any = importlib.util.spec_from_file_location("ask_benchmark", root / "benchmarks" / "ask.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ask_benchmark", module)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def run(ask: Any, folder: Path, *arguments: str) -> dict[str, Any]:
    output = folder / "results.json"
    options = ("--dataset", "scenes", "--questions", "20", "--rounds", "1")
    assert ask.main([*arguments, *options, "--output", str(output), "--plots", str(folder)]) == 0
    return json.loads(output.read_text())["results"]


def test_cost(ask, tiny_vqa, tmp_path, capsys):
    result = run(ask, tmp_path, "cost", str(tiny_vqa))
    assert {"one question", "ten questions", "ViLT, one question"} <= set(result["milliseconds"])
    assert [row["keep_patches"] for row in result["keep_patches"]][-1] == 25
    assert all(0 <= row["accuracy"] <= 1 for row in result["keep_patches"])
    assert "ten questions cost" in capsys.readouterr().out


def test_maps_of_two_models(ask, tiny_vqa, tmp_path, capsys):
    result = run(ask, tmp_path, "maps", str(tiny_vqa), "--described", str(tiny_vqa))
    assert result["ours"] == result["as described"]  # the same model, the same questions, the same random maps
    assert result["ours"]["questions"] == 20
    for curve in result["ours"]["curves"].values():
        assert len(curve) == 17
    curves = result["ours"]["curves"]
    assert (
        curves["own deletion"][0]
        == curves["random deletion"][0]
        == pytest.approx(curves["own insertion"][-1], abs=1e-3)
    )
    area = sum(curves["own deletion"][1:-1]) + (curves["own deletion"][0] + curves["own deletion"][-1]) / 2
    assert result["ours"]["areas"]["own deletion"] == pytest.approx(area / 16, abs=1e-3)
    assert "points at it" in capsys.readouterr().out


def test_prior(ask):
    known = ask.prior("easy-vqa")
    assert known["majority"] == pytest.approx(0.373, abs=1e-3)
    assert known["question only"] == pytest.approx(0.670, abs=1e-3)


def test_prior_of_generated_scenes(ask):
    known = ask.prior("scenes", (400, 200))
    assert known["majority"] < known["question's type"] < 0.6
    assert known == ask.prior("scenes", (400, 200))
