"""Training images a second of ImageTextSlot on the CPU, under each setting, by the shipped recipe.

    python benchmarks/train_throughput.py [--steps 10] [--only before after]

Each setting trains a new model in processes of its own, 64 images a step, drawing them included; steps are timed after
two that warm up. Prints a Markdown table and writes benchmarks/results/train_throughput.json.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "trainers/configs/image_text_slot_5m.yaml"
OUTPUT = Path(__file__).with_name("results") / "train_throughput.json"
IMAGES_A_STEP, BATCH_SIZE, WARM_UP_STEPS = 64, 16, 2
# glibc then keeps the memory of one step for the next, instead of mapping it afresh.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


@dataclass(frozen=True)
class Setting:
    """How to train: attention implementation, number of processes, whether a batch is of one tier, whether memory is
    kept (`MALLOC`), and the threads that the processes share."""

    attention: str
    processes: int
    grouped: bool
    keep_memory: bool = True
    threads: int = 2


SETTINGS = {
    "before": Setting("sdpa", 1, grouped=False, keep_memory=False),
    "sdpa, 1 process, mixed": Setting("sdpa", 1, grouped=False),
    "sdpa, 1 process, grouped": Setting("sdpa", 1, grouped=True),
    "sdpa, 2 processes, mixed": Setting("sdpa", 2, grouped=False),
    "sdpa, 2 processes, grouped": Setting("sdpa", 2, grouped=True),
    "eager, 1 process, mixed": Setting("eager", 1, grouped=False),
    "eager, 1 process, grouped": Setting("eager", 1, grouped=True),
    "eager, 2 processes, mixed": Setting("eager", 2, grouped=False),
    "after": Setting("eager", 2, grouped=True),
    "half of after": Setting("eager", 1, grouped=True, threads=1),  # one process where that has two
}


def train(setting: Setting, preset: str, steps: int, output: Path) -> None:
    """Train in this process, which may be one of several; the first writes images a second to `output`."""
    from transformers import TrainerCallback
    from transformers.utils import logging

    from regard.configuration.configuration_image_text_slot import ImageTextSlotConfig
    from regard.data.rendered_text import RenderedTextDataset
    from regard.train import parse_settings

    class Clock(TrainerCallback):
        """Notes when each step ended."""

        ends: list[float] = []

        def on_step_end(self, args, state, control, **kwargs):
            self.ends.append(time.perf_counter())

    logging.set_verbosity_error()
    flags = {
        "preset": preset,
        "attn_implementation": setting.attention,
        "per_device_train_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": IMAGES_A_STEP // BATCH_SIZE // setting.processes,
        "max_steps": WARM_UP_STEPS + steps,
        "resume_from_checkpoint": "false",
        "output_dir": output.parent,
        "disable_tqdm": True,
        "report_to": "none",
        **dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), "no"),
    }
    arguments = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    recipe, model_args, data_args, training_args = parse_settings([str(RECIPE), *arguments])
    trainer = recipe.build(model_args, data_args, training_args)
    tiers = {name: float(weight) for name, _, weight in (item.partition("=") for item in data_args.tiers)}
    longest = ImageTextSlotConfig.from_preset(preset).num_slots - 2
    group_size = BATCH_SIZE if setting.grouped else 1
    trainer.train_dataset = RenderedTextDataset("train", tiers, max_characters=[(0, longest)], group_size=group_size)
    trainer.add_callback(Clock)
    trainer.train()
    if trainer.is_world_process_zero():
        seconds = Clock.ends[-1] - Clock.ends[WARM_UP_STEPS - 1]
        output.write_text(json.dumps(IMAGES_A_STEP * steps / seconds), encoding="utf-8")


def measure(name: str, preset: str, steps: int) -> float:
    """Images a second of a setting, trained in processes of their own.

    Raises:
        RuntimeError: the training failed; the message holds the end of what it said.
    """
    setting = SETTINGS[name]
    environment = {key: value for key, value in os.environ.items() if key not in MALLOC}
    environment |= {
        "OMP_NUM_THREADS": str(setting.threads // setting.processes),
        **(MALLOC if setting.keep_memory else {}),
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(setting.processes)]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "images_per_second.json")
        command = [
            sys.executable, *(launcher if setting.processes > 1 else []), str(Path(__file__).resolve()),
            "--preset", preset, "--steps", str(steps), "--worker", name, "--output", str(output),
        ]  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode or not output.is_file():
            raise RuntimeError(f"the training {name!r} failed:\n{done.stderr[-4000:]}")
        return json.loads(output.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the throughput of training.")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of 64 images (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--preset", default="5m", help="architecture (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help="JSON (default: %(default)s)")
    parser.add_argument("--worker", choices=SETTINGS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 1:
        parser.error("--steps: give 1 or more")
    if options.worker:
        train(SETTINGS[options.worker], options.preset, options.steps, options.output)
        return 0

    from regard.cli import progress_bar
    from regard.evaluate import circumstances

    speeds = {}
    with progress_bar(len(options.only), unit="setting") as bar:
        for name in options.only:
            bar.set_postfix_str(name)
            speeds[name] = measure(name, options.preset, options.steps)
            bar.update()
    first = next(iter(speeds.values()))
    print("| Setting | Attention | Processes x threads | Batches | Memory | Images/s | Gain |")
    print("|---|---|---|---|---|---:|---:|")
    for name, speed in speeds.items():
        setting = SETTINGS[name]
        threads = f"{setting.processes} x {setting.threads // setting.processes}"
        batches, memory = "grouped" if setting.grouped else "mixed", "kept" if setting.keep_memory else "mapped afresh"
        print(
            f"| {name} | {setting.attention} | {threads} | {batches} | {memory} | {speed:.1f} | {speed / first:.2f} |"
        )
    report = {
        "settings": {name: {**asdict(SETTINGS[name]), "images_per_second": speed} for name, speed in speeds.items()},
        "preset": options.preset,
        "steps": options.steps,
        "images_a_step": IMAGES_A_STEP,
        **circumstances(argparse.Namespace(seed=0, device="cpu"), "train"),
        "command": shlex.join(["python", "benchmarks/train_throughput.py", *sys.argv[1:]]),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
