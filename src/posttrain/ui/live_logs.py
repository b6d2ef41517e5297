"""Read what a run writes while it goes on: of its logs only the lines that were appended since the last look."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any

from posttrain.core.errors import RecipeError
from posttrain.recipe.documents import parse_document
from posttrain.report.charts import StageCharts, stage_charts
from posttrain.report.load import Evaluation, JsonDict, Run, StageLog, numbered_folders, read_json
from posttrain.ui.run_index import read_manifest

MOST_LOGS = 64
"""Stages whose logs are kept in memory."""


class TailedLog:
    """The records of a JSON Lines file, one a step; of a step that was made twice the later one counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset, self.inode = 0, 0
        self.by_step: dict[int, JsonDict] = {}

    def read(self) -> None:
        """Read the whole lines that were appended; a file that is shorter than it was is read from its beginning."""
        try:
            found = self.path.stat()
        except OSError:
            found = None
        if found is None or found.st_ino != self.inode or found.st_size < self.offset:
            self.offset, self.inode, self.by_step = 0, found.st_ino if found else 0, {}
        if found is None or found.st_size == self.offset:
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        for line in whole.split(b"\n"):
            try:
                record = json.loads(line) if line else None
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                self.by_step[record["step"]] = record

    def records(self) -> list[JsonDict]:
        """Return the records, ascending."""
        return [self.by_step[step] for step in sorted(self.by_step)]


class StageView:
    """A stage as it was at one look, with its charts, which are made when they are asked for.

    Attributes:
        stamp: Differs from that of another look if something was written in between.
        log: What it has written, as reports take it.
    """

    def __init__(self, stamp: tuple[int, ...], log: StageLog) -> None:
        self.stamp, self.log = stamp, log

    @cached_property
    def charts(self) -> StageCharts:
        """Return the charts."""
        return stage_charts(self.log)


class _LiveStage:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics, self.timings = (TailedLog(folder / name) for name in ("metrics.jsonl", "timings.jsonl"))
        self.view = StageView((), StageLog("", folder, {}, [], []))

    def look(self) -> StageView:
        self.metrics.read()
        self.timings.read()
        method = self.folder / "method.json"  # written before the first step, perhaps after the first look
        stamp = (self.metrics.inode, self.metrics.offset, self.timings.offset, int(method.is_file()))
        if stamp != self.view.stamp:
            found = (read_json(path, []) for path in (method, self.folder / "best_step.json"))
            described, chosen = (value if isinstance(value, dict) else {} for value in found)
            name, records = self.folder.name.split("-", 1)[1], (self.metrics.records(), self.timings.records())
            self.view = StageView(stamp, StageLog(name, self.folder, described, *records, chosen))
        return self.view


class LiveLogs:
    """The logs of the runs that somebody looks at; those that were looked at last are kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stages: OrderedDict[Path, _LiveStage] = OrderedDict()

    def stages(self, run: Path) -> list[StageView]:
        """Return the stages of a run, in order, with what they have written so far."""
        with self._lock:
            return [self._stage(folder) for folder in numbered_folders(run / "stages")]

    def _stage(self, folder: Path) -> StageView:
        stage = self._stages.setdefault(folder, _LiveStage(folder))
        self._stages.move_to_end(folder)
        while len(self._stages) > MOST_LOGS:
            self._stages.popitem(last=False)
        return stage.look()


def read_run(folder: Path, stages: list[StageView]) -> Run:
    """Return a run as reports read it, without the items of its evaluations, and without checking its files' hashes.

    Args:
        folder: Folder of the run.
        stages: Its stages.
    """
    manifest, evaluations = read_manifest(folder), folder / "evaluations"
    text, recipe = read_recipe(folder)
    comparison = read_json(evaluations / "comparison.json", [])
    return Run(
        folder=folder,
        manifest=manifest,
        recipe_text=text,
        recipe=recipe,
        stages=[stage.log for stage in stages],
        before=_summaries(evaluations / "before"),
        between={},
        after=_summaries(evaluations / "after"),
        comparison=[c for c in comparison or [] if isinstance(c, dict)],
        notes=[],
    )


def read_recipe(folder: Path) -> tuple[str, JsonDict]:
    """Return the recipe of a run as text and as plain data; both empty if it can't be read."""
    try:
        text = (folder / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
        data: Any = parse_document(text, "recipe.yaml").data
    except (OSError, RecipeError):
        return "", {}
    return text, data if isinstance(data, dict) else {}


def _summaries(folder: Path) -> dict[str, Evaluation]:
    names = [p.name.removesuffix(".json") for p in folder.glob("*.json") if not p.name.endswith(".samples.json")]
    read = {name: read_json(folder / f"{name}.json", []) for name in sorted(names)}
    return {name: Evaluation(value) for name, value in read.items() if isinstance(value, dict)}
