"""The step of a stage with the lowest held-out loss: its weights, and when no lower one is to be expected."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.config.settings import EarlyStoppingConfig, MeasuredConfig
from posttrain.trainer import checkpoint

HELD_OUT_LOSS = "held_out/loss"
"""Name of the loss among the measured numbers."""
CHOSEN_STEP = "best_step.json"
"""File in a stage's folder with the summary of its best step."""
STATE = {
    "best_step": "step", "best_loss": "loss", "first_loss": "first", "reference_loss": "reference", "waited": "waited",
}  # fmt: skip
log = logging.getLogger("posttrain")


class BestStep:
    """Remember the step with the lowest held-out loss, keep its weights, and decide when to stop.

    The weights are written as soon as they are measured, into a folder of their own next to the checkpoints. The
    number of their step is part of the checkpoint's values; a folder that no checkpoint names is deleted when the next
    one is written. So a run that was killed at any moment finds the weights that its checkpoint names.

    Attributes:
        stopped: True once the stage is to end, because the loss no longer falls.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        steps: int,
        *,
        keep: bool = True,
        stopping: EarlyStoppingConfig | None = None,
    ) -> None:
        """Make a memory of the best step.

        Args:
            model: The model that is trained.
            folder: The stage's folder.
            steps: Number of steps in total.
            keep: Keep the weights of the best step, and restore them after the last.
            stopping: When to stop early. None: never.
        """
        self.model, self.folder, self.steps = model, folder / "checkpoints", steps
        self.keep, self.stopping = keep, stopping
        self.first: float | None = None
        self.step: int | None = None
        self.loss = math.inf
        self.reference = math.inf
        self.waited = 0

    @property
    def stopped(self) -> bool:
        """Return True if training has to end early."""
        return self.stopping is not None and self.waited >= self.stopping.patience

    def note(self, step: int, loss: float) -> None:
        """Take note of the loss after a number of steps; every rank must call, with the same loss.

        The model before the first step counts for stopping, not as the best: what it was is there already.
        """
        margin = self.stopping.min_delta if self.stopping is not None else 0.0
        if loss < self.reference - margin:
            self.reference, self.waited = loss, 0
        elif step:
            self.waited += 1
        if not step:
            self.first = loss
        elif loss < self.loss:
            self.step, self.loss = step, loss
            if self.keep and step != self.steps:  # the last step's weights are in the model at the end
                checkpoint.save_best(self.folder, step, self._weights())

    def restore(self, done: int) -> None:
        """Load the weights of the best step into the model, after the last step; every rank must call."""
        if not self.keep or self.step is None or self.step == done:
            return
        problem = checkpoint.load_best(self.folder, self.step, self._weights())
        if problem is not None:
            log.warning(
                "the weights of step %d, which had the lowest held-out loss, can't be read (%s): the model keeps those "
                "of the last step, %d",
                self.step,
                problem,
                done,
            )
            self.keep = False

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values; `best_step` is the name under which `checkpoint` looks for it."""
        return {name: getattr(self, attribute) for name, attribute in STATE.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, attribute in STATE.items():
            setattr(self, attribute, state[name])

    def summary(self, done: int) -> dict[str, Any]:
        """Return the manifest's entry: the best step, whose weights the model has, and why the stage ended.

        Args:
            done: Number of steps that were taken.
        """
        out: dict[str, Any] = {
            "held_out_loss": {"before": self.first, "best": None if self.step is None else self.loss}
        }
        out |= {"best_step": self.step, "model_step": self.step if self.keep and self.step is not None else done}
        if done < self.steps:
            out["stopped_early"] = {"planned_steps": self.steps, "patience": self.waited}
        return out


def measured_every(config: MeasuredConfig, steps: int) -> int:
    """Return the steps between measurements: the configured number, or a tenth of all steps; 0: no regular ones."""
    return -(-steps // 10) if config.evaluate_every is None else config.evaluate_every
