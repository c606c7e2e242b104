"""What of an image ImageTextSlot reads: the part that holds ink, so that empty paper costs nothing.

The encoder is told where in the image the part stands, and its positions are those of the whole image.
"""

import torch
from torch import nn

SQUARE = 4  # ink is looked for in squares of so many pixels a side
NOISE = 8.0  # ink differs from paper by more than so many times the median difference, which is noise,
LEAST, MOST = 0.2, 0.55  # and by one that lies between these, in deviations of the image: small type looks like noise
COLUMNS = 2  # widths are multiples of so many cells, so that more images of a batch have the same


def find_ink(images: torch.Tensor, stride: tuple[int, int], margin: int) -> torch.Tensor:
    """The part of each image that holds ink, in cells of `stride` pixels: `(batch, 4)`, left, top, right, bottom. An
    image without ink is kept whole.

    Args:
        images: of normalised contrast, `(batch, channels, height, width)`.
        stride: height and width of a cell.
        margin: pixels of paper to keep around the ink, at least.
    """
    blurred = nn.functional.avg_pool2d(images.mean(1, keepdim=True), SQUARE, ceil_mode=True).squeeze(1)
    difference = (blurred - _median(blurred)).abs()
    ink = difference > (NOISE * _median(difference)).clamp(LEAST, MOST)  # (batch, rows, columns) of squares
    rows, columns = images.shape[2] // stride[0], images.shape[3] // stride[1]
    top, bottom = _extent(ink.any(2), stride[0], rows, margin)
    left, right = _extent(ink.any(1), stride[1], columns, margin)
    width = ((right - left + COLUMNS - 1) // COLUMNS * COLUMNS).clamp(max=columns)
    left = torch.minimum(left, columns - width)
    return torch.stack((left, top, left + width, bottom), dim=1)


def _median(values: torch.Tensor) -> torch.Tensor:
    """That of each image `(batch, rows, columns)`, `(batch, 1, 1)`."""
    return values.flatten(1).median(1).values[:, None, None]


def _extent(ink: torch.Tensor, stride: int, cells: int, margin: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First cell with ink and the one behind the last, each `(batch,)`, of squares `(batch, squares)`."""
    ink = ink | ~ink.any(1, keepdim=True)
    first = ink.int().argmax(1) * SQUARE
    behind = (ink.shape[1] - ink.flip(1).int().argmax(1)) * SQUARE
    return (first - margin).clamp(min=0) // stride, ((behind + margin + stride - 1) // stride).clamp(max=cells)


def group_by_size(parts: torch.Tensor) -> list[torch.Tensor]:
    """Indices of the parts `(batch, 4)` that have one size, for each size."""
    sizes, group = torch.unique(parts[:, 2:] - parts[:, :2], dim=0, return_inverse=True)
    return [(group == number).nonzero().flatten() for number in range(sizes.shape[0])]


def common_size(parts: torch.Tensor, columns: int, rows: int) -> torch.Tensor:
    """Parts `(batch, 4)` grown to one size, that of the widest and the highest, within images of so many cells; how far
    each grows to the left and up is drawn at random."""
    limit = parts.new_tensor([columns, rows])
    corner, size = parts[:, :2], parts[:, 2:] - parts[:, :2]
    common = size.amax(0)
    least = (corner + size - common).clamp(min=0)
    most = torch.minimum(corner, limit - common)
    corner = least + (torch.rand(least.shape, device=parts.device) * (most - least + 1)).long()
    return torch.cat((corner, corner + common), dim=1)


def cut(images: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Parts `(batch, 4)` of images `(batch, channels, height, width)`, given as shares of them and equally large."""
    height, width = images.shape[2:]
    edges = (part * part.new_tensor([width, height, width, height])).round().long().tolist()
    return torch.stack(
        [image[:, top:bottom, left:right] for image, (left, top, right, bottom) in zip(images, edges, strict=True)]
    )


def within(positions: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Positions in an image `(batch, positions, 3)`, x, y and the line's height as shares of it, as shares of such a
    part of it `(batch, 4)`."""
    corner, size = part[:, None, [0, 1, 1]], (part[:, 2:] - part[:, :2])[:, None, [0, 1, 1]]
    return (positions - corner) / size


def uncut(boxes: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Boxes `(batch, boxes, 4)` as shares of an image, from such of its parts `(batch, 4)`."""
    corner, size = part[:, None, :2], part[:, None, 2:] - part[:, None, :2]
    return boxes * size.repeat(1, 1, 2) + corner.repeat(1, 1, 2)


__all__ = ["common_size", "cut", "find_ink", "group_by_size", "uncut", "within"]
