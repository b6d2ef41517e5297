"""Steps and batches by number, and the choice of the best step."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from posttrain.config.settings import EarlyStoppingConfig, MeasuredConfig
from posttrain.core.types import Sample
from posttrain.trainer.best_step import BestStep, measured_every
from posttrain.trainer.loop import permutation_batches, steps_for

ROWS = [Sample([i, i], [0.0, 1.0]) for i in range(10)]


def drawn(steps: int, **settings: float) -> list[list[int]]:
    batch_at, total = permutation_batches(ROWS, 4, settings.get("epochs", 1), 3, settings.get("max_steps"))  # type: ignore[arg-type]
    assert total == steps
    return [[s.tokens[0] for s in batch_at(step)] for step in range(total)]


def test_epochs_decide_the_steps() -> None:
    assert steps_for(10, 4, 1) == (3, 10) and steps_for(10, 4, 2.5) == (7, 25) and steps_for(10, 4, 0.01) == (1, 1)
    batches = drawn(5, epochs=2)
    flat = [i for batch in batches for i in batch]
    assert [len(b) for b in batches] == [4] * 5 and sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert [len(b) for b in drawn(3)] == [4, 4, 2]


@pytest.mark.parametrize("epochs", [1, 50])
def test_max_steps_is_the_number_of_steps_whatever_epochs_is(epochs: float) -> None:
    """More than the epochs need: the rows repeat, each epoch in another order. Fewer: the first batches."""
    assert steps_for(10, 4, epochs, 7) == (7, 28)
    batches = drawn(7, epochs=epochs, max_steps=7)
    assert [len(b) for b in batches] == [4] * 7
    assert Counter(i for b in batches for i in b).most_common()[-1][1] >= 2
    assert batches[:2] == drawn(2, epochs=epochs, max_steps=2) == drawn(3)[:2]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)


def course(best: BestStep, losses: list[float], every: int = 1) -> int:
    """Note the losses, the first before training; the weights are the step's number. Return the steps taken."""
    for i, loss in enumerate(losses):
        with torch.no_grad():
            best.model.w.fill_(float(i * every))  # type: ignore[operator]
        best.note(i * every, loss)
        if best.stopped:
            return i * every
    return (len(losses) - 1) * every


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "taken", "step"),
    [
        ([5, 4, 3, 2], 2, 0.0, 3, 3),
        ([5, 4, 3, 3.5, 3.2, 2], 2, 0.0, 4, 2),
        ([5, 4, 3, 3.5, 2.9, 3, 3, 3], 3, 0.0, 7, 4),  # a lower one starts the count again
        ([5, 4, 3.95, 3.9, 3.85, 1], 3, 0.2, 4, 4),  # lower, but by too little: the best all the same
        ([5, 4, 3.9, 3.8, 3.7, 3.6], 3, 0.15, 5, 5),  # little by little, and 3.8 is lower than 4 by enough
        ([2, 3, 3, 3, 1], 3, 0.0, 3, 1),  # the model before training counts for stopping, not as the best
        ([5, 4, 4, 4, 4], 3, 0.0, 4, 1),  # equal is not lower, and the earlier step is the best
        ([5, math.nan, 4, math.nan, math.nan, 3], 2, 0.0, 4, 2),
        ([5, 6, 7, 8, 4], None, 0.0, 4, 4),
    ],
)
def test_when_it_stops_and_which_step_is_the_best(
    losses: list[float], patience: int | None, min_delta: float, taken: int, step: int, tmp_path: Path
) -> None:
    stopping = None if patience is None else EarlyStoppingConfig(patience=patience, min_delta=min_delta)
    best = BestStep(Net(), tmp_path, len(losses) - 1, stopping=stopping)
    assert course(best, losses) == taken
    assert (best.step, best.loss, best.first) == (step, losses[step], losses[0])
    best.restore(taken)
    assert best.model.w.tolist() == [step, step]  # type: ignore[union-attr]
    summary = best.summary(taken)
    assert (summary["best_step"], summary["model_step"]) == (step, step)
    assert summary["held_out_loss"] == {"before": losses[0], "best": losses[step]}
    assert ("stopped_early" in summary) == (taken < len(losses) - 1)


def test_without_keep_best_the_last_weights_stay(tmp_path: Path) -> None:
    best = BestStep(Net(), tmp_path, 3, keep=False)
    course(best, [5, 4, 3, 6])
    best.restore(3)
    assert best.model.w.tolist() == [3, 3] and not (tmp_path / "checkpoints").exists()  # type: ignore[union-attr]
    assert (best.summary(3)["best_step"], best.summary(3)["model_step"]) == (2, 3)


def test_its_state_goes_through_a_checkpoint_and_damaged_weights_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopping = EarlyStoppingConfig(patience=3)
    one = BestStep(Net(), tmp_path, 9, stopping=stopping)
    course(one, [5, 4, 3, 6])
    other = BestStep(Net(), tmp_path, 9, stopping=stopping)
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict() and other.waited == 1
    other.restore(4)
    assert other.model.w.tolist() == [2, 2]  # type: ignore[union-attr]
    next((tmp_path / "checkpoints" / "best-000002").glob("*.distcp")).unlink()
    one.restore(3)
    assert one.model.w.tolist() == [3, 3] and one.summary(3)["model_step"] == 3  # type: ignore[union-attr]
    assert "the weights of step 2, which had the lowest held-out loss, can't be read" in caplog.text


def test_how_often_rows_are_measured() -> None:
    def every(steps: int, **settings: int) -> int:
        return measured_every(MeasuredConfig.model_validate({"method": "sft", "held_out": 0.1, **settings}), steps)

    assert [every(n) for n in (1, 9, 10, 11, 100, 105)] == [1, 1, 1, 2, 10, 11]
    assert every(100, evaluate_every=7) == 7 and every(100, evaluate_every=0) == 0
