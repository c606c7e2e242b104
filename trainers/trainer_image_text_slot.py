"""Trains ImageTextSlot: curricula, light augmentation, readings of validation images as pictures."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from transformers.trainer_utils import EvalPrediction

from regard.metrics.text_recognition.text_recognition import score_texts
from regard.processing.processing_image_text_slot import ImageTextSlotProcessor
from regard.trainers.base import RegardTrainer, RegardTrainingArguments
from regard.visualize import draw_reading


@dataclass
class SlotTrainingArguments(RegardTrainingArguments):
    """`TrainingArguments` with the recipe of ImageTextSlot. Defaults that differ from the parent's:

    learning_rate 1e-4, cosine to 3e-5, 10 % warm-up, weight decay 1e-3, betas (0.9, 0.95), batch 64: the described
        recipe. From scratch a higher rate learns faster (see the configuration files).
    remove_unused_columns: the collator makes the tensors from columns that `forward` does not name.
    train_sampling_strategy "sequential": generated data comes shuffled, and its length curriculum goes by index.
        `regard train` shuffles a data set of your own.
    ddp_find_unused_parameters: every parameter gets a gradient in every step.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "The scheduler type to use."})
    lr_scheduler_kwargs: dict | str | None = field(
        default_factory=lambda: {"min_lr_rate": 0.3}, metadata={"help": "Extra parameters of the scheduler."}
    )
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of linear warm-up, or their share if below 1."})
    weight_decay: float = field(default=1e-3, metadata={"help": "Weight decay of matrices."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images a step on each process."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns that `forward` does not name."})
    train_sampling_strategy: str = field(
        default="sequential", metadata={"help": "Order of the training samples: sequential, or random."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for parameters without a gradient in every step."}
    )
    slot_curriculum_steps: int = field(
        default=0, metadata={"help": "For this many steps only the first half of the slots learn; 0: never."}
    )
    count_warmup_steps: int = field(
        default=0, metadata={"help": "The counter's weight grows from half to all of it over this many steps."}
    )
    teacher_forcing_steps: int = field(
        default=0, metadata={"help": "For this many steps all slots are told the true places of their characters."}
    )
    training_slots: int | None = field(
        default=None, metadata={"help": "Slots computed of each text, from a random one on; default: all."}
    )
    crop_batches: float = field(
        default=0.0,
        metadata={"help": "In this share of batches images are cut to the parts with ink, if the model reads such."},
    )
    augment_shift: float = field(default=0.0, metadata={"help": "Largest shift, as a share of the side, e.g. 0.02."})
    augment_blur: float = field(default=0.0, metadata={"help": "Largest share of the neighbours' light, e.g. 0.3."})
    augment_brightness: float = field(default=0.0, metadata={"help": "Largest change, of the full range, e.g. 0.1."})
    augment_contrast: float = field(default=0.0, metadata={"help": "Largest change as a factor, e.g. 0.2."})
    logged_readings: int = field(default=4, metadata={"help": "Validation images logged as pictures."})


class SlotCollator:
    """Rows `{"pixel_values": image, "text": str, "boxes": ...}` to the inputs of `ImageTextSlotModel.forward`.

    Args:
        processor: prepares images and texts.
        margin: slots after the end of the longest text, so that it is read as the others are.
        num_slots: most slots; as many as the tokenizer allows, if None.
    """

    def __init__(self, processor: ImageTextSlotProcessor, margin: int = 0, num_slots: int | None = None):
        self.processor = processor
        self.margin = margin
        self.num_slots = num_slots or processor.tokenizer.model_max_length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        inputs = self.processor(
            images=[row["pixel_values"] for row in rows],
            text=[row["text"] for row in rows],
            boxes=[row.get("boxes") for row in rows],
            return_tensors="pt",
        ).data
        margin = max(0, min(self.margin, self.num_slots - inputs["labels"].shape[1]))
        for name, padding in (("labels", -100), ("attention_mask", 0)):
            inputs[name] = pad(inputs[name], (0, margin), value=padding)
        inputs["character_positions"] = pad(inputs["character_positions"], (0, 0, 0, margin), value=-1.0)
        return inputs


def augment(
    pixel_values: torch.Tensor,
    character_positions: torch.Tensor,
    shift: float = 0.0,
    blur: float = 0.0,
    brightness: float = 0.0,
    contrast: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift, blur, brighten and stretch each image by random amounts; the characters move with it.

    Args:
        pixel_values: normalised images `(batch, 1, height, width)`.
        character_positions: `(batch, tokens, 3)`, shares of the image's sides, -1 where unknown.
        shift, blur, brightness, contrast: largest amounts, as in `SlotTrainingArguments`; 0 switches one off.

    Returns:
        the two, changed; what comes in from beyond an edge repeats the edge.
    """
    batch, _, height, width = pixel_values.shape

    def uniform(amount: float) -> torch.Tensor:
        return (torch.rand(batch, 1, 1, 1, device=pixel_values.device) * 2 - 1) * amount

    if shift:
        down, right = (uniform(shift * height)).round().long(), (uniform(shift * width)).round().long()
        rows = (torch.arange(height, device=down.device)[None, None, :, None] - down).clamp(0, height - 1)
        columns = (torch.arange(width, device=down.device)[None, None, None, :] - right).clamp(0, width - 1)
        pixel_values = pixel_values[torch.arange(batch, device=down.device)[:, None, None, None], 0, rows, columns]
        moved = torch.cat((right / width, down / height, down / height), dim=3)[:, 0]  # (batch, 1, 3)
        known = character_positions[..., :1] >= 0
        character_positions = torch.where(known, (character_positions + moved).clamp(0, 1), character_positions)
    if blur:
        padded = torch.nn.functional.pad(pixel_values, (1, 1, 1, 1), mode="replicate")
        neighbours = torch.nn.functional.avg_pool2d(padded, 3, stride=1)
        pixel_values = torch.lerp(pixel_values, neighbours, uniform(blur).abs())
    if contrast:
        mean = pixel_values.mean((2, 3), keepdim=True)
        pixel_values = mean + (pixel_values - mean) * (1 + uniform(contrast))
    if brightness:
        pixel_values = pixel_values + uniform(brightness) / 0.3034  # in standard deviations, as the values are
    return pixel_values, character_positions


class SlotTrainer(RegardTrainer):
    """Trainer of `ImageTextSlotModel`; evaluation reads the images and scores the texts.

    `processing_class` is an `ImageTextSlotProcessor`. Metrics by evaluation set: `character_accuracy`, `cer`,
    `exact_match`, `count_mae`, and each loss.
    """

    args: SlotTrainingArguments
    processing_class: ImageTextSlotProcessor

    def __init__(self, model, args: SlotTrainingArguments, processing_class: ImageTextSlotProcessor, **kwargs):
        margin = model.config.pad_slots + model.config.slot_config.reach
        kwargs.setdefault("data_collator", SlotCollator(processing_class, margin, model.config.num_slots))
        kwargs.setdefault("compute_metrics", self.score)
        super().__init__(model=model, args=args, processing_class=processing_class, **kwargs)
        if not self.is_fsdp_enabled:  # which takes contiguous weights only
            self.model.to(memory_format=torch.channels_last)
        config = self.accelerator.unwrap_model(self.model).config
        self._count_weight, self._teacher_forcing = config.counter_config.loss_weight, config.teacher_forcing

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            self._set_curriculum()
            inputs = dict(inputs)
            inputs["pixel_values"], inputs["character_positions"] = augment(
                inputs["pixel_values"],
                inputs["character_positions"],
                self.args.augment_shift,
                self.args.augment_blur,
                self.args.augment_brightness,
                self.args.augment_contrast,
            )
            # The same in all processes: the slowest sets the pace.
            if random.Random(f"{self.args.seed}/{self.state.global_step}").random() < self.args.crop_batches:
                inputs["part"] = self.accelerator.unwrap_model(model).random_parts(inputs["pixel_values"])
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _set_curriculum(self) -> None:
        model = self.accelerator.unwrap_model(self.model)
        config, step = model.config, self.state.global_step
        config.training_slots = self.args.training_slots
        model.slot_limit = config.num_slots // 2 if step < self.args.slot_curriculum_steps else None
        grown = min(1.0, step / self.args.count_warmup_steps) if self.args.count_warmup_steps else 1.0
        config.counter_config.loss_weight = self._count_weight * (0.5 + 0.5 * grown)
        config.teacher_forcing = 1.0 if step < self.args.teacher_forcing_steps else self._teacher_forcing

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        config = self.accelerator.unwrap_model(self.model).config
        config.counter_config.loss_weight, config.teacher_forcing = self._count_weight, self._teacher_forcing
        config.training_slots = None
        super().save_model(output_dir, _internal_call)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss, (token ids `(batch, num_slots)` padded with -100, counts `(batch, 1)`) and labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).detach()
            if prediction_loss_only:
                return loss, None, None
            reader = self.accelerator.unwrap_model(model)
            with self.accelerator.autocast():
                # Whole images: where weights are sharded, all processes must call the encoder equally often.
                reading = reader.read(inputs["pixel_values"], crop=False)
        sequences = torch.nn.utils.rnn.pad_sequence(reading.sequences, batch_first=True, padding_value=-100)
        return loss, (sequences, reading.count_pred), inputs["labels"]

    def score(self, prediction: EvalPrediction) -> dict[str, float]:
        """Scores of token ids and counts against labels."""
        sequences, counts = (np.asarray(array) for array in prediction.predictions)
        labels = np.asarray(prediction.label_ids)
        scores = score_texts(self._texts(sequences), self._texts(labels), (counts[:, 0] - 2).tolist())
        del scores["images"]
        return scores

    def _texts(self, sequences: np.ndarray) -> list[str]:
        decode = self.processing_class.tokenizer.decode
        return [decode(row[row >= 0].tolist(), skip_special_tokens=True) for row in sequences]

    @torch.no_grad()
    def log_pictures(self, writer, dataset, prefix: str) -> None:
        if not self.args.logged_readings:
            return
        images = [dataset[i]["pixel_values"] for i in range(min(self.args.logged_readings, len(dataset)))]
        model = self.accelerator.unwrap_model(self.model)
        inputs = self.processing_class(images=images, return_tensors="pt").to(self.args.device)
        with self.accelerator.autocast():
            reading = model.read(inputs["pixel_values"])
        readings = self.processing_class.post_process(reading, [(image.height, image.width) for image in images])
        for index, (image, read) in enumerate(zip(images, readings, strict=True)):
            picture = np.asarray(draw_reading(image, read).convert("RGB"))
            writer.add_image(f"{prefix}/{index}", picture, self.state.global_step, dataformats="HWC")


__all__ = ["SlotCollator", "SlotTrainer", "SlotTrainingArguments", "augment"]
