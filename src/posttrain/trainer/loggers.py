"""Metrics and evaluations to where a team looks at them: TensorBoard, W&B, trackio, MLflow.

What they write on this machine lies in the run's folder, but for trackio, which has one place for all projects.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.config import Recipe, TrackConfig
from posttrain.core import distributed
from posttrain.core.errors import MissingExtraError
from posttrain.core.files import read_object
from posttrain.trainer.loop import OnStep

Sink = Callable[[str, int, dict[str, float]], None]
"""(stage, step, values)."""
FOLDERS = ("tensorboard", "wandb", "mlflow")
"""What trackers leave in a run's folder: no results, and their own programs may add to them."""
EVALUATIONS_NAME = "evaluations"
"""Stands for a stage's name in the metrics of evaluations."""


class _TensorBoard:
    """Write one event folder a stage; steps that are repeated after a kill replace the earlier ones."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.make, self.folder = SummaryWriter, folder
        self.writers: dict[str, Any] = {}

    def __call__(self, stage: str, step: int, values: dict[str, float]) -> None:
        if stage not in self.writers:
            self.writers[stage] = self.make(str(self.folder / stage), purge_step=step)
        for name, value in values.items():
            self.writers[stage].add_scalar(name, value, step)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class _MLflow:
    """Write the metrics of a run to the store that MLFLOW_TRACKING_URI names, or else to one in the run's folder.

    A run that is resumed is the same run there. Steps that are repeated after a kill come twice in its history.
    """

    def __init__(self, experiment: str, folder: Path, recipe: Recipe) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        own = None if os.environ.get("MLFLOW_TRACKING_URI") else (folder / "mlflow").resolve()
        if own is not None:
            own.mkdir(parents=True, exist_ok=True)
        self.metric, self.client = Metric, MlflowClient(None if own is None else f"sqlite:///{own}/mlflow.db")
        known = self.client.get_experiment_by_name(experiment)
        artifacts = None if own is None else (own / "artifacts").as_uri()
        made = known is None and self.client.create_experiment(experiment, artifacts)
        number = made if known is None else known.experiment_id
        key = _identity(folder)
        earlier = self.client.search_runs([number], f"tags.`posttrain.run` = '{key}'")
        tags = {"posttrain.run": key, "posttrain.folder": str(folder.resolve())}
        run = earlier[0] if earlier else self.client.create_run(number, run_name=recipe.name, tags=tags)
        self.run = run.info.run_id
        self.client.update_run(self.run, status="RUNNING")
        self.client.log_dict(self.run, recipe.model_dump(mode="json"), "recipe.json")

    def __call__(self, stage: str, step: int, values: dict[str, float]) -> None:
        now = int(1000 * time.time())
        names = {re.sub(r"[^\w./: -]", "_", f"{stage}/{name}"): value for name, value in values.items()}
        self.client.log_batch(self.run, [self.metric(name, value, now, step) for name, value in names.items()])

    def close(self) -> None:
        self.client.set_terminated(self.run)


def _identity(folder: Path) -> str:
    """Return a name of a run's folder by which a tracker knows that a resumed run is the same one."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]


def _figures_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of an evaluation's summary by name, TASK for the one that tables compare."""
    task = summary["task"]
    found = {task: summary.get("value"), **{f"{task}/{end}": summary.get(end) for end in ("low", "high")}}
    found |= {f"{task}/{figure['name']}": figure["value"] for figure in summary.get("figures", ())}
    found |= {f"{task}/{name}": value for name, value in summary.get("ifeval", {}).items()}
    for part, metrics in summary.get("lm_eval", {}).get("results", {}).items():
        found |= {f"{task}/{part}/{name.removesuffix(',none')}": value for name, value in metrics.items()}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def _to_logger(tracked: Any, stage: str, step: int, values: dict[str, float]) -> None:
    tracked.log({f"{stage}/{name}": value for name, value in values.items()} | {f"{stage}/step": step})


class Trackers:
    """Open the trackers that a recipe switches on, before training, so that a missing package stops the run early."""

    def __init__(self, config: TrackConfig, folder: Path, recipe: Recipe) -> None:
        self.sinks: list[Sink] = []
        self.closers: list[Callable[[], Any]] = []
        self.reported: set[tuple[int, str]] = set()
        if not distributed.is_main():
            return
        try:
            self._open(config, folder, recipe)
        except ImportError as error:
            extra = "mlflow" if str(error.name).startswith("mlflow") else "track"
            raise MissingExtraError(
                f"track: {error}. Install what is missing with: pip install 'posttrain[{extra}]'"
            ) from error

    def _open(self, config: TrackConfig, folder: Path, recipe: Recipe) -> None:
        if config.tensorboard:
            board = _TensorBoard(folder / "tensorboard")
            self.sinks.append(board)
            self.closers.append(board.close)
        if config.mlflow is not None:
            logger = _MLflow(config.mlflow, folder, recipe)
            self.sinks.append(logger)
            self.closers.append(logger.close)
        for name, project in (("wandb", config.wandb), ("trackio", config.trackio)):
            if project is None:
                continue
            module = __import__(name)
            # A run that goes on is the same run there: W&B knows it by an id, trackio by its name.
            same = {"id": _identity(folder), "dir": str(folder)} if name == "wandb" else {}
            settings = recipe.model_dump(mode="json")
            tracked = module.init(project=project, name=recipe.name, config=settings, resume="allow", **same)
            self.sinks.append(partial(_to_logger, tracked))
            self.closers.append(tracked.finish)

    def on_step(self, stage: str) -> OnStep | None:
        """Return what the loop calls after each step; None if nothing is switched on."""
        if not self.sinks:
            return None

        def report(step: int, metrics: dict[str, float], timing: dict[str, float]) -> None:
            values = {k: float(v) for k, v in {**timing, **metrics}.items() if k != "step"}
            for sink in self.sinks:
                sink(stage, step, values)

        return report

    def evaluated(self, step: int, folder: Path) -> None:
        """Report the evaluations in a folder: each one's number with its interval, and its further figures.

        Args:
            step: Number of models that stages had made by then; 0: before the first.
            folder: Folder with a summary TASK.json of each.
        """
        values: dict[str, float] = {}
        for path in sorted(folder.glob("*.json")) if self.sinks else ():
            summary = read_object(path, object)
            if isinstance(summary, dict) and "task" in summary:
                values |= _figures_of(summary)
        new = {name: value for name, value in values.items() if (step, name) not in self.reported}
        self.reported |= {(step, name) for name in new}
        for sink in self.sinks if new else ():
            sink(EVALUATIONS_NAME, step, new)

    def close(self) -> None:
        """Flush and close what was opened."""
        for close in self.closers:
            close()
