"""`regard classify`: images to classes. Its arguments stand in `regard_cli`."""

import argparse
from typing import Any

import torch
from PIL import Image

from regard.cli import Worker, run_on_images
from regard.hub import CheckpointError
from regard.visualize_classification import attention_maps, branch_weights, draw_classification


def run(options: argparse.Namespace) -> int:
    """Run `regard classify` and return its exit code."""
    return run_on_images(
        options,
        lambda: Classifier(
            options.model, options.device, options.threads, options.batch_size, options.top_k, bool(options.draw)
        ),
    )


class Classifier(Worker):
    """An image classifier; see `Worker`.

    `names` are the classes.

    Args:
        top_k: the number of classes in a result, from the most probable.
        explain: results tell which branches weighed how much and where they looked, as `draw` needs; QAViT only.
    """

    verb = "classify"
    columns = ("rank", "label", "score")

    def __init__(
        self,
        model: str | None,
        device: str | None,
        threads: int | None,
        batch_size: int,
        top_k: int = 3,
        explain: bool = False,
    ):
        super().__init__(model, device, threads, batch_size)
        id2label: Any = self.model.config.id2label
        self.names: list[str] = [id2label[index] for index in range(len(id2label))]
        self.top_k = min(top_k, len(self.names))
        self.explain = explain
        if explain:
            if self.model.config.model_type != "qavit":
                raise CheckpointError(
                    f"{model}: a {self.model.config.model_type} model does not tell where it looked; "
                    "leave out --draw, or name a QAViT"
                )
            self.model.set_attn_implementation("eager")  # the only one that gives its weights

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """An image as pixel values (1, channels, height, width)."""
        return self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]

    def run_batch(self, batch: list[torch.Tensor]) -> list[dict[str, Any]]:
        """For each image `{"labels": [{"label", "score"}], "logits"}`, and where results explain, `"branches"` and
        `"maps"`, as `draw_classification` takes them."""
        pixel_values = torch.cat(batch).to(self.model.device)
        outputs = self.model(pixel_values, **({"output_attentions": True} if self.explain else {}))
        logits = outputs.logits.float().cpu()
        top = logits.softmax(-1).topk(self.top_k)
        results: list[dict[str, Any]] = [
            {
                "labels": [
                    {"label": self.names[index], "score": score}
                    for index, score in zip(indices.tolist(), scores.tolist(), strict=True)
                ],
                "logits": row,
            }
            for row, indices, scores in zip(logits, top.indices, top.values, strict=True)
        ]
        if self.explain:
            config: Any = self.model.config
            rows, columns = (side // config.patch_size for side in pixel_values.shape[2:])
            maps, weights = attention_maps(outputs, config, rows, columns), branch_weights(outputs, config)
            for index, result in enumerate(results):
                result["branches"] = {name: float(weight[index]) for name, weight in weights.items()}
                result["maps"] = {name: grid[index] for name, grid in maps.items()}
        return results

    def as_text(self, result: dict[str, Any]) -> str:
        width = max(len(entry["label"]) for entry in result["labels"])
        return "\n".join(f"{entry['label']:<{width}}  {100 * entry['score']:4.1f} %" for entry in result["labels"])

    def as_json(self, result: dict[str, Any]) -> dict[str, Any]:
        return {"labels": [{**entry, "score": round(entry["score"], 4)} for entry in result["labels"]]}

    def as_rows(self, result: dict[str, Any]) -> list[tuple[Any, ...]]:
        return [(rank, entry["label"], f"{entry['score']:.4f}") for rank, entry in enumerate(result["labels"], start=1)]

    def draw(self, image: Image.Image, result: dict[str, Any]) -> Image.Image:
        """The image, its classes, and where the model looked."""
        return draw_classification(image, result)
