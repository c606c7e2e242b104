"""Trains QueryConditionedVQA: an image's questions together, attention taught by boxes, encoders frozen by plan."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_utils import EvalPrediction

from regard.data.augmentation import augment_images
from regard.data.labelled_images import open_stored
from regard.metrics.attention_maps.attention_maps import boxes_to_map
from regard.metrics.visual_question_answering.visual_question_answering import soft_scores
from regard.modeling.modeling_query_conditioned_vqa import QueryConditionedVQAModel
from regard.modeling.relevance_maps import patch_grid
from regard.processing.processing_query_conditioned_vqa import QueryConditionedVQAProcessor
from regard.trainers.base import RegardTrainer, RegardTrainingArguments


@dataclass
class VQATrainingArguments(RegardTrainingArguments):
    """`TrainingArguments` with the recipe of QueryConditionedVQA. Defaults that differ from the parent's:

    learning_rate 1e-3, cosine to 1 % of it: of encoders from scratch. Give published encoders a
        `backbone_learning_rate` of 2e-5 or so.
    per_device_train_batch_size 128: questions, not images.
    weight_decay 0.05.
    eval_strategy, save_strategy "epoch", load_best_model_at_end, by accuracy on the validation split: what is saved at
        the end is the best, not the last.
    remove_unused_columns: the collator makes the tensors.
    ddp_find_unused_parameters: every parameter gets a gradient in every step.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "The initial learning rate."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "The scheduler type to use."})
    lr_scheduler_kwargs: dict | str | None = field(
        default_factory=lambda: {"min_lr_rate": 0.01}, metadata={"help": "Extra parameters of the scheduler."}
    )
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of linear warm-up, or their share if below 1."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of matrices."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Questions a step on each process."})
    per_device_eval_batch_size: int = field(default=250, metadata={"help": "Questions at a time in evaluation."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch or best."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept, the best among them."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    metric_for_best_model: str | None = field(
        default="accuracy", metadata={"help": "What makes a checkpoint the best."}
    )
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether more of it is better."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns that `forward` does not name."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for parameters without a gradient in every step."}
    )
    frozen: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Encoders that do not learn: text or vision for good, or between two shares of the steps as "
            "NAME=FROM:TO, e.g. vision=0.5:1 to train it first and freeze it while the rest goes on, text=0:0.2 to "
            "thaw it late."
        },
    )
    augment_flip: bool = field(
        default=False, metadata={"help": "Mirror every other image; not where left and right matter."}
    )
    augment_shift: float = field(default=0.0, metadata={"help": "Largest shift, as a share of the side, e.g. 0.1."})
    blind: bool = field(
        default=False, metadata={"help": "Show no image: the baseline that answers from the question alone."}
    )


class VQACollator:
    """Rows of `regard.data.visual_questions` to the inputs of `QueryConditionedVQAModel.forward`.

    Consecutive rows with one `image_id` share one image.

    Args:
        processor: prepares images and questions.
        label2id: number of each answer, normalised as VQA v2 does. Other answers are left out.
        grid: rows and columns of the patches, over which boxes become maps.
        blind: give a grey image in place of each.
    """

    def __init__(
        self,
        processor: QueryConditionedVQAProcessor,
        label2id: Mapping[str, int],
        grid: tuple[int, int],
        blind: bool = False,
    ):
        self.processor = processor
        self.label2id = label2id
        self.grid = grid
        self.blind = blind

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """`pixel_values`, `input_ids`, `attention_mask`, `image_index`; `labels` `(questions, num_labels)`, the score
        of each answer; where any row has boxes `relevance_targets` `(questions, patches)`, or, where rows have
        `first_boxes` too, `(questions, 2, patches)`."""
        images, index = distinct_images(rows)
        if self.blind:
            images = [Image.new("RGB", image.size, "gray") for image in images]
        inputs = self.processor(
            images=images, text=[row["question"] for row in rows], image_index=index, return_tensors="pt"
        ).data
        labels = torch.zeros(len(rows), len(self.label2id))
        for number, row in enumerate(rows):
            for answer, score in soft_scores(row["answers"]).items():
                if answer in self.label2id:
                    labels[number, self.label2id[answer]] = score
        inputs["labels"] = labels
        boxes = boxes_in_shares(rows, images, index)
        if any(boxes):
            inputs["relevance_targets"] = self._maps(boxes)
            if all("first_boxes" in row for row in rows):
                first = self._maps(boxes_in_shares(rows, images, index, "first_boxes"))
                inputs["relevance_targets"] = torch.stack((first, inputs["relevance_targets"]), dim=1)
        return inputs

    def _maps(self, boxes: Sequence[Sequence[Sequence[float]]]) -> torch.Tensor:
        maps = np.stack([boxes_to_map(some, *self.grid) for some in boxes])
        return torch.from_numpy(maps).float().flatten(1)


def distinct_images(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Image.Image], list[int]]:
    """The images of rows, each once, and for each row the number of its image; only neighbours share one."""
    images: list[Image.Image] = []
    index: list[int] = []
    for _, group in groupby(enumerate(rows), lambda item: item[1].get("image_id", item[0])):
        members = [row for _, row in group]
        index += [len(images)] * len(members)
        images.append(open_stored(members[0]["pixel_values"]))
    return images, index


def boxes_in_shares(
    rows: Sequence[Mapping[str, Any]], images: Sequence[Image.Image], index: Sequence[int], column: str = "boxes"
) -> list[list[list[float]]]:
    """The boxes in a column of each row, in pixels of its image, as shares of the image's sides, cut at its edges."""
    return [
        [
            [min(max(edge / side, 0.0), 1.0) for edge, side in zip(box, images[image].size * 2, strict=True)]
            for box in row.get(column) or ()
        ]
        for row, image in zip(rows, index, strict=True)
    ]


class ImageGroupSampler(Sampler[int]):
    """All rows in random order, but those of one image one after the other, so that its encoding serves them all.

    Args:
        groups: for each image the rows of its questions.
        seed: of the order; each epoch has another.
    """

    def __init__(self, groups: Sequence[Sequence[int]], seed: int):
        self.groups = groups
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for image in torch.randperm(len(self.groups), generator=generator).tolist():
            yield from self.groups[image]


def group_by_image(dataset: Any) -> list[list[int]]:
    """For each image of a data set the rows of its questions: by its column `image_id`, or where it is generated by
    `questions_per_image`; each row is an image of its own where there is neither."""
    if (number := getattr(dataset, "questions_per_image", None)) is not None:
        return [list(range(start, min(start + number, len(dataset)))) for start in range(0, len(dataset), number)]
    if "image_id" not in (getattr(dataset, "column_names", None) or ()):
        return [[row] for row in range(len(dataset))]
    groups: dict[Any, list[int]] = {}
    for row, image in enumerate(dataset["image_id"][:]):
        groups.setdefault(image, []).append(row)
    return list(groups.values())


def move_images(images: torch.Tensor, flip: bool, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `(batch, channels, height, width)`, moved as `augment_images` does, and for each of their pixels the place
    it came from, `(batch, 2, height, width)`: x and y from -1 to 1."""
    batch, channels, height, width = images.shape
    places = torch.stack(
        torch.meshgrid(
            torch.linspace(-1 + 1 / width, 1 - 1 / width, width, device=images.device),
            torch.linspace(-1 + 1 / height, 1 - 1 / height, height, device=images.device),
            indexing="xy",
        )
    ).expand(batch, -1, -1, -1)
    moved = augment_images(torch.cat((images, places.to(images.dtype)), dim=1), flip, shift)
    return moved[:, :channels], moved[:, channels:]


def move_maps(maps: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Maps `(batch, rows, columns)` that follow their images, which took their pixels from `places`; each sums to 1, or
    to 0 where it did or what it marked has left the image."""
    where = nn.functional.interpolate(places, maps.shape[1:], mode="area").permute(0, 2, 3, 1)
    moved = nn.functional.grid_sample(maps[:, None], where.to(maps.dtype), align_corners=False).squeeze(1)
    return moved / moved.sum((1, 2), keepdim=True).clamp(min=1e-6)


class VQATrainer(RegardTrainer):
    """Trainer of `QueryConditionedVQAModel`.

    `processing_class` is a `QueryConditionedVQAProcessor`. Metrics: `accuracy`, the mean score of the best answer,
    min(n / 3, 1) of one which n of VQA v2's ten annotators gave; `pointing`, the share of the questions with boxes
    whose most relevant patch touches one; and each loss.
    """

    args: VQATrainingArguments
    processing_class: QueryConditionedVQAProcessor

    def __init__(self, model, args: VQATrainingArguments, processing_class: QueryConditionedVQAProcessor, **kwargs):
        self.grid = grid_of(model, processing_class)
        label2id = {name: index for index, name in model.config.id2label.items()}
        kwargs.setdefault("data_collator", VQACollator(processing_class, label2id, self.grid, args.blind))
        kwargs.setdefault("compute_metrics", score)
        self.frozen = [parse_frozen(item, model.backbone_modules) for item in args.frozen]
        for name, start, end in self.frozen:
            if (start, end) == (0.0, 1.0):
                model.get_submodule(name).requires_grad_(False)
        super().__init__(model=model, args=args, processing_class=processing_class, **kwargs)
        image_processor: Any = processing_class.image_processor
        mean, std = (
            torch.tensor(value)[:, None, None] for value in (image_processor.image_mean, image_processor.image_std)
        )
        self._mean, self._std = mean.to(args.device), std.to(args.device)
        self.add_callback(_Freezing(self))

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return ImageGroupSampler(group_by_image(dataset), self.args.seed)

    def frozen_now(self) -> list[str]:
        """The encoders that do not learn in this step."""
        done = self.state.global_step / max(self.state.max_steps, 1)
        return [name for name, start, end in self.frozen if start <= done < end]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            for name in self.frozen_now():  # dropout and the statistics of norms stand still too
                self.accelerator.unwrap_model(model).get_submodule(name).eval()
            inputs = self._augment(inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _augment(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not (self.args.augment_flip or self.args.augment_shift):
            return inputs
        images = (inputs["pixel_values"] * self._std + self._mean).clamp(0, 1)
        images, places = move_images(images, self.args.augment_flip, self.args.augment_shift)
        inputs = {**inputs, "pixel_values": (images - self._mean) / self._std}
        if "relevance_targets" in inputs:
            maps = inputs["relevance_targets"]
            places = places[inputs["image_index"]].repeat_interleave(maps[0].numel() // maps.shape[-1], dim=0)
            moved = move_maps(maps.flatten(0, -2).unflatten(1, self.grid), places)
            inputs["relevance_targets"] = moved.reshape(maps.shape)
        return inputs

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss; the best answer's score, and 1 where the most relevant patch touches a box, 0 where it does not, -1
        where there is none, `(questions, 2)`; and the best score there is, `(questions,)`."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        labels = inputs["labels"]
        scores = labels.gather(1, outputs.logits.argmax(-1, keepdim=True))
        touches = torch.full_like(scores, -1.0)
        if (targets := inputs.get("relevance_targets")) is not None:
            targets = targets[:, -1] if targets.dim() == 3 else targets
            hit = targets.gather(1, outputs.relevance[:, -1].argmax(-1, keepdim=True)) > 0
            touches = torch.where(targets.sum(1, keepdim=True) > 0, hit.to(scores.dtype), touches)
        return loss.detach(), torch.cat((scores, touches), dim=1), labels.amax(1)


def grid_of(model: QueryConditionedVQAModel, processor: QueryConditionedVQAProcessor) -> tuple[int, int]:
    """Rows and columns of the patches into which a model cuts what its processor makes of an image."""
    images = processor.image_processor(images=Image.new("RGB", (8, 8)), return_tensors="pt")["pixel_values"]
    training = model.training
    with torch.no_grad():
        features = model.eval().encode_image(images.to(model.device))
    model.train(training)
    return patch_grid(features.shape[1], images.shape[2], images.shape[3])


class _Freezing(TrainerCallback):
    def __init__(self, trainer: VQATrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        for name in self.trainer.frozen_now():
            for parameter in model.get_submodule(name).parameters():
                parameter.grad = None  # optimizers pass over it: no step, no decay


def parse_frozen(item: str, encoders: Sequence[str]) -> tuple[str, float, float]:
    """A part of the freezing plan, `NAME` or `NAME=FROM:TO`: the module's name and the shares of the steps.

    Raises:
        ValueError: it is none.
    """
    name, _, span = item.partition("=")
    start, _, end = (span or "0:1").partition(":")
    module = f"{name}_model"
    try:
        first, last = float(start), float(end)
    except ValueError:
        first, last = 1.0, 0.0
    if module not in encoders or not 0 <= first < last <= 1:
        raise ValueError(f"frozen: write text, vision or such as vision=0.5:1, not {item!r}")
    return module, first, last


def score(prediction: EvalPrediction) -> dict[str, float]:
    """Mean score of the best answers, and where there are boxes the share of questions that point at one."""
    scores, touches = np.asarray(prediction.predictions).T
    known = touches >= 0
    return {"accuracy": float(scores.mean())} | ({"pointing": float(touches[known].mean())} if known.any() else {})


__all__ = ["ImageGroupSampler", "VQACollator", "VQATrainer", "VQATrainingArguments", "group_by_image", "score"]
