"""Train a student on a teacher's distributions: on fixed rows, and on what the student itself writes in each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from posttrain.core import distributed
from posttrain.core.image_tokens import extended
from posttrain.core.ragged import RaggedBatch, micro_batches
from posttrain.core.types import RolloutGroup, Sample
from posttrain.losses.distillation_loss import Divergence, Teacher, TeacherTop, distillation_loss
from posttrain.losses.linear_logprobs import Head
from posttrain.methods.distill.teacher_model import ROW, LocalTeacher, with_row_number
from posttrain.methods.sft_measurement import HeldOutMeasurement
from posttrain.sampling.protocol import Request
from posttrain.trainer.loop import BatchAt, BatchTrainer, Measure
from posttrain.trainer.token_budget import token_budget
from posttrain.trainer.train_step import StepResult

if TYPE_CHECKING:
    from posttrain.core.progress import Track
    from posttrain.methods.distill.distill_settings import DistillConfig
    from posttrain.methods.distill.teacher_model import KeptNumbers, TeacherNumbers
    from posttrain.models.language_model import LanguageModel
    from posttrain.sampling.protocol import Sampler
    from posttrain.trainer.train_step import Learner

WRITTEN = "sampled"
"""Key of the meta of samples that the student wrote: they have no cross-entropy."""


class DistillationLoss:
    """The loss of a micro-batch: sum of w_t D(teacher, student)_t / denominator, and cross-entropy if it is wanted."""

    def __init__(
        self, numbers: TeacherNumbers, divergence: Divergence, temperature: float = 1.0, cross_entropy: float = 0.0
    ) -> None:
        """Make a loss.

        Args:
            numbers: What the teacher says.
            divergence: D.
            temperature: Divides the logits of both.
            cross_entropy: Weight of the cross-entropy on rows that the student did not write.
        """
        self.numbers, self.divergence = numbers, divergence
        self.temperature, self.cross_entropy = temperature, cross_entropy

    def __call__(
        self, model: LanguageModel, batch: RaggedBatch, denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weights = sample_weights(batch)
        teacher = self.numbers(batch)
        plain = weights * given_rows(batch) if self.cross_entropy else None

        def of_states(hidden_N_H: Tensor, head: Head, tokens_N: Tensor) -> tuple[Tensor, ...]:
            shares = weights / denominator
            made = distillation_loss(hidden_N_H, head, teacher, shares, self.divergence, self.temperature)
            if plain is None:
                return made
            return (*made, model.backend.cross_entropy(hidden_N_H, head, tokens_N, plain / denominator)[0])

        loss, values, same, *more = model(batch, of_states, torch.cat(batch.weighted_rows))
        metrics = {"divergence": (values * weights).sum() / denominator}
        metrics["agreement"] = (same * weights).sum() / denominator
        if more:
            metrics["cross_entropy"] = more[0]
            loss = loss + self.cross_entropy * more[0]
        return loss, metrics


def sample_weights(batch: RaggedBatch) -> Tensor:
    """Return the weights of `batch.weighted_rows`, sample after sample (not summed over what samples share)."""
    weights = [w for sample in batch.samples for w in sample.weights if w]
    return torch.tensor(weights, dtype=torch.float32, device=batch.tokens_T.device)


def given_rows(batch: RaggedBatch) -> Tensor:
    """Return 1 for each of `batch.weighted_rows` of a row, 0 for what the student wrote."""
    marks = [
        float(WRITTEN not in s.meta) for s, row in zip(batch.samples, batch.weighted_rows, strict=True) for _ in row
    ]
    return torch.tensor(marks, device=batch.tokens_T.device)


def kept_numbers(kept: KeptNumbers, device: torch.device) -> TeacherNumbers:
    """Return what looks fixed rows up among the numbers that were made before the first step."""

    def numbers(batch: RaggedBatch) -> Teacher:
        rows = [s.meta[ROW] for s, own in zip(batch.samples, batch.weighted_rows, strict=True) if len(own)]
        return kept.numbers(rows, device)

    return numbers


def server_numbers(tops: Sequence[list[dict[int, float]] | None], k: int, device: torch.device) -> TeacherNumbers:
    """Return what looks up the likeliest tokens that a server told with its answers.

    Args:
        tops: Of each row, by its number.
        k: Most tokens of a place; the one that was written may come on top.
        device: Device of the result.
    """

    def numbers(batch: RaggedBatch) -> Teacher:
        own = (s for s, row in zip(batch.samples, batch.weighted_rows, strict=True) if len(row))
        places = [place for s in own for place in tops[s.meta[ROW]] or ()]
        ids = torch.zeros(len(places), k + 1, dtype=torch.long)
        logprobs = torch.full((len(places), k + 1), -math.inf)
        tails = torch.empty(len(places))
        for n, place in enumerate(places):
            best = sorted(place.items(), key=lambda item: -item[1])[: k + 1]
            ids[n, : len(best)] = torch.tensor([i for i, _ in best])
            logprobs[n, : len(best)] = torch.tensor([p for _, p in best])
            rest = 1 - math.fsum(math.exp(p) for _, p in best)
            tails[n] = math.log(rest) if rest > 0 else -math.inf
        return TeacherTop(ids.to(device), logprobs.to(device), tails.to(device))

    return numbers


class DistillTrainer(BatchTrainer):
    """Train on batches of row numbers: fixed rows, or what the student writes to their prompts in this step."""

    def __init__(
        self,
        config: DistillConfig,
        learner: Learner,
        batch_at: BatchAt,
        rows: Sequence[Sample],
        loss: DistillationLoss | None,
        *,
        measure: Measure | None,
        folder: Path,
        seed: int,
        sampler: Sampler | None = None,
        prompts: Sequence[Sequence[int]] = (),
        teacher: LocalTeacher | None = None,
    ) -> None:
        """Make a trainer.

        Args:
            config: Settings of the stage.
            learner: The student and its optimizer.
            batch_at: Numbers of the rows of each step.
            rows: The rows.
            loss: Loss of a micro-batch. None: cross-entropy.
            measure: Measures held-out rows.
            folder: The stage's folder.
            seed: Seed of the stage.
            sampler: Samples the student. None: the student writes nothing.
            prompts: Token ids of the prompt of each row, for the sampler.
            teacher: Checks that rows have only tokens that it knows. None: they were checked before.
        """
        super().__init__(learner, batch_at, loss, measure, settings=config, folder=folder)
        self.config, self.rows, self.seed = config, rows, seed
        self.sampler, self.prompts, self.teacher = sampler, prompts, teacher

    def update(self, step: int) -> StepResult:
        numbers: list[int] = [int(i) for i in self.batch_at(step)]  # type: ignore[call-overload]
        own = self.own_places(step, len(numbers)) if self.sampler is not None else set()
        samples = [with_row_number(self.rows[i], i) for at, i in enumerate(numbers) if at not in own]
        if self.teacher is not None:
            self.teacher.check(samples)
        metrics: dict[str, float] = {}
        if own:
            groups = self.sample(step, [numbers[at] for at in sorted(own)])
            samples += written_samples(groups)
            metrics = writing_metrics(groups)
        result = self.learner.step(samples, self.loss)
        if self.sampler is not None:
            result.metrics["on_policy"] = len(own) / len(numbers)
        result.metrics.update(metrics)
        return result

    def own_places(self, step: int, count: int) -> set[int]:
        """Return the places of a step's rows whose answer the student writes: the share of them, rounded at random."""
        rng = np.random.default_rng([self.seed, 7, step])
        wanted = self.config.on_policy * count
        whole = int(wanted) + int(rng.random() < wanted - int(wanted))
        return {int(at) for at in rng.permutation(count)[:whole]}

    def sample(self, step: int, rows: Sequence[int]) -> list[RolloutGroup]:
        """Return what the student writes to the prompts of these rows: by (seed, step) and the weights alone."""
        assert self.sampler is not None
        sampler = self.sampler
        streams = np.random.SeedSequence([self.seed, 8, step]).generate_state(len(rows), np.uint64)
        requests = [
            Request(self.prompts[i], self.config.group_size, int(s)) for i, s in zip(rows, streams, strict=True)
        ]
        with distributed.summon_full_params(self.learner.model):
            return distributed.map_over_ranks(requests, lambda mine: sampler.sample(mine, self.config.sampler))


def written_samples(groups: Sequence[RolloutGroup]) -> list[Sample]:
    """Return the student's completions as samples; those to one prompt share it."""
    out = []
    for number, group in enumerate(groups):
        meta: Mapping[str, Any] = {WRITTEN: True, "group": f"written {number}", "shared": len(group.prompt)}
        for rollout in group.rollouts:
            weights = [0.0] * len(group.prompt) + [1.0] * len(rollout.tokens)
            out.append(Sample(extended(group.prompt, rollout.tokens), weights, "the student's answer", meta))
    return out


def writing_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Return the mean length of the student's completions, and the share that was cut."""
    rollouts = [r for g in groups for r in g.rollouts]
    length = sum(len(r.tokens) for r in rollouts) / len(rollouts)
    clipped = sum(r.finish == "length" for r in rollouts) / len(rollouts)
    return {"completions/mean_length": length, "completions/clipped_ratio": clipped}


class DistillMeasurement(HeldOutMeasurement):
    """Measure held-out rows: the divergence from the teacher is the loss; cross-entropy and accuracy beside it."""

    loss: DistillationLoss | None = None
    """None: there is no divergence, and the cross-entropy is the loss."""

    def __call__(self, step: int, track: Track) -> dict[str, float]:
        numbers = super().__call__(step, track)
        if self.loss is None:
            return numbers
        divergence, agreement = self._measure(self.loss)
        plain = {"held_out/cross_entropy": numbers["held_out/loss"], "held_out/accuracy": numbers["held_out/accuracy"]}
        return {"held_out/loss": divergence, "held_out/agreement": agreement, **plain}

    @torch.no_grad()
    def _measure(self, loss: DistillationLoss) -> tuple[float, float]:
        """Return the mean divergence and agreement over all loss tokens; the ranks share the rows."""
        samples = [with_row_number(s, -1 - i) for i, s in enumerate(self.samples)]
        total = math.fsum(w for s in samples for w in s.weights)
        plan = micro_batches(
            [len(s) + self.model.inserted for s in samples], token_budget(self.config.systems, self.model)
        )
        rank, world = (distributed.rank(), distributed.world()) if distributed.world() > 1 else (0, 1)
        sums = [0.0, 0.0]
        for first in range(0, len(plan), world):
            # Every rank makes as many passes (FSDP gathers in step); a spare one repeats the first and counts nothing.
            real = first + rank < len(plan)
            chosen = plan[first + rank] if real else plan[0]
            batch = self.model.pack([samples[i] for i in chosen], self.config.systems.share_prefixes)
            _, metrics = loss(self.model, batch, total)
            for at, name in enumerate(("divergence", "agreement")):
                sums[at] += float(metrics[name]) if real else 0.0
        parts = distributed.all_gather_object(sums)
        return sum(p[0] for p in parts), sum(p[1] for p in parts)
