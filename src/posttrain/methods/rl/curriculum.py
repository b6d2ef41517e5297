"""A curriculum by measured success: problems are drawn the more often the nearer their success is to a target."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.config import CurriculumConfig

PRIOR = 2.0
"""Answers that the success of all problems counts as, beside a problem's own."""
FADE = 0.98
"""What all problems' success so far counts beside each new group."""

Array = NDArray[np.float64]


def weight(success: Array, target: float) -> Array:
    """(p / t)^2t ((1 - p) / (1 - t))^2(1 - t): 1 at p = t, 0 at p = 0 and p = 1; for t = 1/2 it is 4 p (1 - p).

    p (1 - p) is the variance of a right-or-wrong reward, and so what a group of the problem can teach (arXiv
    2502.12272). success: p, from 0 to 1. target: t, between 0 and 1.
    """
    return (success / target) ** (2 * target) * ((1 - success) / (1 - target)) ** (2 * (1 - target))


class Curriculum:
    """What is known of each problem, and draws by it. Its state goes in and out of a checkpoint.

    A problem's success is p = (s + 2 q) / (n + 2): s successes of n answers, all earlier ones scaled by
    `config.memory` as a new group comes, and q the success of all problems lately. One never asked has p = q.
    """

    def __init__(self, config: CurriculumConfig, problems: int) -> None:
        self.config = config
        self.successes = np.zeros(problems)
        self.answers = np.zeros(problems)
        self.overall = [0.0, 0.0]

    def record(self, problem: int, successes: int, answers: int) -> None:
        """A group's outcome. Without answers nothing is learnt."""
        if not answers:
            return
        for of, new in ((self.successes, successes), (self.answers, answers)):
            of[problem] = self.config.memory * of[problem] + new
        self.overall = [FADE * self.overall[0] + successes, FADE * self.overall[1] + answers]

    def estimates(self) -> Array:
        """p of every problem; one half for all before there is any answer."""
        q = self.overall[0] / self.overall[1] if self.overall[1] else 0.5
        return np.asarray((self.successes + PRIOR * q) / (self.answers + PRIOR))

    def probabilities(self) -> Array:
        """What each problem is drawn with: (1 - floor) by weight, floor evenly over those never asked (none: all)."""
        weights = weight(self.estimates(), self.config.target)
        even = np.ones(len(weights))
        fresh = np.where(self.answers > 0, 0.0, 1.0)
        fresh = fresh if fresh.any() else even
        weights = weights if weights.any() else even
        floor = self.config.floor
        return np.asarray((1 - floor) * weights / weights.sum() + floor * fresh / fresh.sum())

    def draw(self, rng: np.random.Generator, size: int) -> list[int]:
        """`size` different problems (the same ones again only where there are fewer)."""
        p = self.probabilities()
        count = len(p)
        if size > count:
            return [int(i) for i in rng.choice(count, size, p=p)]
        if np.count_nonzero(p) < size:  # those of weight 0 fill up
            p = 0.5 * p + 0.5 / count
        return [int(i) for i in rng.choice(count, size, replace=False, p=p)]

    def state_dict(self) -> dict[str, Any]:
        asked = np.flatnonzero(self.answers).tolist()
        kept = [[i, float(self.successes[i]), float(self.answers[i])] for i in asked]
        return {"problems": kept, "overall": self.overall}

    def load_state_dict(self, numbers: dict[str, Any]) -> None:
        self.successes[:], self.answers[:] = 0.0, 0.0
        for i, successes, answers in numbers["problems"]:
            self.successes[i], self.answers[i] = successes, answers
        self.overall = list(numbers["overall"])
