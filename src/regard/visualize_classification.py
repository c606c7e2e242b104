"""Pictures that show how an image was classified: the classes, which branches a QAViT relied on, where they looked."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from regard.configuration.configuration_qavit import QAViTConfig
from regard.modeling.grid_attention import Partition, pool_grid
from regard.modeling.modeling_qavit import QAViTOutput
from regard.processing.image_io import to_grey_or_rgb
from regard.visualize import FAINT, INK, PAPER, confidence_colour, load_font

_MARGIN, _PANEL, _LISTS, _NAMES, _LINE = 16, 232, 288, 112, 20  # pixels
_TITLES = {"window": "Windows", "dilated": "Dilated", "channel": "Channels", "bank": "Bank"}
_FRAME, _TRACK, _BAR = (208, 213, 219), (236, 239, 242), (112, 124, 140)
# From little to much attention: dark violet, red, orange, pale yellow. Lightness grows evenly, so grey print keeps it.
_HEAT = np.array([(22, 11, 57), (87, 16, 110), (152, 40, 103), (209, 65, 73), (243, 125, 21), (252, 225, 130)])


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
    if outputs.attentions is None:
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
    scale = _PANEL / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    way = Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.BICUBIC  # few pixels stay visible as such
    shown = to_grey_or_rgb(image).resize((width, height), way, reducing_gap=3.0).convert("RGB")
    panels = [("Image", shown), *((_TITLES[name], _heat(shown, grid)) for name, grid in result["maps"].items())]

    rows = -(-len(panels) // 2)
    step = _PANEL + _MARGIN, height + _LINE + _MARGIN
    left = _MARGIN + min(len(panels), 2) * step[0] + _MARGIN
    lines = len(result["labels"]) + len(result["branches"]) + 2
    page_height = max(rows * step[1] + _MARGIN, lines * (_LINE + 2) + 5 * _LINE + 2 * _MARGIN)
    page = Image.new("RGB", (left + _LISTS + _MARGIN, page_height), PAPER)
    draw = ImageDraw.Draw(page)
    for index, (title, panel) in enumerate(panels):
        x, y = _MARGIN + index % 2 * step[0], _MARGIN + index // 2 * step[1]
        draw.text((x, y + _LINE // 2), title, font=load_font(14), fill=INK, anchor="lm")
        place = x + (_PANEL - width) // 2, y + _LINE
        page.paste(panel, place)
        draw.rectangle((place[0] - 1, place[1] - 1, place[0] + width, place[1] + height), outline=_FRAME)
    below = _draw_bars(
        draw,
        (left, _MARGIN),
        "Classes",
        [(item["label"], item["score"], confidence_colour(item["score"])) for item in result["labels"]],
    )
    weights = [(_TITLES[name], weight, _BAR) for name, weight in result["branches"].items()]
    below = _draw_bars(draw, (left, below + _LINE), "Weight of each branch", weights)
    if result["maps"]:
        _draw_scale(draw, (left, below + _LINE))
    return page


def _heat(shown: Image.Image, grid: np.ndarray) -> Image.Image:
    """The image in grey under the colours of a map: a quarter of the even share or less, to four times or more."""
    smooth = Image.fromarray(np.asarray(grid, dtype=np.float32)).resize(shown.size, Image.Resampling.BILINEAR)
    place = np.log2(np.maximum(np.asarray(smooth), 1e-6)) / 4 + 0.5
    grey = np.asarray(shown.convert("L"), dtype=np.float32)[..., None]
    return Image.fromarray((0.35 * grey + 0.65 * _heat_colour(place)).astype(np.uint8))


def _heat_colour(place: np.ndarray) -> np.ndarray:
    """RGB `(..., 3)` of places in [0, 1] on the scale."""
    stops = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(place, stops, channel) for channel in _HEAT.T], axis=-1)


def _draw_bars(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], title: str, entries: Sequence[tuple[str, float, Any]]
) -> int:
    """A title and a line with a bar for each entry; returns where they end."""
    x, y = place
    draw.text((x, y + _LINE // 2), title, font=load_font(14), fill=INK, anchor="lm")
    for index, (label, value, colour) in enumerate(entries, start=1):
        middle = y + index * (_LINE + 2) + _LINE // 2
        draw.text((x, middle), _shorten(label, _NAMES - 8), font=load_font(13), fill=INK, anchor="lm")
        start, length = x + _NAMES, _LISTS - _NAMES - 54
        draw.rectangle((start, middle - 5, start + length, middle + 5), fill=_TRACK)
        draw.rectangle((start, middle - 5, start + round(length * value), middle + 5), fill=colour)
        draw.text((x + _LISTS, middle), f"{100 * value:.1f} %", font=load_font(13), fill=INK, anchor="rm")
    return y + (len(entries) + 1) * (_LINE + 2)


def _draw_scale(draw: ImageDraw.ImageDraw, place: tuple[int, int]) -> None:
    x, y = place
    draw.text((x, y + _LINE // 2), "Attention a place receives", font=load_font(14), fill=INK, anchor="lm")
    top = y + _LINE + 2
    for column, colour in enumerate(_heat_colour(np.linspace(0, 1, _LISTS)).astype(int).tolist()):
        draw.line((x + column, top, x + column, top + 10), fill=tuple(colour))
    for share, text, anchor in ((0, "a quarter", "ls"), (0.5, "even", "ms"), (1, "four times", "rs")):
        draw.text((x + share * _LISTS, top + 25), text, font=load_font(12), fill=FAINT, anchor=anchor)


def _shorten(text: str, width: int) -> str:
    """A text that fits a width in pixels, in one line."""
    text = " ".join(text.split())
    if load_font(13).getlength(text) <= width:
        return text
    while text and load_font(13).getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


__all__ = ["attention_maps", "branch_weights", "draw_classification"]
