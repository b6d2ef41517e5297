"""Read a run folder, complete or not: a run that is still running or has failed gets a report too."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.core.errors import CheckpointError, RecipeError
from posttrain.core.files import changed_artifacts
from posttrain.recipe.documents import parse_document

JsonDict = dict[str, Any]


@dataclass(frozen=True)
class StageLog:
    """Hold what a stage wrote while it ran.

    Attributes:
        name: The stage's name in the recipe.
        folder: Its folder, NUMBER-NAME.
        method: Content of method.json: name, title and metrics of the method. Empty in runs from before that file.
        metrics: One record a step, ascending; the last record if a step was run twice.
        timings: The same of what differs from run to run.
        chosen: Content of best_step.json: the step whose weights the model has. Empty if none was chosen, or not yet.
    """

    name: str
    folder: Path
    method: JsonDict
    metrics: list[JsonDict]
    timings: list[JsonDict]
    chosen: JsonDict = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Hold one task of one model: its summary, items and greedy answers; each may be empty."""

    summary: JsonDict = field(default_factory=dict)
    items: list[JsonDict] = field(default_factory=list)
    samples: list[JsonDict] = field(default_factory=list)


@dataclass(frozen=True)
class TaskRow:
    """Hold a line of the before/after table; a side that was not measured is None, as is a missing comparison."""

    task: str
    metric: str
    kind: str
    before: JsonDict | None
    after: JsonDict | None
    comparison: JsonDict | None

    @property
    def failed(self) -> str:
        """Return how many answers the grader failed on, in words; empty if none."""
        counts = (self.comparison or {}).get("failed")
        if not isinstance(counts, Mapping):
            return ""
        meaning = "left out" if self.kind in ("score", "behaviour") else "counted as wrong"
        return f"grader failed: {counts.get('before', 0)} before, {counts.get('after', 0)} after ({meaning})"

    @property
    def n(self) -> int:
        """Return the number of items."""
        return int((self.comparison or self.after or self.before or {}).get("n", 0))


@dataclass(frozen=True)
class Run:
    """Hold a run folder in memory.

    Attributes:
        between: Evaluations after stages before the last, by the stage's name, in order.
        notes: What is missing or can't be read, for the reader of the report.
        flat: Those notes that name evaluations whose scorer gave every answer the same score.
    """

    folder: Path
    manifest: JsonDict
    recipe_text: str
    recipe: JsonDict
    stages: list[StageLog]
    before: dict[str, Evaluation]
    between: dict[str, dict[str, Evaluation]]
    after: dict[str, Evaluation]
    comparison: list[JsonDict]
    notes: list[str]
    flat: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return the name of the run."""
        return str(self.recipe.get("name") or self.folder.resolve().name)

    @property
    def status(self) -> str:
        """Return the status of the run."""
        return str(self.manifest.get("status", "unknown"))

    @property
    def source(self) -> str:
        """Return the source of the model that the run started from."""
        return str((self.manifest.get("model") or self.recipe.get("model") or {}).get("source") or "A model")

    @property
    def place(self) -> str:
        """Return the folder as commands name it."""
        return str(Path(str(self.recipe.get("output") or "runs")) / self.name)

    @property
    def has_model(self) -> bool:
        """Return whether the run leaves a model, or may yet: one that ends without has made data or a reward model."""
        ended_without = self.status == "done" and not (self.folder / "model").is_dir() and self.manifest.get("stages")
        return not ended_without or bool(self.manifest.get("artifacts", {}).get("model/config.json"))

    @property
    def measured_held_out(self) -> bool:
        """Return whether a stage logged numbers of held-out rows."""
        return any(key.startswith("held_out") for s in self.stages for record in s.metrics for key in record)

    def makes(self, stage: str) -> str:
        """Return what a stage makes: model (also if nothing says so), data or reward_model."""
        records = self.manifest.get("stages") or []
        found = next((s for s in records if isinstance(s, Mapping) and s.get("name") == stage), {})
        return str(found.get("makes") or ("model" if found.get("made") is None else "data"))

    def title(self, stage: Mapping[str, Any]) -> str:
        """Return the title of a stage's method: its own, or its name in the recipe if the stage has not started."""
        log = next((s for s in self.stages if s.name == stage.get("name")), None)
        return str((log.method.get("title") if log else None) or stage.get("method") or "a stage")

    def sides(self, task: str) -> list[tuple[str, Evaluation]]:
        """Return a task's evaluations before and after training, those that were made."""
        both = (("before", self.before), ("after", self.after))
        return [(name, side[task]) for name, side in both if task in side]

    def rows(self) -> list[TaskRow]:
        """Return the before/after table: tasks in the order of the recipe, then the others."""
        compared = {str(c.get("task")): c for c in self.comparison}
        named = [str(t.get("name")) for t in self.recipe.get("evaluate") or [] if isinstance(t, Mapping)]
        found = {**compared, **self.before, **self.after}
        speeds = {n for side in (self.before, self.after) for n, e in side.items() if e.summary.get("kind") == "speed"}
        found = {name: e for name, e in found.items() if name not in speeds}  # these have a table of their own
        return [self._row(t, compared.get(t)) for t in dict.fromkeys([n for n in named if n in found] + sorted(found))]

    def _row(self, task: str, comparison: JsonDict | None) -> TaskRow:
        before, after = (side.get(task, Evaluation()).summary for side in (self.before, self.after))
        about = {**before, **after}
        bootstrap = str((comparison or {}).get("test")) == "paired bootstrap"
        return TaskRow(
            task=task,
            metric=str(about.get("metric") or ("perplexity" if bootstrap else "accuracy")),
            kind=str(about.get("kind") or ("perplexity" if bootstrap else "choice")),
            before=(comparison or {}).get("before") or before or None,
            after=(comparison or {}).get("after") or after or None,
            comparison=comparison,
        )


def read(folder: Path) -> Run:
    """Read a run folder; files that are missing or damaged are named in `notes`.

    Raises:
        CheckpointError: There is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"expected a run folder, found none at {folder}; runs are in the recipe's `output`, runs/"
        )
    notes: list[str] = []
    manifest = read_json(folder / "manifest.json", notes, missing="no manifest.json: the run stopped before it began")
    text, recipe = _recipe(folder / "recipe.yaml", notes)
    comparison = read_json(folder / "evaluations" / "comparison.json", notes)
    before, after = (_evaluations(folder / "evaluations" / side, notes) for side in ("before", "after"))
    notes += _changed_inputs(manifest)
    changed = changed_artifacts(folder, weights=False)
    notes += [f"{name} was changed after the run wrote it, or is missing" for name in changed]
    flat = [*_constant(before, "before"), *_constant(after, "after")]
    between = numbered_folders(folder / "evaluations")
    return Run(
        folder=folder,
        manifest=manifest if isinstance(manifest, dict) else {},
        recipe_text=text,
        recipe=recipe,
        stages=[_stage(path, notes) for path in numbered_folders(folder / "stages")],
        before=before,
        between={p.name.split("-", 1)[1]: _evaluations(p, notes) for p in between},
        after=after,
        comparison=[c for c in comparison or [] if isinstance(c, dict)],
        notes=notes + flat,
        flat=flat,
    )


def numbered_folders(folder: Path) -> list[Path]:
    """Return the folders NUMBER-NAME in a folder, by number."""
    found = [p for p in folder.glob("[0-9]*-*") if p.is_dir() and re.match("[0-9]+-", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[0]))


def read_json(path: Path, notes: list[str], missing: str = "") -> Any:
    """Return the content of a JSON file; None if it is missing or damaged, which is added to `notes`.

    Args:
        path: The file.
        notes: Messages for the reader of the report.
        missing: Message if there is no such file; empty if it may be missing.
    """
    if not path.exists():
        notes += [missing] if missing else []
        return None
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        stage = path.parent.name.split("-", 1)
        where = f" of stage {stage[1]}" if stage[0].isdigit() and len(stage) > 1 else ""
        notes.append(f"{path.name}{where} can't be read: {error}")
        return None


def _recipe(path: Path, notes: list[str]) -> tuple[str, JsonDict]:
    if not path.is_file():
        notes.append("no recipe.yaml: the recipe can't be shown")
        return "", {}
    text, recipe = path.read_text(encoding="utf-8", errors="replace"), None
    try:
        recipe = parse_document(text, "recipe.yaml").data
    except RecipeError as error:
        notes.append(f"recipe.yaml can't be read: {str(error).splitlines()[0]}")
    return text, recipe if isinstance(recipe, dict) else {}


def _changed_inputs(manifest: Any) -> list[str]:
    """Name the inputs that were changed, and accepted, while the run was under way."""
    histories = manifest.get("inputs") if isinstance(manifest, dict) else None
    notes = []
    for name, history in histories.items() if isinstance(histories, dict) else ():
        for entry in history if isinstance(history, list) else ():
            if isinstance(entry, dict) and entry.get("accepted"):
                notes.append(f"{name} changed while the run was under way, and was accepted on {entry.get('since')}")
    return notes


def _constant(evaluations: Mapping[str, Evaluation], side: str) -> list[str]:
    """Name evaluations whose scorer gave every answer the same: then a difference tells nothing about the model."""
    found = {name: e.summary["constant"] for name, e in evaluations.items() if "constant" in e.summary}
    return [f"{name}, {side}: the scorer gave every answer {score:g}" for name, score in found.items()]


def _stage(folder: Path, notes: list[str]) -> StageLog:
    def steps(name: str) -> list[JsonDict]:
        # A run that was killed and resumed may have written a step twice; the later line counts.
        by_step = {r["step"]: r for r in _lines(folder / name, notes) if isinstance(r.get("step"), int)}
        return [by_step[s] for s in sorted(by_step)]

    method, chosen = (read_json(folder / name, notes) for name in ("method.json", "best_step.json"))
    method, chosen = (value if isinstance(value, dict) else {} for value in (method, chosen))
    metrics, timings = steps("metrics.jsonl"), steps("timings.jsonl")
    return StageLog(folder.name.split("-", 1)[1], folder, method, metrics, timings, chosen)


def _evaluations(folder: Path, notes: list[str]) -> dict[str, Evaluation]:
    names = {
        p.name.removesuffix(".samples.json").removesuffix(".jsonl").removesuffix(".json")
        for p in folder.glob("*.json*")
    }
    out = {}
    for name in sorted(names):
        summary = read_json(folder / f"{name}.json", notes)
        samples = read_json(folder / f"{name}.samples.json", notes)
        out[name] = Evaluation(
            summary if isinstance(summary, dict) else {},
            list(_lines(folder / f"{name}.jsonl", notes)),
            [s for s in samples or [] if isinstance(s, dict)],
        )
    return out


def _lines(path: Path, notes: list[str]) -> Iterator[JsonDict]:
    if not path.is_file():
        notes += [f"{path.name} can't be read: it is no file"] if path.exists() else []
        return
    broken = 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            broken += 1
            continue
        if isinstance(record, dict):
            yield record
    if broken:
        notes.append(f"{path.name}: {broken} line(s) can't be read and are skipped; the run may have been killed there")
