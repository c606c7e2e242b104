"""QAViT beside other small classifiers from scratch at equal processor time, and with its parts taken away one by one.

    python benchmarks/classify.py peers [--seconds 300]      # `make bench-classify` installs timm first
    python benchmarks/classify.py ablations [--steps 300] [--seeds 3] [--jobs 2]

Fashion-MNIST: all learn from the same training split by the same recipe (AdamW, cosine, flips and shifts of 2 pixels,
label smoothing) on one thread, and are measured on the validation split that is held out of it; the test set is not
touched. `peers` gives each the same processor time, in turns, evaluation not counted; `ablations` the same steps, and
when stopped goes on where it was.
Prints a Markdown table, and writes benchmarks/results/classify_{peers,ablations}.json and docs/classify.png.
"""

import argparse
import json
import math
import multiprocessing
import shlex
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from regard.configuration.configuration_qavit import BRANCHES, QAViTConfig
from regard.data.augmentation import augment_images
from regard.data.image_classification import load_labelled_images
from regard.evaluate import processor_name
from regard.modeling.modeling_qavit import QAViTForImageClassification

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")
TIMM = Path(sys.prefix) / "timm"  # where `make bench-classify` installs it
SIDE, CLASSES, SHIFT = 28, 10, 2 / 28
LEARNING_RATE, WEIGHT_DECAY, SMOOTHING, WARM_UP = 1e-3, 0.05, 0.1, 0.05
SHARED: dict[str, "Data"] = {}  # the images, in a process that runs ablations
SLICE_SECONDS, MEASUREMENTS, EVAL_BATCH = 5.0, 8, 250

# Each of the design's changes undone, and each branch off.
ABLATIONS: dict[str, dict[str, Any]] = {
    "tiny-32": {},
    **{f"without {name}": {"branches": [other for other in BRANCHES if other != name]} for name in BRANCHES},
    "channel groups attend over tokens": {"channel_attention": "tokens"},
    "one weight a branch": {"fusion": "static"},
    "bank is never written": {"bank_written": False},
    "feed-forward without shortcut and norm": {"ffn_shortcut": False},
    "patches without convolutional stem": {"stem": "patch"},
    "12 blocks with narrow feed-forwards, as in tiny": {"depth": 12, "mlp_ratio": 0.5},
    "weights start at 0.02": {"initializer_range": 0.02},
}


class QAViTLogits(nn.Module):
    """QAViT as timm's models are called."""

    def __init__(self, preset: str, **overrides):
        super().__init__()
        fields = {"image_size": SIDE, "patch_size": 4, "num_labels": CLASSES, **overrides}
        config = QAViTConfig.from_preset(preset, **fields)
        self.model = QAViTForImageClassification(config)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images).logits


def timm_model(name: str, **options) -> nn.Module:
    """A model of timm, with new weights."""
    if str(TIMM) not in sys.path:
        sys.path.append(str(TIMM))  # only now: transformers would want to use the torchvision that timm needs
    if not torch.cuda.is_available():
        # torchvision from PyPI is built for CUDA; beside a CPU build of PyTorch its operators are missing, and its
        # import fails when it describes them. These classifiers use none.
        sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    import timm  # pyright: ignore[reportMissingImports]

    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)


# Name -> model and the side of its images. The convolutional peers shrink an image by 32: they get it enlarged too.
PEERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "regard tiny-32": (lambda: QAViTLogits("tiny-32"), SIDE),
    "regard as_described": (lambda: QAViTLogits("as_described"), SIDE),
    "deit_tiny, patches of 4": (lambda: timm_model("deit_tiny_patch16_224", img_size=SIDE, patch_size=4), SIDE),
    **{
        f"{name}, {side} px": (lambda name=name: timm_model(name), side)
        for name in ("efficientvit_b0", "mobilenetv4_conv_small", "convnext_atto")
        for side in (32, 64)
    },
}


@dataclass
class Data:
    """Images `(number, 3, 28, 28)` in [0, 1] and their labels."""

    images: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def load(cls, source: str, split: str, limit: int | None) -> "Data":
        rows = load_labelled_images(source, split).shuffle(seed=0)
        rows = rows.select(range(min(limit or len(rows), len(rows))))[:]
        pixels = np.stack([np.asarray(image.convert("RGB").resize((SIDE, SIDE))) for image in rows["pixel_values"]])
        return cls(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, torch.tensor(rows["label"]))


@dataclass
class Run:
    """One model in training.

    Args:
        budget: processor seconds, or steps if `by_steps`.
    """

    model: nn.Module
    side: int
    budget: float
    by_steps: bool
    seed: int
    batch_size: int
    seconds: float = 0.0
    steps: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)  # processor seconds, accuracy

    def __post_init__(self):
        self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, LEARNING_RATE)
        self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def done(self) -> float:
        """Share of the budget that is used."""
        return (self.steps if self.by_steps else self.seconds) / self.budget

    def train(self, data: Data, until: float) -> None:
        """Take steps until that share of the budget is used."""
        self.model.train()
        while self.done < until:
            start = time.process_time()
            rows = torch.randint(0, len(data.labels), (self.batch_size,), generator=self.generator)
            images = self.prepare(augment_images(data.images[rows], flip=True, shift=SHIFT))
            loss = nn.functional.cross_entropy(self.model(images), data.labels[rows], label_smoothing=SMOOTHING)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            rate = min(self.done / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * min(self.done, 1)))
            for group in self.optimizer.param_groups:
                group["lr"] = LEARNING_RATE * max(rate, 0.01)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.seconds += time.process_time() - start
            self.steps += 1

    @torch.inference_mode()
    def measure(self, data: Data) -> float:
        """Accuracy on `data`, noted in the curve."""
        self.model.eval()
        hits = 0
        for start in range(0, len(data.labels), EVAL_BATCH):
            part = slice(start, start + EVAL_BATCH)
            hits += (self.model(self.prepare(data.images[part])).argmax(1) == data.labels[part]).sum().item()
        self.curve.append((self.seconds, hits / len(data.labels)))
        return self.curve[-1][1]

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        if self.side != SIDE:
            size = (self.side, self.side)
            images = nn.functional.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return (images - 0.286) / 0.353

    def report(self) -> dict[str, Any]:
        """Figures of a finished run."""
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "images": self.steps * self.batch_size,
            "seconds": round(self.seconds, 1),
            "images_a_second": round(self.steps * self.batch_size / self.seconds, 1),
            "accuracy": self.curve[-1][1],
            "curve": [(round(seconds, 1), accuracy) for seconds, accuracy in self.curve],
        }


def compare_peers(options: argparse.Namespace, train: Data, validation: Data) -> dict[str, Any]:
    """Train all in turns, slice by slice of processor time."""
    runs: dict[str, Run] = {}
    for name, (make, side) in PEERS.items():
        if options.only and not any(word in name for word in options.only):
            continue
        torch.manual_seed(options.seed)
        try:
            model = make()
        except ImportError as error:
            print(f"{name}: left out ({error}); `make bench-classify` installs timm", file=sys.stderr)
            continue
        runs[name] = Run(model, side, options.seconds, False, options.seed, options.batch_size)
    turns = max(MEASUREMENTS, round(options.seconds / SLICE_SECONDS))
    every = turns / MEASUREMENTS
    with tqdm(total=turns * len(runs), unit="turn") as bar:
        for turn in range(1, turns + 1):
            for name, run in runs.items():
                bar.set_postfix_str(name, refresh=False)
                run.train(train, turn / turns)
                if turn // every > (turn - 1) // every:
                    run.measure(validation)
                bar.update()
    return {name: run.report() for name, run in runs.items()}


def compare_ablations(options: argparse.Namespace, train: Data, validation: Data) -> dict[str, Any]:
    """Train each for the same steps, with several seeds, some at once; seeds are the outer loop, so that a stopped call
    says much. Each run is written down when it ends; those that a stopped call has left are not run again."""
    names = [name for name in ABLATIONS if not options.only or any(word in name for word in options.only)]
    settings = {"steps": options.steps, "batch_size": options.batch_size, "validation_images": len(validation.labels)}
    settings |= {"dataset": options.dataset, "ablations": ABLATIONS}
    settings |= {"torch": torch.__version__, "processor": processor_name()}
    file = options.output / "classify_ablations.json"
    runs = unfinished_runs(file, settings)
    seeds = range(options.seed, options.seed + options.seeds)
    todo = [(name, seed) for seed in seeds for name in names if f"{name}, seed {seed}" not in runs]
    context = multiprocessing.get_context("fork")  # so that all have the images without copying them
    shared = {"train": train, "validation": validation}
    with (
        ProcessPoolExecutor(options.jobs, context, initializer=SHARED.update, initargs=(shared,)) as pool,
        tqdm(total=options.seeds * len(names), initial=options.seeds * len(names) - len(todo), unit="run") as bar,
    ):
        futures = {pool.submit(run_ablation, *run, options): run for run in todo}
        try:
            for future in as_completed(futures):
                name, seed = futures[future]
                runs[f"{name}, seed {seed}"] = future.result()
                write_json(file, {"finished": False, "settings": settings, "runs": runs})
                bar.update()
        except BaseException:  # an interruption too
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: summarise([runs[f"{name}, seed {seed}"] for seed in seeds]) for name in names}


def unfinished_runs(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The runs that a stopped call with these settings has left in its file."""
    if not file.is_file():
        return {}
    report = json.loads(file.read_text(encoding="utf-8"))
    return report["runs"] if report.get("settings") == settings and not report["finished"] else {}


def write_json(file: Path, report: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_suffix(".new")  # a stop while it is written leaves the old one
    whole.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    whole.replace(file)


def run_ablation(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one ablation, in a process that has the images."""
    torch.manual_seed(seed)
    try:
        model = QAViTLogits("tiny-32", **ABLATIONS[name])
    except Exception as error:  # not all of them can be sent to another process
        raise ValueError(f"{name}: {error}") from None
    run = Run(model, SIDE, options.steps, True, seed, options.batch_size)
    run.train(SHARED["train"], 1.0)
    run.measure(SHARED["validation"])
    return run.report()


def summarise(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    accuracies = [report["accuracy"] for report in reports]
    return {
        "parameters": reports[0]["parameters"],
        "accuracy": statistics.mean(accuracies),
        "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "accuracies": accuracies,
        "images_a_second": round(statistics.median(report["images_a_second"] for report in reports), 1),
    }


def format_peers(results: dict[str, Any]) -> str:
    lines = ["| model | parameters | images a second | images seen | accuracy |", "|---|--:|--:|--:|--:|"]
    for name, row in sorted(results.items(), key=lambda item: -item[1]["accuracy"]):
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:.2f} M | {row['images_a_second']:.0f} | {row['images']:,} "
            f"| {row['accuracy']:.1%} |"
        )
    return "\n".join(lines)


def format_ablations(results: dict[str, Any]) -> str:
    whole = results.get("tiny-32", {}).get("accuracy")
    lines = ["| model | parameters | images a second | accuracy | spread | change |", "|---|--:|--:|--:|--:|--:|"]
    for name, row in results.items():
        spread = "" if row["spread"] is None else f"{100 * row['spread']:.2f}"
        change = "" if whole is None or name == "tiny-32" else f"{100 * (row['accuracy'] - whole):+.2f}"
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:.2f} M | {row['images_a_second']:.0f} "
            f"| {100 * row['accuracy']:.2f} % | {spread} | {change} |"
        )
    return "\n".join(lines)


@contextmanager
def plotted(path: Path) -> Iterator[Any]:
    """Axes that are saved as a picture, with legend and grid; None where matplotlib is not installed."""
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("no plot: `pip install matplotlib`", file=sys.stderr)
        yield None
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    figure, axes = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    yield axes
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)


def plot(results: dict[str, Any], axes: Any) -> None:
    """Accuracy against processor seconds."""
    for name, row in sorted(results.items(), key=lambda item: -item[1]["accuracy"]):
        seconds, accuracies = zip(*row["curve"], strict=True)
        ours = name.startswith("regard")
        axes.plot(seconds, [100 * a for a in accuracies], label=name, linewidth=2.5 if ours else 1.2, marker="o", ms=3)
    axes.set(xlabel="processor seconds of training", ylabel="validation accuracy, %", title="Fashion-MNIST, one thread")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["peers", "ablations"])
    parser.add_argument("--dataset", default="fashion-mnist", help="as `regard train` takes it (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=300, help="processor time of each peer (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="steps of each ablation (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each ablation (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="ablations at once, a thread each (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--validation-images", type=int, help="measure on so many (default: all 5,000)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only models whose name has one of these words")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON (default: %(default)s)")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "classify.png", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    train = Data.load(options.dataset, "train", None)
    validation = Data.load(options.dataset, "validation", options.validation_images)
    compare = {"peers": compare_peers, "ablations": compare_ablations}[options.what]
    results = compare(options, train, validation)
    report = {
        "command": shlex.join(
            ["python", "benchmarks/classify.py", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "processor": processor_name(),
        "finished": True,
        "train_images": len(train.labels),
        "validation_images": len(validation.labels),
        "results": results,
    }
    write_json(options.output / f"classify_{options.what}.json", report)
    print({"peers": format_peers, "ablations": format_ablations}[options.what](results))
    if options.what == "peers":
        with plotted(options.plot) as axes:
            if axes is not None:
                plot(results, axes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
