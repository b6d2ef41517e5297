"""A judge's score as a reward (direct RLAIF, arXiv 2309.00267): what a stack of rewards calls for kind judge."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from posttrain.config.rewards import JudgeRewardConfig
from posttrain.core.errors import ServerError
from posttrain.judge.labels import Judge
from posttrain.rewards.outcome import LabelError

DOWN = 60.0
"""Seconds for which a server that failed counts as down: a batch's other completions do not each wait for it again."""
Scorer = Callable[[Sequence[Any], Sequence[str]], Sequence[float]]


def judge(config: JudgeRewardConfig) -> Scorer:
    """(prompts, completions) → expected scores, by a judge with its store open as long as the function lives.

    What was scored before, in this run or another, is looked up; so a run that goes on gets the same rewards. An empty
    completion gets the worst of the scale, and nobody is asked. Raises LabelError where the judge gave one no verdict:
    the stack then asks for each by itself (from the store), and leaves out that one.
    """
    opened = Judge.open(config.judge)
    failure: list[tuple[float, ServerError]] = []

    def score(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
        if failure and time.monotonic() - failure[-1][0] < DOWN:
            raise failure[-1][1]
        there = [i for i, t in enumerate(texts) if t.strip()]
        try:
            found = opened.score([prompts[i] for i in there], [texts[i] for i in there]) if there else []
        except ServerError as error:
            failure.append((time.monotonic(), error))
            raise
        out = [min(config.judge.scale.values())] * len(texts)
        for i, s in zip(there, found, strict=True):
            if s.expectation is None:
                raise LabelError(f"the judge gave no score: {s.why}")
            out[i] = s.expectation
        return out

    return score
