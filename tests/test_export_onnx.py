"""Models as ONNX graphs: onnxruntime computes what PyTorch computes, for batches other than those exported with."""

import importlib.util
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

import regard
from regard.export_onnx import ExportError, export_onnx
from regard.hub import load
from regard_cli import main

onnxruntime = pytest.importorskip("onnxruntime")
TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def runner(root: Path) -> ModuleType:
    """benchmarks/export_onnx.py, which runs the graphs."""
    spec: Any = importlib.util.spec_from_file_location("onnx_benchmark", root / "benchmarks" / "export_onnx.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pictures(number: int, width: int = 64, height: int = 64, seed: int = 0) -> list[Image.Image]:
    """Noise of ever higher contrast, so that no two images are read or counted alike."""
    noise = np.random.default_rng(seed).normal(size=(number, height, width, 3))
    levels = np.linspace(20, 120, number)[:, None, None, None]
    return [Image.fromarray(image) for image in (128 + noise * levels).clip(0, 255).astype(np.uint8)]


@torch.inference_mode()
def test_reading(runner, tiny_checkpoint, tmp_path):
    model, processor = load(str(tiny_checkpoint), "read", "cpu")
    cast(Any, model.config).encoder_config.crop_margin = None  # the graph reads whole images
    torch.nn.init.constant_(cast(Any, model.counter).presence.bias, -5.0)  # or it would see characters everywhere
    assert [path.name for path in export_onnx(model, tmp_path / "out")] == ["read.onnx"]
    graphs = runner.Graphs(tmp_path / "out")
    slots = set()
    for number in (1, 3, 5):
        inputs = processor(images=pictures(number, seed=number), return_tensors="pt")
        expected: Any = model.read(inputs["pixel_values"])
        rows = runner.read(graphs, inputs)
        assert [len(row["tokens"]) for row in rows] == [len(tokens) for tokens in expected.sequences]
        for row, tokens, scores, boxes in zip(rows, expected.sequences, expected.scores, expected.boxes, strict=True):
            assert row["tokens"].tolist() == tokens.tolist()
            np.testing.assert_allclose(row["scores"], scores, **TOLERANCE)
            np.testing.assert_allclose(row["boxes"], boxes, **TOLERANCE)
        outputs = graphs("read", inputs)
        np.testing.assert_array_equal(outputs["count_pred"], expected.count_pred)
        slots.add(outputs["tokens"].shape[1])
    assert len(slots) > 1  # as many as the longest text of a batch needs


@pytest.fixture(scope="module")
def exported_classifier(tiny_classifier, tmp_path_factory) -> tuple[Path, str, str]:
    """What the command line made of a classifier: the folder, and what stands on standard output and error."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    source = shutil.copytree(tiny_classifier, folder.parent / "in")
    (source / "onnx").mkdir()
    (source / "onnx/old.onnx").touch()  # is made anew
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as errors:
        assert main(["export", str(source), str(folder), "--onnx"]) == 0
    return folder, out.getvalue(), errors.getvalue()


def test_the_command_line_names_its_files(exported_classifier, tiny_classifier):
    folder, out, errors = exported_classifier
    assert out.splitlines() == [str(folder / path.name) for path in sorted(tiny_classifier.iterdir())] + [
        str(folder / "onnx/classify.onnx")
    ]
    assert {str(path) for path in folder.rglob("*") if path.is_file()} == set(out.splitlines())
    assert "torch" not in errors


@torch.inference_mode()
def test_classifying(runner, exported_classifier):
    folder = exported_classifier[0]
    model, processor = load(str(folder), "classify", "cpu")
    graphs = runner.Graphs(folder / "onnx")
    for number in (1, 3, 5):
        inputs = processor(images=pictures(number), return_tensors="pt")
        np.testing.assert_allclose(graphs("classify", inputs)["logits"], model(**inputs).logits, **TOLERANCE)


@torch.inference_mode()
def test_answering(runner, tiny_vqa, tmp_path):
    model, processor = load(str(tiny_vqa), "ask", "cpu")
    assert [path.name for path in export_onnx(model, tmp_path)] == ["answer.onnx", "encode_image.onnx"]
    graphs = runner.Graphs(tmp_path)
    questions = ["what colour is it?", "is it red?", "red?", "how many are there?", "is it red or how many are there?"]
    for images, index in ((1, [0]), (1, [0] * 5), (3, [2, 0, 1, 1, 0])):
        inputs = processor(
            images=pictures(images), text=questions[-len(index) :], image_index=index, return_tensors="pt"
        )
        expected, found = model(**inputs), runner.answer(graphs, inputs)
        for name in ("logits", "relevance", "word_attention"):
            np.testing.assert_allclose(found[name], expected[name], **TOLERANCE)


@torch.inference_mode()
def test_counting(runner, tiny_counter, tmp_path):
    model, processor = load(str(tiny_counter), "count", "cpu")
    files = export_onnx(model, tmp_path)
    assert [path.name for path in files] == ["count_step.onnx", "encode_category.onnx", "encode_image.onnx"]
    graphs = runner.Graphs(tmp_path)
    categories = ["cats", "red apples", "a", "things of some length"]
    numbers = []
    for images, size, index in ((1, (64, 64), [0]), (1, (48, 32), [0] * 4), (3, (32, 64), [2, 0, 1, 1])):
        inputs = processor(
            images=pictures(images, *size), text=categories[: len(index)], image_index=index, return_tensors="pt"
        )
        counted: Any = model.count(**inputs)
        for expected, found in zip(counted, runner.count(graphs, inputs, model.config), strict=True):
            assert len(found["points"]) == expected.count
            np.testing.assert_allclose(found["points"], expected.points, **TOLERANCE)
            np.testing.assert_allclose(found["scores"], expected.scores, **TOLERANCE)
            assert found["count_estimate"] == pytest.approx(expected.count_estimate, abs=1e-4)
            assert found["complete"] == expected.complete
            numbers.append(expected.count)
    assert len(set(numbers)) > 2, numbers


def test_the_benchmark_measures_both(runner, exported_classifier, tmp_path, monkeypatch, capsys):
    threads, folder = torch.get_num_threads(), exported_classifier[0]
    monkeypatch.setattr(
        runner, "export_onnx", lambda _, place: shutil.copytree(folder / "onnx", place, dirs_exist_ok=True)
    )
    words = ["--only", "classify", "--model", str(folder), "--rounds", "1", "--output", str(tmp_path / "out.json")]
    assert runner.main(words) == 0
    torch.set_num_threads(threads)
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert list(results) == ["classify 1", "classify 8"]
    for row in results.values():
        assert row["apart"] < 1e-4
        assert row["ratio"] == pytest.approx(row["torch_ms"] / row["onnxruntime_ms"])
    assert "| classify 8 |" in capsys.readouterr().out


def test_what_cannot_be_exported_is_refused(tiny_counter, tiny_classifier, tmp_path, monkeypatch, capsys):
    counter, _ = load(str(tiny_counter), "count", "cpu")
    counter.config.marking = "image"
    with pytest.raises(ExportError, match='marking="image": encodes the image anew'):
        export_onnx(counter, tmp_path / "out")
    with pytest.raises(ExportError, match="QAViTModel: has no ONNX graphs; those that have: ImageTextSlotModel, "):
        export_onnx(regard.QAViTModel(regard.QAViTConfig.from_preset("micro")), tmp_path / "out")
    counter.config.marking, counter.config.vlm_config.model_type = "memory", "qwen2_5_vl"
    with pytest.raises(ExportError, match="qwen2_5_vl: as a backbone has no ONNX graphs"):
        export_onnx(counter, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    classifier, _ = load(str(tiny_classifier), "classify", "cpu")
    with pytest.raises(ExportError, match="full: not empty; name a new folder"):
        export_onnx(classifier, tmp_path / "full")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["export", str(tiny_classifier), str(tmp_path / "out"), "--onnx"]) == 2
    assert capsys.readouterr().err.endswith('need onnx and onnxscript: pip install "regard[onnx]"\n')
    assert not (tmp_path / "out").exists()
