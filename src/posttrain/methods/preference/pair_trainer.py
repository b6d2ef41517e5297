"""Direct preference optimisation: pairs or labelled answers, the reference's numbers, steps, held-out preferences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from posttrain.core.progress import Track
from posttrain.core.types import Sample
from posttrain.data.preference_rows import (
    Pair,
    Unpaired,
)
from posttrain.losses import preference_loss as pref
from posttrain.methods.preference.objectives import (
    Objective,
    answer_sample,
    kto_loss,
    objective,
    pair_loss,
    pair_samples,
    pair_scores,
)
from posttrain.methods.preference.offline import PreferenceConfig
from posttrain.models.language_model import LanguageModel
from posttrain.trainer.loop import Trainer, permutation_batches
from posttrain.trainer.reference_model import Reference, Unit, sums_of
from posttrain.trainer.train_step import Learner, StepResult

Items = Sequence[Pair | Unpaired]
Sums = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Preferences:
    """Items of a source as the learner takes them, and what the reference says of each.

    units: the samples of each item. mismatched: KTO's, by item, an answer to another prompt behind this one; empty
    where none fits. reference, mismatched_reference: log-probabilities of these, item by item.
    """

    items: Items
    units: list[Unit]
    reference: Sums | None = None
    mismatched: list[Unit] = field(default_factory=list)
    mismatched_reference: Sums = ()


class PairTrainer(Trainer):
    """Train on batches of pairs or answers, one optimizer step each."""

    def __init__(
        self,
        config: PreferenceConfig,
        learner: Learner,
        batch_at: Callable[[int], Sequence[Any]],
        train_on: Preferences,
        held_out: Preferences | None,
    ) -> None:
        self.config, self.learner, self.what = config, learner, objective(config)
        self.batch_at, self.train_on, self.held_out = batch_at, train_on, held_out
        self.steps = learner.total_steps

    def step(self, step: int, track: Track) -> StepResult:
        chosen: Sequence[int] = self.batch_at(step)
        items: list[Any] = [self.train_on.items[i] for i in chosen]
        given = self.train_on.reference
        reference = None if given is None else [given[i] for i in chosen]
        if self.config.method == "kto":
            kl = self._kl(chosen)
            samples = [answer_sample(item, n) for n, item in enumerate(items)]
            result = self.learner.step(samples, kto_loss(self.what, items, reference or [], kl))
            result.metrics["margin"] = result.metrics["reward_desirable"] - result.metrics["reward_undesirable"]
        else:
            samples = [s for n, pair in enumerate(items) for s in pair_samples(pair, n)]
            result = self.learner.step(samples, pair_loss(self.what, items, reference))
        last, every = step + 1 == self.steps, self.config.held_out.every if self.config.held_out else 0
        if every and (last or (step + 1) % every == 0):
            result.metrics.update(self.measure(track))
        return result

    def _kl(self, chosen: Sequence[int]) -> float:
        """KTO's baseline over the whole batch, before any of its losses, so that these may be computed in parts."""
        there = [i for i in chosen if self.train_on.mismatched[i]]
        units = [self.train_on.mismatched[i] for i in there]
        policy = sums_of(self.learner.model, units, self.config.systems)
        given = [self.train_on.mismatched_reference[i][0] for i in there]
        return float(pref.kl_estimate(_exact([p[0] for p in policy]) - _exact(given)))

    def measure(self, track: Track) -> dict[str, float]:
        """Of the held-out preferences: how often, and by how much, the better answer has the higher reward."""
        assert self.held_out is not None
        track.phase("held-out preferences")
        return measure(self.what, self.learner.model, self.held_out, self.config)

    def initial_record(self, track: Track) -> dict[str, Any] | None:
        return self.measure(track) if self.held_out is not None else None


def measure(what: Objective, model: LanguageModel, held_out: Preferences, config: PreferenceConfig) -> dict[str, float]:
    """held_out_accuracy, held_out_margin of the implicit rewards (and held_out_loss of pairs).

    Of single answers, accuracy is the share of (good, bad) couples that are ranked right: the area under the ROC curve.
    """
    sums = sums_of(model, held_out.units, config.systems)
    if config.method == "kto":
        rewards = what.beta * (_exact(sums)[:, 0] - _exact(held_out.reference)[:, 0])
        good = torch.tensor([u.desirable for u in held_out.items])  # type: ignore[union-attr]
        over = rewards[good][:, None] - rewards[~good][None]
        right = (over > 0).double() + 0.5 * (over == 0).double()
        return {"held_out_accuracy": float(right.mean()), "held_out_margin": float(over.mean())}
    lengths = torch.tensor([[sum(w != 0 for w in s.weights) for s in unit] for unit in held_out.units])
    both, given = _exact(sums), None if held_out.reference is None else _exact(held_out.reference)
    better, worse = (
        pair_scores(what, both[:, i], None if given is None else given[:, i], lengths[:, i]) for i in (0, 1)
    )
    metrics = pref.pair_metrics(what.beta * better, what.beta * worse)
    return {f"held_out_{name}": float(metrics[name]) / len(sums) for name in ("accuracy", "margin")}


def _exact(sums: Any) -> torch.Tensor:
    """Log-probabilities of whole answers, of which differences are taken: float32 would keep 1e-4 of a thousand."""
    return torch.tensor(sums, dtype=torch.float64)


def laid_out(items: Items, seed: int, context: int | None, mismatch: bool = False) -> Preferences:
    """Items as the learner takes them; mismatch: with an answer of another item behind each prompt (for KTO)."""
    units: list[Unit] = []
    for n, item in enumerate(items):
        units.append(pair_samples(item, n) if isinstance(item, Pair) else (answer_sample(item, n),))
    if not mismatch:
        return Preferences(items, units)
    order = np.random.default_rng([seed, 3]).permutation(len(items))
    limit = context or 2**62
    mismatched: list[Unit] = [()] * len(items)
    for at, i in enumerate(order):
        (own,) = units[i]
        prompt, answer = list(own.tokens[: own.meta["shared"]]), list(own.tokens[own.meta["shared"] :])
        for step in range(1, min(len(items), 50)):
            (other,) = units[order[(at + step) % len(items)]]
            taken = list(other.tokens[other.meta["shared"] :])
            if taken != answer and len(prompt) + len(taken) <= limit:
                weights = [0.0] * len(prompt) + [1.0] * len(taken)
                mismatched[i] = (Sample([*prompt, *taken], weights, own.source, {"shared": len(prompt)}),)
                break
    return Preferences(items, units, mismatched=mismatched)


def judged(reference: Reference, given: Preferences, title: str) -> Preferences:
    """The same with the reference's log-probabilities."""
    there = [i for i, unit in enumerate(given.mismatched) if unit]
    sums = reference.sums([*given.units, *(given.mismatched[i] for i in there)], title)
    count = len(given.units)
    mismatched: list[Sequence[float]] = [()] * len(given.mismatched)
    for i, made in zip(there, sums[count:], strict=True):
        mismatched[i] = made
    return Preferences(given.items, given.units, sums[:count], given.mismatched, mismatched)


def pair_trainer(
    config: PreferenceConfig,
    policy: LanguageModel,
    items: Items,
    held_out: Items,
    seed: int,
    context: int | None,
) -> tuple[Preferences, PairTrainer]:
    """Return the rows as the learner takes them, with the reference's log-probabilities, and the trainer over them.

    Args:
        config: Settings of the stage.
        policy: The model to train, as it is before the first step: the reference.
        items: Pairs (KTO: single answers) to train on.
        held_out: The same, to measure on. Empty: nothing is measured.
        seed: Seeds the order of the rows.
        context: The model's context length in tokens.
    """
    train_on = laid_out(items, seed, context, config.method == "kto")
    held = laid_out(held_out, seed, context) if held_out else None
    if objective(config).preset.reference:
        reference = Reference(policy, config.systems)
        train_on = judged(reference, train_on, f"{config.name}: reference")
        held = judged(reference, held, f"{config.name}: reference, held out") if held else None
    numbers: Any = range(len(items))
    batch_at, steps = permutation_batches(numbers, config.batch_size, config.epochs, seed, config.max_steps)
    learner = Learner(policy, config.optimizer, config.systems, steps)
    return train_on, PairTrainer(config, learner, batch_at, train_on, held)
