"""AlternatingCountTrainer: what is learned from, the prior of "done", both modes, resuming, pictures, training."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel, AutoProcessor, Qwen2VLImageProcessorPil, TrainerCallback

from regard.configuration.configuration_sequential_attention_counting import SequentialAttentionCountingConfig
from regard.modeling.modeling_sequential_attention_counting import SequentialAttentionCountingModel
from regard.processing.processing_sequential_attention_counting import (
    STEP_TOKENS,
    VISION_TOKENS,
    SequentialAttentionCountingProcessor,
)
from regard.processing.tokenization_byte import build_byte_tokenizer
from regard.train import main, parse_settings
from regard.trainers.trainer_sequential_attention_counting import (
    AlternatingCountTrainer,
    CountCollator,
    CountTrainingArguments,
    draw_trajectories,
)

LOSSES = {"loss_done", "loss_where", "loss_x", "loss_y", "loss_count"}


def make_rows(images: int) -> list[dict[str, Any]]:
    """Up to three red squares and a blue one, in other places each time."""
    rows = []
    for number in range(images):
        image = Image.new("RGB", (32, 32), "white")
        draw = ImageDraw.Draw(image)
        cells = [(5 * number + 7 * place) % 16 for place in range(number % 4 + 1)]
        points = [[8 * (cell % 4) + 4.0, 8 * (cell // 4) + 4.0] for cell in cells]
        for place, (x, y) in enumerate(points):
            draw.rectangle((x - 3, y - 3, x + 2, y + 2), fill="red" if place else "blue")
        rows.append(
            {"pixel_values": image, "image_id": str(number), "category": "red", "count": len(points) - 1,
             "points": points[1:], "others": ["blue"], "others_names": ["blue"], "others_points": [points[:1]],
             "absent": "green"}
        )  # fmt: skip
    return rows


def make_processor() -> SequentialAttentionCountingProcessor:
    images = Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64})
    return SequentialAttentionCountingProcessor(images, build_byte_tokenizer(reserved=[*VISION_TOKENS, *STEP_TOKENS]))


def make_trainer(folder: Path, config: dict[str, Any] | None = None, **arguments) -> Any:
    torch.manual_seed(0)
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
    }
    model = SequentialAttentionCountingModel(SequentialAttentionCountingConfig.from_preset("micro", **(config or {})))
    return AlternatingCountTrainer(
        model,
        CountTrainingArguments(**{**defaults, **arguments}),
        make_processor(),
        train_dataset=make_rows(8),
        eval_dataset=make_rows(4),
    )


def test_an_image_is_asked_for_what_is_there_and_what_is_not():
    rows = make_rows(3)
    inputs = CountCollator(make_processor(), categories_per_image=3)(rows)
    assert inputs["image_index"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    numbers = (inputs["objects"][..., 0] >= 0).sum(1)
    assert numbers.tolist() == [0, 1, 0, 1, 1, 0, 2, 1, 0]
    torch.testing.assert_close(inputs["objects"][6, :2] * 32, torch.tensor(rows[2]["points"]))
    collate = CountCollator(make_processor(), categories_per_image=2)
    assert [name for name, _ in collate.questions(rows[0])] == ["red", "green"]
    assert [name for name, _ in CountCollator(make_processor(), 1).questions(rows[0])] == ["red"]
    own = {"pixel_values": rows[2]["pixel_values"], "category": "red", "points": rows[2]["points"]}
    assert collate.questions(own) == [("red", rows[2]["points"])]


# Trajectories.


def objects_of(*numbers: int) -> torch.Tensor:
    here = torch.arange(max(numbers)) < torch.tensor(numbers)[:, None]
    return torch.rand(len(numbers), max(numbers), 2).masked_fill(~here[..., None], -1.0)


def test_trajectories_count_everything_in_any_order():
    torch.manual_seed(0)
    objects = objects_of(4, 0, 1)
    orders = set()
    for _ in range(99):
        drawn = draw_trajectories(objects, "trajectory", 16, 0.0, 0.0, True)
        for row, number in enumerate((4, 0, 1)):
            order = drawn["point_objects"][row, :number].tolist()
            assert sorted(order) == list(range(number))
            torch.testing.assert_close(drawn["points"][row, :number], objects[row, order])
            assert drawn["steps"][row, : number + 1].tolist() == list(range(number + 1))
        assert (drawn["points"][1] == -1).all()
        assert (drawn["steps"][2, 2:] == -1).all()
        assert (drawn["point_objects"][2, 1:] == -1).all()
        orders.add(tuple(drawn["point_objects"][0].tolist()))
    assert len(orders) > 20  # of 24
    assert drawn["done_log_odds"].tolist() == [0.0] * 3  # every step is there


def test_points_are_moved_and_some_are_counted_twice():
    torch.manual_seed(0)
    objects = objects_of(*[20] * 50)
    drawn = draw_trajectories(objects, "trajectory", 99, 0.01, 0.1, True)
    owners, doubles = drawn["point_objects"], 0
    for row in range(50):
        order = owners[row][owners[row] >= 0].tolist()
        assert set(order) == set(range(20))
        doubles += len(order) - 20
        assert max(order.count(owner) for owner in order) <= 2
        assert drawn["steps"][row].max() == len(order)
        moved = drawn["points"][row, : len(order)] - objects[row, order]
        assert 0 < moved.abs().max() < 0.06
    assert doubles / 1000 == pytest.approx(0.1, abs=0.03)
    assert ((drawn["points"] >= 0) & (drawn["points"] <= 1)).sum() == 2 * (owners >= 0).sum()


@pytest.mark.parametrize(("mode", "number"), [("trajectory", 30), ("trajectory", 5), ("alternating", 12)])
def test_done_log_odds_are_those_of_the_sampling(mode, number):
    """Among the steps that are drawn "done" is more frequent than among those there are: by how much, counted."""
    torch.manual_seed(0)
    drawn = draw_trajectories(objects_of(*[number] * 4000), mode, 8, 0.0, 0.0, True)
    steps = drawn["steps"]
    done, going = int((steps == number).sum()), int(((steps >= 0) & (steps < number)).sum())
    sampled = math.log(done / going)
    true = math.log(1 / number)
    assert drawn["done_log_odds"].mean().item() == pytest.approx(sampled - true, abs=0.05)
    assert (steps == number).any(1).float().mean() == pytest.approx(1 if mode == "trajectory" else 0.5, abs=0.02)


def test_few_steps_are_drawn_evenly_and_the_last_always():
    torch.manual_seed(0)
    steps = draw_trajectories(objects_of(*[20] * 2000), "trajectory", 6, 0.0, 0.0, True)["steps"]
    assert steps.shape == (2000, 6)
    assert (steps[:, -1] == 20).all()
    assert (steps.diff(dim=1) > 0).all()
    share = torch.bincount(steps[:, :-1].flatten(), minlength=20) / 2000
    assert (share - 5 / 20).abs().max() < 0.05


def test_the_alternating_mode_asks_one_thing_of_a_batch():
    torch.manual_seed(0)
    objects = objects_of(*[6, 0, 3] * 40)
    numbers = torch.tensor([6, 0, 3] * 40)
    asked = draw_trajectories(objects, "alternating", 16, 0.0, 0.0, True)["steps"][:, 0]
    finished = asked == numbers
    assert finished[numbers == 0].all()
    assert 0.3 < finished[numbers > 0].float().mean() < 0.7
    where = draw_trajectories(objects, "alternating", 16, 0.0, 0.0, False)
    assert (where["steps"][:, 0] < numbers.clamp(min=1)).all()
    assert where["done_log_odds"].abs().max() == 0


# Training.


@pytest.mark.parametrize("mode", ["trajectory", "alternating"])
def test_where_nothing_is_to_be_counted_every_parameter_has_a_gradient(tmp_path, mode):
    """Otherwise a process with such a batch makes the others wait for ever."""
    trainer = make_trainer(tmp_path, mode=mode)
    rows = [row | {"points": [], "others_names": [], "others_points": []} for row in make_rows(2)]
    inputs = trainer.data_collator(rows)
    assert inputs["objects"].shape == (4, 1, 2)
    trainer.compute_loss(trainer.model.train(), inputs).backward()
    assert [name for name, parameter in trainer.model.named_parameters() if parameter.grad is None] == []


def test_it_learns_to_count_and_to_point(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=60, learning_rate=1e-2, backbone_learning_rate=1e-2)
    trainer.eval_dataset = trainer.train_dataset
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_mae"] < 0.4 < before["eval_mae"]
    assert after["eval_loss"] < before["eval_loss"] / 2
    assert after["eval_done_accuracy"] > 0.85
    assert after["eval_location_error_share"] < 0.05
    assert {f"eval_{name}" for name in LOSSES} | {"eval_absent_accuracy", "eval_false_stop_rate"} <= set(after)
    logged = [entry for entry in trainer.state.log_history if "loss_done" in entry]
    assert all(set(entry) >= LOSSES for entry in logged)


class _Watch(TrainerCallback):
    """Every parameter has a gradient in every step, as DDP expects."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("mode", ["trajectory", "alternating"])
def test_modes_alternate_and_each_has_its_losses(tmp_path, mode):
    trainer = make_trainer(tmp_path, mode=mode, max_steps=4)
    trainer.add_callback(_Watch())
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert [name for name, value in trainer.model.named_parameters() if torch.equal(value, before[name])] == []
    steps = [entry for entry in trainer.state.log_history if "loss_done" in entry]
    assert len(steps) == 4
    for number, step in enumerate(steps):
        done = step["loss_done"] + 0.1 * step["loss_count"]
        where = step["loss_where"] + step["loss_x"] + step["loss_y"]
        expected = done + where if mode == "trajectory" else (done, where)[number % 2]
        assert step["loss"] == pytest.approx(expected, rel=1e-3)


def test_marks_on_the_image_are_trained_one_step_at_a_time(tmp_path):
    trainer = make_trainer(tmp_path, {"marking": "image"}, mode="alternating", max_steps=2)
    trainer.train()
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])
    assert "eval_missed_stop_rate" in metrics


def test_the_backbone_learns_at_a_rate_of_its_own(tmp_path):
    trainer = make_trainer(tmp_path)
    rates = {}
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            rates[names[parameter]] = (group["lr"], group["weight_decay"])
    assert set(rates) == set(names.values())
    assert {rate for name, (rate, _) in rates.items() if name.startswith("vlm.")} == {2e-4}
    assert {rate for name, (rate, _) in rates.items() if not name.startswith("vlm.")} == {1e-3}
    assert (
        rates["step_tokens.weight"][1]
        == rates["look.memory.gate"][1]
        == rates["look.cross_attention.none_token"][1]
        == 0
    )
    assert rates["look.query.0.weight"][1] == 0.05


@pytest.mark.parametrize(("mode", "step"), [("trajectory", 1), ("alternating", 3)])
def test_a_resumed_training_ends_as_one_in_one_go(tmp_path, mode, step):
    settings = {"save_strategy": "steps", "save_steps": step, "save_total_limit": None, "mode": mode}
    whole = make_trainer(tmp_path / "whole", muon_learning_rate=1e-3, **settings)
    whole.train()
    again = make_trainer(tmp_path / "again", muon_learning_rate=1e-3, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_validation_images_are_logged_as_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = make_trainer(
        tmp_path, report_to="tensorboard", max_steps=1, logged_counts=2, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert events.Tags()["images"] == ["eval/0", "eval/1"]
    assert events.Images("eval/0")[0].width >= 560


@pytest.mark.parametrize(("name", "value"), [("mode", "smell"), ("steps_per_image", 1)])
def test_settings_that_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        CountTrainingArguments(output_dir=str(tmp_path), **{name: value})


# The command line.


@pytest.mark.parametrize("dataset", ["emoji", "folder"])
def test_trained_by_the_command_line_and_gone_on_from(tmp_path, dataset, make_image):
    if dataset == "folder":
        for split in ("train", "validation"):
            lines = []
            for number in range(3):
                make_image(tmp_path / "data" / split / f"{number}.png", size=(40, 40))
                line = {"file_name": f"{number}.png", "category": "dots", "points": [[9, 9]] * number}
                lines.append(json.dumps(line))
            (tmp_path / "data" / split / "points.jsonl").write_text("\n".join(lines))
    settings = [
        "--model", "sequential_attention_counting", "--preset", "micro", "--use_cpu", "true", "--max_steps", "1",
        "--dataset", "emoji" if dataset == "emoji" else str(tmp_path / "data"), "--max_objects", "5",
        "--per_device_train_batch_size", "2", "--eval_images", "2", "--eval_strategy", "steps", "--eval_steps", "1",
        "--save_strategy", "steps", "--save_steps", "1", "--report_to", "none",
    ]  # fmt: skip
    assert main([*settings, "--output_dir", str(tmp_path / "run")]) == 0
    model: Any = AutoModel.from_pretrained(tmp_path / "run")
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "run")
    inputs = processor(images=Image.new("RGB", (40, 40), "red"), text="dots", return_tensors="pt")
    assert model.count(**inputs)[0].count <= 5
    more = [*settings, "--init_from", str(tmp_path / "run"), "--output_dir", str(tmp_path / "more")]
    assert main([*more, "--mode", "alternating"]) == 0


def test_the_recipe_is_understood(root):
    path = root / "trainers" / "configs" / "sequential_attention_counting_tiny.yaml"
    recipe, model_args, data_args, _ = parse_settings([str(path)])
    assert recipe.training_arguments is CountTrainingArguments
    assert (model_args.preset, data_args.dataset) == ("tiny", "emoji")
