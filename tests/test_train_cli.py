"""`regard train`: settings from a file and from flags, what it refuses, and a training that ends and resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from regard import ImageTextSlotModel, ImageTextSlotProcessor
from regard.data.rendered_text import RenderedTextDataset
from regard.train import RECIPES, SettingsError, find_checkpoint, main, parse_settings
from regard.trainers.checkpoints import seal


@pytest.fixture
def write(tmp_path: Path):
    """A function that writes settings to a YAML or JSON file."""

    def write(settings: dict, name: str = "config.yaml") -> str:
        text = json.dumps(settings) if name.endswith(".json") else yaml.safe_dump(settings)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def base(tmp_path: Path) -> dict:
    """Settings of a training of two steps."""
    return {
        "preset": "tiny",
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "dataloader_num_workers": 0,
    }


@pytest.fixture
def images(tmp_path: Path, make_image) -> Path:
    """A labelled folder with the splits train and validation."""
    folder = tmp_path / "images"
    for split in ("train", "validation"):
        rows = []
        for index in range(4):
            make_image(folder / split / f"{index}.png", f"No. {index}")
            rows.append(json.dumps({"file_name": f"{index}.png", "text": f"No. {index}"}))
        (folder / split / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["config.yaml", "config.yml", "config.json"])
def test_settings_come_from_a_file_and_flags_win(write, base, name):
    path = write(base | {"learning_rate": "3e-4", "tiers": {"line": 2, "noisy": 1}, "bf16": False}, name)
    _, model_args, data_args, training_args = parse_settings([path, "--max-steps", "7", "--bf16"])
    assert model_args.preset == "tiny"
    assert data_args.tiers == ["line=2", "noisy=1"]
    assert training_args.learning_rate == pytest.approx(3e-4)
    assert (training_args.max_steps, training_args.bf16) == (7, True)


def test_flags_alone_do(tmp_path):
    arguments = ["--preset", "tiny", "--output_dir", str(tmp_path), "--tiers", "line=1", "block=2", "--use_cpu"]
    recipe, model_args, data_args, training_args = parse_settings(arguments)
    assert recipe is RECIPES["image_text_slot"]
    assert (model_args.preset, data_args.tiers, training_args.output_dir) == (
        "tiny",
        ["line=1", "block=2"],
        str(tmp_path),
    )


def test_nested_and_empty_values(write, base):
    scheduler = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.3}}
    path = write(base | scheduler | {"init_from": None})
    _, model_args, _, training_args = parse_settings([path])
    assert training_args.lr_scheduler_kwargs == {"min_lr_rate": 0.3}
    assert model_args.init_from is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1e-4}, "unknown setting learning_rat; did you mean learning_rate?"),
        ({"zzzz": 1}, "unknown setting zzzz; .*lists all"),
        ({"max_steps": 1.5}, "max_steps.*1.5"),
        ({"model": "image_text_slots"}, "no 'image_text_slots'; choose one of image_text_slot"),
        ({"preset": "huge"}, "huge.*tiny"),
        ({"tiers": {"lines": 1}}, "lines"),
    ],
)
def test_wrong_settings_are_refused(write, base, settings, message, capsys):
    assert main([write(base | settings)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("regard train: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)


@pytest.mark.parametrize(
    "model", ["image_text_slot", "qavit", "query_conditioned_vqa", "sequential_attention_counting"]
)
def test_a_misspelt_folder_is_named(tmp_path, model, capsys):
    """Without the network, too, where no one can tell whether the Hub has such a data set."""
    assert main(["--model", model, "--dataset", "nope", "--output_dir", str(tmp_path), "--use_cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("regard train: nope: no such folder, nor a data set on the Hub that can be reached")


def test_outputs_that_cannot_be_are_refused(write, base, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    for place in ("file", "file/run"):
        assert main([write(base | {"output_dir": str(tmp_path / place)})]) == 2
        assert f"output_dir: {tmp_path / place} cannot be written" in capsys.readouterr().err
    monkeypatch.setattr("regard.train.is_tensorboard_available", lambda: False)
    assert main([write(base | {"report_to": "tensorboard"})]) == 2
    assert "report_to: `pip install tensorboard`" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--learning_rat", "--learning-rat=1", "--max_step"])
def test_misspelt_flags_are_refused_with_the_close_one(write, base, flag):
    with pytest.raises(SettingsError, match=r"unknown setting .*; did you mean (learning_rate|max_steps)?"):
        parse_settings([write(base), flag, "1"])


def test_wrong_files_are_refused(tmp_path, write):
    with pytest.raises(SettingsError, match=r"absent\.yaml: cannot be read"):
        parse_settings([str(tmp_path / "absent.yaml")])
    with pytest.raises(SettingsError, match=r"ends in \.yaml"):
        parse_settings([str(tmp_path)])
    (tmp_path / "broken.yaml").write_text("a: [1", encoding="utf-8")
    with pytest.raises(SettingsError, match="not valid YAML"):
        parse_settings([str(tmp_path / "broken.yaml")])
    (tmp_path / "list.yaml").write_text("- 1", encoding="utf-8")
    with pytest.raises(SettingsError, match="found a list"):
        parse_settings([str(tmp_path / "list.yaml")])


def test_resume_finds_the_newest_checkpoint(write, base, tmp_path):
    def find(value):
        return find_checkpoint(parse_settings([write(base | {"resume_from_checkpoint": value})])[3])

    assert find(None) is None
    assert find(False) is None
    assert find(True) is None
    for step in (5, 10):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        seal(tmp_path / "run" / f"checkpoint-{step}")
    assert find(True) == str(tmp_path / "run/checkpoint-10")
    assert find(str(tmp_path / "run/checkpoint-5")) == str(tmp_path / "run/checkpoint-5")
    with pytest.raises(SettingsError, match="nowhere is no folder"):
        find("nowhere")


def test_the_shipped_settings_are_accepted(root, tmp_path):
    paths = sorted((root / "trainers/configs").glob("*.yaml"))
    assert paths
    for path in paths:
        parse_settings([str(path), "--output_dir", str(tmp_path), "--use_cpu", "true"])  # one asks for bf16


def test_training_on_own_images_ends_in_a_model_that_loads_and_resumes(write, base, images, tmp_path, capsys):
    settings = base | {"dataset": str(images), "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    assert main([write(settings | {"resume_from_checkpoint": True})]) == 0
    model = ImageTextSlotModel.from_pretrained(tmp_path / "run")
    assert model.config.num_slots == 64
    assert (tmp_path / "run/processor_config.json").is_file()
    card = (tmp_path / "run/README.md").read_text()
    assert f"Trained on `{images}`." in card
    assert "max_steps: 2\n" in card
    assert "2 steps (" in card
    state = json.loads((tmp_path / "run/trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert sum("eval_loss" in entry for entry in state["log_history"]) == 2

    assert main([write(settings | {"max_steps": 3, "resume_from_checkpoint": True})]) == 0
    state = json.loads((tmp_path / "run/trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert main([write(settings | {"max_steps": 3, "resume_from_checkpoint": True})]) == 0
    assert "nothing is left to train" in capsys.readouterr().out

    further = {"init_from": str(tmp_path / "run"), "output_dir": str(tmp_path / "further")}
    assert main([write(settings | further), "--max_steps", "1"]) == 0
    assert (tmp_path / "further/model.safetensors").is_file()


def test_a_start_that_cannot_be_used_is_named(write, base, images, tmp_path, capsys):
    settings = base | {"dataset": str(images), "max_steps": 1, "eval_strategy": "no"}
    assert main([write(settings)]) == 0
    weights = tmp_path / "run/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for start, message in (
        (tmp_path / "run", "run: damaged weights"),
        ("qavit-tiny-fashion-mnist", "is a qavit model; go on from a image_text_slot one"),
        ("nobody/nothing", "nobody/nothing: cannot be loaded"),
        (tmp_path / "nothing", "no such folder"),
    ):
        assert main([write(settings | {"init_from": str(start), "output_dir": str(tmp_path / "further")})]) == 2
        assert message in capsys.readouterr().err


def test_another_image_size_is_one_of_model_and_processor(write, base, images, tmp_path, capsys):
    settings = base | {"dataset": str(images), "max_steps": 1, "eval_strategy": "no"}
    assert main([write(settings | {"config_overrides": {"image_size": 64, "pad_slots": 2}})]) == 0
    assert ImageTextSlotModel.from_pretrained(tmp_path / "run").config.pad_slots == 2
    further = {"init_from": str(tmp_path / "run"), "output_dir": str(tmp_path / "further")}
    assert main([write(settings | further | {"config_overrides": {"image_size": 96}})]) == 0
    for run, side in (("run", 64), ("further", 96)):
        assert ImageTextSlotModel.from_pretrained(tmp_path / run).config.image_size == side
        processor = ImageTextSlotProcessor.from_pretrained(tmp_path / run)
        assert processor(images=Image.new("L", (50, 40)), return_tensors="pt")["pixel_values"].shape[2:] == (side, side)
    for start in ({}, further):  # 16 does not divide it
        assert main([write(settings | start | {"config_overrides": {"image_size": 100}})]) == 2
        assert "image_size=100 must be divisible" in capsys.readouterr().err
    assert main([write(settings | further | {"config_overrides": {"num_slots": 32}})]) == 2
    assert "do not fit {'num_slots': 32}" in capsys.readouterr().err
    assert main([write(settings | {"config_overrides": {"image_sice": 64}})]) == 2


def test_generated_texts_are_what_the_settings_say(write, base, tmp_path):
    settings = {
        "tiers": {"block": 1, "noisy": 1},
        "eval_tiers": ["line", "noisy"],
        "eval_images": 3,
        "train_images": 40,
        "generator_seed": 5,
        "length_curriculum": ["0=8", "20=30"],
    }
    _, *arguments = parse_settings([write(base | settings)])
    trainer: Any = RECIPES["image_text_slot"].build(*arguments)
    train = trainer.train_dataset
    assert len(train) == 40
    rows = [train[index] for index in range(40)]
    assert max(len(row["text"]) for row in rows[:20]) <= 8 < max(len(row["text"]) for row in rows[20:]) <= 30
    assert all(rows[index]["tier"] == rows[index + 1]["tier"] for index in range(0, 40, 2)), "a batch is of one tier"
    assert {row["tier"] for row in rows} == {"block", "noisy"}
    assert {tier: len(data) for tier, data in trainer.eval_dataset.items()} == {"line": 3, "noisy": 3}
    other = RenderedTextDataset("train", {"block": 1, "noisy": 1}, size=40, seed=6, group_size=2)
    assert [other[index]["text"] for index in range(4)] != [row["text"] for row in rows[:4]]
    trainer.train()  # texts fit the preset's slots
    assert trainer.state.global_step == 2


def test_accelerate_launches_two_processes(root, write, base, images, tmp_path):
    path = write(base | {"dataset": str(images), "eval_strategy": "steps", "eval_steps": 1})
    config = root / "trainers/accelerate/ddp.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launch += ["--num_processes", "2", "--main_process_port", "0"]  # any free one
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "-m", "regard.train", path], capture_output=True, text=True, timeout=280, env=environment
    )
    assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path / "run/trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert (tmp_path / "run/README.md").read_text().count("## Recipe") == 1
    assert state["epoch"] == 2  # four images, two at a time in each of two processes


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("preset", "dataset", "learning_rate", "max_steps"))
