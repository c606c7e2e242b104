"""How the models report losses: each a mean, with the number of what it is a mean over."""

from collections.abc import Mapping
from typing import Any

import torch


class WeightedLosses:
    """A model whose loss is a weighted sum of parts."""

    def loss_weights(self) -> dict[str, float]:
        """The weight of each part of the loss, by its name in the output."""
        raise NotImplementedError

    def total_loss(self, losses: Mapping[str, Any]) -> Any:
        """The weighted sum of the parts that are given; others in `losses` have no say."""
        weights = self.loss_weights()
        return sum(weights[name] * value for name, value in losses.items() if name in weights)

    def average(self, sums: Mapping[str, tuple[torch.Tensor, torch.Tensor | int]]) -> dict[str, Any]:
        """`loss`, its parts and `num_items` of an output.

        Args:
            sums: of each part the sum, and the number of what was added up: characters, objects, rows.
        """
        numbers = {
            name: torch.as_tensor(number, dtype=torch.float32, device=total.device)
            for name, (total, number) in sums.items()
        }
        losses = {name: total / numbers[name].clamp(min=1) for name, (total, _) in sums.items()}
        return {"loss": self.total_loss(losses), **losses, "num_items": numbers}


__all__ = ["WeightedLosses"]
