"""Metrics to where a team looks at them, besides the run's own folder: TensorBoard, W&B, trackio, MLflow."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.config import Recipe, TrackConfig
from posttrain.core import distributed
from posttrain.core.errors import MissingExtraError
from posttrain.trainer.loop import OnStep

Sink = Callable[[str, int, dict[str, float]], None]
"""(stage, step, values)."""


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
    """Write the metrics of a run to the store that MLFLOW_TRACKING_URI names, or else MLflow's own default.

    A run that is resumed is the same run there. Steps that are repeated after a kill come twice in its history.
    """

    def __init__(self, experiment: str, folder: Path, recipe: Recipe) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self.metric, self.client = Metric, MlflowClient()
        known = self.client.get_experiment_by_name(experiment)
        number = self.client.create_experiment(experiment) if known is None else known.experiment_id
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


def _to_logger(tracked: Any, stage: str, step: int, values: dict[str, float]) -> None:
    tracked.log({f"{stage}/{name}": value for name, value in values.items()} | {f"{stage}/step": step})


class Trackers:
    """Open the trackers that a recipe switches on, before training, so that a missing package stops the run early."""

    def __init__(self, config: TrackConfig, folder: Path, recipe: Recipe) -> None:
        self.sinks: list[Sink] = []
        self.closers: list[Callable[[], Any]] = []
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
            same = {"id": _identity(folder)} if name == "wandb" else {}
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

    def close(self) -> None:
        """Flush and close what was opened."""
        for close in self.closers:
            close()
