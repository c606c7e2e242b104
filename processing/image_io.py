"""Image files as people have them -> upright 8-bit grey or RGB, or an error that names the file and the mend."""

import io
import os
import re
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format

# 20,000 x 20,000 pixels are 400 million: read in some 2 GB (transparent ones in 3). Above the limit: an error.
MAX_PIXELS = 500_000_000
# From here on only grey is kept: one byte a pixel, where Pillow's RGB takes four.
GREY_ONLY_PIXELS = 90_000_000
IMAGE_SUFFIXES = frozenset(
    ".apng .avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpf .jpg .jpx .pbm .pcx .pgm .png .pnm .ppm .qoi .sgi .tga"
    " .tif .tiff .webp".split()
)
_REMOTE = ("http://", "https://", "data:")
_TIMEOUT_SECONDS = 30


class ImageReadError(ValueError):
    """An image that cannot be read. The message names the file, the reason and the mend."""


def open_image(source: str | os.PathLike | bytes | Image.Image) -> Image.Image:
    """Read one image completely into memory, as mode "L" (grey) or "RGB", 8 bits a channel.

    EXIF rotation is applied, transparency is laid on white, an animation gives its first frame, CMYK and palettes are
    converted, and deeper pixels are scaled as `to_grey_or_rgb` says. Images of more than 90 million pixels come back
    grey; up to 500 million pixels are read (`MAX_PIXELS`).

    Args:
        source: path of a file, its bytes, an `http(s)://` or `data:` address, or a PIL image.

    Raises:
        ImageReadError: the source is missing, a folder, empty, no image, damaged, cut off, or larger than `MAX_PIXELS`.
    """
    name, stream = _open_stream(source)
    try:
        if isinstance(stream, Image.Image):
            return _decode(stream, name)
        with _pillow_limit_lifted, Image.open(stream) as image:
            return _decode(image, name)
    except ImageReadError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageReadError(f"{name}: not an image in a known format; convert it to PNG or JPEG") from error
    except MemoryError as error:
        raise ImageReadError(f"{name}: not enough memory for this image; scale it down or crop it") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error, KeyError, ...
        reason = str(error) or type(error).__name__
        raise ImageReadError(f"{name}: damaged or cut off ({reason}); replace it with an intact copy") from error
    finally:
        if not isinstance(stream, Image.Image):
            stream.close()


def open_images(images: Any) -> Any:
    """Read paths, addresses and bytes, in lists of any depth, by `open_image`; pass other images on."""
    if isinstance(images, (list, tuple)):
        return [open_images(image) for image in images]
    return open_image(images) if isinstance(images, (str, os.PathLike, bytes)) else images


def to_pil(image: Any, input_data_format: str | ChannelDimension | None = None) -> Image.Image:
    """Turn a PIL image, array or tensor into a PIL image in mode "L" or "RGB", upright as EXIF says.

    Args:
        image: arrays and tensors are (height, width) or have 1, 3 or 4 channels first or last.
        input_data_format: where the channels are, if there is doubt.
    """
    if not isinstance(image, Image.Image):
        if hasattr(image, "detach"):
            image = image.detach().cpu().numpy()
        if not isinstance(image, np.ndarray):
            raise TypeError(f"an image is a path, a PIL image, an array or a tensor, not {type(image).__name__}")
        image = _array_to_pil(image, input_data_format)
    if image.width == 0 or image.height == 0:
        raise ValueError(f"an image has no pixels: its size is {image.width}x{image.height}")
    return to_grey_or_rgb(_upright(image))


def _array_to_pil(pixels: np.ndarray, input_data_format: str | ChannelDimension | None) -> Image.Image:
    if pixels.ndim == 3:
        layout = input_data_format or infer_channel_dimension_format(pixels, num_channels=(1, 3, 4))
        if ChannelDimension(layout) == ChannelDimension.FIRST:
            pixels = np.moveaxis(pixels, 0, -1)
        if pixels.shape[-1] == 1:
            pixels = pixels[..., 0]
    elif pixels.ndim != 2:
        raise ValueError(f"an image has 2 or 3 dimensions, and a batch 4, not {pixels.ndim}: shape {pixels.shape}")
    return Image.fromarray(np.ascontiguousarray(to_8_bit(pixels)))


def to_grey_or_rgb(image: Image.Image, grey_only: bool = False) -> Image.Image:
    """Convert any PIL mode to "L" or "RGB" with 8 bits a channel; grey stays grey, transparency is laid on white.

    Integers deeper than 8 bits are shifted down by the bits that the brightest pixel needs above 8, so that 12-bit
    data in a 16-bit file is not black. Floats in [0, 1] are multiplied by 255, floats in [0, 255] kept, and every
    other range, negative values included, is stretched over 0..255. NaN counts as 0.

    Args:
        image: of any mode.
        grey_only: convert colours to grey too, in less memory than one after the other would take.
    """
    colours = "L" if grey_only else "RGB"
    if image.mode in ("L", colours) and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(to_8_bit(np.asarray(image)))
    if image.mode == "1":
        return image.convert("L")
    if image.has_transparency_data:
        grey = image.mode in ("L", "LA", "La")
        if image.mode not in ("LA", "RGBA"):
            image = image.convert("LA" if grey else "RGBA")
        flat = Image.new("L" if grey else colours, image.size, "white")
        flat.paste(image.convert(flat.mode), mask=image.getchannel("A"))
        return flat
    image = image if image.mode == "RGB" else image.convert("RGB")  # not all modes become grey at once
    return image.convert("L") if grey_only else image


def to_8_bit(pixels: np.ndarray) -> np.ndarray:
    """Scale an array of booleans, integers or floats to uint8, by the rule of `to_grey_or_rgb`."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    if np.issubdtype(pixels.dtype, np.floating):
        pixels = np.nan_to_num(pixels, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = (pixels.min(), pixels.max()) if pixels.size else (0, 0)
    if low >= 0 and np.issubdtype(pixels.dtype, np.integer):
        return (pixels >> max(0, int(high).bit_length() - 8)).astype(np.uint8)
    if low >= 0 and high <= 255:
        return np.rint(pixels * (255 if high <= 1 else 1)).astype(np.uint8)
    scaled = (pixels.astype(np.float64) - float(low)) * (255 / max(float(high) - float(low), 1e-12))
    return np.rint(scaled).astype(np.uint8)


def find_images(
    paths: str | Path | Iterable[str | Path], on_error: Callable[[ImageReadError], None] | None = None
) -> list[Path]:
    """List image files: folders are searched recursively by suffix, in natural order (2 before 10), no hidden ones.

    A path that is not a folder is listed as given, whatever its suffix and whether or not it exists: `open_image`
    tells what is wrong with it, while the others are read.

    Args:
        paths: one or several files and folders.
        on_error: called with the error of each folder that cannot be listed; it is then left out.

    Raises:
        ImageReadError: a folder holds no image, or cannot be listed and there is no `on_error`.
    """
    found = []
    for path in [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(sorted(_walk(path, on_error)), key=lambda file: _natural_key(file.relative_to(path)))
        if not inside:
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise ImageReadError(f"{path}: no images in this folder; give one with files that end in {suffixes}")
        found.extend(inside)
    return found


def _walk(folder: Path, on_error: Callable[[ImageReadError], None] | None) -> Iterator[Path]:
    def fail(error: OSError):
        message = f"{error.filename}: cannot list this folder ({error.strerror}); check its permissions"
        if on_error is None:
            raise ImageReadError(message) from error
        on_error(ImageReadError(message))

    for root, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(root, name)


def _natural_key(path: Path) -> list[list[tuple[int, int, str]]]:
    def key(part: str) -> list[tuple[int, int, str]]:
        pieces = re.split(r"([0-9]+)", part.lower())
        return [(0, int(piece), "") if piece[:1].isdecimal() else (1, 0, piece) for piece in pieces if piece]

    return [key(part) for part in path.parts]


def _open_stream(source: str | os.PathLike | bytes | Image.Image) -> tuple[str, BinaryIO | Image.Image]:
    """Name a source for messages, and open it."""
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or f"PIL image {source.width}x{source.height}"), source
    if isinstance(source, bytes):
        name, stream, size = f"image of {len(source)} bytes", io.BytesIO(source), len(source)
    elif isinstance(source, str) and source.startswith(_REMOTE):
        name = source if len(source) <= 100 else f"{source[:97]}..."
        try:
            request = urllib.request.Request(source, headers={"User-Agent": "regard"})
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
                content = response.read()
        except (OSError, ValueError) as error:
            raise ImageReadError(f"{name}: cannot be fetched ({error}); check the address and the network") from error
        stream, size = io.BytesIO(content), len(content)
    elif isinstance(source, (str, os.PathLike)):
        name, path = str(source), Path(source)
        if path.is_dir():
            raise ImageReadError(f"{name}: a folder, not an image; list its images with find_images")
        if not path.is_file():
            raise ImageReadError(f"{name}: {'not a regular file' if path.exists() else 'no such file'}; check the path")
        try:
            size = path.stat().st_size
            stream = path.open("rb") if size else io.BytesIO()
        except OSError as error:
            raise ImageReadError(f"{name}: cannot be opened ({error.strerror}); check its permissions") from error
    else:
        raise TypeError(f"an image is a path, bytes, an address or a PIL image, not {type(source).__name__}")
    if size == 0:
        raise ImageReadError(f"{name}: empty; replace it with an intact copy")
    return name, stream


def _decode(image: Image.Image, name: str) -> Image.Image:
    if image.format == "EPS":  # Pillow would run Ghostscript on it
        raise ImageReadError(f"{name}: PostScript is not read; convert it to PNG")
    pixels = image.width * image.height
    if pixels == 0:
        raise ImageReadError(f"{name}: has no pixels ({image.width}x{image.height})")
    if pixels > MAX_PIXELS:
        size = f"{image.width}x{image.height}, {pixels / 1e6:.0f} million pixels"
        raise ImageReadError(
            f"{name}: {size}, over the limit of {MAX_PIXELS / 1e6:.0f} million; scale it down or tile it"
        )
    huge = pixels > GREY_ONLY_PIXELS
    if huge and image.format == "JPEG":
        image.draft("L", image.size)  # the decoder itself skips the colours
    image.load()
    return to_grey_or_rgb(_upright(image), grey_only=huge)


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # damaged metadata is no reason to refuse good pixels
        return image


class _PillowLimitLifted:
    """Lifts Pillow's size limit, a global, while any thread reads: `_decode` applies ours, as an error with a name."""

    def __init__(self):
        self.lock, self.readers, self.limit = threading.Lock(), 0, None

    def __enter__(self):
        with self.lock:
            if self.readers == 0:
                self.limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self.readers += 1

    def __exit__(self, *error):
        with self.lock:
            self.readers -= 1
            if self.readers == 0:
                Image.MAX_IMAGE_PIXELS = self.limit


_pillow_limit_lifted = _PillowLimitLifted()


__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "ImageReadError",
    "find_images",
    "open_image",
    "open_images",
    "to_grey_or_rgb",
    "to_pil",
]
