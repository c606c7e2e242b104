"""`regard read`: images to text. Its arguments stand in `regard_cli`."""

import argparse
from typing import Any

import torch
from PIL import Image

from regard.cli import Worker, run_on_images
from regard.hub import CheckpointError
from regard.visualize import draw_reading


def run(options: argparse.Namespace) -> int:
    """Run `regard read` and return its exit code."""
    settings = (options.model, options.device, options.threads, options.batch_size, options.bf16)
    return run_on_images(options, lambda: Reader(*settings))


class Reader(Worker):
    """A model that reads text; see `Worker`. `bf16`: it computes in bfloat16."""

    verb = "read"
    columns = ("text", "score")

    def __init__(self, model: str | None, device: str | None, threads: int | None, batch_size: int, bf16: bool = False):
        super().__init__(model, device, threads, batch_size)
        if not callable(getattr(self.model, "read", None)):
            raise CheckpointError(f"{model}: a {self.model.config.model_type} model does not read text; name another")
        self.model.to(memory_format=torch.channels_last)  # in which convolutions are computed
        if bf16:
            self.model.to(dtype=torch.bfloat16)

    def prepare(self, image: Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
        """An image as pixel values (1, 1, size, size), and its height and width."""
        return self.processor(images=image, return_tensors="pt")["pixel_values"], (image.height, image.width)

    def run_batch(self, batch: list[tuple[torch.Tensor, tuple[int, int]]]) -> list[dict[str, Any]]:
        """For each image `{"text", "score", "characters", "count"}`: what `post_process` gives, and the predicted
        number of the text's bytes."""
        reading = self.model.read(torch.cat([pixel_values for pixel_values, _ in batch]).to(self.model.device))
        counts = (reading.count_pred.flatten().float() - 2).tolist()  # without the start and end tokens
        results = self.processor.post_process(reading, image_sizes=[size for _, size in batch])
        return [{**result, "count": count} for result, count in zip(results, counts, strict=True)]

    def as_text(self, result: dict[str, Any]) -> str:
        return result["text"]

    def as_json(self, result: dict[str, Any]) -> dict[str, Any]:
        characters = [
            {
                "character": entry["character"],
                "score": round(entry["score"], 4),
                "box": [round(edge, 1) for edge in entry["box"]],
            }
            for entry in result["characters"]
        ]
        return {"text": result["text"], "score": round(result["score"], 4), "characters": characters}

    def as_rows(self, result: dict[str, Any]) -> list[tuple[Any, ...]]:
        return [(result["text"], f"{result['score']:.4f}")]

    def draw(self, image: Image.Image, result: dict[str, Any]) -> Image.Image:
        """The image and its characters, placed where the model looked."""
        return draw_reading(image, result)
