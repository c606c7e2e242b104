"""QAViTTrainer: augmentation and soft labels, averaged weights, the best checkpoint, resuming, the recipes."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from regard.configuration.configuration_qavit import QAViTConfig
from regard.modeling.modeling_qavit import QAViTForImageClassification
from regard.processing.image_processing_qavit import QAViTImageProcessor
from regard.train import SettingsError, channel_statistics, main, parse_settings
from regard.trainers.trainer_qavit import OWN_WEIGHTS_NAME, QAViTTrainer, QAViTTrainingArguments

PLAIN = {
    "label_smoothing_factor": 0.0,
    "augment_flip": False,
    "rand_augment_ops": 0,
    "random_erasing": 0.0,
    "mixup_alpha": 0.0,
    "cutmix_alpha": 0.0,
}


def make_rows(number: int, seed: int = 0) -> list[dict]:
    """Noise whose brightest quarter tells the class."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(number):
        pixels = generator.integers(0, 100, (20, 20, 3), dtype=np.uint8)
        label = index % 4
        pixels[label // 2 * 10 :, label % 2 * 10 :][:10, :10] += 120
        rows.append({"pixel_values": Image.fromarray(pixels), "label": label})
    return rows


def make_trainer(folder, rows=None, **arguments) -> QAViTTrainer:
    torch.manual_seed(0)
    model = QAViTForImageClassification(QAViTConfig.from_preset("micro", num_labels=4))
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    rows = make_rows(32) if rows is None else rows
    return QAViTTrainer(
        model,
        QAViTTrainingArguments(**{**defaults, **arguments}),
        QAViTImageProcessor(size=20),
        train_dataset=rows,
        eval_dataset=make_rows(12, seed=1),
    )


def test_learns_and_ends_with_the_best_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=8, ema_decay=0.5, **PLAIN)
    trainer.train()
    trainer.save_model()
    scores = [entry["eval_top1"] for entry in trainer.state.log_history if "eval_top1" in entry]
    assert len(scores) == 8
    assert max(scores) >= 0.75
    assert trainer.state.best_metric == max(scores)
    assert [entry["eval_top5"] for entry in trainer.state.log_history if "eval_top5" in entry] == [1] * 8  # 4 classes
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(norms) == 8 * 4
    assert all(0 < norm < float("inf") for norm in norms)
    best, kept = trainer.state.best_model_checkpoint, load_file(tmp_path / "model.safetensors")
    assert best is not None
    for name, value in load_file(Path(best) / "model.safetensors").items():
        assert torch.equal(value, kept[name]), name
    assert trainer.evaluate()["eval_top1"] == max(scores)
    assert not (tmp_path / OWN_WEIGHTS_NAME).exists()
    AutoModelForImageClassification.from_pretrained(tmp_path)


def test_averaged_weights_are_what_is_evaluated_and_saved(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3, eval_strategy="no", load_best_model_at_end=False, save_steps=3)
    trainer.args.save_strategy = "steps"
    weights = []
    train_step = trainer.training_step
    name = "classifier.weight"

    def step(model, *args, **kwargs):
        if trainer.state.global_step:
            weights.append(model.state_dict()[name].clone())
        return train_step(model, *args, **kwargs)

    trainer.training_step = step
    trainer.train()
    own = trainer.model.state_dict()[name]
    average = weights[0]
    for number, value in enumerate((weights[1], own), start=1):
        average = torch.lerp(average, value, 1 - min(0.9998, (1 + number) / (10 + number)))
    saved = tmp_path / "checkpoint-3"
    assert torch.allclose(load_file(saved / "model.safetensors")[name], average, atol=1e-7)
    assert torch.equal(load_file(saved / OWN_WEIGHTS_NAME)[name], own)
    with trainer.averaged_weights():
        assert torch.allclose(trainer.model.state_dict()[name], average, atol=1e-7)
    assert torch.equal(trainer.model.state_dict()[name], own)


def test_without_averaging_the_model_itself_is_saved(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, save_strategy="steps",
                           save_steps=2, ema_decay=0.0)  # fmt: skip
    trainer.train()
    assert trainer.average is None
    assert not (tmp_path / "checkpoint-2" / OWN_WEIGHTS_NAME).exists()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert torch.equal(saved["classifier.weight"], trainer.model.state_dict()["classifier.weight"])


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_resumes_exactly(tmp_path, ema_decay):
    changes = {"ema_decay": ema_decay, "save_strategy": "steps", "save_steps": 3, "save_total_limit": None}
    changes |= {"eval_strategy": "steps", "eval_steps": 3}
    whole = make_trainer(tmp_path / "whole", **changes)
    whole.train()
    again = make_trainer(tmp_path / "again", **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    logs = [
        [
            entry.get("loss", entry.get("eval_loss"))
            for entry in trainer.state.log_history
            if "train_runtime" not in entry
        ]
        for trainer in (whole, again)
    ]
    assert len(logs[0]) == 8 + 3
    assert logs[0] == logs[1]
    for file in ("model.safetensors", OWN_WEIGHTS_NAME) if ema_decay else ("model.safetensors",):
        first, second = (load_file(tmp_path / name / "checkpoint-8" / file) for name in ("whole", "again"))
        for name, value in first.items():
            assert torch.equal(value, second[name]), (file, name)


def test_labels_are_softened_and_mixed(tmp_path):
    inputs = {"pixel_values": torch.rand(8, 3, 20, 20), "labels": torch.arange(8) % 4}
    plain = make_trainer(tmp_path, **PLAIN)._augment(inputs)
    assert torch.equal(plain["labels"], torch.eye(4).repeat(2, 1))
    assert torch.allclose(plain["pixel_values"], inputs["pixel_values"], atol=1e-6)
    smooth = make_trainer(tmp_path, **PLAIN | {"label_smoothing_factor": 0.2})._augment(inputs)
    assert torch.allclose(smooth["labels"].max(1).values, torch.full((8,), 0.85))
    mixed = make_trainer(tmp_path)._augment(inputs)
    assert torch.allclose(mixed["labels"].sum(1), torch.ones(8))
    assert (mixed["labels"] > 0.03).sum(1).max() > 1
    assert not torch.allclose(mixed["pixel_values"], inputs["pixel_values"], atol=0.1)


def test_training_images_grow_with_the_curriculum(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, size_curriculum=["0.5=16", "0=12", "0.75=20"], ema_decay=0.0,
                           eval_strategy="no", save_strategy="no", load_best_model_at_end=False)  # fmt: skip
    sides = []
    trainer.model.register_forward_pre_hook(
        lambda model, arguments, inputs: sides.append(inputs["pixel_values"].shape[2:]), with_kwargs=True
    )
    trainer.train()
    assert sides == [(12, 12), (12, 12), (16, 16), (20, 20)]
    trainer.evaluate()
    assert sides[-1] == (20, 20)


@pytest.mark.parametrize("item", ["20", "0.5=", "1.5=20", "0=x", "0=0"])
def test_a_wrong_curriculum_is_refused(tmp_path, item):
    with pytest.raises(ValueError, match="write SHARE=PIXELS"):
        make_trainer(tmp_path, size_curriculum=[item])


def test_evaluation_is_not_augmented(tmp_path):
    trainer = make_trainer(tmp_path)
    names = ("eval_loss", "eval_top1", "eval_top5")
    scores = [[trainer.evaluate()[name] for name in names] for _ in range(2)]
    assert scores[0] == scores[1]
    first, second = (trainer.predict(cast(Any, make_rows(6))).predictions for _ in range(2))
    assert np.array_equal(first, second)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder of four classes."""
    for index, row in enumerate(make_rows(24)):
        place = tmp_path / "images" / "train" / f"class {row['label']}"
        place.mkdir(parents=True, exist_ok=True)
        row["pixel_values"].save(place / f"{index}.png")
    return tmp_path / "images"


def settings(folder: Path, tmp_path: Path, **changes) -> list[str]:
    values = {
        "model": "qavit",
        "preset": "micro",
        "dataset": str(folder),
        "output_dir": str(tmp_path / "run"),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        "resume_from_checkpoint": "true",
    } | changes
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}" for name, value in values.items()]


def test_command_trains_on_a_folder_and_ends(folder, tmp_path, capsys):
    assert main(settings(folder, tmp_path, config_overrides={"depth": 1})) == 0
    run = tmp_path / "run"
    model = AutoModelForImageClassification.from_pretrained(run)
    assert model.config.id2label == {index: f"class {index}" for index in range(4)}
    assert model.config.depth == 1
    processor = QAViTImageProcessor.from_pretrained(run)
    assert processor.image_mean[0] == pytest.approx(0.3, abs=0.1)
    assert main(settings(folder, tmp_path)) == 0
    assert "nothing is left to train" in capsys.readouterr().out
    changes = {"init_from": str(run), "output_dir": str(tmp_path / "further"), "config_overrides": {"image_size": 16}}
    assert main(settings(folder, tmp_path, **changes, train_images=8, eval_images=2)) == 0
    further = AutoModelForImageClassification.from_pretrained(tmp_path / "further")
    assert (further.config.depth, further.config.image_size) == (1, 16)
    assert QAViTImageProcessor.from_pretrained(tmp_path / "further").size["height"] == 16
    state = json.loads((tmp_path / "further" / "trainer_state.json").read_text())
    assert state["global_step"] == 1  # of 8 images


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config_overrides": {"dept": 1}}, "no field dept"),
        ({"config_overrides": "[1]"}, "an object"),
        ({"config_overrides": "{"}, "not JSON"),
    ],
)
def test_wrong_overrides_are_refused(folder, tmp_path, changes, reason):
    with pytest.raises(SettingsError, match=reason):
        parse_settings(settings(folder, tmp_path, **changes))


def test_a_data_set_must_be_named(tmp_path, capsys):
    assert main(["--model=qavit", f"--output_dir={tmp_path}", "--use_cpu=true"]) == 2
    assert "dataset: name what to learn from" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar100", "imagenet"])
def test_recipes_are_accepted(root: Path, name, tmp_path):
    path = root / "trainers" / "configs" / f"qavit_tiny_{name}.yaml"
    _, model_args, data_args, training_args = parse_settings([str(path), "--use_cpu=true", f"--output_dir={tmp_path}"])
    config = QAViTConfig.from_preset(model_args.preset, **model_args.config_overrides)
    assert config.image_size == {"fashion_mnist": 28, "cifar100": 32, "imagenet": 224}[name]
    assert data_args.dataset
    assert training_args.learning_rate == {"fashion_mnist": 3e-3, "cifar100": 1e-3, "imagenet": 1e-3}[name]
    assert training_args.muon_learning_rate == {"fashion_mnist": 3e-3, "cifar100": 0, "imagenet": 0}[name]
    assert training_args.weight_decay == 0.05
    assert training_args.lr_scheduler_kwargs == {"min_lr": 1e-6}


def test_defaults_are_the_described_recipe():
    args = QAViTTrainingArguments(output_dir="unused", use_cpu=True)
    assert (args.num_train_epochs, args.learning_rate, args.weight_decay) == (300, 1e-3, 0.05)
    assert args.warmup_steps * args.num_train_epochs == pytest.approx(20)


def test_channel_statistics_are_those_of_the_pixels(folder):
    from datasets import load_dataset

    data = load_dataset("imagefolder", data_dir=str(folder), split="train").rename_column("image", "pixel_values")
    pixels = np.stack([np.asarray(image) for image in data[:]["pixel_values"]]) / 255
    mean, std = channel_statistics(data)
    assert mean == pytest.approx(pixels.mean((0, 1, 2)).tolist(), abs=1e-3)
    assert std == pytest.approx(pixels.std((0, 1, 2)).tolist(), abs=1e-3)
