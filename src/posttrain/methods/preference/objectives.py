"""The preference methods as presets, and the losses of the learner.

The formulas are in `posttrain.losses.preference_loss`; docs/preference.md says where they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.core.errors import RecipeError
from posttrain.core.ragged import RaggedBatch
from posttrain.core.types import Sample
from posttrain.data.preference_rows import Pair, Unpaired
from posttrain.losses import preference_loss as pref
from posttrain.models.language_model import LanguageModel
from posttrain.trainer.reference_model import answer_sums
from posttrain.trainer.train_step import LossFunction

PairLossFunction = Callable[["Objective", Tensor, Tensor | None], Tensor]
"""(objective, difference h_P of the two answers' scores, probability_P that chosen is better) -> losses_P."""


@dataclass(frozen=True)
class Preset:
    """Define a preference method.

    Attributes:
        loss: Losses of pairs. None: of single answers (KTO).
        reference: Scores are log ratios to the model before the stage; else plain log-probabilities.
        per_token: Scores are divided by the answer's number of tokens.
        odds: Scores are log odds.
        beta, smoothing, nll: Values if the recipe gives none.
    """

    loss: PairLossFunction | None
    reference: bool = True
    per_token: bool = False
    odds: bool = False
    beta: float = 0.1
    smoothing: float = 0.0
    nll: float = 0.0


def _dpo(objective: Objective, h_P: Tensor, probability_P: Tensor | None) -> Tensor:
    return pref.dpo(h_P, objective.beta, probability_P, objective.smoothing)


def _robust(objective: Objective, h_P: Tensor, probability_P: Tensor | None) -> Tensor:
    return pref.robust_dpo(h_P, objective.beta, objective.smoothing, probability_P)


def _ipo(objective: Objective, h_P: Tensor, probability_P: Tensor | None) -> Tensor:
    return pref.ipo(h_P, objective.beta, probability_P)


def _simpo(objective: Objective, h_P: Tensor, probability_P: Tensor | None) -> Tensor:
    return pref.simpo(h_P, objective.beta, objective.gamma, probability_P)


def _orpo(objective: Objective, h_P: Tensor, probability_P: Tensor | None) -> Tensor:
    return pref.orpo(h_P, objective.beta, probability_P)


PRESETS = {
    "dpo": Preset(_dpo),
    "cdpo": Preset(_dpo, smoothing=0.1),
    "robust_dpo": Preset(_robust, smoothing=0.1),
    "dpo_norm": Preset(_dpo, per_token=True, beta=5.0),
    "ipo": Preset(_ipo, per_token=True),
    "kto": Preset(None),
    "cpo": Preset(_dpo, reference=False, nll=1.0),
    "simpo": Preset(_simpo, reference=False, per_token=True, beta=2.0),
    "orpo": Preset(_orpo, reference=False, per_token=True, odds=True, nll=1.0),
}
"""IPO's log ratios are divided by lengths, as its authors' experiments have it; the paper's formula has sums."""


@dataclass(frozen=True)
class Objective:
    """Hold a preset with its numbers.

    Attributes:
        own_loss: A loss from outside in place of the preset's: (scores of chosen, of rejected) -> losses, shape P each.
    """

    preset: Preset
    beta: float
    smoothing: float = 0.0
    gamma: float = 1.0
    nll: float = 0.0
    good: float = 1.0
    bad: float = 1.0
    own_loss: Callable[[Tensor, Tensor], Tensor] | None = None


def objective(config: Any) -> Objective:
    """Return the objective that a stage's settings ask for, with the method's own numbers where they give none.

    Args:
        config: Settings with `preset` (a key of `PRESETS`), beta, label_smoothing, gamma and nll_weight; optionally
            `own_loss`, desirable_weight and undesirable_weight.
    """
    preset = PRESETS[config.preset]
    names = ("beta", "label_smoothing", "gamma", "nll_weight", "desirable_weight", "undesirable_weight")
    defaults = (preset.beta, preset.smoothing, 1.0, preset.nll, 1.0, 1.0)
    settings = (getattr(config, name, None) for name in names)
    beta, smoothing, gamma, nll, good, bad = (d if s is None else s for s, d in zip(settings, defaults, strict=True))
    return Objective(preset, beta, smoothing, gamma, nll, good, bad, getattr(config, "own_loss", None))


def pair_samples(pair: Pair, number: int) -> tuple[Sample, Sample]:
    """Return chosen and rejected as samples that stay in one pass and share their prompt."""
    meta = {"group": number, "shared": pair.prompt, "whole": True, "number": number}
    chosen, rejected = pair.chosen, pair.rejected
    return (
        Sample(chosen.tokens, chosen.weights, pair.source, {**meta, "chosen": True}),
        Sample(rejected.tokens, rejected.weights, pair.source, {**meta, "chosen": False}),
    )


def answer_sample(answer: Unpaired, number: int) -> Sample:
    """Return a single answer as a sample."""
    sample = answer.sample
    return Sample(sample.tokens, sample.weights, answer.source, {"shared": answer.prompt, "number": number})


def pair_scores(objective: Objective, sums_P: Tensor, reference_P: Tensor | None, lengths_P: Tensor) -> Tensor:
    """Return an answer's score before beta: log ratio or log-probability, in sum or per token, or log odds; shape P.

    Args:
        objective: Method and numbers.
        sums_P: Log-probability of each answer under the policy, in nats.
        reference_P: The same under the reference; None for methods without one.
        lengths_P: Number of tokens of each answer.
    """
    preset = objective.preset
    values = pref.log_ratio(sums_P, reference_P) if reference_P is not None else sums_P
    if preset.per_token:
        values = pref.per_token(values, lengths_P)
    return pref.log_odds(values) if preset.odds else values


def pair_losses(objective: Objective, chosen_P: Tensor, rejected_P: Tensor, probability_P: Tensor | None) -> Tensor:
    """Return the losses of pairs, shape P.

    A loss from outside knows no label noise: its expectation over a label that is right with probability p is
    p loss(chosen, rejected) + (1 - p) loss(rejected, chosen).

    Args:
        objective: Method and numbers.
        chosen_P: Scores of the chosen answers (`pair_scores`).
        rejected_P: Scores of the rejected answers.
        probability_P: Probability that chosen is the better answer. None: 1.

    Raises:
        RecipeError: A loss from outside returned another shape.
    """
    own = objective.own_loss
    if own is None:
        assert objective.preset.loss is not None
        return objective.preset.loss(objective, chosen_P - rejected_P, probability_P)
    losses_P = own(chosen_P, rejected_P)
    if losses_P.shape != chosen_P.shape:
        raise RecipeError(f"expected a loss for each pair, shape {tuple(chosen_P.shape)}, got {tuple(losses_P.shape)}")
    if probability_P is None:
        return losses_P
    return probability_P * losses_P + (1 - probability_P) * own(rejected_P, chosen_P)


def pair_loss(
    objective: Objective, pairs: Sequence[Pair], reference: Sequence[Sequence[float]] | None, count: int | None = None
) -> LossFunction:
    """Return the loss of one optimizer step.

    Args:
        objective: Method and numbers.
        pairs: All pairs of the step; their samples are made by `pair_samples` with their numbers.
        reference: Log-probabilities of (chosen, rejected) of each pair. None: the method has no reference.
        count: Divisor of the losses, if prompts without a pair count as zeros of the mean. None: the number of pairs.
    """
    divisor, total = count or len(pairs), max(1, len(pairs))
    soft = any(p.probability != 1 for p in pairs)

    def loss(model: LanguageModel, batch: RaggedBatch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        sums, lengths = answer_sums(model, batch)
        places = {(s.meta["number"], s.meta["chosen"]): i for i, s in enumerate(batch.samples) if "number" in s.meta}
        numbers = sorted({number for number, _ in places})
        if not numbers:
            return sums.sum() * 0, {}
        sides = []
        for side, chosen in enumerate((True, False)):
            at = torch.tensor([places[n, chosen] for n in numbers], device=sums.device)
            reference_P = None if reference is None else _column(reference, numbers, side, sums)
            sides.append((sums[at], lengths[at], pair_scores(objective, sums[at], reference_P, lengths[at])))
        (chosen_sums, chosen_lengths, better), (rejected_sums, _, worse) = sides
        probability = torch.tensor([pairs[n].probability for n in numbers]).to(sums) if soft else None
        losses = pair_losses(objective, better, worse, probability)
        likelihood = pref.nll(chosen_sums, chosen_lengths)
        if objective.nll:
            losses = losses + objective.nll * likelihood
        metrics = {
            **pref.pair_metrics(objective.beta * better, objective.beta * worse),
            "log_ratio": (better - worse).detach().sum(),
            "logp_chosen": chosen_sums.detach().sum(),
            "logp_rejected": rejected_sums.detach().sum(),
            "nll": likelihood.detach().sum(),
        }
        return losses.sum() / divisor, {name: value.double() / total for name, value in metrics.items()}

    return loss


def _column(reference: Sequence[Sequence[float]], numbers: Sequence[int], side: int, like: Tensor) -> Tensor:
    return torch.tensor([reference[n][side] for n in numbers], dtype=torch.float64).to(like)


def kto_loss(
    objective: Objective, answers: Sequence[Unpaired], reference: Sequence[Sequence[float]], kl: float
) -> LossFunction:
    """Return the loss of one optimizer step of KTO.

    Args:
        objective: Method and numbers.
        answers: All answers of the step; their samples are made by `answer_sample` with their numbers.
        reference: Log-probability of each under the reference, as a list of one.
        kl: The batch's `kl_estimate`.
    """
    count = len(answers)
    good = sum(a.desirable for a in answers)

    def loss(model: LanguageModel, batch: RaggedBatch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        sums, lengths = answer_sums(model, batch)
        places = [i for i, s in enumerate(batch.samples) if "number" in s.meta]
        if not places:
            return sums.sum() * 0, {}
        sums, lengths = sums[places], lengths[places]
        numbers = [batch.samples[i].meta["number"] for i in places]
        desirable = torch.tensor([answers[n].desirable for n in numbers], device=sums.device)
        ratios = pref.log_ratio(sums, _column(reference, numbers, 0, sums))
        losses = pref.kto(ratios, desirable, kl, objective.beta, objective.good, objective.bad)
        rewards = objective.beta * ratios.detach()
        metrics = {
            "reward_desirable": rewards[desirable].sum() / max(1, good),
            "reward_undesirable": rewards[~desirable].sum() / max(1, count - good),
            "nll": pref.nll(sums.detach(), lengths).sum() / count,
        }
        metrics["kl"] = torch.tensor(kl * len(numbers) / count)
        return losses.sum() / count, metrics

    return loss
