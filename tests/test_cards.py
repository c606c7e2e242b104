"""Cards: made from what a training and an evaluation leave, and those that come with regard say what was measured."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from regard.card import EVALUATION_NAME, evaluation_results, write_card
from regard.hub import find_verb
from regard.train import parse_settings
from regard.train_settings import SETTINGS_NAME
from regard_cli import main

BUNDLED = sorted(path.parent for path in (Path(__file__).resolve().parent.parent / "model_cards").glob("*/config.json"))
TAGS = {"image-to-text", "image-classification", "visual-question-answering", "object-detection"}  # of the Hub
REPORT = {
    "results": {"my-photos": {"top1": 0.75, "top5": 0.96875, "images": 64}},
    "command": "regard evaluate mine --dataset my-photos --output mine/evaluation.json",
    "date": "2026-11-25T15:31:45+00:00",
    "split": "test",
    "seed": 3,
    "machine": {"processor": "A processor", "device": "cpu"},
}


def examples(text: str) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def read_report(folder: Path) -> dict:
    return json.loads((folder / EVALUATION_NAME).read_text(encoding="utf-8"))


def as_written(value: float) -> str:
    """A pattern for a figure: a share in percent, or a number, with up to three decimals."""
    ways = {f"{100 * value:.{digits}f} ?%" for digits in range(3)} | {f"{value:.{digits}f}" for digits in range(1, 4)}
    return rf"(?<![\d.])({'|'.join(way.replace('.', '[.]') for way in ways)})(?!\d)"


@pytest.mark.parametrize("folder", BUNDLED, ids=lambda folder: folder.name)
def test_metadata_of_bundled_cards(folder):
    card = ModelCard.load(folder / "README.md")
    data = yaml.safe_load(card.content.split("---")[1])
    assert (data["library_name"], data["license"]) == ("regard", "apache-2.0")
    assert data["pipeline_tag"] in TAGS
    assert all(isinstance(tag, str) for tag in data["tags"])
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == folder.name
    expected = list(evaluation_results(find_verb(folder), read_report(folder)))
    assert expected
    assert [vars(result) for result in results] == [vars(result) for result in expected]


@pytest.mark.parametrize("folder", BUNDLED, ids=lambda folder: folder.name)
def test_text_of_bundled_cards_tells_the_recorded_figures(folder):
    text = ModelCard.load(folder / "README.md").text
    text = re.findall(r"^## Figures\n(.*?)^##", text, re.MULTILINE | re.DOTALL)[0]
    for result in evaluation_results(find_verb(folder), read_report(folder)):
        assert re.search(as_written(result.metric_value), text), f"{result.dataset_name}: {result.metric_name}"


@pytest.mark.parametrize("folder", BUNDLED, ids=lambda folder: folder.name)
def test_examples_of_bundled_cards_run(folder, root, tmp_path, monkeypatch, capsys):
    (tmp_path / "samples").symlink_to(root / "samples")
    monkeypatch.chdir(tmp_path)
    code = examples((folder / "README.md").read_text(encoding="utf-8"))
    exec(compile(code, folder.name, "exec"), {"__name__": "card"})
    assert capsys.readouterr().out.strip()


def test_figures_are_found_as_people_write_them():
    assert re.search(as_written(0.9169), "| 91.7% |")
    assert re.search(as_written(0.9169), "91.69 %, and")
    assert re.search(as_written(0.841), "| 0.84 |")
    assert not re.search(as_written(0.9169), "191.7 %, 91.75 %, 91.6 %")


@pytest.mark.parametrize("fixture", ["tiny_checkpoint", "tiny_classifier", "tiny_vqa", "tiny_counter"])
def test_a_new_card_has_an_example_that_runs(request, tmp_path, monkeypatch, make_image, capsys, fixture):
    folder = shutil.copytree(request.getfixturevalue(fixture), tmp_path / "mine")
    card = ModelCard.load(write_card(folder))
    assert card.data.license is None
    assert "None yet: `regard evaluate` measures." in card.text
    make_image(tmp_path / "image.png", "A")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(examples(card.content), "card", "exec"), {"__name__": "card"})
    assert capsys.readouterr().out


def test_figures_are_renewed_and_the_rest_stays(tiny_classifier, tmp_path, capsys):
    folder = shutil.copytree(tiny_classifier, tmp_path / "mine")
    (folder / EVALUATION_NAME).write_text(json.dumps(REPORT))
    assert main(["card", str(folder), "--license", "mit"]) == 0
    path = folder / "README.md"
    assert capsys.readouterr().out == f"{path}\n"
    assert "| my-photos | 75.0% | 96.9% |" in path.read_text()
    assert "2026-11-25, split test, seed 3, on cpu (A processor)" in path.read_text()
    path.write_text(path.read_text().replace("Say here for what it must not be used.", "Not for hats."))

    better = REPORT | {"results": {"my-photos": {"top1": 0.875, "top5": 1.0}, "other": {"top1": 0.5}}}
    (folder / EVALUATION_NAME).write_text(json.dumps(better))
    card = ModelCard.load(write_card(folder))
    assert card.data.license == "mit"
    assert "Not for hats." in card.text
    assert "| my-photos | 87.5% | 100.0% |\n| other | 50.0% |  |" in card.text
    assert "75.0%" not in card.text
    values = [(result.dataset_name, result.metric_type, result.metric_value) for result in card.data.eval_results or []]
    assert values == [
        ("my-photos", "accuracy", 0.875),
        ("my-photos", "top_5_accuracy", 1.0),
        ("other", "accuracy", 0.5),
    ]


def test_what_training_left_is_told(tiny_classifier, tmp_path):
    folder = shutil.copytree(tiny_classifier, tmp_path / "mine")
    settings = {"model": "qavit", "dataset": "my-photos", "seed": 7, "learning_rate": 0.002}
    (folder / SETTINGS_NAME).write_text(json.dumps(settings))
    history = [{"step": step, "eval_top1": step / 100, "eval_runtime": 1.0} for step in range(1, 51)]
    state = {"global_step": 50, "epoch": 2.5, "log_history": [{"step": 1, "loss": 3.0}, *history]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    text = ModelCard.load(write_card(folder)).text
    recipe = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0]
    assert yaml.safe_load(recipe) == settings
    (tmp_path / "settings.yaml").write_text(recipe)
    parse_settings([str(tmp_path / "settings.yaml"), "--output_dir", str(tmp_path), "--use_cpu", "true"])
    assert "50 steps (2.50 epochs), ended 20" in text
    assert "Trained on `my-photos`." in text
    steps = re.findall(r"^\| (\d+) \| 0\.\d+ \|$", text, re.MULTILINE)
    assert steps == [str(step) for step in range(5, 51, 5)]


def test_what_is_wrong_is_named(tiny_classifier, tmp_path, capsys):
    assert main(["card", str(tmp_path)]) == 2
    assert "holds no model" in capsys.readouterr().err
    folder = shutil.copytree(tiny_classifier, tmp_path / "mine")
    (folder / EVALUATION_NAME).write_text('{"results":')
    assert main(["card", str(folder)]) == 2
    assert "evaluation.json: damaged" in capsys.readouterr().err
    assert not (folder / "README.md").exists()
