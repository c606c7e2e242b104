"""benchmarks/count.py, with counters that need no model, on few scenes."""

import importlib.util
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from regard.data import emoji_scenes
from regard.data.counting import validate_points


@pytest.fixture
def bench(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    try:
        emoji_scenes._font()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    spec: Any = importlib.util.spec_from_file_location("count_benchmark", root / "benchmarks" / "count.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "count_benchmark", module)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


class Thrice:
    """Counts three of everything."""

    def __init__(self, model: str):
        self.marked: list[str] = []

    def __call__(self, image: Image.Image, category: str) -> list[tuple[float, float]]:
        return [(1.0, 2.0), (30.0, 4.0), (5.0, 60.0)]

    def number_each(self, image: Image.Image, categories: Sequence[str]) -> list[int]:
        return [3] * len(categories)

    def mark(self, marking: str) -> None:
        self.marked.append(marking)


def run(bench: Any, folder: Path, *arguments: str) -> Any:
    output = folder / "results.json"
    assert bench.main([*arguments, "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report["command"].startswith(f"python benchmarks/count.py {arguments[0]}")
    return report["results"]


def discs(bench: Any, number: int, seed: int) -> Any:
    rng = random.Random(seed)
    image = Image.new("RGB", (224, 224), "tan")
    draw = ImageDraw.Draw(image)
    places = rng.sample([(x, y) for x in range(25, 200, 40) for y in range(25, 200, 40)], number)
    for x, y in places:
        draw.circle((x, y), 9, "navy")
        draw.circle((x - 3, y - 3), 3, "gold")
    return bench.Question(image, "discs", places, [(x - 11, y - 11, x + 12, y + 12) for x, y in places])


@pytest.mark.parametrize("name", ["threshold, labels", "threshold, peaks", "template"])
def test_classical_counters_count_discs(name, bench):
    pytest.importorskip("cv2")
    pytest.importorskip("skimage")
    peer = bench.load_peers()[name]
    setting = bench.choose(peer, [discs(bench, 4, 1), discs(bench, 9, 2)])
    assert setting in peer.settings
    tests = [discs(bench, number, 5 + number) for number in (1, 6, 14)]
    answers = [peer.point(peer.see(asked.image, asked.boxes), *setting) for asked in tests]
    scores = bench.score(answers, tests)
    assert scores["exact_match"] == scores["f1"] == 1
    assert scores["location_error"] < 4
    assert scores["guess_mae"] == pytest.approx((5 + 0 + 8) / 3)


def test_peers_beside_ours_and_alone(bench, tmp_path, capsys, monkeypatch):
    pytest.importorskip("cv2")
    pytest.importorskip("skimage")
    monkeypatch.setattr(bench, "Ours", Thrice)
    few = ("--images", "2", "--validation-images", "1")
    results = run(bench, tmp_path, "peers", "any", *few)
    assert list(results) == [f"{a}, {b}" for a in ("plain", "textured") for b in ("alone", "among others")]
    for figures in results.values():
        assert list(figures) == ["ours", "threshold, labels", "threshold, peaks", "template"]
        assert all(row["images"] == 2 and row["ms"] >= 0 for row in figures.values())
    alone = run(bench, tmp_path, "peers", *few)
    assert "ours" not in alone["plain, alone"]
    templates = [part["plain, alone"]["template"] for part in (results, alone)]
    assert templates[0] | {"ms": 0} == templates[1] | {"ms": 0}
    assert "| textured, among others | template |" in capsys.readouterr().out


def test_peers_that_are_missing_are_named(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert bench.main(["peers", "--images", "1", "--output", str(tmp_path / "none.json")]) == 1
    assert "pip install" in capsys.readouterr().err


def test_photographs(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "Ours", Thrice)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    for name in bench.PHOTOGRAPHED.values():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (60, 40), "red").save(tmp_path / name)
    rows = run(
        bench, tmp_path, "photographs", "any", "--stamps", str(tmp_path), "--pictures", str(tmp_path / "drawn")
    )  # fmt: skip
    assert [row["category"] for row in rows] == list(bench.PHOTOGRAPHED)
    assert {row["counted"] for row in rows} == {3}
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == [row["picture"] for row in rows]
    printed = capsys.readouterr()
    assert "going on without coins" in printed.err
    assert "going on without nuclei" in printed.err
    assert f"of {len(rows)} right" in printed.out
    assert list(bench.pictures_of(tmp_path / "nowhere", 0)) == []


def test_stamps_lie_apart(bench):
    from scipy import ndimage

    stamp = Image.new("RGBA", (60, 40), "black")
    for number in (1, 2, 7, 20):
        image = bench.compose(stamp, number, random.Random(number))
        assert image.size == (224, 224)
        dark = np.asarray(image.convert("L")) < 60
        labelled: Any = ndimage.label(dark)
        assert 1 <= labelled[1] <= number  # two may touch
        assert dark.sum() > number * 100


def test_nuclei_are_counted_in_the_quarter_that_has_their_centre(bench, tmp_path):
    labels = np.zeros((40, 60), np.uint16)
    for label, (x, y) in enumerate([(3, 3), (22, 4), (28, 10), (45, 30)], 1):
        labels[y - 2 : y + 3, x - 2 : x + 3] = label  # the third lies across the middle
    Image.fromarray(labels * 50).save(tmp_path / "img2d.tif")
    Image.fromarray(labels).save(tmp_path / "mask2d.tif")
    pictures = list(bench.nuclei(tmp_path))
    assert [picture.count for picture in pictures] == [4, 3, 0, 0, 1]
    assert [picture.image.size for picture in pictures] == [(60, 40), *4 * [(30, 20)]]


def test_coins_are_there(bench, tmp_path):
    pytest.importorskip("skimage")
    coins = next(bench.pictures_of(tmp_path / "nowhere", 0))
    assert (coins.source, coins.image.mode, coins.count) == ("coins", "RGB", 24)


def test_cost(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "Ours", Thrice)
    results = run(bench, tmp_path, "cost", "any", "--rounds", "1")
    names = list(results)
    assert names[2:4] == ["20 objects, marked in memory", "20 objects, marked in image"]
    assert all(row["ms"] >= 0 for row in results.values())
    assert [row["counted"] for row in results.values()] == [3, 3, 3, 3, 15]
    ours = Thrice("any")
    bench.cost(ours, 1, 0)
    assert set(ours.marked) == {"memory", "image"}
    assert ours.marked[-1] == "memory"


def test_a_model_is_called_as_the_pipeline_is(bench, monkeypatch):
    asked = []

    def pipeline(task: str, **options: Any):
        def call(**inputs: Any) -> Any:
            asked.append((task, options["model"], inputs["category"]))
            found = {"category": "cats", "count": 1, "points": [{"x": 3.5, "y": 4.0, "score": 0.9}], "tiled": False}
            return [found] if isinstance(inputs["category"], list) else found

        return call

    monkeypatch.setattr(bench, "pipeline", pipeline)
    monkeypatch.setattr(bench, "resolve", lambda model: model)
    assert bench.Ours("some/model")(Image.new("RGB", (9, 9)), "cats") == [(3.5, 4.0)]
    assert bench.Ours("some/model").number_each(Image.new("RGB", (9, 9)), ("cats",)) == [1]
    assert asked == [("object-counting", "some/model", "cats"), ("object-counting", "some/model", ["cats"])]


def test_a_model_must_be_named(bench):
    for what in ("photographs", "cost"):
        with pytest.raises(SystemExit):
            bench.main([what])


def test_sample_scenes_have_their_points(root: Path):
    folder = root / "samples" / "counting"
    assert validate_points(folder) == []
    told = [json.loads(line) for line in (folder / "points.jsonl").read_text().splitlines()]
    assert len(told) == 8
    assert all(row["count"] == len(row["points"]) for row in told)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 300_000
