"""Several processes: one and two learn the same, by DDP and by FSDP2; the files for accelerate are well-formed."""

import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from launched import make
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer_base import make_trainer as make_base_trainer
from test_trainer_qavit import make_trainer as make_qavit_trainer
from transformers import AutoModel, AutoModelForImageClassification, Trainer

KINDS = (
    "image_text_slot",
    "qavit",
    "qavit_without_average",
    "query_conditioned_vqa",
    "sequential_attention_counting",
)
SHARDED_KINDS = tuple(name for name in KINDS if name != "qavit")  # averages are of whole weights
RESUMED_KINDS = ("image_text_slot", "muon", "adapters")
TIMES = ("runtime", "per_second")  # ends of the names of what no two runs share


def launch(root: Path, folder: Path, arguments: list[str], *launcher: str, **environment) -> Path:
    """The folder in which tests/launched.py leaves what came of all trainers."""
    command = [sys.executable, *launcher, str(root / "tests/launched.py"), *arguments]
    environment |= {"OMP_NUM_THREADS": "1", "TENSORBOARD_LOGGING_DIR": str(folder / "logs")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    return launch(root, folder, [str(folder), "4", *KINDS])


@pytest.fixture(scope="module")
def pair(root, tmp_path_factory) -> Path:
    folder, launcher = tmp_path_factory.mktemp("pair"), ("-m", "torch.distributed.run", "--standalone")
    return launch(root, folder, [str(folder), "2", *KINDS], *launcher, "--nproc_per_node", "2")


def launch_sharded(root: Path, folder: Path, arguments: list[str], precision: str = "no") -> Path:
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(root / "trainers/accelerate/fsdp2.yaml"))
    launcher += ("--num_processes", "2", "--mixed_precision", precision, "--main_process_port", "0")
    return launch(root, folder, arguments, *launcher, ACCELERATE_USE_CPU="true")


@pytest.fixture(scope="module")
def sharded(root, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    return launch_sharded(root, folder, [str(folder), "2", *dict.fromkeys((*SHARDED_KINDS, *RESUMED_KINDS))])


@pytest.fixture(scope="module")
def resumed(root, sharded, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    return launch_sharded(root, folder, ["--from", str(sharded), str(folder), "2", *RESUMED_KINDS])


def result(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name / "result.json").read_text())


def of_processes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("process-*.json"))]


def log(folder: Path, name: str) -> list[dict[str, float]]:
    """What was logged of the three steps and of the evaluation after them, but for times."""
    entries = result(folder, name)["log"][:4]
    assert [set(entry) >= {"loss", "grad_norm"} for entry in entries] == [True, True, True, False]
    assert "eval_loss" in entries[3]
    return [{key: value for key, value in entry.items() if not key.endswith(TIMES)} for entry in entries]


def assert_learned_alike(name: str, folder: Path, other: Path) -> None:
    for entry, expected in zip(log(folder, name), log(other, name), strict=True):
        assert entry == pytest.approx(expected, rel=1e-4, abs=1e-5)
    weights, expected = (load_file(path / name / "model.safetensors") for path in (folder, other))
    assert weights.keys() == expected.keys()
    for key, value in weights.items():  # AdamW makes much of the rounding of a gradient that is next to nothing
        torch.testing.assert_close(value, expected[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_learn_as_one_with_batches_of_twice_the_size(alone, pair, name):
    assert_learned_alike(name, pair, alone)
    assert len(of_processes(pair)) == 2


@pytest.mark.parametrize("name", KINDS)
def test_scores_and_losses_count_each_sample_once(alone, pair, name):
    """Seven samples make eight in two processes with batches of two: the first of them fills up the last batch."""
    metrics, expected = (result(folder, name)["larger_batches"] for folder in (pair, alone))
    same = [key for key in expected if not key.endswith(TIMES)]
    assert "eval_loss" in same
    assert len(same) > 2
    assert {key: metrics[key] for key in same} == pytest.approx({key: expected[key] for key in same}, rel=1e-4)


def test_streams_are_shared_out_without_overlap(alone, pair):
    first, second = of_processes(pair)
    for shards in ("1", "4"):
        assert len(first["rows"][shards]) == len(second["rows"][shards]) == 4
        assert sorted(first["rows"][shards] + second["rows"][shards]) == list(range(8))
    assert first["stream"] == pytest.approx(of_processes(alone)[0]["stream"], rel=1e-4)


def test_a_loss_that_one_process_lacks_is_the_mean_of_the_others(alone, pair):
    assert [own["means"] for own in of_processes(pair)] == 2 * [{"both": 1.0, "last": 1.0}]
    assert of_processes(alone)[0]["means"] == {"both": 1.0}


def test_each_process_augments_in_its_own_way(pair):
    first, second = of_processes(pair)
    assert all(first[name]["noise"] != second[name]["noise"] for name in KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_models_are_written_once(pair, name):
    for folder in (pair / name, pair / name / "checkpoint-3"):
        state = json.loads((folder / "trainer_state.json").read_text())
        assert sum("loss" in entry for entry in state["log_history"]) == 3
        assert (folder / "model.safetensors").is_file()
    assert len(list(pair.glob(f"{name}/checkpoint-3/training_random_state_*"))) == 2  # each process has one of its own


def test_logs_are_written_once(pair):
    logs = [EventAccumulator(str(path)).Reload() for path in pair.glob("logs/**/events*")]
    steps = [len(events.Scalars("train/loss")) for events in logs if "train/loss" in events.Tags()["scalars"]]
    assert sum(steps) == 3 * (len(KINDS) + 1)  # the stream's too


@pytest.mark.parametrize("name", SHARDED_KINDS)
def test_sharded_weights_learn_as_whole_ones(alone, sharded, name):
    assert result(sharded, name)["sharded"]
    assert_learned_alike(name, sharded, alone)
    auto_class = AutoModelForImageClassification if name.startswith("qavit") else AutoModel
    model: Any = auto_class.from_pretrained(sharded / name / "checkpoint-3")
    weights = load_file(sharded / name / "model.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_sharded_weights_learn_in_bfloat16(alone, root, tmp_path):
    """Outputs come in bfloat16, too, also in a process whose images have no boxes."""
    launch_sharded(root, tmp_path, [str(tmp_path), "2", "query_conditioned_vqa"], "bf16")
    first, expected = (log(folder, "query_conditioned_vqa")[0] for folder in (tmp_path, alone))
    assert {"loss_answer", "loss_relevance"} <= expected.keys()
    assert first == pytest.approx(expected, rel=0.05)
    assert len(of_processes(tmp_path)) == 2


@pytest.mark.parametrize("name", RESUMED_KINDS)
def test_a_resumed_training_of_sharded_weights_ends_as_one_in_one_go(sharded, resumed, name):
    file = "adapter_model.safetensors" if name == "adapters" else "model.safetensors"
    weights, half = load_file(sharded / name / file), load_file(sharded / name / "checkpoint-2" / file)
    for folder, expected in ((".", weights), ("best", half), ("restored", half)):
        again = load_file(resumed / name / folder / file)
        assert again.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in again.items())
    assert any(not torch.equal(value, half[key]) for key, value in weights.items())


def test_a_training_of_sharded_weights_goes_on_in_one_process(sharded, tmp_path):
    trainer = make("query_conditioned_vqa", tmp_path, 4, eval_strategy="no")
    trainer.train(resume_from_checkpoint=str(sharded / "query_conditioned_vqa/checkpoint-2"))
    weights = load_file(sharded / "query_conditioned_vqa/model.safetensors")
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, weights[name], atol=1e-4, rtol=1e-4)


def test_sharded_trainings_write_no_pickle(sharded, resumed):
    files = [path for folder in (sharded, resumed) for path in folder.rglob("*") if path.is_file()]
    files = [path for path in files if "tfevents" not in path.name]
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}
    for path in files:
        if path.suffix == ".safetensors":
            load_file(path)
        else:
            path.read_text(encoding="utf-8")


def test_processes_end_while_a_message_is_being_let_go_of(tmp_path):
    """Without the pause in `end_process_group` nearly each of these runs is aborted."""
    script = """
        import sys, time, torch, torch.distributed as dist
        from accelerate import PartialState
        from regard.processes import end_process_group

        PartialState(cpu=True).wait_for_everyone()
        group = dist.group.WORLD  # sharded models hold on to it, too
        sys.setswitchinterval(100)  # seconds for which no other thread gets the interpreter
        dist.all_gather([torch.zeros(2) for _ in range(2)], torch.ones(2), async_op=True)
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            pass
        end_process_group()
        assert not dist.is_initialized()
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    command = [sys.executable, *launcher, str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]


class Launched:
    """accelerate's state, with the plugin of a launch that cannot be made here."""

    def __init__(self, state: Any, **plugin: Any):
        vars(self).update(plugin, state=state)

    def __getattr__(self, name):
        return getattr(self.state, name)


def shard_by(monkeypatch, name: str, plugin: Any) -> None:
    """Let trainers find that they are launched with FSDP or DeepSpeed."""
    create = Trainer.create_accelerator_and_postprocess

    def create_as_launched(self):
        create(self)
        setattr(self, f"is_{name}_enabled", True)
        self.accelerator.state = Launched(self.accelerator.state, **{f"{name}_plugin": plugin})

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create_as_launched)


def deepspeed(stage: int, gathers: bool) -> Any:
    settings = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": gathers}
    return SimpleNamespace(deepspeed_config={"zero_optimization": settings})


def test_what_needs_whole_weights_is_refused_where_they_are_sharded(tmp_path, monkeypatch):
    shard_by(monkeypatch, "deepspeed", deepspeed(2, False))
    trainer = make_base_trainer(tmp_path, muon_learning_rate=1e-3)
    with pytest.raises(ValueError, match="muon_learning_rate"):
        trainer.create_optimizer()
    with pytest.raises(ValueError, match="ema_decay"):
        make_qavit_trainer(tmp_path, load_best_model_at_end=False)


def test_deepspeed_pickles_nothing(tmp_path, monkeypatch, caplog):
    """Its engine cannot be run here: what is left of a checkpoint is what `Trainer` saves with `save_only_model`."""
    shard_by(monkeypatch, "deepspeed", deepspeed(3, True))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert make_base_trainer(tmp_path).args.save_only_model
    assert "checkpoints hold weights only" in caplog.text
    trainer = make_base_trainer(tmp_path, save_strategy="no")
    assert caplog.text.count("checkpoints hold weights only") == 1
    for go_on in (trainer.train, trainer.restore):
        with pytest.raises(ValueError, match=r"init_from\), or launch with FSDP2"):
            go_on(str(tmp_path))
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        make_base_trainer(tmp_path, load_best_model_at_end=True, eval_strategy="steps")
    shard_by(monkeypatch, "deepspeed", deepspeed(3, False))
    with pytest.raises(ValueError, match="zero3_save_16bit_model"):
        make_base_trainer(tmp_path)


def test_fsdp_1_is_refused(tmp_path, monkeypatch):
    shard_by(monkeypatch, "fsdp", SimpleNamespace(fsdp_version=1))
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        make_base_trainer(tmp_path)


# The files for `accelerate launch`.


def read_launch_file(root: Path, name: str, *flags: str) -> tuple[Any, Any]:
    """What `accelerate launch` makes of a file; it leaves keys that it does not know where nothing reads them."""
    parser = launch_command_parser()
    path = str(root / "trainers/accelerate" / name)
    options = parser.parse_args(["--config_file", path, *flags, "-m", "regard.train", "my.yaml"])
    options, defaults, _ = _validate_launch_command(options)
    known = {action.dest for action in parser._actions}
    assert known >= {*(defaults.fsdp_config or ()), *(defaults.deepspeed_config or ())}
    return options, defaults


def test_every_launch_file_is_tested(root):
    names = {path.name for path in (root / "trainers/accelerate").iterdir()}
    assert names == {"ddp.yaml", "fsdp2.yaml", "deepspeed_zero2.yaml", "deepspeed_zero3.yaml", "multi_node.yaml"}


def test_ddp(root):
    options, defaults = read_launch_file(root, "ddp.yaml")
    assert defaults.distributed_type == DistributedType.MULTI_GPU
    assert (options.multi_gpu, options.num_processes, options.mixed_precision) == (True, 8, "bf16")
    prepare_multi_gpu_env(options)
    assert options.nproc_per_node == "8"


def test_fsdp2(root, monkeypatch):
    options, _ = read_launch_file(root, "fsdp2.yaml")
    assert (options.use_fsdp, options.num_processes) == (True, 8)
    for name, value in prepare_multi_gpu_env(options).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    assert not plugin.cpu_ram_efficient_loading


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(root, monkeypatch, stage):
    options, defaults = read_launch_file(root, f"deepspeed_zero{stage}.yaml")
    assert (options.use_deepspeed, options.num_processes) == (True, 8)
    options.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)  # as the command does
    for name, value in prepare_deepspeed_cmd_env(options)[1].items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    settings: Any = plugin.deepspeed_config
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["gradient_accumulation_steps"] == settings["gradient_clipping"] == "auto"
    assert settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is (stage == 3)
    assert not plugin.zero3_init_flag


def test_multi_node(root):
    options, _ = read_launch_file(root, "multi_node.yaml", "--machine_rank", "3", "--main_process_ip", "10.0.0.1")
    prepare_multi_gpu_env(options)
    assert (options.nnodes, options.nproc_per_node, options.node_rank) == ("8", "8", 3)
    assert (options.rdzv_backend, options.rdzv_endpoint) == ("static", "10.0.0.1:29500")


def test_a_misspelt_key_of_a_launch_file_is_found(root, tmp_path):
    text = (root / "trainers/accelerate/fsdp2.yaml").read_text()
    (tmp_path / "trainers/accelerate").mkdir(parents=True)
    for right, wrong, error in (
        ("fsdp_state_dict_type", "fsdp_state_dictt_type", AssertionError),
        ("num_machines", "num_machine", ValueError),
    ):
        (tmp_path / "trainers/accelerate/fsdp2.yaml").write_text(text.replace(right, wrong))
        with pytest.raises(error):
            read_launch_file(tmp_path, "fsdp2.yaml")
