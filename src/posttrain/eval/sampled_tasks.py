"""Evaluation by many completions a question: what votes and choices among k of them are worth, and what they cost.

One set of N samples gives the whole curve: each point is the mean over all subsets of size k of a question's N
(`posttrain.eval.pass_at_k`), so nothing depends on which completions happened to come first.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from posttrain import sandbox
from posttrain.config.rewards import RewardsConfig
from posttrain.config.sandbox import SandboxConfig
from posttrain.core.statistics import interval_of_means
from posttrain.eval import pass_at_k as inference
from posttrain.eval.item_pictures import item_pictures
from posttrain.rewards import programs
from posttrain.rewards.answer_extraction import find, normal
from posttrain.rewards.number_reading import number_of
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request, Sampler

if TYPE_CHECKING:
    from posttrain.core.progress import Track
    from posttrain.core.types import Rollout
    from posttrain.data.prompts import RenderedPrompt
    from posttrain.eval.evaluation_tasks import (
        Chunk,
        EvaluationItems,
        EvaluationRun,
        SampledAnswersConfig,
        SampleTask,
    )

COMPLETIONS_PER_CHUNK = 256
"""Completions of one chunk, approximately: also how much is done again after a crash."""


def sample_chunks(run: EvaluationRun, task: SampleTask.Config) -> Iterator[Chunk]:
    """Sample n completions and the likeliest one of each problem, and judge them."""
    if task.vote == "program":
        sandbox.require_sandbox()
    terms = [task.judge.model_copy(update={"name": "judge"}), *task.rank_by]
    rewards = run.until.enter_context(RewardStack(RewardsConfig(terms=terms), run.functions, log=run.log))
    sampler = LocalSampler(run.model, run.tokenizer, **task.sampler.options())
    return in_chunks(run, task.n + 1, 3, lambda *work: _items(sampler, task, rewards, *work))


def in_chunks(
    run: EvaluationRun,
    completions: int,
    stream: int,
    compute: Callable[[Mapping[int, RenderedPrompt], np.ndarray, Track], EvaluationItems],
) -> Iterator[Chunk]:
    """Yield the prompts of an evaluation in chunks of about CHUNK completions.

    Args:
        run: What the evaluation works with.
        completions: Number of completions of each prompt.
        stream: Number of the random stream that seeds the prompts.
        compute: Makes the items from (prompts by number, seeds of all prompts, progress).
    """
    prompts = run.data.items
    size = max(1, COMPLETIONS_PER_CHUNK // completions)
    seeds = np.random.SeedSequence([run.seed, stream]).generate_state(len(prompts), np.uint64)

    def chunk(numbers: range) -> Chunk:
        return len(numbers), lambda track: compute({i: prompts[i] for i in numbers}, seeds, track)

    for start in range(0, len(prompts), size):
        yield chunk(range(start, min(start + size, len(prompts))))


def _items(
    sampler: Sampler,
    task: SampleTask.Config,
    rewards: RewardStack,
    prompts: Mapping[int, RenderedPrompt],
    seeds: np.ndarray,
    track: Track,
) -> EvaluationItems:
    """Sample and judge the completions of a chunk's problems."""
    count = track.counter("sampling", len(prompts) * (task.n + 1), 16)
    many = [Request(q.tokens, task.n, int(seeds[i]), q.problem) for i, q in prompts.items()]
    once = [Request(q.tokens, 1, 0, q.problem) for q in prompts.values()]
    likeliest = task.sampler.model_copy(update={"temperature": 0.0})
    groups = sampler.sample(many, task.sampler, count)
    greedy = sampler.sample(once, likeliest, count)
    track.phase("judging")
    judged = [group.rollouts for group in rewards([*groups, *greedy]).groups]
    sampled, single = judged[: len(groups)], judged[len(groups) :]
    return [
        sampled_item(task, i, q, of_question, first[0])
        for (i, q), of_question, first in zip(prompts.items(), sampled, single, strict=True)
    ]


def sampled_item(
    task: SampleTask.Config, number: int, question: RenderedPrompt, sampled: Sequence[Rollout], greedy: Rollout
) -> dict[str, Any]:
    """Return one problem with its completions, the likeliest answer, and the values of the curves.

    Args:
        task: The settings.
        number: Number of the problem.
        question: The problem.
        sampled: Its completions, with their rewards.
        greedy: Its likeliest answer.
    """
    *completions, first = completion_records(task, [*sampled, greedy])
    item = {
        "id": number,
        "source": str(question.problem.get("source", "")),
        "prompt": question.text,
        "expected": question.problem.get("answer"),
        "output": greedy.text,
        "correct": first["right"],
        "prompt_tokens": len(question.tokens),
        "greedy": first,
        "completions": completions,
        "curves": curves_of(task, completions),
        **item_pictures(number, question.tokens),
    }
    return {**item, "value": headline_of(task, item)}


def completion_records(task: SampledAnswersConfig, rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
    """Return what an item keeps of judged completions.

    judge: its number (None: it failed, which counts as wrong). scores: those that rank; None where one failed.
    """
    with ThreadPoolExecutor(2) as threads:  # programs run in processes of their own
        return list(threads.map(lambda r: _completion(task, r), rollouts))


def _completion(task: SampledAnswersConfig, rollout: Rollout) -> dict[str, Any]:
    judge = rollout.rewards.get("judge")
    out: dict[str, Any] = {
        "text": rollout.text,
        "tokens": len(rollout.tokens),
        "finish": rollout.finish,
        "judge": judge,
        "right": judge is not None and judge >= task.right_at,
    }
    if task.vote is not None:
        out["answer"] = answer_of(rollout.text, task)
    if task.rank_by:
        out["scores"] = {r.title: rollout.rewards.get(r.title) for r in task.rank_by}
    return out


def answer_of(text: str, task: SampledAnswersConfig) -> str | None:
    """Return the answer of a completion that votes count; None if it has none.

    Numbers are written in one way, other text without spaces, case and typesetting.
    """
    assert task.vote is not None
    if task.vote == "program":
        line = _printed(text, getattr(task.judge, "limits", SandboxConfig()))
        answer = find(line, "last_line") if line is not None else None
    else:
        answer = find(text, task.vote)
    if answer is None:
        return None
    number = number_of(answer)
    return normal(answer.text) or None if number is None else str(number)


@lru_cache(maxsize=4096)
def _printed(text: str, limits: SandboxConfig) -> str | None:
    """Return what the program prints; samples of a question are often the same program."""
    return programs.printed(text, limits)


def curves_of(
    task: SampledAnswersConfig, completions: Sequence[Mapping[str, Any]], sizes: Sequence[int] | None = None
) -> dict[str, list[float]]:
    """Return the values of a problem at each k, by strategy: mean, pass, vote, best:NAME, weighted:NAME.

    Args:
        task: The settings.
        completions: Its completions, as `completion_records` returns them.
        sizes: The k. None: those of the settings.
    """
    ks = [k for k in task.sizes if k <= len(completions)] if sizes is None else list(sizes)
    right = torch.tensor([c["right"] for c in completions], dtype=torch.float64)
    out = {"mean": torch.full((len(ks),), float(right.mean())), "pass": inference.pass_at_k(right, ks)}
    votes = torch.zeros(0)
    if task.vote is not None:
        known = {a: i for i, a in enumerate(dict.fromkeys(c["answer"] for c in completions if c["answer"] is not None))}
        votes = torch.tensor([known.get(c["answer"], -1) for c in completions])
        out["vote"] = inference.majority_of_k(votes, right, ks)
    for part in task.rank_by:
        raw = [c["scores"][part.title] for c in completions]
        scores = torch.tensor([-math.inf if s is None else s for s in raw], dtype=torch.float64)
        out[f"best:{part.title}"] = inference.best_of_k(scores, right, ks)
        if task.vote is not None:
            weights = scores.sigmoid() if task.weights == "sigmoid" else scores
            weights = torch.where(scores.isinf(), torch.zeros_like(scores), weights)
            out[f"weighted:{part.title}"] = inference.weighted_vote_of_k(votes, weights, right, ks)
    return {name: [round(float(v), 12) for v in values] for name, values in out.items()}


def headline_of(task: SampleTask.Config, item: Mapping[str, Any]) -> float:
    """Return the number of one problem that tables compare."""
    if task.headline == "greedy":
        return float(item["greedy"]["right"])
    name = f"best:{task.rank_by[0].title}" if task.headline == "best" else task.headline
    return float(item["curves"][name][-1])


def summary_of(task: SampleTask.Config, items: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Return what the report shows besides the headline: curves, tokens, greedy accuracy, failures.

    Args:
        task: The settings.
        items: The items of all problems.
        seed: Seeds the bootstrap.
    """
    out = sampling_summary(task, items, seed)
    greedy = np.array([[float(i["greedy"]["right"])] for i in items])
    (low, high), spent = interval_of_means(greedy, seed=seed)[0], statistics.fmean(i["greedy"]["tokens"] for i in items)
    tokens = out["prompt_tokens"] + spent
    return {
        "headline": task.headline,
        **out,
        "failed": count_failures(task, [c for i in items for c in (*i["completions"], i["greedy"])]),
        "greedy": {"value": float(greedy.mean()), "low": low, "high": high, "tokens": tokens},
    }


def sampling_summary(task: SampledAnswersConfig, items: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Return the curves of the completions and their tokens.

    strategies: [{name, points: [{k, tokens, value, low, high}]}], where the tokens of a problem are those of the
    prompt, counted once, and of k completions. Intervals: 95%, by bootstrap over problems (Wilson's if every problem is
    0 or 1).

    Args:
        task: The settings.
        items: The items of all problems.
        seed: Seeds the bootstrap.
    """
    prompt = statistics.fmean(i["prompt_tokens"] for i in items)
    completion = statistics.fmean(c["tokens"] for i in items for c in i["completions"])
    names = list(items[0]["curves"])
    table = np.array([[v for n in names for v in i["curves"][n]] for i in items], dtype=np.float64)
    intervals = iter(interval_of_means(table, seed=seed))
    means = iter(table.mean(0).tolist())
    strategies = []
    for name in names:
        points = []
        for k in task.sizes:
            low, high = next(intervals)
            points.append({"k": k, "tokens": prompt + k * completion, "value": next(means), "low": low, "high": high})
        strategies.append({"name": name, "points": points})
    return {
        "samples": task.n,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "cut": statistics.fmean(c["finish"] == "length" for i in items for c in i["completions"]),
        "strategies": strategies,
    }


def count_failures(task: SampledAnswersConfig, completions: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return on how many completions the judge and each score failed, without those that never did."""
    failed = {"judge": sum(c["judge"] is None for c in completions)}
    failed |= {r.title: sum(c["scores"][r.title] is None for c in completions) for r in task.rank_by}
    return {name: count for name, count in failed.items() if count}
