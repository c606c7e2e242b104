"""Image processor of QAViT: any picture -> RGB, resized to the model's square, normalised by channel."""

from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ImageInput,
    PILImageResampling,
)

from regard.processing.image_io import open_images, to_pil


class QAViTImageProcessor(PilBackend):
    """Turns images into `pixel_values` (batch, 3, height, width): RGB, resized to `size`, [0, 1], then normalised.

    Give it the model's size, `QAViTImageProcessor(size=config.image_size)`, and its data's `image_mean`, `image_std`.
    Takes a path, address, PIL image, numpy array or torch tensor, or a list of them; grey becomes three equal channels.
    """

    model_input_names = ["pixel_values"]
    size = {"height": 224, "width": 224}
    resample = PILImageResampling.BICUBIC
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Read paths and addresses, give grey arrays `(height, width)` their channel, pass other images on."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        image = open_images(image_url_or_urls)
        return image[None] if not isinstance(image, Image.Image) and image.ndim == 2 else image

    def process_image(self, image: ImageInput, input_data_format=None, **kwargs) -> np.ndarray:
        """Turn one PIL image, array or tensor into an array `(3, height, width)` of 8-bit RGB."""
        return np.asarray(to_pil(image, input_data_format).convert("RGB")).transpose(2, 0, 1)


__all__ = ["QAViTImageProcessor"]
