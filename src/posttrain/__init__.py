"""From a pretrained language model to a measurably better one.

Everything here is loaded when first used, so that importing posttrain costs nothing:

    import posttrain
    recipe = posttrain.load_recipe("quickstart", ["stages.sft.max_steps=20"])
    result = posttrain.run(recipe)
    print(result.folder)
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from posttrain.config import (
        AdapterConfig,
        ClassesConfig,
        DataConfig,
        ModelConfig,
        OptimizerConfig,
        Recipe,
        SFTConfig,
        SystemsConfig,
        TaskConfig,
        TrackConfig,
    )
    from posttrain.data.prepare import prepare
    from posttrain.errors import PosttrainError
    from posttrain.models.lm import LanguageModel
    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.recipe import dump_recipe, load_recipe
    from posttrain.run import run
    from posttrain.train.learner import Learner
    from posttrain.types import Message, Sample

__all__ = [
    "AdapterConfig",
    "ClassesConfig",
    "DataConfig",
    "LanguageModel",
    "Learner",
    "Message",
    "ModelConfig",
    "OptimizerConfig",
    "PosttrainError",
    "Recipe",
    "SFTConfig",
    "Sample",
    "SystemsConfig",
    "TaskConfig",
    "TrackConfig",
    "__version__",
    "dump_recipe",
    "load_model",
    "load_recipe",
    "load_tokenizer",
    "prepare",
    "run",
]

_HOMES = {
    "dump_recipe": "recipe",
    "LanguageModel": "models.lm",
    "Learner": "train.learner",
    "load_model": "models.load",
    "load_recipe": "recipe",
    "load_tokenizer": "models.load",
    "Message": "types",
    "PosttrainError": "errors",
    "prepare": "data.prepare",
    "run": "run",
    "Sample": "types",
}
"""Module of each public name; those not listed are settings and live in config."""


class _Face(ModuleType):
    """Importing posttrain.run binds that *module* as our attribute `run`; people want the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "run" and isinstance(value, ModuleType):
            value = value.run
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"posttrain.{_HOMES.get(name, 'config')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
