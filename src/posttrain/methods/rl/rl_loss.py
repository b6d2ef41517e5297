"""The last step: the loss of one optimizer step on a batch, or on a part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.config import RLConfig
from posttrain.config.names import KL_ESTIMATORS, POLICY_LOSSES
from posttrain.config.rl import truncating_setting
from posttrain.core import distributed
from posttrain.core.ragged import RaggedBatch
from posttrain.core.types import Sample
from posttrain.losses import policy_loss as formulas
from posttrain.losses.aggregation import Aggregation, denominator, reduce, sequence_index, token_weights
from posttrain.losses.kl import kl
from posttrain.methods.rl.compute_advantages import Advantages
from posttrain.methods.rl.policy_losses import PolicyLossInputs
from posttrain.methods.rl.sequence_logprobs import Logprobs, Tensors, TrainingSequence, temperatures
from posttrain.models.language_model import LanguageModel
from posttrain.trainer.train_step import LossFunction

AGGREGATIONS: dict[str, Aggregation] = {
    "token-mean": "token",
    "seq-mean-token-mean": "sequence",
    "seq-mean-token-sum": "constant",
    "seq-mean-token-sum-norm": "constant",
}


@dataclass(frozen=True)
class TrainingBatch:
    """Sequences to train on: those of some groups, with log-probabilities, advantages, and the step's settings."""

    settings: RLConfig
    groups: int
    sequences: Sequence[TrainingSequence]
    logprobs: Logprobs
    advantages: Advantages

    def select(self, groups: range) -> TrainingBatch:
        """Return the sequences of some groups."""
        places = [i for i, s in enumerate(self.sequences) if s.group in groups]
        sequences = [self.sequences[i] for i in places]
        logprobs, advantages = self.logprobs.select(places), self.advantages.select(places)
        return TrainingBatch(self.settings, len(groups), sequences, logprobs, advantages)

    def samples(self) -> list[Sample]:
        """Return the sequences that have a gradient in the learner's form."""
        return [s.sample(i) for i, s in enumerate(self.sequences) if self.advantages.trained[i]]


class Extremes:
    """Keep the largest values seen: what can't be summed over micro-batches. Tensors stay on the device."""

    def __init__(self) -> None:
        self.largest: dict[str, Tensor] = {}

    def see(self, name: str, values_N: Tensor) -> None:
        """Take values into account."""
        largest = values_N.detach().max()
        self.largest[name] = torch.maximum(self.largest[name], largest) if name in self.largest else largest

    def metrics(self) -> dict[str, float]:
        """Return the largest values over all ranks; `ratio_max` is at least 1."""
        of_ranks = distributed.all_gather_object({name: float(value) for name, value in self.largest.items()})
        out = {name: max(r[name] for r in of_ranks if name in r) for name in sorted(set().union(*of_ranks))}
        out["ratio_max"] = max(1.0, out.get("ratio_max", 1.0))
        return {name: value for name, value in out.items() if value}


def ratio_of(
    kind: str, logprobs_N: Tensor, old_N: Tensor, sequence_N: Tensor, lengths_R: Tensor, by_token: bool
) -> Tensor:
    """Return the importance ratio at each token.

    Args:
        kind: token, sequence-mean or sequence.
        logprobs_N: Log-probabilities of the policy.
        old_N: Those before the batch's first update.
        sequence_N: Number of the sequence of each token.
        lengths_R: Tokens of each sequence.
        by_token: Advantages differ within a sequence: a ratio of sequences has the token's gradient.
    """
    if kind == "token":
        return formulas.token_ratio(logprobs_N, old_N)
    whole = formulas.sequence_token_ratio if by_token else formulas.sequence_ratio
    return whole(logprobs_N, old_N, sequence_N, lengths_R, mean=kind == "sequence-mean")


def importance_weights(
    settings: RLConfig, learner_N: Tensor, sampler_N: Tensor, sequence_N: Tensor, lengths_R: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weights that correct for the sampler's probabilities, and their metrics.

    Args:
        settings: Settings of the step, with a cap.
        learner_N: The learner's log-probabilities, at the weights that sampled.
        sampler_N: The sampler's.
        sequence_N: Number of the sequence of each token.
        lengths_R: Tokens of each sequence.
    """
    cap = settings.importance_sampling_cap
    assert cap is not None
    level, _, above = settings.importance_sampling_mode.partition("_")
    whole = (sequence_N, lengths_R) if level == "sequence" else (None, None)
    weights, sums = formulas.truncated_importance(learner_N, sampler_N, cap, *whole, mask=above == "mask")
    return weights, {name: value for name, value in sums.items() if name.startswith("importance")}


def policy_gradient_loss(batch: TrainingBatch, fresh: bool, extremes: Extremes) -> LossFunction:
    """Return the loss of one optimizer step on all of a batch.

    Args:
        batch: All sequences of the step; those without a gradient count in means.
        fresh: The weights are those that sampled, so that the sampler and the learner can be compared.
        extremes: Takes the largest ratio and the largest difference.
    """
    settings, sequences = batch.settings, batch.sequences
    loss_of = settings.policy_loss.load(POLICY_LOSSES)
    by_token = any(s.rollout.steps for s in sequences)
    kind = AGGREGATIONS[settings.loss_aggregation]
    summed = settings.loss_aggregation == "seq-mean-token-sum"
    constant = 1.0 if summed else float(settings.sampler.max_tokens)
    if settings.ratio == "sequence" and summed and not settings.single_update and not by_token:
        kind = "sequence"  # the ratio of the whole sequence stands at each of its tokens: it counts once
    written = torch.tensor([s.length for s in sequences])
    divisor, tokens = denominator(kind, written), denominator("token", written)
    want = "logprobs" if settings.critic is None else "values"
    beta = 0.0 if settings.kl.where == "reward" else settings.kl.coefficient
    divergence = settings.kl.estimator.load(KL_ESTIMATORS)
    comparable = fresh and truncating_setting(settings.sampler) is None  # of the same distribution

    def loss(model: LanguageModel, micro: RaggedBatch, count: float) -> tuple[Tensor, dict[str, Tensor]]:
        if "sequence" not in micro.samples[0].meta:
            return _loss_of_spare_pass(model, micro, want), {}
        numbers = [s.meta["sequence"] for s in micro.samples]
        mine, device = [sequences[i] for i in numbers], micro.tokens_T.device

        def flat(tensors: Tensors) -> Tensor:
            return torch.cat([tensors[i] for i in numbers]).to(device)

        lengths = torch.tensor([s.length for s in mine], device=device)
        targets = torch.cat([s.targets(row) for row, s in zip(micro.rows, mine, strict=True)])
        out = model(
            micro, want, targets,
            temperature=temperatures(settings.sampler, mine, device),
            entropy=settings.entropy_coef != 0,
            probe=settings.critic is None or settings.critic.detach,
        )  # fmt: skip
        logprobs, sequence, sampled = out[0], sequence_index(lengths, len(targets)), flat(batch.logprobs.sampled)
        old = logprobs.detach() if batch.logprobs.old is None else flat(batch.logprobs.old)
        ratio = ratio_of(settings.ratio, logprobs, old, sequence, lengths, by_token)
        inputs = PolicyLossInputs(
            logprobs, old, ratio, flat(batch.advantages.advantages), sequence, lengths, settings.clip,
            settings.single_update,
        )  # fmt: skip
        found = loss_of(inputs)
        values, sums = found if isinstance(found, tuple) else (found, {})
        metrics = dict(sums)
        if settings.importance_sampling_cap is not None:
            importance, more = importance_weights(settings, old, sampled, sequence, lengths)
            values, metrics = values * importance, metrics | more
        if beta:
            assert batch.logprobs.reference is not None
            penalty = beta * divergence(logprobs, flat(batch.logprobs.reference))
            if settings.kl.later_turns != 1:
                penalty = penalty * torch.cat([s.turn_weights(settings.kl.later_turns) for s in mine]).to(device)
            values = values + penalty
        if settings.entropy_coef:
            values = values + formulas.entropy_bonus(out[1], settings.entropy_coef)
        if comparable:
            now = torch.tensor([s.age == 0 for s in mine], device=device)[sequence]
            difference = (logprobs.detach() - sampled).abs() * now
            metrics["mismatch"], metrics["fresh"] = difference.sum(), now.sum()
            metrics["mismatch_kl"] = (kl(sampled, logprobs.detach(), "k3") * now).sum()
            extremes.see("mismatch_max", difference)
        total = reduce(values, token_weights(kind, sequence, lengths, constant), divisor)
        if settings.critic is not None:
            assert batch.logprobs.values is not None and batch.advantages.returns is not None
            before, returns = flat(batch.logprobs.values), flat(batch.advantages.returns)
            error, more = formulas.value_loss(out[2], before, returns, settings.critic.clip)
            total = total + settings.critic.coefficient * error.sum() / tokens
            metrics |= {"value_loss": error.detach().sum(), **more}
        extremes.see("ratio_max", ratio)
        return total, {name: value.double() / count for name, value in metrics.items()}

    return loss


def _loss_of_spare_pass(model: LanguageModel, micro: RaggedBatch, want: str) -> Tensor:
    """Return 0 with a gradient of 0 for every weight: a pass that keeps ranks in step."""
    out = model(micro, want, micro.rows[0][-1:])
    return 0.0 * (out[0].sum() + (out[2].sum() if want == "values" else 0.0))  # type: ignore[no-any-return]
