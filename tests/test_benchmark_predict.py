"""benchmarks/predict.py, on an untrained model and few rows."""

import importlib.util
import json
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
