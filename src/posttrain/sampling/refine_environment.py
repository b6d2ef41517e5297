"""Self-refine as an environment: the model answers, gets feedback (its own, or from outside), and writes a revision.

Sources: self-refine, arXiv 2303.17651 (own feedback, own verdict); CRITIC, arXiv 2305.11738, Reflexion, arXiv
2303.11366, and self-debugging, arXiv 2304.05128 (feedback of tools in the prompt); SCoRE, arXiv 2409.12917 (two turns
without feedback: own: false, no sources). One round:

    own: false, no sources   answer → request → answer
    sources                  answer → what they say, and the request → answer
    own                      answer → (what they say, and) the request for feedback → feedback → request → answer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, model_validator

from posttrain.config.environment import EnvironmentBase, ScoredPart
from posttrain.config.feedback_sources import AnyFeedbackConfig
from posttrain.config.names import SAME_ANSWER
from posttrain.config.rewards import EXTRACT, Extract
from posttrain.core.imports import load_object
from posttrain.core.types import Rollout
from posttrain.sampling.environments import QuotingReply
from posttrain.sampling.feedback_source import FeedbackFunctions, FeedbackNote, open_feedback
from posttrain.sampling.refine_prompts import (
    CHAT,
    INLINE,
    NO_CHANGE,
    NOTHING_FOUND,
    RefinePrompts,
    RefineTask,
    fields_of,
    fill_template,
    gives_verdict,
    is_worded,
    quoted,
    said,
    turn_text,
)
from posttrain.sampling.refine_turns import last_answer

RefineReply = tuple[str | None, bool]


@dataclass
class RefineState:
    """Hold one completion in the making.

    Attributes:
        example: Row of the prompt.
        answers: The answers so far, with what the model thinks before them.
        notes: What the sources said, one list for each answer that they were asked about.
        writes_feedback: True if the model's next turn is its own feedback.
        stopped: What has ended the loop. Empty: it goes on.
    """

    example: Mapping[str, Any]
    answers: list[str] = field(default_factory=list)
    notes: list[list[FeedbackNote]] = field(default_factory=list)
    writes_feedback: bool = False
    stopped: Literal["", "rounds", "verdict", "agreement", "sources"] = ""


class RefineEnvironment:
    """Request feedback and revisions until a round says that nothing is wrong, or all rounds are done."""

    class Config(EnvironmentBase):
        """The model answers, gets feedback on it, and revises it (docs/self-refine.md)."""

        kind: Literal["refine"] = "refine"
        answers: Literal["inline", "turn"] = Field(
            "turn",
            description="turn: requests are turns of the chat template; inline: they follow the model's text directly, "
            "for models without one.",
        )
        max_reply: int = Field(
            256, ge=1, description="Longest feedback of a source in tokens; a longer one is cut, and ends in [cut]."
        )
        stop: list[str] = Field(
            default_factory=list,
            description="Strings at which an answer or feedback of the model ends, besides its end token: a model "
            "without a chat template seldom writes one.",
        )
        rounds: int = Field(1, ge=1, le=100, description="Revisions at most.")
        own: bool = Field(True, description="The model writes feedback on its answer before it revises it.")
        feedback: list[AnyFeedbackConfig] = Field(
            default_factory=list,
            description="Sources of feedback from outside: names, or settings with `kind`. What they say is in the "
            "request.",
        )
        prompts: RefineTask = Field("text", description="Words of the requests, by the type of task.")
        critique: str | None = Field(
            None,
            description="Request for the model's own feedback, in place of the words of `prompts`. Fields: {feedback} "
            "(of the sources), {answer}, {prompt}, {verdict}.",
        )
        revision: str | None = Field(
            None,
            description="Request for a revision, likewise. {feedback}: of the sources; with own: the model's.",
        )
        verdict: str | None = Field(
            NO_CHANGE,
            min_length=1,
            description="Words of the model's own feedback that end the loop; case does not count. None: feedback "
            "never ends it.",
        )
        agreement: bool = Field(
            True, description="A revision with the same final answer as the answer before it ends the loop."
        )
        extract: Extract | None = Field(
            None, description=f"For agreement. {EXTRACT} None: auto for math and question, whole for code and text."
        )
        satisfied: bool = Field(
            True, description="End the loop when the sources that have something to say all say that nothing is wrong."
        )

        @property
        def stop_strings(self) -> list[str]:
            """Return the strings at which a turn of the model ends."""
            return list(self.stop)

        @property
        def end_closes_turn(self) -> bool:
            """Return True: after an answer that has ended comes the request, in plain text too."""
            return True

        @property
        def reads_special_tokens(self) -> bool:
            """Return False: answers are what a reader of the rollout sees."""
            return False

        def scored_part(self, rollout: Rollout, tokenizer: Any) -> ScoredPart | None:
            """Return the last answer: the text may end with the model's own feedback, and begins with older answers.

            Args:
                rollout: The completion.
                tokenizer: The tokenizer that it was sampled with.
            """
            answer = last_answer(rollout, tokenizer, self)
            return ScoredPart(answer.text, answer.first, answer.last)

        @property
        def most_calls(self) -> int:
            """Return the number of turns that the model may write."""
            return 1 + self.rounds * (2 if self.own else 1)

        @model_validator(mode="after")
        def _fits(self) -> RefineEnvironment.Config:
            if any(not s for s in self.stop):
                raise ValueError("environment.stop holds an empty string, which would end every turn at once")
            self._check_templates()
            defaults = type(self).model_fields
            for name, needed, used in (
                ("verdict", "own: true", self.own),
                ("critique", "own: true", self.own),
                ("satisfied", "sources in `feedback`", bool(self.feedback)),
                ("extract", "agreement: true", self.agreement),
            ):
                if not used and getattr(self, name) != defaults[name].default:
                    raise ValueError(f"environment.{name} would do nothing: it goes with {needed}")
            return self

        def _check_templates(self) -> None:
            for name in ("critique", "revision"):
                template = getattr(self, name)
                if template is None:
                    continue
                try:
                    fields = fields_of(template)
                except ValueError as error:
                    raise ValueError(f"environment.{name}: {error}") from error
                reported = bool(self.feedback) and (name == "critique" or not self.own)
                if reported and "feedback" not in fields:
                    raise ValueError(f"environment.{name} has no {{feedback}}: what the sources say would not be shown")
                if "feedback" in fields and not self.feedback and (name == "critique" or not self.own):
                    raise ValueError(
                        f"environment.{name} has {{feedback}}, and there is none: give sources in `feedback`"
                    )
                if "verdict" in fields and (name == "revision" or self.verdict is None):
                    raise ValueError(
                        f"environment.{name} has {{verdict}}, which is for a critique that may end the loop"
                    )
                if "feedback" not in fields and not is_worded(template):
                    raise ValueError(
                        f"environment.{name} is {template!r}: expected words besides its fields, which can be empty"
                    )

        @property
        def final_answer(self) -> Extract:
            """Return where the final answer is, for agreement."""
            return self.extract or ("auto" if self.prompts in ("math", "question") else "whole")

        def words(self) -> RefinePrompts:
            """Return the words of the requests."""
            return (CHAT if self.answers == "turn" else INLINE)[self.prompts]

    def __init__(self, config: Config, functions: FeedbackFunctions | None = None) -> None:
        self.config = config
        self.sources = [open_feedback(source, functions) for source in config.feedback]
        self.same_answer = load_object(SAME_ANSWER) if config.agreement else None

    def close(self) -> None:
        """Release what the sources have opened."""
        for source in self.sources:
            source.close()

    def start(self, example: Mapping[str, Any]) -> RefineState:
        """Return the state before the first answer."""
        return RefineState(example)

    def step(self, state: RefineState, text: str) -> RefineReply:
        """Return the next request, or that the loop is done."""
        return self.step_many([state], [text])[0]

    def step_many(self, states: Sequence[RefineState], texts: Sequence[str]) -> list[RefineReply]:
        """Return `step` of several completions; each source gets their answers together."""
        replies: dict[int, RefineReply] = {}
        answered: list[int] = []
        for i, (state, text) in enumerate(zip(states, texts, strict=True)):
            written = turn_text(text, self.config.stop)
            if state.writes_feedback:
                replies[i] = self._after_feedback(state, written)
            else:
                state.answers.append(written)
                if self._finished(state):
                    replies[i] = None, True
                else:
                    answered.append(i)
        reports = self._reports([states[i] for i in answered])
        for i, notes in zip(answered, reports, strict=True):
            replies[i] = self._after_answer(states[i], notes)
        return [replies[i] for i in range(len(states))]

    def _finished(self, state: RefineState) -> bool:
        if len(state.answers) > self.config.rounds:
            state.stopped = "rounds"
        elif self.same_answer is not None and len(state.answers) > 1:
            if self.same_answer(*map(said, state.answers[-2:]), self.config.final_answer):
                state.stopped = "agreement"
        return bool(state.stopped)

    def _reports(self, states: Sequence[RefineState]) -> list[list[FeedbackNote]]:
        """Return what the sources say about each state's last answer."""
        out: list[list[FeedbackNote]] = [[] for _ in states]
        if states:
            answers, examples = [said(s.answers[-1]) for s in states], [s.example for s in states]
            for source in self.sources:
                for report, note in zip(out, source.notes(answers, examples), strict=True):
                    report += [note] if note is not None else []
            for state, report in zip(states, out, strict=True):
                state.notes.append(report)
        return out

    def _after_answer(self, state: RefineState, notes: Sequence[FeedbackNote]) -> RefineReply:
        """Return the request that follows an answer on which the sources have said something."""
        config, words = self.config, self.config.words()
        notes = [note for note in notes if note.text.strip() or note.right is not None]
        if config.satisfied and notes and all(note.right for note in notes):
            state.stopped = "sources"
            return None, True
        report = quoted(note.text for note in notes)
        values = self._values(state) | {"feedback": report}
        head = fill_template(words.report, values) if notes else []
        if config.own:
            state.writes_feedback = True
            if config.critique is not None:
                return QuotingReply(fill_template(config.critique, values)), False
            end = words.end if config.verdict is not None else words.end_alone
            return QuotingReply([*head, *fill_template(words.critique + end, values)]), False
        if config.revision is not None:
            return QuotingReply(fill_template(config.revision, values)), False
        named = any(not note.informs for note in notes)
        return QuotingReply([*head, *fill_template(words.revision if named else words.alone, values)]), False

    def _after_feedback(self, state: RefineState, feedback: str) -> RefineReply:
        """Return the request for a revision, or that the model's own feedback ends the loop."""
        state.writes_feedback = False
        verdict = self.config.verdict
        if verdict is not None and gives_verdict(feedback, verdict):
            state.stopped = "verdict"
            return None, True
        template = self.config.words().revision if self.config.revision is None else self.config.revision
        shown = said(feedback) or NOTHING_FOUND
        return QuotingReply(fill_template(template, self._values(state) | {"feedback": shown})), False

    def _values(self, state: RefineState) -> dict[str, Any]:
        prompt = state.example.get("prompt", "")
        return {
            "answer": said(state.answers[-1]),
            "prompt": prompt if isinstance(prompt, str) else "",
            "verdict": self.config.verdict or "",
        }
