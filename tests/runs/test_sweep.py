"""Sweeps: every combination checked first, run folders that resume, the worst stopped, results over seeds."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from rich.console import Console

from posttrain.core.errors import CheckpointError, NonFiniteError, RecipeError
from posttrain.core.files import file_hash, read_lines
from posttrain.core.statistics import t_interval
from posttrain.recipe.sweep_plan import SweepPlan, plan_sweep
from posttrain.runs import run_sweep as sweep
from posttrain.runs.runner import run

LR = "stages.sft.optimizer.lr=[1e-6,3e-3]"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sweep")
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": str(2 * i)} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"{{source: {folder}/rows.jsonl}}"
    (folder / "small.yaml").write_text(
        f"name: small\nmodel: {{source: 'tiny:llama', device: cpu}}\noutput: {folder}/runs\n"
        f"stages: [{{data: {data}, max_steps: 4, batch_size: 4}}]\n"
        f"evaluate: [{{name: text, kind: perplexity, data: {data}}}]\n"
    )
    return str(folder / "small.yaml")


def plan(recipe: str, *settings: str, seeds: Any = None, draws: int | None = None) -> SweepPlan:
    return plan_sweep(recipe, settings, seeds, draws, None)


def test_a_sweep_is_interrupted_resumed_and_stops_the_worst(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = plan(recipe, LR, "stages.0.batch_size=2", seeds=[0, 1])
    assert [c.label for c in wanted.combinations] == ["lr=1e-06", "lr=0.003"]
    halving = sweep.choose_halving(wanted, "loss", 2, None)
    assert halving.lower and halving.rungs(2) == [0.5] and halving.rungs(9) == [0.125, 0.25, 0.5]
    out = io.StringIO()
    calls = []

    def stopping(*args: Any, **settings: Any) -> Any:
        calls.append(args[1].name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(*args, **settings)

    monkeypatch.setattr(sweep, "run", stopping)
    with pytest.raises(KeyboardInterrupt):
        sweep.run_sweep(wanted, halving, Console(file=out, width=200))
    assert sweep.run_sweep(wanted, halving, Console(file=out, width=200)) == 0
    assert calls == [
        "lr-1e-06_seed-0", "lr-1e-06_seed-1", "lr-0.003_seed-0",  # where it was interrupted
        "lr-0.003_seed-0", "lr-0.003_seed-1", "lr-0.003_seed-0", "lr-0.003_seed-1",
    ]  # fmt: skip
    folder = wanted.folder
    losses = {
        name: [r["loss"] for r in read_lines(folder / "runs" / name / "stages" / "0-sft" / "metrics.jsonl")]
        for name in dict.fromkeys(calls)
    }
    assert [len(values) for values in losses.values()] == [2, 2, 4, 4]
    results = json.loads((folder / "results.json").read_text())
    assert [r["state"] for r in results] == ["stopped at 50%", "done"]
    final = [losses[f"lr-0.003_seed-{seed}"][-1] for seed in (0, 1)]  # a tenth of four steps is one
    half = 12.7062 * stdev(final) / math.sqrt(2)
    cell = results[1]["sft/loss"]
    assert cell["values"] == final and cell["mean"] == pytest.approx(fmean(final))
    assert [cell["low"], cell["high"]] == pytest.approx([fmean(final) - half, fmean(final) + half], rel=1e-5)
    assert len(results[1]["after/text"]["values"]) == 2 and "after/text" not in results[0]
    decision = fmean([losses[f"lr-1e-06_seed-{seed}"][1] for seed in (0, 1)])  # the later half of two steps
    assert f"lr=1e-06: {decision:.4g} (stopped)" in out.getvalue()
    page = (folder / "sweep.html").read_text()
    assert "Student" in page and "src=" not in page and 'data-chart="sft.loss"' in page
    whole = run(wanted.combinations[1].runs[1], folder / "whole", console=Console(quiet=True))
    kept = folder / "runs" / "lr-0.003_seed-1" / "model" / "model.safetensors"
    assert file_hash(whole.model / "model.safetensors") == file_hash(kept)

    before = len(calls)
    assert sweep.run_sweep(wanted, halving, Console(quiet=True)) == 0 and len(calls) == before
    more = plan(recipe, "stages.sft.optimizer.lr=[1e-6,1e-4,3e-3]", "stages.0.batch_size=2", seeds=[0, 1])
    with pytest.raises(CheckpointError, match="whose decisions depend on its combinations"):
        sweep.run_sweep(more, halving)
    other = plan(recipe, LR, seeds=[0, 1])
    with pytest.raises(CheckpointError, match="another sweep|another recipe"):
        sweep.run_sweep(other, None)


def test_every_combination_is_checked_before_one_starts(recipe: str) -> None:
    with pytest.raises(
        RecipeError, match=r"(?s)2 of 4 combinations can't run.*lr=0.001, batch_size=0: .*expected at least 1"
    ):
        plan(recipe, "stages.sft.optimizer.lr=[1e-3,1e-4]", "stages.sft.batch_size=[0,4]")
    wrong = {
        "nothing to sweep over": ["stages.sft.batch_size=4"],
        "a sweep does not vary seed; use --seeds": ["seed=[0,1]"],
        "which only a random search": ["stages.sft.optimizer.lr=log(1e-5,1e-3)"],
        "both above 0": ["stages.sft.optimizer.lr=log(0,1e-3)"],
        "is given twice": [LR, LR],
    }
    for message, settings in wrong.items():
        with pytest.raises(RecipeError, match=message):
            plan(recipe, *settings)
    with pytest.raises(RecipeError, match="logs no such metric"):
        sweep.choose_halving(plan(recipe, LR), "reward", 2, None)
    with pytest.raises(RecipeError, match="the grid has 2 combinations in all"):
        plan(recipe, LR, draws=3)
    assert not (Path(recipe).parent / "runs" / "small-sweep" / "runs" / "batch_size-0_seed-0").exists()


def test_a_run_that_fails_stops_no_other_one(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def failing(one: Any, *_: Any, **__: Any) -> None:
        asked.append(one.seed)
        raise NonFiniteError("the loss is not finite")

    monkeypatch.setattr(sweep, "run", failing)
    wanted = plan_sweep(recipe, [LR], [0, 1], None, tmp_path)
    for halving in (None, sweep.choose_halving(wanted, "loss", 2, None)):
        asked.clear()
        shutil.rmtree(tmp_path)
        assert sweep.run_sweep(wanted, halving, Console(quiet=True)) == len(asked) == 4
        states = [r["state"] for r in json.loads((tmp_path / "results.json").read_text())]
        assert states == ["failed: the loss is not finite"] * 2


def test_lists_ranges_and_names(recipe: str) -> None:
    betas = plan(recipe, "stages.sft.optimizer.betas=[[0.9,0.99],[0.9,0.999]]", "stages.sft.batch_size=2")
    assert [c.runs[0].stages[0].optimizer.betas for c in betas.combinations] == [(0.9, 0.99), (0.9, 0.999)]
    assert len({r.name for c in betas.combinations for r in c.runs.values()}) == 2
    with pytest.raises(RecipeError, match="nothing to sweep over"):  # one value of a setting that is a list
        plan(recipe, "stages.sft.optimizer.betas=[0.9,0.99]")
    both = ["stages.sft.optimizer.lr=log(1e-5,1e-3)", "stages.sft.batch_size=[1,2,4]"]
    few, more = (plan(recipe, *both, draws=n, seeds=[3]) for n in (3, 6))
    assert [c.label for c in more.combinations][:3] == [c.label for c in few.combinations]
    assert len({c.label for c in more.combinations}) == 6 and more.combinations[0].runs[3].seed == 3
    assert all(1e-5 < c.runs[3].stages[0].optimizer.lr < 1e-3 for c in more.combinations)
    rates = plan(recipe, "stages.sft.optimizer.lr=[1e-3,1e-4]", "stages.sft.optimizer.min_lr=[0,1e-5]")
    assert rates.axes == {"lr": "stages.sft.optimizer.lr", "min_lr": "stages.sft.optimizer.min_lr"}


@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (6, 2.571), (31, 2.042)])
def test_students_interval_has_the_quantiles_of_the_tables(n: int, t: float) -> None:
    values = [float(i) for i in range(n)]
    low, high = t_interval(values) or (0.0, 0.0)
    error = stdev(values) / math.sqrt(n)
    assert (high - fmean(values)) / error == pytest.approx(t, abs=6e-4) == (fmean(values) - low) / error
    assert t_interval([1.0]) is None and t_interval([2.0, 2.0]) == (2.0, 2.0)
