"""Measure a model that counts: how far its counts and points are off, when it stops, and what it counts twice."""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regard.data.counting import load_counting
from regard.data.emoji_scenes import COUNT_RANGES, EmojiSceneDataset
from regard.data.labelled_images import open_stored
from regard.hub import load
from regard.metrics.object_counting.object_counting import score_counts, score_stopping
from regard.pipelines.object_counting import ObjectCountingPipeline
from regard.train_settings import held_out_by
from regard.trainers.trainer_sequential_attention_counting import MAX_DISTANCE, CountCollator

SCENES = 200  # of each kind
COLUMNS = {
    "images": ("counts", "{:.0f}"),
    "mae": ("MAE", "{:.2f}"),
    "rmse": ("RMSE", "{:.2f}"),
    "exact_match": ("exact", "{:.2%}"),
    "location_error_share": ("off by", "{:.2%}"),
    "false_stop_rate": ("false stop", "{:.2%}"),
    "double_counts": ("twice", "{:.0f}"),
    "estimate_difference": ("from estimate", "{:.2f}"),
}


def choose_counting(options: argparse.Namespace, split: str) -> dict[str, Any]:
    """The data sets that the options name, with objects to be counted.

    Raises:
        ValueError: the options name none.
    """
    if options.tiers or not options.dataset:
        raise ValueError(
            f"{options.model} counts objects: name some by --dataset (emoji, fsc-147:FOLDER, a folder with "
            "points.jsonl, or a folder or Hub data set with columns image, category and points); --tiers are texts"
        )
    if options.dataset == "emoji":
        return generate_scenes(split, options.images or SCENES, options.seed)
    data = load_counting(options.dataset, split, **held_out_by(options.model, options.seed))
    if options.images is not None:
        data = data.select(range(min(options.images, len(data))))
    return {Path(options.dataset).name: data}


def generate_scenes(split: str, size: int, seed: int = 0) -> dict[str, "AskedScenes"]:
    """Scenes by kind: of few, some and many objects, of categories that a model of the "train" split knows and of those
    held out; what is absent; and two categories, one after the other."""
    whose = {"trained": "train"} | ({} if split == "train" else {"held-out": split})
    kinds = {
        f"{name} {low}-{high}": AskedScenes(split, size, seed, categories, [(low, high)])
        for name, categories in whose.items()
        for low, high in COUNT_RANGES
    }
    kinds["absent"] = AskedScenes(split, size, seed, "train", [(1, 20)], "absent")
    kinds["two in turn"] = AskedScenes(split, size, seed, "train", [(1, 20)], "two")
    return kinds


class AskedScenes:
    """Rows of an `EmojiSceneDataset`, asked for their category, for an absent one, or for two of those present.

    Args:
        split, size, seed, categories, count_ranges: see there.
        about: "one", "absent" or "two".
    """

    def __init__(
        self,
        split: str,
        size: int,
        seed: int,
        categories: str,
        count_ranges: Sequence[tuple[int, int]],
        about: str = "one",
    ):
        self.size, self.about = size, about
        # Further rows stand in for those that have one category only, a quarter of all.
        self.scenes = EmojiSceneDataset(split, 20 * size, seed, count_ranges=count_ranges, categories=categories)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.scenes[index]
        if self.about == "absent":
            return {"pixel_values": row["pixel_values"], "category": row["absent"], "points": []}
        names = ("pixel_values", "category", "points")
        if self.about == "two":
            while not row["others_names"]:
                index += self.size
                row = self.scenes[index]
            names = (*names, "others_names", "others_points")
        return {name: row[name] for name in names}


class CountScorer:
    """A model that counts, and its processor; arguments as `regard.hub.load` has them."""

    def __init__(self, model: str | None, device: str | None, threads: int | None, batch_size: int):
        if threads is not None:
            torch.set_num_threads(threads)
        network: Any
        processor: Any
        network, processor = load(model, "count", device)
        self.model, self.batch_size = network, batch_size
        self.collate = CountCollator(processor, categories_per_image=2)
        self.count = ObjectCountingPipeline(model=network, processor=processor, device=network.device)

    @torch.inference_mode()
    def ask_done(self, rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """The probability that none is left after each of the true objects, as far as the model counts at once, and
        whether it is so: `(steps,)` of all rows."""
        inputs = {name: value.to(self.model.device) for name, value in self.collate(rows).items()}
        objects = inputs.pop("objects")
        numbers = (objects[..., 0] >= 0).sum(1, keepdim=True)
        points = objects[:, : self.model.config.max_memory_objects]
        steps = torch.arange(points.shape[1] + 1, device=objects.device).expand(len(objects), -1)
        steps = steps.masked_fill(steps > numbers, -1)
        # With marks on the image, each step has an image of its own.
        parts = steps.split(1, dim=1) if self.model.config.marking == "image" else [steps]
        done = torch.cat([self.model(**inputs, points=points, steps=part).done for part in parts], dim=1)
        asked = steps >= 0
        return done[asked].float().cpu().numpy(), (steps == numbers)[asked].cpu().numpy()


def score_counter(
    counter: CountScorer, data: Any, advance: Callable[[int], Any] = lambda images: None
) -> dict[str, Any]:
    """Count everything that `data` asks for.

    Args:
        counter: the model.
        data: rows as `load_counting` or `AskedScenes` has them.
        advance: called with the number of images after each batch.

    Returns:
        The scores of `score_counts`, with points within `MAX_DISTANCE` of an object, and of `score_stopping`; of other
        than generated scenes also `by_range`; and `ms_per_image`, the time of counting.
    """
    found, true, sizes, estimates, seconds = [], [], [], [], 0.0
    stops: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, len(data), counter.batch_size):
        rows = [data[row] for row in range(start, min(start + counter.batch_size, len(data)))]
        stops.append(counter.ask_done(rows))
        images = [open_stored(row["pixel_values"]) for row in rows]
        questions = [counter.collate.questions(row) for row in rows]
        asked = [
            {"image": image, "category": [name for name, _ in pairs]}
            for image, pairs in zip(images, questions, strict=True)
        ]
        begin = time.perf_counter()
        counts = counter.count(asked, batch_size=len(asked))
        seconds += time.perf_counter() - begin
        for image, pairs, results in zip(images, questions, counts, strict=True):
            for (_, points), result in zip(pairs, results, strict=True):
                found.append([[point["x"], point["y"]] for point in result["points"]])
                true.append(points)
                sizes.append(image.size)
                estimates.append(result["count_estimate"])
        advance(len(rows))
    scores = score_counts(found, true, sizes, max_distance=MAX_DISTANCE, count_estimates=estimates)
    if isinstance(data, AskedScenes):
        del scores["by_range"]  # a row of its own has each range
    done, is_done = (np.concatenate(parts) for parts in zip(*stops, strict=True))
    return {**scores, **score_stopping(done, is_done), "ms_per_image": 1000 * seconds / len(data)}


__all__ = ["COLUMNS", "AskedScenes", "CountScorer", "choose_counting", "generate_scenes", "score_counter"]
