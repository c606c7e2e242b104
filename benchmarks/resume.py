"""Kill a training at random moments, over and over: does it end with the weights of one that nothing stopped?

    python benchmarks/resume.py [--kills 20] [--steps 40] [--processes 1]

A tiny ImageTextSlot learns from generated images and saves a checkpoint at every step, so that many kills come in the
middle of one. All processes of a run are killed at once, after a time drawn from that which a whole run takes once it
has started; the next run goes on from the newest complete checkpoint. A run that ends is compared, weight by weight,
with one that was not killed, and all is begun anew. Prints a Markdown table and writes benchmarks/results/resume.json.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from predict import finish, kill
from safetensors.torch import load_file

from regard.trainers.checkpoints import fault

RESULTS = Path(__file__).with_name("results")


def start(options: argparse.Namespace, output: Path) -> subprocess.Popen[str]:
    """Start a training, or go on with it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.processes)]
    command = [
        sys.executable, *(launcher if options.processes > 1 else []), "-m", "regard.train",
        "--preset", "tiny", "--tiers", "line=1", "--use_cpu", "--output_dir", str(output), "--seed", str(options.seed),
        "--max_steps", str(options.steps), "--per_device_train_batch_size", "2", "--dataloader_num_workers", "0",
        "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2",
        "--augment_shift", "0.02", "--muon_learning_rate", "1e-3", "--resume_from_checkpoint", "true",
        "--report_to", "none",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def steps_done(output: Path) -> int:
    """The highest number of a checkpoint, complete or not."""
    return max((int(path.name.partition("-")[2]) for path in output.glob("checkpoint-*")), default=0)


def is_equal(first: Path, second: Path) -> bool:
    """Whether two trainings ended with the same weights, bit by bit."""
    weights, others = (load_file(folder / "model.safetensors") for folder in (first, second))
    return weights.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in weights.items())


def wait_for_more_steps(process: subprocess.Popen[str], output: Path, done: int) -> None:
    """Wait until a run has begun to save, so that kills do not all fall into its start."""
    while steps_done(output) <= done and process.poll() is None:
        time.sleep(0.01)


def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    moments, whole, output = random.Random(options.seed), folder / "whole", folder / "killed"
    process = start(options, whole)
    wait_for_more_steps(process, whole, 0)
    begin = time.perf_counter()
    finish(process)
    seconds = time.perf_counter() - begin
    kills: list[dict[str, Any]] = []
    ended: list[bool] = []
    while len(kills) < options.kills or output.exists():
        done = steps_done(output)
        process = start(options, output)
        wait_for_more_steps(process, output, done)
        moment = moments.uniform(0, seconds / 2)
        try:
            if len(kills) < options.kills:
                process.wait(moment)
            finish(process)
        except subprocess.TimeoutExpired:
            kill(process)
            newest = output / f"checkpoint-{steps_done(output)}"
            kills.append({"seconds": moment, "checkpoint": newest.name, "half_written": fault(newest) is not None})
            continue
        ended.append(is_equal(whole, output))
        shutil.rmtree(output)
    half = sum(entry["half_written"] for entry in kills)
    print("| Kills | In the middle of a save | Runs that ended | With other weights |")
    print("|---:|---:|---:|---:|")
    print(f"| {len(kills)} | {half} | {len(ended)} | {ended.count(False)} |")
    return {"ended": len(ended), "differ": ended.count(False), "half_written": half, "kills": kills}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kill a training at random moments.")
    parser.add_argument("--kills", type=int, default=20, help="1 or more (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="of a whole run (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of moments and training (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "resume.json", metavar="FILE", help="default: %(default)s"
    )
    options = parser.parse_args(arguments)

    from regard.evaluate import circumstances

    with tempfile.TemporaryDirectory() as name:
        results = soak(options, Path(name))
    report = {
        "results": results,
        "steps": options.steps,
        "processes": options.processes,
        **circumstances(argparse.Namespace(seed=options.seed, device="cpu"), "train"),
        "command": shlex.join(["python", "benchmarks/resume.py", *(sys.argv[1:] if arguments is None else arguments)]),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if results["differ"] else 0


if __name__ == "__main__":
    sys.exit(main())
