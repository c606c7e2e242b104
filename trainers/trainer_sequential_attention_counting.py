"""Trains SequentialAttentionCounting: whole trajectories at once, or "done?" and "where?" batches in turn."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.trainer_utils import EvalPrediction

from regard.data.labelled_images import open_stored
from regard.metrics.object_counting.object_counting import score_counts, score_stopping
from regard.processing.processing_sequential_attention_counting import SequentialAttentionCountingProcessor
from regard.trainers.base import RegardTrainer, RegardTrainingArguments
from regard.visualize_counting import draw_count

PADDING = -100.0  # what the Trainer pads predictions of different lengths with
MAX_DISTANCE = 0.05  # of a point from its object, as share of the image's side


@dataclass
class CountTrainingArguments(RegardTrainingArguments):
    """`TrainingArguments` with the recipe of SequentialAttentionCounting. Defaults that differ from the parent's:

    learning_rate 1e-3, backbone_learning_rate 2e-4, cosine to 1 %: what is new beside a published backbone learns at
        five times its rate. From scratch both should learn at the same.
    per_device_train_batch_size 16: images, each with up to `categories_per_image` categories.
    weight_decay 0.05.
    eval_strategy, save_strategy "steps", load_best_model_at_end, by the mean absolute error of validation counts.
    label_names "objects": the truth, without which evaluation would give the loss only.
    remove_unused_columns: the collator makes the tensors.
    ddp_find_unused_parameters: every parameter gets a gradient in every step.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "The initial learning rate."})
    backbone_learning_rate: float | None = field(
        default=2e-4, metadata={"help": "Learning rate of the vision-language backbone."}
    )
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "The scheduler type to use."})
    lr_scheduler_kwargs: dict | str | None = field(
        default_factory=lambda: {"min_lr_rate": 0.01}, metadata={"help": "Extra parameters of the scheduler."}
    )
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of linear warm-up, or their share if below 1."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of matrices."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Images a step on each process."})
    per_device_eval_batch_size: int = field(default=20, metadata={"help": "Images at a time in evaluation."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="steps", metadata={"help": "When to save: no, steps, epoch or best."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept, the best among them."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    metric_for_best_model: str | None = field(default="mae", metadata={"help": "What makes a checkpoint the best."})
    greater_is_better: bool | None = field(default=False, metadata={"help": "Whether more of it is better."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["objects"], metadata={"help": "Inputs that are the truth."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns that `forward` does not name."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for parameters without a gradient in every step."}
    )
    mode: str = field(
        default="trajectory",
        metadata={
            "help": "trajectory: all steps of an image at once; alternating: batches that ask whether any is left, "
            "half of whose rows are done, and batches that ask where the next is, in turn."
        },
    )
    steps_per_image: int = field(
        default=16, metadata={"help": "Most steps of a trajectory that are learned from at once, the last among them."}
    )
    point_jitter: float = field(
        default=0.005,
        metadata={"help": "Standard deviation of noise on points counted, in shares of the side."},
    )
    double_points: float = field(
        default=0.02, metadata={"help": "Share of the points counted that are counted once more, as can happen."}
    )
    categories_per_image: int = field(
        default=3, metadata={"help": "Categories asked for in one generated image: present ones, then an absent one."}
    )
    logged_counts: int = field(default=4, metadata={"help": "Validation images drawn to TensorBoard, with the path."})

    def __post_init__(self):
        super().__post_init__()
        if self.mode not in ("trajectory", "alternating"):
            raise ValueError(f"mode: choose trajectory or alternating, not {self.mode!r}")
        if self.steps_per_image < 2:
            raise ValueError(f"steps_per_image must be at least 2, not {self.steps_per_image}")


def pad_rows(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors `(length, ...)` as one `(rows, length, ...)`, filled up with -1, at least one long: memory is called even
    where nothing is to be counted, for DDP waits for the gradient of every parameter in every process."""
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=-1)
    missing = max(1 - padded.shape[1], 0)
    return torch.cat((padded, padded.new_full((len(padded), missing, *padded.shape[2:]), -1)), dim=1)


class CountCollator:
    """Rows of `regard.data` to the inputs of `SequentialAttentionCountingModel.forward`.

    A generated image is asked for its own category, then for the others present in it, last for an absent one.

    Args:
        processor: prepares images and categories.
        categories_per_image: at most so many.
    """

    def __init__(self, processor: SequentialAttentionCountingProcessor, categories_per_image: int = 3):
        self.processor = processor
        self.categories_per_image = categories_per_image

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """`pixel_values`, `image_grid_thw`, `input_ids`, `attention_mask`, `image_index`; `objects` `(rows, objects,
        2)`, in reading order, in shares of the image's sides, -1 for padding."""
        images = [open_stored(row["pixel_values"]).convert("RGB") for row in rows]
        names, index, objects = [], [], []
        for number, (row, image) in enumerate(zip(rows, images, strict=True)):
            for name, points in self.questions(row):
                names.append(name)
                index.append(number)
                objects.append(torch.tensor(points, dtype=torch.float32).reshape(-1, 2) / torch.tensor(image.size))
        inputs = self.processor(images=images, text=names, image_index=index, return_tensors="pt").data
        inputs["objects"] = pad_rows(objects)
        return inputs

    def questions(self, row: Mapping[str, Any]) -> list[tuple[str, Sequence[Sequence[float]]]]:
        """What a row is asked for, each with its points in pixels."""
        absent = [(row["absent"], [])] if "absent" in row and self.categories_per_image > 1 else []
        present = [(row["category"], row["points"])]
        present += zip(row.get("others_names", ()), row.get("others_points", ()), strict=True)
        return present[: self.categories_per_image - len(absent)] + absent


def draw_trajectories(
    objects: torch.Tensor, mode: str, steps_per_image: int, jitter: float, double_points: float, ask_done: bool
) -> dict[str, torch.Tensor]:
    """Counts in progress, to learn from: in what order objects were counted, how well they were hit, and when to ask.

    Args:
        objects: `(rows, objects, 2)`, negative for padding.
        mode, steps_per_image, jitter, double_points: as in `CountTrainingArguments`.
        ask_done: of the alternating mode: whether this batch asks "done?", or "where?".

    Returns:
        `points`, `point_objects`, `steps` and `done_log_odds`, as the model takes them.
    """
    rows = len(objects)
    numbers = (objects[..., 0] >= 0).sum(1).tolist()
    points, owners, steps, log_odds = [], [], [], []
    finished = torch.randperm(rows) % 2 == 0
    for row, number in enumerate(numbers):
        order = torch.randperm(number)
        again = order[torch.rand(number) < double_points]
        for owner in again.tolist():  # somewhere after the first time
            place = int((order == owner).nonzero()[0, 0])
            place += 1 + int(torch.randint(len(order) - place, ()))
            order = torch.cat((order[:place], torch.tensor([owner]), order[place:]))
        counted = len(order)
        owners.append(order)
        moved = objects[row, order] + jitter * torch.randn(counted, 2, device=objects.device)
        points.append(moved.clamp(0.0, 1.0))
        if mode == "trajectory":
            chosen = torch.arange(counted + 1)
            if counted >= steps_per_image:
                chosen = torch.cat((torch.randperm(counted)[: steps_per_image - 1].sort().values, chosen[-1:]))
            # "Done" is one step of those chosen, and one of those there are.
            log_odds.append(math.log(counted / (len(chosen) - 1)) if counted else 0.0)
        elif ask_done:
            chosen = torch.tensor([counted if finished[row] or not counted else int(torch.randint(counted, ()))])
            log_odds.append(math.log(counted) if counted else 0.0)
        else:
            chosen = torch.tensor([int(torch.randint(counted, ())) if counted else 0])
            log_odds.append(0.0)
        steps.append(chosen)
    return {
        "points": pad_rows(points),
        "point_objects": pad_rows(owners).to(objects.device),
        "steps": pad_rows(steps).to(objects.device),
        "done_log_odds": torch.tensor(log_odds, device=objects.device),
    }


class AlternatingCountTrainer(RegardTrainer):
    """Trainer of `SequentialAttentionCountingModel`; evaluation counts to the end.

    `processing_class` is a `SequentialAttentionCountingProcessor`. Metrics: `mae`, `exact_match`, and both by range of
    counts; `location_error_share`; of the steps along the true objects `done_accuracy`, `false_stop_rate` and
    `missed_stop_rate`; and each loss.
    """

    args: CountTrainingArguments
    processing_class: SequentialAttentionCountingProcessor

    def __init__(
        self, model, args: CountTrainingArguments, processing_class: SequentialAttentionCountingProcessor, **kwargs
    ):
        kwargs.setdefault("data_collator", CountCollator(processing_class, args.categories_per_image))
        kwargs.setdefault("compute_metrics", score)
        super().__init__(model=model, args=args, processing_class=processing_class, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None):
        # One category an image, so that processes have alike many rows to gather.
        collator, self.data_collator = self.data_collator, CountCollator(self.processing_class, categories_per_image=1)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    @property
    def asks_done(self) -> bool:
        """Of the alternating mode: whether this step asks "done?", or "where?"."""
        return self.state.global_step % 2 == 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            inputs = inputs | draw_trajectories(
                inputs["objects"],
                self.args.mode,
                self.args.steps_per_image,
                self.args.point_jitter,
                self.args.double_points,
                self.asks_done,
            )
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def total_loss(self, losses):
        if self.model.training and self.args.mode == "alternating":
            asked = ("loss_done", "loss_count") if self.asks_done else ("loss_where", "loss_x", "loss_y")
            # So that every parameter has a gradient, as DDP expects.
            losses = {name: value if name in asked else 0.0 * value for name, value in losses.items()}
        return super().total_loss(losses)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss; points found `(rows, points, 2)`, estimates `(rows,)`, "no more" at each true step `(rows, steps)`; and
        objects `(rows, objects, 2)`. Padded by -100."""
        inputs = self._prepare_inputs(inputs)
        objects = inputs["objects"]
        numbers = (objects[..., 0] >= 0).sum(1)
        order = torch.arange(objects.shape[1], device=objects.device).expand(len(objects), -1)
        steps = torch.arange(objects.shape[1] + 1, device=objects.device).expand(len(objects), -1)
        if self.accelerator.unwrap_model(model).config.marking == "image":
            steps = numbers[:, None]
        truth = {
            "points": objects,
            "point_objects": order.masked_fill(order >= numbers[:, None], -1),
            "steps": steps.masked_fill(steps > numbers[:, None], -1),
        }
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs | truth, return_outputs=True)
            if prediction_loss_only:
                return loss.detach(), None, None
            given = {name: value for name, value in inputs.items() if name != "objects"}
            counts = self.accelerator.unwrap_model(model).count(**given)
        found = [result.points.to(objects.device) for result in counts]
        points = torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=PADDING)
        done = outputs.done.float().masked_fill(truth["steps"] < 0, PADDING)
        return (
            loss.detach(),
            (points, outputs.count_estimate.float(), done),
            objects.masked_fill(objects < 0, PADDING),
        )

    def log_pictures(self, writer, dataset, prefix: str) -> None:
        model = self.accelerator.unwrap_model(self.model)
        for index in range(min(self.args.logged_counts, len(dataset))):
            row = dataset[index]
            image = open_stored(row["pixel_values"]).convert("RGB")
            inputs = self.processing_class(images=image, text=row["category"], return_tensors="pt").to(self.args.device)
            with self.accelerator.autocast():
                counted = model.count(**inputs)
            result = self.processing_class.post_process(counted, [(image.height, image.width)])[0]
            picture = draw_count(image, result | {"category": row["category"]}, truth=len(row["points"]))
            writer.add_image(f"{prefix}/{index}", np.asarray(picture), self.state.global_step, dataformats="HWC")


def score(prediction: EvalPrediction) -> dict[str, float]:
    """Scores of counts and points, and of the decision at each step along the true objects."""
    points, estimates, done = (np.asarray(array) for array in prediction.predictions)
    objects = np.asarray(prediction.label_ids)
    found, true = ([row[row[:, 0] >= 0] for row in array] for array in (points, objects))
    sizes = np.ones((len(true), 2))
    scores = score_counts(found, true, sizes, max_distance=MAX_DISTANCE, count_estimates=estimates)
    names = ("mae", "exact_match", "location_error_share", "estimate_difference")
    metrics = {name: scores[name] for name in names if name in scores}
    for counts, part in scores["by_range"].items():
        metrics |= {f"{name}_{counts}": part[name] for name in ("mae", "exact_match")}
    empty = [not len(row) for row in true]
    if any(empty):
        metrics["absent_accuracy"] = float(
            np.mean([not len(row) for row, none in zip(found, empty, strict=True) if none])
        )
    asked = done >= 0
    numbers = np.array([len(row) for row in true])
    is_done = np.arange(done.shape[1]) == numbers[:, None] if done.shape[1] > 1 else np.ones_like(asked)
    return metrics | score_stopping(done[asked], is_done[asked])


__all__ = [
    "AlternatingCountTrainer",
    "CountCollator",
    "CountTrainingArguments",
    "draw_trajectories",
    "score",
]
