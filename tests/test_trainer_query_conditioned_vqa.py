"""VQATrainer: one image for its questions, boxes as targets, encoders frozen by plan, resuming, `regard train`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoModel, AutoProcessor, TrainerCallback

from regard.configuration.configuration_query_conditioned_vqa import QueryConditionedVQAConfig
from regard.modeling.modeling_query_conditioned_vqa import QueryConditionedVQAModel
from regard.processing.image_processing_qavit import QAViTImageProcessor
from regard.processing.processing_query_conditioned_vqa import QueryConditionedVQAProcessor
from regard.processing.tokenization_question import train_question_tokenizer
from regard.train import SettingsError, main, parse_settings
from regard.trainers.trainer_query_conditioned_vqa import (
    ImageGroupSampler,
    VQACollator,
    VQATrainer,
    VQATrainingArguments,
    grid_of,
    group_by_image,
    move_maps,
    parse_frozen,
)

ANSWERS = ("red", "blue", "left", "right")
QUESTIONS = ("what color is the square?", "on which side is the square?")


def make_rows(images: int) -> list[dict]:
    """A square in one half of each image, two questions about it, and its box."""
    rows = []
    for number in range(images):
        color, side = number % 2, number // 2 % 2
        image = Image.new("RGB", (40, 20), "white")
        box = (22, 5, 32, 15) if side else (8, 5, 18, 15)
        ImageDraw.Draw(image).rectangle(box, fill=ANSWERS[color])
        for question, answer in zip(QUESTIONS, (ANSWERS[color], ANSWERS[2 + side]), strict=True):
            rows.append(
                {"pixel_values": image, "image_id": str(number), "question": question, "answers": [answer],
                 "question_type": "", "boxes": [list(box)]}
            )  # fmt: skip
    return rows


def make_processor() -> QueryConditionedVQAProcessor:
    return QueryConditionedVQAProcessor(QAViTImageProcessor(size=20), train_question_tokenizer(QUESTIONS, 80))


def make_trainer(folder: Path, rows=None, **arguments) -> Any:
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(ANSWERS)), "label2id": {name: i for i, name in enumerate(ANSWERS)}}
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return VQATrainer(
        QueryConditionedVQAModel(QueryConditionedVQAConfig.from_preset("micro", **labels)),
        VQATrainingArguments(**{**defaults, **arguments}),
        make_processor(),
        train_dataset=make_rows(8) if rows is None else rows,
        eval_dataset=make_rows(4),
    )


def test_a_batch_shows_an_image_once_and_where_to_look():
    rows = make_rows(3)
    batch = VQACollator(make_processor(), {name: i for i, name in enumerate(ANSWERS)}, (5, 5))(rows)
    assert batch["pixel_values"].shape == (3, 3, 20, 20)
    assert batch["image_index"].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch["labels"].argmax(1).tolist() == [0, 2, 1, 2, 0, 3]
    targets = batch["relevance_targets"].unflatten(1, (5, 5))
    torch.testing.assert_close(targets.sum((1, 2)), torch.ones(6))
    assert targets[0, :, 3:].sum() == 0  # a box on the left
    assert targets[4, :, :2].sum() == 0
    for row, other in zip(rows, reversed(rows), strict=True):
        row["first_boxes"] = other["boxes"]
    both = VQACollator(make_processor(), {name: i for i, name in enumerate(ANSWERS)}, (5, 5))(rows)["relevance_targets"]
    assert torch.equal(both[:, 1], targets.flatten(1))
    assert torch.equal(both[:, 0], targets.flatten(1).flip(0))


def test_answers_are_scored_as_in_vqa_v2():
    rows = make_rows(1)
    rows[0] |= {"answers": ["Red"] * 2 + ["blue"] * 7 + ["mauve"], "boxes": []}
    rows[1] |= {"answers": ["mauve"], "boxes": []}
    batch = VQACollator(make_processor(), {name: i for i, name in enumerate(ANSWERS)}, (5, 5))(rows)
    torch.testing.assert_close(batch["labels"], torch.tensor([[2 / 3, 1, 0, 0], [0.0, 0, 0, 0]]))
    assert "relevance_targets" not in batch


def test_a_blind_batch_has_no_image():
    rows = make_rows(2)
    batch = VQACollator(make_processor(), {name: i for i, name in enumerate(ANSWERS)}, (5, 5), blind=True)(rows)
    assert (batch["pixel_values"] == batch["pixel_values"][0, 0, 0, 0]).all()


def test_images_are_grouped_by_what_the_data_set_tells():
    class Named:
        column_names = ("image_id",)

        def __getitem__(self, name):
            return ["a", "a", "b", "a"]

        def __len__(self):
            return 4

    class Generated:
        questions_per_image = 3

        def __len__(self):
            return 7

    assert group_by_image(Named()) == [[0, 1, 3], [2]]
    assert group_by_image(Generated()) == [[0, 1, 2], [3, 4, 5], [6]]
    assert group_by_image([{}, {}]) == [[0], [1]]


def test_the_sampler_keeps_an_image_together_and_changes_its_order():
    groups = [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9]]
    sampler = ImageGroupSampler(groups, seed=0)
    first = list(sampler)
    assert sorted(first) == list(range(10))
    assert len(sampler) == 10
    for group in groups:
        start = first.index(group[0])
        assert first[start : start + len(group)] == group
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(ImageGroupSampler(groups, seed=1)) != first


def test_it_learns_to_answer_and_to_point(tmp_path):
    trainer = make_trainer(
        tmp_path, num_train_epochs=40, learning_rate=5e-3, eval_strategy="no", save_strategy="no",
        load_best_model_at_end=False,
    )  # fmt: skip
    assert grid_of(trainer.model, trainer.processing_class) == (5, 5)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_accuracy"] < 0.9
    assert after["eval_accuracy"] == 1
    assert after["eval_pointing"] == 1
    assert after["eval_loss_relevance"] < before["eval_loss_relevance"]
    assert any("loss_answer" in entry and "loss_relevance" in entry for entry in trainer.state.log_history)


class _Watch(TrainerCallback):
    """Which encoders' weights, and buffers such as those of norms, change in each step."""

    def __init__(self):
        self.changed = []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.before = {name: value.clone() for name, value in model.state_dict().items()}

    def on_step_end(self, args, state, control, model, **kwargs):
        names = [name for name, value in model.state_dict().items() if not torch.equal(value, self.before[name])]
        self.changed.append({name.split(".")[0] for name in names})


@pytest.mark.parametrize(
    ("frozen", "text", "vision"),
    [
        ([], [1, 1, 1, 1], [1, 1, 1, 1]),
        (["text"], [0, 0, 0, 0], [1, 1, 1, 1]),
        (["vision=0.5:1"], [1, 1, 1, 1], [1, 1, 0, 0]),
        (["text=0:0.25", "vision=0.5:0.75"], [0, 1, 1, 1], [1, 1, 0, 1]),
    ],
)
def test_encoders_freeze_and_thaw_by_plan(tmp_path, frozen, text, vision):
    trainer = make_trainer(
        tmp_path, frozen=frozen, max_steps=4, warmup_steps=0, eval_strategy="no", save_strategy="no",
        load_best_model_at_end=False,
    )  # fmt: skip
    watch = _Watch()
    trainer.add_callback(watch)
    trainer.train()
    assert ["text_model" in names for names in watch.changed] == [bool(learns) for learns in text]
    assert ["vision_model" in names for names in watch.changed] == [bool(learns) for learns in vision]
    assert all({"encoder", "head"} <= names for names in watch.changed)


@pytest.mark.parametrize("item", ["ears", "text=1:0", "vision=0.5", "vision=0:2", "text=a:b", ""])
def test_plans_that_are_refused(item):
    with pytest.raises(ValueError, match="frozen: write text, vision"):
        parse_frozen(item, ("text_model", "vision_model"))


def test_augmentation_moves_training_images_and_where_to_look(tmp_path):
    rows = make_rows(8)
    trainer = make_trainer(tmp_path, rows, augment_flip=True, augment_shift=0.2)
    seen = []
    trainer.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    inputs = trainer.data_collator(rows)
    trainer.model.train()
    trainer.compute_loss(trainer.model, dict(inputs))
    trainer.model.eval()
    trainer.compute_loss(trainer.model, dict(inputs))
    changed, same = seen
    assert not torch.allclose(changed["pixel_values"], inputs["pixel_values"])
    assert torch.equal(same["pixel_values"], inputs["pixel_values"])
    assert torch.equal(same["relevance_targets"], inputs["relevance_targets"])
    # The square is what is not white: where it is, the map is.
    dark = (changed["pixel_values"].amin(1) < 0.5).float()[inputs["image_index"]]
    cells = torch.nn.functional.adaptive_avg_pool2d(dark, (5, 5)).flatten(1)
    maps = changed["relevance_targets"]
    torch.testing.assert_close(maps.sum(1), torch.ones(16))
    assert (maps * (cells > 0)).sum(1).min() > 0.6
    assert (maps - inputs["relevance_targets"]).abs().sum(1).max() > 0.5

    torch.manual_seed(3)
    once = trainer._augment(dict(inputs))["relevance_targets"]
    torch.manual_seed(3)
    pair = torch.stack((inputs["relevance_targets"].flip(0), inputs["relevance_targets"]), dim=1)
    twice = trainer._augment(inputs | {"relevance_targets": pair})["relevance_targets"]
    torch.testing.assert_close(twice[:, 1], once)
    assert twice.shape == pair.shape


def test_maps_follow_their_images_exactly_by_whole_cells():
    maps = torch.zeros(2, 2, 4)
    maps[0, 0, 0] = maps[1, 1, 2] = 1.0
    x = torch.linspace(-0.875, 0.875, 8).expand(8, 8)
    y = torch.linspace(-0.875, 0.875, 8)[:, None].expand(8, 8)
    moved = move_maps(maps, torch.stack((torch.stack((-x, y)), torch.stack((x + 0.5, y)))))
    expected = torch.zeros(2, 2, 4)
    expected[0, 0, 3] = expected[1, 1, 1] = 1.0  # mirrored; shifted by a cell
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resumed_training_ends_as_one_in_one_go(tmp_path, step):
    settings = {
        "save_strategy": "steps",
        "save_steps": step,
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "save_total_limit": None,
    }
    whole = make_trainer(tmp_path / "whole", muon_learning_rate=1e-3, **settings)
    whole.train()
    again = make_trainer(tmp_path / "again", muon_learning_rate=1e-3, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


@pytest.fixture
def base(tmp_path: Path) -> dict[str, str]:
    return {
        "--model": "query_conditioned_vqa", "--preset": "micro", "--output_dir": str(tmp_path / "run"),
        "--max_steps": "2", "--per_device_train_batch_size": "8", "--use_cpu": "true", "--eval_questions": "20",
        "--save_strategy": "steps", "--save_steps": "2", "--eval_strategy": "steps", "--eval_steps": "2",
        "--report_to": "none",
    }  # fmt: skip


def flags(settings: dict[str, str]) -> list[str]:
    return [part for pair in settings.items() for part in pair]


@pytest.mark.parametrize(
    ("dataset", "preset", "attention"),
    [("scenes", "micro", "eager"), ("easy-vqa", "micro", "sdpa"), ("easy-vqa", "small", "sdpa")],
)
def test_trained_by_the_command_line_and_gone_on_from(tmp_path, base, dataset, preset, attention):
    settings = {**base, "--dataset": dataset, "--train_questions": "60", "--preset": preset}
    settings["--attn_implementation"] = attention
    assert main(flags(settings)) == 0
    model = AutoModel.from_pretrained(tmp_path / "run")
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    image = Image.new("RGB", (30, 40), "red")
    logits = model(**processor(images=image, text="what color is the shape?", return_tensors="pt")).logits
    assert len(model.config.id2label) == logits.shape[1] > 2
    more = {**settings, "--init_from": str(tmp_path / "run"), "--output_dir": str(tmp_path / "more")}
    assert main(flags(more)) == 0
    assert AutoModel.from_pretrained(tmp_path / "more").config.id2label == model.config.id2label


def test_settings_that_are_refused(base, capsys):
    assert main(flags(base)) == 2
    assert "dataset: name what to learn from" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="QueryConditionedVQAConfig has no field smell"):
        parse_settings([*flags(base), "--config_overrides", json.dumps({"smell": 1})])


@pytest.mark.parametrize("name", ["query_conditioned_vqa_easy", "query_conditioned_vqa_scenes"])
def test_the_recipes_are_understood(root, name):
    recipe, model_args, data_args, training_args = parse_settings([str(root / "trainers" / "configs" / f"{name}.yaml")])
    assert recipe.training_arguments is VQATrainingArguments
    assert model_args.preset == "small"
    assert data_args.dataset
    assert training_args.muon_learning_rate > 0
