"""Adaptive group size: more completions for hard prompts, out of a fixed number per step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from posttrain.config import RLConfig
from posttrain.methods.rl.collect_rollouts import PromptGroup
from posttrain.methods.rl.compute_advantages import Advantages
from posttrain.methods.rl.hooks import Hook
from posttrain.methods.rl.sequence_logprobs import TrainingSequence


class AdaptiveGroupSize(Hook):
    """Sample a few completions of every prompt first, then spend the rest of the step's budget on the hard ones."""

    def __init__(self, config: RLConfig) -> None:
        assert config.exploration.adaptive_group_size is not None
        self.group_size, self.success = config.group_size, config.exploration.success
        self.max_staleness = config.exploration.max_staleness
        self.first = config.exploration.adaptive_group_size.first
        self.max_per_prompt = config.exploration.adaptive_group_size.max_per_prompt or 4 * config.group_size
        self.budget = self.rounds = self.hard = 0

    def before_step(self, step: int, settings: RLConfig) -> RLConfig:
        self.hard = 0
        return settings

    def before_sampling(self, step: int, attempt: int, prompts: Sequence[int]) -> list[PromptGroup]:
        self.budget, self.rounds = len(prompts) * (self.group_size - self.first), 0
        return []

    def first_completions(self, group_size: int) -> int:
        return self.first

    def more_completions(self, step: int, groups: Sequence[PromptGroup]) -> list[int] | None:
        """Return the extra completions of each group.

        Groups that still have partial rollouts get none: their outcome is unknown. Neither do groups of earlier steps
        that have a success, or could not continue in the next step.
        """
        if self.budget <= 0:
            return None
        successes = [g.successes(self.success) for g in groups]
        closed = [
            not g.complete or not g.rollouts or (g.born < step and (s > 0 or g.expires(step, self.max_staleness)))
            for g, s in zip(groups, successes, strict=True)
        ]
        full = self.max_per_prompt
        counts = [full if shut else len(g.rollouts) for g, shut in zip(groups, closed, strict=True)]
        more = adaptive_group_sizes(successes, counts, self.budget, self.first, full)
        if not any(more):
            return None
        if not self.rounds:
            self.hard += sum(not s and n > 0 for s, n in zip(successes, more, strict=True))
        self.rounds += 1
        self.budget -= sum(more)
        return more

    def after_advantages(self, sequences: Sequence[TrainingSequence], advantages: Advantages) -> Advantages:
        return rescale_by_group_size(sequences, advantages)

    def metrics(self, step: int, groups: Sequence[PromptGroup]) -> dict[str, float]:
        largest = max((len(g.rollouts) for g in groups), default=0)
        return {"largest_group": float(largest), "hard": float(self.hard)}


def adaptive_group_sizes(
    successes: Sequence[int], counts: Sequence[int], budget: int, first: int, max_per_prompt: int
) -> list[int]:
    """Distribute `budget` extra completions over the prompts, hardest first.

    Prompts without any success get up to `first` more each, in their order. If every prompt has a success or is full,
    completions go one at a time to the prompt with the lowest (successes + 1) / (completions + 2).

    Args:
        successes: Number of successful completions of each prompt so far.
        counts: Number of completions of each prompt so far.
        budget: Completions that may be added in total.
        first: Most that an unsolved prompt gets in one call.
        max_per_prompt: Upper limit of `counts[i]` plus the result.

    Returns:
        Extra completions of each prompt; they sum to at most `budget`. After a round for unsolved prompts, call again.
    """
    more = [0] * len(counts)
    hard = [i for i, (s, n) in enumerate(zip(successes, counts, strict=True)) if not s and n < max_per_prompt]
    for i in hard:
        more[i] = min(first, max_per_prompt - counts[i], budget - sum(more))
    if hard:
        return more
    for _ in range(budget):
        open_ = [i for i, n in enumerate(counts) if n + more[i] < max_per_prompt]
        if not open_:
            break
        # Completions of this call have no outcome yet: they count as if they had the prompt's success rate so far.
        lowest = min(open_, key=lambda i: ((successes[i] + 1) / (counts[i] + 2), more[i], i))
        more[lowest] += 1
    return more


def rescale_by_group_size(sequences: Sequence[TrainingSequence], advantages: Advantages) -> Advantages:
    """Return advantages times mean group size / size of the group, so that groups of any size count the same."""
    sizes = Counter(s.group for s in sequences)
    mean = len(sequences) / max(1, len(sizes))
    scaled = [a * (mean / sizes[s.group]) for s, a in zip(sequences, advantages.advantages, strict=True)]
    return replace(advantages, advantages=tuple(scaled))
