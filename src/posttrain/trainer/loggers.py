"""Metrics to where a team looks at them, besides the run's own folder: TensorBoard, W&B, trackio."""

from __future__ import annotations

import hashlib
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
            raise MissingExtraError(
                f"track: {error}. Install what is missing with: pip install 'posttrain[track]'"
            ) from error

    def _open(self, config: TrackConfig, folder: Path, recipe: Recipe) -> None:
        if config.tensorboard:
            board = _TensorBoard(folder / "tensorboard")
            self.sinks.append(board)
            self.closers.append(board.close)
        for name, project in (("wandb", config.wandb), ("trackio", config.trackio)):
            if project is None:
                continue
            module = __import__(name)
            # A run that goes on is the same run there: W&B knows it by an id, trackio by its name.
            same = {"id": hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]} if name == "wandb" else {}
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
