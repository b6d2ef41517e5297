"""The preference methods: what each is a choice of, and the loss that the learner is given.

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

PairLoss = Callable[["Objective", Tensor, Tensor | None], Tensor]
"""(objective, difference h_P of the two answers' scores, probability_P that chosen is better) -> losses_P."""


@dataclass(frozen=True)
class Preset:
    """What a preference method is a choice of.

    Attributes:
        loss: Losses of pairs. None: of single answers (KTO).
        reference: Scores are log ratios to the model before the stage; else plain log-probabilities.
        per_token: Scores are divided by the answer's number of tokens.
        odds: Scores are log odds.
        beta, smoothing, nll: Values if the recipe gives none.
    """

    loss: PairLoss | None
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
    """A preset with its numbers settled.

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
    given = (config.beta, config.label_smoothing, config.gamma, config.nll_weight)
    given += tuple(getattr(config, f"{side}_weight", None) for side in ("desirable", "undesirable"))
    own = (preset.beta, preset.smoothing, 1.0, preset.nll, 1.0, 1.0)
    numbers = (o if g is None else g for g, o in zip(given, own, strict=True))
    beta, smoothing, gamma, nll, good, bad = numbers
    return Objective(preset, beta, smoothing, gamma, nll, good, bad, getattr(config, "own_loss", None))


def pair_samples(pair: Pair, number: int) -> tuple[Sample, Sample]:
    """Chosen and rejected as the learner takes them: together in a pass, whatever it holds, their prompt once."""
    meta = {"group": number, "shared": pair.prompt, "whole": True, "number": number}
    chosen, rejected = pair.chosen, pair.rejected
    return (
        Sample(chosen.tokens, chosen.weights, pair.source, {**meta, "chosen": True}),
        Sample(rejected.tokens, rejected.weights, pair.source, {**meta, "chosen": False}),
    )


def answer_sample(answer: Unpaired, number: int) -> Sample:
    """A single answer as the learner takes it."""
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
    what: Objective, pairs: Sequence[Pair], reference: Sequence[Sequence[float]] | None, count: int | None = None
) -> LossFunction:
    """The loss of one optimizer step on `pairs`, all of that step's, each laid out by `pair_samples` with its number.

    reference: log-probabilities of (chosen, rejected), pair by pair; None where the method takes none. count: by what
    losses are divided where that is not the number of pairs (prompts that gave no pair count as zeros of the mean).
    """
    divisor, there = count or len(pairs), max(1, len(pairs))
    soft = any(p.probability != 1 for p in pairs)

    def loss(model: LanguageModel, batch: RaggedBatch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        sums, lengths = answer_sums(model, batch)
        places = {(s.meta["number"], s.meta["chosen"]): i for i, s in enumerate(batch.samples) if "number" in s.meta}
        mine = sorted({number for number, _ in places})
        if not mine:
            return sums.sum() * 0, {}
        sides = []
        for side, chosen in enumerate((True, False)):
            at = torch.tensor([places[n, chosen] for n in mine], device=sums.device)
            given = None if reference is None else _column(reference, mine, side, sums)
            sides.append((sums[at], lengths[at], pair_scores(what, sums[at], given, lengths[at])))
        (chosen_sums, chosen_lengths, better), (rejected_sums, _, worse) = sides
        probability = torch.tensor([pairs[n].probability for n in mine]).to(sums) if soft else None
        losses = pair_losses(what, better, worse, probability)
        likelihood = pref.nll(chosen_sums, chosen_lengths)
        if what.nll:
            losses = losses + what.nll * likelihood
        metrics = {
            **pref.pair_metrics(what.beta * better, what.beta * worse),
            "log_ratio": (better - worse).detach().sum(),
            "logp_chosen": chosen_sums.detach().sum(),
            "logp_rejected": rejected_sums.detach().sum(),
            "nll": likelihood.detach().sum(),
        }
        return losses.sum() / divisor, {name: value.double() / there for name, value in metrics.items()}

    return loss


def _column(reference: Sequence[Sequence[float]], mine: Sequence[int], side: int, like: Tensor) -> Tensor:
    return torch.tensor([reference[n][side] for n in mine], dtype=torch.float64).to(like)


def kto_loss(
    what: Objective, answers: Sequence[Unpaired], reference: Sequence[Sequence[float]], kl: float
) -> LossFunction:
    """The loss of one optimizer step on `answers`, all of that step's, each laid out by `answer_sample`.

    reference: log-probability of each, as a list of one. kl: the batch's `kl_estimate`.
    """
    count = len(answers)
    good = sum(a.desirable for a in answers)

    def loss(model: LanguageModel, batch: RaggedBatch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        sums, lengths = answer_sums(model, batch)
        there = [i for i, s in enumerate(batch.samples) if "number" in s.meta]
        if not there:
            return sums.sum() * 0, {}
        sums, lengths = sums[there], lengths[there]
        mine = [batch.samples[i].meta["number"] for i in there]
        desirable = torch.tensor([answers[n].desirable for n in mine], device=sums.device)
        ratios = pref.log_ratio(sums, _column(reference, mine, 0, sums))
        losses = pref.kto(ratios, desirable, kl, what.beta, what.good, what.bad)
        rewards = what.beta * ratios.detach()
        metrics = {
            "reward_desirable": rewards[desirable].sum() / max(1, good),
            "reward_undesirable": rewards[~desirable].sum() / max(1, count - good),
            "nll": pref.nll(sums.detach(), lengths).sum() / count,
        }
        metrics["kl"] = torch.tensor(kl * len(mine) / count)
        return losses.sum() / count, metrics

    return loss
