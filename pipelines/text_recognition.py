"""The task "text-recognition": images in, text with a confidence and a place for every character out."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.pipelines.base import Pipeline

from regard.processing.image_io import open_image

IMAGE_COLUMNS = ("pixel_values", "image")


class TextRecognitionPipeline(Pipeline):
    """Reads the text of images with a model that has `read`, such as `ImageTextSlotModel`.

    ```python
    import regard
    from transformers import pipeline

    reader = pipeline("text-recognition", model="model_cards/image-text-slot-5m")
    reader("photo.png")["text"]
    ```

    Half-precision weights are computed in float32 on a CPU, where half precision is slower and coarser.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError(
                "TextRecognitionPipeline needs a processor: give processor=AutoProcessor.from_pretrained(folder), "
                'or build it by pipeline("text-recognition", model=folder)'
            )
        if not callable(getattr(self.model, "read", None)):
            raise ValueError(f"{type(self.model).__name__} has no read method; use a model such as ImageTextSlotModel")
        if self.device.type == "cpu" and self.dtype in (torch.float16, torch.bfloat16):
            self.model.float()

    def _sanitize_parameters(self, max_slots: int | None = None):
        if max_slots is not None and max_slots < 2:
            raise ValueError(f"max_slots must be at least 2, for the start and end tokens, but is {max_slots}")
        return {}, {} if max_slots is None else {"max_slots": max_slots}, {}

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Read one image or many.

        Args:
            inputs: an image: a path, an `http(s)://` or `data:` address, the bytes of a file, a PIL image, an array or
                tensor (height, width[, channels]), or a data set row with an image in its column `pixel_values` or
                `image`. Or many: a list of images, or a data set, generator or other iterable of them.
            batch_size: images a forward pass; default 1.
            max_slots: most tokens read of one image, start and end included; default: as many as the model has.
            num_workers: processes that prepare images; default 0, in this one.

        Returns:
            For one image a dict: `text`, `score` in [0, 1], and `characters`, a list of
            `{"character", "score", "box"}` with the box `[x0, y0, x1, y1]` in pixels of the upright image. For a list
            a list of them; for other iterables an iterator, which reads on as it is asked.

        Raises:
            regard.processing.image_io.ImageReadError: an image cannot be read; the message names the file.
        """
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

    def preprocess(self, input_: Any) -> dict[str, Any]:
        if isinstance(input_, dict):
            column = next((column for column in IMAGE_COLUMNS if column in input_), None)
            if column is None:
                raise ValueError(f"a row must hold an image in {' or '.join(IMAGE_COLUMNS)}, but has {sorted(input_)}")
            input_ = input_[column]
        image = input_ if isinstance(input_, (np.ndarray, torch.Tensor)) else open_image(input_)
        images = self.processor.image_processor.to_grey_images(image)
        if len(images) != 1:
            raise ValueError(f"an array of {len(images)} images was given as one image; give a list of images")
        pixel_values = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values.to(self.dtype), "image_size": (images[0].height, images[0].width)}

    def _forward(self, model_inputs: dict[str, Any], **read_parameters) -> dict[str, Any]:
        reading = self.model.read(model_inputs["pixel_values"], **read_parameters)
        return {
            "sequences": reading.sequences,
            "scores": reading.scores,
            "boxes": reading.boxes,
            "image_size": model_inputs["image_size"],
        }

    def postprocess(self, model_outputs: dict[str, Any]) -> dict[str, Any]:
        sizes = [tuple(model_outputs["image_size"])]
        return self.processor.post_process(SimpleNamespace(**model_outputs), image_sizes=sizes)[0]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save model and processor into one folder, which `pipeline("text-recognition", model=folder)` loads.

        Nothing that runs is written: the stock method would copy this file there, and the folder would then load with
        `trust_remote_code=True` only.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


def _generator(images: Iterable) -> Iterator:
    yield from images


__all__ = ["TextRecognitionPipeline"]
