"""Make the pages: each a function of what is served and the query of its address."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

from posttrain.core.errors import DataError
from posttrain.report.charts import RUN_STYLES
from posttrain.report.formatting import yaml_markup
from posttrain.ui.chat_models import ChatModels, read_votes
from posttrain.ui.lineage_graph import HEIGHT, WIDTH, lineage_graph
from posttrain.ui.live_logs import LiveLogs, read_recipe, read_run
from posttrain.ui.recipe_form import OPEN_BLOCKS, recipe_blocks, recipe_choices
from posttrain.ui.rollout_pages import RowQuery
from posttrain.ui.run_comparison import MOST_RUNS, different_settings, short_names, stage_groups, task_lanes
from posttrain.ui.run_index import RUN_LOG, STATUSES, RunEntry, RunIndex
from posttrain.ui.started_runs import StartedRuns
from posttrain.ui.stored_rows import row_sources, source_named
from posttrain.ui.templates import render_ui

Query = Mapping[str, Sequence[str]]
ORDERS = ("newest", "oldest", "best", "worst")
LOG_SHOWN = 24_000
"""Characters of the end of a run's log that are shown."""


@dataclass
class UiState:
    """Hold what is served.

    Attributes:
        index: The runs.
        votes: File that votes are appended to.
        logs: What runs write.
        started: Runs that were started here.
        chats: Models that are open.
    """

    index: RunIndex
    votes: Path
    logs: LiveLogs = field(default_factory=LiveLogs)
    started: StartedRuns = field(default_factory=StartedRuns)
    chats: ChatModels = field(default_factory=ChatModels)

    def __post_init__(self) -> None:
        self.index.is_alive = self.started.is_alive

    def run_of(self, query: Query) -> RunEntry:
        """Return the run that a query names. Raises CheckpointError if there is no such run."""
        return self.index.entry(value(query, "run"))


def value(query: Query, name: str) -> str:
    """Return a value of a query; empty if it is missing."""
    return next(iter(query.get(name, ())), "")


def _number(query: Query, name: str) -> float | None:
    text = value(query, name).strip()
    try:
        return float(text) if text else None
    except ValueError:
        raise DataError(f"{name}: expected a number, got {text[:40]!r}") from None


def _unchanged(query: Query, stamp: str) -> bool:
    """Return True if a page that asks for news has this state already."""
    return value(query, "seen") == stamp


def _stamp(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def runs_page(state: UiState, query: Query) -> str | None:
    """Return the list of runs; None if nothing has changed since the page was made that asks."""
    entries = state.index.entries()
    stamp = _stamp(entries)
    if _unchanged(query, stamp):
        return None
    counts = {status: sum(e.status == status for e in entries) for status in STATUSES}
    return render_ui("runs.html.j2", here="/", entries=entries, counts=counts, stamp=stamp, roots=state.index.roots,
                     most=MOST_RUNS, when=_when)  # fmt: skip


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else ""


def run_page(state: UiState, query: Query) -> str | None:
    """Return the page of a run; None as for `runs_page`."""
    entry = state.run_of(query)
    stages, log = state.logs.stages(entry.folder), run_log(entry.folder)
    stamp = _stamp(entry, state.started.is_alive(entry.folder), [s.stamp for s in stages], len(log), log[-200:])
    if _unchanged(query, stamp):
        return None
    run = read_run(entry.folder, stages)
    curves = [
        (number, view.log.name, view.charts)
        for number, view in enumerate(stages, 1)
        if run.makes(view.log.name) != "data" or not view.charts.empty
    ]
    return render_ui(
        "run.html.j2", here="/", entry=entry, run=run, curves=curves, tasks=task_lanes([entry.name], [run]),
        can_stop=state.started.is_alive(entry.folder), stamp=stamp, log=log,
        recipe=yaml_markup(run.recipe_text), link=_link,
    )  # fmt: skip


def run_log(folder: Path) -> str:
    """Return the end of what a run that was started here has printed; empty for other runs."""
    try:
        with (folder / RUN_LOG).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - LOG_SHOWN))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return text if size <= LOG_SHOWN else text.partition("\n")[2]


def _link(page: str, **query: str) -> str:
    return f"{page}?{urlencode({k: v for k, v in query.items() if v})}"


def compare_page(state: UiState, query: Query) -> str | None:
    """Return several runs beside each other; None as for `runs_page`."""
    keys = list(dict.fromkeys(query.get("run", ())))
    if not 2 <= len(keys) <= MOST_RUNS:
        raise DataError(f"{len(keys)} runs are selected: choose 2 to {MOST_RUNS} in the list of runs")
    entries = [state.index.entry(key) for key in keys]
    views = [state.logs.stages(e.folder) for e in entries]
    stamp = _stamp(entries, [[v.stamp for v in of_run] for of_run in views])
    if _unchanged(query, stamp):
        return None
    names, runs = short_names(keys), [read_run(e.folder, v) for e, v in zip(entries, views, strict=True)]
    return render_ui(
        "compare.html.j2", here="/", entries=list(zip(names, entries, RUN_STYLES, strict=False)),
        settings=different_settings([run.recipe for run in runs]), stages=stage_groups(names, views),
        tasks=task_lanes(names, runs), stamp=stamp, link=_link,
    )  # fmt: skip


def rows_page(state: UiState, query: Query) -> str:
    """Return a page of the rows that a run has stored."""
    entry = state.run_of(query)
    sources = row_sources(entry.folder, read_recipe(entry.folder)[1])
    source = source_named(sources, value(query, "rows")) if sources else None
    order = value(query, "order") or ORDERS[0]
    if order not in ORDERS:
        raise DataError(f"order: expected {', '.join(ORDERS)}, got {order[:40]!r}")
    asked = RowQuery(value(query, "text"), _number(query, "low"), _number(query, "high"), value(query, "finish"),
                     order, value(query, "at"))  # fmt: skip
    page = source.page(asked) if source else None
    kept = {name: value(query, name) for name in ("run", "rows", "text", "low", "high", "finish", "order")}
    following = _link("/rows", **kept, at=page.following) if page and page.following else ""
    return render_ui("rows.html.j2", here="/", entry=entry, sources=sources, source=source, query=query, asked=asked,
                     page=page, following=following, orders=ORDERS, link=_link, value=value)  # fmt: skip


def data_page(state: UiState, query: Query) -> str:
    """Return the data of a run as the model sees it."""
    entry = state.run_of(query)
    run = read_run(entry.folder, [])
    names = [str(s.get("name")) for key in ("stages", "evaluate") for s in run.recipe.get(key) or [] if "name" in s]
    return render_ui("run_data.html.j2", here="/", entry=entry, run=run, link=_link,
                     manifest=run.manifest, names=names)  # fmt: skip


def lineage_page(state: UiState, query: Query) -> str:
    """Return the graph of what a run comes from, and of what begins with it."""
    entry = state.run_of(query)
    graph = lineage_graph(entry.folder, state.index.entries())
    return render_ui("lineage.html.j2", here="/", entry=entry, graph=graph, link=_link, box=(WIDTH, HEIGHT))


def chat_page(state: UiState, query: Query) -> str:
    """Return the page to talk to one or two models."""
    runs = [e for e in state.index.entries() if e.status == "done" and (e.folder / "model").is_dir()]
    votes = read_votes(state.votes)
    given = [*query.get("model", ()), "", ""]
    return render_ui("chat.html.j2", here="/chat", models=[e.key for e in runs], votes=votes, file=state.votes,
                     first=given[0], second=given[1], link=_link)  # fmt: skip


def start_page(state: UiState, query: Query) -> str:
    """Return the form of a recipe's settings."""
    recipe = value(query, "recipe")
    blocks = recipe_blocks(recipe) if recipe else []
    return render_ui("start.html.j2", here="/start", recipe=recipe, recipes=recipe_choices(), blocks=blocks,
                     root=state.index.roots[0], unfolded=OPEN_BLOCKS)  # fmt: skip


PAGES: dict[str, Callable[[UiState, Query], str | None]] = {
    "": runs_page,
    "/run": run_page,
    "/compare": compare_page,
    "/rows": rows_page,
    "/data": data_page,
    "/lineage": lineage_page,
    "/chat": chat_page,
    "/start": start_page,
}
"""Pages by their path."""
