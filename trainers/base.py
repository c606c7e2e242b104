"""What the trainers of all models share: which parameters decay, and a log of each part of the loss."""

from collections import defaultdict

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput


class RegardTrainer(Trainer):
    """`transformers.Trainer` that decays matrices only and logs the mean of every output field named `loss_*`.

    The stock trainer decays everything that is not a bias or in a norm: learned tokens and LayerScale too. A model
    names its learned tokens in `no_weight_decay`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # A parameter that learns next to nothing, such as a branch under LayerScale 1e-6, has gradients too small for
        # normal floats, and CPUs compute with those a hundred times slower.
        torch.set_flush_denormal(True)
        self._parts: dict[str, dict[str, list[torch.Tensor]]] = {"train": defaultdict(list), "eval": defaultdict(list)}

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters under weight decay: matrices and kernels that are not learned tokens."""
        exempt = self.accelerator.unwrap_model(model).no_weight_decay
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.dim() > 1 and name.rpartition(".")[2] not in exempt
        ]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        parts = self._parts["train" if model.training else "eval"]
        for name, value in outputs.items():
            if name.startswith("loss_"):
                parts[name].append(value.detach())
        return (loss, outputs) if return_outputs else loss

    def _mean_parts(self, mode: str) -> dict[str, float]:
        """Means since the last call, over all processes."""
        parts, self._parts[mode] = self._parts[mode], defaultdict(list)
        return {
            name: self.accelerator.gather(torch.stack(values).float().mean()).mean().item()
            for name, values in parts.items()
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._mean_parts("train"))
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._parts["eval"].clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in self._mean_parts("eval").items()})
        return output


__all__ = ["RegardTrainer"]
