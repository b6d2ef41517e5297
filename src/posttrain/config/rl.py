"""Settings of reinforcement learning: prompts, rewards, sampling, advantages, loss; methods are presets of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain.config.environment import EnvironmentConfig
from posttrain.config.explore import ExplorationConfig
from posttrain.config.names import ADVANTAGES, KL_ESTIMATORS, POLICY_LOSSES
from posttrain.config.open_functions import open_function
from posttrain.config.open_kinds import unknown_name
from posttrain.config.problems import ProblemsConfig
from posttrain.config.rewards import RewardConfig, RewardsConfig
from posttrain.config.rollout_sampler import RolloutSamplerConfig
from posttrain.config.settings import (
    NAME,
    Config,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)
from posttrain.core.imports import is_import_path

AdvantagesConfig = Annotated[Any, open_function(ADVANTAGES, "advantage")]
PolicyLossConfig = Annotated[Any, open_function(POLICY_LOSSES, "policy loss")]
KLEstimator = Annotated[Any, open_function(KL_ESTIMATORS, "KL estimator")]


class KLConfig(Config):
    """Penalize the distance from the model that the stage starts from."""

    coefficient: float = Field(0.0, ge=0, description="Beta. 0: no penalty, and no reference model is kept.")
    where: Literal["loss", "reward"] = Field(
        "loss", description="Where the penalty goes: added to the loss, or subtracted from the reward."
    )
    estimator: KLEstimator = Field(
        "k3",
        validate_default=True,
        description="k1, k2, k3 (see docs/policy-gradients.md; in the reward k1 has the right gradient), or module:function of (logprobs_N, reference_logprobs_N).",
    )
    later_turns: float = Field(
        1.0,
        ge=0,
        description="With an environment: factor of the penalty on tokens after its first reply. 0: only the first answer is held (SCoRe's stage 1).",
    )
    target: float | None = Field(
        None,
        gt=0,
        description="Nats per token, as the metric `kl`: the coefficient is raised while the KL is above, and lowered while it is below. None: fixed.",
    )
    gain: float = Field(
        0.1,
        gt=0,
        le=5,
        description="K of the adaptive coefficient: each step multiplies it by 1 + K e, with the relative error e held within ±0.2.",
    )

    @model_validator(mode="after")
    def _starts(self) -> KLConfig:
        if self.target is not None and not self.coefficient:
            raise ValueError("kl.target needs a coefficient to start from: it is multiplied, and 0 stays 0")
        if self.target is None and self.gain != type(self).model_fields["gain"].default:
            raise ValueError("kl.gain would do nothing: the coefficient is fixed unless kl.target is given")
        if self.later_turns != 1 and not self.coefficient:
            raise ValueError("kl.later_turns would do nothing: there is no penalty unless kl.coefficient is given")
        return self


class ClipConfig(Config):
    """Bounds of the ratio between the policy and the one that sampled."""

    low: float = Field(0.2, ge=0, description="Lower bound: 1 - low.")
    high: float = Field(0.2, ge=0, description="Upper bound: 1 + high (CISPO: of the weight itself).")
    dual: float | None = Field(
        None, gt=1, description="Bound of the loss for negative advantages: dual times the advantage. None: no bound."
    )


class CriticConfig(Config):
    """A value head on the policy's hidden states, for advantages that need values."""

    lr: float = Field(5e-3, gt=0, description="Peak learning rate of the head.")
    coefficient: float = Field(0.5, ge=0, description="Weight of the critic's loss.")
    detach: bool = Field(True, description="Train the head alone; false: its loss also trains the policy's layers.")
    clip: float | None = Field(
        None, gt=0, description="Most that an update may move a value, in units of the reward. None: no bound."
    )


class RLOptimizerConfig(OptimizerConfig):
    """AdamW as for other stages, but at a constant rate from the first step."""

    lr: float = Field(1e-5, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="What the learning rate does after warm-up."
    )
    warmup: float = Field(0.0, ge=0, description="Steps of linear warm-up; below 1: that fraction of all steps.")


def truncating_setting(sampling: SamplingConfig) -> str | None:
    """Return the name of a setting by which the sampler does not draw from the model's whole distribution, or None."""
    cuts = {
        "top_k": sampling.top_k,
        "top_p": sampling.top_p < 1,
        "min_p": sampling.min_p,
        "min_tokens": sampling.min_tokens,
    }
    return next((name for name, on in cuts.items() if on), None)


class HeldOutConfig(Config):
    """Measure on problems that are never trained on: greedy answers, and samples if there is a gold scorer."""

    problems: ProblemsConfig
    every: int = Field(10, ge=1, description="Steps between; also before the first and after the last.")
    gold: RewardConfig | None = Field(
        None,
        description="A scorer that is not trained on: it and the stage's own rewards score the same samples, whose KL from the stage's first model is measured, so that over-optimization shows. None: off.",
    )
    samples: int = Field(1, ge=1, description="Samples of each held-out problem for gold.")

    @model_validator(mode="after")
    def _sampled(self) -> HeldOutConfig:
        if self.samples > 1 and self.gold is None:
            raise ValueError("held_out.samples are drawn for held_out.gold, and there is none")
        if self.gold is not None and self.gold.compares_completions:
            raise ValueError(f"held_out.gold is {self.gold.title}, which compares the completions of a prompt")
        return self


class RolloutConfig(TrainConfig):
    """Settings of every stage that trains on the policy's own completions, scored by rewards."""

    problems: ProblemsConfig
    rewards: RewardsConfig
    held_out: HeldOutConfig | None = None
    sampler: RolloutSamplerConfig = RolloutSamplerConfig()
    prompts_per_step: int = Field(8, ge=1, description="Prompts per step.")
    group_size: int = Field(8, ge=1, description="Completions of each prompt (G).")
    steps: int = Field(100, ge=1, description="Batches of rollouts.")
    optimizer: RLOptimizerConfig = RLOptimizerConfig()
    checkpoint_every: int = Field(10, ge=1, description="Batches of rollouts between checkpoints.")

    @model_validator(mode="after")
    def _compares(self) -> RolloutConfig:
        answering = getattr(self, "environment", None)
        for term in self.rewards.terms:
            if term.needs_environment and getattr(answering, "kind", "") != term.needs_environment:
                raise ValueError(
                    f"the reward {term.title} scores the turns of an environment: set environment: "
                    f"{{kind: {term.needs_environment}}}"
                )
        if self.sampler.temperature == 0:
            raise ValueError("sampler.temperature is 0: completions would all be the same, with nothing to compare")
        if self.held_out is not None and self.held_out.gold is not None:
            cut = truncating_setting(self.sampler)
            if cut is not None:
                raise ValueError(f"held_out.gold measures the KL of whole distributions: leave out sampler.{cut}")
            if "gold" in [p.title for p in self.rewards.terms]:
                raise ValueError("a reward is named 'gold', as held_out.gold is: give it another name")
        return self


REINFORCE = {"policy_loss": "reinforce", "ratio": "sequence", "loss_aggregation": "seq-mean-token-sum"}
MEANS = {"loss_aggregation": "seq-mean-token-mean"}
RL_PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {"advantages": "grpo", **MEANS},
    "dr_grpo": {"advantages": "dr_grpo", "loss_aggregation": "seq-mean-token-sum-norm"},
    "dapo": {"advantages": "grpo", "clip": {"low": 0.2, "high": 0.28}},
    "gspo": {"advantages": "grpo", "ratio": "sequence-mean", "clip": {"low": 3e-4, "high": 4e-4}, **MEANS},
    "cispo": {"advantages": "grpo", "policy_loss": "cispo", "clip": {"low": 1.0, "high": 4.0}},
    "rloo": {"advantages": "rloo", **REINFORCE},
    "reinforce": {"advantages": "reinforce", **REINFORCE},
    "remax": {"advantages": "remax", "greedy_baseline": True, **REINFORCE},
    "reinforce_pp": {"advantages": "reinforce_pp"},
    "reinforce_pp_baseline": {"advantages": "reinforce_pp_baseline"},
    "ppo": {"advantages": "gae", "critic": {}},
}
"""Methods: each is a choice of settings, which a recipe may change. CISPO's clip bounds the weight itself: 1 - low (0: no
lower bound) and 1 + high."""

COMPARING = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline")
"""Advantages that are 0 for a group of one completion."""
INPUTS = {"gae": "critic", "remax": "greedy_baseline"}
"""What a built-in advantage needs besides rewards."""


def with_preset(values: Any, preset: Mapping[str, Any]) -> Any:
    """Return raw settings with those of a preset filled in; inside of blocks, key by key."""
    if not isinstance(values, Mapping):
        return values
    out = dict(values)
    for name, own in preset.items():
        given = out.get(name)
        if given is None and not (name == "critic" and name in out):  # critic: null switches it off
            out[name] = own
        elif isinstance(given, Mapping) and name in ("advantages", "policy_loss"):
            out[name] = given if "name" in given else {"name": own, **given}
        elif isinstance(given, Mapping) and isinstance(own, Mapping):
            out[name] = {**own, **{k: v for k, v in given.items() if v is not None}}
    return out


class AsynchronousConfig(Config):
    """Sample and score coming steps while the policy is trained on the current one. See docs/asynchronous-rl.md."""

    max_staleness: int = Field(
        1,
        ge=0,
        description="Steps by which the weights that sampled a token may be behind those that are trained on it; so many coming steps are sampled meanwhile. 0: nothing overlaps, as without asynchronous.",
    )


class RLConfig(RolloutConfig):
    """Policy gradients: completions are sampled and scored by rewards; the better ones become more likely."""

    one_process = ("keep_zeros", "asynchronous")
    method: str
    name: str = Field("rl", pattern=NAME, description="Name of the stage's folder in the run.")
    environment: EnvironmentConfig | None = Field(
        None, description="What answers the model within a completion. None: nothing does."
    )
    mini_batches: int = Field(1, ge=1, description="Optimizer steps on each batch, each on a part of its prompts.")
    ppo_epochs: int = Field(1, ge=1, description="Times that each batch is trained on.")
    advantages: AdvantagesConfig = Field(
        "grpo",
        validate_default=True,
        description="How much better a completion is than expected: grpo, dr_grpo, rloo, reinforce, remax, reinforce_pp, reinforce_pp_baseline, gae, or module:function of an AdvantageInputs. Default: the method's.",
    )
    policy_loss: PolicyLossConfig = Field(
        "clipped",
        validate_default=True,
        description="Loss of each token: clipped, cispo, reinforce, or module:function of a PolicyLossInputs. Default: the method's.",
    )
    ratio: Literal["token", "sequence-mean", "sequence"] = Field(
        "token",
        description="Importance ratio to the policy that sampled: of each token, of the sequence per token (GSPO), or of the whole sequence. Default: the method's.",
    )
    clip: ClipConfig = Field(ClipConfig(), description="Default: the method's.")
    loss_aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = (
        Field(
            "token-mean",
            description="Mean over tokens, or over sequences of the mean, the sum, or the sum divided by sampler.max_tokens. Default: the method's.",
        )
    )
    critic: CriticConfig | None = Field(None, description="Value head. None: no critic. Default: the method's.")
    greedy_baseline: bool = Field(
        False,
        description="Sample a greedy completion of each prompt, whose reward is a baseline. Default: the method's.",
    )
    mask_truncated: bool = Field(
        False,
        description="Train on no completion that was cut at max_tokens (DAPO's overlong filtering) or max_turns.",
    )
    kl: KLConfig = Field(default_factory=KLConfig)
    entropy_coef: float = Field(0.0, description="Coefficient of an entropy bonus. 0: none.")
    importance_sampling_cap: float | None = Field(
        None, gt=0, description="Upper bound of importance weights that correct for the sampler's numbers. None: none."
    )
    importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = Field(
        "token_truncate",
        description="Weights of tokens, or of whole sequences; above the cap they are held there, or left out of the loss.",
    )
    max_mismatch_kl: float | None = Field(
        None,
        gt=0,
        description="Nats per token (mismatch_kl, over about the last five steps) that the sampler and the learner may differ by; above, the stage stops. None: any.",
    )
    exploration: ExplorationConfig = ExplorationConfig()
    asynchronous: AsynchronousConfig | None = Field(
        None, description="Sample coming steps while training. None: a step is sampled, then trained on."
    )

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in RL_PRESETS and not is_import_path(method):
            raise ValueError(unknown_name(method, RL_PRESETS, "RL method"))
        return method

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return with_preset(values, RL_PRESETS.get(values.get("method", ""), {}) if isinstance(values, Mapping) else {})

    @property
    def single_update(self) -> bool:
        """Return True if every batch is fresh and gets one optimizer step, so that all ratios are 1."""
        return self.mini_batches * self.ppo_epochs == 1 and not self.off_policy

    @property
    def ahead(self) -> int:
        """Return how many coming steps are sampled while a step is trained on."""
        return 0 if self.asynchronous is None else self.asynchronous.max_staleness

    @property
    def off_policy(self) -> bool:
        """Return True if a batch may contain tokens that an earlier policy sampled."""
        return self.exploration.off_policy or self.ahead > 0

    @property
    def kl_in_reward(self) -> bool:
        """Return True if the KL penalty is subtracted from the reward."""
        return bool(self.kl.coefficient) and self.kl.where == "reward"

    @model_validator(mode="after")
    def _fits(self) -> RLConfig:
        for mistake in (*self._mistakes(), *self._exploration_mistakes(), *self._asynchronous_mistakes()):
            raise ValueError(mistake)
        return self

    def _mistakes(self) -> Iterator[str]:
        """Yield settings that contradict one another or would do nothing."""
        if self.optimizer.kind == "schedule_free":
            yield "optimizer: schedule_free samples from other weights than it takes gradients at: use another kind"
        if self.prompts_per_step % self.mini_batches:
            yield f"prompts_per_step ({self.prompts_per_step}) must be a multiple of mini_batches ({self.mini_batches})"
        if self.environment is not None and self.sampler.min_tokens:
            yield "sampler.min_tokens would hold in every turn anew: leave it out with an environment"
        if self.environment is None and self.kl.later_turns != 1:
            yield "kl.later_turns would do nothing: only an environment answers, so that there is a second turn"
        name = self.advantages.name
        if name in COMPARING and self.group_size < 2:
            yield f"{name} compares the completions of a prompt: group_size must be 2 or more"
        for part, setting in INPUTS.items():
            if name == part and not getattr(self, setting):
                yield f"advantages {name} need {setting}, which is off"
            if name in ADVANTAGES and name != part and getattr(self, setting):
                yield f"{setting} serves advantages {part} or your own, and these are {name}: leave it out"
        own = ClipConfig.model_validate(RL_PRESETS.get(self.method, {}).get("clip", {}))
        clip = sorted(f"clip.{k}" for k, v in self.clip if v != getattr(own, k))
        if clip and self.single_update:
            yield (
                f"{', '.join(clip)}: with one update per batch the ratio is 1 and nothing is clipped. Leave out, or set "
                "mini_batches or ppo_epochs above 1"
            )
        if self.importance_sampling_cap is None and self.importance_sampling_mode != "token_truncate":
            yield "importance_sampling_mode would do nothing: there are no weights unless importance_sampling_cap is set"
        if self.max_mismatch_kl is not None and (cut := truncating_setting(self.sampler)) is not None:
            yield f"max_mismatch_kl needs log-probabilities of whole distributions: leave out sampler.{cut}"
        if self.clip.dual and self.policy_loss.name == "cispo":
            yield "clip.dual bounds a ratio's loss, and cispo's weight is bounded already: leave it out"

    def _exploration_mistakes(self) -> Iterator[str]:
        explore, sampler, rewards = self.exploration, self.sampler, self.rewards.terms
        steps = any(p.scores_steps for p in rewards)
        if explore.dynamic_sampling and self.group_size == 1 and not steps and explore.replay is None:
            yield "dynamic_sampling replaces groups whose rewards are all equal, as one of one is: raise group_size"
        if explore.entropy_target is not None:
            temperature = sampler.temperature
            low, high = explore.entropy_target.bounds(temperature)
            if low > high:
                yield f"entropy_target.low ({low:g}) must not be above entropy_target.high ({high:g})"
            if explore.entropy_target.control == "temperature" and not low <= temperature <= high:
                yield f"sampler.temperature ({temperature:g}) must be within entropy_target's {low:g} to {high:g}"
        if explore.adaptive_group_size is not None:
            first, whole = explore.adaptive_group_size.first, [p.title for p in rewards if p.compares_completions]
            if first >= self.group_size:
                yield f"adaptive_group_size.first ({first}) must be below group_size ({self.group_size})"
            if whole:
                yield f"adaptive_group_size scores completions before a group is complete, and {whole[0]!r} needs all"
        cut, tokens = truncating_setting(sampler), explore.partial_rollouts
        if self.off_policy and cut is not None:
            parts = "asynchronous needs" if self.ahead else "replay and partial_rollouts need"
            yield f"{parts} log-probabilities of whole distributions: leave out sampler.{cut}"
        if tokens is not None and self.environment is not None:
            yield "partial_rollouts cuts completions in the middle of a turn, which an environment can't answer: use one"
        if tokens is not None and tokens >= sampler.max_tokens:
            yield f"partial_rollouts ({tokens}) must be below sampler.max_tokens ({sampler.max_tokens})"

    def _asynchronous_mistakes(self) -> Iterator[str]:
        """Yield settings that can't hold, or would do nothing, if coming steps are sampled ahead."""
        explore = self.exploration
        if not self.ahead:
            return
        for name in ("curriculum", "replay"):
            if getattr(explore, name) is not None:
                yield (
                    f"exploration.{name} chooses prompts by the outcomes of all steps before, which are not known when "
                    f"coming steps are sampled: leave it out, or set asynchronous.max_staleness to 0"
                )
        if explore.max_staleness != type(explore).model_fields["max_staleness"].default:
            yield (
                "exploration.max_staleness would do nothing: partial rollouts continue within their step, and "
                "asynchronous.max_staleness bounds the age of every token. Leave it out"
            )
