"""Which checkpoint a name means, and loading it with errors that say what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoProcessor,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

# The checkpoint that a verb of the command line uses when none is named.
DEFAULT_CHECKPOINTS = {
    "read": "image-text-slot-5m",
    "classify": "qavit-tiny-fashion-mnist",
    "ask": "query-conditioned-vqa-easy",
    "count": "sequential-attention-counting-tiny",
}

_TASKS = {  # what reads is known by its method `read`
    "classify": "classify images",
    "ask": "answer questions",
    "count": "count objects",
}
_VERBS = {"query_conditioned_vqa": "ask", "sequential_attention_counting": "count"}  # of model types
_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class CheckpointError(ValueError):
    """A model that cannot be found or loaded. The message names it, the reason and the mend."""


def bundled_checkpoints() -> dict[str, Path]:
    """Folders of the checkpoints that come with this installation, by name."""
    cards = Path(str(resources.files("regard.model_cards")))
    return {path.parent.name: path.parent for path in sorted(cards.glob("*/config.json"))}


def resolve(model: str | Path | None = None, verb: str = "read") -> str:
    """Say where to load a model from.

    Args:
        model: a folder, the name of a bundled checkpoint, or a Hub repository OWNER/NAME (in this order); None is the
            default of `verb`.
        verb: key of `DEFAULT_CHECKPOINTS`.

    Returns:
        A folder, or a repository id as given, for `from_pretrained`.

    Raises:
        CheckpointError: a folder that is missing or holds no model, or a bundled checkpoint that is not installed.
    """
    bundled = bundled_checkpoints()
    if model is None:
        name = DEFAULT_CHECKPOINTS[verb]
        if name not in bundled:
            raise CheckpointError(f"{name}: not in this installation; reinstall regard, or name another model")
        return str(bundled[name])
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{model}: this folder holds no model; give one with config.json and model.safetensors"
            )
        return str(folder)
    if folder.is_file():
        raise CheckpointError(f"{model}: a file; give the folder of the model")
    if str(model) in bundled:
        return str(bundled[str(model)])
    if isinstance(model, Path) or not _REPO_ID.fullmatch(model):
        known = ", ".join(bundled) or "none"
        raise CheckpointError(f"{model}: no such folder, nor a Hub repository OWNER/NAME; bundled models: {known}")
    return model


def find_verb(model: str | Path) -> str:
    """The verb that a model is for, by its configuration: "classify" for a classifier, "ask" for one that answers
    questions, "count" for one that counts, else "read".

    Args:
        model: see `resolve`.

    Raises:
        CheckpointError: there is no such model, or its configuration cannot be loaded.
    """
    source = resolve(model)
    with explain(model, source):
        return _verb_of(AutoConfig.from_pretrained(source))


def _verb_of(config: PreTrainedConfig) -> str:
    if verb := _VERBS.get(config.model_type):
        return verb
    names = config.architectures or ()
    return "classify" if any(name.endswith("ForImageClassification") for name in names) else "read"


def load(
    model: str | Path | None = None, verb: str = "read", device: str | torch.device | None = None
) -> tuple[PreTrainedModel, ProcessorMixin | BaseImageProcessor]:
    """Load a model in float32, in evaluation mode, and its processor.

    Args:
        model, verb: see `resolve`; the verb also says as what to load it: "classify" as a classifier, "ask" as a
            model that answers questions, "count" as one that counts.
        device: where to put the model; None is the accelerator, if there is one, else the CPU.

    Raises:
        CheckpointError: there is no such model, it is not one for this verb, it cannot be loaded, or the
            device is not there.
    """
    source = resolve(model, verb)
    classify = verb == "classify"
    with explain(model, source):
        if not Path(source).is_dir():
            hf_hub_download(source, "config.json")  # one clear failure, before each file of the processor is tried
        if verb in _TASKS and _verb_of(config := AutoConfig.from_pretrained(source)) != verb:
            raise CheckpointError(f"{model}: a {config.model_type} model does not {_TASKS[verb]}; name another")
        processor = (AutoImageProcessor if classify else AutoProcessor).from_pretrained(source)
        network = (AutoModelForImageClassification if classify else AutoModel).from_pretrained(
            source, dtype=torch.float32, use_safetensors=True
        )
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        network.to(device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch built without CUDA
        raise CheckpointError(f"device {device}: {str(error).splitlines()[0]}; choose another --device") from error
    return network.eval(), processor


@contextmanager
def explain(model: str | Path | None, source: str) -> Iterator[None]:
    """Turn what goes wrong while loading a model, which `resolve` has found at `source`, into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError, HTTPError) as error:
        if isinstance(error, RepositoryNotFoundError) or isinstance(error.__cause__, RepositoryNotFoundError):
            raise CheckpointError(
                f"{model}: no such Hub repository, or a private one; check the name, and that your token may read it "
                "(`hf auth login`, or HF_TOKEN)"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        mend = "check its files" if Path(source).is_dir() else "check the name and the network, or give a folder"
        raise CheckpointError(f"{model or source}: cannot be loaded ({reason}); {mend}") from error
