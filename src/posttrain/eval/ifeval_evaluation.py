"""The evaluation of verifiable instructions: its settings. Importing this module loads no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from posttrain.config.settings import SamplerConfig
from posttrain.eval.evaluation_tasks import (
    Chunk,
    EvaluationItems,
    EvaluationRun,
    ProblemsEvaluation,
    ProblemsEvaluationConfig,
)


class IFEvalTask(ProblemsEvaluation):
    """Share of prompts whose verifiable instructions are all followed, and of instructions; strict and loose."""

    class Config(ProblemsEvaluationConfig):
        """An evaluation of verifiable instructions (IFEval; extra lm-eval): shares of prompts and of instructions."""

        measures: ClassVar[Literal["generate"]] = "generate"
        kind: Literal["ifeval"] = "ifeval"
        sampler: SamplerConfig = SamplerConfig(temperature=0.0, max_tokens=1280)

    config: Config

    def chunks(self, run: EvaluationRun) -> Iterable[Chunk]:
        """Answer the prompts, and check the answers."""
        from posttrain.eval.ifeval_items import ifeval_chunks

        return ifeval_chunks(run, self.config)

    def summary(self, items: EvaluationItems, seed: int) -> dict[str, Any]:
        """Return IFEval's four shares."""
        from posttrain.eval.ifeval_items import ifeval_shares

        return {"ifeval": ifeval_shares(items)}
