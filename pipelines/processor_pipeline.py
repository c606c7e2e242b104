"""What the tasks share: a processor, one input or many, and folders that hold no code."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.pipelines.base import Pipeline

IMAGE_COLUMNS = ("pixel_values", "image")


class ProcessorPipeline(Pipeline):
    """A task whose model takes what a processor makes of images.

    Half-precision weights are computed in float32 on a CPU, where half precision is slower and coarser.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.processor is None:
            task = next(iter(self._registered_impl))
            raise ValueError(
                f"{type(self).__name__} needs a processor: give processor=AutoProcessor.from_pretrained(folder), "
                f'or build it by pipeline("{task}", model=folder)'
            )
        dtypes = {parameter.dtype for parameter in self.model.parameters()}  # a model may keep some in float32
        if self.device.type == "cpu" and dtypes & {torch.float16, torch.bfloat16}:
            self.model.float()

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """A result for one input; for a list a list of them; for other iterables an iterator, which goes on as it is
        asked. One input is an image as `open_image` takes it, an array or tensor, or a row of a data set."""
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        if isinstance(inputs, list):
            return super().__call__(inputs, **kwargs) if inputs else []
        single = (str, bytes, os.PathLike, dict, Image.Image, np.ndarray, torch.Tensor)
        if isinstance(inputs, (*single, torch.utils.data.Dataset)):  # the base class streams a torch data set
            return super().__call__(inputs, **kwargs)
        if isinstance(inputs, Iterable):
            return super().__call__(_generator(inputs), **kwargs)
        raise TypeError(f"an image is a path, bytes, an address, a PIL image or an array, not {type(inputs).__name__}")

    def get_inference_context(self):
        return torch.inference_mode

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save model and processor into one folder, which `pipeline(task, model=folder)` loads.

        Nothing that runs is written: the stock method would copy the task's file there, and the folder would then load
        with `trust_remote_code=True` only.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


def image_of(row: Mapping[str, Any]) -> Any:
    """The image of a data set's row.

    Raises:
        ValueError: the row has none in its column `pixel_values` or `image`.
    """
    column = next((column for column in IMAGE_COLUMNS if row.get(column) is not None), None)
    if column is None:
        raise ValueError(f"a row must hold an image in {' or '.join(IMAGE_COLUMNS)}, but has {sorted(row)}")
    return row[column]


def _generator(inputs: Iterable) -> Iterator:
    yield from inputs


__all__ = ["IMAGE_COLUMNS", "ProcessorPipeline", "image_of"]
