"""Checkpoints of a training: complete or recognised as not, and without a pickle.

The stock trainer writes what an optimizer, a scheduler and random generators remember by `torch.save`, which pickles,
and takes the folder with the highest number for the newest checkpoint, however it ended. Here that state is written as
safetensors, and a checkpoint is complete when a manifest, written last and at once, says how large each file is.
"""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

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
