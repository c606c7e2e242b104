"""What `regard info` says of a model."""

import json
import shutil
from pathlib import Path

import pytest

from regard.hub import CheckpointError
from regard.info import describe
from regard_cli import main

CARD = """---
license: apache-2.0
model-index:
- name: mine
  results:
  - task: {type: image-classification}
    dataset: {name: clothes, type: clothes}
    metrics:
    - {type: accuracy, value: 0.75}
---
# mine
"""


def test_bundled_models_are_described_with_their_figures(root: Path, capsys):
    assert main(["info", "qavit-tiny-fashion-mnist"]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads((root / "model_cards/qavit-tiny-fashion-mnist/evaluation.json").read_text())["results"]
    assert "model type    qavit (QAViTForImageClassification)" in lines
    assert "verb          regard classify" in lines
    assert "parameters    2,492,818" in lines
    assert "dtype         float16" in lines
    assert "image size    28x28" in lines
    assert lines[-1].startswith(f"  fashion-mnist: top1 {figures['fashion-mnist']['top1']:.4g}, ")


def test_a_model_without_figures(tiny_checkpoint: Path, capsys):
    assert main(["info", str(tiny_checkpoint)]) == 0
    out = capsys.readouterr().out
    assert "verb          regard read\n" in out
    assert out.endswith("figures       none; `regard evaluate` measures\n")


def test_a_model_that_counts(tiny_counter: Path, capsys):
    assert main(["info", str(tiny_counter)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "model type    sequential_attention_counting (SequentialAttentionCountingModel)" in lines
    assert "verb          regard count" in lines
    assert "parameters    94,631" in lines
    assert "image size    any" in lines


def test_sizes_count_every_file_and_figures_come_from_the_card(tiny_classifier: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_classifier, tmp_path / "mine")
    (folder / "README.md").write_text(CARD)
    (folder / "optimizer.pt").write_bytes(bytes(3_000_000))
    facts = describe(folder)
    weights = (folder / "model.safetensors").stat().st_size
    everything = sum(path.stat().st_size for path in folder.iterdir())
    assert facts["size on disk"] == f"{everything / 1e6:.1f} MB, weights {weights / 1e6:.1f} MB"
    assert facts["figures"] == {"clothes": {"accuracy": 0.75}}


def test_what_is_wrong_is_named(tiny_classifier: Path, tmp_path: Path, capsys):
    assert main(["info", str(tmp_path / "absent")]) == 2
    assert "absent: no such folder" in capsys.readouterr().err
    folder = shutil.copytree(tiny_classifier, tmp_path / "mine")
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"mine: cannot be loaded .*check its files"):
        describe(folder)
