"""A checkpoint with its code: what is written, and that it computes the same where regard cannot be imported."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from stranger import WITHOUT_REGARD, approximately
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)
from transformers.dynamic_module_utils import get_relative_imports

import regard
from regard.export import ExportError, collect_code, export_checkpoint, export_with_code
from regard.hub import CheckpointError
from regard_cli import main

pipeline: Any = transformers.pipeline  # it declares the tasks that it comes with

# Loads every model of a folder as a stranger would, and saves what it computes.
STRANGER = (
    WITHOUT_REGARD
    + """
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoProcessor, pipeline
from transformers import AutoModelForVisualQuestionAnswering

folder, image = sys.argv[1:]
trust = {"trust_remote_code": True}
results = {}
with torch.inference_mode():
    reader = AutoModel.from_pretrained(f"{folder}/read", **trust).eval()
    inputs = AutoProcessor.from_pretrained(f"{folder}/read", **trust)(images=image, return_tensors="pt")
    results["read"] = reader.read(inputs["pixel_values"]).scores[0]
    results["text"] = pipeline("text-recognition", model=f"{folder}/read", **trust)(image)
    results["inferred"] = pipeline(model=f"{folder}/read", **trust)(image)

    classifier = AutoModelForImageClassification.from_pretrained(f"{folder}/classify", **trust).eval()
    inputs = AutoImageProcessor.from_pretrained(f"{folder}/classify", **trust)(images=image, return_tensors="pt")
    results["classify"] = classifier(**inputs).logits
    assert ".classify." in type(classifier).__module__

    vqa = AutoModelForVisualQuestionAnswering.from_pretrained(f"{folder}/vqa", **trust).eval()
    inputs = AutoProcessor.from_pretrained(f"{folder}/vqa", **trust)(
        images=image, text=["what is it?", "is it red?"], return_tensors="pt")
    results["vqa"] = vqa(**inputs).logits
    results["vqa_again"] = AutoModel.from_pretrained(f"{folder}/vqa", **trust).eval()(**inputs).logits

    ask = pipeline("visual-question-answering", model=f"{folder}/vqa", **trust)
    results["answers"] = ask(image=image, question="is it red?")

    counter = AutoModel.from_pretrained(f"{folder}/count", **trust).eval()
    inputs = AutoProcessor.from_pretrained(f"{folder}/count", **trust)(
        images=image, text=["cats", "red apples"], return_tensors="pt")
    results["count"] = counter(**inputs).pointer_logits
    results["counted"] = pipeline("object-counting", model=f"{folder}/count", **trust)(image=image, category="cats")
    assert ".count." in type(counter).__module__
    assert type(counter.vlm).__module__.startswith("transformers.models.")

    # Now that the model above has registered its QAViT.
    inputs = AutoImageProcessor.from_pretrained(f"{folder}/classify", **trust)(images=image, return_tensors="pt")
    results["features"] = AutoModel.from_pretrained(f"{folder}/classify", **trust).eval()(**inputs).last_hidden_state
    results["classes"] = pipeline("image-classification", model=f"{folder}/classify", **trust)(image)

    # What a stranger saves is whole again.
    vqa.save_pretrained(f"{folder}/again")
    AutoProcessor.from_pretrained(f"{folder}/vqa", **trust).save_pretrained(f"{folder}/again")
    inputs = AutoProcessor.from_pretrained(f"{folder}/again", **trust)(
        images=image, text=["what is it?", "is it red?"], return_tensors="pt")
    results["saved_again"] = AutoModel.from_pretrained(f"{folder}/again", **trust).eval()(**inputs).logits
assert "regard" not in sys.modules
torch.save(results, f"{folder}/results.pt")
"""
)


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint: Path, tiny_classifier: Path, tiny_vqa: Path, tiny_counter: Path) -> dict[str, Path]:
    return {"read": tiny_checkpoint, "classify": tiny_classifier, "vqa": tiny_vqa, "count": tiny_counter}


@pytest.fixture(scope="module")
def exported(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each tiny checkpoint and its code."""
    folder = tmp_path_factory.mktemp("exported")
    for name, checkpoint in checkpoints.items():
        export_checkpoint(checkpoint, folder / name, with_code=True)
    return folder


@torch.inference_mode()
def expected_results(checkpoints: dict[str, Path], image: str) -> dict[str, Any]:
    """What `STRANGER` must find, by regard's own classes."""
    processor: Any = AutoProcessor.from_pretrained(checkpoints["read"])
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    text = pipeline("text-recognition", model=str(checkpoints["read"]))(image)
    processor = AutoProcessor.from_pretrained(checkpoints["vqa"])
    questions = processor(images=image, text=["what is it?", "is it red?"], return_tensors="pt")
    answers = AutoModelForVisualQuestionAnswering.from_pretrained(checkpoints["vqa"]).eval()(**questions).logits
    processor = AutoProcessor.from_pretrained(checkpoints["count"])
    categories = processor(images=image, text=["cats", "red apples"], return_tensors="pt")
    picture = AutoImageProcessor.from_pretrained(checkpoints["classify"])(images=image, return_tensors="pt")
    classifier = AutoModelForImageClassification.from_pretrained(checkpoints["classify"]).eval()
    return {
        "read": AutoModel.from_pretrained(checkpoints["read"]).eval().read(pixels).scores[0],
        "text": text,
        "inferred": text,
        "vqa": answers,
        "vqa_again": answers,
        "saved_again": answers,
        "answers": pipeline("visual-question-answering", model=str(checkpoints["vqa"]))(
            image=image, question="is it red?"
        ),
        "count": AutoModel.from_pretrained(checkpoints["count"]).eval()(**categories).pointer_logits,
        "counted": pipeline("object-counting", model=str(checkpoints["count"]))(image=image, category="cats"),
        "classify": classifier(**picture).logits,
        "features": AutoModel.from_pretrained(checkpoints["classify"]).eval()(**picture).last_hidden_state,
        "classes": pipeline("image-classification", model=str(checkpoints["classify"]))(image),
    }


def test_a_stranger_without_regard_computes_the_same(checkpoints, exported, tmp_path, make_image):
    image = str(make_image(tmp_path / "image.png"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(exported), image],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    results = torch.load(exported / "results.pt")
    expected = expected_results(checkpoints, image)
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(results[name], value, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert results[name] == approximately(value), name


def test_where_regard_is_installed_nothing_of_the_folder_runs(exported, tmp_path, make_image):
    image = str(make_image(tmp_path / "image.png"))
    folder = shutil.copytree(exported, tmp_path / "trap")
    for path in folder.rglob("*.py"):
        path.write_text('raise SystemExit("code of the folder was run")\n')
    for trust in ({}, {"trust_remote_code": True}):
        assert type(AutoModel.from_pretrained(folder / "read", **trust)) is regard.ImageTextSlotModel
        assert type(AutoProcessor.from_pretrained(folder / "read", **trust)) is regard.ImageTextSlotProcessor
        assert type(AutoImageProcessor.from_pretrained(folder / "classify", **trust)) is regard.QAViTImageProcessor
        classifier = AutoModelForImageClassification.from_pretrained(folder / "classify", **trust)
        assert type(classifier) is regard.QAViTForImageClassification
        vqa = AutoModelForVisualQuestionAnswering.from_pretrained(folder / "vqa", **trust)
        assert type(vqa) is regard.QueryConditionedVQAModel
        assert type(vqa.vision_model) is regard.QAViTBackbone
        processor: Any = AutoProcessor.from_pretrained(folder / "vqa", **trust)
        assert type(processor) is regard.QueryConditionedVQAProcessor
        assert type(processor.image_processor) is regard.QAViTImageProcessor
    reader = pipeline("text-recognition", model=str(folder / "read"))
    assert type(reader) is regard.TextRecognitionPipeline
    assert reader(image)["text"] is not None
    ask = pipeline("visual-question-answering", model=str(folder / "vqa"))
    assert type(ask) is regard.VisualQuestionAnsweringPipeline
    count = pipeline("object-counting", model=str(folder / "count"))
    assert type(count) is regard.ObjectCountingPipeline
    assert type(count.model) is regard.SequentialAttentionCountingModel
    # What is saved from here does not claim to have code beside it.
    vqa.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    reader.save_pretrained(tmp_path / "saved-reader")
    for path in tmp_path.glob("saved*/*.json"):
        assert "auto_map" not in path.read_text(), path
        assert "custom_pipelines" not in path.read_text(), path


def test_exactly_the_needed_files_are_written(exported, checkpoints):
    shared = {"attention.py", "image_io.py", "layers.py"}
    qavit = {"configuration_qavit.py", "grid_attention.py", "image_processing_qavit.py", "modeling_qavit.py"}
    own = {
        "classify": qavit,
        "vqa": qavit
        | {
            "configuration_query_conditioned_vqa.py",
            "losses.py",
            "modeling_query_conditioned_vqa.py",
            "processing_query_conditioned_vqa.py",
            "processor_pipeline.py",
            "query_conditioned_layers.py",
            "visual_question_answering.py",
        },
        "read": {
            "configuration_image_text_slot.py",
            "image_processing_image_text_slot.py",
            "image_text_slot_blocks.py",
            "image_text_slot_counter.py",
            "image_text_slot_crop.py",
            "image_text_slot_encoder.py",
            "image_text_slot_second_look.py",
            "losses.py",
            "modeling_image_text_slot.py",
            "processing_image_text_slot.py",
            "processor_pipeline.py",
            "text_recognition.py",
            "tokenization_byte.py",
        },
        "count": {
            "configuration_sequential_attention_counting.py",
            "counting_layers.py",
            "counting_loop.py",
            "counting_losses.py",
            "counting_outputs.py",
            "losses.py",
            "modeling_sequential_attention_counting.py",
            "object_counting.py",
            "picture_patches.py",
            "processing_sequential_attention_counting.py",
            "processor_pipeline.py",
            "tiles.py",
        },
    }
    for name, files in own.items():
        code = {path.name for path in (exported / name).glob("*.py")}
        assert code == files | shared
        rest = {path.name for path in (exported / name).iterdir()} - code
        assert rest == {path.name for path in checkpoints[name].iterdir()}
        for path in (exported / name).glob("*.py"):
            assert {f"{imported}.py" for imported in get_relative_imports(path)} <= code
            assert "regard." not in "".join(line for line in path.read_text().splitlines() if "import" in line)


def test_only_lines_that_import_the_package_differ(root, exported):
    written = (exported / "read/modeling_image_text_slot.py").read_text().splitlines()
    source = (root / "modeling/modeling_image_text_slot.py").read_text().splitlines()
    changed = [(old, new) for old, new in zip(source, written, strict=True) if old != new]
    assert changed
    for old, new in changed:
        assert old.startswith("from regard.")
        assert new.startswith("from .")
        assert old.partition(" import ")[2] == new.partition(" import ")[2]


def test_weights_and_card_are_copied_and_what_training_left_is_not(tiny_checkpoint, tmp_path):
    source = shutil.copytree(tiny_checkpoint, tmp_path / "run")
    (source / "README.md").write_text("# card")
    for name in ("optimizer.pt", "trainer_state.json", "training_args.bin", "own_script.py"):
        (source / name).touch()
    (source / "checkpoint-10").mkdir()
    files = {path.name for path in export_checkpoint(source, tmp_path / "plain")}
    assert files == {path.name for path in tiny_checkpoint.iterdir()} | {"README.md"}
    for name in files:
        assert (tmp_path / "plain" / name).read_bytes() == (source / name).read_bytes()
    with_code = export_checkpoint(source, tmp_path / "with-code", with_code=True)
    assert not {"own_script.py", "trainer_state.json"} & {path.name for path in with_code}
    again = export_checkpoint(tmp_path / "with-code", tmp_path / "again")
    assert [path.name for path in again] == [path.name for path in with_code]


def test_a_model_in_memory(tiny_vqa, exported, tmp_path):
    model, processor = AutoModel.from_pretrained(tiny_vqa), AutoProcessor.from_pretrained(tiny_vqa)
    files = export_with_code(model, processor, tmp_path / "out")
    assert [path.name for path in files] == sorted(path.name for path in (exported / "vqa").iterdir())
    for path in files:
        other = exported / "vqa" / path.name
        if path.suffix == ".json":  # what has been loaded saves more of its settings
            assert json.loads(path.read_text()).get("auto_map") == json.loads(other.read_text()).get("auto_map")
        else:
            assert path.read_bytes() == other.read_bytes(), path.name
    assert "auto_map" not in vars(model.config)
    assert type(AutoConfig.from_pretrained(tmp_path / "out")) is regard.QueryConditionedVQAConfig


def test_parts_of_transformers_need_no_code(tmp_path):
    config = regard.QueryConditionedVQAConfig()  # ResNet and BERT
    model = regard.QueryConditionedVQAModel(config)
    tokenizer = regard.build_byte_tokenizer()
    processor = regard.QueryConditionedVQAProcessor(ViTImageProcessorPil(), tokenizer)
    files = {path.name for path in export_with_code(model, processor, tmp_path)}
    assert not any("qavit" in name for name in files)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert "auto_map" in settings
    assert "auto_map" not in settings["image_processor"]


def test_what_cannot_be_exported_is_refused(tiny_checkpoint, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/file").touch()
    with pytest.raises(ExportError, match="run: not empty; name a new folder"):
        export_checkpoint(tiny_checkpoint, tmp_path / "run")
    with pytest.raises(ExportError, match="file: cannot be written"):
        export_checkpoint(tiny_checkpoint, tmp_path / "run/file")
    with pytest.raises(CheckpointError, match="no such folder"):
        export_checkpoint(tmp_path / "absent", tmp_path / "out")
    vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(ExportError, match="a vit model is transformers' own"):
        export_with_code(vit, None, tmp_path / "out")
    weightless = shutil.copytree(tiny_checkpoint, tmp_path / "weightless")
    (weightless / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="holds no weights"):
        export_checkpoint(weightless, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ["import regard.hub", "from regard import hub", "from regard.modeling import layers"])
def test_imports_that_cannot_lie_flat_are_refused(line, tmp_path, monkeypatch):
    (tmp_path / "sprawling.py").write_text(f"def late():\n    {line}\n\nclass Late: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import sprawling  # pyright: ignore[reportMissingImports]

    with pytest.raises(ExportError, match=r"sprawling.py:2: write `from regard.folder.file import name`"):
        collect_code([sprawling.Late])


def test_command_line(tiny_classifier, tmp_path, capsys):
    assert main(["export", str(tiny_classifier), str(tmp_path / "out"), "--with-code"]) == 0
    assert str(tmp_path / "out/modeling_qavit.py") in capsys.readouterr().out.splitlines()
    assert main(["export", str(tiny_classifier), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"regard: {tmp_path / 'out'}: not empty; name a new folder\n"
    assert main(["export", str(tmp_path / "absent"), str(tmp_path / "new")]) == 2
    assert "absent: no such folder" in capsys.readouterr().err
