"""`regard export`: a checkpoint as a folder of its own, on request with the code that loads it without regard.

transformers loads code from beside a checkpoint (`trust_remote_code=True`) if it lies flat and its files import one
another as `from .file import name`. The package's files are split over folders, so exactly those that a model needs are
found by their imports and written anew with these lines rewritten.
"""

import argparse
import ast
import importlib.util
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForVisualQuestionAnswering,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

import regard
from regard.hub import CheckpointError, explain, find_verb, load, resolve

# What a checkpoint consists of; what else its folder holds, such as optimizer states, is not for others.
CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*")
NOT_OF_CHECKPOINTS = ("trainer_state.json", "training_*")
GRAPH_FILES = ("onnx/*.onnx", "onnx/*.onnx.data", "onnx/*.json")  # as `export_onnx` writes them

_PACKAGE = "regard."
_MODEL_CLASSES = (AutoModel, AutoBackbone, AutoModelForImageClassification, AutoModelForVisualQuestionAnswering)
_TASKS = {
    "image_text_slot": "text-recognition",
    "query_conditioned_vqa": "visual-question-answering",
    "sequential_attention_counting": "object-counting",
}


class ExportError(ValueError):
    """A checkpoint that cannot be exported. The message names it, the reason and the mend."""


def run(options: argparse.Namespace) -> int:
    """Run `regard export` and return its exit code."""
    from regard.cli import complain, quiet_transformers
    from regard_cli import EXIT_FAILED, EXIT_OK

    quiet_transformers()
    try:
        model = _load_for_onnx(options.model) if options.onnx else None
        files = export_checkpoint(options.model, options.folder, options.with_code, with_graphs=not options.onnx)
        if model is not None:
            from regard.export_onnx import export_onnx

            files += export_onnx(model, Path(options.folder).expanduser() / "onnx")
    except (CheckpointError, ExportError) as error:
        complain(error)
        return EXIT_FAILED
    for file in files:
        print(file)
    return EXIT_OK


def _load_for_onnx(name: str) -> PreTrainedModel:
    """A model that has ONNX graphs; what speaks against it is said before anything is written."""
    from regard.export_onnx import check_exportable

    model, _ = load(name, find_verb(name), "cpu")
    check_exportable(model)
    return model


def export_with_code(
    model: PreTrainedModel, processor: ProcessorMixin | BaseImageProcessor | None, folder: str | Path
) -> list[Path]:
    """Save a model and its processor with the code that loads them where regard is not installed.

    ```python
    export_with_code(model, processor, "mine")
    AutoModel.from_pretrained("mine", trust_remote_code=True)  # anywhere
    ```

    Where regard is installed, its own classes load the folder, and the code in it is not run.

    Args:
        model: of regard.
        processor: saved beside it; may be of transformers.
        folder: must be new or empty.

    Returns:
        The files written.

    Raises:
        ExportError: the model is not of regard, or the folder is not empty or cannot be written.
    """
    code = _code_of(model.config, [] if processor is None else _parts(processor))
    with new_folder(folder) as place:
        model.save_pretrained(place)
        if processor is not None:
            processor.save_pretrained(place)
        _add_code(place, model.config, code)
        return sorted(place.iterdir())


def export_checkpoint(
    model: str | Path, folder: str | Path, with_code: bool = False, with_graphs: bool = True
) -> list[Path]:
    """Copy a checkpoint, byte for byte, with its card and figures, and on request with the code that loads it.

    Args:
        model: see `regard.hub.resolve`. Code that already lies beside it is copied, too, or with `with_code` renewed.
        folder: must be new or empty.
        with_code: as `export_with_code` has it.
        with_graphs: copy the ONNX graphs that lie beside it in `onnx/`, too.

    Returns:
        The files written.

    Raises:
        CheckpointError: there is no such model, or it cannot be loaded.
        ExportError: the model is not of regard but its code is wanted, or the folder is not empty or cannot be written.
    """
    name = str(model)
    source = resolve(model)
    with explain(model, source):
        if not (place := Path(source)).is_dir():
            place = Path(snapshot_download(source, allow_patterns=[*CHECKPOINT_FILES, *GRAPH_FILES, "*.py"]))
        config = AutoConfig.from_pretrained(place)
        stored = json.loads((place / "config.json").read_text(encoding="utf-8"))
    code = _code_of(config, _named_parts(place), name) if with_code else {}
    patterns = [*CHECKPOINT_FILES, *(GRAPH_FILES if with_graphs else ())]
    if "auto_map" in stored and not with_code:
        patterns.append("*.py")
    files = {path for pattern in patterns for path in place.glob(pattern) if path.is_file()}
    files = {path for path in files if not any(path.match(pattern) for pattern in NOT_OF_CHECKPOINTS)}
    if not any(path.suffix == ".safetensors" for path in files):
        raise ExportError(f"{name}: holds no weights; give a folder with model.safetensors")
    with new_folder(folder) as target:
        for path in files:
            copy = target / path.relative_to(place)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        if with_code:
            _add_code(target, config, code)
        return sorted(path for path in target.rglob("*") if path.is_file())


def collect_code(classes: Iterable[type]) -> dict[str, str]:
    """The package's files that classes need, laid flat.

    Returns:
        File names and what they hold, with imports of the package rewritten as `from .file import name`.

    Raises:
        ExportError: a file imports the package in a way that a flat folder cannot have, or two files share a name.
    """
    waiting = [cls.__module__ for cls in classes]
    modules: dict[str, str] = {}
    code: dict[str, str] = {}
    while waiting:
        module = waiting.pop()
        name = f"{_leaf(module)}.py"
        if modules.setdefault(name, module) != module:
            raise ExportError(f"{module} and {modules[name]} share the file name {name}: rename one")
        if name not in code:
            code[name], imported = _flatten(module)
            waiting += imported
    return code


def _flatten(module: str) -> tuple[str, list[str]]:
    """A module's source with its imports of the package made relative, and the modules that it imports."""
    path = _find(module)
    source = path.read_text(encoding="utf-8")
    lines, imported = source.split("\n"), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        if not any(f"{name}.".startswith(_PACKAGE) for name in names):
            continue
        if isinstance(node, ast.Import) or _find(names[0]).name == "__init__.py":
            raise ExportError(
                f"{path}:{node.lineno}: write `from regard.folder.file import name`, which can be laid flat"
            )
        line = lines[node.lineno - 1]
        head, tail = line[: node.col_offset], line[node.col_offset :]
        lines[node.lineno - 1] = head + tail.replace(names[0], f".{_leaf(names[0])}", 1)
        imported += names
    return "\n".join(lines), imported


def _find(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ExportError(f"{module}: its source is not in this installation; reinstall regard")
    return Path(spec.origin)


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _reference(cls: type) -> str:
    return f"{_leaf(cls.__module__)}.{cls.__name__}"


def _file(cls: type) -> str:
    return f"{_leaf(cls.__module__)}.py"


def _imports(classes: Iterable[type]) -> str:
    return "".join(f"from .{_leaf(cls.__module__)} import {cls.__name__}  # noqa: E402\n" for cls in classes)


def _is_own(cls: type) -> bool:
    return cls.__module__.startswith(_PACKAGE)


def _model_classes(config: PreTrainedConfig) -> dict[str, type]:
    """The model classes for a configuration, by the name of the Auto class that gives them."""
    mappings: dict[str, Any] = {auto_class.__name__: auto_class._model_mapping for auto_class in _MODEL_CLASSES}
    return {name: mapping[type(config)] for name, mapping in mappings.items() if type(config) in mapping}


def _registered_parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Sub-configurations whose models the Auto classes find only where regard has registered them."""
    for name in config.sub_configs:
        part = getattr(config, name)
        if part is None:
            continue
        yield from _registered_parts(part)
        if _is_own(type(part)) and part.model_type in CONFIG_MAPPING:
            yield part


def _pipeline(config: PreTrainedConfig) -> tuple[str, dict[str, Any]] | None:
    """The task of regard that a model is for, and its entry in the registry."""
    task = _TASKS.get(config.model_type, "")
    entry = PIPELINE_REGISTRY.supported_tasks.get(task)
    return (task, entry) if entry and _is_own(entry["impl"]) else None


def _parts(processor: ProcessorMixin | BaseImageProcessor) -> list[type]:
    """The classes of regard in a processor."""
    parts = [processor]
    if isinstance(processor, ProcessorMixin):
        parts += [getattr(processor, name) for name in processor.get_attributes()]
    return [type(part) for part in parts if _is_own(type(part))]


def _named_parts(folder: Path) -> list[type]:
    """Likewise, of a saved processor."""
    entries = [entry for _, data in _processor_files(folder) for entry in _entries(data)]
    names = [entry.get("processor_class") or entry.get("image_processor_type") for entry in entries]
    return [getattr(regard, name) for name in names if name in regard.__all__]


def _processor_files(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in (folder / "processor_config.json", folder / "preprocessor_config.json"):
        if path.is_file():
            yield path, json.loads(path.read_text(encoding="utf-8"))


def _entries(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A processor's saved settings, and those of the image processor in it."""
    yield data
    if "image_processor" in data:
        yield data["image_processor"]


def _code_of(config: PreTrainedConfig, parts: list[type], name: str | None = None) -> dict[str, str]:
    """The files that load a model with its processor and pipeline, by name.

    A composite's files also register the models of regard among its parts, as `import regard` would have done. The
    names are looked up, not the classes: transformers imports each file of a local folder in a copy of its own, so the
    class that the configuration has is not the one that the model's file would import.
    """
    if not _is_own(type(config)):
        raise ExportError(
            f"{name or 'model'}: a {config.model_type} model is transformers' own and needs no code of regard; "
            "export it without"
        )
    classes = {type(config), *_model_classes(config).values(), *parts}
    if pipeline := _pipeline(config):
        classes.add(pipeline[1]["impl"])
    registered = {part.model_type: part for part in _registered_parts(config)}
    for part in registered.values():
        classes |= {type(part), *_model_classes(part).values()}
    code = collect_code(classes)
    for part in registered.values():
        models = _model_classes(part)
        code[_file(type(config))] += _REGISTER_CONFIG.format(
            type=part.model_type, config=type(part).__name__, imports=_imports([type(part)])
        )
        registrations = "".join(
            f'{name}.register(CONFIG_MAPPING["{part.model_type}"], {cls.__name__}, exist_ok=True)\n'
            for name, cls in models.items()
        )
        for file in {_file(cls) for cls in _model_classes(config).values()}:
            code[file] += _REGISTER_MODELS.format(
                type=part.model_type,
                auto_classes=", ".join(models),
                imports=_imports(models.values()),
                registrations=registrations,
            )
    return code


_REGISTER_CONFIG = """
# Written on export: part of this model is a {type}, which transformers does not have.
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

{imports}
if "{type}" not in CONFIG_MAPPING:
    CONFIG_MAPPING.register("{type}", {config})
"""
_REGISTER_MODELS = """
# Written on export: part of this model is a {type}, which transformers does not have.
from transformers import {auto_classes}  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

{imports}
{registrations}"""


def _add_code(folder: Path, config: PreTrainedConfig, code: dict[str, str]):
    """Write code into a checkpoint's folder, and into its settings which class stands where."""
    for name, source in code.items():
        (folder / name).write_text(source, encoding="utf-8")
    classes = {"AutoConfig": type(config), **_model_classes(config)}
    settings: dict[str, Any] = {"auto_map": {name: _reference(cls) for name, cls in classes.items()}}
    if pipeline := _pipeline(config):
        task, entry = pipeline
        settings["custom_pipelines"] = {
            task: {
                "impl": _reference(entry["impl"]),
                "pt": [cls.__name__ for cls in entry["pt"]],
                "type": entry["type"],
            }
        }
    path = folder / "config.json"
    _write_json(path, json.loads(path.read_text(encoding="utf-8")) | settings)
    for path, data in _processor_files(folder):
        for entry in _entries(data):
            for auto_class, key in (
                ("AutoProcessor", "processor_class"),
                ("AutoImageProcessor", "image_processor_type"),
            ):
                if entry.get(key) in regard.__all__:
                    entry["auto_map"] = {auto_class: _reference(getattr(regard, entry[key]))}
        _write_json(path, data)


def _write_json(path: Path, data: dict[str, Any]):
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")  # as transformers writes it


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, made if need be; what goes wrong with it becomes an ExportError."""
    place = Path(folder).expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True)
        if any(place.iterdir()):
            raise ExportError(f"{folder}: not empty; name a new folder")
        yield place
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{folder}: cannot be written ({error}); choose another place") from error
