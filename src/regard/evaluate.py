"""Measure a model: `regard evaluate MODEL`, or `score_reader` and `score_classifier` from Python."""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from datasets import Dataset

from regard import __version__
from regard.classify import Classifier
from regard.cli import Worker, complain, progress_bar, quiet_transformers
from regard.data.image_classification import load_labelled_images
from regard.data.rendered_text import TIERS, RenderedTextDataset
from regard.data.text_images import load_text_images
from regard.evaluate_counting import COLUMNS as COUNTING_COLUMNS
from regard.evaluate_counting import CountScorer, choose_counting, score_counter
from regard.evaluate_questions import COLUMNS as QUESTION_COLUMNS
from regard.evaluate_questions import Asker, choose_questions, score_asker
from regard.hub import CheckpointError, find_verb
from regard.metrics.image_classification.image_classification import ImageClassification
from regard.metrics.text_recognition.text_recognition import TextRecognition
from regard.processing.image_io import open_image
from regard.read import Reader
from regard.train_settings import held_out_by
from regard_cli import EXIT_FAILED, EXIT_OK

IMAGES_A_TIER = 1000
DEFAULT_SPLIT = "test"  # of generated images, and of images with classes
COLUMNS = {
    "images": ("images", "{:.0f}"),
    "character_accuracy": ("accuracy", "{:.2%}"),
    "cer": ("CER", "{:.2%}"),
    "exact_match": ("exact", "{:.2%}"),
    "count_mae": ("length error", "{:.2f}"),
}
CLASSIFIER_COLUMNS = {
    "images": ("images", "{:.0f}"),
    "loss": ("loss", "{:.4f}"),
    "top1": ("top-1", "{:.2%}"),
    "top5": ("top-5", "{:.2%}"),
    "ms_per_batch": ("ms a batch", "{:.1f}"),
    "images_per_second": ("images/s", "{:.0f}"),
}


def run(options: argparse.Namespace) -> int:
    """Run `regard evaluate` and return its exit code."""
    quiet_transformers()
    try:
        settings = options.model, options.device, options.threads, options.batch_size
        verb = find_verb(options.model)
        if verb == "ask":
            split = options.split or DEFAULT_SPLIT
            data_sets, columns = choose_questions(options, split), QUESTION_COLUMNS
            score = partial(score_asker, Asker(*settings))
        elif verb == "count":
            split = options.split or DEFAULT_SPLIT
            data_sets, columns = choose_counting(options, split), COUNTING_COLUMNS
            score = partial(score_counter, CountScorer(*settings))
        elif verb == "classify":
            classifier = Classifier(*settings)
            data_sets, columns = choose_labelled_images(options, classifier.names), CLASSIFIER_COLUMNS
            score, split = partial(score_classifier, classifier), options.split or DEFAULT_SPLIT
        else:
            data_sets, columns = choose_data(options), COLUMNS
            score = partial(score_reader, Reader(*settings))
            split = options.split or (None if options.dataset else DEFAULT_SPLIT)
    except (CheckpointError, OSError, ValueError) as error:
        complain(error)
        return EXIT_FAILED
    if options.output:  # now, for a measurement may take long
        try:
            tempfile.TemporaryFile(dir=Path(options.output).parent).close()
        except OSError as error:
            complain(f"{options.output}: cannot be written ({error.strerror}); choose another place")
            return EXIT_FAILED
    results = {}
    start = time.perf_counter()
    try:
        with progress_bar(sum(len(data) for data in data_sets.values())) as bar:
            for name, data in data_sets.items():
                bar.set_postfix_str(name, refresh=False)
                results[name] = score(data, bar.update)
    except MemoryError as error:
        complain(error)
        return EXIT_FAILED
    seconds = time.perf_counter() - start
    print(format_table(results, columns))
    if options.output:
        report = {
            "model": options.model,
            "results": results,
            "seconds": round(seconds, 1),
            **circumstances(options, split),
        }
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
        return {Path(options.dataset).name: _at_most(data, options.images, options.seed)}
    tiers = options.tiers.split(",") if options.tiers else list(TIERS)
    split, size = options.split or DEFAULT_SPLIT, options.images or IMAGES_A_TIER
    return {tier: RenderedTextDataset(split, tiers=tier, size=size, seed=options.seed) for tier in tiers}


def choose_labelled_images(options: argparse.Namespace, known: Sequence[str]) -> dict[str, Dataset]:
    """The data set that the options name, with images and classes, all of them `known` to the model.

    Raises:
        ValueError: the options name none, or it has classes that the model does not know.
    """
    if options.tiers or not options.dataset:
        raise ValueError(
            f"{options.model} is a classifier: name images with classes by --dataset (a folder FOLDER/CLASS/IMAGE, "
            "fashion-mnist, cifar-10:PATH, cifar-100:PATH or a Hub data set); --tiers are texts"
        )
    held_out = held_out_by(options.model, options.seed)
    data = load_labelled_images(options.dataset, options.split or DEFAULT_SPLIT, **held_out)
    match_labels(data, known)
    return {Path(options.dataset).name: _at_most(data, options.images, options.seed)}


def match_labels(data: Dataset, known: Sequence[str]) -> list[int]:
    """The model's class for each class of the data, by their names.

    Raises:
        ValueError: the model lacks some; the message names them.
    """
    names, numbers = data.features["label"].names, {name: number for number, name in enumerate(known)}
    if missing := [name for name in names if name not in numbers]:
        raise ValueError(
            f"the model has no class {_list_some(missing)} ({len(missing)} of the data's {len(names)}); "
            f"it has {_list_some(known)}"
        )
    return [numbers[name] for name in names]


def _list_some(names: Sequence[str]) -> str:
    return ", ".join([*map(repr, names[:10]), *(["..."] if len(names) > 10 else [])])


def _at_most(data: Dataset, number: int | None, seed: int) -> Dataset:
    """So many rows, by chance: a folder has them class by class."""
    return data if number is None or number >= len(data) else data.shuffle(seed=seed).select(range(number))


def score_reader(reader: Reader, data: Sequence[Mapping[str, Any]], advance=lambda images: None) -> dict[str, Any]:
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
    for samples, results, _ in _run_all(reader, data, advance):
        predictions += [result["text"] for result in results]
        counts += [result["count"] for result in results]
        references += [sample["text"] for sample in samples]
    return cast(dict[str, Any], metric.compute(predictions=predictions, references=references, counts=counts))


def score_classifier(classifier: Classifier, data: Dataset, advance=lambda images: None) -> dict[str, Any]:
    """Classify every image of `data` and compare the classes.

    Args:
        classifier: the model.
        data: of the columns `pixel_values` and `label`, as `load_labelled_images` gives it.
        advance: called with the number of images after each batch.

    Returns:
        The metrics of `regard.metrics.image_classification`; the mean cross-entropy as `loss`; `batch_size`; and the
        median time of the network for that many prepared images, as `ms_per_batch` and `images_per_second`.

    Raises:
        ValueError: the data has classes that the model does not know.
        MemoryError: memory does not suffice for a single image.
    """
    numbers = match_labels(data, classifier.names)
    rows, labels, batches = [], [], []
    for samples, results, seconds in _run_all(classifier, data, advance):
        rows += [result["logits"] for result in results]
        labels += [numbers[sample["label"]] for sample in samples]
        batches.append((len(samples), seconds))
    logits = torch.stack(rows)
    metric = ImageClassification(keep_in_memory=True)
    scores = metric.compute(predictions=logits.numpy(), references=labels, names=classifier.names)
    batch_size = max(number for number, _ in batches)
    typical = statistics.median(seconds for number, seconds in batches if number == batch_size)
    return {
        **cast(dict[str, Any], scores),
        "loss": torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item(),
        "batch_size": batch_size,
        "ms_per_batch": 1000 * typical,
        "images_per_second": batch_size / typical,
    }


def _run_all(
    worker: Worker, data: Sequence[Mapping[str, Any]] | Dataset, advance: Callable[[int], Any]
) -> Iterator[tuple[list[Mapping[str, Any]], list[dict[str, Any]], float]]:
    """Samples, their results, and the seconds that the model took, batch by batch, each of which ran whole."""
    start = 0
    while start < len(data):
        samples = [data[index] for index in range(start, min(start + worker.batch_size, len(data)))]
        prepared = [worker.prepare(open_image(sample["pixel_values"])) for sample in samples]
        begin = time.perf_counter()
        results = worker.run(prepared)
        seconds = time.perf_counter() - begin
        for result in results:
            if isinstance(result, MemoryError):
                raise result
        if worker.batch_size < len(samples):  # memory did not suffice: again, that the time be of the size that runs
            continue
        yield samples, cast(list[dict[str, Any]], results), seconds
        advance(len(samples))
        start += len(samples)


def format_table(results: Mapping[str, Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> str:
    """One row a data set, and below each its rows by length of text, type of question or number of objects, where there
    are several; "-" for what was not measured."""
    rows = [["", *(title for title, _ in columns.values())]]
    for name, metrics in results.items():
        finer = next((metrics[by] for by in ("by_length", "by_type", "by_range") if metrics.get(by)), {})
        parts = {name: metrics} | {f"  {title}": part for title, part in finer.items() if len(finer) > 1}
        rows += [
            [title, *(form.format(part[key]) if key in part else "-" for key, (_, form) in columns.items())]
            for title, part in parts.items()
        ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def circumstances(options: argparse.Namespace, split: str | None) -> dict[str, Any]:
    """What is needed to repeat a measurement: command, date, split, seed, versions, machine."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "regard"), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "split": split,
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
