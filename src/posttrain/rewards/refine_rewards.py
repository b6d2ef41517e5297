"""Rewards of the self-refine loop: of each answer of a chain, with a bonus for progress (SCoRE, arXiv 2409.12917)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from posttrain.config.names import SAME_ANSWER
from posttrain.config.rewards import Form, RewardConfig, RewardsConfig, RewardTermConfig
from posttrain.core.errors import RewardError
from posttrain.core.imports import load_object
from posttrain.core.types import Rollout, RolloutGroup, Step
from posttrain.rewards.outcome import RewardOutcome
from posttrain.rewards.reward import Reward, RewardContext, RewardFunctions
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.refine_prompts import said

ANSWER = "answer"
"""Name of the reward of one answer, apart from its chain."""


def check_answer_reward(reward: RewardTermConfig, name: str) -> None:
    """Raise ValueError if a reward can't score an answer apart from the chain that it is in.

    Args:
        reward: Its settings.
        name: Name of the reward that it belongs to.
    """
    unusable = {
        "compares the completions of a prompt": reward.compares_completions,
        "scores steps": reward.scores_steps,
        "scores whole completions": reward.form == "rollouts",
    }
    for why, holds in unusable.items():
        if holds:
            raise ValueError(f"{name}.reward is {reward.title}, which {why}: expected a reward of a single answer")


class AnswerScorer:
    """Score answers by a reward of single answers, many in a call; failures are outcomes.

    Args:
        reward: Settings of the reward.
        functions: Callables given from Python, by name.
        context: What is known of the completions.
    """

    def __init__(self, reward: RewardTermConfig, functions: RewardFunctions, context: RewardContext) -> None:
        term = reward.model_copy(update={"name": ANSWER, "weight": 1.0})
        terms = RewardsConfig(terms=[term], on_error="exclude", on_timeout="exclude", workers=context.workers)
        self.stack = RewardStack(terms, functions, context.tokenizer, context.log)

    def __call__(self, answers: Sequence[Rollout], examples: Sequence[Mapping[str, Any]]) -> list[RewardOutcome]:
        """Return the outcome of each answer. Raises RewardError if the reward has never worked."""
        groups = [RolloutGroup((), e, [a]) for a, e in zip(answers, examples, strict=True)]
        out = []
        for group in self.stack(groups).groups:
            (scored,) = group.rollouts
            if scored.rewarded:
                out.append(RewardOutcome(scored.rewards[ANSWER], message=scored.notes.get(ANSWER, "")))
            else:
                failure, _, message = scored.failures[ANSWER].partition(": ")
                out.append(RewardOutcome(failure=failure, message=message))  # type: ignore[arg-type]
        return out

    def close(self) -> None:
        """End worker processes."""
        self.stack.close()


class AnswerRewardConfig(RewardTermConfig):
    """Settings of rewards that score answers by another reward: its settings, and what counts as right."""

    form: ClassVar[Form] = "rollouts"
    reward: RewardConfig = Field(description="The reward of one answer: settings of any reward of single answers.")
    right_at: float = Field(1.0, description="Reward from which an answer counts as right in the metrics.")

    @property
    def is_correctness(self) -> bool:  # type: ignore[override]
        """Return True if the reward of one answer says right or wrong."""
        return self.reward.is_correctness

    @model_validator(mode="after")
    def _single(self) -> Self:
        check_answer_reward(self.reward, self.title)
        return self


class AnswerReward(Reward):
    """Base of rewards that score answers by another reward, which is opened when the completions are known."""

    Config: ClassVar[type[AnswerRewardConfig]] = AnswerRewardConfig
    config: AnswerRewardConfig

    def open(self, functions: RewardFunctions) -> None:
        """Keep the functions for the reward of one answer."""
        self.functions = functions
        self.scorer: AnswerScorer | None = None

    def bind(self, context: RewardContext) -> None:
        """Open the reward of one answer."""
        self.context = context
        self.scorer = AnswerScorer(self.config.reward, self.functions, context)

    def close(self) -> None:
        """End worker processes of the reward of one answer."""
        if self.scorer is not None:
            self.scorer.close()

    def differ(self, one: str, two: str) -> bool:
        """Return True if two answers have different final answers, as the reward of one answer reads them."""
        return final_answers_differ(one, two, getattr(self.config.reward, "extract", None))


def answer_figures(first: float, last: float, edited: bool, right_at: float) -> dict[str, float]:
    """Return the figures of a chain that are logged: right before and after, and what the revision changed.

    Args:
        first: Reward of the first answer.
        last: Reward of the last one.
        edited: True if its final answer is another.
        right_at: Reward from which an answer is right.
    """
    before, after = first >= right_at, last >= right_at
    return {
        "first": float(before),
        "last": float(after),
        "wrong_to_right": float(after and not before),
        "right_to_wrong": float(before and not after),
        "edited": float(edited),
    }


def final_answers_differ(one: str, two: str, extract: str | None) -> bool:
    """Return True if two answers have different final answers.

    Args:
        one: An answer.
        two: Another.
        extract: Where the final answer is. None: all of the text is the answer, as of a program.
    """
    one, two = said(one), said(two)
    if " ".join(one.split()) == " ".join(two.split()):
        return False
    return extract is None or not load_object(SAME_ANSWER)(one, two, extract)


@dataclass(frozen=True)
class ScoredTurn:
    """Hold what a chain's turn is paid for: an answer, with all that the model wrote for it after the answer before.

    Attributes:
        first: Place of its first token.
        last: One past the place of its last token.
        reward: Reward of the answer.
    """

    first: int
    last: int
    reward: float


def improvement_scores(turns: Sequence[ScoredTurn], bonus: float, first: float) -> dict[int, Step]:
    """Return the scores of turns, by number from 1: each answer's own reward, and the bonus for progress.

        s_1 = first r_1        s_k = r_k + bonus (r_k - r_{k-1})  for k > 1

    Source: SCoRE, arXiv 2409.12917 section 5 (its alpha is `bonus`). The bonus is part of the later turn's reward
    alone: credited to the earlier answer too, as a reward to go, it would pay for a wrong first answer.

    Args:
        turns: The turns in order.
        bonus: Factor of the progress.
        first: Factor of the first answer's reward. 0: the first turn has no score, as in stage 1 of SCoRE.
    """
    out = {}
    for k, turn in enumerate(turns):
        if k:
            out[k + 1] = (turn.first, turn.last, turn.reward + bonus * (turn.reward - turns[k - 1].reward))
        elif first:
            out[1] = (turn.first, turn.last, first * turn.reward)
    return out


class ImprovementReward(AnswerReward):
    """Score every answer of a self-refine chain by a reward of single answers, each for its own tokens.

    A turn is compared with the same turn of other completions: the advantage of the first answer's tokens comes from
    the first answers of the prompt's completions, that of the revision's tokens (and of the model's own feedback that
    led to it) from their revisions. Nothing flows back from the revision to the first answer. The number of the reward
    is that of the last answer. Own feedback that ends the chain by its verdict is scored as a revision that changes
    nothing.
    """

    class Config(AnswerRewardConfig):
        """The reward of every answer of a self-refine chain, and a bonus for progress (docs/self-refine.md)."""

        needs_environment: ClassVar[str] = "refine"
        kind: Literal["improvement"] = "improvement"
        bonus: float = Field(
            1.0,
            ge=0,
            description="Alpha: a revision gets its reward + alpha * (its reward - the reward of the answer before).",
        )
        first: float = Field(
            1.0,
            ge=0,
            description="Factor of the first answer's own reward. 0: none (SCoRE's stage 1, with kl.later_turns).",
        )

        @property
        def scores_steps(self) -> bool:
            """Return True: turns are steps."""
            return True

    config: Config

    def bind(self, context: RewardContext) -> None:
        """Open the reward of one answer."""
        if context.tokenizer is None:
            raise RewardError(f"reward {self.config.title!r} needs the tokenizer, to find the turns of a completion")
        super().bind(context)

    def __call__(self, rollouts: Sequence[Rollout], examples: Sequence[Mapping[str, Any]]) -> list[RewardOutcome]:
        """Score the answers of all chains together."""
        from posttrain.sampling.refine_turns import RefineTurn, refine_turns

        assert self.scorer is not None
        config: Any = self.context.environment
        nothing = [RefineTurn("answer", "", 0, 0)]  # a completion without tokens is an empty answer
        chains = [refine_turns(r, self.context.tokenizer, config) or nothing for r in rollouts]
        answers, asked, places = [], [], []
        for c, (rollout, turns) in enumerate(zip(rollouts, chains, strict=True)):
            for turn in turns:
                if turn.kind == "answer":
                    places.append(c)
                    answers.append(answer_rollout(rollout, turn))
                    asked.append(examples[c])
        found: list[list[RewardOutcome]] = [[] for _ in rollouts]
        for c, outcome in zip(places, self.scorer(answers, asked), strict=True):
            found[c].append(outcome)
        return [self._outcome(r, t, f) for r, t, f in zip(rollouts, chains, found, strict=True)]

    def _outcome(self, rollout: Rollout, turns: Sequence[Any], scored: Sequence[RewardOutcome]) -> RewardOutcome:
        """Return the outcome of a chain: a failure if the reward of one of its answers failed."""
        failed = next((o for o in scored if o.value is None), None)
        if failed is not None:
            return failed
        own = [t for t in turns if t.kind != "request"]
        values, paid, begin = iter(scored), list[ScoredTurn](), own[0].first
        for t in own:
            if t.kind == "answer":
                paid.append(ScoredTurn(begin, t.last, float(next(values).value or 0.0)))
                begin = t.last
        if own[-1].kind == "feedback" and rollout.finish == "stop":  # its verdict has kept the last answer
            paid.append(ScoredTurn(begin, own[-1].last, paid[-1].reward))
        texts = [t.text for t in own if t.kind == "answer"]
        config = self.config
        figures = answer_figures(paid[0].reward, paid[-1].reward, self.differ(texts[0], texts[-1]), config.right_at)
        scores = improvement_scores(paid, config.bonus, config.first)
        return RewardOutcome(paid[-1].reward, message=scored[-1].message, turns=scores, figures=figures)


def answer_rollout(rollout: Rollout, turn: Any) -> Rollout:
    """Return an answer of a chain as a rollout, cut if the chain was cut in it."""
    last = turn.last == len(rollout.tokens)
    tokens = tuple(rollout.tokens[turn.first : turn.last])
    finish = rollout.finish if last and rollout.finish == "length" else "end"
    return Rollout(tokens, tuple(rollout.logprobs[turn.first : turn.last]), finish, turn.text)
