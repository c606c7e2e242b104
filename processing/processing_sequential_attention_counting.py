"""Processor of SequentialAttentionCounting: images and categories -> tensors, and what was counted -> pixels.

Unusual here: rows are laid out by token ids, not by text, so that no category can spell a special token; and images and
categories are prepared apart, because many categories may be counted in one image.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from regard.processing.image_io import open_images, to_pil

STEP_TOKENS = ("<x>", "<y>", "<done>")
VISION_TOKENS = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
MAX_ASPECT = 200  # what Qwen2-VL's image processor takes


class SequentialAttentionCountingProcessor(ProcessorMixin):
    """Joins Qwen2-VL's image processor and a tokenizer that has its vision tokens.

    Args:
        image_processor: `Qwen2VLImageProcessor` of any backend.
        tokenizer: Qwen2-VL's, or the byte tokenizer; `<x>`, `<y>` and `<done>` are added to it if it lacks them.
        prompt: what stands before the image; `{category}` is what is counted.
    """

    def __init__(self, image_processor=None, tokenizer=None, prompt="{category}", **kwargs):
        self.prompt = prompt
        super().__init__(image_processor, tokenizer, **kwargs)
        if missing := [token for token in STEP_TOKENS if token not in self.tokenizer.get_vocab()]:
            self.tokenizer.add_tokens(missing, special_tokens=True)

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values", "image_grid_thw", "input_ids", "attention_mask", "image_index", "points"]

    @property
    def step_token_ids(self) -> list[int]:
        """Ids of `<x>`, `<y>` and `<done>`, for the model's configuration."""
        return self.tokenizer.convert_tokens_to_ids(list(STEP_TOKENS))

    def __call__(
        self,
        images=None,
        text=None,
        image_index: Sequence[int] | None = None,
        image_grid_thw: Any = None,
        marks: Sequence[Sequence[Sequence[float]]] | None = None,
        return_tensors=None,
        **images_kwargs,
    ) -> BatchFeature:
        """Prepare a batch.

        Args:
            images: a path, address, PIL image, array or tensor, or a list of them, of any sizes.
            text: what to count, such as "red apples", or a list of it.
            image_index: for each text the number of its image; without it text i is about image i, or all are about
                the only image.
            image_grid_thw: of images that were prepared before, in place of `images`.
            marks: for each text the objects counted already, `[x, y]` in shares of the image's sides.
            return_tensors: "pt" or "np"; default: lists.
            images_kwargs: passed to the image processor.

        Returns:
            BatchFeature with `pixel_values` and `image_grid_thw` for images; `input_ids`, `attention_mask` `(rows,
            tokens)`, padded on the right, for texts; `image_index` where it was given, and `points` `(rows, marks, 2)`,
            padded by -1, where there are marks.

        Raises:
            ValueError: nothing was given, a text is empty, or numbers do not agree.
        """
        if images is None and (text is None or image_grid_thw is None):
            raise ValueError("give images, text (what to count), or both; text alone needs image_grid_thw")
        data: dict[str, Any] = {}
        if images is not None:
            pictures = self._pictures(images)
            data |= self.image_processor(images=pictures, return_tensors="np", **images_kwargs)
            image_grid_thw = data["image_grid_thw"]
        if text is not None:
            categories = [text] if isinstance(text, str) else list(text)
            data |= self._rows(categories, np.asarray(image_grid_thw), image_index)
            if marks is not None:
                if len(marks) != len(categories):
                    raise ValueError(f"{len(categories)} texts, but {len(marks)} lists of marks: give one for each")
                data["points"] = np.full((len(marks), max(map(len, marks), default=0), 2), -1.0, np.float32)
                for row, points in enumerate(marks):
                    data["points"][row, : len(points)] = np.reshape(points, (-1, 2))
        return BatchFeature(data, tensor_type=return_tensors)

    def _pictures(self, images: Any) -> list[Image.Image]:
        images = open_images(images)
        if not isinstance(images, (list, tuple)):
            images = list(images) if getattr(images, "ndim", 0) == 4 else [images]
        return [_widen(to_pil(image).convert("RGB")) for image in images]

    def _rows(self, categories: list[str], grid_thw: np.ndarray, image_index: Sequence[int] | None) -> dict[str, Any]:
        for row, category in enumerate(categories):
            if not isinstance(category, str) or not category.strip():
                raise ValueError(f"text {row} is {category!r}: name what to count, such as 'cats'")
        if image_index is None:
            if len(grid_thw) not in (1, len(categories)):
                raise ValueError(f"{len(grid_thw)} images, but {len(categories)} texts: say which by image_index")
            index, data = np.arange(len(categories)) % len(grid_thw), {}
        else:
            index = np.asarray(image_index, dtype=np.int64)
            if index.shape != (len(categories),) or (index < 0).any() or (index >= len(grid_thw)).any():
                raise ValueError(
                    f"image_index must name one of the {len(grid_thw)} images for each of {len(categories)} texts"
                )
            data = {"image_index": index}
        image, start, end = self.tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
        before, _, after = self.prompt.partition("{category}")
        merged = grid_thw.prod(1) // self.image_processor.merge_size**2
        rows = []
        for category, number in zip(categories, merged[index].tolist(), strict=True):
            words = self.tokenizer(
                before + " ".join(category.split()) + after, add_special_tokens=False, split_special_tokens=True
            )["input_ids"]
            rows.append([*words, start, *[image] * number, end, *self.step_token_ids])
        longest = max(map(len, rows))
        input_ids = np.full((len(rows), longest), self.tokenizer.pad_token_id)
        attention_mask = np.zeros((len(rows), longest), np.int64)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
        return data | {"input_ids": input_ids, "attention_mask": attention_mask}

    def post_process(self, counted: Sequence[Any], target_sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        """Turn what `SequentialAttentionCountingModel.count` returned into plain numbers.

        Args:
            counted: one result a row.
            target_sizes: height and width in pixels of the image of each row.

        Returns:
            For each row `{"count", "count_estimate", "agrees", "points": [{"x", "y", "score"}], "complete"}`, points in
            pixels.
        """
        results = []
        for result, (height, width) in zip(counted, target_sizes, strict=True):
            points = [
                {"x": x * width, "y": y * height, "score": score}
                for (x, y), score in zip(result.points.tolist(), result.scores.tolist(), strict=True)
            ]
            results.append(
                {
                    "count": len(points),
                    "count_estimate": result.count_estimate,
                    "agrees": result.agrees,
                    "points": points,
                    "complete": result.complete,
                }
            )
        return results


def _widen(image: Image.Image) -> Image.Image:
    """The image, a thin one with its shorter side stretched, which leaves points in shares of the sides where they
    were."""
    least = -(-max(image.size) // MAX_ASPECT)
    return image if min(image.size) >= least else image.resize((max(image.width, least), max(image.height, least)))


__all__ = ["STEP_TOKENS", "VISION_TOKENS", "SequentialAttentionCountingProcessor"]
