"""A run: a folder that knows what was asked, what has been done, and how to go on.

    recipe.yaml    the resolved recipe           stages/<i>-<name>/   method, metrics, timings, checkpoints, model
    manifest.json  versions, data, lineage       evaluations/         before, after, comparison.json
    report.html    the page of the run           model/               the final model

Every part is finished by a rename, and skipped when it is found finished; what was killed in the middle goes on from
its newest checkpoint. The same recipe ends in the same weights and metrics however often it was killed (on a CPU).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import posttrain
from posttrain.config import ModelConfig, Recipe, RLConfig, SampleConfig, ScoreConfig, StageConfig, references
from posttrain.core import distributed
from posttrain.core.errors import CheckpointError, PosttrainError
from posttrain.core.files import file_hash, is_full, read_lines, write_json, write_text
from posttrain.core.statistics import compare, summarize
from posttrain.data.rows import SHOWN_ROWS
from posttrain.eval.tasks import evaluate_model, task_data
from posttrain.methods.preference.online import OnlineDPOConfig
from posttrain.models.loading import context_length, load_tokenizer, pick_device, resolve
from posttrain.recipe.parsing import differences, dump_recipe, load_recipe
from posttrain.report import build_report, judge_figures
from posttrain.report.terminal import sampling_tables, summary_table
from posttrain.runs import registry
from posttrain.runs.machine import machine, program_name
from posttrain.sampling.rollout_store import path_of, read_rollouts, rollout_steps
from posttrain.trainer.loggers import Trackers
from posttrain.trainer.loop import Stopped, now
from posttrain.trainer.stage import Stage, StageContext


@dataclass(frozen=True)
class RunResult:
    """Where a finished run left things, and what it measured."""

    folder: Path
    model: Path
    report: Path
    comparison: list[dict[str, Any]]


class Manifest:
    """manifest.json, rewritten whole at every change; rank 0 alone writes."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "manifest.json"
        self.values: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def update(self, **values: Any) -> None:
        self.values.update(values)
        if distributed.is_main():
            write_json(self.path, self.values)


def run(
    recipe: Recipe | str,
    folder: Path | str | None = None,
    fresh: bool = False,
    console: Console | None = None,
    rewards: dict[str, Callable[..., Any]] | None = None,
) -> RunResult:
    """Carry a recipe through to its report, or go on with the run that is in `folder` (default: output/name).

    recipe: a Recipe, the name of a shipped one, or the path of a YAML file. fresh: set an earlier run in the folder
    aside (under another name) and start over. Raises CheckpointError when the folder holds a run of another recipe
    or another process works on it, and whatever the recipe's data or model are wrong about, before training starts.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    console = console or Console(quiet=not distributed.is_main())
    distributed.start(pick_device(recipe.model.device))
    path = Path(folder) if folder is not None else Path(recipe.output) / recipe.name
    try:
        return _carry_through(recipe, path, fresh, console, rewards)
    except Exception as error:
        if isinstance(error, PosttrainError) or not is_full(error):
            raise
        raise CheckpointError(
            f"the disk is full, and {path} could not be written ({error}). What is finished there is intact: free some "
            "space and run the same command again to go on"
        ) from error


def _carry_through(
    recipe: Recipe, path: Path, fresh: bool, console: Console, rewards: dict[str, Callable[..., Any]] | None
) -> RunResult:
    """The folder opened and locked, what is not done yet done, and how it ended written down."""
    if distributed.is_main():
        _open(path, recipe, fresh)
    distributed.barrier()
    with _locked(path) if distributed.is_main() else _nothing():
        manifest = Manifest(path)
        try:
            if manifest.values.get("status") != "done":
                _work(recipe, path, manifest, console, rewards)
        except KeyboardInterrupt:
            _ended(manifest, path, status="stopped")
            console.print(f"stopped; go on with: {program_name()} run {path}", highlight=False, soft_wrap=True)
            raise
        except Exception as error:
            _ended(manifest, path, status="failed", error=str(error) or type(error).__name__)
            raise
        return _close(path, console)


def _ended(manifest: Manifest, path: Path, **values: Any) -> None:
    """How it ended, in manifest and report; what stopped the run is told first, also where the disk is full."""
    with suppress(OSError):
        manifest.update(**values)
        _report(path)


def _open(path: Path, recipe: Recipe, fresh: bool) -> None:
    """Make the folder, or make sure that what is in it is a run of this recipe."""
    stored = path / "recipe.yaml"
    if fresh and path.exists():
        n = next(n for n in range(1, 10_000) if not path.with_name(f"{path.name}.{n}").exists())
        path.rename(path.with_name(f"{path.name}.{n}"))
    if stored.exists():
        different = differences(load_recipe(str(stored)), recipe)
        if different:
            raise CheckpointError(
                f"{path} holds a run of another recipe ({'; '.join(different[:5])}). Go on with that one by "
                f"`posttrain run {path}`, name this one otherwise (name=...), or set the old one aside with --fresh"
            )
        return
    path.mkdir(parents=True, exist_ok=True)
    write_text(stored, dump_recipe(recipe))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time in a run's folder; the lock goes with the process, however it ends."""
    with (path / ".lock").open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"another process is working on {path}; wait for it, or stop it first") from error
        yield


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _work(
    recipe: Recipe,
    path: Path,
    manifest: Manifest,
    console: Console,
    functions: dict[str, Callable[..., Any]] | None = None,
) -> None:
    resumed = manifest.values.get("resumed", -1) + 1
    manifest.update(
        posttrain=posttrain.__version__,
        created=manifest.values.get("created", now()),
        status="running",
        error=None,
        seed=recipe.seed,
        machine=machine(),
        model=_describe(recipe.model, manifest.values.get("model", {})),
        resumed=resumed,
    )
    if resumed:
        console.print(f"going on with {path}")
    tokenizer = load_tokenizer(recipe.model)
    context = context_length(recipe.model)
    console.print("reading data")
    setting = StageContext(tokenizer, context, functions or {})
    order = recipe.in_order()
    # What asks for an earlier stage's result can only be read when that is there.
    early = {name: registry.prepare(stage, setting) for name, stage in order if not references(stage)}
    tasks = [
        {"stage": f"evaluate {task.name}", **task_data(task, tokenizer, context).stats}
        for task in recipe.evaluate
        if not references(task.problems if isinstance(task, SampleConfig | ScoreConfig) else task)
    ]
    manifest.update(data=_noted([entry for prepared in early.values() for entry in prepared.entries] + tasks, path))
    trackers = Trackers(recipe.track, path, recipe)

    model = recipe.model
    # An evaluation that ranks by what a stage makes has to wait for it, also with the model before that.
    tasks_now = [task for task in recipe.evaluate if not references(task)]
    if tasks_now and distributed.is_main():
        evaluate_model(model, tasks_now, path / "evaluations" / "before", recipe.seed, functions)
    distributed.barrier()
    made: dict[str, Path] = {}
    models = [(name, stage) for name, stage in order if stage.makes == "model"]
    for i, (name, stage) in enumerate(order):
        folder = path / "stages" / name
        result = folder / stage.makes
        if not result.is_dir():
            _carry_out(stage, early.get(name), setting, made, recipe, model, folder, i, manifest, trackers)
            for warning in judge_figures.judge_warnings(folder):  # before anything is trained by such labels
                console.print(f"! {name}: {warning}", highlight=False, markup=False, soft_wrap=True)
        made[stage.name] = result
        if stage.makes == "model":
            model = model.model_copy(update={"source": str(result), "revision": None})
            if recipe.evaluate_stages and tasks_now and name != models[-1][0]:
                if distributed.is_main():
                    evaluate_model(model, tasks_now, path / "evaluations" / name, recipe.seed, functions)
                distributed.barrier()
    trackers.close()
    if distributed.is_main():
        _finish(recipe, path, model, made, manifest, functions)
    distributed.barrier()


def _carry_out(
    stage: StageConfig,
    prepared: Stage | None,
    setting: StageContext,
    made: dict[str, Path],
    recipe: Recipe,
    model: ModelConfig,
    folder: Path,
    number: int,
    manifest: Manifest,
    trackers: Trackers,
) -> None:
    """One stage, from getting ready (where that had to wait) to its line in the manifest."""
    stage = registry.resolved(stage, made)
    if prepared is None:
        prepared = registry.prepare(stage, setting)
        known = [e["stage"] for e in prepared.entries]
        manifest.update(
            data=[e for e in manifest.values["data"] if e["stage"] not in known]
            + _noted(prepared.entries, folder.parents[1])
        )
    name = folder.name.split("-", 1)[1]
    records = manifest.values.get("stages", [])[:number]
    about = {"name": name, "method": stage.method, "makes": stage.makes}
    manifest.update(stages=[*records, {**about, "status": "running"}])
    if stage.start is not None:
        source = recipe.model.source if stage.start == "base" else stage.start
        model = model.model_copy(update={"source": source, "revision": None})
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "method.json", prepared.about())
    done = prepared.run(model, folder, recipe.seed + number, trackers.on_step(name))
    entry = {**about, "status": "done", "from": model.source, "to": str(folder / stage.makes)}
    if stage.makes == "model":
        sizes = {k: done.pop(k) for k in ("parameters", "trainable")}
        manifest.update(model={**manifest.values["model"], **sizes})
    manifest.update(stages=[*records, {**entry, **done}])


def _noted(entries: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """What the manifest says of data: the first bad rows; where there are more, all of them go into a file."""
    out = []
    for entry in entries:
        bad = entry.get("bad_rows") or []
        if len(bad) > SHOWN_ROWS:
            name = f"bad_rows/{entry['stage'].replace(' ', '-')}.jsonl"
            if distributed.is_main():
                (path / "bad_rows").mkdir(exist_ok=True)
                write_text(path / name, "".join(json.dumps(b, ensure_ascii=False) + "\n" for b in bad))
            entry = {**entry, "bad_rows": bad[:SHOWN_ROWS], "bad_rows_file": name}
        out.append(entry)
    return out


def _describe(model: ModelConfig, before: dict[str, Any]) -> dict[str, Any]:
    found = resolve(model.source)
    return {**before, "source": model.source, "sha256": found.sha256(), "dtype": model.dtype, "device": model.device}


def _finish(
    recipe: Recipe,
    path: Path,
    model: ModelConfig,
    made: dict[str, Path],
    manifest: Manifest,
    functions: dict[str, Callable[..., Any]] | None,
) -> None:
    """Final model in place, evaluated, compared, hashed."""
    evaluations = [registry.resolved(task, made) for task in recipe.evaluate]
    if evaluations:
        evaluate_model(recipe.model, evaluations, path / "evaluations" / "before", recipe.seed, functions)
    if made and model.source != recipe.model.source:
        last, final, work = Path(model.source), path / "model", path / ".model.writing"
        if not final.is_dir():
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(last, work, copy_function=_link)
            work.rename(final)
        if evaluations:
            config = recipe.model.model_copy(update={"source": str(final)})
            evaluate_model(config, evaluations, path / "evaluations" / "after", recipe.seed, functions)
    tasks = [(task.name, str(task.kind)) for task in evaluations if (path / "evaluations" / "after").is_dir()]
    tasks += [(name, "generate") for name in _held_out(recipe, path)]
    if tasks:
        comparison = []
        for name, kind in tasks:
            before, after = (read_lines(path / "evaluations" / w / f"{name}.jsonl") for w in ("before", "after"))
            comparison.append({"task": name, **compare(before, after, kind)})
        write_json(path / "evaluations" / "comparison.json", comparison)
    skip = ("checkpoints", "report.html", "manifest.json", ".lock", "tensorboard")
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and not any(s in p.parts or p.name == s for s in skip)]
    manifest.update(artifacts={str(p.relative_to(path)): file_hash(p) for p in files}, status="done", finished=now())


def _held_out(recipe: Recipe, path: Path) -> list[str]:
    """Held-out answers before and after each stage of reinforcement learning, as evaluations; their names.

    Judged by the first reward that is 0 or 1, or partial credit, and says right or wrong; where there is none, the
    curve of rewards has to do.
    """
    names = []
    for folder_name, stage in recipe.in_order():
        folder = path / "stages" / folder_name / "held_out"
        steps = rollout_steps(folder)
        if not isinstance(stage, RLConfig | OnlineDPOConfig) or len(steps) < 2:
            continue
        sides = [[r for r in read_rollouts(path_of(folder, s)) if not r["failures"]] for s in (steps[0], steps[-1])]
        both = {r["problem"] for r in sides[0]} & {r["problem"] for r in sides[1]}
        for config in stage.rewards.terms if both else []:
            part, credit = config.title, getattr(config, "partial", 0.0)  # given for a wrong answer of the right kind
            if config.is_correctness and {r["parts"].get(part) for side in sides for r in side} <= {0.0, credit, 1.0}:
                name = f"{folder_name.split('-', 1)[1]}-{part}"
                names.append(name)
                for where, side in zip(("before", "after"), sides, strict=True):
                    _write_held_out(path / "evaluations" / where, name, part, [r for r in side if r["problem"] in both])
                break
    return names


def _write_held_out(folder: Path, name: str, part: str, rows: list[dict[str, Any]]) -> None:
    items = [
        {
            "id": r["problem"],
            "prompt": r["prompt"],
            "expected": r["answer"],
            "output": r["completion"],
            "correct": r["parts"][part] == 1.0,
        }
        for r in rows
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.jsonl", "".join(json.dumps(i, ensure_ascii=False) + "\n" for i in items))
    write_json(
        folder / f"{name}.json", {"task": name, "kind": "generate", **summarize(items, "generate"), "seconds": 0}
    )


def _link(source: str, target: str) -> None:
    """The last stage's files once more under model/, without a second copy on disk where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _report(path: Path) -> Path:
    return build_report(path) if distributed.is_main() else path / "report.html"


def _close(path: Path, console: Console) -> RunResult:
    """The page, the table, and what to do next."""
    report = _report(path)
    file = path / "evaluations" / "comparison.json"
    comparison = json.loads(file.read_text()) if file.exists() else []
    if (path / "evaluations").is_dir():
        console.print(summary_table(path))
        newest = path / "evaluations" / ("after" if (path / "evaluations" / "after").is_dir() else "before")
        for table in sampling_tables(newest):
            console.print(table)
    for line in judge_figures.feedback_lines(path):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"run     {path}\nreport  {report}", highlight=False, soft_wrap=True)
    if (path / "model").is_dir():
        console.print(f"chat    {program_name()} chat {path}", highlight=False, soft_wrap=True)
    return RunResult(path, path / "model", report, comparison)


__all__ = ["RunResult", "Stopped", "run"]
