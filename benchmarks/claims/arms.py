"""What every claim needs: arms run over seeds in processes of their own, their curves, intervals over seeds, a plot."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.config import Recipe
from posttrain.core.files import read_lines
from posttrain.recipe.parsing import dump_recipe, load_recipe

STUDENT_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Two-sided 95% points of Student's t by degrees of freedom."""


@dataclass(frozen=True)
class Arm:
    """One way of training: a shipped recipe with other settings.

    keep: names of the stages that are kept (empty: all). curve: the stage whose held-out curve is drawn (None: there is
    none, and `task` alone counts), by its metric `measure`. task: an evaluation whose figures are taken after the last
    stage. lab: whose seeds the base models are of.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    curve: str | None = "rl"
    task: str | None = None
    measure: str = "held_out"
    lab: str = "lab:"


@dataclass(frozen=True)
class Claim:
    """Arms that are compared. judge: (curves by arm, one a seed) -> figures and a verdict in words."""

    number: int
    statement: str
    arms: tuple[Arm, ...]
    judge: Callable[[dict[str, list[Curve]]], dict[str, Any]]
    note: str = ""
    axis: str = "held-out accuracy, greedy"


@dataclass(frozen=True)
class Curve:
    """Held-out accuracy of one run: (rollouts sampled so far, accuracy) before the first step to after the last.

    more: the task's figures after the last stage. last_record: the stage's last record with a measurement.
    """

    points: list[tuple[int, float]]
    seconds: float
    more: dict[str, Any] = field(default_factory=dict)
    last_record: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> float:
        return self.points[0][1]

    @property
    def last(self) -> float:
        return self.points[-1][1]

    def rollouts_to(self, accuracy: float) -> float:
        """Rollouts until the curve first reaches an accuracy, on a line between measurements; inf: never."""
        for (x0, y0), (x1, y1) in zip(self.points, self.points[1:], strict=False):
            if y1 >= accuracy:
                return x0 if y0 >= accuracy else x0 + (x1 - x0) * (accuracy - y0) / (y1 - y0)
        return math.inf

    def area(self, until: float | None = None) -> float:
        """Mean held-out accuracy over the completions spent (up to `until`): what was learnt, and how soon."""
        end = self.points[-1][0] if until is None else until
        total = 0.0
        for (x0, y0), (x1, y1) in zip(self.points, self.points[1:], strict=False):
            if x0 < end:
                cut = min(x1, end)
                total += (cut - x0) * (y0 + y0 + (y1 - y0) * (cut - x0) / (x1 - x0)) / 2
        return total / end


def run_arm(arm: Arm, seed: int, work: Path) -> Curve:
    """One run in a process of its own, on one core; a finished or half-finished one in `work` is gone on from.

    Two claims that have an arm in common share its runs.
    """
    recipe = load_recipe(arm.recipe, [f"model.source={arm.lab}{seed}", f"seed={seed}", *arm.overrides])
    stages = [s for s in recipe.stages if not arm.keep or s.name in arm.keep]
    tasks = [t for t in recipe.evaluate if t.name == arm.task]
    changed = {"stages": stages, "evaluate": tasks, "evaluate_stages": False, "name": "claim", "description": ""}
    text = dump_recipe(Recipe.model_validate(recipe.model_copy(update=changed).model_dump()))
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder, file = work / name, work / f"{name}.yaml"
    file.write_text(text)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", "run", str(file), "--folder", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{arm.name}, seed {seed} ({file}) failed:\n{done.stderr[-3000:]}")
    seconds = time.perf_counter() - began
    print(f"  {arm.name}, seed {seed}: {seconds:.0f} s", flush=True)
    return read_curve(folder, arm, seconds)


def read_curve(folder: Path, arm: Arm, seconds: float) -> Curve:
    """What a run left: its held-out curve over the completions it sampled, and its evaluation's headline."""
    points: list[tuple[int, float]] = []
    spent, last = 0, {}
    if arm.curve is not None:
        (found,) = (folder / "stages").glob(f"*-{arm.curve}")
        for record in read_lines(found / "metrics.jsonl"):
            spent += int(record.get("samples", 0))
            if arm.measure in record:
                right = f"{arm.measure}/right"
                points.append((spent, float(record[right if right in record else arm.measure])))
                last = record
    more = {}
    if arm.task is not None:
        more = json.loads((folder / "evaluations" / "after" / f"{arm.task}.json").read_text())
    return Curve(points, round(seconds, 1), more, last)


def run_claim(claim: Claim, seeds: Sequence[int], work: Path, at_once: int) -> dict[str, Any]:
    """All arms of a claim over all seeds, and what its judge says of them."""
    jobs = [(arm, seed) for seed in seeds for arm in claim.arms]
    with ThreadPoolExecutor(at_once) as pool:
        results = list(pool.map(lambda job: run_arm(job[0], job[1], work), jobs))
    curves: dict[str, list[Curve]] = {arm.name: [] for arm in claim.arms}
    for (arm, _), curve in zip(jobs, results, strict=True):
        curves[arm.name].append(curve)
    return {
        "statement": claim.statement,
        "note": claim.note,
        "arms": {
            arm.name: {
                "recipe": arm.recipe,
                "overrides": list(arm.overrides),
                "runs": [
                    {"seed": s, "seconds": c.seconds, "points": c.points, "evaluation": c.more, "last": c.last_record}
                    for s, c in zip(seeds, curves[arm.name], strict=True)
                ],
            }
            for arm in claim.arms
        },
        **claim.judge(curves),
    }


def interval(values: Sequence[float]) -> list[float]:
    """[mean, low, high]: the mean over seeds and its 95% interval by Student's t. One value: no interval (nan)."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return [mean, math.nan, math.nan]
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = STUDENT_95.get(n - 1, 1.96) * spread / math.sqrt(n)
    return [mean, mean - half, mean + half]


def difference(better: Sequence[float], worse: Sequence[float]) -> dict[str, Any]:
    """Paired by seed: the mean difference, its interval, and what that says of «better is more»."""
    each = [b - w for b, w in zip(better, worse, strict=True)]
    mean, low, high = interval(each)
    return {"difference": [mean, low, high], "by_seed": each, "verdict": verdict(low, high, each)}


def fewer(better: Sequence[float], worse: Sequence[float]) -> dict[str, Any]:
    """Paired by seed: how many times as many `worse` needs as `better` (geometric mean), its interval, the verdict."""
    if any(math.isinf(v) for v in (*better, *worse)):
        missing = {"better": sum(map(math.isinf, better)), "worse": sum(map(math.isinf, worse))}
        return {"ratio": None, "never": missing, "verdict": "not all runs reach it"}
    logs = [math.log(w / b) for b, w in zip(better, worse, strict=True)]
    mean, low, high = (math.exp(v) for v in interval(logs))
    return {
        "ratio": [mean, low, high],
        "by_seed": [math.exp(v) for v in logs],
        "verdict": verdict(low - 1, high - 1, logs),
    }


def verdict(low: float, high: float, each: Sequence[float]) -> str:
    """In words: the interval over seeds decides, and where it holds zero, that is what is said."""
    if math.isnan(low):
        return "one seed: no verdict"
    if low > 0:
        return "reproduced"
    if high < 0:
        return "refuted: the opposite holds"
    same = all(v > 0 for v in each) or all(v < 0 for v in each)
    return f"not settled by {len(each)} seeds (the interval holds zero{', all of one sign' if same else ''})"


def plot(result: dict[str, Any], claim: Claim, path: Path) -> None:
    """What was measured over rollouts: a thin line a seed, a thick one for the mean of each arm."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    drawn = {name: arm for name, arm in result["arms"].items() if arm["runs"][0]["points"]}
    for (name, arm), colour in zip(drawn.items(), colours, strict=False):
        lines = [np.array(run["points"], dtype=float) for run in arm["runs"]]
        for line in lines:
            axes.plot(line[:, 0], line[:, 1], color=colour, alpha=0.3, linewidth=1)
        grid = np.linspace(0, max(line[-1, 0] for line in lines), 60)
        mean = np.mean([np.interp(grid, line[:, 0], line[:, 1]) for line in lines], axis=0)
        axes.plot(grid, mean, color=colour, linewidth=2.5, label=name)
    axes.set_xlabel("completions sampled")
    axes.set_ylabel(claim.axis)
    if claim.axis == Claim.axis:
        axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.set_title(claim.statement, fontsize=10, wrap=True)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


__all__ = ["Arm", "Claim", "Curve", "difference", "fewer", "interval", "plot", "run_claim", "verdict"]
