"""The preference methods: what each is a choice of, and the loss that the learner is given.

The formulas are in `posttrain.losses.preference_loss`; docs/preference.md says where they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.core.ragged import RaggedBatch
from posttrain.core.types import Sample
from posttrain.data.preference_rows import Pair, Unpaired
from posttrain.losses import preference_loss as pref
from posttrain.methods.preference.offline import PreferenceConfig
from posttrain.methods.preference.online import OnlineDPOConfig
from posttrain.models.language_model import LanguageModel
from posttrain.trainer.reference_model import answer_sums
from posttrain.trainer.train_step import LossFunction


@dataclass(frozen=True)
class Method:
    """reference: log-probabilities are taken against those of the model before the stage. per_token: divided by the
    answer's tokens. odds: log odds in their place. beta, smoothing, nll: where the recipe gives none."""

    loss: Literal["dpo", "robust", "ipo", "simpo", "orpo", "kto"]
    reference: bool = True
    per_token: bool = False
    beta: float = 0.1
    smoothing: float = 0.0
    nll: float = 0.0


METHODS = {
    "dpo": Method("dpo"),
    "cdpo": Method("dpo", smoothing=0.1),
    "robust_dpo": Method("robust", smoothing=0.1),
    "dpo_norm": Method("dpo", per_token=True, beta=5.0),
    "ipo": Method("ipo", per_token=True),
    "kto": Method("kto"),
    "cpo": Method("dpo", reference=False, nll=1.0),
    "simpo": Method("simpo", reference=False, per_token=True, beta=2.0),
    "orpo": Method("orpo", reference=False, per_token=True, nll=1.0),
}
"""IPO's log ratios are divided by lengths, as its authors' experiments have it; the paper's formula has sums."""


@dataclass(frozen=True)
class Objective:
    """A method with its numbers settled."""

    method: Method
    beta: float
    smoothing: float
    gamma: float
    nll: float
    good: float = 1.0
    bad: float = 1.0

    @property
    def needs_reference(self) -> bool:
        return self.method.reference


def objective(config: PreferenceConfig | OnlineDPOConfig) -> Objective:
    """What a stage's settings ask for, the method's own numbers where they give none."""
    online = isinstance(config, OnlineDPOConfig)
    method = METHODS[config.loss if isinstance(config, OnlineDPOConfig) else config.method]
    given = (config.beta, config.label_smoothing, config.gamma, config.nll_weight)
    own = (method.beta, method.smoothing, 1.0, method.nll)
    beta, smoothing, gamma, nll = (o if g is None else g for g, o in zip(given, own, strict=True))
    if online or not isinstance(config, PreferenceConfig):
        return Objective(method, beta, smoothing, gamma, nll)
    good, bad = (1.0 if w is None else w for w in (config.desirable_weight, config.undesirable_weight))
    return Objective(method, beta, smoothing, gamma, nll, good, bad)


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


def pair_scores(what: Objective, sums_P: Tensor, reference_P: Tensor | None, lengths_P: Tensor) -> Tensor:
    """An answer's side of h, before beta: log ratio or log-probability, per token or in sum, or log odds; shape P."""
    method = what.method
    values = pref.log_ratio(sums_P, reference_P) if reference_P is not None else sums_P
    if method.per_token:
        values = pref.per_token(values, lengths_P)
    return pref.log_odds(values) if method.loss == "orpo" else values


def pair_losses(what: Objective, h_P: Tensor, probability_P: Tensor | None) -> Tensor:
    """The method's losses of pairs by the difference of their answers' scores; shape P."""
    match what.method.loss:
        case "dpo":
            return pref.dpo(h_P, what.beta, probability_P, what.smoothing)
        case "robust":
            return pref.robust_dpo(h_P, what.beta, what.smoothing, probability_P)
        case "ipo":
            return pref.ipo(h_P, what.beta, probability_P)
        case "simpo":
            return pref.simpo(h_P, what.beta, what.gamma, probability_P)
        case "orpo":
            return pref.orpo(h_P, what.beta, probability_P)
    raise ValueError(f"{what.method.loss} is no loss of pairs")


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
        losses = pair_losses(what, better - worse, probability)
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
