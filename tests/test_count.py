"""`regard count`: what it prints and draws of counts. Files, errors and batches are those of `regard read`; see
test_cli."""

import csv
import io
import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from regard.count import _say
from regard_cli import main

CATEGORIES = ["cats", "red apples", "dogs"]
NAMES = ("a/one.png", "a/two.png", "b/one.png")
COUNT = r": (at least )?\d+( \(about \d+ at a glance\))?"


@pytest.fixture
def count(tiny_counter: Path):
    """`regard count ...` with the tiny model, in this process."""
    return lambda *arguments: main(["count", *map(str, arguments), "--model", str(tiny_counter), "--device", "cpu"])


def test_each_category_has_a_line(count, folder, capsys):
    assert count(folder / "a/one.png", "cats") == 0
    captured = capsys.readouterr()
    assert re.fullmatch(f"cats{COUNT}\n", captured.out)
    assert count(folder / "a/one.png", "cats", "red\n apples") == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(f"cats{COUNT}", lines[0])
    assert re.fullmatch(f"red apples{COUNT}", lines[1])


def test_doubt_is_said():
    entry = {"category": "cats", "count": 7, "complete": True, "agrees": True, "count_estimate": 7.4}
    assert _say(entry) == "cats: 7"
    assert _say({**entry, "agrees": False, "count_estimate": 11.6}) == "cats: 7 (about 12 at a glance)"
    assert _say({**entry, "complete": False}) == "cats: at least 7"


def test_a_folder_gets_headers_and_a_bar(count, folder, capsys):
    assert count(folder, "cats") == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[::3] == [f"==> {folder / name} <==" for name in NAMES]
    assert "3/3" in captured.err


def test_json_lines_and_csv_agree(count, folder, capsys, tmp_path):
    assert count(folder, *CATEGORIES, "--json", "--output", tmp_path / "out.jsonl") == 0
    assert capsys.readouterr().out == ""
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["path"] for line in lines] == [str(folder / name) for name in NAMES]
    for line in lines:
        assert list(line) == ["path", "counts"]
        assert [entry["category"] for entry in line["counts"]] == CATEGORIES
        for entry in line["counts"]:
            assert set(entry) == {"category", "count", "count_estimate", "agrees", "points", "complete", "tiled"}
            assert len(entry["points"]) == entry["count"]
            assert all(0 <= point["x"] <= 96 and 0 <= point["y"] <= 64 for point in entry["points"])
    for batch_size in (1, 2):
        assert count(folder, *CATEGORIES, "--csv", "--batch-size", batch_size, "--threads", 1) == 0
        header, *rows = csv.reader(io.StringIO(capsys.readouterr().out, newline=""))
        assert header == ["path", "category", "count", "count_estimate", "complete"]
        expected = [
            [line["path"], entry["category"], str(entry["count"]), str(entry["complete"])]
            for line in lines
            for entry in line["counts"]
        ]
        assert [[*row[:3], row[4]] for row in rows] == expected


@pytest.mark.parametrize("category", ["🟥👩‍👩‍👧", "قطط", "?", "cat " * 99])
def test_any_text_is_a_category(count, folder, capsys, tmp_path, category):
    assert count(folder / "a/one.png", category, "--json", "--draw", tmp_path / "seen") == 0
    assert json.loads(capsys.readouterr().out)["counts"][0]["category"] == category
    assert (tmp_path / "seen/one.png").is_file()


def test_any_image(count, tmp_path, capsys):
    for number, (mode, size) in enumerate((("1", (1, 1)), ("RGBA", (300, 1)), ("L", (3, 20)), ("I;16", (40, 40)))):
        Image.new(mode, size).save(tmp_path / f"{number}.png")
    assert count(tmp_path, "cats", "--csv", "--draw", tmp_path / "seen") == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert len(list((tmp_path / "seen").iterdir())) == 4


def test_empty_categories_are_refused(count, folder, capsys):
    for arguments in (["cats", ""], [" \t"]):
        with pytest.raises(SystemExit, match="2"):
            count(folder, *arguments)
        assert "a category is empty; name what to count" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        count(folder, os.fsdecode(b"caf\xe9s"))
    assert "is not UTF-8" in capsys.readouterr().err


def test_an_image_where_a_category_should_be_is_named(count, folder, capsys):
    assert count(folder / "a/one.png", folder / "a/two.png", "cats") == 2
    assert f"regard: {folder / 'a/two.png'}: an image where a category should be" in capsys.readouterr().err


def test_bad_files_are_named_and_the_others_counted(count, folder, capsys):
    (folder / "a/broken.png").write_bytes((folder / "a/one.png").read_bytes()[:60])
    assert count(folder, *CATEGORIES, "--csv") == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1 + 3 * 3
    assert f"regard: {folder / 'a/broken.png'}: " in captured.err


def test_models_of_other_jobs_are_refused(folder, tiny_vqa, tiny_counter, capsys):
    assert main(["count", str(folder), "cats", "--model", str(tiny_vqa)]) == 2
    assert "a query_conditioned_vqa model does not count objects; name another" in capsys.readouterr().err
    assert main(["ask", str(folder), "what?", "--model", str(tiny_counter)]) == 2
    assert "a sequential_attention_counting model does not answer questions" in capsys.readouterr().err


def test_drawings_show_every_category(count, folder, tmp_path):
    assert count(folder / "a/one.png", "cats", "--draw", tmp_path / "one") == 0
    assert count(folder / "a/one.png", *CATEGORIES, "--draw", tmp_path / "three") == 0
    with Image.open(tmp_path / "one/one.png") as one, Image.open(tmp_path / "three/one.png") as three:
        assert three.size == (one.width, 3 * one.height)
