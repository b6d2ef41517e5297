"""Carry a recipe through its stages in the folder of a run.

Every part is finished by a rename, and skipped if it is finished; a part that was killed resumes from its newest
checkpoint. The same recipe ends in the same weights and metrics however often it was killed (on a CPU).
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

import posttrain
from posttrain.config import EvaluationConfig, ModelConfig, Recipe, StageConfig, references
from posttrain.core import distributed
from posttrain.core.console import VisibleConsole
from posttrain.core.errors import CheckpointError, DataError, PosttrainError
from posttrain.core.files import (
    changed_artifacts,
    file_hash,
    is_full,
    link_or_copy,
    read_lines,
    read_object,
    write_json,
    write_text,
)
from posttrain.core.imports import import_folders
from posttrain.core.item_statistics import compare
from posttrain.core.secrets import hide_secrets
from posttrain.core.visible_text import visible
from posttrain.data.bad_rows import SHOWN_ROWS
from posttrain.data.template_source import fixed_date, template_date
from posttrain.eval.tasks import evaluate_model, task_data
from posttrain.models.loading import context_length, load_tokenizer, pick_device, resolve
from posttrain.models.quantization import as_saved
from posttrain.recipe.machine_checks import check_machine
from posttrain.recipe.parsing import load_recipe
from posttrain.report import build_report, judge_figures
from posttrain.report.behaviour import behaviours
from posttrain.report.curves import curve_figure, curve_table, results_html
from posttrain.report.load import read
from posttrain.report.measured_stages import held_out_lines
from posttrain.report.merge_search_view import search_lines
from posttrain.report.retention_view import retention_lines
from posttrain.report.terminal import answer_tables, evaluation_tables, figure_table, stage_tables, summary_table
from posttrain.runs import registry
from posttrain.runs.held_out_tasks import write_held_out_tasks
from posttrain.runs.machine import machine, program_name
from posttrain.runs.memory_plan import memory_warning
from posttrain.runs.model_card import write_cards
from posttrain.runs.results import Results
from posttrain.runs.run_folder import Manifest, open_run, run_path
from posttrain.trainer.loggers import FOLDERS, Trackers
from posttrain.trainer.loop import now
from posttrain.trainer.stage import Stage, StageContext

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

NOT_HASHED = ("checkpoints", "report.html", "manifest.json", ".lock", "run.log", *FOLDERS)


@dataclass(frozen=True)
class RunResult:
    """Paths, measurements and curves of a finished run; a notebook shows it as a table.

    Attributes:
        folder: Folder of the run.
        model: Folder of the final model (which a run that only evaluates does not make).
        report: The page.
        comparison: Each task before and after, with intervals and p-values.
    """

    folder: Path
    model: Path
    report: Path
    comparison: list[dict[str, Any]]

    def curves(self, stage: str | None = None) -> DataFrame:
        """Return a pandas DataFrame: a row a step, a column a metric; `posttrain.report.curves.curve_table`."""
        return curve_table(read(self.folder), stage)

    def figure(self, *metrics: str, stage: str | None = None) -> Figure:
        """Return a matplotlib figure of the curves; `posttrain.report.curves.curve_figure`."""
        return curve_figure(read(self.folder), metrics, stage)

    def _repr_html_(self) -> str:
        places = (("model", self.model), ("report", self.report))
        return results_html(read(self.folder), [(name, place) for name, place in places if place.exists()])


def run(
    recipe: Recipe | str,
    folder: Path | str | None = None,
    fresh: bool = False,
    console: Console | None = None,
    rewards: dict[str, Callable[..., Any]] | None = None,
    accept_changed_data: bool = False,
) -> RunResult:
    """Carry a recipe through to its report, or resume the run in `folder`.

    Args:
        recipe: A Recipe, the name of a shipped one, or the path of a YAML file.
        folder: Folder of the run. None: the recipe's output/name.
        fresh: Set an earlier run in the folder aside (under another name) and start over.
        console: Console for messages. None: standard output, of rank 0 alone.
        rewards: Functions by the names that the recipe uses for them.
        accept_changed_data: Resume although files, modules or packages have changed since the run began. The manifest
            keeps the earlier hashes as well.

    Raises:
        CheckpointError: The folder holds a run of another recipe, another process works on it, inputs of the run have
            changed, or a result of it is damaged.
        RecipeError: What the recipe names is not on this machine, or can't be computed by so many processes.
        PosttrainError: Data, model or rewards of the recipe can't be used; raised before training starts.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    check_machine(recipe)
    path = run_path(Path(folder) if folder is not None else Path(recipe.output) / recipe.name)
    if recipe.systems.engine == "ray":
        from posttrain.runs.ray_trainers import run_on_ray

        return run_on_ray(recipe, path, fresh, console or VisibleConsole(), rewards or {}, accept_changed_data)  # type: ignore[no-any-return]
    return run_here(recipe, path, fresh, console, rewards or {}, accept_changed_data)


def run_here(
    recipe: Recipe,
    path: Path,
    fresh: bool,
    console: Console | None,
    rewards: dict[str, Callable[..., Any]],
    accept_changed_data: bool,
    placed: dict[str, Any] | None = None,
) -> RunResult:
    """Carry a recipe through in this process, or in those that torchrun or Ray started.

    Args:
        recipe: The recipe.
        path: Folder of the run.
        fresh: As in `run`.
        console: As in `run`.
        rewards: As in `run`.
        accept_changed_data: As in `run`.
        placed: What the manifest notes of where the processes are, and of restarts. None: nothing.
    """
    console = console or VisibleConsole(quiet=not distributed.is_main())
    placement = recipe.systems
    distributed.start(pick_device(recipe.model.device), placement.replicas, placement.sequence_parallel)
    try:
        with open_run(path, recipe, fresh) as manifest, fixed_date(_date_of_run(manifest)):
            one = _Run(recipe, path, manifest, console, rewards, accept_changed_data, placed)
            return one.carry_through()
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            raise CheckpointError(f"{path} can't be a run's folder: {error.strerror}") from error
        if isinstance(error, PosttrainError) or not is_full(error):
            raise
        raise CheckpointError(
            f"the disk is full, and {path} could not be written ({error}). What is finished there is intact: free some "
            "space and run the same command again to resume"
        ) from error


def _date_of_run(manifest: Manifest) -> str:
    """Return the day on which the run was made, which chat templates insert, also when it is resumed later."""
    noted = manifest.values
    return str(distributed.from_main(noted.get("date") or noted.get("created", "")[:10] or template_date()))


def _extends_vocabulary(stage: StageConfig) -> bool:
    return getattr(stage, "vocabulary", None) is not None


class _Run:
    """One recipe in one folder.

    Attributes:
        made: Results of the stages so far, by name of the stage: a folder each.
        model: The model that the next stage starts from.
        other_tokens: A stage so far has extended the vocabulary.
    """

    def __init__(
        self,
        recipe: Recipe,
        path: Path,
        manifest: Manifest,
        console: Console,
        functions: dict[str, Callable[..., Any]],
        accept_changed: bool,
        placed: dict[str, Any] | None,
    ) -> None:
        self.recipe, self.path, self.manifest = recipe, path, manifest
        self.console, self.functions = console, functions
        self.results = Results(path, manifest, self.print)
        self.accept_changed = accept_changed
        earlier = manifest.values.get("systems", {}).get("restarts", [])  # by earlier commands, or before a restart
        new = [r for r in (placed or {}).get("restarts", []) if r not in earlier]
        self.placed = {"systems": {**placed, "restarts": [*earlier, *new]}} if placed is not None else {}
        self.made: dict[str, Path] = {}
        self.model = recipe.model
        self.other_tokens = False

    def carry_through(self) -> RunResult:
        """Do what is not done yet, and note how it ended."""
        try:
            if self.manifest.values.get("status") == "done":
                self.print(
                    f"{self.path} is already finished: nothing to do. To run it again: {program_name()} run "
                    f"{self.path} --fresh (which sets this one aside), or the recipe with name=NEW_NAME"
                )
                for name in changed_artifacts(self.path, weights=False) if distributed.is_main() else ():
                    self.print(f"! {self.path / name} was changed after the run wrote it, or is missing")
                for name, difference in self.results.changed_since(self.recipe, self.functions).items():
                    self.print(f"! {name}, which the run has read, has changed since: {difference}")
            else:
                self.work()
        except KeyboardInterrupt:
            self.note_end(status="stopped")
            self.print(f"stopped; resume with: {program_name()} run {self.path}")
            raise
        except Exception as error:
            self.note_end(status="failed", error=hide_secrets(str(error)) or type(error).__name__)
            raise
        return self.close()

    def print(self, line: str) -> None:
        self.console.print(visible(line), highlight=False, markup=False, soft_wrap=True)

    def note_end(self, **values: Any) -> None:
        """Write how the run ended; a full disk does not hide the error that ended it."""
        with suppress(OSError):
            self.manifest.update(**values)
            self.report()

    def work(self) -> None:
        """Read all data, evaluate, carry out the stages, evaluate again."""
        recipe, noted = self.recipe, self.manifest.values
        resumed = noted.get("resumed", -1) + 1
        inputs = self.results.check_inputs(recipe, self.functions, self.accept_changed)
        found = {key: getattr(recipe.model, key) for key in ("source", "revision", "dtype", "device")}
        self.manifest.update(
            posttrain=posttrain.__version__,
            created=noted.get("created", now()),
            date=template_date(),
            status="running",
            error=None,
            seed=recipe.seed,
            import_folders=import_folders(),
            machine=machine(),
            model={**noted.get("model", {}), **found, "sha256": resolve(recipe.model.source).sha256()},
            resumed=resumed,
            inputs=inputs,
            recipe_sha256=file_hash(self.path / "recipe.yaml"),
            **self.placed,
        )
        if resumed:
            self.print(f"resuming {self.path}")
        self.print("reading data")
        tokenizer, length = load_tokenizer(recipe.model), context_length(recipe.model)
        context = StageContext(tokenizer, length, self.functions, recipe.evaluate)
        order = recipe.in_order()
        # Data that an earlier stage makes, or text in tokens that it makes, can only be read after that stage.
        early: dict[str, Stage] = {}
        for name, stage in order:
            if not references(stage):
                early[name] = registry.prepare_stage(stage, context)
            if _extends_vocabulary(stage):
                break
        self.note_data(
            [entry for prepared in early.values() for entry in prepared.entries] + self.task_entries(context)
        )
        for line in memory_warning(recipe, early):
            self.print(f"! {line}")
        trackers = Trackers(recipe.track, self.path, recipe)
        tasks = [task for task in recipe.evaluate if not references(task)]
        self.evaluate(tasks, "before")
        trackers.evaluated(0, self.path / "evaluations" / "before")
        models = 0
        last_model = [name for name, stage in order if stage.makes == "model"][-1:]
        for number, (name, stage) in enumerate(order):
            folder = self.path / "stages" / name
            result = folder / stage.makes
            if not result.is_dir():
                self.carry_out(stage, early.get(name), context, number, folder, trackers)
                for warning in judge_figures.judge_warnings(folder):  # before a stage trains on such labels
                    self.print(f"! {name}: {warning}")
            self.results.note_stage(number, name)
            self.made[stage.name] = result
            self.other_tokens |= _extends_vocabulary(stage)
            if stage.makes == "model":
                self.model = self.model.model_copy(update={"source": str(result), "revision": None})
                models += 1
                if recipe.evaluate_stages and [name] != last_model:
                    self.evaluate(tasks, name)
                    trackers.evaluated(models, self.path / "evaluations" / name)
        if distributed.is_main():
            self.measure_end()
            # Again those before: what stages measured on held-out rows is among them now.
            for step, moment in ((0, "before"), (models, "after")):
                trackers.evaluated(step, self.path / "evaluations" / moment)
            trackers.close()
            self.finish()
        distributed.barrier()

    def evaluate(self, tasks: list[EvaluationConfig], name: str) -> None:
        """Evaluate the current model on rank 0, into evaluations/`name`."""
        if tasks and distributed.is_main():
            self.measure(self.model, tasks, name)
        distributed.barrier()

    def measure(self, model: ModelConfig, tasks: list[EvaluationConfig], name: str) -> None:
        """Run what is missing of evaluations/`name`; what is there must be what was written."""
        self.results.check_evaluation(name)
        model = model if model.source == self.recipe.model.source else as_saved(model)
        evaluate_model(model, tasks, self.path / "evaluations" / name, self.recipe.seed, self.functions)
        self.results.note_evaluation(name)

    def task_entries(self, context: StageContext) -> list[dict[str, Any]]:
        """Return the manifest's entries of the data of evaluations, as far as it can be read now."""
        tasks = [task for task in self.recipe.evaluate if not references(task.source)]
        read = [(task.name, task_data(task, context.tokenizer, context.context)) for task in tasks]
        return [{"stage": f"evaluate {n}", **getattr(d, "stats", {})} for n, d in read if d is not None]

    def carry_out(
        self,
        stage: StageConfig,
        prepared: Stage | None,
        context: StageContext,
        number: int,
        folder: Path,
        trackers: Trackers,
    ) -> None:
        """Carry out one stage and note it in the manifest; `prepared` is None if its data had to wait for a stage."""
        self.results.check_used(references(stage), self.made, self.model.source if stage.start is None else "")
        stage = registry.resolved(stage, self.made)
        name, model = folder.name.split("-", 1)[1], self.model
        records = self.manifest.values.get("stages", [])[:number]
        entry = {"name": name, "method": stage.method, "makes": stage.makes, "status": "running"}
        self.manifest.update(stages=[*records, entry])
        if stage.start == "base":
            model = self.recipe.model
        elif stage.start is not None:
            model = model.model_copy(update={"source": stage.start, "revision": None})
        if prepared is None:
            context = replace(context, tokenizer=load_tokenizer(model)) if self.other_tokens else context
            prepared = registry.prepare_stage(stage, context)
            self.note_data(prepared.entries)
        if distributed.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "method.json", prepared.about())
        done = prepared.run(model, folder, self.recipe.seed + number, trackers.on_step(name))
        if stage.makes == "model":
            sizes = {k: done[k] for k in ("parameters", "trainable")}
            self.manifest.update(model={**self.manifest.values["model"], **sizes})
        entry |= {"status": "done", "from": model.source, "to": str(folder / stage.makes), **done}
        self.manifest.update(stages=[*records, entry])
        if distributed.is_main():
            write_cards(self.path, self.recipe, self.manifest.values)

    def note_data(self, entries: list[dict[str, Any]]) -> None:
        """Note what was read in the manifest, with the first bad rows; if there are more, a file gets all of them."""
        new = []
        for entry in entries:
            bad = entry.get("bad_rows") or []
            if len(bad) > SHOWN_ROWS:
                name = f"bad_rows/{entry['stage'].replace(' ', '-')}.jsonl"
                if distributed.is_main():
                    (self.path / "bad_rows").mkdir(exist_ok=True)
                    write_text(self.path / name, "".join(json.dumps(b, ensure_ascii=False) + "\n" for b in bad))
                entry = {**entry, "bad_rows": bad[:SHOWN_ROWS], "bad_rows_file": name}
            new.append(entry)
        noted = {entry["stage"]: entry for entry in self.manifest.values.get("data", [])}
        for entry in new:  # what was read before other data were accepted stays in the lineage
            old = noted.pop(entry["stage"], entry)
            changed = old.get("sha256") != entry.get("sha256")
            earlier = [{k: old.get(k) for k in ("sha256", "rows", "used")}] if changed else []
            if earlier or "earlier" in old:
                entry["earlier"] = [*old.get("earlier", []), *earlier]
        self.manifest.update(data=[*noted.values(), *new])

    def measure_end(self) -> None:
        """Put the final model in place, evaluate it, and compare it with the first one."""
        recipe, path = self.recipe, self.path
        tasks = [registry.resolved(task, self.made) for task in recipe.evaluate]
        evaluations = path / "evaluations"
        if tasks:  # those that need what a stage made could not be measured before
            self.measure(recipe.model, tasks, "before")
        self.results.check_used([n for t in recipe.evaluate for n in references(t)], self.made, self.model.source)
        if self.made and self.model.source != recipe.model.source:
            final, work = path / "model", path / ".model.writing"
            if not final.is_dir():
                shutil.rmtree(work, ignore_errors=True)
                shutil.copytree(self.model.source, work, copy_function=link_or_copy)
                work.rename(final)
            if tasks:
                config = recipe.model.model_copy(update={"source": str(final)})
                self.measure(config, tasks, "after")
        with_items = [task for task in tasks if task.compares_items and (evaluations / "after").is_dir()]
        compared = [(task.name, str(task.measures)) for task in with_items]
        compared += write_held_out_tasks(recipe, path)
        if compared:
            comparison = []
            for name, kind in compared:
                sides = [evaluations / side / f"{name}.jsonl" for side in ("before", "after")]
                try:
                    compared_items = compare(read_lines(sides[0]), read_lines(sides[1]), kind)
                except DataError as error:
                    raise DataError(f"{sides[0]} and {sides[1]}: {error}") from error
                comparison.append({"task": name, **compared_items})
            write_json(evaluations / "comparison.json", comparison)

    def finish(self) -> None:
        """Write the model cards, and hash all files."""
        path = self.path
        write_cards(path, self.recipe, self.manifest.values)
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and not set(NOT_HASHED) & {*p.parts}]
        artifacts = {str(p.relative_to(path)): file_hash(p) for p in files}
        self.manifest.update(artifacts=artifacts, status="done", finished=now())

    def report(self) -> Path:
        return build_report(self.path) if distributed.is_main() else self.path / "report.html"

    def close(self) -> RunResult:
        """Write the page, and print the results and what to do next."""
        path, report = self.path, self.report()
        found = read(path)
        evaluations = path / "evaluations"
        file = evaluations / "comparison.json"
        comparison = read_object(file, list) if file.exists() else []
        if evaluations.is_dir():
            newest = evaluations / ("after" if (evaluations / "after").is_dir() else "before")
            summary = summary_table(found)
            first = [summary] if summary.row_count else []
            figures = [figure_table(view) for view in behaviours(found)]
            for table in (*first, *figures, *stage_tables(found), *answer_tables(found), *evaluation_tables(newest)):
                self.console.print(table)
        for line in [
            *held_out_lines(found),
            *retention_lines(found),
            *search_lines(found),
            *judge_figures.feedback_lines(path),
            f"run     {path}",
            f"report  {report}",
        ]:
            self.print(line)
        if (path / "model").is_dir():
            self.print(f"chat    {program_name()} chat {path}")
        return RunResult(path, path / "model", report, comparison)
