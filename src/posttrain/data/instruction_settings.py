"""Settings by which tasks become instruction rows: mixing, demonstrations, reasoning, what is held out."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from posttrain.config.base import Config


class MixingConfig(Config):
    """Set how large the share of each task is, before its weight."""

    kind: Literal["proportional", "equal", "examples-proportional"] = Field(
        "proportional",
        description="Share of a task: by its number of examples, the same for all, or by min(examples, maximum) as in T5 and FLAN.",
    )
    maximum: int = Field(3000, ge=1, description="Examples that count at most, with examples-proportional.")


class ShotsConfig(Config):
    """Demonstrations before the row itself."""

    share: float = Field(0.5, ge=0, le=1, description="Share of the rows that get demonstrations.")
    counts: list[int] = Field(
        [1, 2, 3], min_length=1, max_length=20, description="Numbers of demonstrations; each row draws one of them."
    )
    style: Literal["text", "turns"] = Field(
        "text", description="text: before the prompt, in one turn; turns: each as a turn of the user and an answer."
    )

    @field_validator("counts")
    @classmethod
    def _none_negative(cls, value: list[int]) -> list[int]:
        if wrong := [n for n in value if not 0 <= n <= 32]:
            raise ValueError(f"expected numbers from 0 to 32, got {wrong[0]}")
        return value


class InstructionSettings(Config):
    """Settings of building instruction rows."""

    rows: int | None = Field(
        None,
        ge=1,
        description="Rows to train on in all. None: the number that the shares allow without using a row twice.",
    )
    mixing: MixingConfig = Field(MixingConfig(), description="Shares of the tasks: a kind, or a block with kind.")
    max_rows_per_task: int | None = Field(
        None, ge=1, description="Most examples of a task, as max_rows of each task's file. None: all."
    )
    rows_per_example: int = Field(
        1, ge=1, le=20, description="Rows that an example can give, each with another wording."
    )
    wordings: int | None = Field(
        None,
        ge=1,
        description="Most wordings of a task that are trained on, drawn by the seed; of inverted ones, and of those with a context, as many again. None: all.",
    )
    shots: ShotsConfig = ShotsConfig()
    rationale_share: float = Field(
        0.5, ge=0, le=1, description="Share of rows with reasoning before the answer, of those that have some."
    )
    inverted_share: float = Field(
        0.0, ge=0, le=1, description="Share of rows whose task is inverted: from the answer to the input."
    )
    held_out_clusters: list[str] = Field(
        default_factory=list, description="Clusters that are not trained on; their rows are in unseen.jsonl."
    )
    held_out: int = Field(
        50, ge=0, description="Rows of each trained task that are held out, in seen.jsonl; at most half of a task."
    )
    unseen: int = Field(200, ge=1, description="Most rows of each task of a held-out cluster.")
    held_out_shots: int = Field(0, ge=0, le=32, description="Demonstrations of held-out rows.")
    held_out_rationale: bool = Field(False, description="Reasoning in held-out rows that have some.")
    similarity: float = Field(
        0.7,
        gt=0,
        le=1,
        description="ROUGE-L of two inputs of a task from which they are copies: one is not shown before the other, nor trained on if the other is held out.",
    )

    @field_validator("mixing", mode="before")
    @classmethod
    def _kind_alone(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value
