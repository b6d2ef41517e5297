"""Direct preference optimisation: pairs or labelled answers, the reference's numbers, steps, held-out preferences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain.config import ModelConfig, PreferenceConfig
from posttrain.core.errors import DataError
from posttrain.core.progress import Track
from posttrain.core.types import Metric, Sample
from posttrain.data.preference_rows import (
    Pair,
    PreparedPairs,
    PreparedUnpaired,
    Unpaired,
    prepare_pairs,
    prepare_unpaired,
)
from posttrain.data.rows import drop_training_overlap
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
from posttrain.methods.sft import taught_end
from posttrain.models.language_model import LanguageModel
from posttrain.trainer.loop import OnStep, permutation_batches, train
from posttrain.trainer.reference_model import Reference, Unit, sums_of
from posttrain.trainer.stage import Ready, Setting, account, leave_model, open_policy
from posttrain.trainer.train_step import Learner, StepResult

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
METRICS = (
    Metric("loss", "Loss", "", "Preferences", "lower"),
    Metric("accuracy", "Accuracy", "share of pairs ranked correctly", "Preferences", "higher"),
    Metric("margin", "Margin", "implicit reward, chosen − rejected", "Preferences", "higher"),
    Metric("held_out_accuracy", "Accuracy", "share of held-out pairs ranked correctly", "Held out", "higher"),
    Metric("held_out_margin", "Margin", "implicit reward, chosen − rejected", "Held out", "higher"),
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


class Steps:
    """Trainer of a stage: a step is one optimizer step on a batch of pairs or answers."""

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

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, numbers: dict[str, Any]) -> None:
        pass


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


def ready(config: PreferenceConfig, setting: Setting) -> Ready:
    """The stage with its rows read; held-out ones that are trained on too are left out of those."""
    read: Any = prepare_unpaired if config.method == "kto" else prepare_pairs
    prepared = read(config.data, setting.tokenizer, context=setting.context)
    _both_kinds(prepared, f"stage {config.name}")
    data, held_out = [(config.name, prepared)], list[Any]()
    if config.held_out is not None:
        held = read(config.held_out.data, setting.tokenizer, context=setting.context)
        held = drop_training_overlap(held, prepared, f"stage {config.name}")
        _both_kinds(held, f"stage {config.name}, held out")
        held_out = held.items
        data.append((f"{config.name} held out", held))
    context = setting.context
    return Ready(
        data,
        lambda model, folder, seed, on_step: run_preference(
            config, model, prepared.items, held_out, folder, seed=seed, on_step=on_step, context=context
        ),
    )


def _both_kinds(prepared: PreparedPairs | PreparedUnpaired, where: str) -> None:
    if isinstance(prepared, PreparedUnpaired):
        good = sum(u.desirable for u in prepared.items)
        if good in (0, len(prepared.items)):
            raise DataError(
                f"{where}: all {len(prepared.items):,} answers are {'good' if good else 'bad'} ones, and kto learns by "
                "telling good ones from bad. Give rows of both; of good ones alone: method: sft"
            )


def run_preference(
    config: PreferenceConfig,
    model: ModelConfig,
    items: Items,
    held_out: Items,
    folder: Path,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
    context: int | None = None,
) -> dict[str, Any]:
    """Train `model` on pairs (kto: answers); the result is `folder`/model, an ordinary Hugging Face folder.

    Goes on from the newest checkpoint in `folder` where there is one. Returns what the manifest says of the stage.
    """
    opened = open_policy(config, model, seed)
    train_on = laid_out(items, seed, context, config.method == "kto")
    held = laid_out(held_out, seed, context) if held_out else None
    if objective(config).needs_reference:
        reference = Reference(opened.policy, config.systems)
        train_on = judged(reference, train_on, f"{config.name}: reference")
        held = judged(reference, held, f"{config.name}: reference, held out") if held else None
    numbers: Any = range(len(items))
    batch_at, steps = permutation_batches(numbers, config.batch_size, config.epochs, seed, config.max_steps)
    learner = Learner(opened.policy, config.optimizer, config.systems, steps)
    result = train(
        learner,
        Steps(config, learner, batch_at, train_on, held),
        folder,
        checkpoint_every=config.checkpoint_every,
        keep=config.keep_checkpoints,
        title=config.name,
        on_step=on_step,
        epoch_of=lambda step: step * config.batch_size / len(items),
        shown=("loss", "accuracy", "margin", "held_out_accuracy"),
    )
    leave_model(opened, config, model, folder, seed, taught_end([unit[0] for unit in train_on.units]))
    return account(result, opened)
