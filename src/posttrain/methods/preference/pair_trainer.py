"""Train on pairs or labelled answers: samples, the reference's log-probabilities, steps, held-out preferences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from posttrain.core.types import Sample
from posttrain.data.preference_rows import Pair, Unpaired
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
from posttrain.trainer.loop import BatchAt, BatchTrainer, permutation_batches
from posttrain.trainer.reference_model import Reference, Unit, sums_of
from posttrain.trainer.train_step import Learner, StepResult

if TYPE_CHECKING:
    from posttrain.core.progress import Track
    from posttrain.methods.preference.offline import PreferenceConfig
    from posttrain.models.language_model import LanguageModel

PreferenceItems = Sequence[Pair | Unpaired]


@dataclass(frozen=True)
class PreferenceData:
    """Hold items as samples, and their log-probabilities under the reference.

    Attributes:
        items: Pairs, or single answers (KTO).
        units: Samples of each item.
        reference: Log-probabilities of these under the reference. None: not needed.
        mismatched: KTO: an answer to another prompt after this prompt, by item; empty if none fits.
        mismatched_reference: Log-probabilities of these under the reference.
    """

    items: PreferenceItems
    units: list[Unit]
    reference: Sequence[Sequence[float]] | None = None
    mismatched: list[Unit] = field(default_factory=list)
    mismatched_reference: Sequence[Sequence[float]] = ()


class PairTrainer(BatchTrainer):
    """Train on batches of pairs or answers, one optimizer step each.

    Attributes:
        train_on: Items to train on.
    """

    def __init__(
        self,
        config: PreferenceConfig,
        learner: Learner,
        batch_at: BatchAt,
        train_on: PreferenceData,
        held_out: PreferenceData | None,
    ) -> None:
        self.config, self.objective, self.train_on = config, objective(config), train_on

        def measure(step: int, track: Track) -> dict[str, float]:
            track.phase("held-out preferences")
            assert held_out is not None
            return measure_preferences(self.objective, learner.model, held_out, config)

        every = config.held_out.every if config.held_out else 0
        super().__init__(learner, batch_at, None, measure if held_out else None, every)

    def update(self, step: int) -> StepResult:
        numbers: Any = self.batch_at(step)
        items: list[Any] = [self.train_on.items[i] for i in numbers]
        sums = self.train_on.reference
        reference = None if sums is None else [sums[i] for i in numbers]
        if self.config.method != "kto":
            samples = [s for n, pair in enumerate(items) for s in pair_samples(pair, n)]
            return self.learner.step(samples, pair_loss(self.objective, items, reference))
        samples = [answer_sample(item, n) for n, item in enumerate(items)]
        loss = kto_loss(self.objective, items, reference or [], self._kl(numbers))
        result = self.learner.step(samples, loss)
        result.metrics["margin"] = result.metrics["reward_desirable"] - result.metrics["reward_undesirable"]
        return result

    def _kl(self, numbers: Sequence[int]) -> float:
        """Return KTO's baseline over the whole batch, before any loss, so that losses can be computed in parts."""
        matched = [i for i in numbers if self.train_on.mismatched[i]]
        policy = sums_of(self.learner.model, [self.train_on.mismatched[i] for i in matched], self.config.systems)
        reference = [self.train_on.mismatched_reference[i][0] for i in matched]
        return float(pref.kl_estimate(_exact([p[0] for p in policy]) - _exact(reference)))


def measure_preferences(
    objective: Objective, model: LanguageModel, held_out: PreferenceData, config: PreferenceConfig
) -> dict[str, float]:
    """Compute held_out_accuracy and held_out_margin of the implicit rewards.

    For single answers, accuracy is the share of (good, bad) couples that are ranked right: the area under the ROC curve.

    Args:
        objective: Method and numbers.
        model: The policy.
        held_out: Held-out preferences.
        config: Settings of the stage.
    """
    sums = sums_of(model, held_out.units, config.systems)
    if config.method == "kto":
        rewards = objective.beta * (_exact(sums)[:, 0] - _exact(held_out.reference)[:, 0])
        good = torch.tensor([u.desirable for u in held_out.items])  # type: ignore[union-attr]
        over = rewards[good][:, None] - rewards[~good][None]
        right = (over > 0).double() + 0.5 * (over == 0).double()
        return {"held_out_accuracy": float(right.mean()), "held_out_margin": float(over.mean())}
    lengths = torch.tensor([[sum(w != 0 for w in s.weights) for s in unit] for unit in held_out.units])
    policy, reference = _exact(sums), None if held_out.reference is None else _exact(held_out.reference)
    better, worse = (
        pair_scores(objective, policy[:, i], None if reference is None else reference[:, i], lengths[:, i])
        for i in (0, 1)
    )
    metrics = pref.pair_metrics(objective.beta * better, objective.beta * worse)
    return {f"held_out_{name}": float(metrics[name]) / len(sums) for name in ("accuracy", "margin")}


def _exact(sums: Any) -> torch.Tensor:
    """Return log-probabilities in float64: float32 would keep only 1e-4 in a difference of thousands."""
    return torch.tensor(sums, dtype=torch.float64)


def preference_data(items: PreferenceItems, seed: int, context: int | None, mismatch: bool = False) -> PreferenceData:
    """Return items as samples.

    Args:
        items: Pairs, or single answers.
        seed: Seeds the mismatched answers.
        context: The model's context length in tokens. None: unknown.
        mismatch: Add the answer of another item after each prompt (KTO).
    """
    units: list[Unit] = [
        pair_samples(item, n) if isinstance(item, Pair) else (answer_sample(item, n),) for n, item in enumerate(items)
    ]
    if not mismatch:
        return PreferenceData(items, units)
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
    return PreferenceData(items, units, mismatched=mismatched)


def with_reference(reference: Reference, data: PreferenceData, title: str) -> PreferenceData:
    """Return the data with the reference's log-probabilities.

    Args:
        reference: The model before the first step.
        data: Items as samples.
        title: Title of the progress line.
    """
    matched = [i for i, unit in enumerate(data.mismatched) if unit]
    sums = reference.sums([*data.units, *(data.mismatched[i] for i in matched)], title)
    count = len(data.units)
    mismatched: list[Sequence[float]] = [()] * len(data.mismatched)
    for i, values in zip(matched, sums[count:], strict=True):
        mismatched[i] = values
    return replace(data, reference=sums[:count], mismatched_reference=mismatched)


def pair_trainer(
    config: PreferenceConfig,
    policy: LanguageModel,
    items: PreferenceItems,
    held_out: PreferenceItems,
    seed: int,
    context: int | None,
) -> PairTrainer:
    """Return the trainer over the rows, with the reference's log-probabilities.

    Args:
        config: Settings of the stage.
        policy: The model to train, as it is before the first step: the reference.
        items: Pairs (KTO: single answers) to train on.
        held_out: The same, to measure on. Empty: nothing is measured.
        seed: Seeds the order of the rows.
        context: The model's context length in tokens.
    """
    train_on = preference_data(items, seed, context, config.method == "kto")
    held = preference_data(held_out, seed, context) if held_out else None
    if objective(config).preset.reference:
        reference = Reference(policy, config.systems)
        train_on = with_reference(reference, train_on, f"{config.name}: reference")
        held = with_reference(reference, held, f"{config.name}: reference, held out") if held else None
    numbers: Any = range(len(items))
    batch_at, steps = permutation_batches(numbers, config.batch_size, config.epochs, seed, config.max_steps)
    learner = Learner(policy, config.optimizer, config.systems, steps)
    return PairTrainer(config, learner, batch_at, train_on, held)
