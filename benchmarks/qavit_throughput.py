"""Images a second of QAViT, in training and inference, beside a ViT of as many parameters and tokens, and its cost by
image size.

    python benchmarks/qavit_throughput.py [--rounds 3]     # timm must be there: `make .venv/.installed-timm`

One thread; processor time, not wall time; the models take turns, and the median round counts. A training step is
forward, backward and AdamW on a batch of 64 (56 px: 16; patches of 16: 32). All run with PyTorch's fused attention.
Prints Markdown tables and writes benchmarks/results/qavit_throughput.json and docs/qavit_cost.png.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from classify import ROOT, QAViTLogits, plotted, timm_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging as transformers_logging

from regard.evaluate import processor_name

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "convolutions": ("convolution",),
    "norms": ("layer_norm",),
    "softmax and activations": ("softmax", "gelu"),
    "copies and reordering": ("copy_", "aten::cat", "aten::stack", "fill_"),
    "elementwise": ("aten::mul", "aten::add", "aten::div", "aten::sub", "addcmul"),
    "optimizer": ("adamw", "AdamW"),
}


@dataclass(frozen=True)
class Size:
    """A preset at an image size, and the ViT of its tokens and parameters (width, blocks, heads)."""

    preset: str
    side: int
    patch: int
    batch: int
    vit: tuple[int, int, int] = (160, 8, 5)

    def qavit(self) -> nn.Module:
        return QAViTLogits(self.preset, image_size=self.side, patch_size=self.patch)

    def peer(self) -> nn.Module:
        width, depth, heads = self.vit
        return timm_model(
            "vit_tiny_patch16_224",
            img_size=self.side,
            patch_size=self.patch,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
        )


SIZES = {
    "28": Size("tiny-32", 28, 4, 64),
    "32": Size("tiny-32", 32, 4, 64),
    "56": Size("tiny-32", 56, 4, 16),
    "112": Size("tiny", 112, 16, 32),
    "160": Size("tiny", 160, 16, 32),
    "224": Size("tiny", 224, 16, 32),
}


def stepper(model: nn.Module, size: Size, training: bool) -> Callable[[], None]:
    """A function that takes one training step, or classifies one batch."""
    images = torch.randn(size.batch, 3, size.side, size.side)
    labels = torch.arange(size.batch) % 10
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def train():
        model.train()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.inference_mode()
    def infer():
        model.eval()
        model(images)

    return train if training else infer


def measure(size: Size, rounds: int, with_peer: bool) -> dict[str, Any]:
    """Images a second of each model, their ratio, parameters and GFLOP an image."""
    models = {"qavit": size.qavit()} | ({"vit": size.peer()} if with_peer else {})
    report: dict[str, Any] = {
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "gflop": {name: round(count_gflop(model, size), 4) for name, model in models.items()},
    }
    for training in (True, False):
        steps = {name: stepper(model, size, training) for name, model in models.items()}
        seconds: dict[str, list[float]] = defaultdict(list)
        for turn in range(rounds + 1):
            for name, step in steps.items():
                start = time.process_time()
                step()
                if turn:  # the first warms up
                    seconds[name].append(time.process_time() - start)
        kind = "training" if training else "inference"
        report[kind] = {name: round(size.batch / statistics.median(times), 1) for name, times in seconds.items()}
        if with_peer:
            ratios = sorted(vit / own for vit, own in zip(seconds["vit"], seconds["qavit"], strict=True))
            report[f"{kind}_ratio"] = [round(statistics.median(ratios), 3), round(ratios[0], 3), round(ratios[-1], 3)]
    return report


def count_gflop(model: nn.Module, size: Size) -> float:
    """Billions of operations an image, forward; a multiplication and an addition are two."""
    model.eval()
    # The counter does not know the CPU's fused attention, which timm's models use.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, size.side, size.side))
    return counter.get_total_flops() / 1e9


def profile_step(size: Size) -> dict[str, float]:
    """Shares of the processor time of a training step by kind of operator."""
    step = stepper(size.qavit(), size, training=True)
    step()
    with profile(activities=[ProfilerActivity.CPU]) as run:
        step()
    shares: dict[str, float] = defaultdict(float)
    for event in run.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), "the rest")
        shares[kind] += event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: round(share / total, 3) for kind, share in sorted(shares.items(), key=lambda item: -item[1])}


def plot(results: dict[str, Any], axes: Any) -> None:
    """Milliseconds an image by its size."""
    for kind, marker in (("training", "o"), ("inference", "s")):
        for preset in ("tiny-32", "tiny"):
            rows = [(SIZES[key].side, 1000 / row[kind]["qavit"]) for key, row in results.items()
                    if SIZES[key].preset == preset]  # fmt: skip
            if rows:
                sides, costs = zip(*rows, strict=True)
                axes.plot(
                    sides, costs, marker=marker, label=f"{preset}, patches of {4 if preset != 'tiny' else 16}, {kind}"
                )
    axes.set(xlabel="side of the image, pixels", ylabel="milliseconds an image, one thread", yscale="log")


def format_table(results: dict[str, Any]) -> str:
    lines = [
        "| image | model | parameters | GFLOP | training, images/s | inference, images/s | to the ViT's |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for key, row in results.items():
        for name in row["parameters"]:
            ratio = ""
            if name == "qavit" and "training_ratio" in row:
                ratio = f"{row['training_ratio'][0]:.2f} / {row['inference_ratio'][0]:.2f}"
            title = SIZES[key].preset if name == "qavit" else "ViT"
            figures = (row["gflop"][name], row["training"][name], row["inference"][name], ratio)
            cells = (f"{key} px", title, f"{row['parameters'][name] / 1e6:.2f} M", *figures)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--skip-peer", action="store_true", help="without the ViT, which needs timm")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_name("results") / "qavit_throughput.json", help="JSON"
    )
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "qavit_cost.png", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    results = {key: measure(SIZES[key], options.rounds, not options.skip_peer) for key in options.sizes}
    shares = profile_step(SIZES[options.sizes[0]])
    report = {
        "command": shlex.join(["python", "benchmarks/qavit_throughput.py", *(arguments or sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "processor": processor_name(),
        "results": results,
        "training_step": shares,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(format_table(results))
    print(f"\nA training step at {options.sizes[0]} px: " + ", ".join(f"{k} {v:.0%}" for k, v in shares.items()))
    with plotted(options.plot) as axes:
        if axes is not None:
            plot(results, axes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
