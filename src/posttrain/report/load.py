"""Reads a run folder, whatever part of it there is: a run that still goes on or that failed gets a report too."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from posttrain.core.errors import CheckpointError

Record = dict[str, Any]


@dataclass(frozen=True)
class StageLog:
    """What a stage wrote while it ran; one record a step, ascending, the last one where a step was run twice."""

    name: str
    metrics: list[Record]
    timings: list[Record]


def stage_folders(run: Path, stage: str) -> list[Path]:
    """The folders of a stage: NUMBER-NAME."""
    return [p for p in sorted((run / "stages").glob(f"*-{stage}")) if p.name.split("-", 1)[1] == stage]


@dataclass(frozen=True)
class Evaluation:
    """One task of one model: its summary, items and greedy answers; each may be empty."""

    summary: Record = field(default_factory=dict)
    items: list[Record] = field(default_factory=list)
    samples: list[Record] = field(default_factory=list)


@dataclass(frozen=True)
class TaskRow:
    """A line of the before/after table; a side that was not measured is None, as is an absent comparison."""

    task: str
    metric: str
    kind: str
    before: Record | None
    after: Record | None
    comparison: Record | None

    @property
    def n(self) -> int:
        return int((self.comparison or self.after or self.before or {}).get("n", 0))


@dataclass(frozen=True)
class Run:
    """A run folder in memory. ``notes`` says what is missing or can't be read, for the reader of the report.

    flat: those of the notes that name evaluations whose scorer gave every answer the same. between: evaluations after
    stages before the last, by the stage's name, in order.
    """

    folder: Path
    manifest: Record
    recipe_text: str
    recipe: Record
    stages: list[StageLog]
    before: dict[str, Evaluation]
    between: dict[str, dict[str, Evaluation]]
    after: dict[str, Evaluation]
    comparison: list[Record]
    notes: list[str]
    flat: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or self.folder.resolve().name)

    @property
    def status(self) -> str:
        return str(self.manifest.get("status", "unknown"))

    def makes(self, stage: str) -> str:
        """What the stage of that name makes, begun or done: model (also where nothing says so), data, reward_model."""
        records = self.manifest.get("stages") or []
        found = next((s for s in records if isinstance(s, Mapping) and s.get("name") == stage), {})
        return str(found.get("makes") or ("model" if found.get("made") is None else "data"))

    def rows(self) -> list[TaskRow]:
        """The before/after table: tasks in the order of the recipe, then whatever else was found."""
        compared = {str(c.get("task")): c for c in self.comparison}
        named = [str(t.get("name")) for t in self.recipe.get("evaluate") or [] if isinstance(t, Mapping)]
        found = {**compared, **self.before, **self.after}
        return [self._row(t, compared.get(t)) for t in dict.fromkeys([n for n in named if n in found] + sorted(found))]

    def _row(self, task: str, comparison: Record | None) -> TaskRow:
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
    """Reads a run folder. Files that are missing or damaged are named in ``notes``; raises CheckpointError only
    where there is no folder at all."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"expected a run folder, found none at {folder}; runs are in the recipe's `output`, runs/"
        )
    notes: list[str] = []
    manifest = _json(folder / "manifest.json", notes, missing="no manifest.json: the run stopped before it began")
    path = folder / "recipe.yaml"
    text, recipe = "", None
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            recipe = yaml.safe_load(text)
        except yaml.YAMLError as error:
            notes.append(f"recipe.yaml can't be read: {str(error).splitlines()[0]}")
    else:
        notes.append("no recipe.yaml: the recipe can't be shown")
    comparison = _json(folder / "evaluations" / "comparison.json", notes)
    before, after = (_evaluations(folder / "evaluations" / side, notes) for side in ("before", "after"))
    flat = [*_constant(before, "before"), *_constant(after, "after")]
    return Run(
        folder=folder,
        manifest=manifest if isinstance(manifest, dict) else {},
        recipe_text=text,
        recipe=recipe if isinstance(recipe, dict) else {},
        stages=[_stage(path, notes) for path in _stage_folders(folder / "stages")],
        before=before,
        between={p.name.split("-", 1)[1]: _evaluations(p, notes) for p in _stage_folders(folder / "evaluations")},
        after=after,
        comparison=[c for c in comparison or [] if isinstance(c, dict)],
        notes=notes + flat,
        flat=flat,
    )


def _constant(evaluations: Mapping[str, Evaluation], side: str) -> list[str]:
    """Of evaluations whose scorer gave every answer the same: then a difference says nothing of the model."""
    found = {name: e.summary["constant"] for name, e in evaluations.items() if "constant" in e.summary}
    return [f"{name}, {side}: the scorer gave every answer {score:g}" for name, score in found.items()]


def _stage_folders(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("*-*") if p.is_dir() and p.name.split("-")[0].isdigit()]
    return sorted(found, key=lambda p: int(p.name.split("-")[0]))


def _stage(folder: Path, notes: list[str]) -> StageLog:
    def steps(name: str) -> list[Record]:
        # A run that was killed and went on may have written a step twice; the later line is the one that counts.
        by_step = {r["step"]: r for r in _lines(folder / name, notes) if isinstance(r.get("step"), int)}
        return [by_step[s] for s in sorted(by_step)]

    return StageLog(folder.name.split("-", 1)[1], steps("metrics.jsonl"), steps("timings.jsonl"))


def _evaluations(folder: Path, notes: list[str]) -> dict[str, Evaluation]:
    names = {
        p.name.removesuffix(".samples.json").removesuffix(".jsonl").removesuffix(".json")
        for p in folder.glob("*.json*")
    }
    out = {}
    for name in sorted(names):
        summary = _json(folder / f"{name}.json", notes)
        samples = _json(folder / f"{name}.samples.json", notes)
        out[name] = Evaluation(
            summary if isinstance(summary, dict) else {},
            list(_lines(folder / f"{name}.jsonl", notes)),
            [s for s in samples or [] if isinstance(s, dict)],
        )
    return out


def _json(path: Path, notes: list[str], missing: str = "") -> Any:
    if not path.exists():
        if missing:
            notes.append(missing)
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        notes.append(f"{path.name} can't be read: {error}")
        return None


def _lines(path: Path, notes: list[str]) -> Iterator[Record]:
    if not path.exists():
        return
    broken = 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            broken += 1
            continue
        if isinstance(record, dict):
            yield record
    if broken:
        notes.append(
            f"{path.name}: {broken} line(s) can't be read and are left out; the run may have been killed there"
        )
