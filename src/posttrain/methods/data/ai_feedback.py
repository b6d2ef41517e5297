"""Feedback: answers from rows or from the policy, labelled by people or by a judge, become preference rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.config.feedback import AnswersConfig, SamplesConfig
from posttrain.config.judge import JudgeConfig
from posttrain.config.settings import NAME, ModelConfig, StageBase
from posttrain.core.errors import DataError
from posttrain.trainer.stage import Stage

if TYPE_CHECKING:
    from pathlib import Path

    from posttrain.trainer.loop import OnStep


class FeedbackConfig(StageBase):
    """Feedback: answers in, pairs with strengths out (data/rows.jsonl), labelled by people or by a judge."""

    makes: ClassVar[Literal["model", "data", "reward_model"]] = "data"

    method: str = "feedback"
    name: str = Field("feedback", pattern=NAME, description="Name of the stage's folder in the run.")
    labels: Literal["human", "judge"] = Field(
        description="Whose labels the rows carry. judge: where people's are there too, the report compares the two."
    )
    answers: AnswersConfig
    judge: JudgeConfig | None = Field(None, description="The judge (labels: judge).")
    show: int = Field(10, ge=0, description="Disagreements with people (or between orders) kept in judge.json.")

    @model_validator(mode="after")
    def _labels(self) -> FeedbackConfig:
        if self.labels == "human" and isinstance(self.answers, SamplesConfig):
            raise ValueError(
                "nobody has labelled sampled answers: take labels: judge, or answers from rows with ratings"
            )
        if self.labels == "judge" and self.judge is None:
            raise ValueError("labels: judge needs a judge (judge.model.source, or judge.server.model)")
        if self.labels == "human" and self.judge is not None:
            raise ValueError("labels: human asks no judge; take it out, or take labels: judge")
        return self


class Feedback(Stage):
    """Label answers and write pairs with strengths."""

    Config = FeedbackConfig
    title = "Feedback"

    def prepare(self) -> list[tuple[str, Any]]:
        """Read the rows, or render the prompts; check the judge's principles, key and store."""
        from posttrain.data.chat_template import tokenize
        from posttrain.data.human_feedback import read_answers
        from posttrain.data.prompts import load_prompts
        from posttrain.judge.labels import Judge

        config, tokenizer = self.config, self.context.tokenizer
        if config.judge is not None:
            Judge.open(config.judge).close()
        self.source: Any
        if isinstance(config.answers, SamplesConfig):
            self.source = load_prompts(config.answers.problems, tokenizer, context=self.context.context)
            return [(config.name, self.source)]
        self.source = read_answers(config.answers, lambda text: len(tokenize(tokenizer, [text])[0]))
        if config.labels == "human" and not self.source.thumbs and all(p.human is None for p in self.source.pairs):
            raise DataError(f"stage {config.name}: labels are to be people's, and these rows carry none (no scores)")
        if config.labels == "judge" and not self.source.pairs:
            raise DataError(f"stage {config.name}: every prompt has one answer alone; a judge needs two to compare")
        return [(config.name, self.source)]

    def run(self, model: ModelConfig, folder: Path, seed: int, on_step: OnStep | None = None) -> dict[str, Any]:
        from posttrain.methods.data.feedback_rows import run_feedback

        return run_feedback(self.config, model, self.source, folder, seed=seed)
