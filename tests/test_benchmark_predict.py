"""benchmarks/predict.py, on an untrained model and few rows."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest


@pytest.fixture(scope="module")
def benchmark(root: Path) -> Any:
    spec: Any = importlib.util.spec_from_file_location("predict_benchmark", root / "benchmarks" / "predict.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_throughput_of_one_process(benchmark, tiny_classifier, tmp_path, capsys):
    words = [
        "--model",
        str(tiny_classifier),
        "--rows",
        "40",
        "--shard-size",
        "4",
        "--output",
        str(tmp_path / "out.json"),
    ]
    assert benchmark.main(["throughput", *words, "--processes", "1"]) == 0
    assert capsys.readouterr().out.startswith("| Processes | Rows/s |")
    result = json.loads((tmp_path / "out.json").read_text())["results"]["1"]
    assert result["seconds"] > result["seconds_to_first_part"] > 0
    assert result["rows_per_second"] > 0


def test_what_is_lost_and_doubled_is_counted(benchmark, tmp_path):
    for part, indices in enumerate(([0, 1, 2], [2, 4])):
        table = pyarrow.table({"index": indices, "id": [str(index) if index else "7" for index in indices]})
        pyarrow.parquet.write_table(table, tmp_path / f"part-{part:05}.parquet")
    (tmp_path / ".part-00002.parquet.abc").touch()
    (tmp_path / "manifest.json").touch()
    assert benchmark.check(tmp_path, 6) == {"lost": 2, "doubled": 1, "misplaced": 1, "left over": 1}


def test_kills_are_counted_and_what_they_leave_is_checked(benchmark, tmp_path, monkeypatch, capsys):
    script = """
import os, sys, time
import pyarrow, pyarrow.parquet
output, double = sys.argv[1:]
os.makedirs(output, exist_ok=True)
for part in range(20):
    path = f"{output}/part-{part:05}.parquet"
    if not os.path.exists(path):
        index = [part, part] if part == 3 and double == "double" else [part]
        table = pyarrow.table({"index": index, "id": list(map(str, index))})
        pyarrow.parquet.write_table(table, path + ".half")
        time.sleep(0.05)
        os.replace(path + ".half", path)
"""
    started = []

    def start(options, rows, output, processes):
        started.append(processes)
        command = [sys.executable, "-c", script, str(output), options.model]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    monkeypatch.setattr(benchmark, "start", start)
    options = argparse.Namespace(model="right", rows=20, shard_size=1, kills=4, seed=0)
    result = benchmark.soak(options, tmp_path / "rows.jsonl", tmp_path)
    assert {name: result[name] for name in ("lost", "doubled", "misplaced", "left over")} == dict.fromkeys(
        ("lost", "doubled", "misplaced", "left over"), 0
    )
    assert len(result["kills"]) == 4
    assert all(entry["checked"] for entry in result["kills"])
    assert result["ended"] >= 2
    assert set(started) == {1, 2}
    assert "| 4 | " in capsys.readouterr().out
    (tmp_path / "again").mkdir()
    options = argparse.Namespace(model="double", rows=20, shard_size=1, kills=1, seed=0)
    assert (
        benchmark.soak(options, tmp_path / "rows.jsonl", tmp_path / "again")["doubled"] >= 2
    )  # of each run that ended
