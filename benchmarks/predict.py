"""Bulk inference on the CPU: rows a second in one process and in two, and what 20 kills at random moments leave.

    python benchmarks/predict.py throughput [--rows 4000] [--processes 1 2]
    python benchmarks/predict.py kills [--rows 4000] [--kills 20]

The rows name generated images over and over. Rows a second count from the first part on, so without imports and
loading the model. A kill ends all processes of a run at once, after a time drawn from those that a whole run takes; the
next run has another number of processes. A run that ends is checked, and all is begun anew. Prints a Markdown table and
writes benchmarks/results/predict_throughput.json or predict_kills.json.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet

RESULTS = Path(__file__).with_name("results")
IMAGES = 200


def make_rows(folder: Path, rows: int) -> Path:
    """A file of rows, and the images that it names."""
    from regard.data.scenes import SceneDataset

    data = SceneDataset("test", IMAGES)
    (folder / "images").mkdir()
    for index in range(IMAGES):
        data[index]["pixel_values"].save(folder / "images" / f"{index}.png")
    lines = (
        json.dumps({"image": f"images/{row % IMAGES}.png", "id": row, "question": "what color is it?"})
        for row in range(rows)
    )
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def start(options: argparse.Namespace, rows: Path, output: Path, processes: int) -> subprocess.Popen[str]:
    """Start a run, in as many processes, which share two threads."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [
        sys.executable, *(launcher if processes > 1 else []), "-m", "regard.predict",
        "--model", options.model, "--dataset", str(rows), "--output", str(output), "--columns", "id=id",
        "--shard-size", str(options.shard_size), "--batch-size", str(options.batch_size), "--device", "cpu",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, 2 // processes))}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]):
    """Wait for the end of a run.

    Raises:
        RuntimeError: it failed; the message holds the end of what it said.
    """
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the run failed:\n{errors[-4000:]}")


def kill(process: subprocess.Popen[str]):
    """Kill a run and all processes that it has started, none of which can do anything about it."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family)
    process.communicate()


def parts(output: Path) -> list[Path]:
    return sorted(output.glob("part-*.parquet"))


def check(output: Path, rows: int) -> dict[str, int]:
    """How many rows are lost, doubled, or not where they belong, and how many files are neither part nor manifest."""
    indices: list[int] = []
    misplaced = 0
    for path in parts(output):
        table = pyarrow.parquet.read_table(path, columns=["index", "id"])
        indices += table["index"].to_pylist()
        misplaced += sum(str(index) != name for index, name in zip(*table.to_pydict().values(), strict=True))
    others = sum(not path.match("part-*.parquet") and path.name != "manifest.json" for path in output.iterdir())
    lost = len(set(range(rows)) - set(indices))
    return {"lost": lost, "doubled": len(indices) - len(set(indices)), "misplaced": misplaced, "left over": others}


def measure(options: argparse.Namespace, rows: Path, folder: Path, processes: int) -> dict[str, float]:
    """Rows a second of a whole run and of what follows its first part, and the seconds until that."""
    output = folder / f"in-{processes}"
    begin = time.perf_counter()
    process = start(options, rows, output, processes)
    while not parts(output) and process.poll() is None:
        time.sleep(0.01)
    first, had = time.perf_counter() - begin, len(parts(output))
    while len(parts(output)) * options.shard_size < options.rows and process.poll() is None:
        time.sleep(0.01)
    last = time.perf_counter() - begin
    finish(process)
    left = options.rows - had * options.shard_size
    return {
        "rows_per_second": left / (last - first),
        "seconds_to_first_part": first,
        "seconds": time.perf_counter() - begin,
    }


def throughput(options: argparse.Namespace, rows: Path, folder: Path) -> dict[str, Any]:
    results = {str(number): measure(options, rows, folder, number) for number in options.processes}
    print("| Processes | Rows/s | Gain | First part after | All |")
    print("|---:|---:|---:|---:|---:|")
    first = next(iter(results.values()))["rows_per_second"]
    for number, result in results.items():
        speed = result["rows_per_second"]
        print(
            f"| {number} | {speed:.1f} | {speed / first:.2f} | {result['seconds_to_first_part']:.1f} s "
            f"| {result['seconds']:.1f} s |"
        )
    return results


def soak(options: argparse.Namespace, rows: Path, folder: Path) -> dict[str, Any]:
    moments, output = random.Random(options.seed), folder / "out"
    begin = time.perf_counter()
    finish(start(options, rows, output, 1))
    whole = time.perf_counter() - begin
    checks, kills, run = [check(output, options.rows)], [], 0
    while len(kills) < options.kills or not kills[-1]["checked"]:
        if checks and parts(output) and (not kills or kills[-1]["checked"]):
            shutil.rmtree(output)
        run += 1
        process = start(options, rows, output, 1 + run % 2)
        moment = moments.uniform(0, whole)
        try:
            if len(kills) < options.kills:
                process.wait(moment)
            finish(process)
        except subprocess.TimeoutExpired:
            kill(process)
            half = len(list(output.glob(".part-*")))
            kills.append({"seconds": moment, "parts": len(parts(output)), "half_written": half, "checked": False})
            continue
        checks.append(check(output, options.rows))
        for entry in kills:
            entry["checked"] = True
    total = {name: sum(result[name] for result in checks) for name in checks[0]}
    print("| Kills | Runs that ended | Rows each | Lost | Doubled | Misplaced | Left over |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    print(f"| {len(kills)} | {len(checks)} | {options.rows} | " + " | ".join(map(str, total.values())) + " |")
    return {**total, "ended": len(checks), "kills": kills}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure bulk inference.")
    measures = parser.add_subparsers(dest="measure", required=True)
    for name, summary in (("throughput", "rows a second"), ("kills", "what kills leave")):
        measure = measures.add_parser(name, help=summary)
        measure.add_argument("--model", default="image-text-slot-5m", help="default: %(default)s")
        measure.add_argument("--rows", type=int, default=4000, help="default: %(default)s")
        measure.add_argument("--shard-size", type=int, default=50, help="rows a part (default: %(default)s)")
        measure.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
        measure.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
        measure.add_argument(
            "--output", type=Path, default=RESULTS / f"predict_{name}.json", metavar="FILE", help="default: %(default)s"
        )
        if name == "kills":
            measure.add_argument("--kills", type=int, default=20, help="1 or more (default: %(default)s)")
        else:
            measure.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    options = parser.parse_args(arguments)

    from regard.evaluate import circumstances

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = make_rows(folder, options.rows)
        results = (soak if options.measure == "kills" else throughput)(options, rows, folder)
    settings = {name: getattr(options, name) for name in ("model", "rows", "shard_size", "batch_size")}
    report = {
        "results": results,
        **settings,
        **circumstances(argparse.Namespace(seed=options.seed, device="cpu"), "test"),
        "command": shlex.join(["python", "benchmarks/predict.py", *(sys.argv[1:] if arguments is None else arguments)]),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    failed = options.measure == "kills" and any(results[name] for name in ("lost", "doubled", "misplaced", "left over"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
