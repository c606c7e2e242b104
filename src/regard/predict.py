"""Bulk inference: `regard predict ...` in one process, `accelerate launch -m regard.predict ...` in many.

Its arguments stand in `regard_cli`. A shard is a fixed range of the input's rows, and `part-NNNNN.parquet` their
results. It appears whole or not at all: whatever is killed, a file of that name is final, and the rest is done again.
"""

import argparse
import hashlib
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby, islice
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset
import pyarrow.parquet
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Features, List, Value
from huggingface_hub.errors import HTTPError
from PIL import Image
from transformers import AutoConfig, pipeline

from regard import __version__
from regard.cli import Worker, complain, progress_bar, quiet_transformers
from regard.data.image_rows import ImageRows, RowsError
from regard.hub import explain, find_verb, resolve
from regard.processes import end_process_group
from regard.processing.image_io import ImageReadError
from regard_cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_PARTIAL

MANIFEST = "manifest.json"
_ALWAYS = timedelta(days=365)  # the first process to end waits for the last
_OPENED = 8  # images open at a time


@dataclass(frozen=True)
class Task:
    """What a model of a verb does in bulk.

    `pipeline` is the task's name in transformers; `result` the types of what it gives of a row: of a dict's entries, or
    of a list under the only name; `inputs` the columns that it takes beside the image, as strings; `parameters` those
    options of the command line that it takes.
    """

    pipeline: str
    result: dict[str, Any]
    inputs: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()


_SCORE = Value("float32")  # and pixels
_CHARACTERS = List({"character": Value("string"), "score": _SCORE, "box": List(Value("float32"))})
# Another verb adds its line here.
TASKS = {
    "read": Task("text-recognition", {"text": Value("string"), "score": _SCORE, "characters": _CHARACTERS}),
    "classify": Task(
        "image-classification", {"labels": List({"label": Value("string"), "score": _SCORE})}, parameters=("top_k",)
    ),
    "ask": Task(
        "visual-question-answering",
        {"answers": List({"answer": Value("string"), "score": _SCORE})},
        inputs=("question",),
        parameters=("top_k",),
    ),
    "count": Task(
        "object-counting",
        {
            "count": Value("int64"),
            "count_estimate": _SCORE,
            "agrees": Value("bool"),
            "points": List({"x": _SCORE, "y": _SCORE, "score": _SCORE}),
            "complete": Value("bool"),
            "tiled": Value("bool"),
        },
        inputs=("category",),
    ),
}


def run(options: argparse.Namespace) -> int:
    """Run `regard predict` in this process, which may be one of many, and return its exit code."""
    quiet_transformers()
    state = PartialState(cpu=options.device == "cpu", timeout=_ALWAYS)
    try:
        return _run(options, state)
    except KeyboardInterrupt:
        if state.is_main_process:
            complain(f"interrupted; {options.output} keeps its finished parts, and the same command goes on from there")
        return EXIT_INTERRUPTED
    finally:
        end_process_group()


def _run(options: argparse.Namespace, state: PartialState) -> int:
    start = time.perf_counter()
    job = worker = None
    shared: list[Any] = [None]
    if state.is_main_process:  # the first process tries whether it works, the others follow
        job, worker = _start(options, state)
        shared = [job and (job.settings, job.done, job.number)]
    (first,) = broadcast_object_list(shared)
    if first is not None and job is None:
        job, worker = _start(options, state, *first)
    if first is None or job is None:
        return EXIT_FAILED
    try:
        if worker is not None:
            with progress_bar(job.rows.total, unit="row", hidden=not state.is_main_process) as bar:
                number = job.run(worker, state.process_index, state.num_processes, bar.update)
            state.wait_for_everyone()
            if state.is_main_process:
                job.finish(number)
            with suppress(RuntimeError):  # a process that goes may cut off those still in a barrier: let it be this one
                state.wait_for_everyone()
    except (OSError, RowsError, MemoryError) as error:
        complain(f"{error}; {job.output} keeps its finished parts, and the same command goes on from there")
        return EXIT_FAILED
    return job.summarize(time.perf_counter() - start) if state.is_main_process else EXIT_OK


def _start(
    options: argparse.Namespace, state: PartialState, *first: Any
) -> tuple["Job", "Predictor | None"] | tuple[None, None]:
    """A job, and its model if anything is left to do; or nothing, once it is said why.

    Args:
        first: settings, finished shards and number of rows, as the first process found them.
    """
    try:
        job = Job(options, *first)
        worker = None
        if not job.is_complete():
            worker = Predictor(job, options.device or state.device, options.threads, options.batch_size)
            if state.is_main_process:
                job.write_manifest()
        return job, worker
    except (OSError, ValueError, HTTPError) as error:
        complain(error)
        return None, None


class Job:
    """Rows, a model by name, and a folder with the results of both.

    The folder's manifest, which the first run writes, holds the settings that the results depend on. Device, threads,
    size of batches and number of processes may change from run to run.

    Args:
        options: the command line's.
        settings: what those of this job must be; None: those of the folder's manifest, if it has one.
        done: the finished shards; None: those of the folder.
        number: of all rows, if `settings` are given and it is known.

    Raises:
        ValueError: model, rows or settings are no good, or the folder holds the results of others.
        OSError: something cannot be read.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        settings: dict[str, Any] | None = None,
        done: set[int] | None = None,
        number: int | None = None,
    ):
        self.model, self.shard_size, self.output = options.model, options.shard_size, Path(options.output)
        self.verb = find_verb(options.model)
        self.task = TASKS[self.verb]
        self.parameters = {} if options.top_k is None else {"top_k": options.top_k}
        if unknown := set(self.parameters) - set(self.task.parameters):
            raise ValueError(f"--{unknown.pop().replace('_', '-')}: {self.task.pipeline} has none; leave it out")
        columns = dict(options.columns or ())
        self.rows = ImageRows(options.dataset, options.split, options.config, columns, self.task.inputs)
        text = Value("string")
        inputs = dict.fromkeys(self.task.inputs, text)
        self.schema = Features(
            {"index": Value("int64"), "id": text, **inputs, **self.task.result, "error": text}
        ).arrow_schema
        self.settings = {
            "task": self.task.pipeline,
            "model": options.model,
            "model_version": model_version(options.model),
            "dataset": options.dataset,
            "dataset_version": self.rows.version,
            "split": options.split,
            "config": options.config,
            "columns": columns,
            "parameters": self.parameters,
            "shard_size": self.shard_size,
        }
        self.number = number
        self.done = finished_shards(self.output) if done is None else done
        if settings is None:
            settings, self.number = self._read_manifest()
        different = [
            f"{name} was {value!r}, and is {self.settings.get(name)!r}"
            for name, value in settings.items()
            if self.settings.get(name) != value
        ]
        if different:
            raise ValueError(
                f"{self.output} holds results of other settings: {'; '.join(different)}. "
                "Go on with those it has, or choose another --output"
            )

    def _read_manifest(self) -> tuple[dict[str, Any], int | None]:
        """Settings, and the number of rows if it is known."""
        path = self.output / MANIFEST
        if not path.is_file():
            if self.done:
                raise ValueError(f"{self.output} holds parts but no {MANIFEST}; choose another --output")
            return self.settings, None
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            return dict(manifest["settings"]), manifest["rows"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not written by regard predict; choose another --output") from error

    def write_manifest(self):
        """Claim the folder for the settings, and note the number of rows if it is known."""
        self.output.mkdir(parents=True, exist_ok=True)
        manifest = {"regard": __version__, "settings": self.settings, "rows": self.number}
        write_whole(self.output / MANIFEST, f"{json.dumps(manifest, indent=2)}\n".encode())

    def is_complete(self) -> bool:
        """Whether an earlier run has reached the last row, and all its shards are there."""
        return self.number is not None and self.done >= set(range(-(-self.number // self.shard_size)))

    def run(self, worker: "Predictor", process: int = 0, processes: int = 1, advance=lambda: None) -> int:
        """Write those shards that are not done and are this process's turn.

        Args:
            worker: the model.
            process, processes: the number of this process and of all.
            advance: called after each row of the input, whoever's turn it is.

        Returns:
            The number of rows of the input, all of which each process passes; it opens the images of its own only.

        Raises:
            RowsError: the rows cannot be read on.
            OSError: a shard cannot be written.
            MemoryError: memory does not suffice for a single image.
        """
        number = turn = 0

        def counted() -> Iterator[tuple[int, dict[str, Any]]]:
            nonlocal number
            for row in self.rows:
                yield number, row
                number += 1
                advance()

        for shard, members in groupby(counted(), key=lambda member: member[0] // self.shard_size):
            if shard in self.done:
                continue
            if turn % processes == process:
                tables = list(self._predict(worker, members))
                sink = pa.BufferOutputStream()
                pyarrow.parquet.write_table(pa.concat_tables(tables), sink)
                write_whole(shard_path(self.output, shard), sink.getvalue())
            turn += 1
        return number

    def _predict(self, worker: "Predictor", members: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[pa.Table]:
        while batch := list(islice(members, worker.batch_size)):
            results = worker.run([row for _, row in batch])
            rows = []
            for (index, row), result in zip(batch, results, strict=True):
                if isinstance(result, MemoryError):  # no result of the row, but of this machine
                    raise result
                rows.append({"index": index, **row, **result})
            yield pa.Table.from_pylist(rows, schema=self.schema)

    def finish(self, number: int):
        """Note that all rows are done, and clear away what killed processes left half-written.

        Raises:
            RowsError: not every one of `number` rows has exactly one result.
        """
        if (found := self._results().count_rows()) != number:
            raise RowsError(f"{self.rows.source}: {found} results of {number} rows; do all processes share the folder?")
        self.number = number
        self.write_manifest()
        for leftover in self.output.glob(".part-*"):
            leftover.unlink(missing_ok=True)

    def summarize(self, seconds: float) -> int:
        """Print what is done, and what of it in this run, and return the exit code."""
        results = self._results()
        number, failed = results.count_rows(), results.count_rows(filter=pyarrow.compute.field("error").is_valid())
        earlier = sum(pyarrow.parquet.read_metadata(shard_path(self.output, shard)).num_rows for shard in self.done)
        line = f"{number:,} rows in {len(results.files):,} parts of {self.output}, {failed:,} of them with an error"
        if number > earlier:
            line += f"; {number - earlier:,} done now, {(number - earlier) / seconds:.1f} rows a second"
        print(line)
        return EXIT_PARTIAL if failed else EXIT_OK

    def _results(self) -> pyarrow.dataset.FileSystemDataset:
        paths = [str(shard_path(self.output, shard)) for shard in sorted(finished_shards(self.output))]
        return pyarrow.dataset.dataset(paths, self.schema, format="parquet")


class Predictor(Worker):
    """The pipeline of a job, which takes rows; see `Worker`. An image that cannot be read gives the reason instead."""

    def __init__(self, job: Job, device: Any, threads: int | None, batch_size: int):
        self.verb = job.verb
        super().__init__(job.model, device, threads, batch_size)
        self.job, self.pool = job, ThreadPoolExecutor(_OPENED)
        processor = "image_processor" if job.verb == "classify" else "processor"
        self.pipeline = cast(Any, pipeline)(
            job.task.pipeline, model=self.model, device=self.model.device, **{processor: self.processor}
        )

    def run_batch(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """For each row the columns that its result fills, or `error`."""
        errors: dict[int, str] = {}

        def images() -> Iterator[Any]:
            for start in range(0, len(batch), _OPENED):  # a batch of photographs, all open, may be gigabytes
                opened = self.pool.map(self._open, batch[start : start + _OPENED])
                for place, image in enumerate(opened, start):
                    if isinstance(image, ImageReadError):
                        errors[place] = str(image)
                    elif self.job.task.inputs:
                        yield {**batch[place], "image": image}
                    else:
                        yield image

        results = iter(list(self.pipeline(images(), batch_size=len(batch), **self.job.parameters)))
        (name, *_) = self.job.task.result
        return [
            {"error": errors[place]}
            if place in errors
            else (result if isinstance(result := next(results), dict) else {name: result})
            for place in range(len(batch))
        ]

    def _open(self, row: dict[str, Any]) -> Image.Image | ImageReadError:
        for name in self.job.task.inputs:
            if not (row[name] or "").strip():
                return ImageReadError(f"no {name} in this row; give one, as a string")
        try:
            return self.job.rows.open(row["image"])
        except ImageReadError as error:
            return error


def shard_path(output: Path, shard: int) -> Path:
    """The file of a shard."""
    return output / f"part-{shard:05}.parquet"


def finished_shards(output: Path) -> set[int]:
    """The shards whose files are there."""
    return {int(path.stem.removeprefix("part-")) for path in output.glob("part-*.parquet")}


def write_whole(path: Path, content: Any):
    """Write a file that appears under its name with all its content, even if the machine fails, or not at all.

    Args:
        content: bytes, or another buffer.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # a process thought dead may still write the same
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or the name may be lost
    finally:
        os.close(folder)


def model_version(model: str) -> str | None:
    """What changes when a model does: a digest of a folder's settings and weights, the commit of a Hub repository."""
    source = resolve(model)
    if not Path(source).is_dir():
        with explain(model, source):
            return AutoConfig.from_pretrained(source)._commit_hash
    digest = hashlib.sha256()
    for pattern in ("*config.json", "tokenizer.json", "*.safetensors"):
        for path in sorted(Path(source).glob(pattern)):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    from regard_cli import main

    sys.exit(main(["predict", *sys.argv[1:]]))
