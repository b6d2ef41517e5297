"""Rewards that are models: they stay in this process and score many completions in a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.config.rewards import Form, RewardTermConfig
from posttrain.core.errors import RewardError
from posttrain.core.imports import load_object
from posttrain.rewards.reward import Reward, RewardFunctions


class ScorerReward(Reward):
    """Return a scorer's numbers unchanged: no scaling, any range."""

    class Config(RewardTermConfig):
        """The number of a scorer: a reward model, a judge, any function of prompts and completions."""

        form: ClassVar[Form] = "batch"
        kind: Literal["preference"] = "preference"
        scorer: str = Field(
            description="module:function, or the name of one given from Python: (prompts, completions) → numbers."
        )
        prompt: str = Field("prompt", description="Column of the example with the prompt.")
        batch_size: int = Field(64, ge=1, description="Pairs in a call.")

    config: Config

    def open(self, functions: RewardFunctions) -> None:
        """Import the scorer."""
        self.scorer = load_object(self.config.scorer, functions, RewardError)

    def __call__(self, prompts: Sequence[Any], texts: Sequence[str]) -> Any:
        """Call the scorer."""
        return self.scorer(prompts, texts)


class ModelRewardConfig(RewardTermConfig):
    """Settings of reward models."""

    form: ClassVar[Form] = "batch"
    is_correctness: ClassVar[bool] = False  # such a number is neither right nor wrong
    reads_context: ClassVar[bool] = True
    """The prompt of a row with tools or template arguments is an object with `messages`, `tools`, `template_args`."""

    prompt: str = Field("messages", description="Column with the prompt: a list of turns, or the text of a user.")
    batch_size: int = Field(64, ge=1, description="Completions in a call.")
    device: str = Field("auto", description="Where the model is: auto, cpu, cuda, cuda:1, mps.")


class ModelReward(Reward):
    """Base of the rewards that a model computes."""

    model: Any

    def __call__(self, prompts: Sequence[Any], texts: Sequence[str]) -> Any:
        """Score the pairs of prompt and completion."""
        return self.model(prompts, texts)

    def tokens_read(self, prompts: Sequence[Any], texts: Sequence[str]) -> list[int]:
        """Return the number of tokens that the model reads for each pair of prompt and completion."""
        return self.model.tokens_read(prompts, texts)  # type: ignore[no-any-return]


class ScalarReward(ModelReward):
    """Return the number of a reward model, or the combined number of several."""

    class Config(ModelRewardConfig):
        """The number of a reward model, or of several together (docs/reward-models.md)."""

        kind: Literal["reward_model"] = "reward_model"
        source: str | list[str] = Field(
            description="stage:NAME, a folder, or a Hub name of a model for sequence classification; a list: an "
            "ensemble."
        )
        combine: Literal["mean", "min", "conservative"] = Field(
            "mean",
            description="How the numbers of an ensemble become one; conservative: mean - spread * standard deviation.",
        )
        spread: float = Field(1.0, ge=0, description="Standard deviations taken off (combine: conservative).")
        normalise: bool = Field(
            False,
            description="Subtract the mean and divide by the standard deviation of held-out rewards, kept with it.",
        )

        @model_validator(mode="after")
        def _used(self) -> ScalarReward.Config:
            if self.spread != type(self).model_fields["spread"].default and self.combine != "conservative":
                raise ValueError(
                    f"spread would do nothing: combine is {self.combine}, and only conservative takes it off"
                )
            return self

    config: Config

    def open(self, functions: RewardFunctions) -> None:
        """Load the model."""
        from posttrain.rewards.reward_model_scorer import RewardModel  # imports torch

        config = self.config
        self.model = RewardModel(config.source, config.combine, config.spread, config.normalise, config.device)


class StepReward(ModelReward):
    """Return a number made of the scores that a process reward model gives the steps, or these scores."""

    class Config(ModelRewardConfig):
        """A number made of a process reward model's scores of the steps (docs/reward-models.md)."""

        kind: Literal["process_reward"] = "process_reward"
        source: str = Field(description="stage:NAME, a folder, or a Hub name of a model for token classification.")
        combine: Literal["min", "product", "last", "mean", "steps"] = Field(
            "min",
            description="How the scores of the steps become one; steps: they don't, each is credited to the tokens "
            "that led to it.",
        )
        separator: str | None = Field(None, description="Text that ends a step. None: the model's own, or a line end.")

        @property
        def scores_steps(self) -> bool:
            """Return True if the scores are not combined."""
            return self.combine == "steps"

    config: Config

    def open(self, functions: RewardFunctions) -> None:
        """Load the model."""
        from posttrain.rewards.reward_model_scorer import ProcessReward  # imports torch

        config = self.config
        self.model = ProcessReward(config.source, config.combine, config.separator, config.device)
