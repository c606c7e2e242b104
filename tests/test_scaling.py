"""The estimate of training on many GPUs: its arithmetic, and what it counts."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch


@pytest.fixture
def scaling(root: Path, monkeypatch: pytest.MonkeyPatch):
    """The module benchmarks/scaling.py."""
    spec = importlib.util.spec_from_file_location("scaling", root / "benchmarks" / "scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_what_a_ring_sends(scaling):
    assert scaling.all_reduce_seconds(8e9, 1, 1e9) == 0
    assert scaling.all_reduce_seconds(8e9, 8, 1e9) == pytest.approx(14)  # 7 eighths, there and back
    assert scaling.all_reduce_seconds(8e9, 64, 1e9) == pytest.approx(15.75)


def test_a_step_is_as_long_as_what_bounds_it(scaling):
    gpu = scaling.Gpu("toy", peak=1e12, nvlink=1e9, network=1e8)
    work = scaling.Workload("toy", samples=64_000, images=64_000, batch_size=80, parameters=1e6, operations=1e9)
    one = scaling.estimate(work, gpu, machines=1)
    assert one.compute == pytest.approx(80e9 / 0.3e12)
    assert one.exchange == pytest.approx(2 * 7 / 8 * 4e6 / 1e9)
    assert one.samples_per_second == pytest.approx(8 * 80 / (one.compute + one.exchange))
    assert one.epoch == pytest.approx(100 * (one.compute + one.exchange))
    assert one.efficiency == pytest.approx(one.compute / (one.compute + one.exchange))
    assert one.bound == "computing"
    many = scaling.estimate(work, gpu, machines=8)
    assert many.exchange == pytest.approx(2 * 63 / 64 * 4e6 / 1e8)
    assert many.epoch == pytest.approx(12.5 * (many.compute + many.exchange))
    assert scaling.estimate(replace(work, parameters=1e8), gpu, machines=8).bound == "network"
    easy = scaling.estimate(replace(work, operations=1e6), gpu, machines=1)
    assert easy.bound == "decoding"
    assert easy.samples_per_second == pytest.approx(8 * 1600)
    assert scaling.estimate(replace(work, images=6_400), gpu, machines=1).decode == pytest.approx(one.decode / 10)


def test_operations_are_those_of_forward_and_backward(scaling):
    linear = torch.nn.Linear(8, 4, bias=False)
    assert scaling.count_operations(linear, input=torch.zeros(3, 8)) == 3 * (2 * 3 * 8 * 4)
    channels = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
    assert scaling.count_operations(channels, input=torch.zeros(1, 8, 5, 5)) == 3 * (2 * 8 * 25 * 9)


def test_the_table_names_every_case(scaling):
    text = scaling.table([scaling.Workload("toy", 64_000, 64_000, 80, 1e6, 1e9)])
    assert all(f"| toy | {gpus} {gpu} |" in text for gpus in (8, 64) for gpu in ("A100", "H100"))
