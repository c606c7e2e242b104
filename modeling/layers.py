"""Layers that several models share."""

import math

import torch
from torch import nn


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): drops the whole residual branch of a sample with probability `rate`."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return hidden_states
        keep = hidden_states.new_empty(hidden_states.shape[0], *[1] * (hidden_states.dim() - 1))
        return hidden_states * keep.bernoulli_(1 - self.rate) / (1 - self.rate)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of `(batch, channels, height, width)`."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DepthwiseConv2d(nn.Conv2d):
    """Convolution of each channel by itself, in the precision of its weights: on a CPU it is several times slower in
    bfloat16 than in float32.

    Args:
        channels: of input and output.
        kernel_size: side of the kernels; odd.
        shortcut: add the input to the output, by 1 more in the middle of each kernel, which costs nothing.
    """

    def __init__(self, channels: int, kernel_size: int, shortcut: bool = False):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.shortcut = shortcut

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if self.shortcut:
            middle = self.kernel_size[0] // 2
            weight = weight.clone()
            weight[:, :, middle, middle] += 1
        with torch.autocast("cpu", enabled=False):
            return self._conv_forward(hidden_states.to(weight.dtype), weight, self.bias)


class SwiGLU(nn.Module):
    """Gated perceptron (Shazeer, 2020): `down(silu(gate(x)) * up(x))`."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(nn.functional.silu(gate) * up)


def sinusoidal_positions(positions: torch.Tensor, size: int, max_period: float = 10_000.0) -> torch.Tensor:
    """Sines and cosines of positions (Vaswani et al., 2017): `(...)` to `(..., size)`; `size` is even."""
    frequencies = torch.arange(size // 2, device=positions.device, dtype=torch.float32) / (size // 2)
    angles = positions.float()[..., None] * torch.exp(-math.log(max_period) * frequencies)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def sinusoidal_positions_2d(
    height: int, width: int, size: int, device: torch.device, part: torch.Tensor | None = None
) -> torch.Tensor:
    """Positions of a grid, row by row: `(height * width, size)`, the first half of the channels for the rows.

    Rows and columns are measured in 1/64 of the image's sides, so that a larger image has the same range.

    Args:
        part: the part of each image that the grid covers, `(batch, 4)`: left, top, right, bottom as shares of the
            image. With it the result is `(batch, height * width, size)`.
    """
    rows = (torch.arange(height, device=device) + 0.5) * (64 / height)
    columns = (torch.arange(width, device=device) + 0.5) * (64 / width)
    if part is not None:
        left, top, right, bottom = part[..., None].unbind(1)  # each (batch, 1)
        rows, columns = top * 64 + rows * (bottom - top), left * 64 + columns * (right - left)
    rows = sinusoidal_positions(rows, size // 2)[..., :, None, :].expand(*rows.shape, width, -1)
    columns = sinusoidal_positions(columns, size // 2)[..., None, :, :].expand(*rows.shape[:-1], -1)
    return torch.cat((rows, columns), dim=-1).flatten(-3, -2)


__all__ = ["ChannelNorm", "DepthwiseConv2d", "DropPath", "SwiGLU", "sinusoidal_positions", "sinusoidal_positions_2d"]
