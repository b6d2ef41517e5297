"""From a recipe's stages to the methods that carry them out, and what a stage's settings refer to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from posttrain.config import METHOD_KIND, EvaluationConfig, Recipe, StageConfig
from posttrain.trainer.stage import Stage, StageContext


def prepare_stage(config: StageConfig, context: StageContext) -> Stage:
    """Return the stage with its data read (`Stage.data`).

    Raises:
        DataError, ModelError, RewardError: What is wrong with the stage's data, model or rewards.
    """
    stage: Stage = METHOD_KIND.load(config.method)(config, context)
    stage.data = stage.prepare()
    return stage


Settings = TypeVar("Settings", StageConfig, EvaluationConfig)


def resolved(stage: Settings, made: Mapping[str, Path]) -> Settings:
    """Return the settings with every stage:NAME replaced by the path of what that stage made.

    stage:NAME is the folder that the stage left (of a stage that makes data: its rows.jsonl); stage:NAME/FILE is a file
    or folder beside it, for instance stage:NAME/rollouts.

    Args:
        stage: Settings of a stage or an evaluation.
        made: Folder that the newest stage of each name left.
    """

    def walk(value: Any) -> Any:
        if isinstance(value, str) and value.startswith("stage:"):
            name, _, rest = value.removeprefix("stage:").partition("/")
            folder = made[name]
            if rest:
                return str(folder.parent / rest)
            return str(folder / "rows.jsonl" if folder.name == "data" else folder)
        if isinstance(value, dict):
            return {k: walk(v) for k, v in value.items()}
        return [walk(v) for v in value] if isinstance(value, list) else value

    return type(stage).model_validate(walk(stage.model_dump(mode="json")))


def made_in(run: Path, recipe: Recipe) -> dict[str, Path]:
    """Return what the stages of a run have made so far, the newest of each name, as `resolved` takes it."""
    results = [(stage.name, run / "stages" / name / stage.makes) for name, stage in recipe.in_order()]
    return {name: result for name, result in results if result.is_dir()}
