"""What each module of a counting step buys, and each way to train it: equal short runs.

    python benchmarks/count_ablations.py MODEL [--steps 250] [--images 400] [--jobs 2] [--only NAME ...]

From scratch the longest part of the training is learning to see and to read, which all have in common. So each run
begins with MODEL's encoders, cells and heads, but with a new step: memory, foveation, attention to the counted,
reasoning, as far as the run has them, and the queries. Everything learns, by the shipped recipe, with the same steps,
scenes and seed, on one thread; validation scenes of trained categories are counted then.

Prints a Markdown table and writes benchmarks/results/count_ablations.json.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, set_seed
from transformers.utils import logging

from regard.cli import progress_bar, quiet_transformers
from regard.evaluate import circumstances
from regard.modeling.counting_layers import StepLayers
from regard.train import parse_settings

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")
RECIPE = ROOT / "trainers/configs/sequential_attention_counting_tiny.yaml"
MODULES = ("memory", "foveation", "cross_attention", "reasoning")


def with_modules(*present: str, **others: Any) -> dict[str, Any]:
    """Fields of the configuration."""
    return {f"use_{module}": module in present for module in MODULES} | others


# Name -> fields of the configuration, and mode of training.
RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "baseline": (with_modules(), "trajectory"),
    **{f"baseline + {module.replace('_', '-')}": (with_modules(module), "trajectory") for module in MODULES},
    "all": (with_modules(*MODULES), "trajectory"),
    "all, alternating": (with_modules(*MODULES), "alternating"),
    "all, alternating, marked in the image": (with_modules(*MODULES, marking="image"), "alternating"),
}
COLUMNS = {
    "mae": ("MAE", "{:.2f}"),
    "exact_match_0-4": ("0-4 exact", "{:.1%}"),
    "mae_5-19": ("5-19 MAE", "{:.2f}"),
    "mae_20-49": ("20-49 MAE", "{:.2f}"),
    "absent_accuracy": ("absent: 0", "{:.1%}"),
    "false_stop_rate": ("false stop", "{:.2%}"),
    "step_parameters": ("parameters of a step", "{:,}"),
    "training_seconds": ("training, CPU-s", "{:.0f}"),
}


def train(name: str, model: str, steps: int, images: int, seed: int, bf16: bool) -> dict[str, Any]:
    """Train a run of `RUNS` and score it on validation scenes."""
    overrides, mode = RUNS[name]
    torch.set_num_threads(1)
    quiet_transformers()
    logging.set_verbosity_error()  # weights of modules that a run lacks are left over
    with tempfile.TemporaryDirectory() as folder:
        recipe, model_args, data_args, training_args = parse_settings(
            [
                str(RECIPE), "--init_from", model, "--config_overrides", json.dumps(overrides), "--mode", mode,
                "--max_steps", str(steps), "--eval_images", str(images), "--seed", str(seed), "--bf16", str(bf16),
                "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false",
                "--report_to", "none", "--disable_tqdm", "true", "--output_dir", folder,
            ]
        )  # fmt: skip
        trainer = recipe.build(model_args, data_args, training_args)
        network: Any = trainer.model
        set_seed(seed)
        network.look = StepLayers(network.config)
        network.look.apply(network._init_weights)
        trainer.remove_callback(PrinterCallback)
        begin = time.process_time()
        trainer.train()
        seconds = time.process_time() - begin
        scores = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
    parameters = sum(parameter.numel() for parameter in network.look.parameters())
    return {**scores, "step_parameters": parameters, "training_seconds": seconds}


def format_table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        f"| run | {' | '.join(title for title, _ in COLUMNS.values())} |",
        f"|---|{'--:|' * len(COLUMNS)}",
    ]
    for name, row in results.items():
        cells = (form.format(row[key]) if key in row else "–" for key, (_, form) in COLUMNS.items())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, bundled name or Hub repository of weights to begin with")
    parser.add_argument("--steps", type=int, default=250, help="of 16 images (default: %(default)s)")
    parser.add_argument("--images", type=int, default=400, help="validation scenes (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME", help="some of the runs")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16, on a CPU that computes in it")
    parser.add_argument("--output", type=Path, default=RESULTS / "count_ablations.json", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    settings = {name: getattr(options, name) for name in ("model", "steps", "images", "seed", "bf16")}
    run = partial(train, **settings)
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, spawning) as pool, progress_bar(len(options.only), "run") as bar:
        waiting = {name: pool.submit(run, name) for name in options.only}
        for future in waiting.values():
            future.add_done_callback(lambda _: bar.update())
        results = {name: future.result() for name, future in waiting.items()}
    print(format_table(results))
    report = {
        **circumstances(argparse.Namespace(seed=options.seed, device="cpu"), "validation"),
        "command": shlex.join(["python", "benchmarks/count_ablations.py", *(arguments or sys.argv[1:])]),
        "results": results,
    }
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
