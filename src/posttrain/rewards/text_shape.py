"""Rewards of the shape of a completion: its layout, its length, and whether it ended.

Sources: format, arXiv 2501.12948 section 2.2.2; length, DAPO, arXiv 2503.14476 eq. 13; a fixed low reward for an answer
without an end, arXiv 1909.08593 section 3.1, 2403.17031 section 7.
"""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.config.rewards import RewardTermConfig
from posttrain.rewards.outcome import ExampleRow, LabelError
from posttrain.rewards.reward import Reward, RewardFunctions


class Format(Reward):
    """Return 1 if the completion has the requested layout, else 0."""

    class Config(RewardTermConfig):
        """1 if the completion has the requested layout, else 0."""

        kind: Literal["format"] = "format"
        tags: list[str] = Field(
            default_factory=list,
            description="<tag>…</tag> each once, in this order, none empty, nothing but spaces around them.",
        )
        prompt_ends_with_tag: bool = Field(
            False, description="The prompt ends with the first opening tag; the completion lacks it."
        )
        pattern: str | None = Field(
            None, description="Regular expression that the whole text must match (a dot matches line ends too)."
        )

        @property
        def in_worker(self) -> bool:
            """Return True for a pattern, which may take forever."""
            return self.pattern is not None

        @model_validator(mode="after")
        def _either(self) -> Format.Config:
            if bool(self.tags) == (self.pattern is not None):
                raise ValueError("format takes either tags (a list of names) or pattern (a regular expression)")
            if self.pattern is not None:
                if self.prompt_ends_with_tag:
                    raise ValueError("prompt_ends_with_tag belongs to tags, not to pattern")
                try:
                    re.compile(self.pattern)
                except re.error as error:
                    raise ValueError(f"format.pattern is no regular expression: {error}") from error
            bad = [t for t in self.tags if not re.fullmatch(r"[A-Za-z][\w-]*", t)]
            if bad or len(set(self.tags)) != len(self.tags):
                raise ValueError(f"format.tags: expected different names such as think and answer, got {self.tags}")
            return self

    config: Config

    def open(self, functions: RewardFunctions) -> None:
        """Compile the pattern."""
        self.pattern = None if self.config.pattern is None else re.compile(self.config.pattern, re.DOTALL)

    def __call__(self, text: str, example: ExampleRow) -> float:
        """Check the pattern, or that every tag opens and closes once, in order, with text inside and none outside."""
        if self.pattern is not None:
            return float(self.pattern.fullmatch(text) is not None)
        marks = [m for tag in self.config.tags for m in (f"<{tag}>", f"</{tag}>")]
        text = marks[0] + text if self.config.prompt_ends_with_tag else text
        if any(text.count(mark) != 1 for mark in marks):
            return 0.0
        starts = [text.index(mark) for mark in marks]
        ends = [a + len(mark) for a, mark in zip(starts, marks, strict=True)]
        between = [text[e:a] for e, a in zip(ends[1:-1:2], starts[2::2], strict=True)]
        outside = [text[: starts[0]], *between, text[ends[-1] :]]
        inside = [text[e:a] for e, a in zip(ends[::2], starts[1::2], strict=True)]
        ordered = starts == sorted(starts)
        return float(ordered and not any(o.strip() for o in outside) and all(i.strip() for i in inside))


class Length(Reward):
    """Return 0 for a length L that suits, down to -1.

    max and cache (DAPO): 0 for L <= max - cache; (max - cache - L) / cache up to max; -1 beyond. min and cache, the
    mirror image: 0 for L >= min + cache; (L - min - cache) / cache; -1 for L < min. target and width:
    -min(1, |L - target| / width). An empty completion has L = 0 (1 token if its end was sampled).
    """

    class Config(RewardTermConfig):
        """0 if the length suits, falling linearly to -1."""

        is_correctness: ClassVar[bool] = False  # 0 is its best
        kind: Literal["length"] = "length"
        unit: Literal["tokens", "characters"] = Field("tokens", description="What is counted; tokens include the end.")
        max: int | None = Field(None, ge=1, description="From here on (longer than this) the reward is -1.")
        min: int | None = Field(None, ge=1, description="Below this the reward is -1.")
        cache: int = Field(0, ge=0, description="Units before max (after min) over which the penalty grows. 0: a step.")
        target: int | None = Field(None, ge=0, description="The best length, instead of limits.")
        width: int = Field(0, ge=0, description="Distance from target at which the reward is -1.")

        @model_validator(mode="after")
        def _limits(self) -> Length.Config:
            limits = self.max is not None or self.min is not None
            if limits == (self.target is not None):
                raise ValueError("length takes either target and width, or max and/or min (with cache)")
            if (self.target is not None) != (self.width > 0):
                raise ValueError("length: target and width go together (width: where the reward has fallen to -1)")
            if self.target is not None and self.cache:
                raise ValueError("length: cache belongs to max and min; target has width")
            low = 0 if self.min is None else self.min + self.cache
            if self.max is not None and self.max - self.cache < low:
                raise ValueError(
                    f"length: no length is free of penalty: it grows from max - cache = {self.max - self.cache} up "
                    f"and from {low} down"
                )
            return self

    config: Config

    def __call__(self, text: str, example: ExampleRow) -> float:
        """Compute the penalty. Raises LabelError if tokens are counted and the example has no count."""
        config = self.config
        if config.unit == "tokens" and "completion_tokens" not in example:
            raise LabelError("length in tokens needs completion_tokens in the example, which a RewardStack puts there")
        size = int(example["completion_tokens"]) if config.unit == "tokens" else len(text)
        if config.target is not None:
            return -min(1.0, abs(size - config.target) / config.width)
        over = 0 if config.max is None else size - (config.max - config.cache)
        under = 0 if config.min is None else config.min + config.cache - size
        excess = max(over, under, 0)
        return -min(1.0, excess / config.cache if config.cache else float(excess > 0))


class TruncationPenalty(Reward):
    """Return 0 if the completion ended (end token, stop string, finished environment), -1 if a limit cut it off.

    Models that judge a text don't see that it is unfinished: a policy trained on them alone learns to never end.
    """

    class Config(RewardTermConfig):
        """0 if the completion is complete, -1 if a limit cut it off."""

        is_correctness: ClassVar[bool] = False  # 0 is its best
        kind: Literal["truncation_penalty"] = "truncation_penalty"

    def __call__(self, text: str, example: ExampleRow) -> float:
        """Look at why the completion ended. Raises LabelError if the example does not say."""
        if "finish" not in example:
            raise LabelError("truncation_penalty needs finish in the example, which a RewardStack puts there")
        return 0.0 if example["finish"] in ("end", "stop") else -1.0
