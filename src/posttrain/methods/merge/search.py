"""Search the numbers of a merge: every trial is scored on validation items, and the choice is reported on the others.

An evaluation with `validation` has two parts that share no item (`posttrain.eval.item_parts`). Trials are scored on the
first part alone. The chosen merge, the one with the numbers of the settings, the base and the sources are then measured
on the second part, which is also all that the run's own evaluations measure. What a trial took is kept in the stage's
folder: a search that is killed continues after the last trial.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from posttrain.config import EvaluationConfig, ModelConfig
from posttrain.core.errors import ModelError
from posttrain.core.files import Lines, read_lines, write_json
from posttrain.core.item_statistics import compare
from posttrain.eval.tasks import evaluate_model
from posttrain.methods.merge.merge_settings import BASE_SOURCE, MergeConfig
from posttrain.methods.merge.search_methods import Point, cma_search, coordinate_search, grid_search
from posttrain.methods.merge.search_settings import RangeConfig, number_at, number_place
from posttrain.models.quantization import as_saved
from posttrain.rewards.reward import RewardFunctions

SEARCH_FOLDER = "search"
"""Folder of the stage in which trials and their results are kept."""
TRIALS = "trials.jsonl"
Write = Callable[[MergeConfig, Path], dict[str, Any]]
"""Writes the merge of settings to a folder, and returns the stage's entry in the manifest."""


@dataclass(frozen=True)
class SearchResult:
    """Hold what a search found.

    Attributes:
        chosen: Settings of the best merge.
        folder: Folder of its model.
        entry: The stage's entry in the manifest.
    """

    chosen: MergeConfig
    folder: Path
    entry: dict[str, Any]


class MergeSearch:
    """A search of one stage. See the module's docstring."""

    def __init__(
        self,
        config: MergeConfig,
        model: ModelConfig,
        evaluations: Sequence[EvaluationConfig],
        functions: RewardFunctions,
        folder: Path,
        seed: int,
        write: Write,
    ) -> None:
        """Read what was tried before.

        Args:
            config: Settings of the stage.
            model: The base.
            evaluations: The recipe's.
            functions: Rewards given from Python, by name.
            folder: The stage's folder.
            seed: Seeds evaluations and populations.
            write: Writes a merge.
        """
        assert config.search is not None
        self.config, self.search, self.model, self.write = config, config.search, model, write
        self.functions, self.seed, self.folder = functions, seed, folder / SEARCH_FOLDER
        # Answers to read are those of the run's own evaluations.
        self.tasks = [task.model_copy(update={"show": 0}) for task in config.search_evaluations(evaluations)]
        numbers = config.searchable()
        self.default: Point = tuple(
            number_at(numbers, number_place(numbers, name)) for name in self.search.coefficients
        )
        for work in self.folder.glob("*/model"):  # of a trial that was interrupted
            shutil.rmtree(work)
        self.trials = read_lines(self.folder / TRIALS)
        self.lines = Lines(self.folder / TRIALS, len(self.trials))

    def run(self) -> SearchResult:
        """Try merges, choose the first of the best, and measure it on the items that nothing was chosen by."""
        self.score(self.default)
        choices = list(self.search.coefficients.values())
        if self.search.method == "cma":
            ranges = [(c.low, c.high) for c in choices if isinstance(c, RangeConfig)]
            cma_search(self.default, ranges, self.score, (self.search.max_trials or 0) - 1, self.seed)
        else:
            values = [c for c in choices if isinstance(c, list)]
            if self.search.method == "grid":
                grid_search(values, self.score)
            else:
                coordinate_search(self.default, values, self.score, self.search.max_trials)
        self.lines.close()
        scored = [trial for trial in self.trials if trial["score"] is not None]
        if not scored:
            raise ModelError(f"none of {len(self.trials)} merges could be scored: {self.trials[0]['error']}")
        best = max(scored, key=lambda trial: trial["score"])
        return self._report(best)

    def settings_of(self, point: Point) -> MergeConfig:
        """Return the stage's settings with the numbers of a point."""
        return self.config.with_numbers(dict(zip(self.search.coefficients, point, strict=True)))

    def score(self, point: Point) -> float:
        """Return the score of a merge on validation items, by writing and measuring it if that is not done yet.

        Settings that make no merge, such as weights that sum to zero, or none that gives numbers, score minus infinity.
        """
        numbers = dict(zip(self.search.coefficients, point, strict=True))
        for trial in self.trials:
            if trial["coefficients"] == numbers:
                return -math.inf if trial["score"] is None else float(trial["score"])
        began, folder = time.perf_counter(), self.folder / f"trial-{len(self.trials):04d}"
        record: dict[str, Any] = {"coefficients": numbers, "score": None}
        try:
            config = self.settings_of(point)
            folder.mkdir(parents=True, exist_ok=True)
            self.write(config, folder / "model")
            made = as_saved(self.model).model_copy(update={"source": str(folder / "model"), "revision": None})
            found = evaluate_model(made, self.tasks, folder, self.seed, self.functions, part="validation")
            record |= {"score": self._mean(found), "tasks": _figures(found)}
        except (ModelError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            record |= {"error": reason.removeprefix("Value error, ")}
        shutil.rmtree(folder / "model", ignore_errors=True)
        record["seconds"] = round(time.perf_counter() - began, 2)
        self.lines.add(record)
        self.trials.append(record)
        return -math.inf if record["score"] is None else float(record["score"])

    def _mean(self, summaries: Sequence[Mapping[str, Any]]) -> float:
        """Return the weighted mean of the tasks' figures: of perplexities their inverse, so that higher is better.

        Raises:
            ModelError: A figure is no number.
        """
        if without := [s["task"] for s in summaries if s["value"] is None or math.isnan(s["value"])]:
            raise ModelError(f"evaluation {without[0]} has no figure that is a number")
        weights = [self.search.evaluations.get(task.name, 1.0) for task in self.tasks]
        values = [1 / s["value"] if s["kind"] == "perplexity" else s["value"] for s in summaries]
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    def _report(self, best: Mapping[str, Any]) -> SearchResult:
        """Measure the choice and what it is compared with on the other part of the items."""
        point = tuple(best["coefficients"].values())
        entry, figures = self._measured_merge(point, "chosen")
        measured = {"chosen": figures}
        if point != self.default and self.trials[0]["score"] is not None:
            measured["default"] = self._measured_merge(self.default, "default")[1]
            shutil.rmtree(self.folder / "default" / "model")
        measured |= {name: self._measure(model, name) for name, model in self._models()}
        others = [name for name in measured if name != "chosen"]
        record = {
            "method": self.search.method,
            "trials": len(self.trials),
            "chosen": best["coefficients"],
            "score": best["score"],
            "default": self.trials[0]["coefficients"],
            "default_score": self.trials[0]["score"],
        }
        compared = {name: [self._compare(task, name) for task in self.tasks] for name in others}
        as_set = " (as set)" if point == self.default else ""
        names = {"chosen": f"the chosen merge{as_set}", "default": "the merge as set", **source_names(self.config)}
        more = {"names": {name: names[name] for name in measured}, "reported": measured, "compared": compared}
        write_json(self.folder / "search.json", {**record, **more})
        return SearchResult(self.settings_of(point), self.folder / "chosen" / "model", {**entry, "search": record})

    def _measured_merge(self, point: Point, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Write a merge and measure it; return the entry of the manifest, and the figures."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        entry = self.write(self.settings_of(point), folder / "model")
        made = as_saved(self.model).model_copy(update={"source": str(folder / "model"), "revision": None})
        return entry, self._measure(made, name)

    def _measure(self, model: ModelConfig, name: str) -> dict[str, Any]:
        return _figures(evaluate_model(model, self.tasks, self.folder / name, self.seed, self.functions))

    def _models(self) -> list[tuple[str, ModelConfig]]:
        """Return the base and every source with a name for its folder."""
        models, seen = [("base", self.model)], set[tuple[str, str | None]]()
        for number, entry in enumerate(self.config.entries):
            key = (entry.source, entry.revision)
            if entry.source != BASE_SOURCE and key not in seen:
                own = {"source": entry.source, "revision": entry.revision}
                models.append((f"source-{number}", as_saved(self.model).model_copy(update=own)))
            seen.add(key)
        return models

    def _compare(self, task: EvaluationConfig, label: str) -> dict[str, Any]:
        """Return the paired comparison of the choice with another model: a positive difference is the choice's."""
        before, after = (read_lines(self.folder / name / f"{task.name}.jsonl") for name in (label, "chosen"))
        return compare(before, after, task.measures, task=task.name, seed=self.seed)


def _figures(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {s["task"]: {key: s[key] for key in ("metric", "value", "low", "high", "n")} for s in summaries}


def source_names(config: MergeConfig) -> dict[str, str]:
    """Return what the models of a search are called in tables, by the name of their folder."""
    out = {"base": "the base"}
    for number, entry in enumerate(config.entries):
        if entry.source != BASE_SOURCE:
            path = Path(entry.source)
            made = path.name == "model" and path.parent.parent.name == "stages"
            out.setdefault(f"source-{number}", path.parent.name.partition("-")[2] if made else path.name)
    return out
