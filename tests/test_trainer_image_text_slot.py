"""SlotTrainer: what decays, what is logged, curricula, augmentation, resuming."""

import json
from typing import Any, cast

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from regard.configuration.configuration_image_text_slot import PRESETS, ImageTextSlotConfig
from regard.modeling.modeling_image_text_slot import ImageTextSlotModel
from regard.processing.image_processing_image_text_slot import ImageTextSlotImageProcessor
from regard.processing.processing_image_text_slot import ImageTextSlotProcessor
from regard.processing.tokenization_byte import build_byte_tokenizer
from regard.trainers.trainer_image_text_slot import SlotTrainer, SlotTrainingArguments, augment


def row(text: str) -> dict:
    """A text on white, drawn letter by letter, with the letters' boxes."""
    image = Image.new("L", (128, 128), 255)
    font = ImageFont.load_default(14)
    boxes, x = [], 6.0
    for character in text:
        width = font.getlength(character)
        ImageDraw.Draw(image).text((x, 20), character, fill=0, font=font)
        boxes.append([x, 20, x + width, 38])
        x += width
    return {"pixel_values": image, "text": text, "boxes": boxes}


ROWS = [row(text) for text in ("one", "two", "three", "four", "five", "six", "seven", "eight")]


def make_trainer(tmp_path, rows=ROWS, model_changes=None, **arguments) -> SlotTrainer:
    torch.manual_seed(0)
    model = ImageTextSlotModel(ImageTextSlotConfig.from_preset("tiny", **(model_changes or {})))
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    processor = ImageTextSlotProcessor(ImageTextSlotImageProcessor(), build_byte_tokenizer())
    arguments = SlotTrainingArguments(**{**defaults, **arguments})
    return SlotTrainer(model, arguments, processor, train_dataset=rows, eval_dataset=rows[:3])


def test_matrices_decay_and_nothing_else(tmp_path):
    trainer = make_trainer(tmp_path)
    names = trainer.get_decay_parameter_names(trainer.accelerator.unwrap_model(trainer.model))
    assert "classifier.weight" in names
    assert "encoder.stages.0.0.conv.weight" in names
    for name in ("slots", "boundaries", "classifier.bias", "encoder.stages.0.0.layer_scale", "memory_norm.weight"):
        assert name not in names
    optimizer = trainer.create_optimizer()
    decayed = sum(p.numel() for g in optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"])
    parameters = dict(trainer.model.named_parameters())
    assert decayed == sum(parameters[name].numel() for name in names)
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in parameters.values()
    )


def test_parts_of_the_loss_are_logged(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 4
    config = ImageTextSlotConfig.from_preset("tiny")
    for entry in logs:
        whole = (
            entry["loss_ce"]
            + config.counter_config.loss_weight * entry["loss_count"]
            + config.cell_loss_weight * entry["loss_cells"]
            + config.line_loss_weight * entry["loss_lines"]
            + config.character_loss_weight * entry["loss_characters"]
        )
        assert entry["loss"] == pytest.approx(whole, rel=1e-3)


def test_evaluation_scores_texts_and_losses(tmp_path):
    metrics = make_trainer(tmp_path).evaluate()
    for name in ("character_accuracy", "cer", "exact_match", "count_mae", "loss", "loss_ce", "loss_count"):
        assert f"eval_{name}" in metrics
    assert metrics["eval_count_mae"] > 0
    assert "eval_images" not in metrics


def test_a_few_words_are_learned(tmp_path):
    trainer = make_trainer(
        tmp_path,
        rows=ROWS[:2],
        max_steps=150,
        learning_rate=5e-3,
        logging_steps=50,
        warmup_steps=10,
        augment_shift=0.01,
    )
    trainer.eval_dataset = ROWS[:2]
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] / 3
    assert after["eval_character_accuracy"] > before["eval_character_accuracy"]


def test_resuming_equals_never_stopping(tmp_path):
    arguments = {"augment_shift": 0.02, "augment_brightness": 0.1, "save_steps": 2, "save_strategy": "steps"}
    whole = make_trainer(tmp_path / "whole", **arguments)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for (name, first), second in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(first, second), name


def test_accumulated_steps_are_the_mean_of_their_batches(tmp_path):
    """Two batches of two, accumulated, move the weights as far as the mean of their gradients says."""
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, max_steps=1, max_grad_norm=0.0)
    collected = []

    def keep_gradients(*_args, **_kwargs):
        collected.append(trainer.model.classifier.weight.grad.clone())

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep_gradients)
    trainer.train()
    reference = make_trainer(tmp_path).model.train()
    for batch in (ROWS[:2], ROWS[2:4]):
        (reference(**trainer.data_collator(batch)).loss / 2).backward()
    torch.testing.assert_close(collected[0], reference.classifier.weight.grad, rtol=1e-3, atol=1e-5)


def test_checkpointed_activations_and_bfloat16_train(tmp_path):
    trainer = make_trainer(tmp_path, activation_checkpointing=True, bf16=True, max_steps=2)
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert trainer.model.is_activation_checkpointing


def test_curricula_grow_and_are_undone_when_saved(tmp_path):
    trainer = make_trainer(tmp_path, count_warmup_steps=4, teacher_forcing_steps=2, training_slots=3)
    config: Any = trainer.model.config
    seen = []
    for step in (0, 1, 2, 4, 9):
        trainer.state.global_step = step
        trainer._set_curriculum()
        seen.append((round(config.counter_config.loss_weight, 4), config.teacher_forcing))
    assert seen == [(0.05, 1.0), (0.0625, 1.0), (0.075, 0.5), (0.1, 0.5), (0.1, 0.5)]
    trainer.state.global_step = 0
    trainer._set_curriculum()
    trainer.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["counter_config"]["loss_weight"] == 0.1
    assert saved["teacher_forcing"] == 0.5
    assert saved["training_slots"] is None  # another trainer is not to learn from windows unasked


def test_without_curricula_nothing_changes(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer._set_curriculum()
    assert trainer.model.config.counter_config.loss_weight == 0.1
    assert trainer.model.config.teacher_forcing == 0.5


@pytest.mark.parametrize("training_slots", [None, 3])
def test_a_window_of_slots_trains(tmp_path, training_slots):
    trainer = make_trainer(tmp_path, training_slots=training_slots)
    inputs = trainer.data_collator([row("a word")])
    _, outputs = trainer.compute_loss(trainer.model.train(), inputs, return_outputs=True)
    assert trainer.model.config.training_slots == training_slots
    margin = 4 + 2 * 2  # slots after the end learn to be empty, and those beyond are felt: two neighbours, twice
    assert outputs.logits.shape[1] == (training_slots or len("a word") + 2 + margin)


@pytest.mark.parametrize("crop_margin", [6, None])
@pytest.mark.parametrize("crop_batches", [0.0, 1.0])
def test_batches_are_cut_to_their_ink(tmp_path, crop_batches, crop_margin):
    encoder = {**PRESETS["tiny"]["encoder_config"], "crop_margin": crop_margin}
    trainer = make_trainer(tmp_path, crop_batches=crop_batches, model_changes={"encoder_config": encoder})
    sizes, model = [], cast(Any, trainer.model)
    model.encoder.entries[0].register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[2:]))
    trainer.train()
    assert len(sizes) == 4
    for height, width in sizes:  # a short word in the upper left
        assert height < 64 if crop_batches and crop_margin else height == 128
        assert width < 128 if crop_batches and crop_margin else width == 128
    sizes.clear()
    trainer.evaluate()
    assert set(sizes) == {(128, 128)}  # the losses and the readings of evaluation are those of whole images


def test_padding_of_a_batch_changes_no_loss(tmp_path):
    """So that texts learn alike, whichever process has the longest one."""
    trainer = make_trainer(tmp_path)
    rows = [row("it"), row("a longer text")]
    model = trainer.model.eval()
    alone, longer, both = (model(**trainer.data_collator(part)) for part in (rows[:1], rows[1:], rows))
    for name, number in both.num_items.items():
        parts = [(part[name] * part.num_items[name], part.num_items[name]) for part in (alone, longer)]
        assert number.item() == pytest.approx(sum(count for _, count in parts).item()), name
        torch.testing.assert_close(both[name] * number, sum(total for total, _ in parts), rtol=1e-4, atol=1e-5)
    assert trainer.data_collator([row("x" * 62)])["labels"].shape[1] == 64  # the model has no more slots


def test_slots_grow_while_the_counter_learns_all(tmp_path):
    """`tiny` has 64 slots; while the curriculum lasts only half of them learn."""
    outputs = []
    for steps in (0, 5):
        trainer = make_trainer(tmp_path, slot_curriculum_steps=steps)
        inputs = trainer.data_collator([row("x" * 40)])
        trainer._teacher_forcing = 1.0
        outputs.append(trainer.compute_loss(trainer.model.train(), inputs, return_outputs=True)[1])
    whole, half = outputs
    assert whole.logits.shape[1] == 42 + 4 + 2 * 2
    assert half.logits.shape[1] == 32
    torch.testing.assert_close(half.loss_count, whole.loss_count)
    torch.testing.assert_close(half.loss_cells, whole.loss_cells)
    assert half.num_items["loss_ce"] < whole.num_items["loss_ce"]
    assert trainer.model.eval()(**inputs).logits.shape[1] == 42 + 4 + 2 * 2


def test_augmentation_moves_characters_with_the_image():
    torch.manual_seed(0)
    images = torch.zeros(6, 1, 64, 64)
    images[:, 0, 30, 20] = 1.0
    positions = torch.full((6, 3, 3), -1.0)
    positions[:, 1] = torch.tensor([20.5 / 64, 30.5 / 64, 30.5 / 64])
    moved, places = augment(images, positions, shift=0.1)
    for image, place in zip(moved, places, strict=True):
        down, right = divmod(int(image[0].flatten().argmax()), 64)
        assert place[1].tolist() == pytest.approx([(right + 0.5) / 64, (down + 0.5) / 64, (down + 0.5) / 64])
        assert (place[[0, 2]] == -1).all()
    assert not torch.equal(moved, images)


def test_augmentation_of_light():
    torch.manual_seed(0)
    images = torch.rand(4, 1, 32, 32)
    positions = torch.full((4, 2, 3), 0.5)
    same, places = augment(images, positions)
    assert torch.equal(same, images)
    assert torch.equal(places, positions)
    blurred, _ = augment(images, positions, blur=0.5)
    assert (blurred.std((1, 2, 3)) < images.std((1, 2, 3))).all()
    brighter, _ = augment(images, positions, brightness=0.1)
    change = (brighter - images).flatten(1)
    assert (change.std(1) < 1e-6).all()
    assert 0 < change.abs().max() <= 0.1 / 0.3034
    stretched, _ = augment(images, positions, contrast=0.2)
    torch.testing.assert_close(stretched.mean((1, 2, 3)), images.mean((1, 2, 3)))
    ratio = stretched.std((1, 2, 3)) / images.std((1, 2, 3))
    assert ((ratio - 1).abs() <= 0.2 + 1e-5).all()
    assert ((ratio - 1).abs() > 0).all()


@pytest.mark.parametrize("logged_readings", [0, 2])
def test_readings_are_logged_as_pictures(tmp_path, monkeypatch, logged_readings):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    trainer = make_trainer(
        tmp_path,
        report_to="tensorboard",
        eval_strategy="steps",
        eval_steps=2,
        max_steps=2,
        logged_readings=logged_readings,
    )
    trainer.train()
    events = EventAccumulator(str(tmp_path / "runs"), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == [f"eval/{index}" for index in range(logged_readings)]


def test_rows_without_boxes_train(tmp_path):
    rows = [{"pixel_values": r["pixel_values"], "text": r["text"]} for r in ROWS]
    trainer = make_trainer(tmp_path, rows=rows, max_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert "loss_ce" in logs[0]
