"""Reading text from images: regard beside tesseract and rapidocr, on the same images, in one run, on one thread.

    make bench-read
    python benchmarks/read.py [--model PATH] [--beside NAME=PATH ...] [--tiers line,noisy] [--images 1000]

Prints Markdown tables, and writes all figures with versions, machine, date and seed to benchmarks/results/read.json.
README.md in this folder says what is compared, and how.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers import PEERS, Peer, PeerMissing, cpu_seconds, is_light_on_dark
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from regard.cli import complain, progress_bar, quiet_transformers
from regard.data.rendered_text import TIERS, RenderedTextDataset
from regard.evaluate import circumstances
from regard.hub import CheckpointError, resolve
from regard.metrics.text_recognition.text_recognition import TextRecognition, score_texts
from regard.read import Reader

OUTPUT = Path(__file__).with_name("results") / "read.json"
REFERENCE = "rapidocr 128"  # the faster of rapidocr's settings
BATCH_SIZES = (1, 32)
LENGTHS = (16, 256)
BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")  # a CPU with none of these takes fifty times as long in bfloat16
CHUNK = 50  # images between two steps of the progress bar

Samples = Sequence[Mapping[str, Any]]


class Regard:
    """A checkpoint as `regard read` runs it: from image to text, with the scores and boxes of all characters.

    Args:
        model: a folder, the name of a bundled checkpoint, or a Hub repository.
        dtype: of weights and computation.
    """

    def __init__(self, model: str | None, dtype: torch.dtype = torch.float32):
        self.reader = Reader(model, "cpu", threads=1, batch_size=1)
        self.model = self.reader.model
        self.model.to(dtype=dtype)

    def read(self, images: Sequence[Image.Image], batch_size: int) -> list[dict[str, Any]]:
        """A dict with `text` and `count` for each image, `batch_size` at a time."""
        self.reader.batch_size = batch_size
        readings = []
        for reading in self.reader.run([self.reader.prepare(image) for image in images]):
            if isinstance(reading, MemoryError):
                raise reading
            readings.append(reading)
        return readings

    @torch.inference_mode()
    def read_seconds(self, images: Sequence[Image.Image]) -> float:
        """CPU seconds an image of the network's `read` alone, one image at a time."""
        inputs = [self.reader.prepare(image)[0] for image in images]
        start = cpu_seconds()
        for pixel_values in inputs:
            self.model.read(pixel_values)
        return (cpu_seconds() - start) / len(images)

    def gflop(self, images: Sequence[Image.Image]) -> float:
        """Billions of floating-point operations an image that `read` takes (a multiplication and an addition are two).

        Attention is computed eagerly, because the counter does not know the CPU's fused kernel.
        """
        attention = self.model.config._attn_implementation or "sdpa"
        self.model.set_attn_implementation("eager")
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            for image in images:
                self.model.read(self.reader.prepare(image)[0])
        self.model.set_attn_implementation(attention)
        return counter.get_total_flops() / len(images) / 1e9


def load_peers() -> dict[str, Peer]:
    """The peers that are installed; of the others standard error says how to install them."""
    peers = {}
    for name, make in PEERS.items():
        try:
            peers[name] = make()
        except PeerMissing as error:
            complain(f"going on without {name}: {error}")
    return peers


def read_peer(peer: Peer, images: Sequence[Image.Image], tier: str) -> list[dict[str, Any]]:
    """As `Regard.read`; the count of a peer is that of its text."""
    return [{"text": text, "count": len(text.encode())} for text in peer.read(images, tier)]


def score(readings: Sequence[Mapping[str, Any]], samples: Samples) -> dict[str, Any]:
    """Metrics of all texts, by length, and of dark text on light ground and of light on dark."""

    def part(wanted: Sequence[int]) -> dict[str, Any]:
        return {
            "predictions": [readings[index]["text"] for index in wanted],
            "references": [samples[index]["text"] for index in wanted],
            "counts": [readings[index]["count"] for index in wanted],
        }

    light = [is_light_on_dark(sample["pixel_values"]) for sample in samples]
    scores = TextRecognition(keep_in_memory=True).compute(**part(range(len(samples))))
    assert scores is not None
    for name, polarity in (("dark_on_light", False), ("light_on_dark", True)):
        wanted = [index for index, is_light in enumerate(light) if is_light == polarity]
        scores[name] = score_texts(**part(wanted)) if wanted else None
    return scores


def time_systems(
    models: Mapping[str, Regard], peers: Mapping[str, Peer], data: Mapping[str, Samples], images: int, rounds: int
) -> dict[str, dict[str, dict[str, float]]]:
    """CPU milliseconds an image from image to text, as tier -> system -> batch size: medians of interleaved rounds.

    The first round warms up and is not counted, nor are two images at the start of each turn, when the caches are full
    of what another reader left. What starting tesseract's process costs is taken off.
    """
    seconds: dict[tuple[str, str, int], list[float]] = defaultdict(list)

    def measure(read: Callable[[Sequence[Image.Image]], object], timed: Sequence[Image.Image]) -> float:
        read(timed[:2])
        start = cpu_seconds()
        read(timed)
        return cpu_seconds() - start

    with progress_bar((rounds + 1) * len(data), unit="timing") as bar:
        for _ in range(rounds + 1):
            for tier, samples in data.items():
                timed = [sample["pixel_values"] for sample in samples[:images]]
                for batch_size in BATCH_SIZES:
                    for name, model in models.items():
                        spent = measure(partial(model.read, batch_size=batch_size), timed)
                        seconds[tier, name, batch_size].append(spent / len(timed))
                for name, peer in peers.items():
                    start_up = peer.start_up_seconds()
                    spent = measure(partial(peer.read, tier=tier), timed)
                    seconds[tier, name, 1].append((spent - start_up) / len(timed))
                bar.update()
    results: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for (tier, name, batch_size), values in seconds.items():
        results[tier][name][str(batch_size)] = 1000 * statistics.median(values[1:])
    return results


def cost_by_length(models: Mapping[str, Regard], samples: Samples, images: int, rounds: int) -> dict[str, Any]:
    """What the network's `read` costs on the images whose texts are nearest to `LENGTHS` characters, by system."""
    results: dict[str, Any] = {name: {} for name in models}
    for length in LENGTHS:
        nearest = sorted(samples, key=lambda sample: abs(len(sample["text"]) - length))[:images]
        pictures = [sample["pixel_values"] for sample in nearest]
        seconds: dict[str, list[float]] = defaultdict(list)
        for _ in range(rounds + 1):
            for name, model in models.items():
                seconds[name].append(model.read_seconds(pictures))
        for name, model in models.items():
            results[name][str(length)] = {
                "characters": statistics.mean(len(sample["text"]) for sample in nearest),
                "cpu_ms": 1000 * statistics.median(seconds[name][1:]),
                "gflop": model.gflop(pictures),
            }
    return results


def format_reading(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table with a row for each tier and system."""
    rows = [
        "| Tier | Reader | Character accuracy | CER | Exact match | Length error | Dark on light | Light on dark "
        "| CPU-ms, batch 1 | CPU-ms, batch 32 | Time to rapidocr's | GFLOP |",
        "|---|---|" + "---:|" * 10,
    ]
    for tier, systems in results.items():
        reference = systems.get(REFERENCE)
        for name, figures in systems.items():
            polarities = [figures[key] for key in ("dark_on_light", "light_on_dark")]
            milliseconds = figures["cpu_ms"]
            cells = [
                tier,
                name,
                f"{figures['character_accuracy']:.1%}",
                f"{figures['cer']:.1%}",
                f"{figures['exact_match']:.1%}",
                f"{figures['count_mae']:.2f}",
                *(f"{part['character_accuracy']:.1%}" if part else "–" for part in polarities),
                f"{milliseconds['1']:.1f}",
                f"{milliseconds['32']:.1f}" if "32" in milliseconds else "–",
                f"{milliseconds['1'] / reference['cpu_ms']['1']:.2f}" if reference else "–",
                f"{figures['gflop']:.2f}" if "gflop" in figures else "–",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def format_cost(report: Mapping[str, Any]) -> str:
    """A Markdown table of what reading costs: the mean of all tiers, and images of few and of many characters."""
    times = {
        name: [systems[name]["cpu_ms"] for systems in report["results"].values()]
        for name in next(iter(report["results"].values()))
    }
    means = {
        name: {size: statistics.mean(tier[size] for tier in tiers) for size in tiers[0]}
        for name, tiers in times.items()
    }
    heads = [f"{length} characters: CPU-ms of the network | GFLOP" for length in LENGTHS]
    rows = [
        "| Reader | Parameters | All tiers: CPU-ms, batch 1 | CPU-ms, batch 32 | Time to rapidocr's "
        f"| {' | '.join(heads)} |",
        "|---|" + "---:|" * (4 + 2 * len(heads)),
    ]
    for name, mean in means.items():
        cost = report["cost_by_length"].get(name, {}).values()
        cells = [
            name,
            f"{report['models'][name]['parameters']:,}" if name in report["models"] else "–",
            f"{mean['1']:.1f}",
            f"{mean['32']:.1f}" if "32" in mean else "–",
            f"{mean['1'] / means[REFERENCE]['1']:.2f}" if REFERENCE in means else "–",
            *([f"{figures['cpu_ms']:.1f} | {figures['gflop']:.2f}" for figures in cost] or ["– | –"] * len(LENGTHS)),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare readers of text in images.")
    parser.add_argument("--model", help="folder, bundled name or Hub repository (default: the bundled checkpoint)")
    parser.add_argument(
        "--beside", nargs="+", default=[], metavar="NAME=PATH", help="other checkpoints, each for a row more"
    )
    parser.add_argument("--tiers", default=",".join(TIERS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--images", type=int, default=1000, metavar="N", help="of each tier (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the images (default: %(default)s)")
    parser.add_argument(
        "--timed-images", type=int, default=32, metavar="N", help="of each tier, for the times (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of timing (default: %(default)s)")
    parser.add_argument("--skip-peers", action="store_true", help="read with regard only")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help="JSON (default: %(default)s)")
    return parser


def main() -> int:
    parser = build_parser()
    options = parser.parse_args()
    tiers = options.tiers.split(",")
    if unknown := [tier for tier in tiers if tier not in TIERS]:
        parser.error(f"--tiers: there is no {', '.join(unknown)}; there are {', '.join(TIERS)}")
    if min(options.images, options.timed_images, options.rounds) < 1:
        parser.error("--images, --timed-images and --rounds: give 1 or more")
    quiet_transformers()
    # In one process, the kernels that oneDNN compiles for one model would drive out those of another.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    try:
        name = Path(resolve(options.model)).name
        models = {name: Regard(options.model)}
        if any(there for what, there in torch.cpu.get_capabilities().items() if what in BFLOAT16):
            models[f"{name}, bfloat16"] = Regard(options.model, torch.bfloat16)
        for other in options.beside:
            label, given, path = other.partition("=")
            if label in models:
                parser.error(f"--beside {other}: there is another {label}; give it another name")
            models[label] = Regard(path if given else label)
        data = {tier: RenderedTextDataset("test", tier, size=options.images, seed=options.seed) for tier in tiers}
    except (CheckpointError, FileNotFoundError) as error:
        complain(error)
        return 1
    peers = {} if options.skip_peers else load_peers()

    samples: dict[str, list[dict[str, Any]]] = {}
    results: dict[str, dict[str, Any]] = {tier: {} for tier in tiers}
    with progress_bar(len(tiers) * options.images * (1 + len(models) + len(peers))) as bar:
        for tier in tiers:
            samples[tier] = []
            for index in range(options.images):
                samples[tier].append(data[tier][index])
                bar.update()
            images = [sample["pixel_values"] for sample in samples[tier]]
            readers = {name: partial(model.read, batch_size=BATCH_SIZES[-1]) for name, model in models.items()}
            readers |= {name: partial(read_peer, peer, tier=tier) for name, peer in peers.items()}
            for name, read in readers.items():
                bar.set_postfix_str(f"{tier}: {name}", refresh=False)
                readings = []
                for start in range(0, len(images), CHUNK):
                    readings += read(images[start : start + CHUNK])
                    bar.update(len(readings) - start)
                results[tier][name] = score(readings, samples[tier])

    times = time_systems(models, peers, samples, options.timed_images, options.rounds)
    for tier, systems in results.items():
        for name, figures in systems.items():
            figures["cpu_ms"] = times[tier][name]
        for name, model in models.items():
            systems[name]["gflop"] = model.gflop([sample["pixel_values"] for sample in samples[tier][:8]])
    everything = [sample for rows in samples.values() for sample in rows]
    report = {
        "results": results,
        "cost_by_length": cost_by_length(models, everything, min(16, options.timed_images), options.rounds),
        "models": {
            name: {"parameters": model.model.num_parameters(), "dtype": str(model.model.dtype)}
            for name, model in models.items()
        },
        "images": options.images,
        "timed_images": min(options.timed_images, options.images),
        "rounds": options.rounds,
        **circumstances(argparse.Namespace(seed=options.seed, device="cpu"), "test"),
        "command": shlex.join(["python", "benchmarks/read.py", *sys.argv[1:]]),
    }
    for peer in peers.values():
        report["versions"] |= peer.versions()
    print(format_reading(results), format_cost(report), sep="\n\n")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
