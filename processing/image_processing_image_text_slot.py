"""Image processor of ImageTextSlot: any picture -> one grey 128x128 square, aspect kept, normalised.

Images are PIL pictures in mode "L" until the last step, so that resizing a huge one costs one pass over its bytes,
and a 128x128 grey one is neither resampled nor copied before it is stacked.
"""

from typing import Any, TypedDict

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, ImageInput, PILImageResampling
from transformers.utils import TensorType

from regard.processing.image_io import open_images, to_pil


class ImageTextSlotImageProcessorKwargs(TypedDict, total=False):
    """What a call or a checkpoint can set; every other name is refused."""

    size: int | dict[str, int] | None
    resample: PILImageResampling | int | None
    do_normalize: bool | None
    image_mean: float | list[float] | tuple[float, ...] | None
    image_std: float | list[float] | tuple[float, ...] | None
    input_data_format: str | ChannelDimension | None
    return_tensors: str | TensorType | None


class ImageTextSlotImageProcessor(PilBackend):
    """Turns images into `pixel_values` (batch, 1, size, size): grey, [0, 1], then mean 0.1533, std 0.3034.

    The longest side becomes `size`, antialiased, the other keeps the aspect (at least one pixel); what is left at the
    right or below is filled with the median of the resized image's border pixels. `do_normalize=False` stops at [0, 1].

    Takes a path, address, PIL image, numpy array or torch tensor, or a list of them; arrays are (height, width) or have
    1, 3 or 4 channels first or last (`input_data_format` settles doubt), a batch has one dimension more. Arrays hold
    uint8, or what `to_8_bit` scales: deeper integers, and floats in [0, 1] or [0, 255].
    """

    valid_kwargs = ImageTextSlotImageProcessorKwargs
    model_input_names = ["pixel_values"]
    size = {"height": 128, "width": 128}
    resample = PILImageResampling.BICUBIC
    do_normalize = True
    image_mean = [0.1533]
    image_std = [0.3034]

    def _standardize_kwargs(self, **kwargs):
        return super()._standardize_kwargs(**{**kwargs, "default_to_square": True})

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Read paths and addresses by `open_image`; pass other images on."""
        return open_images(image_url_or_urls)

    def to_grey_images(self, images: Any, input_data_format=None) -> list[Image.Image]:
        """Flatten whatever a call takes into a list of PIL images in mode "L", each of its own size."""
        images = self.fetch_images(images)
        if isinstance(images, (list, tuple)):
            return [grey for image in images for grey in self.to_grey_images(image, input_data_format)]
        if not isinstance(images, Image.Image) and getattr(images, "ndim", 0) == 4:
            return [self.process_image(image, input_data_format=input_data_format) for image in images]
        return [self.process_image(images, input_data_format=input_data_format)]

    def process_image(self, image: ImageInput, input_data_format=None, **kwargs) -> Image.Image:
        """Turn one PIL image, array or tensor into a PIL image in mode "L"."""
        image = to_pil(image, input_data_format)
        return image if image.mode == "L" else image.convert("L")

    def _preprocess_image_like_inputs(self, images: ImageInput, *args, input_data_format=None, **kwargs):
        return self._preprocess(self.to_grey_images(images, input_data_format), **kwargs)

    def _preprocess(
        self, images, size, resample, do_normalize, image_mean, image_std, return_tensors=None, **kwargs
    ) -> BatchFeature:
        if size.height != size.width or not size.height:
            raise ValueError(f"size must be a square such as 128 or {{'height': 128, 'width': 128}}, not {dict(size)}")
        if not images:
            raise ValueError("no images were given")
        pixels = np.stack([self._to_square(image, size.height, resample) for image in images])
        pixels = pixels[:, None].astype(np.float32)  # (batch, 1, size, size)
        if do_normalize:
            mean, std = (float(np.ravel(value)[0]) for value in (image_mean, image_std))
            pixels *= 1 / (255 * std)
            pixels -= mean / std
        else:
            pixels *= 1 / 255
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    @staticmethod
    def _to_square(image: Image.Image, side: int, resample: int) -> np.ndarray:
        longest = max(image.size)
        width, height = (max(1, round(length * side / longest)) for length in image.size)
        if image.size != (width, height):
            # reducing_gap: enormous images shrink by whole factors first, in a fraction of the time
            image = image.resize((width, height), resample, reducing_gap=3.0)
        pixels = np.asarray(image)  # (height, width)
        if width == height:
            return pixels
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        square = np.full((side, side), round(float(np.median(border))), dtype=np.uint8)
        square[:height, :width] = pixels
        return square


__all__ = ["ImageTextSlotImageProcessor"]
