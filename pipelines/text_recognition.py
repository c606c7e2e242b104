"""The task "text-recognition": images in, text with a confidence and a place for every character out."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from regard.pipelines.processor_pipeline import ProcessorPipeline, image_of
from regard.processing.image_io import open_image


class TextRecognitionPipeline(ProcessorPipeline):
    """Reads the text of images with a model that has `read`, such as `ImageTextSlotModel`.

    ```python
    import regard
    from transformers import pipeline

    reader = pipeline("text-recognition", model="model_cards/image-text-slot-5m")
    reader("photo.png")["text"]
    ```

    Half-precision weights are computed in float32 on a CPU, where half precision is slower and coarser.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not callable(getattr(self.model, "read", None)):
            raise ValueError(f"{type(self.model).__name__} has no read method; use a model such as ImageTextSlotModel")
        self.model.to(memory_format=torch.channels_last)  # in which convolutions are computed

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
        return super().__call__(inputs, **kwargs)

    def preprocess(self, input_: Any) -> dict[str, Any]:
        if isinstance(input_, dict):
            input_ = image_of(input_)
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


__all__ = ["TextRecognitionPipeline"]
