"""`regard predict`: results of each task, what restarts and kills leave, several processes, and what is refused."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from datasets import load_dataset
from PIL import Image
from transformers import pipeline

from regard.cli import Worker
from regard.data.image_rows import ImageRows
from regard.predict import Job, Predictor, finished_shards, shard_path, write_whole
from regard_cli import build_parser, main

QUESTIONS = ("what colour is it?", "is it red?")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten images."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(10):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{index}.png")
    return tmp_path / "images"


@pytest.fixture
def asked(images: Path) -> Path:
    """A question about each of the ten."""
    rows = [{"image": f"images/{index}.png", "question": QUESTIONS[index % 2]} for index in range(10)]
    path = images.parent / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def arguments(model: Path, dataset: Path, output: Path, *more: object) -> list[str]:
    words = ["--model", model, "--dataset", dataset, "--output", output, "--device", "cpu", "--shard-size", 4, *more]
    return [str(word) for word in words]


def predict(model: Path, dataset: Path, output: Path, *more: object) -> int:
    return main(["predict", *arguments(model, dataset, output, "--batch-size", 3, *more)])


def results(output: Path) -> list[dict[str, Any]]:
    """All rows, read as the help says, in the order of the files."""
    return list(load_dataset("parquet", data_files=f"{output}/*.parquet", split="train", streaming=True))


def same(left: Any, right: Any) -> bool:
    """Equal but for the last digits of scores, and hundredths of pixels: batches differ in how sums are rounded."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == (pytest.approx(right, rel=1e-4, abs=1e-2) if isinstance(right, float) else right)


def test_text_recognition(tiny_checkpoint, images, tmp_path, capsys):
    assert predict(tiny_checkpoint, images, tmp_path / "out") == 0
    assert capsys.readouterr().out.startswith(
        f"10 rows in 3 parts of {tmp_path / 'out'}, 0 of them with an error; 10 d"
    )
    read = pipeline("text-recognition", model=str(tiny_checkpoint), device="cpu")  # pyright: ignore
    for index, row in enumerate(results(tmp_path / "out")):
        assert list(row) == ["index", "id", "text", "score", "characters", "error"]
        assert (row.pop("index"), row.pop("id"), row.pop("error")) == (index, f"{index}.png", None)
        assert same(row, read(str(images / f"{index}.png")))


@pytest.mark.parametrize("top_k", [None, 2])
def test_image_classification(tiny_classifier, images, tmp_path, top_k):
    parameters = {} if top_k is None else {"top_k": top_k}
    assert predict(tiny_classifier, images, tmp_path / "out", *(["--top-k", top_k] if top_k else [])) == 0
    classify: Any = pipeline("image-classification", model=str(tiny_classifier), device="cpu")
    rows = results(tmp_path / "out")
    assert [list(row) for row in rows] == [["index", "id", "labels", "error"]] * 10
    assert same([row["labels"] for row in rows], [classify(str(images / row["id"]), **parameters) for row in rows])


def test_visual_question_answering(tiny_vqa, asked, images, tmp_path):
    assert predict(tiny_vqa, asked, tmp_path / "out", "--top-k", 2) == 0
    ask = pipeline("visual-question-answering", model=str(tiny_vqa), device="cpu")  # pyright: ignore
    for index, row in enumerate(results(tmp_path / "out")):
        question = QUESTIONS[index % 2]
        assert (row.pop("index"), row.pop("id"), row.pop("error")) == (index, f"images/{index}.png", None)
        answers = ask(image=str(images / f"{index}.png"), question=question, top_k=2)
        assert same(row, {"question": question, "answers": answers})


def test_object_counting(tiny_counter, images, tmp_path):
    rows = [{"image": f"images/{index}.png", "category": ("cats", "red apples")[index % 2]} for index in range(10)]
    (tmp_path / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert predict(tiny_counter, tmp_path / "named.jsonl", tmp_path / "out") == 0
    count = pipeline("object-counting", model=str(tiny_counter), device="cpu")  # pyright: ignore
    for index, row in enumerate(results(tmp_path / "out")):
        assert (row.pop("index"), row.pop("id"), row.pop("error")) == (index, f"images/{index}.png", None)
        assert same(row, count(image=str(images / f"{index}.png"), category=rows[index]["category"]))


def test_rows_without_result_say_why(tiny_vqa, asked, images, tmp_path, capsys):
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:60])
    for index in (4, 5, 6, 7):  # all of a shard
        (images / f"{index}.png").unlink()
    lines = asked.read_text().splitlines()
    lines[8] = json.dumps({"image": "images/8.png", "question": " "})
    asked.write_text("\n".join(lines))
    assert predict(tiny_vqa, asked, tmp_path / "out") == 1
    assert "10 rows in 3 parts" in (line := capsys.readouterr().out)
    assert "6 of them with an error" in line
    rows = results(tmp_path / "out")
    for index, reason in {2: "2.png: damaged", 4: "4.png: no such file", 7: "no such file", 8: "no question"}.items():
        assert reason in rows[index]["error"]
        assert rows[index]["answers"] is None
    assert [row["index"] for row in rows if row["error"] is None] == [0, 1, 3, 9]
    assert all(len(row["answers"]) == 1 for row in rows if row["error"] is None)


def test_columns_by_other_names(tiny_classifier, asked, tmp_path):
    asked.write_text(asked.read_text().replace('"image"', '"photo"'))
    assert predict(tiny_classifier, asked, tmp_path / "out", "--columns", "image=photo", "id=question") == 0
    assert [row["id"] for row in results(tmp_path / "out")] == list(QUESTIONS) * 5


def test_a_restart_does_only_what_is_missing(tiny_classifier, images, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    assert predict(tiny_classifier, images, output) == 0
    expected, parts = results(output), [shard_path(output, shard) for shard in range(3)]
    contents = [part.read_bytes() for part in parts]
    # As a kill leaves it: a part that is missing, and half of it under another name.
    parts[1].unlink()
    half = output / f".{parts[1].name}.0123"
    half.write_bytes(contents[1][: len(contents[1]) // 2])
    parts[0].write_bytes(contents[0])
    times = [part.stat().st_mtime_ns for part in (parts[0], parts[2])]
    opened = []
    monkeypatch.setattr(
        Predictor, "_open", lambda self, row, own=Predictor._open: opened.append(row["id"]) or own(self, row)
    )
    capsys.readouterr()
    assert predict(tiny_classifier, images, output) == 0
    assert "; 4 done now, " in capsys.readouterr().out
    assert sorted(opened) == [f"{index}.png" for index in (4, 5, 6, 7)]
    assert [part.stat().st_mtime_ns for part in (parts[0], parts[2])] == times
    assert [part.read_bytes() for part in parts] == contents
    assert results(output) == expected
    assert not half.exists()
    # Nothing is left: the model is not even loaded.
    monkeypatch.setattr(Worker, "__init__", None)
    assert predict(tiny_classifier, images, output) == 0
    assert capsys.readouterr().out == f"10 rows in 3 parts of {output}, 0 of them with an error\n"


def test_a_part_is_there_before_the_rows_end(tiny_classifier, images, tmp_path, monkeypatch):
    words = ["predict", *arguments(tiny_classifier, images, tmp_path / "out")]
    job = Job(build_parser().parse_args(words))
    job.output.mkdir()
    seen = []

    def rows():
        for index in range(12):
            seen.append(finished_shards(job.output))
            yield {"image": f"{index % 10}.png", "id": None}

    monkeypatch.setattr(ImageRows, "__iter__", lambda self: rows())
    assert job.run(Predictor(job, "cpu", None, 2)) == 12
    assert seen == [set()] * 5 + [{0}] * 4 + [{0, 1}] * 3  # never more than the row after a shard


def test_other_settings_are_refused(tiny_classifier, tiny_vqa, images, asked, tmp_path, capsys):
    output = tmp_path / "out"
    assert predict(tiny_classifier, images, output) == 0
    manifest = (output / "manifest.json").read_text()
    assert json.loads(manifest)["rows"] == 10
    (images / "10.png").write_bytes((images / "9.png").read_bytes())
    for changed, names in {
        (tiny_classifier, images): ["dataset_version"],
        (tiny_classifier, asked): ["dataset", "dataset_version"],
        (tiny_vqa, asked): ["task", "model", "model_version", "dataset", "dataset_version"],
    }.items():
        assert predict(*changed, output) == 2
        error = capsys.readouterr().err
        assert f"{output} holds results of other settings: " in error
        assert [name for name in json.loads(manifest)["settings"] if f"{name} was " in error] == names
    (images / "10.png").unlink()
    assert predict(tiny_classifier, images, output, "--top-k", 1, "--shard-size", 5) == 2
    assert "parameters was {}, and is {'top_k': 1}; shard_size was 4, and is 5" in capsys.readouterr().err
    assert (
        predict(tiny_classifier, images, output, "--batch-size", 1, "--threads", 1) == 0
    )  # how it is computed may change
    assert (output / "manifest.json").read_text() == manifest
    (output / "manifest.json").write_text("{}")
    assert predict(tiny_classifier, images, output) == 2
    assert "manifest.json: not written by regard predict" in capsys.readouterr().err
    (output / "manifest.json").unlink()
    assert predict(tiny_classifier, images, output) == 2
    assert "holds parts but no manifest.json" in capsys.readouterr().err


def test_other_weights_are_another_model(tiny_classifier, images, tmp_path, capsys):
    model = shutil.copytree(tiny_classifier, tmp_path / "model")
    assert predict(model, images, tmp_path / "out") == 0
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "evaluation.json").write_text("{}")  # figures change nothing
    assert predict(model, images, tmp_path / "out") == 0
    (model / "model.safetensors").write_bytes(weights)
    assert predict(model, images, tmp_path / "out") == 2
    assert "other settings: model_version was" in capsys.readouterr().err


def test_what_cannot_start_exits_with_2(tiny_checkpoint, tiny_vqa, images, tmp_path, capsys):
    output = tmp_path / "out"
    for words, reason in {
        (tmp_path / "absent", images): "absent: no such folder",
        (tiny_checkpoint, tmp_path / "absent"): "absent: no such file or folder",
        (tiny_checkpoint, images, "--top-k", 2): "--top-k: text-recognition has none",
        (tiny_checkpoint, images, "--split", "test"): "no subfolder 'test'",
        (tiny_vqa, images): "no column 'question', only image",
    }.items():
        model, dataset, *more = words
        assert predict(model, dataset, output, *more) == 2
        assert reason in capsys.readouterr().err
        assert not output.exists()


def test_rows_that_break_off_keep_the_finished_parts(tiny_vqa, asked, tmp_path, capsys):
    whole = asked.read_text()
    asked.write_text(whole.replace(f'9.png", "question": "{QUESTIONS[1]}"', f'9.png", "question": [{QUESTIONS[1]}]'))
    assert predict(tiny_vqa, asked, tmp_path / "out") == 2
    assert "line 10: not JSON" in (error := capsys.readouterr().err)
    assert "keeps its finished parts" in error
    assert finished_shards(tmp_path / "out") == {0, 1}
    asked.write_text(whole)
    assert predict(tiny_vqa, asked, tmp_path / "out") == 0
    assert [row["index"] for row in results(tmp_path / "out")] == list(range(10))


def test_interruption_says_how_to_go_on(tiny_classifier, images, tmp_path, capsys, monkeypatch):
    run_batch = Predictor.run_batch

    def interrupted(self, batch):
        if batch[0]["id"] == "4.png":
            raise KeyboardInterrupt
        return run_batch(self, batch)

    monkeypatch.setattr(Predictor, "run_batch", interrupted)
    assert predict(tiny_classifier, images, tmp_path / "out") == 130
    assert "keeps its finished parts, and the same command goes on from there" in capsys.readouterr().err
    monkeypatch.undo()
    assert predict(tiny_classifier, images, tmp_path / "out") == 0
    assert "; 6 done now" in capsys.readouterr().out


def test_memory_that_does_not_suffice(tiny_classifier, images, tmp_path, capsys, monkeypatch):
    run_batch = Predictor.run_batch
    most = [2]

    def limited(self, batch):
        if len(batch) > most[0]:
            raise MemoryError
        return run_batch(self, batch)

    monkeypatch.setattr(Predictor, "run_batch", limited)
    assert predict(tiny_classifier, images, tmp_path / "out") == 0
    assert "not enough memory for 3 images at a time; going on with 1" in capsys.readouterr().err
    assert [row["index"] for row in results(tmp_path / "out")] == list(range(10))
    most[0] = 0
    assert predict(tiny_classifier, images, tmp_path / "other") == 2
    assert "not enough memory for a single image" in capsys.readouterr().err
    assert finished_shards(tmp_path / "other") == set()


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    write_whole(tmp_path / "file", b"one")
    with pytest.raises(TypeError):
        write_whole(tmp_path / "file", "no bytes")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"one")]


def test_killed_at_any_moment_no_row_is_lost_or_doubled(tiny_classifier, images, tmp_path):
    output = tmp_path / "out"
    rows = [{"image": f"images/{index % 10}.png", "id": index} for index in range(400)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = arguments(tiny_classifier, tmp_path / "many.jsonl", output, "--batch-size", 4, "--shard-size", 4)
    command = [sys.executable, "-m", "regard.predict", *words, "--columns", "id=id"]
    moments = random.Random(0)
    for kill in range(2):
        before = len(finished_shards(output))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(finished_shards(output)) <= before and process.poll() is None:
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL, kill
        assert before < len(finished_shards(output)) < 100
    for shard in finished_shards(output):
        assert pyarrow.parquet.read_table(shard_path(output, shard))["index"].to_pylist() == list(
            range(4 * shard, 4 * shard + 4)
        )
    assert main(["predict", *words, "--columns", "id=id"]) == 0
    found = results(output)
    assert [row["index"] for row in found] == [int(row["id"]) for row in found] == list(range(400))
    assert all(path.name.startswith("part-") or path.name == "manifest.json" for path in output.iterdir())


@pytest.fixture
def launch(root, tiny_classifier, images, tmp_path):
    """`regard predict` in two processes."""
    config = str(root / "trainers/accelerate/ddp.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--main_process_port", "0", "-m", "regard.predict"]  # any free one
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}  # else it would start one

    def run(*more: object) -> subprocess.CompletedProcess[str]:
        words = arguments(tiny_classifier, images, tmp_path / "out", "--batch-size", 3, *more)
        return subprocess.run([*command, *words], capture_output=True, text=True, timeout=280, env=environment)

    return run


def test_two_processes_give_the_same_as_one(launch, tiny_classifier, images, tmp_path):
    assert predict(tiny_classifier, images, tmp_path / "one") == 0
    (images / "3.png").write_text("no image")
    done = launch()
    assert done.returncode == 1, done.stderr  # an image cannot be read
    assert done.stdout.count("10 rows in 3 parts") == 1
    assert "1 of them with an error; 10 done now" in done.stdout
    one, two = results(tmp_path / "one"), results(tmp_path / "out")
    assert "3.png: not an image" in two[3]["error"]
    assert same(two[:3] + two[4:], one[:3] + one[4:])
    again = launch()
    assert again.stdout.count("10 rows in 3 parts") == 1
    assert "RuntimeError" not in again.stderr  # all of them know that nothing is left to do


def test_two_processes_refuse_as_one(launch, tiny_classifier, images, tmp_path):
    assert predict(tiny_classifier, images, tmp_path / "out") == 0
    refused = launch("--top-k", 1)
    assert refused.returncode != 0
    assert refused.stderr.count("holds results of other settings") == 1
