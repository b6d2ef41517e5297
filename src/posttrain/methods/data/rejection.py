"""Rejection sampling: the model's own completions with a high reward become rows for supervised fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.config.problems import ProblemsConfig
from posttrain.config.rewards import RewardConfig, RewardsConfig
from posttrain.config.settings import NAME, ModelConfig, SamplerConfig, StageBase
from posttrain.trainer.stage import Stage

if TYPE_CHECKING:
    from pathlib import Path

    from posttrain.trainer.loop import OnStep


class RejectionConfig(StageBase):
    """Rejection sampling: completions of the model at hand that rewards hold for good, kept as rows to learn from."""

    makes: ClassVar[Literal["model", "data", "reward_model"]] = "data"

    method: Literal["rejection_sampling"] = "rejection_sampling"
    name: str = Field("rejection", pattern=NAME, description="Name of the stage's folder in the run.")
    problems: ProblemsConfig
    rewards: RewardsConfig
    sampler: SamplerConfig = SamplerConfig()
    n: int = Field(8, ge=1, description="Completions of each problem.")
    threshold: float = Field(1.0, description="Reward from which a completion is kept.")
    keep: int | None = Field(4, ge=1, description="At most so many rows a problem. None: all.")
    rank_by: RewardConfig | None = Field(
        None,
        description="Where more than `keep` pass: those with the highest of this score. None: those sampled first.",
    )
    longest: int | None = Field(
        None, ge=1, description="Longest completion that is kept, in tokens, its end included. None: all that ended."
    )

    @model_validator(mode="after")
    def _fits(self) -> RejectionConfig:
        if self.sampler.temperature == 0 and self.n > 1:
            raise ValueError("sampler.temperature is 0: all n completions would be the same. Raise it, or set n to 1")
        if self.rank_by is not None and self.keep is None:
            raise ValueError(
                "rank_by chooses among what passes, and keep is none: all of it is kept. Set keep, or drop rank_by"
            )
        if self.rank_by is not None and "rank" in [p.title for p in self.rewards.terms]:
            raise ValueError("a reward is named 'rank', as the score of rank_by is; give it another name")
        return self


class RejectionSampling(Stage):
    """Sample completions, score them, keep the best as rows."""

    Config = RejectionConfig
    title = "Rejection sampling"

    def prepare(self) -> list[tuple[str, Any]]:
        from posttrain.data.prompts import load_prompts

        prompts = load_prompts(self.config.problems, self.context.tokenizer, context=self.context.context)
        self.prompts = prompts.items
        return [(self.config.name, prompts)]

    def run(self, model: ModelConfig, folder: Path, seed: int, on_step: OnStep | None = None) -> dict[str, Any]:
        from posttrain.methods.data.rejection_rows import run_rejection

        functions = self.context.functions
        return run_rejection(self.config, model, self.prompts, folder, seed=seed, functions=functions)
