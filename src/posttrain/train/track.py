"""Metrics to where a team looks at them, besides the run's own folder: TensorBoard, W&B, trackio."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.config import Recipe, TrackConfig
from posttrain.distributed import ranks
from posttrain.errors import MissingExtraError
from posttrain.train.loop import OnStep

Sink = Callable[[int, dict[str, float]], None]


def _to_tensorboard(writer: Any, step: int, values: dict[str, float]) -> None:
    for name, value in values.items():
        writer.add_scalar(name, value, step)


def _to_logger(tracked: Any, step: int, values: dict[str, float]) -> None:
    tracked.log(values, step=step)


class Trackers:
    """The trackers that a recipe switches on, opened before training so that a missing package stops the run early."""

    def __init__(self, config: TrackConfig, folder: Path, recipe: Recipe) -> None:
        self.sinks: list[Sink] = []
        self.closers: list[Callable[[], Any]] = []
        if not ranks.is_main():
            return
        try:
            self._open(config, folder, recipe)
        except ImportError as error:
            raise MissingExtraError(
                f"track: {error}. Install what is missing with: pip install 'posttrain[track]'"
            ) from error

    def _open(self, config: TrackConfig, folder: Path, recipe: Recipe) -> None:
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"))
            self.sinks.append(partial(_to_tensorboard, writer))
            self.closers.append(writer.close)
        for name, project in (("wandb", config.wandb), ("trackio", config.trackio)):
            if project is None:
                continue
            module = __import__(name)
            tracked = module.init(project=project, name=recipe.name, config=recipe.model_dump(mode="json"))
            self.sinks.append(partial(_to_logger, tracked))
            self.closers.append(tracked.finish)

    def on_step(self, stage: str) -> OnStep | None:
        """What the loop calls after each step; None when nothing is switched on."""
        if not self.sinks:
            return None

        def report(step: int, metrics: dict[str, float], timing: dict[str, float]) -> None:
            values = {f"{stage}/{k}": float(v) for k, v in {**timing, **metrics}.items() if k != "step"}
            for sink in self.sinks:
                sink(step, values)

        return report

    def close(self) -> None:
        """Flush and close what was opened."""
        for close in self.closers:
            close()
