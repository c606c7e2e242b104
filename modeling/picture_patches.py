"""Qwen2-VL's flat patches of images as pictures again, and back; and marks drawn on them."""

from collections.abc import Sequence
from typing import Any

import torch

MARK_RADIUS = 4.0  # pixels


def pictures_of(pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, vision: Any) -> list[torch.Tensor]:
    """Pictures `(3, height, width)`, normalised as the patches are.

    Args:
        pixel_values: patches of all images, `(patches, channels * temporal_patch_size * patch_size ** 2)`.
        image_grid_thw: 1, rows and columns of the patches of each image, `(images, 3)`.
        vision: configuration of the vision encoder, with `patch_size`, `temporal_patch_size`, `spatial_merge_size`.
    """
    merge = vision.spatial_merge_size
    return [
        stacked_pictures_of(patches[None], rows // merge, columns // merge, vision)[0]
        for patches, (_, rows, columns) in zip(
            pixel_values.split(image_grid_thw.prod(-1).tolist()), image_grid_thw.tolist(), strict=True
        )
    ]


def stacked_pictures_of(patches: torch.Tensor, rows: int, columns: int, vision: Any) -> torch.Tensor:
    """Likewise `(images, 3, height, width)` of patches `(images, patches, ...)` of images of one size, which make so
    many rows and columns of merged ones."""
    merge, patch = vision.spatial_merge_size, vision.patch_size
    shape = (patches.shape[0], rows, columns, merge, merge, -1, vision.temporal_patch_size, patch, patch)
    blocks = patches.reshape(shape)[..., 0, :, :]  # a still image is repeated over time
    pictures = blocks.permute(0, 5, 1, 3, 6, 2, 4, 7)  # (images, 3, rows, merge, patch, columns, merge, patch)
    return pictures.flatten(5, 7).flatten(2, 4)


def patches_of(pictures: Sequence[torch.Tensor], vision: Any) -> torch.Tensor:
    """The inverse of `pictures_of`."""
    merge, patch = vision.spatial_merge_size, vision.patch_size
    flat = []
    for picture in pictures:
        channels, height, width = picture.shape
        rows, columns = height // patch, width // patch
        blocks = picture.reshape(channels, rows // merge, merge, patch, columns // merge, merge, patch)
        blocks = blocks.permute(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
        blocks = blocks.expand(-1, -1, -1, -1, -1, vision.temporal_patch_size, -1, -1)
        flat.append(blocks.reshape(rows * columns, -1))
    return torch.cat(flat)


def draw_marks(
    pixel_values: torch.Tensor,
    image_grid_thw: torch.Tensor,
    vision: Any,
    points: torch.Tensor,
    image_index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row its image with a disc on each object counted: patches and `image_grid_thw`.

    Args:
        pixel_values, image_grid_thw, vision: as `pictures_of` takes them.
        points: in [0, 1], `(rows, points, 2)`; negative ones are not drawn.
        image_index: the image of each row, `(rows,)`.
    """
    pictures = pictures_of(pixel_values, image_grid_thw, vision)
    color = pixel_values.new_tensor([2.0, -2.0, 2.0])  # magenta, normalised
    marked = []
    for row, index in enumerate(image_index.tolist()):
        height, width = pictures[index].shape[1:]
        drawn = points[row][points[row, :, 0] >= 0] * points.new_tensor([width, height])
        rows = torch.arange(height, device=points.device)[:, None, None] + 0.5
        columns = torch.arange(width, device=points.device)[None, :, None] + 0.5
        discs = (columns - drawn[:, 0]) ** 2 + (rows - drawn[:, 1]) ** 2 <= MARK_RADIUS**2
        marked.append(torch.where(discs.any(-1), color[:, None, None], pictures[index]))
    return patches_of(marked, vision), image_grid_thw[image_index]


__all__ = ["MARK_RADIUS", "draw_marks", "patches_of", "pictures_of", "stacked_pictures_of"]
