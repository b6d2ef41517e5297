"""Settings of feedback: where answers come from, and who says which is better."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config.problems import ProblemsConfig
from posttrain.config.settings import Config, DataConfig, SamplerConfig


class Pairing(Config):
    """Settings of making pairs from answers to the same prompt."""

    pairs_per_prompt: int = Field(
        0,
        ge=0,
        description="Pairs of each prompt's answers, drawn so that every answer is used equally often. 0: all pairs.",
    )
    seed: int = Field(0, ge=0, description="Draws the pairs: two stages with the same one label the same pairs.")


class RatingsConfig(Pairing):
    """Answers that several people rated; prompt and completion are columns, or made by data.prompt and .completion."""

    kind: Literal["ratings"] = "ratings"
    data: DataConfig
    ratings: str | None = Field(
        None,
        description="Column with the ratings: a list, numbers separated by commas, {rater: rating}, or one number a row (rows of the same answer are put together).",
    )
    rater: str | None = Field(None, description="Column that names the rater, if a row holds one rating.")
    mean: str | None = Field(None, description="Column with the mean, if the single ratings are missing.")
    spread: str | None = Field(None, description="Column with the ratings' standard deviation, beside mean.")
    min_margin: float = Field(
        0.0, ge=0, description="Pairs whose means differ by less are left out, and counted. 0: only equal ones."
    )

    @model_validator(mode="after")
    def _columns(self) -> RatingsConfig:
        if (self.ratings is None) == (self.mean is None):
            raise ValueError("give either ratings (a column with them) or mean (and spread)")
        if self.spread is not None and self.mean is None:
            raise ValueError("spread goes with mean; from single ratings it is computed")
        if self.rater is not None and self.ratings is None:
            raise ValueError("rater goes with ratings")
        return self


class PairsConfig(Config):
    """Pairs that people chose from: prompt, chosen, rejected, in any of the preference layouts.

    Several rows of one pair are several people's; a column `probability` is taken as it is.
    """

    kind: Literal["pairs"] = "pairs"
    data: DataConfig
    rater: str | None = Field(None, description="Column that names who chose, for the agreement between raters.")


class CandidatesConfig(Pairing):
    """Several answers to a prompt in one row: texts, or objects with response (or text) and a score if there is one."""

    kind: Literal["candidates"] = "candidates"
    data: DataConfig
    completions: str = Field("completions", description="Column with the list of answers.")


class ThumbsConfig(Pairing):
    """Up or down for single answers: prompt, completion, label. Several rows of one answer are several people's."""

    kind: Literal["thumbs"] = "thumbs"
    data: DataConfig
    label: str = Field(
        "label", description="Column with up or down: true, 1, up, good, yes; false, 0, -1, down, bad, no."
    )
    rater: str | None = Field(None, description="Column that names the rater, for the agreement between raters.")


class SamplesConfig(Pairing):
    """Answers sampled from the policy."""

    kind: Literal["samples"] = "samples"
    problems: ProblemsConfig
    n: int = Field(4, ge=2, description="Completions of each prompt.")
    sampler: SamplerConfig = SamplerConfig()
    prompts_at_once: int = Field(32, ge=1, description="Prompts sampled between two writes to the disk.")


AnswersConfig = Annotated[
    RatingsConfig | PairsConfig | CandidatesConfig | ThumbsConfig | SamplesConfig, Field(discriminator="kind")
]
