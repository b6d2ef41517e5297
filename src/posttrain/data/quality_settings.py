"""Settings of what is measured of rows before they are trained on, and of what is left out of them."""

from __future__ import annotations

from pydantic import Field

from posttrain.config.base import Config

NGRAM = 13
"""Words of a run that counts as leaked, as in GPT-3 (arXiv 2005.14165, appendix C)."""


class NearDuplicatesConfig(Config):
    """Examples of a task that nearly repeat an earlier one."""

    threshold: float = Field(
        0.8,
        ge=0.5,
        le=1,
        description="Share of three-word runs that two examples have in common (Jaccard) from which they count.",
    )
    drop: bool = Field(True, description="Leave near duplicates out; false: only count them.")


class LeaksConfig(Config):
    """Examples with text of an evaluation of the recipe."""

    n: int = Field(NGRAM, ge=4, le=100, description="Words of a run that an example and an evaluation share.")
    drop: bool = Field(True, description="Leave such examples out; false: only count them.")


class QualitySettings(Config):
    """Settings of the quality report of rows."""

    near_duplicates: NearDuplicatesConfig | None = Field(
        NearDuplicatesConfig(),
        description="Near duplicates among the examples of a task (extra: instructions). None: not looked for.",
    )
    leaks: LeaksConfig | None = Field(
        LeaksConfig(), description="Text of the recipe's evaluations in examples. None: it is not looked for."
    )
    difficulty: int = Field(
        0, ge=0, description="Rows of each task whose expected output is scored by the model, for the report. 0: none."
    )
