"""`regard evaluate` on images of one's own, and on generated ones, of models that read text and of classifiers."""

import json
import shlex
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

import regard_cli
from regard import evaluate, evaluate_counting, evaluate_questions
from regard.classify import Classifier
from regard.cli import Worker
from regard.data.image_classification import load_labelled_images
from regard.evaluate import choose_data, choose_labelled_images, score_classifier, score_reader
from regard.read import Reader
from regard.train_settings import SETTINGS_NAME


@pytest.fixture
def labelled_folder(tmp_path: Path, make_image) -> Path:
    folder = tmp_path / "mine"
    texts = ["one", "two words", "a text of more than twenty-four characters"]
    lines = []
    for index, text in enumerate(texts):
        make_image(folder / f"{index}.png", text)
        lines.append(json.dumps({"file_name": f"{index}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_own_images_are_scored(labelled_folder: Path, tiny_checkpoint: Path, tmp_path: Path, capsys, monkeypatch):
    output = tmp_path / "results.json"
    arguments = ["evaluate", str(tiny_checkpoint), "--dataset", str(labelled_folder), "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["/somewhere/regard/__main__.py", *arguments])
    assert regard_cli.main([*arguments, "--batch-size", "2"]) == 0
    table = capsys.readouterr().out
    assert table.split()[:4] == ["images", "accuracy", "CER", "exact"]
    report = json.loads(output.read_text())
    scores = report["results"]["mine"]
    assert scores["images"] == 3
    assert scores["exact_match"] == 0
    assert {name: part["images"] for name, part in scores["by_length"].items()} == {"1-24": 2, "25-64": 1}
    assert report["split"] is None
    assert report["command"] == shlex.join(["regard", *arguments])
    assert report["versions"]["regard"]


def test_fewer_images_and_what_is_missing(labelled_folder: Path, tiny_checkpoint: Path, tmp_path: Path, capsys):
    parser = regard_cli.build_parser()
    options = parser.parse_args(["evaluate", "x", "--dataset", str(labelled_folder), "--images", "2"])
    assert [len(data) for data in choose_data(options).values()] == [2]
    assert regard_cli.main(["evaluate", str(tiny_checkpoint), "--dataset", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert regard_cli.main(["evaluate", str(tiny_checkpoint), "--tiers", "paragraph"]) == 2
    assert "paragraph" in capsys.readouterr().err


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    """Seven test images of two classes, whose numbers are not those of the tiny classifier."""
    for index, name in enumerate(("Tie", "Coat", "Tie", "Tie", "Coat", "Tie", "Coat")):
        path = tmp_path / "clothes/test" / name / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (30 * index, 255 - 30 * index, 99)).save(path)
    return tmp_path / "clothes"


def test_a_classifier_is_scored(class_folder: Path, tiny_classifier: Path, tmp_path: Path, capsys):
    output = tmp_path / "results.json"
    arguments = ["evaluate", str(tiny_classifier), "--dataset", str(class_folder), "--output", str(output)]
    assert regard_cli.main([*arguments, "--batch-size", "3", "--device", "cpu"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["images", "loss", "top-1", "top-5", "ms", "a", "batch", "images/s"]
    assert row.split()[:2] == ["clothes", "7"]
    report = json.loads(output.read_text())
    scores = report["results"]["clothes"]
    assert report["split"] == "test"
    assert (scores["images"], scores["batch_size"]) == (7, 3)
    assert list(scores["by_class"]) == ["Coat", "Tie"]
    assert scores["images_per_second"] == pytest.approx(3000 / scores["ms_per_batch"])

    classifier = Classifier(str(tiny_classifier), "cpu", None, 7)
    names = ["Coat", "Coat", "Coat", "Tie", "Tie", "Tie", "Tie"]
    labels = torch.tensor([{"Coat": 1, "Tie": 5}[name] for name in names])
    images: Any = [Image.open(path) for path in sorted(class_folder.glob("test/*/*.png"))]
    with torch.no_grad():
        logits = classifier.model(classifier.processor(images=images, return_tensors="pt")["pixel_values"]).logits
    assert scores["top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert scores["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-5)


def test_what_a_classifier_is_not_scored_on(class_folder: Path, tiny_classifier: Path, capsys):
    evaluate = ["evaluate", str(tiny_classifier), "--device", "cpu"]
    for arguments in ([], ["--tiers", "line"]):
        assert regard_cli.main([*evaluate, *arguments]) == 2
        assert "is a classifier: name images with classes by --dataset" in capsys.readouterr().err
    assert regard_cli.main([*evaluate, "--dataset", str(class_folder), "--split", "train"]) == 2
    assert "no split 'train', only test" in capsys.readouterr().err
    (class_folder / "test/Tie").rename(class_folder / "test/Cravat")
    assert regard_cli.main([*evaluate, "--dataset", str(class_folder)]) == 2
    assert "the model has no class 'Cravat' (1 of the data's 2); it has 'Bag', 'Coat'" in capsys.readouterr().err


def test_fewer_images_with_classes(class_folder: Path, tiny_classifier: Path, capsys):
    arguments = ["--dataset", str(class_folder), "--images", "2", "--device", "cpu"]
    assert regard_cli.main(["evaluate", str(tiny_classifier), *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["clothes", "2"]


def test_fewer_images_are_chosen_by_seed(class_folder: Path):
    """The folder has its three coats before its four ties."""

    def labels(*arguments: str) -> list[int]:
        options = regard_cli.build_parser().parse_args(["evaluate", "x", "--dataset", str(class_folder), *arguments])
        (data,) = choose_labelled_images(options, ["Coat", "Tie"]).values()
        return data["label"][:]

    assert labels() == labels("--images", "7", "--seed", "3") == [0, 0, 0, 1, 1, 1, 1]
    chosen = [labels("--images", "3", "--seed", str(seed)) for seed in range(6)]
    assert chosen[0] == labels("--images", "3")
    assert any(1 in each for each in chosen)
    assert len({tuple(each) for each in chosen}) > 1


@pytest.mark.parametrize(
    "settings", [{"validation_size": 3}, {"split_seed": 8}, {"validation_size": 2, "split_seed": 7}]
)
def test_validation_is_what_the_training_held_out(settings: dict, tmp_path: Path, make_image):
    for index in range(20):
        make_image(tmp_path / f"mine/{'ab'[index % 2]}/{index}.png", str(index))
    run = tmp_path / "run"
    (run / "checkpoint-1").mkdir(parents=True)

    def chosen(model: Path) -> list:
        arguments = ["evaluate", str(model), "--dataset", str(tmp_path / "mine"), "--split", "validation"]
        options = regard_cli.build_parser().parse_args([*arguments, "--seed", "2"])
        (data,) = choose_labelled_images(options, ["a", "b"]).values()
        return data.cast_column("pixel_values", datasets.Image(decode=False))[:]["pixel_values"]

    def held_out(validation_size: int = 5000, split_seed: int = 0) -> list:
        data = load_labelled_images(tmp_path / "mine", "validation", validation_size, split_seed)
        return data.cast_column("pixel_values", datasets.Image(decode=False))[:]["pixel_values"]

    assert chosen(run) == held_out(split_seed=2)
    (run / SETTINGS_NAME).write_text(json.dumps(settings))
    assert chosen(run) == chosen(run / "checkpoint-1") == held_out(**settings)


@pytest.mark.parametrize(
    ("module", "reader", "choose"),
    [
        (evaluate_questions, "load_visual_questions", evaluate_questions.choose_questions),
        (evaluate_counting, "load_counting", evaluate_counting.choose_counting),
    ],
)
def test_so_are_validation_questions_and_objects(module, reader: str, choose, tmp_path: Path, monkeypatch):
    seen = []
    monkeypatch.setattr(module, reader, lambda *_, **given: seen.append(given))
    options = regard_cli.build_parser().parse_args(["evaluate", str(tmp_path), "--dataset", "x", "--seed", "2"])
    choose(options, "validation")
    (tmp_path / SETTINGS_NAME).write_text(json.dumps({"dataset": "x", "validation_size": 9, "split_seed": 4}))
    choose(options, "validation")
    assert seen == [{"seed": 2}, {"validation_size": 9, "seed": 4}]


def without_memory_for_more_than(number: int, worker: Worker, monkeypatch: pytest.MonkeyPatch):
    run_batch = worker.run_batch

    def run(batch):
        if len(batch) > number:
            raise MemoryError
        return run_batch(batch)

    monkeypatch.setattr(worker, "run_batch", run)


def test_no_image_is_lost_where_batches_are_halved(
    labelled_folder: Path, class_folder: Path, tiny_checkpoint: Path, tiny_classifier: Path, monkeypatch
):
    reader, classifier = Reader(str(tiny_checkpoint), "cpu", None, 2), Classifier(str(tiny_classifier), "cpu", None, 4)
    for worker in (reader, classifier):
        without_memory_for_more_than(1, worker, monkeypatch)
    texts = choose_data(regard_cli.build_parser().parse_args(["evaluate", "x", "--dataset", str(labelled_folder)]))
    assert score_reader(reader, texts["mine"])["images"] == 3
    assert score_classifier(classifier, load_labelled_images(class_folder, "test"))["images"] == 7
    without_memory_for_more_than(0, classifier, monkeypatch)
    with pytest.raises(MemoryError, match="single image"):
        score_classifier(classifier, load_labelled_images(class_folder, "test"))


def test_what_keeps_a_measurement_from_its_end_is_told_in_a_line(
    labelled_folder: Path, tiny_checkpoint: Path, tmp_path: Path, capsys, monkeypatch
):
    def out_of_memory(*_):
        raise MemoryError("not enough memory for a single image; choose another --device")

    monkeypatch.setattr(evaluate, "score_reader", out_of_memory)
    arguments = ["evaluate", str(tiny_checkpoint), "--dataset", str(labelled_folder), "--output"]
    assert regard_cli.main([*arguments, str(tmp_path / "nowhere" / "results.json")]) == 2  # before anything is read
    assert "nowhere/results.json: cannot be written (No such file or directory)" in capsys.readouterr().err
    assert regard_cli.main([*arguments, str(tmp_path / "results.json")]) == 2
    assert "not enough memory for a single image" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setattr(evaluate, "score_reader", lambda *_: {"images": 3})
    assert regard_cli.main([*arguments, str(tmp_path)]) == 2
    assert f"{tmp_path}: cannot be written (Is a directory)" in capsys.readouterr().err


def test_figures_are_of_the_size_that_ran(class_folder: Path, tiny_classifier: Path, monkeypatch):
    classifier, done = Classifier(str(tiny_classifier), "cpu", None, 7), []
    without_memory_for_more_than(3, classifier, monkeypatch)
    scores = score_classifier(classifier, load_labelled_images(class_folder, "test"), done.append)
    assert done == [3, 3, 1]
    assert (scores["images"], scores["batch_size"]) == (7, 3)
    assert scores["images_per_second"] == pytest.approx(3000 / scores["ms_per_batch"])
