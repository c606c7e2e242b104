"""Measure a model that reads text: `regard evaluate MODEL`, or `score` from Python."""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from datasets import Dataset

from regard import __version__
from regard.cli import complain, progress_bar, quiet_transformers
from regard.data.rendered_text import TIERS, RenderedTextDataset
from regard.data.text_images import load_text_images
from regard.hub import CheckpointError
from regard.metrics.text_recognition.text_recognition import TextRecognition
from regard.processing.image_io import open_image
from regard.read import Reader
from regard_cli import EXIT_FAILED, EXIT_OK

IMAGES_A_TIER = 1000
DEFAULT_SPLIT = "test"  # of generated images
COLUMNS = {
    "images": ("images", "{:.0f}"),
    "character_accuracy": ("accuracy", "{:.2%}"),
    "cer": ("CER", "{:.2%}"),
    "exact_match": ("exact", "{:.2%}"),
    "count_mae": ("length error", "{:.2f}"),
}


def run(options: argparse.Namespace) -> int:
    """Run `regard evaluate` and return its exit code."""
    quiet_transformers()
    try:
        data_sets = choose_data(options)
        reader = Reader(options.model, options.device, options.threads, options.batch_size)
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        complain(error)
        return EXIT_FAILED
    results = {}
    start = time.perf_counter()
    with progress_bar(sum(len(data) for data in data_sets.values())) as bar:
        for name, data in data_sets.items():
            bar.set_postfix_str(name, refresh=False)
            results[name] = score(reader, data, bar.update)
    seconds = time.perf_counter() - start
    print(format_table(results))
    if options.output:
        report = {"model": options.model, "results": results, "seconds": round(seconds, 1), **circumstances(options)}
        try:
            Path(options.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            complain(f"{options.output}: cannot be written ({error.strerror}); choose another place")
            return EXIT_FAILED
    return EXIT_OK


def choose_data(options: argparse.Namespace) -> dict[str, Any]:
    """The data sets that the options name, each a sequence of `{"pixel_values": image, "text": str}`."""
    if options.dataset:
        data = cast(Dataset, load_text_images(options.dataset, split=options.split))
        if options.images is not None:
            data = data.select(range(min(options.images, len(data))))
        return {Path(options.dataset).name: data}
    tiers = options.tiers.split(",") if options.tiers else list(TIERS)
    split, size = options.split or DEFAULT_SPLIT, options.images or IMAGES_A_TIER
    return {tier: RenderedTextDataset(split, tiers=tier, size=size, seed=options.seed) for tier in tiers}


def score(reader: Reader, data: Sequence[Mapping[str, Any]], advance=lambda images: None) -> dict[str, Any]:
    """Read every image of `data` and compare the texts.

    Args:
        reader: the model.
        data: samples with an image in `pixel_values` and its `text`.
        advance: called with the number of images after each batch.

    Returns:
        The metrics of `regard.metrics.text_recognition`.

    Raises:
        MemoryError: memory does not suffice for a single image.
    """
    metric = TextRecognition(keep_in_memory=True)
    predictions, references, counts = [], [], []
    for start in range(0, len(data), reader.batch_size):
        samples = [data[index] for index in range(start, min(start + reader.batch_size, len(data)))]
        for result in reader.run([reader.prepare(open_image(sample["pixel_values"])) for sample in samples]):
            if isinstance(result, MemoryError):
                raise result
            predictions.append(result["text"])
            counts.append(result["count"])
        references += [sample["text"] for sample in samples]
        advance(len(samples))
    return cast(dict[str, Any], metric.compute(predictions=predictions, references=references, counts=counts))


def format_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a data set, and below each its rows by length of text in characters."""
    rows = [["", *(title for title, _ in COLUMNS.values())]]
    for name, metrics in results.items():
        by_length = metrics["by_length"]
        parts = {name: metrics} | {f"  {length}": part for length, part in by_length.items() if len(by_length) > 1}
        rows += [
            [title, *(form.format(part[key]) for key, (_, form) in COLUMNS.items())] for title, part in parts.items()
        ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def circumstances(options: argparse.Namespace) -> dict[str, Any]:
    """What is needed to repeat a measurement: command, date, versions, machine, seed."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "regard"), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "split": options.split or (None if options.dataset else DEFAULT_SPLIT),
        "seed": options.seed,
        "versions": {
            "regard": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": options.device or str(torch.accelerator.current_accelerator(check_available=True) or "cpu"),
        },
    }


def processor_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
