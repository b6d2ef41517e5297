"""The evaluation of size and speed: its settings. Importing this module loads no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from pydantic import Field

from posttrain.config.evaluation import EvaluationBase
from posttrain.config.settings import NAME
from posttrain.eval.evaluation_tasks import Chunk, EvaluationItems, EvaluationRun, EvaluationTask


class SpeedTask(EvaluationTask):
    """Size of the weights, memory, and tokens a second of reading prompts and of writing answers, by the sampler."""

    class Config(EvaluationBase):
        """An evaluation of size and speed: bytes of the weights, peak memory, tokens/s of prefill and of decoding."""

        measures: ClassVar[Literal["speed"]] = "speed"
        compares_items: ClassVar[bool] = False
        kind: Literal["speed"] = "speed"
        name: str = Field("speed", pattern=NAME, description="Name in tables and files.")
        prompt_tokens: int = Field(256, ge=1, description="Tokens of each prompt; they are random.")
        answer_tokens: int = Field(48, ge=1, description="Tokens that are decoded behind each prompt.")
        batch: int = Field(8, ge=1, description="Sequences that are decoded together for the figure of a batch.")
        kv_cache: Literal["int8"] | None = Field(
            None, description="int8: measure decoding also with keys and values in int8, as sampler.kv_cache does."
        )
        repeats: int = Field(5, ge=1, le=100, description="Measurements; tables have their median, lowest and highest.")
        memory: bool = Field(
            True,
            description="Measure peak memory too, in a separate process that opens the model and answers a prompt.",
        )

    config: Config

    def read(self, tokenizer: Any, context: int | None) -> None:
        """Read nothing: the prompts are random tokens."""

    def chunks(self, run: EvaluationRun) -> Iterable[Chunk]:
        """Take one measurement in each chunk."""
        from posttrain.eval.speed import speed_chunks

        return speed_chunks(run, self.config)

    def summary(self, items: EvaluationItems, seed: int) -> dict[str, Any]:
        """Return the median, lowest and highest of each rate, and the sizes that the first item has."""
        from posttrain.eval.speed import summary_of_speed

        return summary_of_speed(items)

    def examples(self, run: EvaluationRun, items: EvaluationItems) -> EvaluationItems:
        """Return none: random prompts have no answers to read."""
        return []
