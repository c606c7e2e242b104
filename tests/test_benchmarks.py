"""The benchmarks run, on a tiny model and a few images, and write what they measured."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file

from regard.configuration.configuration_image_text_slot import SECOND_LOOK
from regard.data.rendered_text import FONTS_TABLE, SPLITS, TIERS
from regard.modeling.modeling_image_text_slot import ImageTextSlotModel


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with Pillow's own font under the name of a font of each split, so that none need be installed."""
    folder = tmp_path_factory.mktemp("fonts")
    own = ImageFont.load_default(10)
    assert isinstance(own, ImageFont.FreeTypeFont)
    table = json.loads(FONTS_TABLE.read_text("utf-8"))
    for split in SPLITS:
        name = next(row["files"][0] for row in table if row["split"] == split)
        (folder / name).write_bytes(own.font_bytes)
    return str(folder)


@pytest.fixture
def run(root: Path, fonts: str, tmp_path: Path):
    """A function that runs a script of benchmarks/ and returns its process and the figures that it wrote."""

    def run(script: str, *arguments: object, path: str = os.environ["PATH"]):
        output = tmp_path / "results" / "figures.json"
        command = [sys.executable, str(root / "benchmarks" / script), *map(str, arguments), "--output", str(output)]
        environment = {**os.environ, "REGARD_FONTS_DIR": fonts, "PATH": path}
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
        return done, json.loads(output.read_text("utf-8")) if output.exists() else None

    return run


@pytest.fixture(scope="module")
def peers():
    """The module benchmarks/peers.py."""
    spec = importlib.util.spec_from_file_location("peers", Path(__file__).parents[1] / "benchmarks" / "peers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reading_is_measured_in_every_tier(run, tiny_checkpoint: Path):
    done, report = run(
        "read.py", "--model", tiny_checkpoint, "--beside", f"as_described={tiny_checkpoint}", "--skip-peers",
        "--images", 2, "--timed-images", 2, "--rounds", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    name = tiny_checkpoint.name
    readers = [name, *([f"{name}, bfloat16"] if f"{name}, bfloat16" in report["models"] else []), "as_described"]
    assert list(report["results"]) == list(TIERS)
    for tier, systems in report["results"].items():
        assert list(systems) == readers
        assert f"| {tier} | {name} |" in done.stdout
        for figures in systems.values():
            assert figures["images"] == 2
            assert 0 <= figures["character_accuracy"] <= 1
            assert list(figures["cpu_ms"]) == ["1", "32"]
            assert all(0 < value < math.inf for value in (*figures["cpu_ms"].values(), figures["gflop"]))
            polarities = [part["images"] for part in (figures["dark_on_light"], figures["light_on_dark"]) if part]
            assert sum(polarities) == 2
        assert systems[name]["cer"] == systems["as_described"]["cer"]
    for cost in report["cost_by_length"].values():
        assert cost["16"]["characters"] < cost["256"]["characters"]
    assert report["seed"] == 0
    assert report["command"].startswith("python benchmarks/read.py --model ")
    assert report["versions"]["torch"]
    assert report["machine"]["threads"] == 1


def test_a_peer_that_is_missing_is_named_with_its_mend_and_left_out(run, tiny_checkpoint: Path):
    done, report = run(
        "read.py", "--model", tiny_checkpoint, "--tiers", "line", "--images", 1, "--rounds", 1, path=""
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "going on without tesseract" in done.stderr
    assert "apt-get install --no-install-recommends tesseract-ocr" in done.stderr
    assert list(report["results"]) == ["line"]
    assert "tesseract" not in report["results"]["line"]
    if importlib.util.find_spec("rapidocr") is None:
        assert "pip install" in done.stderr
    else:
        assert report["results"]["line"]["rapidocr 128"]["character_accuracy"] > 0.5


def test_a_model_or_a_tier_that_is_not_there_is_named(run, tmp_path: Path):
    done, report = run("read.py", "--model", tmp_path / "none", "--skip-peers")
    assert (done.returncode, report) == (1, None)
    assert "none: no such folder" in done.stderr
    done, report = run("read.py", "--tiers", "line,lines")
    assert (done.returncode, report) == (2, None)
    assert "there is no lines" in done.stderr


def test_throughput_of_training_is_measured(run):
    done, report = run("train_throughput.py", "--preset", "tiny", "--steps", 1, "--only", "before")
    assert done.returncode == 0, done.stderr
    assert report["settings"]["before"]["images_per_second"] > 0
    assert "| before | sdpa | 1 x 2 | mixed | mapped afresh |" in done.stdout


def test_polarity_is_seen_in_the_pixels(peers):
    noise = np.random.default_rng(0).normal(0, 10, (128, 128))
    for ground, ink in ((10, 100), (120, 220), (150, 255)):
        for dark, light in ((ground, ink), (ink, ground)):
            image = Image.new("L", (128, 128), dark)
            ImageDraw.Draw(image).text((10, 50), "text", fill=light, font=ImageFont.load_default(12))
            noisy = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
            assert peers.is_light_on_dark(image) == peers.is_light_on_dark(noisy) == (light > dark)


def test_texts_are_put_in_reading_order(peers):
    def box(left: int, top: int) -> np.ndarray:
        return np.array([[left, top], [left + 20, top], [left + 20, top + 8], [left, top + 8]])

    boxes = [box(40, 1), box(0, 9), box(40, 8), box(5, 0), box(0, 18)]
    assert peers.in_reading_order(boxes, ["b", "c", "d", "a", "e"]) == "a b\nc d\ne"


def test_weights_are_averaged_by_their_shares(root: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(root / "benchmarks")
    average = importlib.import_module("average_weights")
    other = ImageTextSlotModel.from_pretrained(tiny_checkpoint)
    torch.nn.init.normal_(other.slots)
    other.save_pretrained(tmp_path / "other")
    for file in tiny_checkpoint.glob("*.json"):
        if file.name != "config.json":
            shutil.copy(file, tmp_path / "other")
    models = [f"{tiny_checkpoint}=3", str(tmp_path / "other")]
    assert average.main([*models, "--save", str(tmp_path / "mean")]) == 0
    first, second, mean = (
        load_file(f / "model.safetensors") for f in (tiny_checkpoint, *map(tmp_path.joinpath, ("other", "mean")))
    )
    assert mean["slots"].dtype == torch.float32
    for name, weight in mean.items():
        torch.testing.assert_close(weight, 0.75 * first[name].float() + 0.25 * second[name].float())
    assert (tmp_path / "mean" / "processor_config.json").is_file()
    assert average.main([*models, "image-text-slot-5m", "--save", str(tmp_path / "none")]) == 1
    assert "image-text-slot-5m: its weights have other names or shapes" in capsys.readouterr().err
    assert average.main([str(tmp_path / "nowhere"), "--save", str(tmp_path / "none")]) == 1
    for wrong in ("a=0", "a=b", "a=-1", "a=nan", "a=inf"):
        with pytest.raises(SystemExit):
            average.main([wrong, "--save", str(tmp_path / "none")])


def test_the_counter_is_calibrated_and_saved(root: Path, fonts: str, tiny_checkpoint: Path, tmp_path: Path):
    script = str(root / "benchmarks" / "calibrate_counter.py")
    arguments = [str(tiny_checkpoint), "--tiers", "line", "--images", "2", "--save", str(tmp_path / "saved")]
    environment = {**os.environ, "REGARD_FONTS_DIR": fonts}
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr
    shift, weights = re.findall(r"right: (-?[\d.]+)\. Second look: (None|{.*}),", done.stdout)[0]
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_checkpoint, tmp_path / "saved"))
    change = after["counter.presence.bias"].float() - before["counter.presence.bias"].float()
    assert change.item() == pytest.approx(float(shift), abs=1e-2)
    assert after["slots"].dtype == torch.float16
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["counter_config"]["second_look"]
    assert str(saved) == weights


def test_the_second_look_learns_which_reading_to_keep(root: Path, monkeypatch):
    monkeypatch.syspath_prepend(root / "benchmarks")
    fit = importlib.import_module("calibrate_counter").fit
    torch.manual_seed(0)
    features = torch.randn(400, 6)
    labels = (features @ torch.tensor([1.0, 2.0, 0.0, -3.0, 0.0, 0.0]) > 1).float()
    fitted = fit(features, labels)
    assert tuple(fitted) == SECOND_LOOK
    *weights, bias = fitted.values()
    assert weights[3] < 0 < weights[0] < weights[1]
    assert abs(weights[2]) < 0.5
    assert bias < 0
    assert fit(features, torch.zeros(400)) is None
