"""The evaluation of self-refine: its settings. Importing this module loads no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field, model_validator

from posttrain.config.environment import EnvironmentConfig
from posttrain.core.errors import DataError
from posttrain.eval.evaluation_tasks import (
    Chunk,
    EvaluationItems,
    EvaluationRun,
    ProblemsEvaluation,
    SampledAnswersConfig,
)

if TYPE_CHECKING:
    from posttrain.sampling.refine_environment import RefineEnvironment


class RefineEvaluation(ProblemsEvaluation):
    """Accuracy before and after self-refine, and against votes and choices among samples that cost the same tokens."""

    class Config(SampledAnswersConfig):
        """An evaluation of self-refine: accuracy before and after, against votes and best-of-n at equal tokens."""

        kind: Literal["refine"] = "refine"
        environment: EnvironmentConfig = Field(
            description="The loop, `{kind: refine, ...}`: rounds, own feedback, sources (docs/self-refine.md)."
        )
        chain_temperature: float | None = Field(
            None,
            ge=0,
            description="Temperature of the chains of answers and feedback. None: the sampler's, as of the n samples.",
        )

        @model_validator(mode="after")
        def _has_a_loop(self) -> RefineEvaluation.Config:
            if self.environment.kind != "refine":
                raise ValueError(
                    f"environment.kind is {self.environment.kind}: this evaluation needs {{kind: refine, ...}}"
                )
            if self.sampler.min_tokens:
                raise ValueError("sampler.min_tokens would hold in every turn anew: leave it out")
            for name in ("stop", "stop_tokens"):
                if getattr(self.sampler, name):
                    raise ValueError(
                        f"sampler.{name} would end a whole chain at its first turn: environment.stop has strings at "
                        "which a turn ends, and single answers as well"
                    )
            return self

        @property
        def loop(self) -> RefineEnvironment.Config:
            """Return the settings of the loop, whose kind is checked."""
            return cast("RefineEnvironment.Config", self.environment)

    config: Config

    def read(self, tokenizer: Any, context: int | None) -> Any:
        """Read and render the problems, and check that a chain can follow them.

        Args:
            tokenizer: The model's tokenizer.
            context: The model's length in tokens; None: unknown.

        Raises:
            DataError: They can't be read; or requests are turns of a chat, and there is no chat template, or the
                problems are plain text.
        """
        from posttrain.data.prompts import uses_chat_template
        from posttrain.sampling.multi_turn import check

        check(self.config.loop, tokenizer)
        if self.config.loop.answers == "turn" and not uses_chat_template(self.config.problems, tokenizer):
            raise DataError(
                f"evaluation {self.config.name}: environment.answers is turn, and the problems are plain text, not a "
                "turn of the chat template: expected problems through the template (kind lab: chat: true; kind rows: "
                "data.chat: true), or environment.answers: inline"
            )
        return super().read(tokenizer, context)

    def chunks(self, run: EvaluationRun) -> Iterable[Chunk]:
        """Sample a chain and n single answers of each problem, and judge every answer."""
        from posttrain.eval.refine_tasks import refine_chunks

        return refine_chunks(run, self.config)

    def summary(self, items: EvaluationItems, seed: int) -> dict[str, Any]:
        """Return the curves of the samples, and under `refine` what the chains did and cost."""
        from posttrain.eval.refine_tasks import summary_of_refining

        return summary_of_refining(self.config, items, seed)
