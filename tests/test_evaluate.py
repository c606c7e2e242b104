"""`regard evaluate` on images of one's own, and on generated ones."""

import json
import shlex
from pathlib import Path

import pytest

import regard_cli
from regard.evaluate import choose_data


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
