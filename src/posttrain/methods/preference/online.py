"""Online DPO: the policy's own completions, scored by rewards; the best of each prompt is preferred to the worst."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from posttrain.config.rl import RolloutConfig
from posttrain.config.settings import NAME
from posttrain.core.types import Metric
from posttrain.methods.preference.offline import BETA, GAMMA, NLL, SMOOTHING, PairLoss, Preference, check_loss
from posttrain.methods.rl.rl_metrics import ROLLOUT_DETAILS, ROLLOUT_METRICS
from posttrain.methods.rl.rl_stage import RolloutStage
from posttrain.trainer.stage import StageRun

if TYPE_CHECKING:
    from posttrain.methods.preference.online_trainer import OnlinePairTrainer
    from posttrain.trainer.policy import LoadedPolicy


class OnlineDPOConfig(RolloutConfig):
    """Completions are sampled and scored by rewards; the best of each prompt is preferred to the worst."""

    method: str = "online_dpo"
    name: str = Field("online", pattern=NAME, description="Name of the stage's folder in the run.")
    group_size: int = Field(8, ge=2, description="Completions of each prompt (G); the best and the worst make a pair.")
    loss: PairLoss = Field("dpo", description="Loss of a pair: as the methods of the same names.")
    beta: float | None = BETA
    label_smoothing: float | None = SMOOTHING
    gamma: float | None = GAMMA
    nll_weight: float | None = NLL

    @property
    def preset(self) -> str:
        """Return the method whose loss is applied to a pair."""
        return self.loss

    @model_validator(mode="after")
    def _fits(self) -> OnlineDPOConfig:
        check_loss(self.loss, self.label_smoothing, self.gamma)
        return self


class OnlineDPO(RolloutStage):
    """Sample, score and train on a pair of each prompt."""

    Config = OnlineDPOConfig
    title = "Online DPO"
    metrics = (
        *ROLLOUT_METRICS,
        Metric("ties", "Ties", "prompts without a pair", "Reward", "lower"),
        Metric("reward_gap", "Reward gap", "chosen − rejected", "Reward"),
        *Preference.metrics,
        *ROLLOUT_DETAILS,
    )
    progress = ("reward", "held_out", "accuracy", "margin")

    def trainer(self, policy: LoadedPolicy, run: StageRun) -> OnlinePairTrainer:
        from posttrain.methods.preference.objectives import objective
        from posttrain.methods.preference.online_trainer import OnlinePairTrainer
        from posttrain.methods.rl.rollout_setup import frozen_reference, open_rollouts
        from posttrain.trainer.train_step import Learner

        config: OnlineDPOConfig = self.config
        needed = objective(config).preset.reference
        reference = frozen_reference(config, policy, run, needed)
        learner = Learner(policy.policy, config.optimizer, config.systems, config.steps)
        functions = self.context.functions
        rollouts = open_rollouts(config, policy, self.prompts, run, functions, learner=learner, reference=reference)
        return OnlinePairTrainer(config, learner, *rollouts, reference if needed else None)
