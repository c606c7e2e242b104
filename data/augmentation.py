"""Augmentation of whole batches as tensors, on whatever device they are.

Chance is torch's own, so that a training which is resumed goes on as it would have. What moves pixels is gathered into
one matrix an image, and the image is resampled once.

Sources: RandAugment (Cubuk et al., 2019), here with strengths drawn up to the given one (as TrivialAugment, Müller and
Hutter, 2021); mixup (Zhang et al., 2018); CutMix (Yun et al., 2019); random erasing (Zhong et al., 2017).
"""

import math
from collections.abc import Callable

import torch
from torch import nn

ASPECT = 4 / 3  # of a random crop, at most


def augment_images(
    images: torch.Tensor,
    flip: bool = False,
    shift: float = 0.0,
    min_area: float = 1.0,
    num_ops: int = 0,
    magnitude: float = 0.0,
) -> torch.Tensor:
    """Change each image by chance.

    Args:
        images: `(batch, channels, height, width)` in [0, 1].
        flip: mirror every other image.
        shift: largest shift, as a share of the side; whole pixels.
        min_area: smallest share of the image that a crop keeps, which is then enlarged; 1: no crop.
        num_ops, magnitude: of `rand_augment`; 0 operations: none.

    Returns:
        the images, as many and as large; what comes in from beyond an edge repeats the edge.
    """
    batch, _, height, width = images.shape
    device = images.device
    matrices = torch.eye(3, device=device).repeat(batch, 1, 1)  # place in the new image -> place in the old, in [-1, 1]
    if flip:
        matrices[:, 0, 0] = torch.randint(0, 2, (batch,), device=device) * 2.0 - 1
    if shift:
        for axis, side in enumerate((width, height)):
            largest = round(shift * side)
            matrices[:, axis, 2] = torch.randint(-largest, largest + 1, (batch,), device=device) * 2 / side
    if min_area < 1:
        area = min_area + (1 - min_area) * torch.rand(batch, device=device)
        aspect = torch.exp(_uniform(batch, math.log(ASPECT), device))
        crop = torch.eye(3, device=device).repeat(batch, 1, 1)
        for axis, side in enumerate(((area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1))):
            crop[:, axis, axis], crop[:, axis, 2] = side, _uniform(batch, 1.0, device) * (1 - side)
        matrices = matrices @ crop
    if num_ops:
        images, moved = rand_augment(images, num_ops, magnitude)
        matrices = matrices @ moved
    if flip or shift or min_area < 1 or num_ops:
        grid = nn.functional.affine_grid(matrices[:, :2], list(images.shape), align_corners=False)
        images = nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return images


def rand_augment(images: torch.Tensor, num_ops: int, magnitude: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply so many of RandAugment's fourteen operations to each image, each of a strength up to `magnitude`.

    Args:
        images: `(batch, channels, height, width)` in [0, 1].
        magnitude: 0 to 1; at 1 an image is turned by up to 30 degrees, its contrast changed by a factor of up to 1.9.

    Returns:
        the images with their colours changed, and matrices `(batch, 3, 3)` for `affine_grid` that move their pixels.
    """
    batch, _, height, width = images.shape
    matrices = torch.eye(3, device=images.device).repeat(batch, 1, 1)
    for _ in range(num_ops):
        chosen = torch.randint(
            0, len(_COLOUR_OPS) + len(_GEOMETRY_OPS) + 1, (batch,), device=images.device
        )  # + identity
        strength = _uniform(batch, magnitude, images.device)
        changed = images.clone()
        for index, change in enumerate(_COLOUR_OPS):
            rows = chosen == index
            if rows.any():
                changed[rows] = change(images[rows], strength[rows][:, None, None, None]).clamp(0, 1)
        images = changed
        for index, move in enumerate(_GEOMETRY_OPS, start=len(_COLOUR_OPS)):
            rows = chosen == index
            if rows.any():
                matrices[rows] = matrices[rows] @ move(strength[rows], width / height)
    return images, matrices


def random_erasing(pixel_values: torch.Tensor, probability: float) -> torch.Tensor:
    """Fill a rectangle of 2 to 33 % of the area with noise, in that share of the images.

    Args:
        pixel_values: normalised images `(batch, channels, height, width)`.
    """
    batch, _, height, width = pixel_values.shape
    device = pixel_values.device
    area = 0.02 + 0.31 * torch.rand(batch, 1, device=device)
    aspect = torch.exp(_uniform(batch, math.log(10 / 3), device))[:, None]
    inside = torch.rand(batch, 1, 1, 1, device=device) < probability
    for sides, share, shape in (
        (height, (area * aspect).sqrt(), (batch, 1, height, 1)),
        (width, (area / aspect).sqrt(), (batch, 1, 1, width)),
    ):
        length = (share.clamp(max=1) * sides).round()
        start = (torch.rand(batch, 1, device=device) * (sides - length + 1)).floor()
        place = torch.arange(sides, device=device)
        inside = inside & ((place >= start) & (place < start + length)).view(shape)
    return torch.where(inside, torch.randn_like(pixel_values), pixel_values)


def mix(
    pixel_values: torch.Tensor, targets: torch.Tensor, mixup_alpha: float, cutmix_alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each image with another of the batch: all of both (mixup) or a rectangle of the other (CutMix).

    Args:
        pixel_values: `(batch, channels, height, width)`.
        targets: the share of each class, `(batch, classes)`.
        mixup_alpha, cutmix_alpha: of the Beta distribution that the shares are drawn from; 0 switches one off, and with
            both, each batch has one or the other.
    """
    if not (mixup_alpha or cutmix_alpha):
        return pixel_values, targets
    cut = bool(cutmix_alpha) and (not mixup_alpha or torch.rand(()).item() < 0.5)
    alpha = torch.tensor(cutmix_alpha if cut else mixup_alpha)
    kept = torch.distributions.Beta(alpha, alpha).sample().item()
    order = torch.randperm(len(pixel_values), device=pixel_values.device)
    if not cut:
        return torch.lerp(pixel_values[order], pixel_values, kept), torch.lerp(targets[order], targets, kept)
    height, width = pixel_values.shape[2:]
    sides = [round(side * math.sqrt(1 - kept)) for side in (height, width)]
    top, left = (int(torch.randint(0, side - part + 1, ())) for side, part in zip((height, width), sides, strict=True))
    rows, columns = slice(top, top + sides[0]), slice(left, left + sides[1])
    mixed = pixel_values.clone()
    mixed[:, :, rows, columns] = pixel_values[order][:, :, rows, columns]
    return mixed, torch.lerp(targets[order], targets, 1 - sides[0] * sides[1] / (height * width))


def _uniform(number: int, largest: float, device: torch.device) -> torch.Tensor:
    return (torch.rand(number, device=device) * 2 - 1) * largest


def _grey(images: torch.Tensor) -> torch.Tensor:
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    weights = images.new_tensor([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow has it
    return (images * weights[:, None, None]).sum(1, keepdim=True)


def _blend(start: torch.Tensor, images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Strength -1 gives nearly `start`, 0 the images, 1 goes nearly as far beyond them."""
    return start + (images - start) * (1 + 0.9 * strength)


def _autocontrast(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-6), images)


def _equalize(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    levels = (images * 255).round().long().flatten(2)  # (batch, channels, pixels)
    counts = torch.zeros(*levels.shape[:2], 256, device=images.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels, dtype=counts.dtype))
    below = counts.cumsum(2) - counts  # pixels darker than each level
    brightest = levels.amax(2, keepdim=True)
    most = below.gather(2, brightest)
    spread = torch.where(most > 0, below.gather(2, levels) / most.clamp(min=1), images.flatten(2))
    return spread.view_as(images)


def _posterize(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    step = 2.0 ** (4 * strength.abs()).round()  # drops 0 to 4 of 8 bits
    return ((images * 255).round() / step).floor() * step / 255


def _solarize(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    return torch.where(images >= 1 - strength.abs(), 1 - images, images)


def _sharpness(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    padded = nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
    smooth = (9 * nn.functional.avg_pool2d(padded, 3, stride=1) + 4 * images) / 13  # Pillow's SMOOTH
    return _blend(smooth, images, strength)


_COLOUR_OPS: tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], ...] = (
    _autocontrast,
    _equalize,
    _posterize,
    _solarize,
    _sharpness,
    lambda images, strength: _blend(torch.zeros_like(images), images, strength),  # brightness
    lambda images, strength: _blend(_grey(images).mean((2, 3), keepdim=True), images, strength),  # contrast
    lambda images, strength: _blend(_grey(images), images, strength),  # colour
)


def _matrix(strength: torch.Tensor, row: int, column: int, entry: torch.Tensor) -> torch.Tensor:
    matrix = torch.eye(3, device=strength.device).repeat(len(strength), 1, 1)
    matrix[:, row, column] = entry
    return matrix


def _rotate(strength: torch.Tensor, aspect: float) -> torch.Tensor:
    sine, cosine = torch.sin(math.pi / 6 * strength), torch.cos(math.pi / 6 * strength)
    matrix = _matrix(strength, 0, 0, cosine)
    matrix[:, 0, 1], matrix[:, 1, 0], matrix[:, 1, 1] = -sine / aspect, sine * aspect, cosine
    return matrix


_GEOMETRY_OPS: tuple[Callable[[torch.Tensor, float], torch.Tensor], ...] = (
    _rotate,
    lambda strength, aspect: _matrix(strength, 0, 1, 0.3 * strength / aspect),  # shear
    lambda strength, aspect: _matrix(strength, 1, 0, 0.3 * strength * aspect),
    lambda strength, aspect: _matrix(strength, 0, 2, 0.9 * strength),  # shift by up to 45 % of the side
    lambda strength, aspect: _matrix(strength, 1, 2, 0.9 * strength),
)

__all__ = ["augment_images", "mix", "rand_augment", "random_erasing"]
