"""Evaluation by a scorer: sampled answers, each given a number by a judge, a reward model or any other reward.

The same prompts are answered before and after, from the same random streams, so that the two can be compared answer
by answer: `posttrain.core.item_statistics.wins` says how often one model's answer scores above the other's.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.eval.item_pictures import item_pictures
from posttrain.eval.sampled_tasks import in_chunks
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request, Sampler

if TYPE_CHECKING:
    from posttrain.core.progress import Track
    from posttrain.core.types import Rollout
    from posttrain.data.prompts import RenderedPrompt
    from posttrain.eval.evaluation_tasks import Chunk, EvaluationItems, EvaluationRun, ScoreTask


def score_chunks(run: EvaluationRun, task: ScoreTask.Config) -> Iterator[Chunk]:
    """Sample n answers to each prompt, and score them."""
    rewards = run.until.enter_context(RewardStack([task.scorer], run.functions, log=run.log))
    sampler = LocalSampler(run.model, run.tokenizer, **task.sampler.options())
    return in_chunks(run, task.n, 5, lambda *work: _items(sampler, task, rewards, *work))


def _items(
    sampler: Sampler,
    task: ScoreTask.Config,
    rewards: RewardStack,
    prompts: Mapping[int, RenderedPrompt],
    seeds: np.ndarray,
    track: Track,
) -> EvaluationItems:
    track.phase("sampling")
    requests = [Request(p.tokens, task.n, int(seeds[i]), p.problem) for i, p in prompts.items()]
    groups = sampler.sample(requests, task.sampler)
    track.phase("scoring")
    name = task.scorer.title
    return [
        scored_item(i, prompt, group.rollouts, [r.rewards.get(name) for r in group.rollouts])
        for (i, prompt), group in zip(prompts.items(), rewards(groups).groups, strict=True)
    ]


def scored_item(
    number: int, prompt: RenderedPrompt, answers: Sequence[Rollout], scores: Sequence[float | None]
) -> dict[str, Any]:
    """Return a prompt with its answers, their scores, and the mean score.

    Args:
        number: Number of the prompt.
        prompt: The prompt.
        answers: Its answers.
        scores: Their scores. None: the scorer failed.
    """
    known = [s for s in scores if s is not None]
    return {
        "id": number,
        "source": str(prompt.problem.get("source", "")),
        "prompt": prompt.text,
        "expected": "",
        "output": answers[0].text,
        "value": statistics.fmean(known) if known else None,
        "answers": [
            {"text": a.text, "tokens": len(a.tokens), "finish": a.finish, "score": s}
            for a, s in zip(answers, scores, strict=True)
        ],
        **item_pictures(number, prompt.tokens),
    }


def answer_statistics(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return counts of answers and failures, lengths, and how they ended.

    `constant` is the score of all answers if they have the same one, which measures nothing.
    """
    answers = [a for i in items for a in i["answers"]]
    scores = [a["score"] for a in answers if a["score"] is not None]
    return {
        **({"constant": scores[0]} if len(scores) > 1 and len(set(scores)) == 1 else {}),
        "samples": len(answers),
        "failed": {"scorer": n} if (n := sum(a["score"] is None for a in answers)) else {},
        "completion_tokens": statistics.fmean(a["tokens"] for a in answers),
        "cut": statistics.fmean(a["finish"] == "length" for a in answers),
    }
