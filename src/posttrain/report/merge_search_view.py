"""Show a search over merges: every trial on the items that it was chosen by, and the choice on the reported ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.core.files import read_lines
from posttrain.report.formatting import format_score, plain_text
from posttrain.report.load import JsonDict, Run, read_json


@dataclass(frozen=True)
class TrialRow:
    """Hold a merge that was tried; `mark` says if it is the choice or the merge as set."""

    number: int
    mark: str
    coefficients: list[float]
    score: float | None
    values: list[float]
    error: str


@dataclass(frozen=True)
class SearchView:
    """Hold a search.

    Attributes:
        stage: The stage.
        coefficients: Names of the numbers.
        tasks: (name, metric) of the evaluations that it is scored by.
        trials: All merges that were tried, in order.
        names: What the models of the comparison are called, by key; the choice is the first.
        figures: Figures of each model on the reported items, by key and task.
        compared: The choice against each other model, by key and task.
        done: The search has ended.
    """

    stage: str
    coefficients: list[str]
    tasks: list[tuple[str, str]]
    trials: list[TrialRow]
    names: dict[str, str]
    figures: dict[str, JsonDict]
    compared: dict[str, dict[str, JsonDict]]
    done: bool


def merge_searches(run: Run) -> list[SearchView]:
    """Return the view of each stage that searched, also of one that has not ended."""
    return [_view(s.name, s.folder / "search", run) for s in run.stages if (s.folder / "search/trials.jsonl").is_file()]


def _view(stage: str, folder: Path, run: Run) -> SearchView:
    trials = read_lines(folder / "trials.jsonl")
    path = folder / "search.json"
    found: Any = read_json(path, run.notes) if path.exists() else {}
    found = found if isinstance(found, dict) else {}
    scored: JsonDict = next((t["tasks"] for t in trials if "tasks" in t), {})
    tasks = [(plain_text(name), str(figures["metric"])) for name, figures in scored.items()]
    rows = []
    for number, trial in enumerate(trials):
        marks = ["as set"] if number == 0 else []
        marks += ["chosen"] if trial["coefficients"] == found.get("chosen") else []
        values = [trial["tasks"][name]["value"] for name, _ in tasks] if "tasks" in trial else []
        numbers = [float(v) for v in trial["coefficients"].values()]
        error = plain_text(trial.get("error"))
        rows.append(TrialRow(number, ", ".join(marks), numbers, trial["score"], values, error))
    compared = {key: {c["task"]: c for c in entries} for key, entries in found.get("compared", {}).items()}
    names = {key: plain_text(name) for key, name in found.get("names", {}).items()}
    coefficients = [plain_text(name) for name in (trials[0]["coefficients"] if trials else ())]
    return SearchView(stage, coefficients, tasks, rows, names, found.get("reported", {}), compared, bool(found))


def search_lines(run: Run) -> list[str]:
    """Return lines on each search of a run, for the terminal."""
    out = []
    for view in merge_searches(run):
        chosen = next((t for t in view.trials if "chosen" in t.mark), None)
        if chosen is None:
            continue
        numbers = ", ".join(f"{n} {v:g}" for n, v in zip(view.coefficients, chosen.coefficients, strict=True))
        out.append(f"{view.stage}: of {len(view.trials)} merges the best on validation items has {numbers}")
        for key, tasks in view.compared.items():
            changes = []
            for task, metric in view.tasks:
                c = tasks[task]
                change, low, high = (
                    format_score(c[k], metric, k == "difference") for k in ("difference", "low", "high")
                )
                changes.append(f"{task} {change} [{low}, {high}]")
            out.append(f"{view.stage}: on the other items, against {view.names[key]}: {', '.join(changes)}")
    return out
