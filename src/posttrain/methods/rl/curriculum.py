"""A curriculum by measured success: problems are drawn the more often the nearer their success rate is to a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.config import CurriculumConfig
from posttrain.methods.rl.collect_rollouts import PromptGroup
from posttrain.methods.rl.hooks import Hook

PRIOR = 2.0
"""Number of answers that the success rate of all problems counts as, beside a problem's own answers."""
FADE = 0.98
"""Factor on the success rate of all problems so far when a new group is counted."""

Array = NDArray[np.float64]


def curriculum_weight(success: Array, target: float) -> Array:
    """Return (p / t)^2t ((1 - p) / (1 - t))^2(1 - t): 1 at p = t, 0 at p = 0 and p = 1; for t = 1/2 it is 4 p (1 - p).

    p (1 - p) is the variance of a reward that is right or wrong, and so the size of the signal that a group of the
    problem has (arXiv 2502.12272). success: p, from 0 to 1. target: t, between 0 and 1.
    """
    return (success / target) ** (2 * target) * ((1 - success) / (1 - target)) ** (2 * (1 - target))


class Curriculum(Hook):
    """Record the success of each problem, and draw by it.

    A problem's success rate is p = (s + 2 q) / (n + 2): s successes of n answers, all earlier ones scaled by
    `config.memory` when a new group is counted, and q the recent success rate of all problems. An unused problem has
    p = q.
    """

    def __init__(self, config: CurriculumConfig, problems: int, *, seed: int = 0, success: float = 1.0) -> None:
        """Make a curriculum.

        Args:
            config: Its settings.
            problems: Number of problems.
            seed: Seed of the draws.
            success: Lowest reward of a success.
        """
        self.config, self.seed, self.success = config, seed, success
        self.successes = np.zeros(problems)
        self.answers = np.zeros(problems)
        self.overall = [0.0, 0.0]
        self.expected: dict[str, float] = {}

    def choose_prompts(self, step: int, attempt: int, prompts: list[int]) -> list[int]:
        return self.draw(np.random.default_rng([self.seed, 3, step, attempt]), len(prompts))

    def before_sampling(self, step: int, attempt: int, prompts: Sequence[int]) -> list[PromptGroup]:
        if not attempt:
            success = float(self.estimates()[list(prompts)].mean())
            self.expected = {"expected_success": success, "problems_asked": float((self.answers > 0).sum())}
        return []

    def after_rewards(self, step: int, groups: Sequence[PromptGroup]) -> list[PromptGroup]:
        for group in groups:
            self.record(group.problem, group.successes(self.success), len(group.kept))
        return list(groups)

    def metrics(self, step: int, groups: Sequence[PromptGroup]) -> dict[str, float]:
        return self.expected

    def record(self, problem: int, successes: int, answers: int) -> None:
        """Count a group's outcome; one without answers changes nothing.

        Args:
            problem: Number of the problem.
            successes: Completions with a success.
            answers: Completions with a reward.
        """
        if not answers:
            return
        for counts, new in ((self.successes, successes), (self.answers, answers)):
            counts[problem] = self.config.memory * counts[problem] + new
        self.overall = [FADE * self.overall[0] + successes, FADE * self.overall[1] + answers]

    def estimates(self) -> Array:
        """Return p of every problem; one half for all before there is any answer."""
        q = self.overall[0] / self.overall[1] if self.overall[1] else 0.5
        return np.asarray((self.successes + PRIOR * q) / (self.answers + PRIOR))

    def probabilities(self) -> Array:
        """Return each problem's probability: (1 - floor) by weight, floor evenly over unused ones (if none: all)."""
        weights = curriculum_weight(self.estimates(), self.config.target)
        even = np.ones(len(weights))
        fresh = np.where(self.answers > 0, 0.0, 1.0)
        fresh = fresh if fresh.any() else even
        weights = weights if weights.any() else even
        floor = self.config.floor
        return np.asarray((1 - floor) * weights / weights.sum() + floor * fresh / fresh.sum())

    def draw(self, rng: np.random.Generator, size: int) -> list[int]:
        """Return `size` different problems (repeated only if there are fewer)."""
        p = self.probabilities()
        count = len(p)
        if size > count:
            return [int(i) for i in rng.choice(count, size, p=p)]
        if np.count_nonzero(p) < size:  # problems of weight 0 fill up
            p = 0.5 * p + 0.5 / count
        return [int(i) for i in rng.choice(count, size, replace=False, p=p)]

    def state_dict(self) -> dict[str, Any]:
        used = np.flatnonzero(self.answers).tolist()
        counts = [[i, float(self.successes[i]), float(self.answers[i])] for i in used]
        return {"problems": counts, "overall": self.overall}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.successes[:], self.answers[:] = 0.0, 0.0
        for i, successes, answers in state["problems"]:
            self.successes[i], self.answers[i] = successes, answers
        self.overall = list(state["overall"])
