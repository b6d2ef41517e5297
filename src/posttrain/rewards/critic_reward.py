"""Reward of a critic: a frozen model revises an answer by the critique, and the revision is scored (RL4F)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.environment import EnvironmentConfig
from posttrain.config.settings import ModelConfig, SamplerConfig, SamplingConfig
from posttrain.core.errors import RewardError
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.rewards.outcome import LabelError, RewardOutcome
from posttrain.rewards.refine_rewards import AnswerReward, AnswerRewardConfig, answer_figures, answer_rollout
from posttrain.rewards.reward import RewardFunctions
from posttrain.sampling.feedback_source import FeedbackNote
from posttrain.sampling.refine_prompts import NO_CHANGE, gives_verdict, said

if TYPE_CHECKING:
    from posttrain.sampling.protocol import OnDone, Request, Sampler

CRITIQUE_COLUMN = "critique"
"""Name of the source of feedback that repeats the critique, and of the column that holds it."""
ASKED_COLUMN, WRITTEN_COLUMN = "asked", "written"
"""Columns of a critic's row: the turns of the question, and the answer to criticise."""
CRITIQUE_SOURCE = {"kind": "function", "function": CRITIQUE_COLUMN}


class CorrectedReward(AnswerReward):
    """Score a critique by what it is worth: a frozen corrector revises the answer by it, and the revision is scored.

        r(c) = reward(y'),  y' ~ corrector(. | question, answer, c)

    Source: RL4F, arXiv 2305.08844 section 3 (the task model is frozen, the critic is trained). The corrector reads the
    critique in the words of the self-refine environment, as it will when the critic is a source of feedback
    (`feedback: [{kind: model, source: ...}]`). A critique with the words of `verdict` leaves the answer as it is.
    """

    class Config(AnswerRewardConfig):
        """The reward of an answer that a frozen model has revised by the completion, a critique."""

        kind: Literal["corrected"] = "corrected"
        model: ModelConfig = Field(
            description="The frozen corrector; `source:` beside `kind` means model: {source: ...}."
        )
        environment: EnvironmentConfig = Field(
            default_factory=lambda: {"kind": "refine"},
            validate_default=True,
            description="Self-refine loop in which the corrector reads the critique: its words, answers, stop.",
        )
        sampler: SamplerConfig = Field(
            SamplerConfig(temperature=0.0), description="How revisions are drawn; max_tokens is the revision's."
        )
        verdict: str | None = Field(
            NO_CHANGE,
            min_length=1,
            description="Words of a critique that say that nothing is wrong. None: there are none.",
        )

        @model_validator(mode="before")
        @classmethod
        def _loop(cls, value: Any) -> Any:
            if not isinstance(value, Mapping):
                return value
            out = dict(value)
            if "source" in out and "model" not in out:
                out["model"] = {"source": out.pop("source")}
            loop = out.get("environment", {})
            if not isinstance(loop, Mapping):
                return out
            fixed = {"kind": "refine", "own": False, "rounds": 1, "feedback": [CRITIQUE_SOURCE]}
            for name, only in fixed.items():
                given = loop.get(name, only)
                if name == "feedback" and isinstance(given, list):
                    given = [{k: f.get(k) for k in CRITIQUE_SOURCE} if isinstance(f, Mapping) else f for f in given]
                if given != only:
                    says = "the critique is the feedback" if name == "feedback" else f"it is {only!r} here"
                    raise ValueError(f"environment.{name} of a corrector can't be set: {says}. Leave it out")
            return {**out, "environment": {**loop, **fixed}}

    config: Config

    def open(self, functions: RewardFunctions) -> None:
        """Keep the functions for the reward of one answer; the corrector is loaded when it is first used."""
        super().open(functions)
        self.corrector: Corrector | None = None

    def close(self) -> None:
        """End worker processes, and let go of the corrector."""
        super().close()
        self.corrector = None

    def __call__(self, rollouts: Sequence[Rollout], examples: Sequence[Mapping[str, Any]]) -> list[RewardOutcome]:
        """Have the answers revised together, and score each before and after."""
        assert self.scorer is not None
        out: list[RewardOutcome | None] = [_column_error(e) for e in examples]
        todo = [i for i, failure in enumerate(out) if failure is None]
        if not todo:
            return [o for o in out if o is not None]
        if self.corrector is None:
            self.corrector = Corrector(self.config)
        asked = [examples[i] for i in todo]
        revised = self.corrector.revise(asked, [rollouts[i].text for i in todo])
        written = [Rollout((), (), "end", str(e[WRITTEN_COLUMN])) for e in asked]
        scores = self.scorer([*written, *revised], [*asked, *asked])
        for k, i in enumerate(todo):
            before, after = scores[k], scores[len(todo) + k]
            if after.value is None or before.value is None:
                out[i] = after if after.value is None else before
                continue
            edited = self.differ(written[k].text, revised[k].text)
            figures = answer_figures(before.value, after.value, edited, self.config.right_at)
            out[i] = RewardOutcome(after.value, message=f"revised: {revised[k].text}", figures=figures)
        return [o for o in out if o is not None]


def _column_error(example: Mapping[str, Any]) -> RewardOutcome | None:
    """Return a failure if a row has no question or no answer to criticise."""
    missing = [name for name in (ASKED_COLUMN, WRITTEN_COLUMN) if not example.get(name)]
    if not missing:
        return None
    error = LabelError(
        f"the example has no {missing[0]!r} (it has {sorted(example)}): rows of a critic come from the stage "
        "corrections with `critic`, as stage:NAME/data/critic.jsonl"
    )
    return RewardOutcome(failure="error", message=f"LabelError: {error}")


class Corrector:
    """Revise answers by critiques with a frozen model, in the words of the self-refine environment.

    Args:
        config: Settings of the reward.
    """

    def __init__(self, config: CorrectedReward.Config) -> None:
        from posttrain.sampling.environments import environment
        from posttrain.sampling.frozen_sampler import open_sampler
        from posttrain.sampling.multi_turn import TurnSampler

        self.config, loop = config, config.environment
        self.local = open_sampler(config.model, config.sampler)
        self.tokenizer = self.local.tokenizer
        self.written = WrittenFirst(self.local, self.tokenizer, loop)
        answering = environment(loop, {CRITIQUE_COLUMN: lambda answer, example: self._note(example[CRITIQUE_COLUMN])})
        self.sampler = TurnSampler(self.written, answering, loop, self.tokenizer, self.local.context)

    def _note(self, critique: str) -> FeedbackNote:
        verdict = self.config.verdict
        return FeedbackNote(said(critique), None if verdict is None else gives_verdict(critique, verdict))

    def revise(self, examples: Sequence[Mapping[str, Any]], critiques: Sequence[str]) -> list[Rollout]:
        """Return the last answer of each: the revision, or the answer itself if the critique asks for none.

        A revision depends on its question, answer and critique alone, whatever else is revised.

        Args:
            examples: Rows with the question and the answer.
            critiques: The critiques.
        """
        from posttrain.sampling.protocol import Request
        from posttrain.sampling.refine_turns import refine_turns

        config: Any = self.config.environment
        requests, longest = [], 0
        for tokens, example, critique in zip(self._prompts(examples), examples, critiques, strict=True):
            whole = {**example, CRITIQUE_COLUMN: critique}
            limit = len(self.written.turn(whole).tokens) + self.config.sampler.max_tokens
            longest = max(longest, limit)
            requests.append(Request(tokens, 1, _seed(tokens, str(example[WRITTEN_COLUMN]), critique), whole, limit))
        params: SamplingConfig = self.config.sampler.model_copy(update={"max_tokens": longest})
        self.written.first_turn = True
        out = []
        for group in self.sampler.sample(requests, params):
            (rollout,) = group.rollouts
            answers = [t for t in refine_turns(rollout, self.tokenizer, config) if t.kind == "answer"]
            out.append(answer_rollout(rollout, answers[-1]))
        return out

    def _prompts(self, examples: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Return the questions as the corrector reads them."""
        from posttrain.data.chat_template import render_chat
        from posttrain.data.plain_text import plain_prompts
        from posttrain.data.tokenizing import tokenize

        turns = [list(e[ASKED_COLUMN]) for e in examples]
        if self.config.environment.answers == "turn":
            return tokenize(self.tokenizer, [render_chat(self.tokenizer, t, generation=True) for t in turns])
        return plain_prompts(["".join(m["content"] for m in t) for t in turns], self.tokenizer)


class WrittenFirst:
    """A sampler whose first turn is the answer in the example; later turns are sampled.

    Args:
        sampler: Samples the later turns.
        tokenizer: The tokenizer.
        environment: Settings of the environment, for how a turn ends.
    """

    def __init__(self, sampler: Sampler, tokenizer: Any, environment: Any) -> None:
        from posttrain.data.tokenizing import end_of_turn_token

        self.sampler, self.tokenizer = sampler, tokenizer
        self.stop = environment.stop[0] if environment.answers == "inline" and environment.stop else ""
        ending = end_of_turn_token(tokenizer)
        end: int | None = tokenizer.eos_token_id if ending is None else ending
        if end is None and not self.stop:
            raise RewardError(
                "the corrector's tokenizer has no end token, so an answer would run into the request: give "
                "environment.stop, and answers: inline"
            )
        self.ending = [] if self.stop or end is None else [end]
        self.first_turn = False

    def turn(self, example: Mapping[str, Any]) -> Rollout:
        """Return the answer as a turn that the model has written: with the stop string or the end token behind it."""
        from posttrain.data.special_text import guard
        from posttrain.data.tokenizing import continuation, text_tokens

        text = str(example[WRITTEN_COLUMN])
        tokens = continuation(self.tokenizer, guard(text, text_tokens(self.tokenizer)) + self.stop)
        tokens = [*tokens, *self.ending]
        return Rollout(tokens, [0.0] * len(tokens), "stop" if self.stop else "end", text)

    def sample(
        self, requests: Sequence[Request], params: SamplingConfig, on_done: OnDone | None = None
    ) -> list[RolloutGroup]:
        """Return the written answers if `first_turn` is set, and samples afterwards.

        Args:
            requests: The prompts.
            params: How tokens are drawn.
            on_done: Called as each completion ends.
        """
        if not self.first_turn:
            return self.sampler.sample(requests, params, on_done)
        self.first_turn = False
        return [RolloutGroup(r.tokens, r.example, [self.turn(r.example)]) for r in requests]


def _seed(tokens: Sequence[int], answer: str, critique: str) -> int:
    """Return the seed of a revision, by its content."""
    text = json.dumps([list(tokens), answer, critique])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
