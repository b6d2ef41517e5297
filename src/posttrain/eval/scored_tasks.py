"""Evaluation by a scorer: sampled answers, each given a number by a judge, a reward model or any other reward.

The same prompts are answered before and after, from the same random streams, so that the two can be compared answer
by answer: `posttrain.core.statistics.wins` says how often one model's answer scores above the other's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.config import ScoreConfig
from posttrain.core.progress import Track
from posttrain.core.types import Rollout
from posttrain.data.prompts import PromptSet, RenderedPrompt
from posttrain.eval.sampled_tasks import CHUNK, Items
from posttrain.models.language_model import LanguageModel
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request, Sampler


def chunks(
    model: LanguageModel, tokenizer: Any, task: ScoreConfig, questions: PromptSet, seed: int, rewards: RewardStack
) -> list[tuple[int, Callable[[Track], Items]]]:
    """(number of prompts, what makes their items) of each chunk, the same however often an evaluation is started."""
    sampler, asked = LocalSampler(model, tokenizer, **task.sampler.limits()), questions.items
    size = max(1, CHUNK // task.n)
    streams = np.random.SeedSequence([seed, 5]).generate_state(len(asked), np.uint64)

    def compute(run: range) -> Callable[[Track], Items]:
        return lambda track: _items(sampler, task, {i: asked[i] for i in run}, streams, rewards, track)

    runs = [range(start, min(start + size, len(asked))) for start in range(0, len(asked), size)]
    return [(len(run), compute(run)) for run in runs]


def _items(
    sampler: Sampler,
    task: ScoreConfig,
    asked: Mapping[int, RenderedPrompt],
    streams: np.ndarray,
    rewards: RewardStack,
    track: Track,
) -> Items:
    track.phase("sampling")
    groups = sampler.sample(
        [Request(q.tokens, task.n, int(streams[i]), q.problem) for i, q in asked.items()], task.sampler
    )
    track.phase("scoring")
    judged = rewards(groups)
    failed = {(e.group, e.index) for e in judged.excluded}
    out = []
    for g, ((i, question), group) in enumerate(zip(asked.items(), groups, strict=True)):
        kept = iter(judged.groups[g].rollouts)
        scores = [None if (g, k) in failed else next(kept).rewards[task.scorer.title] for k in range(task.n)]
        out.append(item_of(i, question, group.rollouts, scores))
    return out


def item_of(
    number: int, question: RenderedPrompt, answers: Sequence[Rollout], scores: Sequence[float | None]
) -> dict[str, Any]:
    """A prompt with its answers and their scores (None: the scorer failed), and their mean: None without any."""
    there = [s for s in scores if s is not None]
    return {
        "id": number,
        "source": str(question.problem.get("source", "")),
        "prompt": question.text,
        "expected": "",
        "output": answers[0].text,
        "value": statistics.fmean(there) if there else None,
        "answers": [
            {"text": a.text, "tokens": len(a.tokens), "finish": a.finish, "score": s}
            for a, s in zip(answers, scores, strict=True)
        ],
    }


def about(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the summary says beside the mean: answers, those the scorer failed on, their length, how they ended; and
    `constant`, the one score that all answers got, which measures nothing."""
    answers = [a for i in items for a in i["answers"]]
    scores = [a["score"] for a in answers if a["score"] is not None]
    return {
        **({"constant": scores[0]} if len(scores) > 1 and len(set(scores)) == 1 else {}),
        "samples": len(answers),
        "failed": {"scorer": n} if (n := sum(a["score"] is None for a in answers)) else {},
        "completion_tokens": statistics.fmean(a["tokens"] for a in answers),
        "cut": statistics.fmean(a["finish"] == "length" for a in answers),
    }
