"""What the verbs share that take images: the loop over files, in batches, and where results, drawings and errors go."""

import argparse
import csv
import gc
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TextIO

import torch
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from regard.hub import CheckpointError, load
from regard.processing.image_io import ImageReadError, find_images, open_image
from regard_cli import EXIT_FAILED, EXIT_OK, EXIT_PARTIAL

_CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\ufffd")
_ADDRESSES = ("http://", "https://")
# The last is what oneDNN says when it gets no memory; of a kernel it does not have it says "a primitive descriptor".
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|could not create a primitive(?! desc)", re.IGNORECASE
)


def run_on_images(options: argparse.Namespace, start: Callable[[], "Worker"]) -> int:
    """Give each image of the command line to a worker, write and draw its results, and return the exit code.

    Args:
        options: `images`, `form`, `output` and `draw`.
        start: makes the worker, once there are images.
    """
    quiet_transformers()
    sources, failed = list_sources(options.images)
    if not sources:
        return EXIT_FAILED
    try:
        worker = start()
    except CheckpointError as error:
        complain(error)
        return EXIT_FAILED
    drawings = name_drawings(sources, Path(options.draw)) if options.draw else None
    succeeded = 0
    try:
        with open_output(options.output) as stream, progress_bar(len(sources)) as bar:
            write = WRITERS[options.form](stream, worker, several=len(sources) + failed > 1)
            for index, result in worker.run_files(sources):
                if isinstance(result, Exception):
                    complain(result)
                else:
                    with above_progress_bar():
                        write(str(sources[index]), result)
                        stream.flush()
                    succeeded += 1
                    if drawings:
                        failed += not draw_result(worker, sources[index], result, drawings[index])
                bar.update()
    except BrokenPipeError:
        raise
    except OSError as error:  # of the output or a drawing; those of images are results
        complain(f"{error.filename or 'output'}: cannot be written ({error.strerror}); choose another place")
        return EXIT_FAILED
    if not succeeded:
        return EXIT_FAILED
    return EXIT_OK if succeeded == len(sources) and not failed else EXIT_PARTIAL


def draw_result(worker: "Worker", source: str | Path, result: dict[str, Any], path: Path) -> bool:
    """Write a picture of a result; say so and return False where the image cannot be opened again.

    Raises:
        OSError: the picture cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        picture = worker.draw(open_image(source), result)
    except ImageReadError as error:
        complain(f"{error}; it is not drawn")
        return False
    except MemoryError:
        complain(f"{source}: not enough memory to draw it; scale it down")
        return False
    picture.save(path)
    return True


class Worker:
    """A model that takes images in batches, and goes on with half the batch when memory does not suffice.

    A verb's own worker says how an image becomes the model's input, what the model makes of a batch, and how that is
    written and drawn.

    Args:
        model, device: see `regard.hub.load`.
        threads: CPU threads; None leaves PyTorch's choice.
        batch_size: images at a time.

    Raises:
        CheckpointError: the model cannot be loaded, or is not one for this verb.
    """

    verb: str  # see `regard.hub.load`
    columns: ClassVar[tuple[str, ...]]  # of the CSV, after the path

    def __init__(self, model: str | None, device: str | None, threads: int | None, batch_size: int):
        if threads is not None:
            torch.set_num_threads(threads)
        self.model, self.processor = load(model, self.verb, device)
        self.batch_size = batch_size

    def prepare(self, image: Image.Image) -> Any:
        """What `run` takes of an image."""
        raise NotImplementedError

    def run_batch(self, batch: list[Any]) -> list[dict[str, Any]]:
        """A result for each image from `prepare`, all at once."""
        raise NotImplementedError

    def as_text(self, result: dict[str, Any]) -> str:
        """A result for people, without the last line break."""
        raise NotImplementedError

    def as_json(self, result: dict[str, Any]) -> dict[str, Any]:
        """A result for JSON; scores have four decimals, boxes one."""
        raise NotImplementedError

    def as_rows(self, result: dict[str, Any]) -> list[tuple[Any, ...]]:
        """A result as rows of `columns`."""
        raise NotImplementedError

    def draw(self, image: Image.Image, result: dict[str, Any]) -> Image.Image:
        """A picture of a result."""
        raise NotImplementedError

    def run(self, prepared: list[Any]) -> list[dict[str, Any] | MemoryError]:
        """Results for images from `prepare`, `batch_size` at a time; MemoryError where memory does not suffice for a
        single image."""
        results: list[dict[str, Any] | MemoryError] = []
        while len(results) < len(prepared):
            part = prepared[len(results) : len(results) + self.batch_size]
            try:
                with torch.inference_mode():
                    results += self.run_batch(part)
                continue
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            release_memory()  # out of the handler, where the error no longer holds the batch's tensors
            if len(part) == 1:
                results.append(MemoryError("not enough memory for a single image; choose another --device"))
            else:
                self.batch_size = len(part) // 2
                complain(f"not enough memory for {len(part)} images at a time; going on with {self.batch_size}")
        return results

    def run_files(self, sources: Sequence[str | Path]) -> Iterator[tuple[int, dict[str, Any] | Exception]]:
        """Yield the index of each source, in order, with its result, or with the error that names it."""
        failures: dict[int, Exception] = {}
        waiting: dict[int, Any] = {}
        for index, source in enumerate(sources):
            try:
                waiting[index] = self.prepare(open_image(source))
            except ImageReadError as error:
                failures[index] = error
            if len(waiting) < self.batch_size and index < len(sources) - 1:
                continue
            results: dict[int, dict[str, Any] | Exception] = {**failures}
            for place, result in zip(waiting, self.run(list(waiting.values())), strict=True):
                results[place] = MemoryError(f"{sources[place]}: {result}") if isinstance(result, Exception) else result
            yield from sorted(results.items(), key=lambda item: item[0])
            failures, waiting = {}, {}


def list_sources(arguments: list[str]) -> tuple[list[str | Path], int]:
    """Images named by the arguments: files and addresses as given, folders searched; and how many arguments failed."""
    sources: list[str | Path] = []
    failed = 0

    def fail(error: ImageReadError):
        nonlocal failed
        complain(error)
        failed += 1

    for argument in arguments:
        if argument.startswith(_ADDRESSES):
            sources.append(argument)
            continue
        try:
            sources.extend(find_images(argument, on_error=fail))
        except ImageReadError as error:
            fail(error)
    return sources, failed


def name_drawings(sources: list[str | Path], folder: Path) -> list[Path]:
    """One PNG path under `folder` for each source, laid out as the sources are; no two equal, none a source itself."""
    files = [source.absolute() for source in sources if isinstance(source, Path)]
    root = os.path.commonpath([file.parent for file in files]) if files else ""
    taken = {file.resolve() for file in files}
    names = []
    for source in sources:
        if isinstance(source, Path):
            place = source.absolute().relative_to(root)
        else:
            place = Path(source.split("?")[0].rstrip("/").rpartition("/")[2] or "image")
        candidate, number = folder / place.with_suffix(".png"), 1
        while candidate.resolve() in taken:
            candidate = folder / place.with_name(f"{place.name}{f'-{number}' if number > 1 else ''}.png")
            number += 1
        taken.add(candidate.resolve())
        names.append(candidate)
    return names


def write_as_text(stream: TextIO, worker: Worker, several: bool) -> Callable[[str, dict[str, Any]], None]:
    """A writer of plain text: of one image its text, of several each under a header, as head(1) has it.

    On a terminal, control characters other than tab and line break appear as U+FFFD: what an image says must not move
    the cursor.
    """
    first, shown = True, _CONTROLS if stream.isatty() else {}

    def write(path: str, result: dict[str, Any]):
        nonlocal first
        if several:
            stream.write(f"{'' if first else chr(10)}==> {path} <==\n")
        stream.write(f"{worker.as_text(result).translate(shown)}\n")
        first = False

    return write


def write_as_json(stream: TextIO, worker: Worker, several: bool) -> Callable[[str, dict[str, Any]], None]:
    """A writer of JSON Lines."""
    return lambda path, result: print(
        json.dumps({"path": path, **worker.as_json(result)}, ensure_ascii=False), file=stream
    )


def write_as_csv(stream: TextIO, worker: Worker, several: bool) -> Callable[[str, dict[str, Any]], None]:
    """A writer of CSV after a header line; line breaks in a text stand in quotes."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["path", *worker.columns])
    return lambda path, result: writer.writerows((path, *row) for row in worker.as_rows(result))


WRITERS = {"text": write_as_text, "json": write_as_json, "csv": write_as_csv}


@contextmanager
def open_output(path: str | None) -> Iterator[TextIO]:
    """Standard output or a new file, UTF-8 whatever the locale; names of files that are not UTF-8 pass unchanged."""
    if path is not None:
        with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            yield stream
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    yield sys.stdout


def progress_bar(total: int | None, unit: str = "image", hidden: bool = False) -> tqdm:
    """A bar on standard error, if there is more than one thing to do; in a log it is a line every ten seconds.

    Args:
        total: number of things to do; None is unknown.
        unit: one of them.
        hidden: show none.
    """
    hidden = hidden or (total is not None and total < 2)
    if sys.stderr.isatty():
        return tqdm(total=total, unit=unit, disable=hidden, file=sys.stderr)
    return tqdm(total=total, unit=unit, disable=hidden, file=_Lines(), mininterval=10, maxinterval=10)


class _Lines(io.TextIOBase):
    """Standard error for a bar that must not go back and overwrite itself."""

    def write(self, text: str) -> int:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)
        return len(text)


@contextmanager
def above_progress_bar() -> Iterator[None]:
    """On a terminal, take the bar away while something else is printed."""
    if not sys.stderr.isatty():
        yield
        return
    with tqdm.external_write_mode():
        yield


def complain(reason: object):
    """Print an error or a warning to standard error."""
    with above_progress_bar():
        print(f"regard: {reason}", file=sys.stderr, flush=True)


def quiet_transformers():
    """Keep transformers' bars and advice out of the terminal."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an error for want of memory, on any device, from other errors."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def release_memory():
    """Give back what a failed batch left behind."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
