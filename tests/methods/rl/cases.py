"""A sequence with all its numbers in one place, as slow loops want it; the package's records are made from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from posttrain.config import RLConfig
from posttrain.core.types import Rollout, Sample
from posttrain.methods.rl.compute_advantages import Advantages, compute_advantages
from posttrain.methods.rl.rl_loss import Extremes, TrainingBatch, policy_gradient_loss
from posttrain.methods.rl.sequence_logprobs import Logprobs, TrainingSequence
from posttrain.trainer.train_step import LossFunction


@dataclass
class Case:
    """old: log-probabilities before the first update; None: the learner's own."""

    prompt: Sequence[int]
    rollout: Rollout
    group: int
    old: Tensor | None = None
    reference: Tensor | None = None
    values: Tensor | None = None
    age: int = 0
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))
    returns: Tensor | None = None
    signal: bool = True

    @property
    def sequence(self) -> TrainingSequence:
        return TrainingSequence(self.prompt, self.rollout, self.group, self.age)

    @property
    def length(self) -> int:
        return self.rollout.length

    def sampled(self) -> Tensor:
        return self.sequence.sampled_logprobs()

    def sample(self, number: int) -> Sample:
        return self.sequence.sample(number, 1.0 if self.signal else 0.0)


def logprobs_of(cases: Sequence[Case]) -> Logprobs:
    def column(name: str) -> tuple[Tensor, ...] | None:
        values = tuple(getattr(c, name) for c in cases)
        return None if any(v is None for v in values) else values

    sampled = tuple(c.sampled() for c in cases)
    old = column("old")
    return Logprobs(sampled, old or sampled, old, column("reference"), column("values"))


def fill_advantages(
    config: RLConfig, cases: Sequence[Case], baseline: float | None = None, greedy: Sequence[float] | None = None
) -> None:
    """What the package makes of the cases, put into them."""
    found = compute_advantages(config, [c.sequence for c in cases], logprobs_of(cases), baseline, greedy)
    for i, c in enumerate(cases):
        c.advantages, c.signal = found.advantages[i], found.trained[i]
        c.returns = None if found.returns is None else found.returns[i]


def batch_from(config: RLConfig, cases: Sequence[Case]) -> TrainingBatch:
    returns = tuple(c.returns for c in cases if c.returns is not None)
    advantages = Advantages(tuple(c.advantages for c in cases), returns or None, tuple(c.signal for c in cases))
    sequences = [c.sequence for c in cases]
    return TrainingBatch(config, 1 + max(c.group for c in cases), sequences, logprobs_of(cases), advantages)


def loss_of(config: RLConfig, cases: Sequence[Case], fresh: bool, extremes: Extremes | None = None) -> LossFunction:
    return policy_gradient_loss(batch_from(config, cases), fresh, extremes or Extremes())
