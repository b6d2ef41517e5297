"""All settings, checked as a whole before anything heavy loads (nothing here imports torch).

A recipe is a model, a list of stages and a list of evaluations. Field descriptions are the reference: the command
line and the documentation print them.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from posttrain.config.environment import EnvironmentConfig
from posttrain.config.evaluation import EvaluationConfig
from posttrain.config.explore import CurriculumConfig, ReplayConfig
from posttrain.config.judge import JudgeConfig, ServerConfig
from posttrain.config.names import METHODS
from posttrain.config.open_kinds import open_kind
from posttrain.config.optimizer_settings import OptimizerConfig
from posttrain.config.placement import PlacementConfig
from posttrain.config.rewards import RewardConfig, RewardsConfig
from posttrain.config.rl import RLConfig, RolloutConfig
from posttrain.config.settings import (
    NAME,
    AdapterConfig,
    ClassesConfig,
    Config,
    DataConfig,
    EpochsConfig,
    MeasuredConfig,
    ModelConfig,
    NewToken,
    QuantizationConfig,
    RowSettings,
    SamplingConfig,
    SourceConfig,
    StageBase,
    SystemsConfig,
    TrainConfig,
)

METHOD_KIND = open_kind(METHODS, "method", tag="method", default="sft")
StageConfig = Annotated[StageBase, METHOD_KIND]


class TrackConfig(Config):
    """Settings of metric loggers besides the run's folder."""

    tensorboard: bool = Field(False, description="Write TensorBoard events into the run (extra: track).")
    wandb: str | None = Field(None, description="Weights & Biases project (extra: track). None: off.")
    trackio: str | None = Field(None, description="trackio project (extra: track). None: off.")
    mlflow: str | None = Field(
        None,
        description="MLflow experiment, in the store that MLFLOW_TRACKING_URI names, or else in the run (extra: mlflow). None: off.",
    )


class Recipe(Config):
    """A model, a list of stages, and what to measure before the first and after the last."""

    name: str = Field(pattern=NAME, description="Name of the run's folder.")
    description: str = Field("", description="One line for `posttrain recipes list`.")
    model: ModelConfig
    seed: int = Field(0, ge=0, description="Seeds everything random.")
    stages: list[StageConfig] = Field(
        default_factory=list, max_length=100, description="Each starts from what the one before left."
    )
    rounds: int = Field(
        1,
        ge=1,
        le=1000,
        description="Times that the list of stages is carried out, each time from the last model; folders of later rounds are NAME.2, NAME.3.",
    )
    evaluate: list[EvaluationConfig] = Field(
        default_factory=list,
        max_length=100,
        description="Measured before the first stage and after the last, on the same items.",
    )
    evaluate_stages: bool = Field(
        False, description="Measure after every stage that makes a model too, not only after the last."
    )
    output: str = Field("runs", description="Folder that holds runs.")
    track: TrackConfig = TrackConfig()
    systems: PlacementConfig = PlacementConfig()

    @model_validator(mode="after")
    def _unique(self) -> Recipe:
        for kind, entries in (("stages", self.stages), ("evaluations", self.evaluate)):
            names = [entry.name for entry in entries]
            if double := sorted({n for n in names if names.count(n) > 1}):
                raise ValueError(f"two {kind} are named {double[0]!r}; give each a different name")
        tasks = {task.name for task in self.evaluate}
        files = {f"{name}.{part}" for name in tasks for part in ("samples", "partial")}
        if clash := sorted(tasks & files):
            raise ValueError(f"evaluation {clash[0]!r} has the name of another one's files; give it a different name")
        if not self.stages and not self.evaluate:
            raise ValueError("a recipe needs at least one stage or one evaluation")
        if self.model.quantization is not None:
            whole = [s.name for s in self.stages if isinstance(s, TrainConfig) and s.adapter is None]
            if whole:
                raise ValueError(
                    f"stage {whole[0]!r} trains every weight, and model.quantization makes weights that can't be "
                    "trained: add adapter: {kind: lora}, or remove model.quantization"
                )
        earlier: list[str] = []
        for stage in self.stages:
            for name in references(stage):
                if name not in earlier:
                    raise ValueError(
                        f"stage {stage.name!r} names stage:{name}, and no stage before it is called that "
                        f"(before it: {', '.join(earlier) or 'none'})"
                    )
            stage.check_evaluations(self.evaluate)
            earlier.append(stage.name)
        for task in self.evaluate:
            for name in references(task):
                if name not in earlier:
                    raise ValueError(
                        f"evaluation {task.name!r} names stage:{name}, and no stage is called that "
                        f"(there are: {', '.join(earlier) or 'none'})"
                    )
        return self

    @model_validator(mode="after")
    def _one_place_for_samplers(self) -> Recipe:
        for stage in self.stages if self.systems.samplers else ():
            if getattr(getattr(stage, "sampler", None), "processes", 0):
                raise ValueError(
                    f"stage {stage.name!r} starts sampler processes beside each trainer (sampler.workers or backend: "
                    "vllm), and systems.samplers samples with the local engine on the cluster: leave one of them out"
                )
        return self

    @model_validator(mode="after")
    def _sequence_parallel(self) -> Recipe:
        for stage in self.stages if self.systems.sequence_parallel > 1 else ():
            adapter = stage.adapter if isinstance(stage, TrainConfig) else None
            reason = None
            if adapter is not None and adapter.is_soft_prompt:
                reason = f"trains a soft prompt ({adapter.kind}), which every sequence begins with"
            elif isinstance(stage, TrainConfig) and stage.whole_distributions:
                reason = f"({stage.method}) compares whole distributions of a teacher and a student"
            if reason is not None:
                raise ValueError(
                    f"stage {stage.name!r} {reason}, and systems.sequence_parallel divides the tokens of a micro-batch "
                    "between processes: leave it out, or give this stage a recipe of its own"
                )
        return self

    @model_validator(mode="after")
    def _soft_prompts(self) -> Recipe:
        """Check what is trained after a stage that leaves a soft prompt: it can be continued, and nothing else."""
        soft = [s.name for s in self.stages if isinstance(s, TrainConfig) and s.adapter and s.adapter.is_soft_prompt]
        if soft and self.model.add_tokens:
            raise ValueError(
                f"stage {soft[0]!r} trains a soft prompt, which is saved without rows of the embedding, and "
                "model.add_tokens adds such rows: train them in a run before (lora, or every weight), and leave it out here"
            )
        left: dict[str, StageBase | None] = {}
        before: StageBase | None = None
        for _, stage in self.in_order():
            named = stage.start or ""
            start = before if stage.start is None else left.get(named) if named.startswith("stage:") else None
            old = getattr(start, "adapter", None)
            if isinstance(stage, TrainConfig) and old is not None and old.is_soft_prompt:
                wanted, new = old.continued_by(), stage.adapter
                if new is None or new.kind != wanted or stage.makes != "model":
                    how = f"with adapter: {{kind: {wanted}}}" if wanted else "by no stage"
                    raise ValueError(
                        f"stage {stage.name!r} starts from the soft prompt ({old.kind}) of stage {start.name!r}, which "  # type: ignore[union-attr]
                        f"can be trained further {how} and has no weights of its model in it. Change its adapter, or "
                        "start it from the recipe's model (start: base)"
                    )
                if "tokens" in new.model_fields_set and new.tokens != sum(old.virtual_tokens()):
                    raise ValueError(
                        f"stage {stage.name!r}: adapter.tokens is {new.tokens}, and the soft prompt of stage "
                        f"{start.name!r}, from which it starts, has {sum(old.virtual_tokens())}: leave tokens out"  # type: ignore[union-attr]
                    )
                left[f"stage:{stage.name}"] = before = start  # as many tokens, whatever the default is
                continue
            if stage.makes == "model":
                left[f"stage:{stage.name}"] = before = stage
        return self

    @model_validator(mode="after")
    def _ensembles(self) -> Recipe:
        """Check that no stage trains or changes the weights of an ensemble, which has several models'."""
        left: dict[str, StageBase] = {}
        before: StageBase | None = None
        for _, stage in self.in_order():
            start = before if stage.start is None else left.get(stage.start)
            if getattr(start, "ensemble", None) is not None and stage.makes != "data":
                raise ValueError(
                    f"stage {stage.name!r} starts from the ensemble of stage {start.name!r}, which is not trained or "  # type: ignore[union-attr]
                    "changed: start it from one of the members (start: stage:NAME) or from the recipe's model (start: base)"
                )
            if stage.makes == "model":
                left[f"stage:{stage.name}"] = before = stage
        return self

    def in_order(self) -> list[tuple[str, StageConfig]]:
        """Return (folder name, stage) of every round, in the order in which they run."""
        rounds = [[(s.name if r == 1 else f"{s.name}.{r}", s) for s in self.stages] for r in range(1, self.rounds + 1)]
        return [(f"{i}-{name}", stage) for i, (name, stage) in enumerate(s for r in rounds for s in r)]


def references(settings: Config) -> list[str]:
    """Return the names of the stages whose results these settings use, as stage:NAME or stage:NAME/FILE."""
    out: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, str) and value.startswith("stage:"):
            out.append(value.removeprefix("stage:").split("/")[0])
        elif isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                walk(inner)

    walk(settings.model_dump(mode="json"))
    return list(dict.fromkeys(out))


__all__ = [
    "AdapterConfig",
    "ClassesConfig",
    "Config",
    "CurriculumConfig",
    "DataConfig",
    "EnvironmentConfig",
    "EpochsConfig",
    "EvaluationConfig",
    "JudgeConfig",
    "MeasuredConfig",
    "ModelConfig",
    "NewToken",
    "QuantizationConfig",
    "OptimizerConfig",
    "PlacementConfig",
    "RLConfig",
    "Recipe",
    "ReplayConfig",
    "RewardConfig",
    "RewardsConfig",
    "RolloutConfig",
    "RowSettings",
    "SamplingConfig",
    "SourceConfig",
    "ServerConfig",
    "StageBase",
    "StageConfig",
    "SystemsConfig",
    "TrackConfig",
    "METHOD_KIND",
    "references",
]
