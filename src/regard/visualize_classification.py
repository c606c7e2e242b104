"""Pictures that show how an image was classified: the classes, which branches a QAViT relied on, where they looked."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from regard.configuration.configuration_qavit import QAViTConfig
from regard.modeling.grid_attention import Partition, pool_grid
from regard.modeling.modeling_qavit import QAViTOutput
from regard.panels import LINE, LISTS, MARGIN, PANEL, draw_bars, draw_panel, draw_scale, fit_panel, heat
from regard.visualize import PAPER, confidence_colour

_TITLES = {"window": "Windows", "dilated": "Dilated", "channel": "Channels", "bank": "Bank"}
_BAR = (112, 124, 140)


def attention_maps(outputs: QAViTOutput, config: QAViTConfig, rows: int, columns: int) -> dict[str, np.ndarray]:
    """Where each branch looked: the attention that each token of the grid receives, over that which it would receive
    if all were even, as the mean over heads and blocks, `(batch, rows, columns)` by the branch's name.

    For the bank it is how much each token was written into it. Branches without places are left out: channels, and a
    bank that is not written.

    Args:
        outputs: with `attentions`.
        config: of the model.
        rows, columns: the grid of tokens.

    Raises:
        ValueError: there are no attentions.
    """
    if not outputs.attentions:  # () where the implementation gives no weights
        raise ValueError('no attentions; load the model with attn_implementation="eager" and give output_attentions')
    cuts = {
        "window": [Partition.windows(rows, columns, config.window_size)],
        "dilated": [Partition.dilated(rows, columns, rate) for rate in config.dilation_factors],
    }
    maps: dict[str, np.ndarray] = {}
    for branch, name in enumerate(config.branches):
        weights = [block[branch] for block in outputs.attentions]
        if name in cuts:
            received = [
                _received_in_groups(of_heads, cut, rows, columns, config.kv_pool_size)
                for block in weights
                for of_heads, cut in zip(block, cuts[name], strict=True)
            ]
        elif name == "bank" and config.bank_written:
            spread = _spread((rows, columns), config.kv_pool_size).to(weights[0][1].device)
            received = [written.float().mean(2) @ spread / spread.mean(0) for _, written in weights]
            received = [of_heads.unflatten(-1, (rows, columns)) for of_heads in received]
        else:
            continue
        maps[name] = torch.cat(received, dim=1).mean(1).detach().cpu().numpy()  # of all heads of all blocks
    return maps


def branch_weights(outputs: QAViTOutput, config: QAViTConfig) -> dict[str, np.ndarray]:
    """What the fusion gives each branch, as the mean over tokens and blocks, `(batch,)` by the branch's name."""
    assert outputs.fusion_weights is not None
    weights = outputs.fusion_weights.float().mean((1, 2)).detach().cpu().numpy()  # (batch, branches)
    return {name: weights[:, branch] for branch, name in enumerate(config.branches)}


def _spread(cells: tuple[int, int], pool_size: int) -> torch.Tensor:
    """How much of each key `(keys, cells)` is each cell, where keys may be the means of several cells."""
    number = cells[0] * cells[1]
    return pool_grid(torch.eye(number).view(1, *cells, number), pool_size).flatten(0, 2)


def _received_in_groups(
    weights: torch.Tensor, partition: Partition, rows: int, columns: int, pool_size: int
) -> torch.Tensor:
    """Weights `(batch, groups, heads, cells, keys)` to what each token of the grid receives from those of its group,
    over the even share, `(batch, heads, rows, columns)`."""
    spread = _spread(partition.cells, pool_size).to(weights.device)[None]  # (1 or groups, keys, cells)
    real = partition.real(rows, columns, weights.device)  # (groups, cells, 1)
    if real is None:
        real = weights.new_ones(1, weights.shape[3], 1)
    spread = spread * real.transpose(1, 2)  # padding is not seen, nor does it look
    seen = spread.sum(-1, keepdim=True)  # (1 or groups, keys, 1)
    spread = spread / seen.clamp(min=1e-9)
    received = (weights.float() * real[:, None]).sum(3) @ spread  # (batch, groups, heads, cells)
    # Where pooled regions overlap, even attention to the keys is not even to the cells.
    keys = (seen > 0).float().transpose(1, 2)  # (1 or groups, 1, keys)
    received = received / (real.sum(1, keepdim=True) * keys / keys.sum(-1, keepdim=True) @ spread).clamp(min=1e-9)
    received = received.transpose(2, 3).flatten(0, 1)  # (batch * groups, cells, heads)
    return partition.merge(received, rows, columns).permute(0, 3, 1, 2)


def draw_classification(image: Image.Image, result: Mapping[str, Any]) -> Image.Image:
    """Draw an image, its classes and, for each branch that looks at places, where it looked.

    Args:
        image: the image that was classified, of any mode and size.
        result: `labels`, a list of `{"label", "score"}`; `branches`, the weight of each branch by name; `maps`, the
            attention `(rows, columns)` of each branch that looks at places, by name, 1 being even.

    Returns:
        An RGB picture.
    """
    shown = fit_panel(image)
    panels = [("Image", shown), *((_TITLES[name], heat(shown, grid)) for name, grid in result["maps"].items())]

    rows = -(-len(panels) // 2)
    step = PANEL + MARGIN, shown.height + LINE + MARGIN
    left = MARGIN + min(len(panels), 2) * step[0] + MARGIN
    lines = len(result["labels"]) + len(result["branches"]) + 2
    page_height = max(rows * step[1] + MARGIN, lines * (LINE + 2) + 5 * LINE + 2 * MARGIN)
    page = Image.new("RGB", (left + LISTS + MARGIN, page_height), PAPER)
    draw = ImageDraw.Draw(page)
    for index, (title, panel) in enumerate(panels):
        draw_panel(page, (MARGIN + index % 2 * step[0], MARGIN + index // 2 * step[1]), title, panel)
    below = draw_bars(
        draw,
        (left, MARGIN),
        "Classes",
        [(item["label"], item["score"], confidence_colour(item["score"])) for item in result["labels"]],
    )
    weights = [(_TITLES[name], weight, _BAR) for name, weight in result["branches"].items()]
    below = draw_bars(draw, (left, below + LINE), "Weight of each branch", weights)
    if result["maps"]:
        draw_scale(draw, (left, below + LINE), "Attention a place receives")
    return page


__all__ = ["attention_maps", "branch_weights", "draw_classification"]
