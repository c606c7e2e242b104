"""Counting to the end, step by step: what `generate` is to language models."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from regard.modeling.counting_outputs import (
    CountedObjects,
    CountingImages,
    CountingMemory,
    CountingScene,
    SequentialAttentionCountingOutput,
)
from regard.modeling.picture_patches import draw_marks


class CountingMixin:
    """`stream` and `count`, of a model that encodes, points and remembers."""

    config: Any
    encode_image: Callable[..., CountingImages]
    encode_category: Callable[..., CountingScene]
    reset_memory: Callable[..., CountingMemory]
    step: Callable[..., SequentialAttentionCountingOutput]
    count_object: Callable[..., CountingMemory]
    _remember_anew: Callable[..., CountingMemory]
    _vision: Any

    @torch.no_grad()
    def stream(
        self,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        images: CountingImages | None = None,
        max_objects: int | None = None,
        done_threshold: float | None = None,
        return_attention_maps: bool = False,
        **kwargs,
    ) -> Iterator[tuple[torch.Tensor, SequentialAttentionCountingOutput]]:
        """Count step by step, in all rows at once; rows that are done cost no more.

        Args:
            pixel_values, image_grid_thw, input_ids, attention_mask, image_index, images: as `forward` takes them.
            max_objects: at most so many in a row; default: the configuration's `max_memory_objects`.
            done_threshold: default: the configuration's.
            return_attention_maps: as `forward` takes it.

        Yields:
            the rows that had not ended before, `(active,)`, and for them what `forward` gives, with one step. A row
            ends with the step whose `done` is at or above `done_threshold`.
        """
        if input_ids is None or (images is None) == (pixel_values is None):
            raise ValueError("Give input_ids, and either pixel_values with image_grid_thw, or images.")
        limit = self.config.max_memory_objects if max_objects is None else max_objects
        threshold = self.config.done_threshold if done_threshold is None else done_threshold
        anew = self.config.marking == "image"
        if anew and pixel_values is None:
            raise ValueError('marking="image" encodes anew for each object: give pixel_values.')
        if images is None:
            images = self.encode_image(cast(torch.Tensor, pixel_values), cast(torch.Tensor, image_grid_thw))
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        scene = self.encode_category(images, input_ids, attention_mask, image_index)
        memory = self.reset_memory(len(input_ids), scene["cells"].shape[1])
        active = torch.arange(len(input_ids), device=input_ids.device)
        if image_index is None:
            image_index = active % len(images["grid"])
        for number in range(limit + 1):
            outputs = self.step(scene, memory, return_attention_maps)
            yield active, outputs
            going = cast(torch.Tensor, outputs.done)[:, 0] < threshold
            if number == limit or not going.any():
                return
            chosen = cast(torch.Tensor, outputs.pointer_logits)[:, 0].argmax(-1)
            if not going.all():
                active, chosen, scene, memory = active[going], chosen[going], scene.select(going), memory.select(going)
            memory = self.count_object(scene, memory, chosen)
            if anew:
                marked = draw_marks(
                    cast(torch.Tensor, pixel_values).flatten(0, -2),
                    cast(torch.Tensor, image_grid_thw),
                    self._vision,
                    memory["points"],
                    image_index[active],
                )
                scene = self.encode_category(self.encode_image(*marked), input_ids[active], attention_mask[active])
                memory = self._remember_anew(scene, memory)

    @torch.no_grad()
    def count(
        self, *args, max_objects: int | None = None, done_threshold: float | None = None, **kwargs
    ) -> list[CountedObjects]:
        """Count to the end: one result a row. Takes what `stream` takes."""
        limit = self.config.max_memory_objects if max_objects is None else max_objects
        threshold = self.config.done_threshold if done_threshold is None else done_threshold
        steps = self.stream(*args, max_objects=limit, done_threshold=threshold, **kwargs)
        points: dict[int, list[tuple[float, float, float]]] = {}
        estimates: dict[int, float] = {}
        complete: dict[int, bool] = {}
        for number, (active, outputs) in enumerate(steps):
            fields = (outputs["x"], outputs["y"], outputs["done"])
            found = torch.stack([field[:, 0].float() for field in fields], dim=-1).tolist()
            if not number:
                estimates = dict(enumerate(outputs["count_estimate"].tolist()))
                points = {row: [] for row in estimates}
            for row, (x, y, done) in zip(active.tolist(), found, strict=True):
                complete[row] = done >= threshold
                if not complete[row] and number < limit:
                    points[row].append((x, y, 1 - done))
        return [
            CountedObjects(
                points=torch.tensor(found).reshape(-1, 3)[:, :2],
                scores=torch.tensor(found).reshape(-1, 3)[:, 2],
                count_estimate=estimates[row],
                complete=complete[row],
            )
            for row, found in points.items()
        ]


__all__ = ["CountingMixin"]
