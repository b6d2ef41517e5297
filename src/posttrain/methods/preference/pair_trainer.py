"""Train on pairs or labelled answers: samples, the reference's log-probabilities, steps, held-out preferences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from posttrain.core.by_number import ByNumber
from posttrain.core.types import Sample
from posttrain.data.preference_rows import Pair, Unpaired
from posttrain.losses import preference_loss as pref
from posttrain.methods.preference.objectives import (
    Objective,
    answer_sample,
    kto_loss,
    objective,
    pair_loss,
    pair_losses,
    pair_samples,
    pair_scores,
)
from posttrain.trainer.loop import BatchAt, BatchTrainer
from posttrain.trainer.reference_model import Reference, Unit, sums_of
from posttrain.trainer.train_step import Learner, StepResult

if TYPE_CHECKING:
    from pathlib import Path

    from posttrain.core.progress import Track
    from posttrain.methods.preference.offline import PreferenceConfig
    from posttrain.models.language_model import LanguageModel
    from posttrain.trainer.stage import StageRun

PreferenceItems = Sequence[Pair | Unpaired]


@dataclass(frozen=True)
class PreferenceData:
    """Hold items as samples, and their log-probabilities under the reference.

    Attributes:
        items: Pairs, or single answers (KTO).
        units: Samples of each item, made when they are asked for.
        reference: Log-probabilities of these under the reference. None: not needed.
        mismatched: KTO: an answer to another prompt after this prompt, by item; empty if none fits.
        mismatched_reference: Log-probabilities of these under the reference.
    """

    items: PreferenceItems
    units: Sequence[Unit]
    reference: Sequence[Sequence[float]] | None = None
    mismatched: Sequence[Unit] = ()
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
        folder: Path | None = None,
    ) -> None:
        self.config, self.objective, self.train_on = config, objective(config), train_on

        def measure(step: int, track: Track) -> dict[str, float]:
            track.phase("held-out preferences")
            assert held_out is not None
            return measure_preferences(self.objective, learner.model, held_out, config)

        super().__init__(learner, batch_at, None, measure if held_out else None, settings=config, folder=folder)

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
        return _kl([p[0] for p in policy], [self.train_on.mismatched_reference[i][0] for i in matched])


def measure_preferences(
    objective: Objective, model: LanguageModel, held_out: PreferenceData, config: PreferenceConfig
) -> dict[str, float]:
    """Compute the loss, and the accuracy and margin of the implicit rewards, as held_out/loss and so on.

    For single answers, accuracy is the share of (good, bad) couples that are ranked right: the area under the ROC curve.

    Args:
        objective: Method and numbers.
        model: The policy.
        held_out: Held-out preferences.
        config: Settings of the stage.
    """
    policy = _exact(sums_of(model, held_out.units, config.systems))
    reference = None if held_out.reference is None else _exact(held_out.reference)
    if config.method == "kto":
        assert reference is not None
        ratios = pref.log_ratio(policy[:, 0], reference[:, 0])
        numbers = _answer_numbers(objective, held_out.items, ratios, _baseline(model, held_out, config))
    else:
        lengths = torch.tensor([[sum(w != 0 for w in s.weights) for s in unit] for unit in held_out.units])
        numbers = _pair_numbers(objective, held_out.items, policy, reference, lengths)
    return {f"held_out/{name}": value for name, value in numbers.items()}


def _baseline(model: LanguageModel, held_out: PreferenceData, config: PreferenceConfig) -> float:
    """Return KTO's baseline over all held-out answers."""
    matched = [i for i, unit in enumerate(held_out.mismatched) if unit]
    policy = sums_of(model, [held_out.mismatched[i] for i in matched], config.systems)
    return _kl([p[0] for p in policy], [held_out.mismatched_reference[i][0] for i in matched])


def _kl(policy: Sequence[float], reference: Sequence[float]) -> float:
    return float(pref.kl_estimate(_exact(policy) - _exact(reference)))


def _answer_numbers(objective: Objective, answers: PreferenceItems, ratios: Tensor, kl: float) -> dict[str, float]:
    good = torch.tensor([a.desirable for a in answers])  # type: ignore[union-attr]
    losses = pref.kto(ratios, good, kl, objective.beta, objective.good, objective.bad)
    over = objective.beta * (ratios[good][:, None] - ratios[~good][None])
    right = (over > 0).double() + 0.5 * (over == 0).double()
    return {"loss": float(losses.mean()), "accuracy": float(right.mean()), "margin": float(over.mean())}


def _pair_numbers(
    objective: Objective, pairs: PreferenceItems, policy: Tensor, reference: Tensor | None, lengths: Tensor
) -> dict[str, float]:
    better, worse = (
        pair_scores(objective, policy[:, i], None if reference is None else reference[:, i], lengths[:, i])
        for i in (0, 1)
    )
    probability = torch.tensor([p.probability for p in pairs], dtype=torch.float64)  # type: ignore[union-attr]
    losses = pair_losses(objective, better, worse, probability if bool((probability != 1).any()) else None)
    if objective.nll:
        losses = losses + objective.nll * pref.nll(policy[:, 0], lengths[:, 0])
    metrics = pref.pair_metrics(objective.beta * better, objective.beta * worse)
    shares = {name: float(metrics[name]) / len(pairs) for name in ("accuracy", "margin")}
    return {"loss": float(losses.mean()), **shares}


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

    def unit(n: int) -> Unit:
        item = items[n]
        return pair_samples(item, n) if isinstance(item, Pair) else (answer_sample(item, n),)

    units = _Made(len(items), unit)
    if not mismatch:
        return PreferenceData(items, units)
    partners = _partners(units, np.random.default_rng([seed, 3]).permutation(len(items)), context or 2**62)

    def mismatched(n: int) -> Unit:
        if partners[n] < 0:
            return ()
        (own,), (other,) = units[n], units[int(partners[n])]
        prompt, taken = own.tokens[: own.meta["shared"]], other.tokens[other.meta["shared"] :]
        weights = [0.0] * len(prompt) + [1.0] * len(taken)
        return (Sample([*prompt, *taken], weights, own.source, {"shared": len(prompt)}),)

    return PreferenceData(items, units, mismatched=_Made(len(items), mismatched))


def _partners(units: Sequence[Unit], order: np.ndarray, limit: int) -> np.ndarray:
    """Return for each answer the number of another one that fits after its prompt; -1 if none of 50 does."""
    partners = np.full(len(units), -1, dtype=np.int64)
    for at, i in enumerate(order):
        (own,) = units[int(i)]
        shared, answer = own.meta["shared"], list(own.tokens[own.meta["shared"] :])
        for step in range(1, min(len(units), 50)):
            partner = int(order[(at + step) % len(units)])
            (other,) = units[partner]
            taken = list(other.tokens[other.meta["shared"] :])
            if taken != answer and shared + len(taken) <= limit:
                partners[i] = partner
                break
    return partners


class _Made(ByNumber[Unit]):
    """Give samples that are made when they are asked for: those of all items may not fit in memory."""

    def __init__(self, count: int, make: Callable[[int], Unit]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def item(self, number: int) -> Unit:
        return self._make(number)


def with_reference(reference: Reference, data: PreferenceData, title: str) -> PreferenceData:
    """Return the data with the reference's log-probabilities.

    Args:
        reference: The model before the first step.
        data: Items as samples.
        title: Title of the progress line.
    """
    matched = [i for i, unit in enumerate(data.mismatched) if unit]
    count = len(data.units)

    def unit(n: int) -> Unit:
        return data.units[n] if n < count else data.mismatched[matched[n - count]]

    sums = reference.sums(_Made(count + len(matched), unit), title)
    mismatched: list[Sequence[float]] = [()] * len(data.mismatched)
    for i, values in zip(matched, sums[count:], strict=True):
        mismatched[i] = values
    return replace(data, reference=sums[:count], mismatched_reference=mismatched)


def pair_trainer(
    config: PreferenceConfig,
    policy: LanguageModel,
    items: PreferenceItems,
    held_out: PreferenceItems,
    run: StageRun,
    context: int | None,
) -> PairTrainer:
    """Return the trainer over the rows, with the reference's log-probabilities.

    Args:
        config: Settings of the stage.
        policy: The model to train, as it is before the first step: the reference.
        items: Pairs (KTO: single answers) to train on.
        held_out: The same, to measure on. Empty: nothing is measured.
        run: Folder of the stage, and the seed of the order of the rows.
        context: The model's context length in tokens.
    """
    seed, kto = run.seed, config.method == "kto"
    train_on = preference_data(items, seed, context, kto)
    held = preference_data(held_out, seed, context, kto) if held_out else None
    if objective(config).preset.reference:
        reference = Reference(policy, config.systems)
        train_on = with_reference(reference, train_on, f"{config.name}: reference")
        held = with_reference(reference, held, f"{config.name}: reference, held out") if held else None
    numbers: Any = range(len(items))
    batch_at, steps = run.batches(numbers, config)
    learner = Learner(policy, config.optimizer, config.systems, steps)
    return PairTrainer(config, learner, batch_at, train_on, held, run.folder)
