"""The benchmark of QAViT's throughput: figures, table and plot, of one image at a time."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def benchmark(root: Path, monkeypatch: pytest.MonkeyPatch):
    """The module benchmarks/qavit_throughput.py; the threads are as before when the test is over."""
    monkeypatch.syspath_prepend(root / "benchmarks")
    spec = importlib.util.spec_from_file_location("qavit_throughput", root / "benchmarks" / "qavit_throughput.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def test_throughput_is_measured_and_drawn(benchmark, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    sizes = {"12": benchmark.Size("tiny-32", 12, 4, 1), "32": benchmark.Size("tiny", 32, 16, 1)}
    monkeypatch.setattr(benchmark, "SIZES", sizes)
    output, plot = tmp_path / "results" / "figures.json", tmp_path / "cost.png"
    assert benchmark.main(["--rounds", "1", "--skip-peer", "--output", str(output), "--plot", str(plot)]) == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    assert list(report["results"]) == ["12", "32"]
    for row in report["results"].values():
        assert all(row[kind]["qavit"] > 0 for kind in ("parameters", "gflop", "training", "inference"))
    assert sum(report["training_step"].values()) == pytest.approx(1, abs=0.01)
    assert {"matrix products", "convolutions", "norms", "optimizer"} <= set(report["training_step"])
    assert "| 12 px | tiny-32 | 2.4" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_fused_attention_is_counted(benchmark):
    class Attending(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(images, images, images)

    size = benchmark.Size("tiny-32", 16, 4, 1)
    assert benchmark.count_gflop(Attending(), size) == pytest.approx(2 * 2 * 3 * 16**3 / 1e9)
