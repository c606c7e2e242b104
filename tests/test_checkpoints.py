"""Checkpoints of a training: exact, without pickles, recognised when half-written; kills lose nothing."""

import json
import pickle
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from regard.hub import CheckpointError, load
from regard.train import SettingsError, find_checkpoint, main, parse_settings
from regard.trainers import checkpoints

KILLED_WHILE_SAVING = """
import os, signal, sys
from regard.train import main
from regard.trainers import checkpoints

class Half:
    def __init__(self, write, killed_in):
        self.write, self.killed_in, self.calls = write, killed_in, 0

    def __call__(self, state, path):
        self.write(state, path)
        self.calls += 1
        if self.calls == self.killed_in:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

checkpoints.save_state = Half(checkpoints.save_state, int(sys.argv[1]))
main(sys.argv[2:])
"""


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def flags(tmp_path: Path):
    """A function that gives the flags of a training of four steps on generated images, saved after each."""

    def flags(name: str) -> list[str]:
        text = (
            "--preset tiny --max_steps 4 --per_device_train_batch_size 2 --use_cpu --dataloader_num_workers 0 "
            "--save_strategy steps --save_steps 1 --save_total_limit 2 --eval_strategy no --tiers line=1 "
            "--muon_learning_rate 1e-3 --augment_brightness 0.1 --resume_from_checkpoint true --logging_steps 1"
        )
        return [*text.split(), "--output_dir", str(tmp_path / name)]

    return flags


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Sums depend on the number of threads, here and in processes that are started."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def whole(flags, tmp_path: Path) -> Path:
    """The folder of a training that nothing has stopped."""
    assert main(flags("whole")) == 0
    return tmp_path / "whole"


def assert_equal_weights(first: Path, second: Path) -> None:
    ours, others = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert ours.keys() == others.keys()
    for name, value in ours.items():
        assert torch.equal(value, others[name]), name


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {
        "state": {0: {"step": torch.tensor(3.0), "momentum": torch.randn(2, 3)}, 1: {}},
        "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "params": [0, 1], "foreach": None, "use": True}],
        "half": torch.ones(2, dtype=torch.bfloat16),
        "name": "ünder",
        "convolution": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    checkpoints.save_state(state, tmp_path / "state.safetensors")
    again = checkpoints.load_state(tmp_path / "state.safetensors")
    assert torch.equal(again["state"][0].pop("momentum"), state["state"][0].pop("momentum"))
    assert again["convolution"].stride() == state["convolution"].stride()
    assert torch.equal(again.pop("convolution"), state.pop("convolution"))
    assert again["half"].dtype == torch.bfloat16
    assert repr(again) == repr(state)
    with pytest.raises(TypeError, match="holds a Malicious"):
        checkpoints.save_state({"step": Malicious(tmp_path)}, tmp_path / "state.safetensors")


def test_random_generators_go_on_where_they_were(tmp_path):
    def draw():
        return random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()  # noqa: NPY002

    np.random.randn()  # noqa: NPY002  # the generator now remembers a second number
    checkpoints.save_state(checkpoints.random_states(), tmp_path / "state.safetensors")
    drawn = draw()
    assert draw() != drawn
    checkpoints.set_random_states(checkpoints.load_state(tmp_path / "state.safetensors"))
    assert draw() == drawn


def test_what_is_half_written_is_recognised(tmp_path):
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "inner").mkdir(parents=True)
        (folder / "weights").write_bytes(bytes(100))
        (folder / "inner/part").write_bytes(bytes(10))
    old, new = (str(tmp_path / f"checkpoint-{step}") for step in (9, 10))
    assert checkpoints.find_newest(tmp_path)[0] is None
    checkpoints.seal(old)
    newest, skipped = checkpoints.find_newest(tmp_path)
    assert (newest, list(skipped)) == (old, [new])
    assert "is missing" in skipped[new]
    checkpoints.seal(new)
    assert checkpoints.find_newest(tmp_path) == (new, {})
    (tmp_path / "checkpoint-10/weights").write_bytes(bytes(50))
    assert checkpoints.find_newest(tmp_path) == (old, {new: "weights has 50 of 100 bytes"})
    (tmp_path / "checkpoint-10/weights").unlink()
    assert checkpoints.fault(new) == "weights is missing"
    (tmp_path / "checkpoint-9" / checkpoints.MANIFEST_NAME).write_text('{"files":', encoding="utf-8")
    assert "cannot be read" in str(checkpoints.fault(old))
    checkpoints.unseal(old)
    assert checkpoints.find_newest(tmp_path)[0] is None
    assert checkpoints.find_newest(tmp_path / "absent") == (None, {})


@pytest.mark.parametrize("killed_in", [3, 4])  # optimizer, random generators, optimizer of step 2, generators of step 2
def test_a_run_killed_while_saving_ends_as_one_that_was_not(flags, whole, tmp_path, capsys, killed_in):
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(killed_in), *flags("killed")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -9
    half = tmp_path / "killed/checkpoint-2"
    assert half.is_dir()
    assert not (half / checkpoints.MANIFEST_NAME).exists()
    with pytest.raises(SettingsError, match=r"checkpoint-2 is half-written: .* give another"):
        find_checkpoint(parse_settings([*flags("killed"), "--resume_from_checkpoint", str(half)])[3])
    capsys.readouterr()
    assert main(flags("killed")) == 0
    assert f"{half} is half-written and skipped" in capsys.readouterr().err
    assert_equal_weights(whole, tmp_path / "killed")
    assert [path.name for path in sorted((tmp_path / "killed").glob("checkpoint-*"))] == [
        "checkpoint-3",
        "checkpoint-4",
    ]


def test_a_run_killed_before_its_model_was_saved_saves_it(flags, whole, tmp_path, capsys):
    killed = shutil.copytree(whole, tmp_path / "killed")
    (killed / "model.safetensors").unlink()
    (killed / "training_end.json").write_text('{"global', encoding="utf-8")
    assert main(flags("killed")) == 0
    assert_equal_weights(whole, killed)
    assert json.loads((killed / "trainer_state.json").read_text())["global_step"] == 4
    assert main(flags("killed")) == 0
    assert "nothing is left to train" in capsys.readouterr().out


def test_a_checkpoint_without_the_optimizer_cannot_go_on(flags, whole):
    newest, _ = checkpoints.find_newest(whole)
    for name in (checkpoints.STATE_NAME, checkpoints.MANIFEST_NAME):
        Path(str(newest), name).unlink()
    checkpoints.seal(str(newest))
    with pytest.raises(FileNotFoundError, match="init_from"):
        main([*flags("whole"), "--max_steps", "5"])


def test_no_pickle_is_written_and_none_is_read(flags, whole, tmp_path):
    files = [path for path in whole.rglob("*") if path.is_file()]
    assert {path.suffix for path in files if "tfevents" not in path.name} == {".json", ".md", ".safetensors"}
    newest = Path(str(checkpoints.find_newest(whole)[0]))
    planted = ("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt")
    for folder in (newest, whole):
        for name in planted:
            (folder / name).write_bytes(pickle.dumps(Malicious(tmp_path / "owned")))
    assert main([*flags("whole"), "--max_steps", "5"]) == 0
    assert not (tmp_path / "owned").exists()
    pickle.loads((newest / planted[0]).read_bytes())
    assert (tmp_path / "owned").exists()  # they would have


@pytest.mark.parametrize(
    ("verb", "fixture"),
    [("read", "tiny_checkpoint"), ("classify", "tiny_classifier"), ("ask", "tiny_vqa"), ("count", "tiny_counter")],
)
def test_malicious_weights_and_processors_run_nothing(request, tmp_path, monkeypatch, verb, fixture):
    folder = shutil.copytree(request.getfixturevalue(fixture), tmp_path / "model")
    owned = tmp_path / "owned"
    (folder / "evil.py").write_text(f"open({str(owned)!r}, 'w')\nEvil = None\n", encoding="utf-8")
    for path in folder.glob("*processor_config.json"):
        settings = json.loads(path.read_text())
        settings["auto_map"] = {"AutoProcessor": "evil.Evil", "AutoImageProcessor": "evil.Evil"}
        path.write_text(json.dumps(settings))
    for name in ("processor.pkl", "preprocessor.bin", "tokenizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(Malicious(owned)))
    monkeypatch.setattr("builtins.input", lambda _: "n")  # where transformers asks whether it may run the code
    with suppress(CheckpointError):
        load(folder, verb)
    (folder / "model.safetensors").unlink()
    torch.save({"weights": Malicious(owned)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="model"):
        load(folder, verb)
    with pytest.raises(pickle.UnpicklingError):
        AutoModel.from_pretrained(folder)
    assert not owned.exists()
