"""Direct preference optimisation: better answers are made likelier than worse ones, without a reward model."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.names import PREFERENCE_LOSSES
from posttrain.config.open_functions import FunctionConfig, open_function
from posttrain.config.optimizer_settings import OptimizerConfig
from posttrain.config.settings import NAME, DataConfig, MeasuredConfig
from posttrain.core.errors import DataError
from posttrain.core.types import Metric
from posttrain.methods.sft import infer_trained_eos
from posttrain.trainer.stage import Stage, StageRun

if TYPE_CHECKING:
    from posttrain.methods.preference.pair_trainer import PairTrainer
    from posttrain.trainer.policy import LoadedPolicy

LossConfig = Annotated[FunctionConfig, open_function(PREFERENCE_LOSSES, "preference loss")]
PairLoss = Literal["dpo", "ipo", "cdpo", "robust_dpo", "dpo_norm", "orpo", "simpo", "cpo"]
"""Losses of a pair of answers."""

BETA: Any = Field(
    None,
    gt=0,
    description="How strongly a log ratio counts (ORPO: weight of the odds ratio). None: the method's own, 0.1; dpo_norm 5, simpo 2.",
)
SMOOTHING: Any = Field(
    None, ge=0, lt=0.5, description="Share of labels that are wrong (cdpo, robust_dpo). None: 0.1 for these."
)
GAMMA: Any = Field(None, ge=0, description="Target margin of the rewards (simpo). None: 1.")
NLL: Any = Field(
    None,
    ge=0,
    description="Weight of the better answer's negative log-likelihood a token, added to the loss. None: 1 for orpo and cpo, else 0.",
)


def check_loss(loss: str, label_smoothing: float | None, gamma: float | None) -> None:
    """Raise ValueError for settings that belong to another loss.

    Args:
        loss: Name of the loss.
        label_smoothing: The setting. None: not set.
        gamma: The setting. None: not set.
    """
    if label_smoothing is not None and loss not in ("cdpo", "robust_dpo"):
        raise ValueError(f"label_smoothing belongs to cdpo and robust_dpo, and this is {loss}")
    if gamma is not None and loss != "simpo":
        raise ValueError(f"gamma belongs to simpo, and this is {loss}")


class PreferenceOptimizerConfig(OptimizerConfig):
    """AdamW as for other stages, at a twentieth of the rate."""

    lr: float = Field(
        1e-6, gt=0, description="Peak learning rate; adapters take about ten times that of full fine-tuning."
    )
    warmup: float = Field(
        0.1,
        ge=0,
        description="Steps of linear warm-up; below 1: that fraction of all steps, rounded, and at least one step. 0: none.",
    )


class PreferenceConfig(MeasuredConfig):
    """Direct preference optimisation: better answers made likelier than worse ones, without a reward model."""

    method: str
    name: str = Field("preference", pattern=NAME, description="Name of the stage's folder in the run.")
    data: DataConfig
    loss: LossConfig | None = Field(
        None,
        description="A loss from outside, module:function(chosen, rejected, *, settings) of the answers' scores as the method has them (dpo: log ratios to the reference; simpo: log-probabilities a token); its settings beside its name. None: the method's own.",
    )
    beta: float | None = BETA
    label_smoothing: float | None = SMOOTHING
    gamma: float | None = GAMMA
    nll_weight: float | None = NLL
    desirable_weight: float | None = Field(None, gt=0, description="Weight of good answers (kto). None: 1.")
    undesirable_weight: float | None = Field(None, gt=0, description="Weight of bad answers (kto). None: 1.")
    batch_size: int = Field(16, ge=1, description="Pairs (kto: answers) a step, over all ranks.")
    optimizer: PreferenceOptimizerConfig = PreferenceOptimizerConfig()

    @model_validator(mode="after")
    def _belong(self) -> PreferenceConfig:
        check_loss(self.method, self.label_smoothing, self.gamma)
        if self.method == "kto":
            if self.nll_weight is not None:
                raise ValueError("nll_weight belongs to the losses of pairs, and kto's answers come singly")
        elif self.desirable_weight is not None or self.undesirable_weight is not None:
            raise ValueError(f"desirable_weight and undesirable_weight belong to kto, and this is {self.method}")
        if self.loss is not None and self.method == "kto":
            raise ValueError("loss is of pairs, and kto's answers come singly: take method: dpo")
        if self.loss is not None and (self.label_smoothing is not None or self.gamma is not None):
            raise ValueError("label_smoothing and gamma belong to the methods' own losses: leave them out beside loss")
        return self

    @property
    def preset(self) -> str:
        """Return the method that defines the answers' scores."""
        return self.method

    @property
    def own_loss(self) -> Any:
        """Return the loss from outside with its settings; None: the method's loss."""
        return self.loss.load({}) if self.loss is not None else None


TITLES = {
    "dpo": "DPO",
    "ipo": "IPO",
    "cdpo": "Conservative DPO",
    "robust_dpo": "Robust DPO",
    "dpo_norm": "Length-normalised DPO",
    "kto": "KTO",
    "orpo": "ORPO",
    "simpo": "SimPO",
    "cpo": "CPO",
}


class Preference(Stage):
    """Train on pairs of answers (KTO: on single answers that are good or bad)."""

    Config = PreferenceConfig
    metrics = (
        Metric("loss", "Loss", "", "Preferences", "lower"),
        Metric("held_out/loss", "Held out", "", "Preferences", "lower", over="loss"),
        Metric("accuracy", "Accuracy", "share of pairs ranked correctly", "Preferences", "higher"),
        Metric("held_out/accuracy", "Held out", "share of pairs", "Preferences", "higher", over="accuracy"),
        Metric("margin", "Margin", "implicit reward, chosen − rejected", "Preferences", "higher"),
        Metric("held_out/margin", "Held out", "implicit reward", "Preferences", "higher", over="margin"),
        Metric("reward_chosen", "Chosen answers", "implicit reward", "Implicit rewards and likelihoods"),
        Metric("reward_rejected", "Rejected answers", "implicit reward", "Implicit rewards and likelihoods"),
        Metric("reward_desirable", "Desirable answers", "implicit reward", "Implicit rewards and likelihoods"),
        Metric("reward_undesirable", "Undesirable answers", "implicit reward", "Implicit rewards and likelihoods"),
        Metric("logp_chosen", "Chosen answers", "log-probability, nats/answer", "Implicit rewards and likelihoods"),
        Metric("logp_rejected", "Rejected answers", "log-probability, nats/answer", "Implicit rewards and likelihoods"),
        Metric(
            "nll", "Negative log-likelihood", "nats/token, trained answers", "Implicit rewards and likelihoods", "lower"
        ),
        Metric("kl", "KL baseline", "nats/answer", "Implicit rewards and likelihoods"),
        Metric("log_ratio", "Log-ratio difference", "nats, chosen − rejected", "Details"),
    )
    progress = ("loss", "accuracy", "margin", "held_out/accuracy")
    sums = True

    def __init__(self, config: Any, context: Any) -> None:
        super().__init__(config, context)
        self.title = TITLES[config.method]

    def prepare(self) -> list[tuple[str, Any]]:
        from posttrain.data.preference_rows import prepare_pairs, prepare_unpaired

        config, context = self.config, self.context
        read: Any = prepare_unpaired if config.method == "kto" else partial(prepare_pairs, margins=False)
        trained, held_out = self.read_held_out(
            lambda data: read(data, context.tokenizer, context=context.context),
            config.data,
            config.held_out,
        )
        self.rows, self.held_out = trained.items, held_out.items if held_out else []
        for title, answers in self.data if config.method == "kto" else ():
            good = answers.items.good
            if good in (0, len(answers)):
                raise DataError(
                    f"stage {title}: all {len(answers):,} answers are {'good' if good else 'bad'} ones, and "
                    "kto learns by telling good ones from bad. Give rows of both; of good ones alone: method: sft"
                )
        return self.data

    def trainer(self, policy: LoadedPolicy, run: StageRun) -> PairTrainer:
        from posttrain.methods.preference.pair_trainer import pair_trainer

        return pair_trainer(self.config, policy.policy, self.rows, self.held_out, run, self.context.context)

    def end_token(self, policy: LoadedPolicy) -> int | None:
        return infer_trained_eos(self.data[0][1].items.better)
