"""Settings that the models' trainings share, and the error of those that cannot be used."""

import json
from dataclasses import dataclass, field, fields
from typing import ClassVar

from transformers import PreTrainedConfig


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


@dataclass
class OverridingModelArguments(ModelArguments):
    """Likewise, with what an ablation or a data set of another size changes."""

    config_class: ClassVar[type[PreTrainedConfig]]

    config_overrides: dict | str | None = field(
        default=None,
        metadata={"help": 'fields of the configuration that differ, as JSON, e.g. {"image_size": 28}'},
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
            raise SettingsError('config_overrides: write an object, such as {"image_size": 28}')
        if unknown := sorted(set(self.config_overrides) - known):
            raise SettingsError(f"config_overrides: {self.config_class.__name__} has no field {unknown[0]}")


__all__ = ["ModelArguments", "OverridingModelArguments", "SettingsError"]
