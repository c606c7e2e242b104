"""What the trainers of all models share: which parameters learn how, and a log of each part of the loss."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from accelerate.utils import find_batch_size, gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import IterableDataset
from transformers import TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import EvalLoopOutput

from regard.card import write_card
from regard.trainers.checkpoints import CheckpointTrainer


@dataclass
class RegardTrainingArguments(TrainingArguments):
    """`TrainingArguments` with two more learning rates. Defaults that differ from the parent's:

    data_seed: `seed`, for each process draws noise of its own, but the order of the data must be one for all.
    dispatch_batches, in `accelerator_config`: false. Each process reads its own rows of an iterable data set; the
        parent's default would cut up collated batches, in which rows may share an image, or differ in length.
    """

    muon_learning_rate: float = field(
        default=0.0,
        metadata={
            "help": "Learning rate of the matrices of linear layers under Muon (Jordan et al., 2024), scaled as "
            "AdamW's (Liu et al., 2025), e.g. 3e-3; the others stay under `optim`. 0: no Muon."
        },
    )
    backbone_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the encoders inside the model; default: that of the rest."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.data_seed is None:
            self.data_seed = self.seed
        settings: Any = self.accelerator_config
        if settings.dispatch_batches is None:
            settings.dispatch_batches = False


class MuonWithOptimizer(torch.optim.Optimizer):
    """Muon for the groups whose `use_muon` is true, another optimizer for the others.

    Args:
        groups: parameter groups, each with `use_muon`.
        make_other: groups -> the other optimizer.
        learning_rate: of the groups under Muon that have none of their own.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        make_other: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        learning_rate: float,
    ):
        under_muon = [group for group in groups if group["use_muon"]]
        others = [group for group in groups if not group["use_muon"]]
        self.muon = torch.optim.Muon(under_muon, lr=learning_rate, adjust_lr_fn="match_rms_adamw")
        self.other = make_other(others)
        # Schedulers to a least rate look for the rate that it is a share of.
        super().__init__(self.muon.param_groups + self.other.param_groups, {"lr": self.other.defaults["lr"]})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        # Groups and state are this optimizer's, which schedulers change and checkpoints hold.
        for optimizer, uses_muon in ((self.muon, True), (self.other, False)):
            optimizer.param_groups = [group for group in self.param_groups if group["use_muon"] is uses_muon]
            optimizer.state = self.state
            optimizer.step()
        return loss


def own_name(name: str) -> str:
    """What a model itself calls a parameter or module that peft has wrapped."""
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


class RegardTrainer(CheckpointTrainer):
    """`CheckpointTrainer` that decays matrices only, logs each part of the loss, and learns alike in many processes.

    A model's output has, beside `loss` and its parts, `num_items`: how many tokens, objects or rows each part is a mean
    over. By these numbers processes share the means of all; and the model's `total_loss` makes one loss of them. A
    model whose output has no `num_items` has a loss that is a mean over the rows of a batch, as many in each process.

    The stock trainer decays everything that is not a bias or in a norm: learned tokens and LayerScale too. A model
    names its learned tokens in `no_weight_decay`, and in `backbone_modules` the encoders that may have a learning rate
    of their own. A `PeftModel` around it learns likewise, and is saved as adapters with the model's configuration.
    """

    args: RegardTrainingArguments

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # A parameter that learns next to nothing, such as a branch under LayerScale 1e-6, has gradients too small for
        # normal floats, and CPUs compute with those a hundred times slower.
        torch.set_flush_denormal(True)
        if self.is_fsdp_enabled:  # accelerate shards the input embeddings by themselves, and only layers that are there
            network: Any = self.model
            embeddings = network.get_input_embeddings()
            names = {type(module).__name__ for module in network.modules() if embeddings not in module.modules()}
            plugin = self.accelerator.state.fsdp_plugin
            plugin.transformer_cls_names_to_wrap = sorted(names & set(network._no_split_modules))
        # The parent seeds all processes alike, and each would augment its images as the others do. Samplers of other
        # kinds draw the order of the data from this seed.
        if self.args.train_sampling_strategy in ("random", "sequential"):
            set_seed(self.args.seed + self.args.process_index)
        self._parts: dict[str, torch.Tensor] = {}  # sums and numbers since the last log
        self._evaluated: list[dict[str, torch.Tensor]] = []  # likewise, of each batch of an evaluation

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters under weight decay: matrices and kernels that are not learned tokens."""
        exempt = tuple(f".{name}" for name in self.accelerator.unwrap_model(model).no_weight_decay)
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.dim() > 1 and not f".{own_name(name)}".endswith(exempt)
        ]

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The parameters by weight decay, encoder or not, and optimizer; empty groups are left out."""
        decaying = set(self.get_decay_parameter_names(model))
        backbone = tuple(f"{name}." for name in self.accelerator.unwrap_model(model).backbone_modules)
        matrices = {
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and own_name(name).rpartition(".")[2] != "classifier"
        }
        groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                uses_muon = bool(self.args.muon_learning_rate) and name in matrices
                groups[name in decaying, own_name(name).startswith(backbone), uses_muon].append(parameter)
        scale = (self.args.backbone_learning_rate or self.args.learning_rate) / self.args.learning_rate
        return [
            {
                "params": parameters,
                "weight_decay": self.args.weight_decay if decays else 0.0,
                "lr": (scale if inside else 1.0)
                * (self.args.muon_learning_rate if uses_muon else self.args.learning_rate),
                "use_muon": uses_muon,
            }
            for (decays, inside, uses_muon), parameters in groups.items()
        ]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and (self.args.muon_learning_rate or self.args.backbone_learning_rate is not None):
            network: Any = self.model if model is None else model
            groups = self.parameter_groups(network)
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, network)
            if self.args.muon_learning_rate:
                if self.is_deepspeed_enabled:
                    raise ValueError("muon_learning_rate: DeepSpeed flattens matrices; give 0, or use DDP or FSDP2")
                self.optimizer = MuonWithOptimizer(
                    groups, lambda others: optimizer_class(others, **kwargs), self.args.muon_learning_rate
                )
            else:
                self.optimizer = optimizer_class(groups, **kwargs)
        return super().create_optimizer(model)

    def get_eval_dataloader(self, eval_dataset=None):
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:  # the stock trainer would leave the last samples out of the scores, too
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if (numbers := outputs.get("num_items")) is None:
            rows = torch.tensor(find_batch_size(inputs), dtype=torch.float32, device=loss.device)
            numbers, losses = {"loss": rows}, {"loss": loss}
        else:  # in single precision: sharded weights in bfloat16 give outputs in bfloat16, too
            losses = {name: outputs[name].float() for name in numbers}
            numbers = {name: number.float() for name, number in numbers.items()}
        sums = {name: torch.stack((value.detach() * numbers[name], numbers[name])) for name, value in losses.items()}
        if model.training:
            for name, value in sums.items():
                if name != "loss":  # that one the parent logs
                    self._parts[name] = self._parts.get(name, 0) + value
            shares = self._shares(outputs, numbers)
            loss = self.total_loss({name: value * shares.get(name, 1.0) for name, value in losses.items()})
        else:
            self._evaluated.append(sums)
        return (loss, outputs) if return_outputs else loss

    def total_loss(self, losses: Mapping[str, Any]) -> Any:
        """What is learned from: the loss made of its parts, each a mean, by their weights in the model."""
        return losses["loss"] if "loss" in losses else self.accelerator.unwrap_model(self.model).total_loss(losses)

    def _shares(self, outputs: Any, numbers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """By the name of a loss, how much it is of that over all processes, whose mean is taken: 1 where each has as
        many tokens, objects or rows as the others, 0 where it has none."""
        if self.args.world_size == 1:
            return {}
        # All that there may be, in one order: some processes may lack one, for no box was in their images.
        names = [field.name for field in fields(outputs) if field.name.startswith("loss")]
        none = torch.zeros((), device=self.args.device)
        own = torch.stack([numbers.get(name, none) for name in names])
        mean: Any = self.accelerator.reduce(own, "mean")
        return dict(zip(names, own / mean.clamp(min=torch.finfo(own.dtype).tiny), strict=True))

    def create_model_card(self, *args, license: str | None = None, **kwargs) -> None:
        if self.is_world_process_zero():
            write_card(str(self.args.output_dir), license)

    def _mean_parts(self) -> dict[str, float]:
        """Means since the last call, over all processes."""
        parts, self._parts = self._parts, {}
        return self._means(parts)

    def _mean_losses(self, dataloader: Any) -> dict[str, float]:
        """Means over all that the evaluation that has just ended has seen.

        Where samples do not fill the last batches of all processes, others do: these processes look again, at what is
        left alone. Of a stream they do not.
        """
        if not isinstance(dataloader.dataset, IterableDataset):
            size, processes = self.args.eval_batch_size, self.args.world_size
            rest = len(dataloader.dataset) % (size * processes)
            if rest and processes > 1:
                before = self.args.process_index * size
                own = max(0, min(rest - before, size))
                first = len(dataloader.dataset) - rest + before if own else 0
                rows = [dataloader.dataset[row] for row in range(first, first + max(own, 1))]
                network: Any = self.model
                self._evaluated.pop()
                self.prediction_step(network, dataloader.collate_fn(rows), True)
                if not own:
                    self._evaluated.pop()
        sums: dict[str, torch.Tensor] = {}
        for batch in self._evaluated:
            for name, value in batch.items():
                sums[name] = sums.get(name, 0) + value
        self._evaluated.clear()
        means = self._means(sums)
        return {"loss": self.total_loss(means), **means}

    def _means(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Sums by numbers, over all processes, some of which may lack a loss: no box was in their images."""
        nothing = torch.zeros(2, device=self.args.device)
        names = dict.fromkeys(gather_object(list(sums)))
        totals = {name: self.accelerator.gather(sums.get(name, nothing)[None]).sum(0) for name in names}
        return {name: (total / number).item() for name, (total, number) in totals.items() if number}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._mean_parts())
        super().log(logs, start_time)

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Each process has all weights within, where they are sharded: it may call parts of the model, and alone."""
        shards: list[Any] = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for module in shards:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
        for module in shards:
            module.reshard()
            reshards = self.accelerator.state.fsdp_plugin.reshard_after_forward
            module.set_reshard_after_forward(reshards and module is not shards[0], recurse=False)  # the root never does

    def log_pictures(self, writer: Any, dataset: Any, prefix: str) -> None:
        """Show TensorBoard what the model makes of some samples of an evaluation set."""

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._evaluated.clear()
        with self.whole_weights():
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
            losses = self._mean_losses(dataloader)
            if self.is_world_process_zero():
                for callback in self.callback_handler.callbacks:
                    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                        self.log_pictures(callback.tb_writer, dataloader.dataset, metric_key_prefix)
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in losses.items()})
        return output


__all__ = ["MuonWithOptimizer", "RegardTrainer", "RegardTrainingArguments"]
