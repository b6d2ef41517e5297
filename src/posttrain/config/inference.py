"""Settings of what is done with completions of a question: measured as votes and choices, scored, or kept as data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.problems import ProblemsConfig
from posttrain.config.rewards import Extract, RewardConfig, read_reward
from posttrain.config.settings import NAME, Config, SamplerConfig


class SampleConfig(Config):
    """An evaluation of many completions a question: accuracy by pass@k, votes and choices, against tokens spent."""

    kind: Literal["sample"] = "sample"
    name: str = Field(pattern=NAME, description="Name in tables and files.")
    problems: ProblemsConfig
    n: int = Field(16, ge=1, le=512, description="Completions of each question; the likeliest one is made besides.")
    k: list[int] = Field(
        default_factory=list, description="Numbers of completions that the curves have points at. Empty: 1, 2, 4 … n."
    )
    sampler: SamplerConfig = SamplerConfig()
    judge: RewardConfig = Field(
        default_factory=lambda: read_reward({"kind": "numeric"}),
        description="Says what is right; its weight is not used.",
    )
    right_at: float = Field(1.0, description="The judge's number from which a completion is right.")
    vote: Extract | Literal["program"] | None = Field(
        "auto",
        description="Where the answer that is voted for stands (program: what the completion's program prints, in the sandbox); equal numbers, or else equal texts, are one. None: no votes (functions to be written, say).",
    )
    rank_by: list[RewardConfig] = Field(
        default_factory=list,
        description="Scores that completions are chosen by: each gives a best-of-k and (where there are votes) a weighted vote. Their weights are not used.",
    )
    weights: Literal["score", "sigmoid"] = Field(
        "score",
        description="What a weighted vote sums: scores, or their sigmoid (a reward model's, which may be negative).",
    )
    headline: Literal["mean", "greedy", "vote", "best"] = Field(
        "mean",
        description="What tables compare: mean accuracy of a sample, the likeliest answer, the vote of all n, or the best of n by the first of rank_by.",
    )
    show: int = Field(8, ge=0, description="Questions whose likeliest answers are shown in the report. 0: none.")

    @model_validator(mode="after")
    def _fits(self) -> SampleConfig:
        bad = [k for k in self.k if not 1 <= k <= self.n]
        if bad:
            raise ValueError(f"k holds {bad[0]}, and a question has {self.n} completions (n): expected 1 to {self.n}")
        if self.sampler.temperature == 0 and self.n > 1:
            raise ValueError("sampler.temperature is 0: all n completions would be the same. Raise it, or set n to 1")
        if self.headline == "vote" and self.vote is None:
            raise ValueError("headline is vote, and there is none: say where the answer stands (vote: auto)")
        if self.headline == "best" and not self.rank_by:
            raise ValueError("headline is best, and nothing ranks: give rank_by a list of rewards")
        names = [r.title for r in self.rank_by]
        if len(set(names)) != len(names) or "judge" in names:
            raise ValueError(f"rank_by needs different names, none of them judge, and has {names}: set `name` of each")
        comparing = [r.title for r in (self.judge, *self.rank_by) if r.compares_completions]
        if comparing:
            raise ValueError(f"{comparing[0]} compares all n completions, not subsets of k: `vote` measures agreement")
        return self

    @property
    def sizes(self) -> list[int]:
        """The k of the curves, ascending, 1 and n among them."""
        powers = [2**i for i in range(self.n.bit_length())]
        return sorted({1, *(self.k or powers), self.n})


class ScoreConfig(Config):
    """An evaluation by a scorer, a judge or a reward model: mean score of sampled answers, and how often the trained
    model's answer to a prompt scores above the first model's."""

    kind: Literal["score"] = "score"
    name: str = Field(pattern=NAME, description="Name in tables and files.")
    problems: ProblemsConfig
    scorer: RewardConfig = Field(description="Scores every answer; its weight is not used.")
    n: int = Field(1, ge=1, le=64, description="Answers sampled to each prompt.")
    sampler: SamplerConfig = SamplerConfig()
    show: int = Field(8, ge=0, description="Prompts whose first answers are shown in the report. 0: none.")

    @model_validator(mode="after")
    def _fits(self) -> ScoreConfig:
        if self.sampler.temperature == 0 and self.n > 1:
            raise ValueError("sampler.temperature is 0: all n answers would be the same. Raise it, or set n to 1")
        if self.scorer.compares_completions:
            raise ValueError(f"{self.scorer.title} compares the answers of a prompt: a score is of one answer")
        return self
