"""Policy losses and KL estimators by name (imports no torch by itself).

`policy_loss:` in a recipe names a function here or ``module:function`` of your own. It takes a `PolicyLossInputs` and
returns the loss of each token, or that and a dict of sums over tokens for metrics. `kl.estimator` likewise: a function
of (logprobs_N, reference_logprobs_N) that returns the estimate at each token. Keyword-only parameters are settings.
Formulas and sources are in `posttrain.losses.policy_loss` and `posttrain.losses.kl`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.config.rl import ClipConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PolicyLossInputs:
    """Inputs of a policy loss: N tokens of R whole sequences of a micro-batch.

    Attributes:
        logprobs_N: Log-probabilities of the policy; the gradient flows through them.
        old_logprobs_N: Those before the batch's first update.
        ratio_N: Ratio of the two by token or by sequence, as the setting `ratio`.
        advantages_N: Advantage of each token.
        sequence_N: Number of the sequence of each token.
        lengths_R: Tokens of each sequence.
        clip: Settings of the clip.
        single_update: True if the batch is fresh and gets one update, so that all ratios are 1.
    """

    logprobs_N: Tensor
    old_logprobs_N: Tensor
    ratio_N: Tensor
    advantages_N: Tensor
    sequence_N: Tensor
    lengths_R: Tensor
    clip: ClipConfig
    single_update: bool


def clipped_policy_loss(batch: PolicyLossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute PPO's clipped surrogate."""
    from posttrain.losses import policy_loss as formulas

    return formulas.clipped(batch.ratio_N, batch.advantages_N, batch.clip.low, batch.clip.high, batch.clip.dual)


def cispo_policy_loss(batch: PolicyLossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute CISPO's loss: the importance weight is clipped, and every token keeps its gradient."""
    from posttrain.losses import policy_loss as formulas

    low, high = max(0.0, 1 - batch.clip.low), 1 + batch.clip.high
    return formulas.cispo(batch.ratio_N, batch.logprobs_N, batch.advantages_N, high, low)


def reinforce_policy_loss(batch: PolicyLossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute -A log pi on fresh samples; with several updates, or older samples, the clipped surrogate."""
    from posttrain.losses import policy_loss as formulas

    if batch.single_update:
        return formulas.reinforce_loss(batch.logprobs_N, batch.advantages_N), {}
    return clipped_policy_loss(batch)


def kl_k1(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """Estimate the KL by d = log pi - log pi_ref."""
    from posttrain.losses.kl import kl

    return kl(logprobs_N, reference_logprobs_N, "k1")


def kl_k2(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """Estimate the KL by d^2 / 2."""
    from posttrain.losses.kl import kl

    return kl(logprobs_N, reference_logprobs_N, "k2")


def kl_k3(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """Estimate the KL by e^-d - 1 + d."""
    from posttrain.losses.kl import kl

    return kl(logprobs_N, reference_logprobs_N, "k3")
