"""Settings of policy-gradient training: problems, rewards, how completions are drawn, what is done with them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.environment import EnvironmentConfig
from posttrain.config.explore import AllocateConfig, CurriculumConfig, ReplayConfig, SteerConfig
from posttrain.config.problems import ProblemsConfig
from posttrain.config.rewards import RewardConfig, RewardsConfig
from posttrain.config.settings import (
    NAME,
    Config,
    OptimizerConfig,
    SamplerConfig,
    SamplingConfig,
    TrainConfig,
)


class KLConfig(Config):
    """A penalty for leaving the model that the stage starts from."""

    coefficient: float = Field(0.0, ge=0, description="Beta. 0: no penalty, and no reference is kept.")
    where: Literal["loss", "reward"] = Field("loss", description="Added to the loss, or taken off the reward.")
    estimator: Literal["k1", "k2", "k3"] = Field(
        "k3", description="See docs/policy-gradients.md; in the reward k1 is the one with the right gradient."
    )
    target: float | None = Field(
        None,
        gt=0,
        description="Nats a token, as the metric `kl` counts them: the coefficient follows, up where the KL is above. None: it stays.",
    )
    gain: float = Field(
        0.1,
        gt=0,
        le=5,
        description="K of the adaptive coefficient: times 1 + K e a step, e the relative error within ±0.2.",
    )

    @model_validator(mode="after")
    def _starts(self) -> KLConfig:
        if self.target is not None and not self.coefficient:
            raise ValueError("kl.target needs a coefficient to start from: it is multiplied, and 0 stays 0")
        if self.target is None and self.gain != type(self).model_fields["gain"].default:
            raise ValueError("kl.gain would do nothing: the coefficient stays as it is unless kl.target is given")
        return self


class RLOptimizerConfig(OptimizerConfig):
    """AdamW as for other stages, but at a constant rate from the first step."""

    lr: float = Field(1e-5, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="What the learning rate does after warm-up."
    )
    warmup: float = Field(0.0, ge=0, description="Steps of linear warm-up; below 1: that fraction of all steps.")


class HeldOutConfig(Config):
    """Problems that are never trained on, answered greedily now and then; and sampled, where there is a gold scorer."""

    problems: ProblemsConfig
    every: int = Field(10, ge=1, description="Steps between; also before the first and after the last.")
    gold: RewardConfig | None = Field(
        None,
        description="A scorer that nothing is trained by: it and the stage's own rewards judge the same samples, whose KL from the stage's first model is measured, so that over-optimisation shows. None: off.",
    )
    samples: int = Field(1, ge=1, description="Samples of each held-out problem for gold.")

    @model_validator(mode="after")
    def _sampled(self) -> HeldOutConfig:
        if self.samples > 1 and self.gold is None:
            raise ValueError("held_out.samples are drawn for held_out.gold, and there is none")
        if self.gold is not None and self.gold.compares_completions:
            raise ValueError(f"held_out.gold is {self.gold.title}, which compares the completions of a prompt")
        return self


def _whole(sampling: SamplingConfig) -> None:
    """A KL is between whole distributions."""
    cut = {"top_k": sampling.top_k, "top_p": sampling.top_p < 1, "min_p": sampling.min_p}
    wrong = next((name for name, on in {**cut, "min_tokens": sampling.min_tokens}.items() if on), None)
    if wrong is not None:
        raise ValueError(f"held_out.gold measures the KL of whole distributions: leave out sampler.{wrong}")


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
    sampler: SamplerConfig = SamplerConfig()
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
        None,
        description="Mean over tokens, over sequences' means, or sum over a constant (max_tokens; 1 for REINFORCE, RLOO, ReMax). None: the method's own.",
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
    success: float = Field(
        1.0,
        allow_inf_nan=False,
        description="Reward from which a completion counts as a success (allocate, curriculum, replay).",
    )
    steer: SteerConfig | None = Field(None, description="Steer temperature or entropy bonus to a target. None: off.")
    allocate: AllocateConfig | None = Field(None, description="More completions for hard prompts. None: all alike.")
    curriculum: CurriculumConfig | None = Field(None, description="Draw problems by success. None: all, in turn.")
    replay: ReplayConfig | None = Field(None, description="Keep rare successes and use them again. None: off.")
    carry: int | None = Field(
        None,
        ge=1,
        description="Tokens that a completion grows by in one step; what is longer goes on in the next, its group with it. None: every completion ends in its step.",
    )
    max_staleness: int = Field(
        8,
        ge=1,
        description="Steps that tokens may be older than the step that learns from them (replay, carry); older ones are dropped.",
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
    optimizer: RLOptimizerConfig = RLOptimizerConfig()
    checkpoint_every: int = Field(10, ge=1, description="Batches of rollouts between checkpoints.")

    @model_validator(mode="after")
    def _fits(self) -> RLConfig:
        if self.prompts_per_step % self.updates:
            raise ValueError(f"prompts_per_step ({self.prompts_per_step}) must divide into updates ({self.updates})")
        if self.sampler.temperature == 0:
            raise ValueError("sampler.temperature is 0: completions would all be the same, with nothing to compare")
        if self.held_out is not None and self.held_out.gold is not None:
            _whole(self.sampler)
            if "gold" in [p.title for p in self.rewards.terms]:
                raise ValueError("a reward is named 'gold', as held_out.gold is: give it another name")
        if self.environment is not None and self.sampler.min_tokens:
            raise ValueError("sampler.min_tokens would hold in every turn anew: leave it out with an environment")
        grouped = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp_baseline")
        if self.method in grouped and self.group_size < 2:
            raise ValueError(f"{self.method} compares the completions of a prompt: group_size must be 2 or more")
        self._idle()
        return self

    def _idle(self) -> None:
        """Raise ValueError for a setting that would do nothing."""
        fields = type(self).model_fields
        given = {n for n in fields if getattr(self, n) != fields[n].default}
        critics = [n for n in ("lam", "clip_value", "value_coefficient", "value_lr", "value_trunk") if n in given]
        if critics and self.method != "ppo":
            raise ValueError(f"{', '.join(critics)}: of a critic, and {self.method} has none. Leave out, or use ppo")
        if "gamma" in given and self.method not in ("ppo", "reinforce_pp"):
            raise ValueError(f"gamma discounts tokens in ppo and reinforce_pp; {self.method} has none: leave it out")
        clips = sorted(given & {"clip_low", "clip_high", "clip_dual"})
        if clips and self.updates * self.passes == 1 and not self.off_policy:
            raise ValueError(
                f"{', '.join(clips)}: with one update a batch the ratio is 1 and nothing is clipped. Leave out, or set "
                "updates or passes above 1"
            )
        if "clip_dual" in given and self.method == "cispo":
            raise ValueError("clip_dual bounds a ratio's loss, and cispo has its weight bounded already: leave it out")
        if "success" in given and not (self.allocate or self.curriculum or self.replay):
            raise ValueError("success is for allocate, curriculum and replay: leave it out, or turn one of them on")
        if "max_staleness" in given and not self.off_policy:
            raise ValueError("max_staleness is for replay and carry: leave it out, or turn one of them on")
        steps = any(p.scores_steps for p in self.rewards.terms)
        if self.redraws and self.group_size == 1 and not steps and self.replay is None:
            raise ValueError("redraws replaces groups whose rewards are all alike, as one of one is: raise group_size")

    @model_validator(mode="after")
    def _explores(self) -> RLConfig:
        sampling = self.sampler
        if self.steer is not None:
            low, high = self.steer.bounds(sampling.temperature)
            if low > high:
                raise ValueError(f"steer.low ({low:g}) must not be above steer.high ({high:g})")
            if self.steer.by == "temperature" and not low <= sampling.temperature <= high:
                raise ValueError(
                    f"sampler.temperature ({sampling.temperature:g}) must be within steer's {low:g} to {high:g}"
                )
        if self.allocate is not None:
            if self.allocate.first >= self.group_size:
                raise ValueError(f"allocate.first ({self.allocate.first}) must be below group_size ({self.group_size})")
            whole = [p.title for p in self.rewards.terms if p.compares_completions]
            if whole:
                raise ValueError(
                    f"allocate judges completions before their group is whole, and reward {whole[0]!r} needs all"
                )
        if self.off_policy:
            cut = {"top_k": sampling.top_k, "top_p": sampling.top_p < 1, "min_p": sampling.min_p}
            wrong = next((name for name, on in {**cut, "min_tokens": sampling.min_tokens}.items() if on), None)
            if wrong is not None:
                raise ValueError(
                    f"replay and carry need log-probabilities of the whole distribution: leave out sampler.{wrong}"
                )
        if self.carry is not None and self.environment is not None:
            raise ValueError(
                "carry cuts completions in the middle of a turn, which an environment can't answer: one of them"
            )
        if self.carry is not None and self.carry >= sampling.max_tokens:
            raise ValueError(f"carry ({self.carry}) must be below sampler.max_tokens ({sampling.max_tokens})")
        return self

    @property
    def off_policy(self) -> bool:
        """Whether a batch may hold tokens that an earlier policy sampled."""
        return self.replay is not None or self.carry is not None
