"""What the README shows works as it stands there."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from regard.train import RECIPES, parse_settings
from regard_cli import build_parser

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n", 1)[0])
def test_python_runs(code: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    (tmp_path / "samples").symlink_to(root / "samples")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip()


def test_commands_parse():
    commands = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    commands = [command for command in commands if command and command[0] == "regard"]
    assert {command[1] for command in commands} == {
        "read", "classify", "ask", "count", "predict", "train", "evaluate", "info", "card", "push", "export"
    }  # fmt: skip
    for command in commands:
        words = command[1 : command.index(">")] if ">" in command else command[1:]
        build_parser().parse_args(words[:1] if words[0] == "train" else words)


def test_settings_are_accepted(tmp_path: Path):
    texts = {yaml.safe_load(text)["model"]: text for text in blocks("yaml")}
    assert set(texts) == set(RECIPES)
    parsed = {}
    for model, text in texts.items():
        path = tmp_path / f"{model}.yaml"
        path.write_text(text.replace("runs/", f"{tmp_path}/"))
        parsed[model] = parse_settings([str(path), "--use_cpu", "true"])[1:]
    model_args, data_args, training_args = parsed["image_text_slot"]
    assert (model_args.init_from, data_args.dataset, training_args.max_steps) == (
        "image-text-slot-5m",
        "my-images/",
        2000,
    )
    model_args, data_args, training_args = parsed["qavit"]
    assert (model_args.config_overrides, data_args.dataset, training_args.num_train_epochs) == (
        {"image_size": 32},
        "my-photos/",
        100,
    )
    model_args, data_args, training_args = parsed["query_conditioned_vqa"]
    assert (model_args.preset, data_args.num_answers, training_args.frozen) == ("base", 3000, ["vision=0:0.5"])


def test_links_lead_somewhere(root: Path):
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert targets
    for target in targets:
        assert (root / target).exists(), target


def test_make_targets_exist(root: Path):
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)[` ]", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
