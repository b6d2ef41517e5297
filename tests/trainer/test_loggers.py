"""Metrics sent to trackers are the run's own, also after a run has gone on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import DataConfig, ModelConfig, Recipe, TrackConfig
from posttrain.core.errors import MissingExtraError
from posttrain.methods.sft import SFTConfig
from posttrain.trainer.loggers import Trackers

RECIPE = Recipe(
    name="r", model=ModelConfig(source="tiny:llama"), stages=[SFTConfig(data=DataConfig(source="rows.jsonl"))]
)


def steps(first: int, last: int, factor: float = 1.0) -> list[tuple[int, dict[str, float], dict[str, float]]]:
    return [(i, {"step": i, "loss": factor / i}, {"step": i, "seconds": 0.5 * i}) for i in range(first, last + 1)]


def log(config: TrackConfig, folder: Path, records: list[Any]) -> None:
    trackers = Trackers(config, folder, RECIPE)
    on_step = trackers.on_step("sft")
    assert on_step is not None
    for record in records:
        on_step(*record)
    trackers.close()


def test_tensorboard_has_every_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrackConfig(tensorboard=True)
    log(config, tmp_path, steps(1, 7, factor=9.0))  # killed after step 7, its checkpoint was of step 4
    log(config, tmp_path, steps(5, 9))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "sft"), purge_orphaned_data=True).Reload()
    loss = [(e.step, round(e.value, 5)) for e in events.Scalars("loss")]
    assert loss == [(i, round((9.0 if i < 5 else 1.0) / i, 5)) for i in range(1, 10)]
    assert [e.value for e in events.Scalars("seconds")] == [0.5 * i for i in range(1, 10)]


SUMMARIES = (
    {"task": "right", "value": 0.5, "low": 0.25, "high": 0.75, "n": 4, "figures": [{"name": "cut", "value": 0.125}]},
    {"task": "harness", "value": None, "lm_eval": {"results": {"arc": {"acc,none": 0.5, "f1,strict": 0.25}}}},
    {"task": "asked", "value": 1.0, "ifeval": {"prompt_loose": 0.75}},
)
FIGURES = {
    "right": 0.5, "right/low": 0.25, "right/high": 0.75, "right/cut": 0.125, "harness/arc/acc": 0.5,
    "harness/arc/f1,strict": 0.25, "asked": 1.0, "asked/prompt_loose": 0.75,
}  # fmt: skip


def log_evaluations(config: TrackConfig, folder: Path) -> None:
    """Evaluations before and after; those before twice, as a run reports them."""
    for side, changed in (("before", {}), ("after", {"value": 0.75})):
        (folder / side).mkdir(exist_ok=True)
        for summary in SUMMARIES:
            (folder / side / f"{summary['task']}.json").write_text(json.dumps({**summary, **changed}))
        (folder / side / "right.samples.json").write_text("[]")
    trackers = Trackers(config, folder, RECIPE)
    for step, side in ((0, "before"), (0, "before"), (2, "after")):
        trackers.evaluated(step, folder / side)
    trackers.close()


def test_evaluations_reach_tensorboard_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_evaluations(TrackConfig(tensorboard=True), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "evaluations")).Reload()
    found = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert {name: series[0] for name, series in found.items() if series[0][0] == 0} == {
        name: (0, value) for name, value in FIGURES.items()
    }
    assert found["right"] == [(0, 0.5), (2, 0.75)] and found["harness"] == [(2, 0.75)]


def test_evaluations_reach_wandb_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    log_evaluations(TrackConfig(wandb="project"), tmp_path / "run")
    assert not (tmp_path / "wandb").exists()
    (summary,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"evaluations/right/cut" in summary.read_bytes()


def test_nothing_is_on_by_default(tmp_path: Path) -> None:
    assert Trackers(TrackConfig(), tmp_path, RECIPE).on_step("sft") is None
    assert not list(tmp_path.iterdir())


def test_a_missing_tracker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"wandb.*posttrain\[track\]"):
        Trackers(TrackConfig(wandb="project"), tmp_path, RECIPE)


def test_mlflow_resumes_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real store; a run that was killed after step 7, and resumed at step 5."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/m.db")
    monkeypatch.chdir(tmp_path)
    log(TrackConfig(mlflow="reviews"), tmp_path, steps(1, 7, factor=9.0))
    log(TrackConfig(mlflow="reviews"), tmp_path, steps(5, 9))
    log(TrackConfig(mlflow="reviews"), tmp_path / "other", steps(1, 1))
    client = mlflow.MlflowClient()
    number = client.get_experiment_by_name("reviews").experiment_id
    runs = {r.data.tags["posttrain.folder"]: r for r in client.search_runs([number])}
    assert set(runs) == {str(tmp_path), str(tmp_path / "other")}
    run = runs[str(tmp_path)].info
    assert (run.run_name, run.status) == ("r", "FINISHED")
    losses = [(m.step, m.value) for m in client.get_metric_history(run.run_id, "sft/loss")]
    assert sorted(set(losses)) == sorted({*((i, 9 / i) for i in range(1, 8)), *((i, 1 / i) for i in range(5, 10))})
    assert mlflow.artifacts.load_dict(f"runs:/{run.run_id}/recipe.json")["name"] == "r"


def test_mlflow_has_evaluations_in_a_store_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    log_evaluations(TrackConfig(mlflow="reviews"), tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/run/mlflow/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("reviews").experiment_id])
    history = client.get_metric_history(run.info.run_id, "evaluations/right")
    assert [(m.step, m.value) for m in history] == [(0, 0.5), (2, 0.75)]
    assert run.data.metrics["evaluations/harness/arc/acc"] == 0.5
    assert list((tmp_path / "run/mlflow/artifacts").rglob("recipe.json"))
