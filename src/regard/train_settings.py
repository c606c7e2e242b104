"""What all trainings share: settings, how they are read, and the error of those that cannot be used."""

import difflib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import yaml
from transformers import AutoConfig, HfArgumentParser, PreTrainedConfig

from regard.hub import explain, resolve

SETTINGS_NAME = "training_settings.json"  # in the folder of a training
_FILE_SUFFIXES = (".yaml", ".yml", ".json")


class SettingsError(ValueError):
    """Settings that cannot be used. The message names the setting and the mend."""


@dataclass
class ModelArguments:
    """Which model is trained, and from where it starts."""

    model: str = field(default="image_text_slot", metadata={"help": "which model to train"})
    preset: str = field(default="5m", metadata={"help": "architecture of a new model"})
    init_from: str | None = field(
        default=None,
        metadata={"help": "folder or Hub repository of a trained model to go on from, instead of a new one"},
    )
    attn_implementation: str = field(
        default="sdpa",
        metadata={"help": "how attention is computed: sdpa, or eager, which is faster in training on a CPU"},
    )

    def find_start(self) -> str | None:
        """Folder or Hub repository of the model to go on from; None for a new one.

        Raises:
            CheckpointError: there is none, or its configuration cannot be loaded.
            SettingsError: it is of another kind.
        """
        if self.init_from is None:
            return None
        source = resolve(self.init_from)
        with explain(self.init_from, source):
            kind = AutoConfig.from_pretrained(source).model_type
        if kind != self.model:
            raise SettingsError(f"init_from: {self.init_from} is a {kind} model; go on from a {self.model} one")
        return source


@dataclass
class OverridingModelArguments(ModelArguments):
    """Likewise, with what an ablation or a data set of another size changes."""

    config_class: ClassVar[type[PreTrainedConfig]]

    config_overrides: dict | str | None = field(
        default=None,
        metadata={"help": 'fields of the configuration that differ, as JSON, e.g. {"image_size": 64}'},
    )

    def __post_init__(self):
        if isinstance(self.config_overrides, str):
            try:
                self.config_overrides = json.loads(self.config_overrides)
            except json.JSONDecodeError as error:
                raise SettingsError(f"config_overrides: not JSON ({error})") from error
        self.config_overrides = self.config_overrides or {}
        known = {field.name for field in fields(self.config_class)}
        if not isinstance(self.config_overrides, dict):
            raise SettingsError('config_overrides: write an object, such as {"image_size": 64}')
        if unknown := sorted(set(self.config_overrides) - known):
            raise SettingsError(f"config_overrides: {self.config_class.__name__} has no field {unknown[0]}")


__all__ = ["ModelArguments", "OverridingModelArguments", "SettingsError"]


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file of settings by name.

    Raises:
        SettingsError: the file is missing, of another kind, or holds no mapping.
    """
    if Path(path).suffix.lower() not in _FILE_SUFFIXES:
        raise SettingsError(f"{path}: settings come from a file that ends in {', '.join(_FILE_SUFFIXES)}")
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # JSON is YAML
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not valid YAML or JSON: {' '.join(str(error).split())}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise SettingsError(f"{path}: expected `name: value` lines, but found a {type(settings).__name__}")
    return {str(name): value for name, value in settings.items()}


def held_out_by(model: str, seed: int) -> dict[str, Any]:
    """What chose the validation images that a training held out: `validation_size` and `seed`, as the readers of data
    take them.

    Args:
        model: its folder, or a checkpoint in that, tells; what it does not tell is the readers' default.
        seed: of a model that was not trained here.

    Raises:
        SettingsError: what the folder tells is damaged.
    """
    folder = Path(model).expanduser().absolute()
    for path in (folder / SETTINGS_NAME, folder.parent / SETTINGS_NAME):
        if path.is_file():
            settings = read_settings(path)
            arguments = {"validation_size": "validation_size", "split_seed": "seed"}
            return {argument: settings[name] for name, argument in arguments.items() if name in settings}
    return {"seed": seed}


class SettingsParser(HfArgumentParser):
    """HfArgumentParser that takes the settings of a file as flags, so that both are checked alike."""

    def flags_of(self, settings: dict[str, Any], path: str | None) -> list[str]:
        actions = {action.dest: action for action in self._actions}
        flags = []
        for name, value in settings.items():
            if name not in actions or name == "help":
                raise SettingsError(f"{path}: {self.explain_unknown(name)}")
            if value is None:
                self.set_defaults(**{name: None})
                continue
            flags.append(f"--{name}")
            if actions[name].nargs == "+":
                items = [f"{key}={item}" for key, item in value.items()] if isinstance(value, dict) else value
                flags += [str(item) for item in (items if isinstance(items, list) else [items])]
            elif isinstance(value, (dict, list)):
                flags.append(json.dumps(value))
            else:
                flags.append(str(value))
        return flags

    def explain_unknown(self, name: str) -> str:
        bare = name.lstrip("-").split("=")[0].replace("-", "_")
        close = difflib.get_close_matches(bare, {action.dest for action in self._actions}, n=1)
        hint = f"did you mean {close[0]}?" if close else "`python -m regard.train --model MODEL --help` lists all"
        return f"unknown setting {bare}; {hint}"

    def error(self, message: str):
        raise SettingsError(message)
