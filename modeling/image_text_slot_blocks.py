"""How ImageTextSlot reads long texts: block by block of slots.

A slot is sent to few of the cells and mixes with few other slots. So the slots are split into blocks, and each block is
given only the cells that it can be sent to and the slots beside it: what all slots cost then grows with their number,
not with its square.
"""

import torch

BLOCK = 32  # slots of a block, at least; with fewer, those beside it weigh more
INVISIBLE = 64.0  # a bias of attention that much below the best leaves nothing of what is seen
MOST_NEAR = 2 / 3  # where some block is near a larger share of the cells, blocks cost more than they save
NOWHERE = -(10**6)  # the index of a slot beside the first block or the last


def number_of_blocks(slots: int, radius: int, limit: int) -> int:
    """Into how many blocks of one size to split so many slots, at most `limit`, that mix with `radius` others on either
    side."""
    blocks = max(slots // max(BLOCK, radius), 1)
    return blocks if -(-slots // blocks) * blocks <= limit else 1


def near_cells(
    coordinates: torch.Tensor, held: torch.Tensor, start: torch.Tensor, size: int, sharpness: float
) -> torch.Tensor:
    """The cells that slots can be sent to, and as many others as make the numbers equal, `(windows, near)`.

    Args:
        coordinates, held: see `Gaze`, `(windows, cells)`.
        start: the first slot, `(windows,)`.
        size: number of slots.
        sharpness: weight of the squared distance between a slot and a cell.
    """
    reach = (size - 1) / 2 + ((held - 1) / 2).clamp(min=0)
    distance = (coordinates - start[:, None] - (size - 1) / 2).abs() - reach  # (windows, cells)
    visible = (distance < 0) | (distance.square() * sharpness < INVISIBLE)
    return distance.topk(int(visible.sum(1).max()), dim=1, largest=False, sorted=False).indices


def with_neighbours(values: torch.Tensor, blocks: int, radius: int, beyond: float = 0.0) -> torch.Tensor:
    """Values of blocks of slots `(batch * blocks, slots, ...)` with those of `radius` slots more on either side, which
    are `beyond` at both ends of the text; as they are if there is but one block."""
    if blocks == 1:
        return values
    values = values.unflatten(0, (-1, blocks))  # (batch, blocks, slots, ...)
    nothing = torch.full_like(values[:, :1, :radius], beyond)
    before = torch.cat((nothing, values[:, :-1, -radius:]), 1)
    behind = torch.cat((values[:, 1:, :radius], nothing), 1)
    return torch.cat((before, values, behind), 2).flatten(0, 1)


__all__ = ["MOST_NEAR", "NOWHERE", "near_cells", "number_of_blocks", "with_neighbours"]
