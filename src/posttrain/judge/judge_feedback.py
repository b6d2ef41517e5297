"""An AI judge as a source of feedback: its score and its explanation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from posttrain.config.feedback_sources import FeedbackSourceConfig
from posttrain.config.judge import JudgeConfig
from posttrain.core.errors import DataError
from posttrain.sampling.feedback_source import FeedbackFunctions, FeedbackNote, FeedbackSource


class JudgeFeedback(FeedbackSource):
    """Say how a judge scores the answer, and why if it explains its scores (judge.rationale)."""

    class Config(FeedbackSourceConfig):
        """An AI judge's score of the answer, and its explanation with judge.rationale."""

        kind: Literal["judge"] = "judge"
        judge: JudgeConfig = Field(description="The judge; its mode is score. rationale: tokens of its explanation.")
        prompt: str = Field("prompt", description="Column of the example with the prompt.")
        good_at: float | None = Field(
            None, description="Score from which nothing is wrong with the answer. None: not known."
        )

        @model_validator(mode="after")
        def _scores(self) -> JudgeFeedback.Config:
            if self.judge.mode != "score":
                raise ValueError("a judge gives feedback on one answer: set judge.mode to score")
            return self

    config: Config

    def open(self, functions: FeedbackFunctions) -> None:
        """Do nothing yet: the store and the model are opened when they are first used."""
        self.judge: Any = None

    def close(self) -> None:
        """Close the judge's store."""
        if self.judge is not None:
            self.judge.close()

    def __call__(self, answer: str, example: Mapping[str, Any]) -> FeedbackNote:
        """Return the feedback on one answer."""
        return self.many([answer], [example])[0]

    def many(self, answers: Sequence[str], examples: Sequence[Mapping[str, Any]]) -> list[FeedbackNote]:
        """Return the feedback on several answers, asked for together.

        Raises:
            DataError: An example has no prompt.
            ServerError: The judge's server failed.
        """
        from posttrain.judge.labels import Judge  # imports torch

        column = self.config.prompt
        for example in examples:
            if example.get(column) is None:
                raise DataError(
                    f"{example.get('source', 'an example')} has no {column!r} for the judge; it has {sorted(example)}. "
                    "Name the column with `prompt`"
                )
        if self.judge is None:
            self.judge = Judge.open(self.config.judge, f"feedback {self.config.title}")
        scores = self.judge.score([example[column] for example in examples], answers)
        return [self._note(score) for score in scores]

    def _note(self, score: Any) -> FeedbackNote:
        if score.expectation is None:
            return FeedbackNote(f"A judge gave no score: {score.why}.", None, score.tokens)
        scale = self.config.judge.scale
        best, worst = max(scale.values()), min(scale.values())
        text = f"A judge gives the answer {score.expectation:.1f} on a scale from {worst:g} to {best:g}."
        rationale = score.verdict.rationale.strip()
        good = None if self.config.good_at is None else score.expectation >= self.config.good_at
        return FeedbackNote(f"{rationale}\n{text}" if rationale else text, good, score.tokens)
