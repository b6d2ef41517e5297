"""From a pretrained language model to a measurably better one.

Everything here is loaded when first used, so that importing posttrain costs nothing:

    import posttrain
    recipe = posttrain.load_recipe("quickstart", ["stages.sft.max_steps=20"])
    result = posttrain.run(recipe)
    print(result.folder)
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# OpenMP's threads spin where they wait for each other: at libgomp's default for so long that they keep a core from a
# thread that shares it with another program. It is read when torch is loaded; a user's own choice wins.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"

if TYPE_CHECKING:
    from posttrain.config import (
        AdapterConfig,
        ClassesConfig,
        DataConfig,
        ModelConfig,
        OptimizerConfig,
        Recipe,
        SystemsConfig,
        TrackConfig,
    )
    from posttrain.core.errors import PosttrainError
    from posttrain.core.types import Message, Sample
    from posttrain.data.sft_rows import prepare
    from posttrain.methods.sft import SFTConfig
    from posttrain.models.language_model import LanguageModel
    from posttrain.models.loading import load_model, load_tokenizer
    from posttrain.recipe.parsing import dump_recipe, load_recipe
    from posttrain.runs.runner import run
    from posttrain.trainer.stage import Stage, StageContext
    from posttrain.trainer.train_step import Learner

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
    "Stage",
    "StageContext",
    "SystemsConfig",
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
    "dump_recipe": "recipe.parsing",
    "LanguageModel": "models.language_model",
    "Learner": "trainer.train_step",
    "load_model": "models.loading",
    "load_recipe": "recipe.parsing",
    "load_tokenizer": "models.loading",
    "Message": "core.types",
    "PosttrainError": "core.errors",
    "prepare": "data.sft_rows",
    "run": "runs.runner",
    "Sample": "core.types",
    "SFTConfig": "methods.sft",
    "Stage": "trainer.stage",
    "StageContext": "trainer.stage",
}
"""Module of each public name; those not listed are settings and live in config."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"posttrain.{_HOMES.get(name, 'config')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
