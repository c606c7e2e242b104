"""onnxruntime beside PyTorch: the bundled models as `regard export --onnx` writes them, one thread each.

    python benchmarks/export_onnx.py [--only read ask] [--rounds 11]

Both get the same prepared inputs, from the sample images: batches of 1 and 8 images, ten questions about one image, the
objects of one image. After a round that warms up, both take turns; the table has the median wall time of the rounds and
their ratio, and how far the results are apart. Writes benchmarks/results/export_onnx.json.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers.utils import logging as transformers_logging

from regard.evaluate import circumstances
from regard.export_onnx import export_onnx
from regard.hub import load
from regard.processing.image_io import open_image

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")
BATCHES = (1, 8)
QUESTIONS = (
    "what shape is in the image?", "what color is the shape?", "is there a circle?", "is there a red shape?",
    "is there a triangle?", "does the image contain a rectangle?", "is there a blue shape?", "is there no circle?",
    "which shape is it?", "is there a green shape in the image?",
)  # fmt: skip

Results = dict[str, np.ndarray]


class Graphs:
    """The graphs of a folder, on one thread."""

    def __init__(self, folder: Path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.sessions: dict[str, Any] = {
            path.stem: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for path in sorted(folder.glob("*.onnx"))
        }

    def __call__(self, name: str, inputs: Mapping[str, Any]) -> Results:
        """The outputs of a graph by name, of inputs that may hold more than it takes."""
        session = self.sessions[name]
        taken = {entry.name: np.asarray(inputs[entry.name]) for entry in session.get_inputs()}
        return dict(zip((entry.name for entry in session.get_outputs()), session.run(None, taken), strict=True))

    def empty(self, name: str, **sizes: Any) -> Results:
        """Zeros for the inputs of a graph, whose free sizes are given."""
        return {
            entry.name: np.zeros([sizes.get(size, size) for size in entry.shape], np.float32)
            for entry in self.sessions[name].get_inputs()
        }


def read(graphs: Graphs, inputs: Mapping[str, Any]) -> list[Results]:
    """For each image what `ImageTextSlotModel.read` gives."""
    outputs = graphs("read", inputs)
    return [
        {name: outputs[name][row, :length] for name in ("tokens", "scores", "boxes")}
        for row, length in enumerate(outputs["length"])
    ]


def answer(graphs: Graphs, inputs: Mapping[str, Any]) -> Results:
    """The logits of questions, whose images are encoded once."""
    return graphs("answer", {**inputs, **graphs("encode_image", inputs)})


def count(graphs: Graphs, inputs: Mapping[str, Any], config: Any) -> list[dict[str, Any]]:
    """For each row what `SequentialAttentionCountingModel.count` gives, of images of one size."""
    grid, ids = np.asarray(inputs["image_grid_thw"]), np.asarray(inputs["input_ids"])
    merge = config.vlm_config.vision_config.spatial_merge_size
    patches = np.asarray(inputs["pixel_values"]).reshape(len(grid), *grid[0, 1:] // merge, merge**2, -1)
    index = inputs.get("image_index", np.arange(len(ids)) % len(grid))
    images = graphs("encode_image", {"pixel_values": patches})
    scene = graphs("encode_category", {**inputs, **images, "image_index": index})
    memory = graphs.empty("count_step", categories=len(ids), cells=scene["cells"].shape[1], objects=0)
    found: list[list[tuple[float, float, float]]] = [[] for _ in ids]
    complete = np.zeros(len(ids), bool)
    for number in range(config.max_memory_objects + 1):
        step = graphs("count_step", {**memory, **scene})
        complete |= step["done"] >= config.done_threshold
        if number == config.max_memory_objects or complete.all():
            break
        for row in np.flatnonzero(~complete):
            found[row].append((step["x"][row], step["y"][row], 1 - step["done"][row]))
        memory = {name.removeprefix("next_"): value for name, value in step.items() if name.startswith("next_")}
    return [
        {
            "points": np.reshape(objects, (-1, 3))[:, :2],
            "scores": np.reshape(objects, (-1, 3))[:, 2],
            "count_estimate": scene["count_estimate"][row],
            "complete": complete[row],
        }
        for row, objects in enumerate(found)
    ]


def sample_images(verb: str) -> list[Any]:
    """Eight of the sample images that show what a verb is for."""
    folder = ROOT / "samples" / {"read": "", "classify": "clothes", "ask": "shapes"}[verb]
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".png", ".jpg"))
    return [open_image(paths[index % len(paths)]) for index in range(max(BATCHES))]


def tasks(verb: str, model: Any, processor: Any, graphs: Graphs) -> dict[str, tuple[Callable, Callable]]:
    """What is measured: by name the same for PyTorch and for onnxruntime, each giving arrays to compare."""
    images = [] if verb == "count" else sample_images(verb)
    measured: dict[str, tuple[Callable, Callable]] = {}
    if verb == "read":
        model.config.counter_config.second_look = None  # the graph has none of these
        model.config.encoder_config.crop_margin = None
    for number in BATCHES:
        if verb == "read":
            pixels = processor(images=images[:number], return_tensors="pt")["pixel_values"]
            measured[f"read {number}"] = (
                lambda pixels=pixels: model.read(pixels).scores,
                lambda pixels=pixels: [row["scores"] for row in read(graphs, {"pixel_values": pixels})],
            )
        elif verb == "classify":
            inputs = processor(images=images[:number], return_tensors="pt")
            measured[f"classify {number}"] = (
                lambda inputs=inputs: [model(**inputs).logits],
                lambda inputs=inputs: [graphs("classify", inputs)["logits"]],
            )
    if verb == "ask":
        for number in (1, len(QUESTIONS)):
            inputs = processor(
                images=images[:1], text=QUESTIONS[:number], image_index=[0] * number, return_tensors="pt"
            )
            measured[f"ask {number} of one image"] = (
                lambda inputs=inputs: [model(**inputs).logits],
                lambda inputs=inputs: [answer(graphs, inputs)["logits"]],
            )
    elif verb == "count":
        inputs = processor(images=open_image(ROOT / "samples/counting/3.png"), text=["pencils"], return_tensors="pt")
        objects = model.count(**inputs)[0].count
        measured[f"count {objects} objects"] = (
            lambda: [counted.points for counted in model.count(**inputs)],
            lambda: [counted["points"] for counted in count(graphs, inputs, model.config)],
        )
    return measured


def largest_difference(expected: list[Any], found: list[Any]) -> float | None:
    """Between arrays of two lists; None where their shapes differ."""
    pairs = [(np.asarray(one), np.asarray(other)) for one, other in zip(expected, found, strict=True)]
    if any(one.shape != other.shape for one, other in pairs):
        return None
    return max((float(np.abs(one - other).max(initial=0)) for one, other in pairs), default=0.0)


@torch.inference_mode()
def measure(verb: str, name: str | None, rounds: int) -> dict[str, Any]:
    """Median milliseconds of each task of a model by PyTorch and by onnxruntime, in turns."""
    model, processor = load(name, verb, "cpu")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, folder)
        for task, pair in tasks(verb, model, processor, Graphs(Path(folder))).items():
            difference = largest_difference(*(run() for run in pair))  # and warms up
            spent: tuple[list[float], list[float]] = ([], [])
            for _ in range(rounds):
                for times, run in zip(spent, pair, strict=True):
                    start = time.perf_counter()
                    run()
                    times.append(1000 * (time.perf_counter() - start))
            ours, theirs = map(statistics.median, spent)
            results[task] = {"torch_ms": ours, "onnxruntime_ms": theirs, "ratio": ours / theirs, "apart": difference}
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = ("read", "classify", "ask", "count")
    parser.add_argument("--only", nargs="+", choices=verbs, default=verbs, help="only these (default: all)")
    parser.add_argument("--model", help="another model than the bundled one, of the one verb of --only")
    parser.add_argument("--rounds", type=int, default=11, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "export_onnx.json", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = {}
    print("| task | PyTorch | onnxruntime | ratio | largest difference |\n|---|--:|--:|--:|--:|")
    for verb in options.only:
        measured = measure(verb, options.model, options.rounds)
        for task, row in measured.items():
            apart = "other shapes" if row["apart"] is None else f"{row['apart']:.1e}"
            times = f"{row['torch_ms']:.1f} ms | {row['onnxruntime_ms']:.1f} ms | {row['ratio']:.2f}"
            print(f"| {task} | {times} | {apart} |", flush=True)
        results |= measured
    report = {
        **circumstances(argparse.Namespace(seed=None, device="cpu"), None),
        "command": shlex.join(
            ["python", "benchmarks/export_onnx.py", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "onnxruntime": onnxruntime.__version__,
        "rounds": options.rounds,
        "results": results,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
