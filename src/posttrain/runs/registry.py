"""The table of stages: which module carries out which method, and what a stage's settings refer to."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from posttrain.config import (
    EvaluationConfig,
    FeedbackConfig,
    OnlineDPOConfig,
    PreferenceConfig,
    ProcessRewardConfig,
    Recipe,
    RefineConfig,
    RejectionConfig,
    RewardModelConfig,
    RLConfig,
    SFTConfig,
    StageConfig,
)
from posttrain.trainer.stage import Ready, Setting

STAGES: dict[type, str] = {
    SFTConfig: "posttrain.methods.sft",
    RLConfig: "posttrain.methods.rl.policy_gradient",
    RejectionConfig: "posttrain.methods.data.rejection",
    RefineConfig: "posttrain.methods.data.critique_revision",
    PreferenceConfig: "posttrain.methods.preference.offline",
    OnlineDPOConfig: "posttrain.methods.preference.online",
    FeedbackConfig: "posttrain.methods.data.ai_feedback",
    RewardModelConfig: "posttrain.methods.reward_model.pairwise",
    ProcessRewardConfig: "posttrain.methods.reward_model.process",
}
"""Settings → module; each module has `ready(settings, setting) -> Ready`. Loaded when first needed."""


def ready(stage: StageConfig, setting: Setting) -> Ready:
    """The stage with its data read. Raises what that is wrong with (DataError, ModelError, RewardError)."""
    module = importlib.import_module(STAGES[type(stage)])
    return module.ready(stage, setting)  # type: ignore[no-any-return]


def method_info(stage: StageConfig) -> dict[str, Any]:
    """Return the content of a stage's method.json: the method's name and title, and the metrics that it logs.

    The report reads titles, units and groups from this file, so it needs no table of methods.
    """
    module = importlib.import_module(STAGES[type(stage)])
    metrics = [asdict(metric) for metric in module.METRICS]
    return {"method": stage.method, "title": module.TITLES[stage.method], "metrics": metrics}


Settings = TypeVar("Settings", StageConfig, EvaluationConfig)


def resolved(stage: Settings, made: Mapping[str, Path]) -> Settings:
    """The same settings with every stage:NAME replaced by the path of what that stage made.

    made: by name, what the newest stage of that name left: a folder. stage:NAME is that folder (of a stage that makes
    data: its rows.jsonl); stage:NAME/FILE is a file or folder beside it, stage:NAME/rollouts for instance.
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
    """What the stages of a run have made so far, by name, as `resolved` takes it: the newest of each name."""
    there = [(stage.name, run / "stages" / name / stage.makes) for name, stage in recipe.in_order()]
    return {name: result for name, result in there if result.is_dir()}
