"""`regard info`: what a model is, without loading its weights. Its arguments stand in `regard_cli`."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, is_offline_mode, snapshot_download
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from regard.cli import complain, quiet_transformers
from regard.hub import CheckpointError, explain, find_verb, resolve
from regard_cli import EXIT_FAILED, EXIT_OK


def run(options: argparse.Namespace) -> int:
    """Run `regard info` and return its exit code."""
    quiet_transformers()
    try:
        facts = describe(options.model)
    except CheckpointError as error:
        complain(error)
        return EXIT_FAILED
    figures = facts.pop("figures")
    for name, value in facts.items():
        print(f"{name:<14}{value}")
    print(f"{'figures':<14}{'none; `regard evaluate` measures' if not figures else ''}".rstrip())
    for data, values in figures.items():
        print(f"  {data}: " + ", ".join(f"{name} {_short(value)}" for name, value in values.items()))
    return EXIT_OK


def describe(model: str | Path) -> dict[str, Any]:
    """What a model is, by name, for people.

    Args:
        model: see `regard.hub.resolve`. Of a Hub repository the weights are not downloaded.

    Returns:
        "place", "model type", "verb", "parameters", "dtype", "image size" and "size on disk" as text, and "figures":
        for each data set the measured figures by name, from evaluation.json, or else from the card's metadata.

    Raises:
        CheckpointError: there is no such model, or its configuration cannot be loaded.
    """
    source = resolve(model)
    with explain(model, source):
        folder, sizes = Path(source), None
        if not folder.is_dir():
            folder = Path(snapshot_download(source, allow_patterns=["*.json", "README.md"]))
            if not is_offline_mode():
                siblings = HfApi().model_info(source, files_metadata=True).siblings or []
                sizes = {file.rfilename: file.size or 0 for file in siblings}
        if sizes is None:
            sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        config = AutoConfig.from_pretrained(folder)
        verb = find_verb(folder)
        auto_class = AutoModelForImageClassification if verb == "classify" else AutoModel
        with torch.device("meta"):
            network = auto_class.from_config(config)
        figures = dict(_figures(folder))
    if verb == "read" and not callable(getattr(network, "read", None)):
        verb = None
    weights = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    return {
        "place": source,
        "model type": f"{config.model_type} ({type(network).__name__})",
        "verb": f"regard {verb}" if verb else "none; use it from Python",
        "parameters": f"{sum(parameter.numel() for parameter in network.parameters()):,}",
        "dtype": str(config.dtype or torch.float32).removeprefix("torch."),
        "image size": _by(getattr(config, "image_size", None)),
        "size on disk": f"{_megabytes(sum(sizes.values()))}, weights {_megabytes(weights)}",
        "figures": figures,
    }


def _figures(folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    if (path := folder / "evaluation.json").is_file():
        for data, values in json.loads(path.read_text(encoding="utf-8"))["results"].items():
            yield data, {name: value for name, value in values.items() if isinstance(value, (int, float))}
    elif (path := folder / "README.md").is_file():
        by_data: dict[str, dict[str, float]] = {}
        for result in ModelCard.load(path).data.eval_results or []:
            by_data.setdefault(result.dataset_name, {})[result.metric_type] = result.metric_value
        yield from by_data.items()


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _by(size: int | list[int] | tuple[int, ...] | None) -> str:
    if size is None:
        return "any"
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    return f"{width}x{height}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
