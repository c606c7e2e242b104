"""The command line: what it prints and where, what it does with what it cannot read, and its exit codes."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import regard
from regard.cli import name_drawings, write_as_text
from regard.processing.image_io import ImageReadError, open_image
from regard.read import Reader
from regard_cli import build_parser, main

VERBS = ["read", "classify", "ask", "count", "predict", "train", "evaluate", "info", "export", "card", "push"]


@pytest.fixture
def read(tiny_checkpoint: Path):
    """`regard read ...` with the tiny model, in this process."""
    return lambda *arguments: main(["read", "--model", str(tiny_checkpoint), "--device", "cpu", *map(str, arguments)])


def run(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """`regard ...` in a process of its own."""
    command = [sys.executable, "-m", "regard_cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_help_answers_at_once_without_heavy_imports():
    script = """
import sys, regard_cli
try:
    regard_cli.main(["--help"])
finally:
    print([name for name in ("torch", "transformers", "numpy", "PIL", "regard") if name in sys.modules])
"""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 1
    assert done.stdout.endswith("[]\n")


def test_help_names_every_verb_and_each_verb_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    for verb in VERBS:
        assert f"  {verb} " in text
        with pytest.raises(SystemExit, match="0"):
            main([verb, "--help"])
        assert "examples:" in capsys.readouterr().out
    assert set(build_parser()._subparsers._group_actions[0].choices) == set(VERBS)  # pyright: ignore


@pytest.mark.parametrize("verb", ["read", "classify", "ask", "count", "predict", "info", "export", "card", "push"])
def test_help_documents_the_exit_codes(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    text = capsys.readouterr().out
    assert all(
        f"\n  {code}  " in text for code in ((0, 2) if verb in ("info", "export", "card", "push") else (0, 1, 2))
    )


def test_module_and_version():
    done = subprocess.run([sys.executable, "-m", "regard", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"regard {regard.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["read"],
        ["read", "x.png", "--batch-size", "0"],
        ["read", "x", "--json", "--csv"],
        ["classify", "x.png", "--top-k", "0"],
        ["ask", "x.png"],
        ["ask", "x.png", " "],
        ["ask", "x.png", "what?", "--top-k", "0"],
        ["count", "x.png"],
        ["count", "x.png", " "],
        ["predict", "--model", "x", "--dataset", "y"],
        ["predict", "--model", "x", "--dataset", "y", "--output", "z", "--columns", "image"],
        ["train"],
        ["info"],
        ["export", "model"],
        ["push", "model"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: regard" in capsys.readouterr().err


def test_one_image_gives_its_text_alone(read, folder, capsys):
    assert read(folder / "a/one.png") == 0
    plain = capsys.readouterr()
    assert read(folder / "a/one.png", "--json") == 0
    line = json.loads(capsys.readouterr().out)
    assert plain.out == line["text"] + "\n"
    assert plain.err == ""


def test_several_images_get_headers_and_a_bar_on_standard_error(read, folder, capsys):
    assert read(folder) == 0
    captured = capsys.readouterr()
    headers = [line for line in captured.out.split("\n") if line.startswith("==> ")]
    assert headers == [f"==> {folder / name} <==" for name in ("a/one.png", "a/two.png", "b/one.png")]
    assert "3/3" in captured.err
    assert "image/s" not in captured.out


def test_json_lines_hold_path_text_score_and_characters(read, folder, capsys):
    assert read(folder, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["path"] for line in lines] == [str(folder / name) for name in ("a/one.png", "a/two.png", "b/one.png")]
    for line in lines:
        assert list(line) == ["path", "text", "score", "characters"]
        assert "".join(entry["character"] for entry in line["characters"]) == line["text"]
        assert 0 <= line["score"] <= 1
        for entry in line["characters"]:
            x0, y0, x1, y1 = entry["box"]
            assert 0 <= x0 <= x1 <= 96
            assert 0 <= y0 <= y1 <= 64


def test_csv_agrees_with_json(read, folder, capsys):
    assert read(folder, "--csv") == 0
    header, *rows = csv.reader(io.StringIO(capsys.readouterr().out, newline=""))
    assert read(folder, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert header == ["path", "text", "score"]
    assert rows == [[line["path"], line["text"], f"{line['score']:.4f}"] for line in lines]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_batches_change_nothing(read, folder, capsys, batch_size):
    read(folder, "--csv")
    expected = capsys.readouterr().out
    assert read(folder, "--csv", "--batch-size", batch_size, "--threads", 1) == 0
    assert capsys.readouterr().out == expected


def test_output_goes_to_a_file(read, folder, tmp_path, capsys):
    assert read(folder, "--json", "--output", tmp_path / "out.jsonl") == 0
    assert capsys.readouterr().out == ""
    assert len((tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()) == 3


def test_bad_files_are_named_and_the_others_read(read, folder, tmp_path, capsys):
    (folder / "a/broken.png").write_bytes((folder / "a/one.png").read_bytes()[:60])
    (folder / "a/empty.png").touch()
    (folder / "a/letter.png").write_text("Dear image,")
    missing = tmp_path / "missing.png"
    (tmp_path / "nothing").mkdir()
    arguments = (folder, missing, tmp_path / "nothing", "--csv", "--batch-size", 2)
    assert read(*arguments) == 1
    captured = capsys.readouterr()
    assert [row[0] for row in csv.reader(io.StringIO(captured.out, newline=""))][1:] == [
        str(folder / name) for name in ("a/one.png", "a/two.png", "b/one.png")
    ]
    complaints = [line for line in captured.err.splitlines() if line.startswith("regard: ")]
    assert len(complaints) == 5
    for name in (
        folder / "a/broken.png",
        folder / "a/empty.png",
        folder / "a/letter.png",
        missing,
        tmp_path / "nothing",
    ):
        assert sum(f"regard: {name}: " in line for line in complaints) == 1


def test_nothing_to_read_exits_with_2(read, folder, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    assert read(tmp_path / "nothing") == 2
    assert "no images in this folder" in capsys.readouterr().err
    (tmp_path / "bad.png").write_text("no image")
    assert read(tmp_path / "bad.png") == 2
    assert "bad.png" in capsys.readouterr().err


def test_a_missing_or_wrong_model_exits_with_2(folder, tmp_path, capsys):
    assert main(["read", str(folder), "--model", str(tmp_path / "absent")]) == 2
    assert "absent: no such folder" in capsys.readouterr().err
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil().save_pretrained(tmp_path / "vit")
    assert main(["read", str(folder), "--model", str(tmp_path / "vit")]) == 2
    assert "a vit model does not read text" in capsys.readouterr().err


def test_places_that_cannot_be_written_exit_with_2(read, folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert read(folder, "--output", tmp_path / "absent/out.txt") == 2
    assert "out.txt: cannot be written" in capsys.readouterr().err
    assert read(folder, "--draw", tmp_path / "file") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_an_image_that_is_gone_when_it_is_drawn_does_not_stop_the_rest(read, folder, tmp_path, capsys, monkeypatch):
    opened = []

    def open_once(source):
        opened.append(source)
        if opened.count(source) == 2 and source.parent.name == "b":
            raise ImageReadError(f"{source}: no such file; check the path")
        return open_image(source)

    monkeypatch.setattr("regard.cli.open_image", open_once)
    assert read(folder, "--json", "--draw", tmp_path / "seen") == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    assert "one.png: no such file; check the path; it is not drawn" in captured.err
    assert len(list((tmp_path / "seen").rglob("*.png"))) == 2


def test_drawings_are_laid_out_as_the_images_are(read, folder, tmp_path):
    Image.open(folder / "a/one.png").convert("RGB").save(folder / "a/one.jpg")
    assert read(folder, "--draw", tmp_path / "seen") == 0
    drawings = {str(path.relative_to(tmp_path / "seen")) for path in (tmp_path / "seen").rglob("*.png")}
    assert drawings == {"a/one.png", "a/one.png.png", "a/two.png", "b/one.png"}
    for path in (tmp_path / "seen").rglob("*.png"):
        with Image.open(path) as drawing:
            assert drawing.width >= 2 * 96


def test_drawings_never_replace_an_image_or_each_other(tmp_path, make_image):
    one = make_image(tmp_path / "one.png")
    content = one.read_bytes()
    names = name_drawings([one, one, "https://host/one.png?size=2", "https://host/one.png", "https://host/"], tmp_path)
    assert len(set(names)) == 5
    assert one not in names
    assert all(name.is_relative_to(tmp_path) for name in names)
    assert one.read_bytes() == content


def test_what_an_image_says_cannot_steer_the_terminal(tmp_path):
    reading = {"text": "a\tb\n\x1b[2J\x07\x9b", "score": 1.0, "characters": []}
    reader = Reader.__new__(Reader)  # needs no model to write
    master, slave = os.openpty()
    with os.fdopen(slave, "w", encoding="utf-8") as terminal:
        write_as_text(terminal, reader, several=False)("x.png", reading)
        terminal.flush()
        assert os.read(master, 100).decode() == "a\tb\r\n\ufffd[2J\ufffd\ufffd\r\n"
    os.close(master)
    with open(tmp_path / "out", "w+", encoding="utf-8") as file:
        write_as_text(file, reader, several=False)("x.png", reading)
        file.seek(0)
        assert file.read() == reading["text"] + "\n"


def test_a_batch_too_large_for_memory_is_halved(tiny_checkpoint, folder):
    script = """
import re, resource, sys
import regard.cli, regard_cli, torch
torch.set_num_threads(1)
read, image, *rest = sys.argv[1:]
regard_cli.main([read, image, *rest])  # what the first image loads, for good, shall not count
size = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 500_000_000, size + 500_000_000))
sys.exit(regard_cli.main([read, *[image] * 600, *rest]))
"""
    image = str(folder / "a/one.png")
    arguments = ["read", image, "--csv", "--model", str(tiny_checkpoint), "--batch-size", "600", "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=200)
    assert "not enough memory for 600 images at a time; going on with 300" in done.stderr
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("one.png") == 1 + 600


@pytest.mark.parametrize("flags", [[], ["--bf16"]])
def test_it_reads_in_either_precision(root, flags, capsys, monkeypatch):
    precisions = []
    run = Reader.run_batch

    def run_batch(self, batch):
        precisions.append(next(self.model.parameters()).dtype)
        return run(self, batch)

    monkeypatch.setattr(Reader, "run_batch", run_batch)
    assert main(["read", str(root / "samples/line.png"), "--device", "cpu", *flags]) == 0
    assert capsys.readouterr().out == "big they felt compelled\n"
    assert precisions == [torch.bfloat16 if flags else torch.float32]


def test_a_closed_pipe_ends_quietly(tiny_checkpoint, folder):
    command = [sys.executable, "-m", "regard_cli", "read", *[str(folder)] * 20, "--json", "--batch-size", "1"]
    command += ["--model", str(tiny_checkpoint)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(60) == 141
    assert json.loads(first)["path"].endswith("one.png")
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


def test_interruption_ends_quietly(tiny_checkpoint, folder):
    command = [sys.executable, "-m", "regard_cli", "read", *[str(folder)] * 500, "--json", "--batch-size", "1"]
    command += ["--model", str(tiny_checkpoint)]
    # Tests that a script runs in the background ignore interruptions, and so would what they start.
    options: dict[str, Any] = {"preexec_fn": partial(signal.signal, signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
    assert "regard: interrupted" in errors
    assert "Traceback" not in errors


def test_file_names_that_are_not_utf8_pass_unchanged(tiny_checkpoint, tmp_path, make_image):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    os.rename(make_image(tmp_path / "plain.png"), name)
    command = [sys.executable, "-m", "regard_cli", "read", os.fsdecode(name), "--csv", "--model", str(tiny_checkpoint)]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, capture_output=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert name in done.stdout
