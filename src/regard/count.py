"""`regard count`: images and the names of categories to counts. Its arguments stand in `regard_cli`."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from regard.cli import Worker, complain, run_on_images
from regard.panels import stack
from regard.pipelines.object_counting import ObjectCountingPipeline
from regard.processing.image_io import IMAGE_SUFFIXES
from regard.visualize_counting import draw_count
from regard_cli import EXIT_FAILED


def run(options: argparse.Namespace) -> int:
    """Run `regard count` and return its exit code."""
    for category in options.categories:  # as in `regard count *.png cats`
        if Path(category).suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(category):
            complain(f"{category}: an image where a category should be; put several images into a folder, and name it")
            return EXIT_FAILED
    return run_on_images(
        options,
        lambda: Counter(options.model, options.device, options.threads, options.batch_size, options.categories),
    )


class Counter(Worker):
    """A model that counts; see `Worker`.

    Args:
        categories: what to count in each image.
    """

    verb = "count"
    columns = ("category", "count", "count_estimate", "complete")

    def __init__(
        self,
        model: str | None,
        device: str | None,
        threads: int | None,
        batch_size: int,
        categories: Sequence[str],
    ):
        super().__init__(model, device, threads, batch_size)
        self.categories = list(categories)
        network: Any = self.model
        self.count = ObjectCountingPipeline(model=network, processor=self.processor, device=network.device)

    def prepare(self, image: Image.Image) -> Image.Image:
        """The image itself, which may be cut into tiles."""
        return image

    def run_batch(self, batch: list[Image.Image]) -> list[dict[str, Any]]:
        """For each image `{"counts": [...]}`, what the pipeline gives for each category."""
        rows = [{"image": image, "category": self.categories} for image in batch]
        return [{"counts": counts} for counts in self.count(rows, batch_size=len(batch))]

    def as_text(self, result: dict[str, Any]) -> str:
        return "\n".join(_say(entry) for entry in result["counts"])

    def as_json(self, result: dict[str, Any]) -> dict[str, Any]:
        return {
            "counts": [
                {
                    **entry,
                    "count_estimate": round(entry["count_estimate"], 2),
                    "points": [
                        {"x": round(point["x"], 1), "y": round(point["y"], 1), "score": round(point["score"], 4)}
                        for point in entry["points"]
                    ],
                }
                for entry in result["counts"]
            ]
        }

    def as_rows(self, result: dict[str, Any]) -> list[tuple[Any, ...]]:
        return [
            (entry["category"], entry["count"], f"{entry['count_estimate']:.2f}", entry["complete"])
            for entry in result["counts"]
        ]

    def draw(self, image: Image.Image, result: dict[str, Any]) -> Image.Image:
        """The image with each count's path and numbers, one picture a category below the other."""
        return stack([draw_count(image, entry) for entry in result["counts"]])


def _say(entry: dict[str, Any]) -> str:
    """A count in a line, with what speaks against it."""
    count = f"{entry['count']}" if entry["complete"] else f"at least {entry['count']}"
    doubt = "" if entry["agrees"] else f" (about {entry['count_estimate']:.0f} at a glance)"
    return f"{' '.join(entry['category'].split())}: {count}{doubt}"
