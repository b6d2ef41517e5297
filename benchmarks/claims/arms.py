"""What every claim needs: arms run over seeds in processes of their own, their curves, intervals over seeds, a plot."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from lean_run import finished, lean_run

import posttrain
from posttrain.config import Recipe
from posttrain.core.files import read_lines, write_json
from posttrain.recipe.parsing import dump_recipe, load_recipe
from posttrain.runs.machine import machine

STUDENT_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Two-sided 95% points of Student's t by degrees of freedom."""


LOCKS: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
"""One for each lean run, by name."""


@dataclass(frozen=True)
class Arm:
    """One way of training: a shipped recipe with other settings.

    keep: names of the stages that are kept (empty: all). curve: the stage whose held-out curve is drawn (None: there is
    none, and `task` alone counts), by its metric `measure`. task: an evaluation whose figures are taken after the last
    stage; also: others, whose figures are under their names. lab: whose seeds the base models are of; model: one that
    is the same for all seeds, instead. seeded: settings that depend on the seed, such as the rows. lean: evaluate the
    last model alone, and keep no weights. uses: lean arms whose last models this one's settings name, as run:NAME; they
    are run first, with the same seed, and keep those models (`kept`).
    """

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    curve: str | None = "rl"
    task: str | None = None
    measure: str = "held_out"
    lab: str = "lab:"
    model: str | None = None
    seeded: Callable[[int], tuple[str, ...]] = lambda seed: ()
    lean: bool = False
    also: tuple[str, ...] = ()
    uses: tuple[Arm, ...] = ()
    kept: bool = False


@dataclass(frozen=True)
class Sweep:
    """Candidates of one arm: (a shorter run that is measured on other rows, the arm if that is the best of them).

    The best has the highest `value`, the mean over its tasks, on the first seed.
    """

    candidates: tuple[tuple[Arm, Arm], ...]


@dataclass(frozen=True)
class Claim:
    """Arms that are compared. judge: (curves by arm, one a seed) -> figures and a verdict in words.

    axis, over: what `plot` draws, over what. draw: draws the result in place of `plot`.
    """

    number: int
    statement: str
    arms: tuple[Arm | Sweep, ...]
    judge: Callable[[dict[str, list[Curve]]], dict[str, Any]]
    note: str = ""
    axis: str = "held-out accuracy, greedy"
    over: str = "completions sampled"
    draw: Callable[[dict[str, Any], Claim, Path], None] | None = None


@dataclass(frozen=True)
class Curve:
    """Held-out accuracy of one run: (rollouts sampled so far, accuracy) before the first step to after the last.

    Of stages that sample nothing the first number is the step. more: the task's figures after the last stage.
    last_record: the stage's last record with a measurement. stages: their entries in the manifest. folder: of the run.
    """

    points: list[tuple[int, float]]
    seconds: float
    more: dict[str, Any] = field(default_factory=dict)
    last_record: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    folder: Path = Path()

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

    Two claims that have an arm in common share its runs. Lean arms take turns in a few processes, which start once.
    """
    source = arm.model or f"{arm.lab}{seed}"
    settings = [f"model.source={source}", f"seed={seed}", *arm.overrides, *arm.seeded(seed)]
    for used in arm.uses:
        last_model = str((run_arm(used, seed, work).folder / "model").resolve())
        settings = [setting.replace(f"run:{used.name}", last_model) for setting in settings]
    recipe = load_recipe(arm.recipe, settings)
    stages = [s for s in recipe.stages if not arm.keep or s.name in arm.keep]
    tasks = [t for t in recipe.evaluate if t.name in (arm.task, *arm.also)]
    changed = {"stages": stages, "evaluate": tasks, "evaluate_stages": False, "name": "claim", "description": ""}
    text = dump_recipe(Recipe.model_validate(recipe.model_copy(update=changed).model_dump()))
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder, file = work / name, work / f"{name}.yaml"
    file.write_text(text)
    began = time.perf_counter()
    failure = ""
    if arm.lean:
        try:
            with LOCKS[name]:  # arms that use its model ask for it at the same time
                if not finished(folder, [task.name for task in tasks], arm.kept):
                    lean_pool().submit(lean_run, str(file), folder, arm.kept).result()
        except Exception as error:  # whatever a run ends with is told with its arm
            failure = f"{type(error).__name__}: {error}"
    else:
        done = subprocess.run(
            [sys.executable, "-m", "posttrain", "run", str(file), "--folder", str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        failure = done.stderr[-3000:] if done.returncode else ""
    if failure:
        raise SystemExit(f"{arm.name}, seed {seed} ({file}) failed:\n{failure}")
    seconds = time.perf_counter() - began
    if seconds > 1:  # else it was finished
        print(f"  {arm.name}, seed {seed}: {seconds:.0f} s", flush=True)
    return read_curve(folder, arm, seconds)


@cache
def lean_pool() -> ProcessPoolExecutor:
    """Return the processes of lean runs: as many as there are cores, with one thread, renewed often."""
    os.environ["OMP_NUM_THREADS"] = "1"
    return ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), max_tasks_per_child=3)


def read_curve(folder: Path, arm: Arm, seconds: float) -> Curve:
    """What a run left: its held-out curve over the completions it sampled, and its evaluation's headline."""
    points: list[tuple[int, float]] = []
    spent, last = 0, {}
    if arm.curve is not None:
        (found,) = (folder / "stages").glob(f"*-{arm.curve}")
        for record in read_lines(found / "metrics.jsonl"):
            spent = spent + int(record["samples"]) if "samples" in record else int(record.get("step", 0))
            if arm.measure in record:
                right = f"{arm.measure}/right"
                points.append((spent, float(record[right if right in record else arm.measure])))
                last = record
    more = {}
    if arm.task is not None:
        # a recipe without stages measures the model as it is, which is before
        after = next(path for path in (folder / "evaluations" / n for n in ("after", "before")) if path.exists())
        more, *others = [json.loads((after / f"{name}.json").read_text()) for name in (arm.task, *arm.also)]
        more |= dict(zip(arm.also, others, strict=True))
    sizes = ("parameters", "trainable", "tokens", "tokens_per_second", "seconds", "peak_memory_mb")
    keys = ("name", *sizes, "made", "retention")
    manifest = folder / "manifest.json"
    stages = json.loads(manifest.read_text()).get("stages", []) if manifest.exists() else []
    noted = [{k: stage[k] for k in keys if k in stage} for stage in stages]
    return Curve(points, round(seconds, 1), more, last, noted, folder)


def run_claim(claim: Claim, seeds: Sequence[int], work: Path, at_once: int) -> dict[str, Any]:
    """All arms of a claim over all seeds, and what its judge says of them."""
    with ThreadPoolExecutor(at_once) as pool:
        # by name: several arms may have a trial in common, which is to be run once
        trials = {t.name: t for sweep in claim.arms if isinstance(sweep, Sweep) for t, _ in sweep.candidates}
        lean_pool()  # made here: threads that ask for it at the same time would each make one
        tried = dict(zip(trials, pool.map(lambda arm: run_arm(arm, seeds[0], work), trials.values()), strict=True))
        arms = [arm if isinstance(arm, Arm) else best_of(arm, tried) for arm in claim.arms]
        jobs = [(arm, seed) for seed in seeds for arm in arms]
        results = list(pool.map(lambda job: run_arm(job[0], job[1], work), jobs))
    curves: dict[str, list[Curve]] = {arm.name: [] for arm in arms}
    for (arm, _), curve in zip(jobs, results, strict=True):
        curves[arm.name].append(curve)
    return {
        "statement": claim.statement,
        "note": claim.note,
        "arms": {
            arm.name: {
                "recipe": Path(arm.recipe).name,
                "overrides": list(arm.overrides),
                "runs": [
                    {
                        "seed": s,
                        "seconds": c.seconds,
                        "points": thinned(c.points),
                        "evaluation": c.more,
                        "last": c.last_record,
                        "stages": c.stages,
                    }
                    for s, c in zip(seeds, curves[arm.name], strict=True)
                ],
            }
            for arm in arms
        },
        "sweeps": {name: mean_value(trials[name], curve) for name, curve in tried.items()},
        **claim.judge(curves),
    }


def thinned(points: Sequence[tuple[float, float]], count: int = 30) -> list[tuple[float, float]]:
    """Return about `count` points of a curve, evenly taken, the last among them."""
    return list(points[:: -max(1, len(points) // count)])[::-1]


def best_of(sweep: Sweep, tried: Mapping[str, Curve]) -> Arm:
    """Return the arm whose trial has the highest value; of several the first."""
    return max(sweep.candidates, key=lambda pair: mean_value(pair[0], tried[pair[0].name]))[1]


def mean_value(arm: Arm, curve: Curve) -> float:
    """Return the mean of an arm's tasks."""
    return math.fsum(of["value"] for of in (curve.more, *(curve.more[name] for name in arm.also))) / (1 + len(arm.also))


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


@contextmanager
def chart(claim: Claim, path: Path) -> Iterator[Any]:
    """Give the axes of a claim's chart, and write it to `path` afterwards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    yield axes
    axes.grid(alpha=0.25)
    if axes.get_legend() is None:
        axes.legend(frameon=False)
    axes.set_title(claim.statement, fontsize=10, wrap=True)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def plot(result: dict[str, Any], claim: Claim, path: Path) -> None:
    """What was measured over rollouts or steps: a thin line a seed, a thick one for the mean of each arm."""
    import numpy as np
    from matplotlib import colormaps

    drawn = {name: arm for name, arm in result["arms"].items() if arm["runs"][0]["points"]}
    with chart(claim, path) as axes:
        for (name, arm), colour in zip(drawn.items(), colormaps["tab10"].colors, strict=False):  # type: ignore[attr-defined]
            lines = [np.array(run["points"], dtype=float) for run in arm["runs"]]
            for line in lines:
                axes.plot(line[:, 0], line[:, 1], color=colour, alpha=0.3, linewidth=1)
            grid = np.linspace(min(line[0, 0] for line in lines), max(line[-1, 0] for line in lines), 60)
            mean = np.mean([np.interp(grid, line[:, 0], line[:, 1]) for line in lines], axis=0)
            axes.plot(grid, mean, color=colour, linewidth=2.5, label=name)
        axes.set_xlabel(claim.over)
        axes.set_ylabel(claim.axis)
        if claim.axis == Claim.axis:
            axes.set_ylim(0, 1.02)


def argument(name: str, default: str) -> str:
    """Return the value of an option that the claims themselves depend on, and take it off the command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(name, default=default)
    given, sys.argv[1:] = parser.parse_known_args()
    return str(getattr(given, name.lstrip("-")))


def losses(curves: Sequence[Curve]) -> list[float]:
    """Return nats per token, for each seed, of runs whose last evaluation is a perplexity."""
    return [math.log(float(c.more["value"])) for c in curves]


def draw_losses(result: dict[str, Any], claim: Claim, path: Path) -> None:
    """Draw nats per token: a point a seed, and a bar of the mean, for each arm."""
    with chart(claim, path) as axes:
        for place, (name, of) in enumerate(result["arms"].items()):
            values = [math.log(float(run["evaluation"]["value"])) for run in of["runs"]]
            axes.plot(values, [place] * len(values), "o", markersize=4, alpha=0.5, label=name)
            axes.plot([sum(values) / len(values)], [place], "k|", markersize=14)
        axes.set_yticks([])
        axes.set_xlabel("nats per token of rows that nothing was fitted to")


def main(claims: Mapping[int, Claim], description: str) -> None:
    """Run the claims that the command line asks for, and print their verdicts."""
    numbers = ",".join(map(str, claims))
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--claims", default=numbers, help=f"comma between ({numbers})")
    parser.add_argument("--seeds", default="0,1,2", help="comma between (0,1,2)")
    parser.add_argument("--at-once", type=int, default=2, help="runs at the same time, a core each (2)")
    parser.add_argument("--work", type=Path, default=Path("runs/claims"), help="folder of the runs (runs/claims)")
    parser.add_argument("--plots", type=Path, help="folder for claim-N.svg")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    seeds, asked = ([int(n) for n in text.split(",")] for text in (args.seeds, args.claims))
    args.work.mkdir(parents=True, exist_ok=True)
    began, out = time.perf_counter(), {}
    for number in asked:
        claim = claims[number]
        print(f"{number}. {claim.statement}", flush=True)
        out[str(number)] = result = run_claim(claim, seeds, args.work, args.at_once)
        print(f"   {result['verdict']}", flush=True)
        if args.plots:
            (claim.draw or plot)(result, claim, args.plots / f"claim-{number}.svg")
        if args.json:
            figures = {"posttrain": posttrain.__version__, "machine": machine(), "seeds": seeds, "claims": out}
            write_json(args.json, {**figures, "seconds": round(time.perf_counter() - began)})
    print(" ".join(f"claim_{n}={r['verdict']}" for n, r in out.items()))
