"""Which checkpoint a name means."""

import shutil
from pathlib import Path

import pytest
import torch

from regard.hub import DEFAULT_CHECKPOINTS, CheckpointError, bundled_checkpoints, find_verb, load, resolve


@pytest.mark.parametrize("verb", DEFAULT_CHECKPOINTS)
def test_the_default_of_every_verb_is_bundled(root: Path, verb: str):
    name, bundled = DEFAULT_CHECKPOINTS[verb], bundled_checkpoints()
    processor = {"preprocessor_config.json"} if verb == "classify" else {"processor_config.json", "tokenizer.json"}
    assert Path(resolve(None, verb)).samefile(root / "model_cards" / name)
    assert resolve(name) == str(bundled[name])
    files = {path.name for path in bundled[name].iterdir()}
    assert {"config.json", "model.safetensors", "README.md"} | processor <= files


def test_a_folder_comes_before_a_bundled_name(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = DEFAULT_CHECKPOINTS["read"]
    shutil.copytree(tiny_checkpoint, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert Path(resolve(name)).resolve() == tmp_path / name
    assert resolve(tmp_path / name) == str(tmp_path / name)


def test_a_repository_is_passed_on():
    assert resolve("owner/some-model.v1") == "owner/some-model.v1"


@pytest.mark.parametrize("name", ["nowhere", "./owner/name", "/no/such/folder", "a/b/c", "", Path("owner/name")])
def test_what_is_neither_folder_nor_repository_is_refused(name):
    with pytest.raises(CheckpointError, match=r"no such folder|holds no model"):
        resolve(name)


def test_a_folder_without_a_model_and_a_file_are_refused(tiny_checkpoint: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="holds no model"):
        resolve(tmp_path)
    with pytest.raises(CheckpointError, match="give the folder"):
        resolve(tiny_checkpoint / "config.json")


def test_load_gives_float32_in_evaluation_mode_and_the_processor(tiny_checkpoint: Path, tmp_path: Path):
    half = shutil.copytree(tiny_checkpoint, tmp_path / "half")
    model, _ = load(half)
    model.half().save_pretrained(half)
    model, processor = load(str(half), device="cpu")
    assert model.dtype == torch.float32
    assert model.device.type == "cpu"
    assert not model.training
    assert type(processor).__name__ == "ImageTextSlotProcessor"


def test_load_names_what_is_wrong(tiny_checkpoint: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"owner/absent: cannot be loaded .*network"):
        load("owner/absent")
    cut = shutil.copytree(tiny_checkpoint, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"cut: cannot be loaded .*check its files"):
        load(cut)
    foreign = shutil.copytree(tiny_checkpoint, tmp_path / "foreign")
    (foreign / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(CheckpointError, match="foreign: cannot be loaded"):
        load(foreign)
    with pytest.raises(CheckpointError, match="nonsense"):
        load(tiny_checkpoint, device="nonsense")


def test_a_model_that_answers_is_known_and_loaded_as_one(tiny_vqa: Path, tiny_checkpoint: Path):
    assert find_verb(tiny_vqa) == "ask"
    model, processor = load(tiny_vqa, "ask", "cpu")
    assert type(model).__name__ == "QueryConditionedVQAModel"
    assert type(processor).__name__ == "QueryConditionedVQAProcessor"
    with pytest.raises(CheckpointError, match="a image_text_slot model does not answer questions; name another"):
        load(tiny_checkpoint, "ask")


def test_a_model_that_counts_is_known_and_loaded_as_one(tiny_counter: Path, tiny_checkpoint: Path):
    assert find_verb(tiny_counter) == "count"
    model, processor = load(tiny_counter, "count", "cpu")
    assert type(model).__name__ == "SequentialAttentionCountingModel"
    assert type(processor).__name__ == "SequentialAttentionCountingProcessor"
    with pytest.raises(CheckpointError, match="a image_text_slot model does not count objects; name another"):
        load(tiny_checkpoint, "count")


def test_a_classifier_is_known_and_loaded_as_one(tiny_checkpoint: Path, tiny_classifier: Path, tmp_path: Path):
    assert (find_verb(tiny_checkpoint), find_verb(str(tiny_classifier))) == ("read", "classify")
    model, processor = load(tiny_classifier, "classify", "cpu")
    assert (type(model).__name__, type(processor).__name__) == ("QAViTForImageClassification", "QAViTImageProcessor")
    with pytest.raises(CheckpointError, match="owner/absent: cannot be loaded"):
        find_verb("owner/absent")
    headless = shutil.copytree(tiny_classifier, tmp_path / "headless")
    model.model.save_pretrained(headless)
    with pytest.raises(CheckpointError, match="headless: a qavit model does not classify images"):
        load(headless, "classify")
