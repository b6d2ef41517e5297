"""Make the tables that a run ends with in the terminal: before and after, what many samples are worth, lm-eval's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from posttrain.core.visible_text import visible
from posttrain.report.behaviour import BehaviourView
from posttrain.report.evaluations import samples, strategy
from posttrain.report.formatting import format_number, format_p, format_score
from posttrain.report.load import Run, read, read_json
from posttrain.report.refinements import refining_in_words
from posttrain.report.stage_comparison import StageFigure, compare_stages

SHOWN_ANSWERS = 5
"""Rows of a table of answers."""
ANSWER_CHARACTERS = 240
"""Longest text in such a table."""


def summary_table(run: Run | Path) -> Table:
    """Return a table of tasks: items, before, after, difference, p and intervals; "–" for what was not measured.

    Raises:
        CheckpointError: There is no such folder.
    """
    table = Table(title="Before and after, with 95% intervals")
    table.add_column("task", overflow="fold")
    for name in ("before", "after", "difference", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    run = run if isinstance(run, Run) else read(run)
    notes = "\n".join(f"! {note}" for note in run.flat)
    table.caption = Text(visible(notes)) if notes else None
    for row in run.rows():

        def span(side: dict[str, Any] | None, key: str = "value", metric: str = row.metric) -> Text:
            if side is None:
                return Text("–")
            sign = key == "difference"
            value, low, high = (format_score(side.get(k), metric, sign) for k in (key, "low", "high"))
            return Text(f"{value}\n[{low}, {high}]")  # a text: in a string brackets are rich's markup

        won = (row.comparison or {}).get("wins")
        beats = f"\nwins {won['value']:.3f}\n[{won['low']:.3f}, {won['high']:.3f}]" if won else ""
        p = format_p((row.comparison or {}).get("p_value"))
        table.add_row(
            Text(visible(f"{row.task}\n{row.n:,} items{beats}" + (f"\n{row.failed}" if row.failed else ""))),
            span(row.before),
            span(row.after),
            span(row.comparison, "difference"),
            p,
        )
    return table


def stage_tables(run: Run) -> list[Table]:
    """Return a table of size, speed and tasks stage by stage; none if the run measured before and after alone."""
    found = compare_stages(run)
    if found is None:
        return []
    table = Table(title="Stage by stage; differences from the start, with 95% intervals")
    table.add_column("model", overflow="fold")
    sizes = [(key, title) for key, title in found.sizes if key in ("disk_bytes", "memory_bytes")][:1]
    for name in [*(t for _, t in sizes), *(f"{t}, tokens/s" for _, t in found.rates), *(r.task for r in found.tasks)]:
        table.add_column(visible(name), justify="right")
    for line in found.lines:
        cells = [line.sizes[key][1] if key in line.sizes else "–" for key, _ in sizes]
        cells += [format_number(line.rates.get(key, {}).get("value"), 3) for key, _ in found.rates]
        of_tasks = zip(line.figures, found.tasks, strict=True)
        table.add_row(visible(line.name), *cells, *(_of_stage(figure, row.metric) for figure, row in of_tasks))
    return [table]


def _of_stage(figure: StageFigure | None, metric: str) -> Text:
    if figure is None:
        return Text("–")
    text = format_score(figure.summary.get("value"), metric)
    if figure.start is None:
        return Text(text)
    change, low, high = (format_score(figure.start[key], metric, True) for key in ("difference", "low", "high"))
    return Text(f"{text}\n{change}\n[{low}, {high}]")


def answer_tables(run: Run) -> list[Table]:
    """Return a table for each task of a loss whose model also answered some prompts: answers before and after.

    Long texts are cut; the report shows them whole.
    """
    tables = []
    for row in run.rows():
        found = samples(row, run) if row.kind == "perplexity" else None
        if found is None or not found.greedy:
            continue
        table = Table(title=f"{visible(row.task)}: greedy answers to the same prompts", show_lines=True)
        for name in ("prompt", "expected", "before", "after"):
            table.add_column(name, overflow="fold", ratio=1)
        for card in found.greedy[:SHOWN_ANSWERS]:
            table.add_row(*(Text(_cut(text)) for text in (card.prompt, card.expected, card.before, card.after)))
        tables.append(table)
    return tables


def _cut(text: str) -> str:
    """Return the text in one paragraph as a terminal may show it, and at most ANSWER_CHARACTERS of it."""
    flat = visible(" ".join(text.split()))
    return flat if len(flat) <= ANSWER_CHARACTERS else f"{flat[: ANSWER_CHARACTERS - 1].rstrip()}…"


def sampling_tables(folder: Path) -> list[Table]:
    """Return a table for each task of many samples in a folder: strategies by k with intervals, and tokens spent.

    A task of self-refine has sentences on refining below its table.
    """
    tables = []
    for path in sorted(Path(folder).glob("*.json")):
        summary = read_json(path, [])  # the page names what is damaged
        if not isinstance(summary, dict) or not summary.get("strategies"):
            continue
        last = len(summary["strategies"][0]["points"]) - 1
        chosen = sorted({0, (last + 1) // 2, last})
        table = Table(title=f"{summary['task']}: what k of {summary['samples']} samples are worth, {folder.name}")
        table.add_column("strategy", overflow="fold")
        for i in chosen:
            point = summary["strategies"][0]["points"][i]
            table.add_column(f"k = {point['k']}\n{point['tokens']:,.0f} tokens", justify="right", no_wrap=True)
        for entry in summary["strategies"]:
            cells = []
            for i in chosen:
                value, low, high = (
                    format_score(entry["points"][i][key], "accuracy") for key in ("value", "low", "high")
                )
                cells.append(Text(f"{value}\n[{low}, {high}]"))
            table.add_row(Text(visible(strategy(entry["name"]))), *cells)
        if "refine" in summary:
            table.caption = refining_in_words(summary["refine"])
        tables.append(table)
    return tables


def evaluation_tables(folder: Path) -> list[Table]:
    """Return the tables of evaluations in a folder that have more than one figure."""
    return [*sampling_tables(folder), *lm_eval_tables(folder), *ifeval_tables(folder)]


def ifeval_tables(folder: Path) -> list[Table]:
    """Return a table for each evaluation of verifiable instructions in a folder: IFEval's four shares."""
    tables = []
    for path in sorted(Path(folder).glob("*.json")):
        summary = read_json(path, [])
        found = summary.get("ifeval") if isinstance(summary, dict) else None
        if isinstance(found, dict):
            table = Table(title=Text(visible(f"{summary['task']}: verifiable instructions followed, {folder.name}")))
            for name in ("", "strict", "loose"):
                table.add_column(name, justify="right" if name else "left")
            for unit in ("prompt", "instruction"):
                cells = [format_score(found[f"{unit}_{mode}"], "accuracy") for mode in ("strict", "loose")]
                table.add_row(f"{unit}s", *cells)
            tables.append(table)
    return tables


def lm_eval_tables(folder: Path) -> list[Table]:
    """Return a table for each evaluation by lm-eval in a folder: its own metrics, with their standard errors."""
    tables = []
    for path in sorted(Path(folder).glob("*.json")):
        summary = read_json(path, [])
        found = summary.get("lm_eval") if isinstance(summary, dict) else None
        if not isinstance(found, dict):
            continue
        table = Table(title=Text(visible(f"{summary['task']}: lm-eval's own figures, {folder.name}")))
        for name in ("task", "metric", "filter", "shots", "value", "standard error"):
            table.add_column(name, justify="right" if name in ("shots", "value", "standard error") else "left")
        for task, values in {**found["results"], **found["groups"]}.items():
            for key, value in values.items():
                metric, _, chosen = key.partition(",")
                if not metric.endswith("_stderr"):
                    error = values.get(f"{metric}_stderr,{chosen}")
                    cells = (task, metric, chosen, found["shots"].get(task, ""), _plain(value))
                    shown = "–" if error is None else _plain(error)
                    table.add_row(*(Text(visible(str(cell))) for cell in (*cells, shown)))
        tables.append(table)
    return tables


def _plain(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4e}"


def figure_table(view: BehaviourView) -> Table:
    """Return a table of the figures of an evaluation of behaviour: before, and after with the difference if known."""
    both = any(line.after for line in view.lines)
    table = Table(title=f"{visible(view.task)} ({view.metric}): figures, with 95% intervals")
    table.add_column("figure", overflow="fold")
    for name in ("before", "after", "difference", "p") if both else ("n", "value"):
        table.add_column(name, justify="right", no_wrap=True)

    def cell(side: dict[str, Any] | None, key: str = "value") -> Text:
        names = (key, "low", "high")
        value, low, high = (format_score((side or {}).get(k), "figure", key == "difference") for k in names)
        return Text(f"{value}\n[{low}, {high}]" if side else "–")

    for line in view.lines:
        cells = [cell(line.before), cell(line.after), cell(line.change, "difference")]
        cells.append(Text(format_p((line.change or {}).get("p_value"))))
        alone = [Text(f"{(line.before or {}).get('n', 0):,}"), cell(line.before)]
        table.add_row(Text(visible(line.name)), *(cells if both else alone))
    return table
