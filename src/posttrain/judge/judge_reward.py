"""A judge's score as a reward: direct reinforcement learning from AI feedback, arXiv 2309.00267."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.config.judge import JudgeConfig
from posttrain.config.rewards import Form, RewardTermConfig
from posttrain.core.errors import ServerError
from posttrain.rewards.outcome import LabelError
from posttrain.rewards.reward import Reward, RewardFunctions

DOWN = 60.0
"""Seconds for which a failed server counts as down, so that the batch's other completions do not each wait for it."""
MOST_SPENT = 100_000
"""Completions whose tokens are remembered."""


class JudgeReward(Reward):
    """Return the expected score of each completion, by a judge whose store is open as long as the reward lives.

    Completions that were scored before, in this run or another, are looked up, so that a resumed run gets the same
    rewards. An empty completion gets the lowest score of the scale without a request.
    """

    class Config(RewardTermConfig):
        """The judge's score of the completion, by expectation over its scale: direct RL from AI feedback."""

        form: ClassVar[Form] = "batch"
        kind: Literal["judge"] = "judge"
        judge: JudgeConfig = Field(description="The judge; its mode is score.")
        prompt: str = Field("prompt", description="Column of the example with the prompt.")
        batch_size: int = Field(64, ge=1, description="Completions handed to the judge together.")

        @model_validator(mode="after")
        def _scores(self) -> JudgeReward.Config:
            if self.judge.mode != "score":
                raise ValueError("a judge as reward scores each completion: set judge.mode to score")
            return self

    config: Config

    def open(self, functions: RewardFunctions) -> None:
        """Open the judge's store, and check its settings."""
        from posttrain.judge.labels import Judge  # imports torch

        self.judge = Judge.open(self.config.judge, f"reward {self.config.title}")
        self.failure: tuple[float, ServerError] | None = None
        self.spent: dict[str, int] = {}

    def __call__(self, prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
        """Score the completions.

        Raises:
            LabelError: The judge gave one no verdict. The stack then asks for each alone (from the store), and leaves
                out that one.
            ServerError: The server failed, now or within the last minute.
        """
        if self.failure is not None and time.monotonic() - self.failure[0] < DOWN:
            raise self.failure[1]
        filled = [i for i, t in enumerate(texts) if t.strip()]
        try:
            scores = self.judge.score([prompts[i] for i in filled], [texts[i] for i in filled]) if filled else []
        except ServerError as error:
            self.failure = (time.monotonic(), error)
            raise
        if len(self.spent) > MOST_SPENT:
            self.spent.clear()
        self.spent |= {_key(prompts[i], texts[i]): score.tokens for i, score in zip(filled, scores, strict=True)}
        out = [min(self.config.judge.scale.values())] * len(texts)
        for i, score in zip(filled, scores, strict=True):
            if score.expectation is None:
                raise LabelError(f"the judge gave no score: {score.why}")
            out[i] = score.expectation
        return out

    def tokens_read(self, prompts: Sequence[Any], texts: Sequence[str]) -> list[int]:
        """Return the number of tokens that the judge read and wrote for each completion that it has scored."""
        return [self.spent.get(_key(prompt, text), 0) for prompt, text in zip(prompts, texts, strict=True)]


def _key(prompt: Any, text: str) -> str:
    """Return a short text that stands for a prompt and a completion."""
    return hashlib.sha256(repr((prompt, text)).encode("utf-8", "surrogatepass")).hexdigest()
