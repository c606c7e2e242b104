"""The benchmark of classifiers: equal budgets, tables, a plot, on a tiny folder of images."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn


@pytest.fixture(scope="module")
def benchmark(root: Path):
    """The module benchmarks/classify.py."""
    spec = importlib.util.spec_from_file_location("benchmark_classify", root / "benchmarks" / "classify.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Brightness(nn.Module):
    """A classifier that can only learn which of two images is the brighter."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.mean((1, 2, 3))[:, None])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, number in (("train", 16), ("validation", 8)):
        for index in range(number):
            place = tmp_path / "images" / split / ("dark", "bright")[index % 2]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((28, 28), 30 + 180 * (index % 2), np.uint8)).save(place / f"{index}.png")
    return tmp_path / "images"


def test_budgets_are_kept(benchmark, folder):
    data = benchmark.Data.load(str(folder), "train", None)
    assert data.images.shape == (16, 3, 28, 28)
    by_steps = benchmark.Run(Brightness(), 32, 40, True, 0, 4)
    by_steps.train(data, 0.5)
    assert by_steps.steps == 20
    by_steps.train(data, 1.0)
    assert by_steps.steps == 40
    rates = [group["lr"] for group in by_steps.optimizer.param_groups]
    assert rates == [pytest.approx(benchmark.LEARNING_RATE * 0.01)] * 2  # annealed
    by_time = benchmark.Run(Brightness(), 28, 0.2, False, 0, 4)
    by_time.train(data, 1.0)
    assert by_time.seconds >= 0.2
    assert 0 <= by_time.measure(data) <= 1
    assert by_time.report()["images"] == 4 * by_time.steps


def test_the_same_seed_gives_the_same_figure(benchmark, folder):
    data = benchmark.Data.load(str(folder), "train", None)

    def run(seed: int) -> list[float]:
        torch.manual_seed(seed)
        run = benchmark.Run(Brightness(), 28, 5, True, seed, 4)
        run.train(data, 1.0)
        return [value.item() for value in run.model.linear.weight]

    assert run(1) == run(1) != run(2)


def test_peers_take_turns_and_a_missing_one_is_named(benchmark, folder, tmp_path, monkeypatch, capsys):
    def missing() -> nn.Module:
        raise ImportError("No module named 'timm'")

    monkeypatch.setattr(
        benchmark, "PEERS", {"regard own": (Brightness, 28), "larger": (Brightness, 40), "gone": (missing, 28)}
    )
    arguments = ["peers", "--dataset", str(folder), "--seconds", "0.2", "--batch-size", "4", "--output", str(tmp_path)]
    assert benchmark.main([*arguments, "--plot", str(tmp_path / "plot.png")]) == 0
    printed = capsys.readouterr()
    assert "gone: left out (No module named 'timm')" in printed.err
    results = json.loads((tmp_path / "classify_peers.json").read_text())["results"]
    assert list(results) == ["regard own", "larger"]
    assert all(len(row["curve"]) == benchmark.MEASUREMENTS for row in results.values())
    assert printed.out.count("| regard own") == 1
    if importlib.util.find_spec("matplotlib"):
        with Image.open(tmp_path / "plot.png") as picture:
            assert picture.width > 500
    else:
        assert "pip install matplotlib" in printed.err


def test_ablations_name_what_they_take_away(benchmark, folder, tmp_path, monkeypatch, capsys):
    for name, changes in benchmark.ABLATIONS.items():
        config = benchmark.QAViTConfig.from_preset("tiny-32", **changes)
        for field, value in changes.items():
            assert list(getattr(config, field)) == value if isinstance(value, list) else getattr(config, field) == value
        assert bool(changes) == (name != "tiny-32")
    micro = {"embed_dim": 64, "depth": 1, "num_channel_groups": 4}
    monkeypatch.setattr(benchmark, "ABLATIONS", {"tiny-32": micro, "static": micro | {"fusion": "static"}})
    arguments = ["ablations", "--dataset", str(folder), "--steps", "2", "--seeds", "2", "--batch-size", "4"]
    results = []
    for jobs in "12":
        assert benchmark.main([*arguments, "--jobs", jobs, "--output", str(tmp_path / jobs)]) == 0
        results.append(json.loads((tmp_path / jobs / "classify_ablations.json").read_text())["results"])
        assert {name: len(row["accuracies"]) for name, row in results[-1].items()} == {"tiny-32": 2, "static": 2}
        assert results[-1]["static"]["parameters"] < results[-1]["tiny-32"]["parameters"]
        assert "| static |" in capsys.readouterr().out
    one, two = ([row["accuracies"] for row in result.values()] for result in results)
    assert one == two


def test_ablations_go_on_where_they_were_stopped(benchmark, folder, tmp_path, monkeypatch):
    arguments = ["ablations", "--dataset", str(folder), "--steps", "1", "--seeds", "2", "--batch-size", "4"]
    arguments += ["--output", str(tmp_path)]
    file = tmp_path / "classify_ablations.json"
    micro = {"embed_dim": 64, "depth": 1, "num_channel_groups": 4}
    monkeypatch.setattr(benchmark, "ABLATIONS", {"tiny-32": micro, "static": micro | {"fusion": "static"}})

    def run() -> float:
        assert benchmark.main(arguments) == 0
        report = json.loads(file.read_text())
        assert report["finished"]
        return report["results"]["tiny-32"]["accuracies"][0]

    whole = benchmark.QAViTLogits

    def build(*names, **fields):
        if "fusion" in fields:
            raise RuntimeError("it broke")
        return whole(*names, **fields)

    with monkeypatch.context() as broken:
        broken.setattr(benchmark, "QAViTLogits", build)
        with pytest.raises(ValueError, match="static: it broke"):
            benchmark.main(arguments)
    stopped = json.loads(file.read_text())
    assert not stopped["finished"]
    stopped["runs"]["tiny-32, seed 0"]["accuracy"] = 0.123  # shows whether it is run again
    file.write_text(json.dumps(stopped))
    assert run() == 0.123
    assert run() != 0.123  # when finished it starts anew
    file.write_text(json.dumps(stopped))
    monkeypatch.setattr(benchmark, "ABLATIONS", {"tiny-32": micro | {"depth": 2}})  # other settings, other runs
    assert run() != 0.123
