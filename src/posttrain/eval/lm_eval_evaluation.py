"""The evaluation by lm-eval's tasks: its settings. Importing this module loads neither torch nor lm-eval."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.config.evaluation import EvaluationBase
from posttrain.eval.evaluation_tasks import Chunk, EvaluationItems, EvaluationRun, EvaluationTask


class LmEvalTask(EvaluationTask):
    """A task of lm-eval (extra: lm-eval), computed by the engine: its own metrics, and one number of each document."""

    class Config(EvaluationBase):
        """An evaluation by a task of lm-eval (extra: lm-eval): its own metrics, and one number of each document."""

        measures: ClassVar[Literal["score"]] = "score"
        kind: Literal["lm_eval"] = "lm_eval"
        task: str = Field(description="Name of a task, group or tag of lm-eval, or path of a task's YAML file.")
        tasks_folder: str | None = Field(
            None, description="Folder of tasks of yours, whose YAML files lm-eval finds by name. None: none."
        )
        metric: str | None = Field(
            None,
            description="Metric that tables compare, by document. None: the first one of which more is better.",
        )
        filter: str | None = Field(
            None, description="lm-eval's filter of the answers that the metric is computed of. None: the task's first."
        )
        shots: int | None = Field(None, ge=0, description="Demonstrations before each document. None: the task's own.")
        chat: bool = Field(
            False, description="Ask through the chat template, with demonstrations as turns; false: plain text."
        )
        system: str | None = Field(None, description="System message put first, or text before plain prompts.")
        limit: int | None = Field(None, ge=1, description="Documents of each task, the first ones. None: all.")

        @model_validator(mode="after")
        def _chooses_nothing(self) -> LmEvalTask.Config:
            if self.validation:
                raise ValueError("validation divides rows, and the documents of lm-eval's tasks are lm-eval's own")
            return self

    config: Config

    def read(self, tokenizer: Any, context: int | None) -> Any:
        """Load the task with its documents."""
        from posttrain.eval.lm_eval_tasks import load_task

        return load_task(self.config, tokenizer)

    def chunks(self, run: EvaluationRun) -> Iterable[Chunk]:
        """Run the task as one chunk: lm-eval computes its metrics of all documents together."""
        from posttrain.eval.lm_eval_tasks import task_chunks

        return task_chunks(run, self.config)

    def summary(self, items: EvaluationItems, seed: int) -> dict[str, Any]:
        """Return lm-eval's own results, which the first item has."""
        return {"lm_eval": items[0]["lm_eval"]}
