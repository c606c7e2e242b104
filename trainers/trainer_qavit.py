"""Trains QAViT: the recipe that small transformers need on little data, and evaluation of averaged weights."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import BaseImageProcessor, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalPrediction

from regard.data.augmentation import augment_images, mix, random_erasing
from regard.metrics.image_classification.image_classification import score_classes
from regard.trainers.base import RegardTrainer, RegardTrainingArguments

OWN_WEIGHTS_NAME = "training_weights.safetensors"  # in a checkpoint, beside the averaged ones


@dataclass
class QAViTTrainingArguments(RegardTrainingArguments):
    """`TrainingArguments` with the recipe of QAViT. Defaults that differ from the parent's:

    300 epochs, learning_rate 1e-3 (8e-4 for `small`), cosine to 1e-6 after 20 epochs of warm-up, weight decay 0.05: the
        described recipe.
    label_smoothing_factor 0.1, and what is listed below: the augmentation that lets small transformers learn from
        little data (Touvron et al., 2021, DeiT).
    eval_strategy, save_strategy "epoch", load_best_model_at_end, by top-1 on the validation split: what is saved at the
        end is the best, not the last.
    remove_unused_columns: the collator makes the tensors.
    ddp_find_unused_parameters: every parameter gets a gradient in every step.
    """

    num_train_epochs: float = field(default=300, metadata={"help": "Passes over the training images."})
    learning_rate: float = field(default=1e-3, metadata={"help": "The initial learning rate."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "The scheduler type to use."})
    lr_scheduler_kwargs: dict | str | None = field(
        default_factory=lambda: {"min_lr": 1e-6}, metadata={"help": "Extra parameters of the scheduler."}
    )
    warmup_steps: float = field(
        default=20 / 300, metadata={"help": "Steps of linear warm-up, or their share if below 1."}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of matrices."})
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Share of each label given to all classes."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images a step on each process."})
    per_device_eval_batch_size: int = field(default=250, metadata={"help": "Images at a time in evaluation."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch or best."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept, the best among them."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    metric_for_best_model: str | None = field(default="top1", metadata={"help": "What makes a checkpoint the best."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether more of it is better."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns that `forward` does not name."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for parameters without a gradient in every step."}
    )
    ema_decay: float = field(
        default=0.9998, metadata={"help": "Decay of the averaged weights, which are evaluated and kept; 0: none."}
    )
    augment_flip: bool = field(default=True, metadata={"help": "Mirror every other image."})
    augment_shift: float = field(default=0.0, metadata={"help": "Largest shift, as a share of the side, e.g. 0.125."})
    augment_min_area: float = field(
        default=1.0, metadata={"help": "Smallest share of an image that a random crop keeps, e.g. 0.25; 1: no crop."}
    )
    rand_augment_ops: int = field(default=2, metadata={"help": "RandAugment operations an image; 0: none."})
    rand_augment_magnitude: float = field(default=0.9, metadata={"help": "Their largest strength, 0 to 1."})
    size_curriculum: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Side of the training images in pixels, from a share of the steps on, as SHARE=PIXELS, e.g. 0=20 "
            "0.5=24 0.8=28: small images cost less (Tan and Le, 2021). Default: the processor's."
        },
    )
    random_erasing: float = field(default=0.25, metadata={"help": "Share of images that lose a rectangle."})
    mixup_alpha: float = field(default=0.8, metadata={"help": "Of mixup's Beta distribution; 0: no mixup."})
    cutmix_alpha: float = field(default=1.0, metadata={"help": "Of CutMix's Beta distribution; 0: no CutMix."})


class ClassificationCollator:
    """Rows `{"pixel_values": image, "label": int}` to the inputs of `QAViTForImageClassification.forward`."""

    def __init__(self, processor: BaseImageProcessor):
        self.processor = processor

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        inputs = self.processor([row["pixel_values"] for row in rows], return_tensors="pt")
        return {"pixel_values": inputs["pixel_values"], "labels": torch.tensor([row["label"] for row in rows])}


class QAViTTrainer(RegardTrainer):
    """Trainer of `QAViTForImageClassification`.

    With `ema_decay`, the averaged weights are evaluated and saved, so that a checkpoint is what was measured; the
    weights that training goes on from lie beside them.
    `processing_class` is the image processor. Metrics: `top1`, `top5` and the loss.
    """

    args: QAViTTrainingArguments
    processing_class: BaseImageProcessor

    def __init__(self, model, args: QAViTTrainingArguments, processing_class: BaseImageProcessor, **kwargs):
        kwargs.setdefault("data_collator", ClassificationCollator(processing_class))
        kwargs.setdefault("compute_metrics", score)
        super().__init__(model=model, args=args, processing_class=processing_class, **kwargs)
        if args.ema_decay and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("ema_decay: whole weights are averaged; give 0 where they are sharded, or launch with DDP")
        self.size_curriculum = [parse_size(item) for item in args.size_curriculum]
        self.label_smoother = None  # it cannot smooth the labels of mixed images: compute_loss does
        mean, std = (
            torch.tensor(value)[:, None, None] for value in (processing_class.image_mean, processing_class.image_std)
        )
        self._mean, self._std = mean.to(args.device), std.to(args.device)
        self.average: AveragedModel | None = None
        if args.ema_decay:
            self.average = AveragedModel(self.accelerator.unwrap_model(self.model), multi_avg_fn=self._update_average)
            self.add_callback(_Averaging(self))

    def _update_average(self, averaged, current, number) -> None:
        decay = min(self.args.ema_decay, (1 + number.item()) / (10 + number.item()))  # young weights are soon forgotten
        get_ema_multi_avg_fn(decay)(averaged, current, number)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            inputs = self._augment(inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @torch.no_grad()
    def _augment(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        args = self.args
        images = augment_images(
            (inputs["pixel_values"] * self._std + self._mean).clamp(0, 1),
            args.augment_flip,
            args.augment_shift,
            args.augment_min_area,
            args.rand_augment_ops,
            args.rand_augment_magnitude,
        )
        if size := self._training_size():
            images = nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
        pixel_values = (images - self._mean) / self._std
        if args.random_erasing:
            pixel_values = random_erasing(pixel_values, args.random_erasing)
        number = self.accelerator.unwrap_model(self.model).config.num_labels
        targets = nn.functional.one_hot(inputs["labels"], number).to(pixel_values.dtype)
        targets = torch.lerp(targets, torch.full_like(targets, 1 / number), args.label_smoothing_factor)
        pixel_values, targets = mix(pixel_values, targets, args.mixup_alpha, args.cutmix_alpha)
        return {"pixel_values": pixel_values, "labels": targets}

    def _training_size(self) -> int | None:
        done = self.state.global_step / max(self.state.max_steps, 1)
        return max(((start, size) for start, size in self.size_curriculum if start <= done), default=(0.0, None))[1]

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model has the averaged weights within, if there are any yet."""
        if self.average is None or not self.average.n_averaged:
            yield
            return
        model = self.accelerator.unwrap_model(self.model)
        own = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.average.module.state_dict())
        try:
            yield
        finally:
            model.load_state_dict(own)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss, logits `(batch, classes)` and labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), None if prediction_loss_only else outputs.logits.detach(), inputs["labels"]

    def evaluation_loop(self, *args, **kwargs):
        with self.averaged_weights():
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self.averaged_weights():
            super().save_model(output_dir, _internal_call)
        if _internal_call and self.average is not None and self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            save_model(model, os.path.join(output_dir or str(self.args.output_dir), OWN_WEIGHTS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = os.path.join(resume_from_checkpoint, OWN_WEIGHTS_NAME)
        if self.average is not None and os.path.isfile(path):
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
            self._average_from_model(state.global_step)
            load_model(self.accelerator.unwrap_model(self.model), path)

    def _load_best_model(self):
        super()._load_best_model()
        self._average_from_model(self.state.global_step)

    def _average_from_model(self, steps: int) -> None:
        if self.average is not None:
            self.average.module.load_state_dict(self.accelerator.unwrap_model(self.model).state_dict())
            self.average.n_averaged.fill_(steps)


class _Averaging(TrainerCallback):
    def __init__(self, trainer: QAViTTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        assert self.trainer.average is not None
        self.trainer.average.update_parameters(self.trainer.accelerator.unwrap_model(self.trainer.model))


def parse_size(item: str) -> tuple[float, int]:
    """A step of the size curriculum, `SHARE=PIXELS`.

    Raises:
        ValueError: it is none.
    """
    start, _, size = item.partition("=")
    try:
        share, pixels = float(start), int(size)
    except ValueError:
        share, pixels = -1.0, 0
    if not 0 <= share < 1 or pixels < 1:
        raise ValueError(f"size_curriculum: write SHARE=PIXELS, such as 0.5=24, not {item!r}")
    return share, pixels


def score(prediction: EvalPrediction) -> dict[str, float]:
    """Shares of images whose label is the first, or among the first five, of the classes by logit."""
    return score_classes(np.asarray(prediction.predictions), np.asarray(prediction.label_ids))


__all__ = ["ClassificationCollator", "QAViTTrainer", "QAViTTrainingArguments", "score"]
