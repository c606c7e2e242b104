"""The task "object-counting": images and the names of categories in, counts with a point for each object out."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from regard.modeling.counting_outputs import CountedObjects
from regard.modeling.tiles import merge_points, split_tiles
from regard.pipelines.processor_pipeline import ProcessorPipeline, image_of
from regard.processing.image_io import open_image, to_pil

logger = logging.getLogger(__name__)

MAX_CUTS = 3  # how often an image, and then its tiles, are cut: at most 64 tiles
LEAST_TILE = 32  # pixels of a tile's longer side: in smaller ones, objects are no larger than what blurs them
MOST_SHRUNK = 3  # times: in images that are shrunk further, small objects are lost without a trace
DOUBTFUL = 1.25  # times: in images that are shrunk further, some are lost where the count is not that of a glance
SEAM = 1.5  # cells of a tile: points of two tiles that are nearer to each other are of one object


class ObjectCountingPipeline(ProcessorPipeline):
    """Counts objects with a SequentialAttentionCounting, and points at each; many categories in one image cost one
    encoding of it.

    Where there are more than a model counts at once, the image is cut into tiles, and these again.

    ```python
    import regard
    from transformers import pipeline

    count = pipeline("object-counting", model=folder)
    count(image="photo.png", category="cats")
    count(image="photo.png", category=["cats", "dogs"])
    count([{"image": "photo.png", "category": "cats"}, {"image": "other.png", "category": "red apples"}])
    ```
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not callable(getattr(self.model, "count", None)):
            raise ValueError(
                f"{type(self.model).__name__} does not count; use a model such as SequentialAttentionCountingModel"
            )

    def _sanitize_parameters(
        self, max_objects: int | None = None, done_threshold: float | None = None, tile: bool | None = None
    ):
        if max_objects is not None and max_objects < 1:
            raise ValueError(f"max_objects must be at least 1, but is {max_objects}")
        if done_threshold is not None and not 0 < done_threshold < 1:
            raise ValueError(f"done_threshold must lie between 0 and 1, but is {done_threshold}")
        given = {"max_objects": max_objects, "done_threshold": done_threshold}
        limits = {name: value for name, value in given.items() if value is not None}
        return {}, limits, limits if tile is None else {**limits, "tile": tile}

    def __call__(self, image: Any = None, category: str | list[str] | None = None, **kwargs: Any) -> Any:
        """Count in one image or many.

        Args:
            image: with `category`, one image: a path, an `http(s)://` or `data:` address, the bytes of a file, a PIL
                image, an array or tensor (height, width[, channels]). Without, a dict with an image in `image` or
                `pixel_values` and a category, or a list of them, in `category`; or many such dicts: a list, a data
                set, a generator or another iterable.
            category: what to count, such as "red apples", or a list of it.
            max_objects: most objects counted at once, in an image or one of its tiles; default: the model's
                `max_memory_objects`.
            done_threshold: probability that none is left from which on counting ends; default: the model's. Lower ones
                end earlier.
            tile: whether to cut images that have more objects into tiles; default True.
            batch_size: images a forward pass, with all their categories; default 1.
            num_workers: processes that prepare images; default 0, in this one.

        Returns:
            For one category a dict, for a list of categories a list of them:

            - `category` as it was given, and `count`, the number of its points;
            - `points`: for each object `x` and `y` in pixels of the upright image, in the order of counting, and
              `score`, the probability that one was left before it was counted;
            - `count_estimate`: what the model makes of the whole image without pointing, and `agrees`, whether the
              count is within 1, or a tenth, of it;
            - `complete`: whether counting ended because none was left, and `tiled`, whether the image was cut.

            For a list of dicts a list of these; for other iterables an iterator, which goes on as it is asked.

        Raises:
            ValueError: an image or a category is missing, a category is empty, or a limit is out of range.
            regard.processing.image_io.ImageReadError: an image cannot be read; the message names the file.
        """
        if image is None:
            raise ValueError("no image: give image= and category=, or dicts that hold both")
        if category is not None:
            if isinstance(image, (dict, list, tuple)):
                raise ValueError("category= is about one image; of several, give a list of dicts of image and category")
            image = {"image": image, "category": category}
        return super().__call__(image, **kwargs)

    def preprocess(self, input_: Any) -> dict[str, Any]:
        if not isinstance(input_, dict) or input_.get("category") is None:
            raise ValueError("no category: give image= and category=, or dicts that hold both")
        image, category = image_of(input_), input_["category"]
        if isinstance(category, (list, tuple)) and not category:
            raise ValueError("the list of categories is empty: name what to count, such as 'cats'")
        image = to_pil(image) if isinstance(image, (np.ndarray, torch.Tensor)) else open_image(image)
        image = image.convert("RGB")
        encoded = self.processor(images=image, text=category, return_tensors="pt")
        words = encoded["attention_mask"].bool()
        # The base class joins patches and tensors of one dimension end to end, and other things to a list.
        return {
            "asked": (image, category),
            "pixel_values": encoded["pixel_values"],
            "image_grid_thw": encoded["image_grid_thw"],
            "input_ids": encoded["input_ids"][words],
            "words": words.sum(1),
            "categories": torch.tensor([len(words)]),
        }

    def _forward(self, model_inputs: dict[str, Any], **limits: Any) -> dict[str, Any]:
        categories = model_inputs["categories"]
        by_category = list(model_inputs["input_ids"].split(model_inputs["words"].tolist()))
        counted = iter(
            self.model.count(
                pixel_values=model_inputs["pixel_values"],
                image_grid_thw=model_inputs["image_grid_thw"],
                input_ids=pad_sequence(
                    by_category, batch_first=True, padding_value=self.processor.tokenizer.pad_token_id
                ),
                attention_mask=pad_sequence([torch.ones_like(ids) for ids in by_category], batch_first=True),
                image_index=torch.arange(len(categories), device=categories.device).repeat_interleave(categories),
                **limits,
            )
        )
        by_image = [[next(counted) for _ in range(number)] for number in categories.tolist()]
        asked = model_inputs["asked"]
        counts = by_image if isinstance(asked, list) else by_image[0]  # a batch, or one
        return {"asked": asked, "counted": counts, "image_grid_thw": model_inputs["image_grid_thw"]}

    def postprocess(self, model_outputs: dict[str, Any], tile: bool = True, **limits: Any) -> Any:
        (image, category), counted = model_outputs["asked"], model_outputs["counted"]
        categories = [category] if isinstance(category, str) else category
        final = self._finish(image, categories, counted, limits) if tile else counted
        shrunk = self._shrinks(image, model_outputs["image_grid_thw"][0])
        for name, result, whole in zip(categories, final, counted, strict=True):
            if tile and not result.complete:
                logger.warning(
                    "%s: counting ended at %d, though more may be left, in an image of %dx%d pixels, which is not cut "
                    "further; enlarge it, or give its parts",
                    name, result.count, *image.size,
                )  # fmt: skip
            elif result is whole and (
                (shrunk > MOST_SHRUNK and not result.count) or (shrunk > DOUBTFUL and not result.agrees)
            ):
                logger.warning(
                    "%s: %d found, about %.0f at a glance, in an image of %dx%d pixels, of which the model sees a "
                    "1:%.1f reduction; if there are small ones, give its parts",
                    name, result.count, result.count_estimate, *image.size, shrunk,
                )  # fmt: skip
        numbers = self.processor.post_process(final, [(image.height, image.width)] * len(final))
        results = [
            {"category": name, **found, "tiled": after is not before}
            for name, found, after, before in zip(categories, numbers, final, counted, strict=True)
        ]
        return results[0] if isinstance(category, str) else results

    def _shrinks(self, image: Image.Image, grid: torch.Tensor) -> float:
        """How many times the longer side of an image is that of what the model sees, `grid` patches `(3,)`."""
        return max(image.size) / (int(grid.max()) * self.processor.image_processor.patch_size)

    def _finish(
        self,
        image: Image.Image,
        categories: Sequence[str],
        counted: list[CountedObjects],
        limits: dict[str, Any],
        cuts: int = 0,
    ) -> list[CountedObjects]:
        """Counts of an image, those that had not ended from its tiles, if it can be cut once more."""
        unfinished = [row for row, result in enumerate(counted) if not result.complete]
        if not unfinished or cuts == MAX_CUTS or max(image.size) < 2 * LEAST_TILE:
            return counted
        finished = self._count_in_tiles(image, [categories[row] for row in unfinished], limits, cuts + 1)
        final = list(counted)
        for row, (points, scores, complete) in zip(unfinished, finished, strict=True):
            # The estimate stays that of the whole: tiles share what lies where they overlap.
            final[row] = replace(counted[row], points=points, scores=scores, complete=complete)
        return final

    def _count_in_tiles(
        self, image: Image.Image, categories: list[str], limits: dict[str, Any], cuts: int
    ) -> list[tuple[torch.Tensor, torch.Tensor, bool]]:
        """For each category points in [0, 1], scores, and whether counting ended in each tile."""
        tiles, number = split_tiles(*image.size), len(categories)
        crops = [image.crop(tile) for tile in tiles]
        index = [crop for crop in range(len(crops)) for _ in categories]
        inputs = self.processor(images=crops, text=categories * len(crops), image_index=index, return_tensors="pt")
        counted = self.model.count(**inputs.to(self.device), **limits)
        by_tile = [
            self._finish(crop, categories, counted[place * number : (place + 1) * number], limits, cuts)
            for place, crop in enumerate(crops)
        ]
        size = torch.tensor(crops[0].size)
        sides = inputs["image_grid_thw"][0, [2, 1]].cpu() * self.processor.image_processor.patch_size
        cell = float((size / sides).max()) * self.model.config.cell_size
        shared = [2 * part - whole for part, whole in zip(crops[0].size, image.size, strict=True) if part < whole]
        # Two objects on either side of what tiles share are no nearer than that is wide.
        radius = min(SEAM * cell, min(shared) / 2)
        results = []
        for found in zip(*by_tile, strict=True):
            points, scores = merge_points(
                tiles, [part.points * size for part in found], [part.scores for part in found], radius
            )
            results.append((points / torch.tensor(image.size), scores, all(part.complete for part in found)))
        return results


__all__ = ["ObjectCountingPipeline"]
