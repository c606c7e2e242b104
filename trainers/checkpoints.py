"""Checkpoints of a training: complete or recognised as not, and without a pickle.

The stock trainer writes what an optimizer, a scheduler and random generators remember by `torch.save`, which pickles,
and takes the folder with the highest number for the newest checkpoint, however it ended. Here that state is written as
safetensors, and a checkpoint is complete when a manifest, written last and at once, says how large each file is.
"""

import copy
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, rotate_checkpoints, sort_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME, PushInProgress, logging
from transformers.utils.hub import hf_api

from regard.export import NOT_OF_CHECKPOINTS

logger = logging.get_logger(__name__)

# None of them belongs to a model that is exported or pushed, which is known by how their names begin.
MANIFEST_NAME = "training_manifest.json"
STATE_NAME = "training_state.safetensors"
RANDOM_STATE_NAME = "training_random_state_{process}.safetensors"
ARGUMENTS_NAME = "training_args.json"


def save_state(state: Any, path: str | Path) -> None:
    """Write tensors, numbers, strings and None in dicts, lists and tuples.

    Raises:
        TypeError: there is something else among them.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = _take_apart(state, tensors)
    save_file(tensors, path, {"structure": json.dumps(structure)})


def load_state(path: str | Path) -> Any:
    """Read what `save_state` wrote; the tensors are on the CPU.

    Raises:
        safetensors.SafetensorError: the file is damaged.
    """
    with safe_open(path, "pt") as file:
        return _put_together(json.loads(file.metadata()["structure"]), file)


def _take_apart(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A structure for JSON; containers and tensors become objects of one key, which names their kind."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": [name, value.stride()]}
    if isinstance(value, dict):  # as pairs, for JSON would make strings of keys that are numbers
        return {"dict": [[key, _take_apart(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [_take_apart(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"training state holds a {type(value).__name__}, which safetensors and JSON cannot")


def _put_together(value: Any, file: Any) -> Any:
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    match kind:
        case "tensor":  # fused optimizers take it for granted that state is laid out in memory as its parameter
            tensor = file.get_tensor(content[0])
            return torch.empty_strided(tensor.shape, content[1], dtype=tensor.dtype).copy_(tensor)
        case "dict":
            return {key: _put_together(item, file) for key, item in content}
        case "tuple":
            return tuple(_put_together(item, file) for item in content)
    return [_put_together(item, file) for item in content]


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's random generators, for `save_state`."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Go on where `random_states` was taken; of other GPUs than there were then, those that are there now."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["cpu"])
    for index, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, index)


def gather(value: Any, keep: bool) -> Any:
    """A sharded tensor whole, on the CPU of the processes that keep it; all call this. Anything else as it is."""
    if not isinstance(value, DTensor):
        return value
    whole = value.to(value.device_mesh.device_type).full_tensor()
    return whole.cpu() if keep else None


def shard_as(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A whole tensor, sharded as another is, if it is; all processes call it."""
    return distribute_tensor(value, other.device_mesh, other.placements) if isinstance(other, DTensor) else value


def unseal(folder: str | Path) -> None:
    """Mark a checkpoint as incomplete, before it is written."""
    Path(folder, MANIFEST_NAME).unlink(missing_ok=True)


def seal(folder: str | Path) -> None:
    """Mark a checkpoint as complete, after all of it is written."""
    folder = Path(folder)
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    half = folder / f".{MANIFEST_NAME}"
    half.write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    os.replace(half, folder / MANIFEST_NAME)


def fault(folder: str | Path) -> str | None:
    """Why a checkpoint is not complete; None if it is."""
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"{MANIFEST_NAME}, which is written last, is missing"
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST_NAME} cannot be read ({error})"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    return None


def find_newest(output_dir: str | Path) -> tuple[str | None, dict[str, str]]:
    """The newest complete checkpoint of a run, and why each newer one is not complete."""
    skipped: dict[str, str] = {}
    for folder in reversed(sort_checkpoints(str(output_dir), PREFIX_CHECKPOINT_DIR)):
        reason = fault(folder)
        if reason is None:
            return folder, skipped
        skipped[folder] = reason
    return None, skipped


class CheckpointTrainer(Trainer):
    """`transformers.Trainer` whose checkpoints are complete or recognised as not, and without a pickle.

    What FSDP2 shards is gathered: `from_pretrained` reads a checkpoint, and one process can go on from it. Under
    DeepSpeed, whose engine pickles what it remembers, checkpoints hold weights only, and no training goes on from one.
    `hub_strategy` pushes what is complete, and of what the parent pushes all but the pickled arguments, so that its
    default can be the parent's. A `PeftModel` is saved as adapters with the model's configuration.
    """

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.is_fsdp_enabled:
            if state.fsdp_plugin.fsdp_version != 2:
                raise ValueError("FSDP 1 pickles what it saves; launch with fsdp_version: 2")
            state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        if self.is_deepspeed_enabled:
            if self.args.load_best_model_at_end:
                raise ValueError("load_best_model_at_end: DeepSpeed pickles what it could go back to; give false")
            settings = state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
            if settings.get("stage") == 3 and not settings.get("stage3_gather_16bit_weights_on_model_save"):
                raise ValueError("ZeRO-3 pickles weights that it does not gather; set zero3_save_16bit_model: true")
            if not self.args.save_only_model and self.args.save_strategy != "no" and self.is_world_process_zero():
                logger.warning("DeepSpeed: checkpoints hold weights only (save_only_model), and no training resumes")
            self.args.save_only_model = True

    def _refuse_to_resume_under_deepspeed(self) -> None:
        if self.is_deepspeed_enabled:
            raise ValueError(
                "resume_from_checkpoint: under DeepSpeed checkpoints hold weights only; "
                "begin a new training with them (init_from), or launch with FSDP2"
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint:
            self._refuse_to_resume_under_deepspeed()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or str(self.args.output_dir)
        network: Any = self.accelerator.unwrap_model(self.model)
        network.save_pretrained(folder, state_dict=state_dict)
        if isinstance(network, PeftModel):
            config = copy.deepcopy(network.get_base_model().config)
            vars(config).pop("quantization_config", None)  # how to load the rest again is free
            config.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        Path(folder, ARGUMENTS_NAME).write_text(self.args.to_json_string(), encoding="utf-8")

    def _save_checkpoint(self, model, trial) -> None:
        run = self._get_output_dir(trial)
        folder = os.path.join(run, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            unseal(folder)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:  # older checkpoints stay until the new one is complete
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(folder)
            if not (pushing := self._is_pushing()):  # what is on its way stays until it has arrived
                rotate_checkpoints(run, limit, self.state.best_model_checkpoint)
            if self.args.push_to_hub and (self.args.hub_always_push or not pushing):
                self._push(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: the parent pushes before a checkpoint is complete, and with it a pickle of the arguments."""

    def _is_pushing(self) -> bool:
        if not (self.args.push_to_hub and self.is_world_process_zero()):
            return False
        return self.push_in_progress is not None and not self.push_in_progress.is_done()

    def _push(self, folder: str) -> None:
        """Push the model of a checkpoint, and as `hub_strategy` has it the checkpoint, in the background."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        uploads: list[dict[str, Any]] = [{"commit_message": message, "ignore_patterns": [*NOT_OF_CHECKPOINTS]}]
        if self.args.hub_strategy != HubStrategy.EVERY_SAVE:
            is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            name = "last-checkpoint" if is_last else os.path.basename(folder)
            uploads.append({"commit_message": f"{message}, checkpoint", "path_in_repo": name})
        if not self._is_pushing():
            self.push_in_progress = PushInProgress()
        for upload in uploads:
            self.push_in_progress.jobs.append(
                hf_api().upload_folder(
                    repo_id=str(self.hub_model_id),
                    folder_path=folder,
                    token=self.args.hub_token,
                    revision=self.args.hub_revision,
                    run_as_future=True,
                    **upload,
                )
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        network: Any = self.accelerator.unwrap_model(self.model)
        adapts = isinstance(network, PeftModel)
        weights = get_peft_model_state_dict(network) if adapts else network.state_dict()
        path = os.path.join(resume_from_checkpoint, SAFETENSORS_WEIGHTS_NAME if adapts else SAFE_WEIGHTS_NAME)
        for name, value in load_file(path).items():
            weights[name].copy_(shard_as(value, weights[name]))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer, scheduler, scaler = self._stateful()
        state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        state["optimizer"]["state"] = {
            index: {name: gather(value, self.args.should_save) for name, value in entry.items()}
            for index, entry in state["optimizer"]["state"].items()
        }
        if scaler is not None:
            state["scaler"] = scaler.state_dict()
        if self.args.should_save:
            save_state(state, os.path.join(output_dir, STATE_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, STATE_NAME)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{checkpoint} has no {STATE_NAME}, so that training cannot go on where it stopped; "
                "begin a new one with its weights (init_from)"
            )
        state = load_state(path)
        optimizer, scheduler, scaler = self._stateful()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, entry in state["optimizer"]["state"].items():
            for name, value in entry.items():
                if isinstance(value, torch.Tensor) and value.shape == parameters[index].shape:
                    entry[name] = shard_as(value, parameters[index])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        if scaler is not None and "scaler" in state:
            scaler.load_state_dict(state["scaler"])

    def _stateful(self) -> tuple[Any, Any, Any]:
        return self.optimizer, self.lr_scheduler, self.accelerator.scaler

    def _save_scaler(self, output_dir: str) -> None:
        """It is saved with the optimizer."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """It is loaded with the optimizer."""

    def _random_state_path(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, RANDOM_STATE_NAME.format(process=self.args.process_index))

    def _save_rng_state(self, output_dir: str) -> None:
        os.makedirs(output_dir, exist_ok=True)  # the process that saves the model may come later
        save_state(random_states(), self._random_state_path(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and os.path.isfile(path := self._random_state_path(checkpoint)):
            set_random_states(load_state(path))

    def restore(self, checkpoint: str) -> None:
        """Be as after a training whose last checkpoint this is."""
        self._refuse_to_resume_under_deepspeed()
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
