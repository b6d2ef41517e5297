"""Evaluation of self-refine: chains of answers and feedback, against samples of single answers at equal tokens.

Tokens of a problem are those of its prompt, counted once, and all that follows: what the model wrote, the requests of
the environment, and what other models read and wrote for feedback. The k samples that refining is compared with cost
the same tokens, on average over the problems; a k between two whole numbers stands for a draw of one of them, so that
the mean of their values, weighted by nearness, costs the tokens exactly.

Source of the comparison: arXiv 2310.01798, section 4 (there of a debate, at an equal number of responses).
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain import sandbox
from posttrain.config.rewards import RewardsConfig
from posttrain.core.statistics import mcnemar_exact, mean_difference, mean_interval, paired_difference
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.eval.sampled_tasks import (
    answer_of,
    completion_records,
    count_failures,
    curves_of,
    in_chunks,
    sampling_summary,
)
from posttrain.rewards.stack import RewardStack, tokens_read
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.environments import environment
from posttrain.sampling.multi_turn import TurnSampler
from posttrain.sampling.protocol import OnDone, Request, Sampler
from posttrain.sampling.refine_turns import RefineTurn, refine_turns, stopped_by

if TYPE_CHECKING:
    from posttrain.config import SamplingConfig
    from posttrain.core.progress import Track
    from posttrain.data.prompts import RenderedPrompt
    from posttrain.eval.evaluation_tasks import Chunk, EvaluationItems, EvaluationRun
    from posttrain.eval.refine_evaluation import RefineEvaluation

TOKENS_READ = "tokens"
"""Name after a score's of the number of tokens that its reward model read."""
STREAM_OF_SAMPLES, STREAM_OF_CHAINS = 8, 9
"""Random streams: the samples are drawn apart from the first answers of the chains."""


class EqualTurns:
    """A sampler that bounds every turn by `max_tokens`, as it bounds a single answer. sampler: what samples."""

    def __init__(self, sampler: Sampler, max_tokens: int) -> None:
        self.sampler, self.max_tokens = sampler, max_tokens

    def sample(
        self, requests: Sequence[Request], params: SamplingConfig, on_done: OnDone | None = None
    ) -> list[RolloutGroup]:
        """Complete every request, and return a group for each.

        Args:
            requests: The prompts.
            params: How tokens are drawn.
            on_done: Called as each completion ends.
        """
        bounded = [
            Request(r.tokens, r.n, r.seed, r.example, min(r.max_tokens or self.max_tokens, self.max_tokens))
            for r in requests
        ]
        return self.sampler.sample(bounded, params, on_done)


class RecordedStates:
    """An environment that keeps the states of the completions, in the order in which they began."""

    def __init__(self, answering: Any) -> None:
        self.answering, self.states = answering, list[Any]()
        self.step, self.step_many = answering.step, answering.step_many

    def start(self, example: Mapping[str, Any]) -> Any:
        """Begin a completion."""
        self.states.append(self.answering.start(example))
        return self.states[-1]


@dataclass(frozen=True)
class RefineChain:
    """Hold the chain of a problem.

    Attributes:
        rollout: All its tokens.
        turns: Its turns, in order.
        answers: The answers among them, judged.
        external: Tokens that other models read and wrote for feedback on the first answer, the second, and so on.
        stopped: What ended it, as `stopped_by` returns it.
    """

    rollout: Rollout
    turns: Sequence[RefineTurn]
    answers: Sequence[Rollout]
    external: Sequence[int]
    stopped: str


class RefineSampling:
    """Sample the chains and the single answers of problems, and judge them.

    Args:
        run: What the evaluation works with.
        task: The settings.
    """

    def __init__(self, run: EvaluationRun, task: RefineEvaluation.Config) -> None:
        self.task, self.tokenizer = task, run.tokenizer
        terms = [[task.judge.model_copy(update={"name": "judge"})], task.rank_by]
        self.judge, *self.scores = [
            run.until.enter_context(RewardStack(RewardsConfig(terms=of_stack), run.functions, log=run.log))
            for of_stack in terms
            if of_stack
        ]
        answering = environment(task.loop, run.functions)
        run.until.callback(getattr(answering, "close", lambda: None))
        self.environment = RecordedStates(answering)
        self.single = LocalSampler(run.model, run.tokenizer, **task.sampler.options())
        turns = EqualTurns(self.single, task.sampler.max_tokens)
        self.turns = TurnSampler(turns, self.environment, task.loop, run.tokenizer, self.single.context)
        count = len(run.data.items)
        self.chain_seeds = np.random.SeedSequence([run.seed, STREAM_OF_CHAINS]).generate_state(count, np.uint64)

    def items(self, prompts: Mapping[int, RenderedPrompt], seeds: np.ndarray, track: Track) -> EvaluationItems:
        """Return the items of a chunk's problems.

        Args:
            prompts: The problems by number.
            seeds: Seeds of the single answers of all problems.
            track: Shows the progress.
        """
        task, count = self.task, track.counter("sampling", len(prompts) * (self.task.n + 1), 16)
        single = task.sampler.model_copy(update={"stop": task.loop.stop_strings})
        requests = [Request(q.tokens, task.n, int(seeds[i]), q.problem) for i, q in prompts.items()]
        sampled = self.single.sample(requests, single, count)
        chains, states = self._chains(prompts, count)
        track.phase("judging")
        nothing = [RefineTurn("answer", "", 0, 0)]  # a chain without tokens is an empty answer
        turns = [refine_turns(rollout, self.tokenizer, task.loop) or nothing for rollout in chains]
        answers = [
            RolloutGroup(q.tokens, q.problem, answer_rollouts(chain, written))
            for q, chain, written in zip(prompts.values(), chains, turns, strict=True)
        ]
        judged = self.judge([*sampled, *answers]).groups
        scored, judged = self._ranked(judged[: len(sampled)]), judged[len(sampled) :]
        out = []
        for (i, q), completions, chain, written, said, state in zip(
            prompts.items(), scored, chains, turns, judged, states, strict=True
        ):
            external = [sum(note.tokens for note in notes) for notes in state.notes]
            stopped = stopped_by(chain, written, task.loop)
            item = refined_item(
                task, i, q, completions.rollouts, RefineChain(chain, written, said.rollouts, external, stopped)
            )
            out.append(item)
        return out

    def _ranked(self, groups: list[RolloutGroup]) -> list[RolloutGroup]:
        """Return judged groups with the scores that rank, and the tokens read for each; answers of chains have none."""
        for stack in self.scores:
            scored, read = stack(groups).groups, tokens_read(stack, groups)
            out = []
            for g, judged in enumerate(groups):
                costs = [
                    {f"{name}/{TOKENS_READ}": float(n[g][i]) for name, n in read.items()}
                    for i in range(len(judged.rollouts))
                ]
                rollouts = [
                    replace(r, rewards={**r.rewards, **s.rewards, **cost})
                    for r, s, cost in zip(judged.rollouts, scored[g].rollouts, costs, strict=True)
                ]
                out.append(replace(judged, rollouts=rollouts))
            groups = out
        return groups

    def _chains(self, prompts: Mapping[int, RenderedPrompt], count: OnDone) -> tuple[list[Rollout], list[Any]]:
        """Return the chain of each problem, and the environment's state at its end."""
        task = self.task
        temperature = task.sampler.temperature if task.chain_temperature is None else task.chain_temperature
        longest = task.sampler.max_tokens * task.loop.most_calls
        params = task.sampler.model_copy(update={"temperature": temperature, "max_tokens": longest})
        requests = [Request(q.tokens, 1, int(self.chain_seeds[i]), q.problem) for i, q in prompts.items()]
        self.environment.states.clear()
        groups = self.turns.sample(requests, params, count)
        return [group.rollouts[0] for group in groups], list(self.environment.states)


def refine_chunks(run: EvaluationRun, task: RefineEvaluation.Config) -> Iterator[Chunk]:
    """Sample a chain and n single answers of each problem, and judge them."""
    if task.vote == "program":
        sandbox.require_sandbox()
    sampling = RefineSampling(run, task)
    turns = task.loop.most_calls
    return in_chunks(run, task.n + turns, STREAM_OF_SAMPLES, sampling.items)


def answer_rollouts(chain: Rollout, turns: Sequence[RefineTurn]) -> list[Rollout]:
    """Return each answer of a chain as a completion, for the judge; only the last turn can have been cut.

    Args:
        chain: The chain.
        turns: Its turns.
    """
    out = []
    for turn in turns:
        if turn.kind == "answer":
            finish = "length" if turn is turns[-1] and chain.finish == "length" else "end"
            places = slice(turn.first, turn.last)
            out.append(Rollout(chain.tokens[places], chain.logprobs[places], finish, turn.text))
    return out


def refined_item(
    task: RefineEvaluation.Config, number: int, question: RenderedPrompt, sampled: Sequence[Rollout], chain: RefineChain
) -> dict[str, Any]:
    """Return one problem with its single answers and its chain.

    Args:
        task: The settings.
        number: Number of the problem.
        question: The problem.
        sampled: Its single answers, with their rewards.
        chain: Its chain, whose answers have the judge's number.
    """
    completions, answers = completion_records(task, sampled), _answers(task, chain)
    for record, rollout in zip(completions, sampled, strict=True):
        read = {r.title: int(rollout.rewards.get(f"{r.title}/{TOKENS_READ}", 0)) for r in task.rank_by}
        if any(read.values()):
            record["read"] = read
    last = answers[-1]
    return {
        "id": number,
        "source": str(question.problem.get("source", "")),
        "prompt": question.text,
        "expected": question.problem.get("answer"),
        "output": last["text"],
        "correct": last["right"],
        "value": float(last["right"]),
        "failed": last["judge"] is None,
        "prompt_tokens": len(question.tokens),
        "chain": {
            "answers": answers,
            "turns": [{"kind": t.kind, "text": t.text, "tokens": t.last - t.first} for t in chain.turns],
            "stopped": chain.stopped,
            "changed": _changed(task, answers[0]["text"], last["text"]),
            "written": chain.rollout.length,
            "requests": len(chain.rollout.tokens) - chain.rollout.length,
            "external": sum(chain.external),
        },
        "completions": completions,
        "curves": curves_of(task, completions),
    }


def _answers(task: RefineEvaluation.Config, chain: RefineChain) -> list[dict[str, Any]]:
    """Return the answers of a chain. spent: tokens up to the end of the answer, if the loop had ended there."""
    ends = [t.last for t in chain.turns if t.kind == "answer"]
    return [
        {
            "text": answer.text,
            "judge": answer.rewards.get("judge"),
            "right": answer.rewards.get("judge", -math.inf) >= task.right_at,
            "spent": end + sum(chain.external[:i]),
        }
        for i, (answer, end) in enumerate(zip(chain.answers, ends, strict=True))
    ]


def _changed(task: RefineEvaluation.Config, first: str, last: str) -> bool:
    """Return True if the final answer differs, as votes count answers; else, if one has none, the whole text."""
    answers = (None, None) if task.vote is None else (answer_of(first, task), answer_of(last, task))
    return first != last if None in answers else answers[0] != answers[1]


def summary_of_refining(
    task: RefineEvaluation.Config, items: Sequence[Mapping[str, Any]], seed: int = 0
) -> dict[str, Any]:
    """Return the curves of the single answers, and under `refine` what the chains did and cost.

    refine: points (accuracy and tokens with 0, 1, 2 … rounds), change (after minus before on the same problems),
    gained and lost (wrong → right, right → wrong), changed (share of problems whose final answer differs from the
    first), stopped (chains by what ended them), tokens (means of a problem), equal_tokens. A judge that failed counts
    as wrong, and is counted under `failed`.

    Args:
        task: The settings.
        items: The items of all problems.
        seed: Seeds the bootstrap.
    """
    sampling = sampling_summary(task, items, seed)
    chains = [i["chain"] for i in items]
    right = [(c["answers"][0]["right"], c["answers"][-1]["right"]) for c in chains]
    gained, lost = right.count((False, True)), right.count((True, False))
    both, neither = right.count((True, True)), right.count((False, False))
    difference, (low, high) = paired_difference(both, gained, lost, neither)
    tokens = {name: statistics.fmean(c[name] for c in chains) for name in ("written", "requests", "external")}
    failed = count_failures(task, [c for i in items for c in i["completions"]])
    if unjudged := sum(a["judge"] is None for c in chains for a in c["answers"]):
        failed = {"judge": 0, **failed}
        failed["judge"] += unjudged
    return {
        **sampling,
        "failed": failed,
        "refine": {
            "points": _points(task, items, seed),
            "change": {
                "difference": difference, "low": low, "high": high,
                "p_value": mcnemar_exact(gained, lost), "test": "McNemar exact",
            },
            "gained": gained,
            "lost": lost,
            "kept_right": both,
            "kept_wrong": neither,
            "changed": statistics.fmean(c["changed"] for c in chains),
            "stopped": dict(sorted(Counter(c["stopped"] for c in chains).items())),
            "tokens": {"prompt": sampling["prompt_tokens"], **tokens},
            "equal_tokens": at_equal_tokens(task, items, seed),
        },
    }  # fmt: skip


def _points(task: RefineEvaluation.Config, items: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Return accuracy and tokens after 0, 1, 2 … rounds; a chain that ended keeps its last answer."""
    out = []
    for r in range(task.loop.rounds + 1):
        values, tokens = [], []
        for item in items:
            answers = item["chain"]["answers"]
            values.append(float(answers[min(r, len(answers) - 1)]["right"]))
            spent = answers[r]["spent"] if len(answers) > r else tokens_of_chain(item)
            tokens.append(item["prompt_tokens"] + spent)
        low, high = mean_interval(values, seed=seed)
        point = {"value": statistics.fmean(values), "low": low, "high": high}
        out.append({"k": r, "tokens": statistics.fmean(tokens), **point})
    return out


def tokens_of_chain(item: Mapping[str, Any]) -> int:
    """Return the tokens of a problem's chain without its prompt."""
    return int(sum(item["chain"][name] for name in ("written", "requests", "external")))


def at_equal_tokens(task: RefineEvaluation.Config, items: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Return the last answers of the chains against votes and choices among k samples that cost the same tokens.

    k = (mean tokens of a chain) / (mean tokens of a sample), the prompt being counted once on both sides; a sample of a
    strategy that ranks by a reward model costs what the model reads as well. For k between
    two whole numbers, a problem's value is (1 - f) v(floor k) + f v(ceil k) with f the fraction of k: what a draw of
    one of the two is worth and costs on average. Differences are refining minus the other, with the interval and
    p-value of the paired bootstrap over problems, k being kept.

    Args:
        task: The settings.
        items: The items of all problems.
        seed: Seeds the bootstrap.

    Returns:
        k; compared_at (k, at most n and at least 1); enough: False if n samples cost less than the chains; against:
        [{name, value, difference, low, high, p_value, k, compared_at, enough}] for each strategy but pass@k, which
        chooses nothing.
    """
    after, chain = [float(i["value"]) for i in items], statistics.fmean(map(tokens_of_chain, items))
    plain, against = _affordable(task, items, chain, ""), []
    curves: dict[tuple[int, ...], list[dict[str, list[float]]]] = {}
    for name in [n for n in items[0]["curves"] if n != "pass"]:
        cost = _affordable(task, items, chain, name.partition(":")[2])
        floor = min(math.floor(cost["compared_at"]), task.n)
        share = cost["compared_at"] - floor
        sizes = (floor, floor + 1) if share > 0 else (floor,)
        if sizes not in curves:
            curves[sizes] = [curves_of(task, i["completions"], sizes) for i in items]
        values = [(1 - share) * c[name][0] + share * c[name][-1] for c in curves[sizes]]
        difference, (low, high), p = mean_difference(values, after, seed=seed)
        compared = {"difference": difference, "low": low, "high": high, "p_value": p}
        against.append({"name": name, "value": statistics.fmean(values), **compared, **cost})
    return {**plain, "test": "paired bootstrap", "against": against}


def _affordable(
    task: RefineEvaluation.Config, items: Sequence[Mapping[str, Any]], chain: float, score: str
) -> dict[str, Any]:
    """Return k, compared_at and enough of a strategy.

    Args:
        task: The settings.
        items: The items of all problems.
        chain: Mean tokens of a chain.
        score: Name of the score that it ranks by. Empty: none.
    """
    costs = [c["tokens"] + c.get("read", {}).get(score, 0) for i in items for c in i["completions"]]
    k = chain / statistics.fmean(costs)
    return {"k": k, "compared_at": min(max(k, 1.0), float(task.n)), "enough": k <= task.n}
