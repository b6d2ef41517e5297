"""Carry out a sweep: its runs one after the other, each resumable, and the worst stopped early if that is wanted."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from posttrain.config import METHOD_KIND, TrainConfig
from posttrain.core.console import VisibleConsole
from posttrain.core.errors import CheckpointError, PosttrainError, RecipeError
from posttrain.core.files import read_lines, read_object, write_json
from posttrain.core.secrets import hide_secrets
from posttrain.core.visible_text import visible
from posttrain.recipe.parsing import differences, dump_recipe, load_recipe
from posttrain.recipe.sweep_plan import Combination, SweepPlan
from posttrain.report.charts import COMMON, describe_metric
from posttrain.report.formatting import format_number
from posttrain.report.sweep_results import SweepMeasure, SweepRow, read_combination, results_table, write_page
from posttrain.runs.runner import run
from posttrain.trainer.loop import Stopped, stop_at

SWEEP_STATE = "sweep.json"


@dataclass(frozen=True)
class Halving:
    """Hold the settings of early stopping.

    Attributes:
        metric: Metric by which combinations are compared.
        stage: Stage that logs it.
        lower: Lower is better.
        eta: Each rung keeps one combination in `eta`.
    """

    metric: str
    stage: str
    lower: bool
    eta: int

    def rungs(self, combinations: int) -> list[float]:
        """Return the parts of the stage's steps after which combinations are stopped, ascending.

        With R = floor(log_eta(combinations)) they are eta^-R, ..., eta^-1.
        """
        count = 0
        while self.eta ** (count + 1) <= combinations:
            count += 1
        return [self.eta**-i for i in range(count, 0, -1)]

    def __str__(self) -> str:
        return (
            f"Successive halving on {self.stage}/{self.metric}, {'lower' if self.lower else 'higher'} is better: at "
            f"each rung the best of the combinations that are left continue, one in {self.eta}, rounded up."
        )


def choose_halving(plan: SweepPlan, metric: str, eta: int, goal: str | None) -> Halving:
    """Return the settings of early stopping by a metric of the last stage that trains a model.

    Args:
        plan: The sweep.
        metric: `METRIC`, or `STAGE:METRIC` for one of another stage.
        eta: Each rung keeps one combination in `eta`.
        goal: min or max. None: as the method describes the metric.

    Raises:
        RecipeError: No stage logs it, or neither direction is known to be better.
    """
    recipe = next(iter(plan.combinations[0].runs.values()))
    trained = [stage for stage in recipe.stages if isinstance(stage, TrainConfig)]
    wanted, colon, name = metric.rpartition(":")
    stages = [stage for stage in trained if not colon or stage.name == wanted]
    if not stages:
        there = ", ".join(stage.name for stage in trained) or "none"
        raise RecipeError(f"--halve {metric}: no such stage that trains; there are: {there}")
    own = METHOD_KIND.load(stages[-1].method).metrics
    known = [m for m in (*own, *COMMON) if m.name == name or (m.name.endswith("*") and name.startswith(m.name[:-1]))]
    if not known:
        names = ", ".join(m.name for m in own)
        raise RecipeError(f"--halve {metric}: stage {stages[-1].name} logs no such metric; there are: loss, {names}")
    better = {"min": "lower", "max": "higher"}.get(goal or "", describe_metric(name, known).better)
    if not better:
        raise RecipeError(f"--halve {metric}: say whether lower or higher is better, with --goal min or --goal max")
    return Halving(name, stages[-1].name, better == "lower", eta)


def run_sweep(plan: SweepPlan, halving: Halving | None, console: Console | None = None) -> int:
    """Carry out the runs that are not finished, write results and page; return the number of runs that failed.

    Args:
        plan: The runs.
        halving: Early stopping. None: every run is finished.
        console: Console for messages. None: standard output.

    Raises:
        RecipeError: The command was started in several processes.
        CheckpointError: The folder holds another sweep, or other runs.
        KeyboardInterrupt: The sweep was asked to stop; the same command resumes it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("a sweep runs in one process: start it without torchrun")
    sweep = _Sweep(plan, halving, console or VisibleConsole())
    sweep.claim()
    try:
        sweep.carry_through()
    finally:
        sweep.write_results()
    return len(sweep.failed)


@dataclass
class _Sweep:
    """One sweep in its folder.

    Attributes:
        steps: Step at which each run was stopped at each rung, by NAME and rung as text.
        failed: Message of each run that failed, by NAME.
        stopped: What became of combinations that were stopped, by label.
        told: What each rung decided, in sentences.
    """

    plan: SweepPlan
    halving: Halving | None
    console: Console
    steps: dict[str, dict[str, int]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    def claim(self) -> None:
        """Write each run's recipe into its folder, or make sure that the runs there are those of this sweep."""
        folder, about = self.plan.folder, self.about()
        earlier = read_object(folder / SWEEP_STATE) if (folder / SWEEP_STATE).is_file() else {}
        if earlier and (self.halving or earlier["halving"]) and earlier["plan"] != about["plan"]:
            raise CheckpointError(
                f"{folder} holds another sweep with early stopping, whose decisions depend on its combinations. Give "
                "this one another folder (--folder)"
            )
        for combination in self.plan.combinations:
            for recipe in combination.runs.values():
                stored = folder / "runs" / recipe.name / "recipe.yaml"
                if not stored.exists():
                    continue
                if different := differences(load_recipe(str(stored)), recipe):
                    raise CheckpointError(
                        f"{stored.parent} is of another recipe ({'; '.join(different[:3])}): give this sweep another "
                        "folder (--folder)"
                    )
        self.steps = {name: dict(steps) for name, steps in earlier.get("steps", {}).items()}
        for combination in self.plan.combinations:
            for recipe in combination.runs.values():
                path = folder / "runs" / recipe.name
                path.mkdir(parents=True, exist_ok=True)
                if not (path / "recipe.yaml").exists():
                    (path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        self.note()

    def about(self) -> dict[str, Any]:
        """Return the content of sweep.json."""
        plan = {c.label: {str(seed): r.name for seed, r in c.runs.items()} for c in self.plan.combinations}
        halving = self.halving and {**vars(self.halving), "rungs": self.rungs}
        return {"axes": self.plan.axes, "plan": [plan, halving], "halving": halving, "steps": self.steps,
                "failed": self.failed, "stopped": self.stopped}  # fmt: skip

    def note(self) -> None:
        write_json(self.plan.folder / SWEEP_STATE, self.about())

    @property
    def rungs(self) -> list[float]:
        return self.halving.rungs(len(self.plan.combinations)) if self.halving else []

    def carry_through(self) -> None:
        """Carry all combinations to each rung, stop the worst there, and the others to their end."""
        left = list(self.plan.combinations)
        for part in [*self.rungs, None]:
            for combination in left:
                for seed in combination.runs:
                    self.carry(combination, seed, part)
            if part is not None and self.halving is not None:
                left = self.keep_best(left, part, self.halving)
                self.note()

    def carry(self, combination: Combination, seed: int, part: float | None) -> None:
        """Carry one run to a part of its steps, or to its end."""
        recipe = combination.runs[seed]
        path = self.plan.folder / "runs" / recipe.name
        if recipe.name in self.failed or self.status(path) == "done" or str(part) in self.steps.get(recipe.name, {}):
            return
        until = "" if part is None else f" to {part:.4g} of its steps"
        self.print(f"{combination.label}, seed {seed}{until}")
        quiet = VisibleConsole(quiet=True)
        try:
            if part is None or self.halving is None:
                run(recipe, path, console=quiet)
            else:
                with stop_at(self.halving.stage, part):
                    run(recipe, path, console=quiet)
        except Stopped as stopped:
            if stopped.asked or stopped.step is None:
                self.print("stopped; the same command resumes the sweep")
                raise
            self.steps.setdefault(recipe.name, {})[str(part)] = stopped.step
        except (PosttrainError, torch.OutOfMemoryError) as error:
            self.failed[recipe.name] = hide_secrets(str(error))
            self.print(f"! failed: {self.failed[recipe.name]}")
        finally:
            gc.collect()  # before the next model is loaded
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.note()

    def status(self, path: Path) -> str:
        manifest = path / "manifest.json"
        return str(read_object(manifest).get("status")) if manifest.is_file() else ""

    def keep_best(self, left: Sequence[Combination], part: float, halving: Halving) -> list[Combination]:
        """Return the combinations that continue, in their order, and note the others."""
        scores = {c.label: self.score(c, part, halving) for c in left}
        sign = 1 if halving.lower else -1
        ranked = sorted(left, key=lambda c: math.inf if scores[c.label] is None else sign * (scores[c.label] or 0.0))
        kept = {c.label for c in ranked[: math.ceil(len(left) / halving.eta)]}
        for c in left:
            if c.label not in kept:
                self.stopped[c.label] = f"stopped at {100 * part:.3g}%"
        values = "; ".join(
            f"{c.label}: {'failed' if scores[c.label] is None else format_number(scores[c.label])}"
            f"{'' if c.label in kept else ' (stopped)'}"
            for c in ranked
        )
        line = f"After {100 * part:.3g}% of the steps, {halving.stage}/{halving.metric}: {values}"
        self.told.append(line)
        self.print(line)
        return [c for c in left if c.label in kept]

    def score(self, combination: Combination, part: float, halving: Halving) -> float | None:
        """Return a combination's score at a rung: the mean over its seeds; None if a run of it failed.

        A run's is the mean of the metric's records in the later half of its steps up to the rung.
        """
        values = []
        for recipe in combination.runs.values():
            if recipe.name in self.failed:
                return None
            folders = list((self.plan.folder / "runs" / recipe.name / "stages").glob(f"*-{halving.stage}"))
            records = read_lines(folders[0] / "metrics.jsonl") if folders else []
            last = max((int(r["step"]) for r in records), default=0)
            step = self.steps.get(recipe.name, {}).get(str(part), last)
            found = [float(r[halving.metric]) for r in records if step / 2 < r["step"] <= step and halving.metric in r]
            if not found:
                raise CheckpointError(
                    f"{recipe.name} has no {halving.metric} between steps {step // 2 + 1} and {step}, at which "
                    f"combinations are compared: measure it more often, or halve by another metric (in another "
                    "folder: --folder)"
                )
            values.append(fmean(found))
        return fmean(values)

    def write_results(self) -> None:
        """Print the table, and write the page and results.json."""
        rows: list[SweepRow] = []
        measures: dict[str, SweepMeasure] = {}
        named = f"{self.halving.stage}/{self.halving.metric}" if self.halving else None
        for c in self.plan.combinations:
            paths = [self.plan.folder / "runs" / recipe.name for recipe in c.runs.values()]
            row, found = read_combination(c.label, c.values, self.state_of(c, paths), paths, named)
            rows.append(row)
            measures |= {m.key: m for m in found}
        ordered = sorted(measures.values(), key=lambda m: not m.key.startswith("after/"))
        self.console.print(results_table(rows, ordered, len(self.plan.seeds)))
        about = {"axes": self.plan.axes, "seeds": self.plan.seeds, "halving": self.halving and str(self.halving)}
        name = self.plan.folder.resolve().name
        page = write_page(self.plan.folder, name, {**about, "rungs": self.told}, rows, ordered)
        write_json(
            self.plan.folder / "results.json",
            [
                {"settings": row.values, "state": row.state}
                | {k: {"mean": c.mean, "low": c.low, "high": c.high, "values": c.values} for k, c in row.cells.items()}
                for row in rows
            ],
        )
        self.print(f"sweep   {self.plan.folder}")
        self.print(f"page    {page}")

    def state_of(self, combination: Combination, paths: Sequence[Path]) -> str:
        """Return what became of a combination, in words."""
        failed = [self.failed[path.name] for path in paths if path.name in self.failed]
        if failed:
            return f"failed: {failed[0].splitlines()[0][:120]}"
        if combination.label in self.stopped:
            return self.stopped[combination.label]
        done = sum(self.status(path) == "done" for path in paths)
        return "done" if done == len(paths) else f"{done} of {len(paths)} seeds done"

    def print(self, line: str) -> None:
        self.console.print(visible(line), highlight=False, markup=False, soft_wrap=True)
