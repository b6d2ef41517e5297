"""Describe what a stage computes, as far as memory depends on it: rows, completions, models beside the policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.config.settings import ModelConfig
from posttrain.core.types import Sample

LOOKED_AT = 1000
"""Rows whose sizes are read, spread evenly over all of them."""
STEPS_DRAWN = 12
"""Steps that are drawn to find the largest micro-batch."""

RowsTogether = Sequence[Sample]
"""Samples that stay in one micro-batch: a row, or a pair of answers with a shared prompt."""


@dataclass(frozen=True)
class Completions:
    """Hold what a stage samples at a time.

    Attributes:
        prompts: Number of prompts.
        each: Completions of each.
        prompt_tokens: Tokens of the longest prompt.
        new_tokens: Tokens of the longest completion.
        running: Completions that are computed together.
        int8: Keys and values are kept in int8.
    """

    prompts: int
    each: int
    prompt_tokens: int
    new_tokens: int
    running: int
    int8: bool = False

    @property
    def positions(self) -> int:
        """Return the positions that keys and values are kept for, as `posttrain.sampling.engine` lays them out."""
        slots = min(self.running, self.prompts * self.each)
        if self.each == 1:
            return slots * (self.prompt_tokens + self.new_tokens)
        places = min(self.prompts, slots, 1 + 3 * slots // self.each)
        return slots * self.new_tokens + places * self.prompt_tokens


@dataclass(frozen=True)
class Workload:
    """Hold what a stage computes.

    Attributes:
        units: Rows of the stage's data, or some of them. Empty: not known, because an earlier stage makes them.
        per_step: Units of a step.
        sums: The loss takes log-probabilities (preferences, RL), not the cross-entropy alone.
        completions: What it samples. None: nothing.
        frozen: A second, frozen copy of the model is held beside the policy.
        copied: What is trained is copied to sample with, and copied again when it changes.
        teacher: A model whose numbers are asked for: its settings; True: one of the same sizes. None: none.
        teacher_stays: It is held while steps are taken, not only before the first.
        teacher_head: Of a teacher that does not stay, the output head does.
        divergence: The loss compares distributions over the vocabulary, chunk by chunk.
        note: What is assumed, for the reader.
    """

    units: Sequence[RowsTogether] = ()
    per_step: int = 1
    sums: bool = False
    completions: Completions | None = None
    frozen: bool = False
    copied: bool = False
    teacher: ModelConfig | bool | None = None
    teacher_stays: bool = False
    teacher_head: bool = False
    divergence: bool = False
    note: str = ""

    def micro_batch(self, budget: int, context: int | None) -> tuple[int, int]:
        """Return (tokens to compute, places that go through the output head) of the largest micro-batch of some steps.

        Args:
            budget: Token budget.
            context: Longest sequence that the model takes: assumed where rows are not known.
        """
        from posttrain.core.ragged import micro_batches

        if not self.units:
            tokens = min(context or budget, budget)
            return tokens, tokens
        import numpy as np

        rng, largest = np.random.default_rng(0), (0, 0)
        sizes = [sum(len(s) for s in unit) - _shared(unit) for unit in self.units]
        count = min(self.per_step, len(self.units))
        for _ in range(STEPS_DRAWN):
            chosen = rng.choice(len(self.units), count, replace=False)
            for members in micro_batches([sizes[i] for i in chosen], budget):
                largest = max(largest, self._packed([self.units[chosen[i]] for i in members]))
        return max(largest, self._packed([self.units[int(np.argmax(sizes))]]))

    def _packed(self, units: Sequence[RowsTogether]) -> tuple[int, int]:
        """Return what is computed of these units in one pass, prefixes that they share once."""
        from posttrain.core.ragged import pack

        samples = [s for unit in units for s in unit]
        batch = pack(samples)
        targets = sum(len(row) for row in batch.weighted_rows) if self.sums else len(batch.targets_N)
        return batch.total, targets


def _shared(unit: RowsTogether) -> int:
    return sum(int(s.meta.get("shared", 0)) for s in unit[1:])


def together(rows: Sequence[Any]) -> list[RowsTogether]:
    """Return rows as samples, at most `LOOKED_AT` of them and the longest if the rows know it.

    Args:
        rows: Rows of a stage: samples, pairs of answers with a shared prompt, or single answers.
    """
    numbers = dict.fromkeys(range(0, len(rows), max(1, len(rows) // LOOKED_AT)))
    lengths = getattr(rows, "lengths", None)
    if lengths is not None and len(lengths):
        import numpy as np

        numbers[int(np.argmax(lengths))] = None
    return [unit for i in numbers if (unit := _together(rows[i]))]


def _together(row: Any) -> RowsTogether:
    if hasattr(row, "chosen") and hasattr(row, "rejected"):
        meta = {"shared": int(row.prompt)}
        return [Sample(s.tokens, s.weights, meta=meta) for s in (row.chosen, row.rejected)]
    sample = getattr(row, "sample", row)
    return [sample] if isinstance(sample, Sample) else []
