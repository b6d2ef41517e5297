"""The results of a sweep: of each combination of settings, every evaluation and loss, over its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table
from rich.text import Text

from posttrain.core.files import write_text
from posttrain.core.secrets import hide_values
from posttrain.core.statistics import t_interval
from posttrain.core.visible_text import visible
from posttrain.report.build import render_template
from posttrain.report.charts import Chart, Series, thin
from posttrain.report.formatting import format_number, format_score
from posttrain.report.load import JsonDict, Run, StageLog, read

TAIL = 0.1
"""Part of a stage's last steps, at least one, whose mean is its final loss."""
LINE_STYLES = ("s2", "s3", "s4", "s5", "s6", "s7", "s1", "s0")


@dataclass(frozen=True)
class SweepMeasure:
    """Hold one column of the results.

    Attributes:
        key: Its name: `after/TASK`, `STAGE/loss` or `STAGE/METRIC`.
        metric: Kind of figure for formatting: accuracy, perplexity, score, tokens/s, or empty.
    """

    key: str
    metric: str = ""


@dataclass(frozen=True)
class Cell:
    """Hold a measure of a combination.

    Attributes:
        values: One value a seed.
        low, high: 95% interval of the mean; None if there is one seed and the measure has no interval itself.
        of_items: The interval is that of one seed's evaluation over its items, not over seeds.
    """

    values: list[float]
    low: float | None = None
    high: float | None = None
    of_items: bool = False

    @property
    def mean(self) -> float:
        """Return the mean over seeds."""
        return fmean(self.values)


@dataclass(frozen=True)
class SweepRow:
    """Hold the results of a combination.

    Attributes:
        label: Its settings.
        values: Value of each varied setting, by its short name.
        state: What became of it: `done`, `2 of 3 seeds`, `stopped at 25%`, `failed: ...`.
        cells: By key of the measure.
        curves: Of each stage with a loss: (steps, one list of losses a seed).
    """

    label: str
    values: dict[str, str]
    state: str
    cells: dict[str, Cell] = field(default_factory=dict)
    curves: dict[str, tuple[list[int], list[list[float]]]] = field(default_factory=dict)


def read_combination(
    label: str, values: dict[str, str], state: str, runs: Sequence[Path], named: str | None
) -> tuple[SweepRow, list[SweepMeasure]]:
    """Return the results of a combination from the folders of its runs, and its measures.

    The final loss of a stage is the mean of its `loss` over the last tenth of its steps; its held-out loss is that of
    the step whose weights the model has, else the last one. Intervals over two or more seeds are Student's.

    Args:
        label: The combination's settings.
        values: Value of each varied setting.
        state: What became of it.
        runs: Folders of its runs, those that are there.
        named: `STAGE/METRIC` that is reported as well, over the last tenth of the steps. None: none.
    """
    found: dict[str, tuple[SweepMeasure, list[tuple[float, JsonDict]]]] = {}

    def add(measure: SweepMeasure, value: Any, about: JsonDict) -> None:
        if isinstance(value, int | float):
            found.setdefault(measure.key, (measure, []))[1].append((float(value), about))

    read_runs = [read(path) for path in runs if (path / "manifest.json").is_file()]
    for run in read_runs:
        for name, evaluation in run.after.items():
            summary = evaluation.summary
            add(SweepMeasure(f"after/{name}", str(summary.get("metric", ""))), summary.get("value"), summary)
        for stage in run.stages if run.status == "done" else ():
            for key, value in final_values(stage, named).items():
                add(SweepMeasure(key), value, {})
    cells = {key: _cell(pairs) for key, (_, pairs) in found.items()}
    return SweepRow(label, values, state, cells, _curves(read_runs)), [measure for measure, _ in found.values()]


def final_values(stage: StageLog, named: str | None = None) -> dict[str, float]:
    """Return the final loss, held-out loss and named metric of a stage, by STAGE/METRIC."""
    out: dict[str, float] = {}
    for metric in dict.fromkeys(("loss", (named or "").removeprefix(f"{stage.name}/"))):
        values = [float(r[metric]) for r in stage.metrics if metric in r and r.get("step", 0) > 0]
        if values:
            out[f"{stage.name}/{metric}"] = fmean(values[-max(1, round(TAIL * len(values))) :])
    held_out = [(r.get("step"), r["held_out/loss"]) for r in stage.metrics if "held_out/loss" in r]
    if held_out:
        chosen = [value for step, value in held_out if step == stage.chosen.get("model_step")]
        out[f"{stage.name}/held_out/loss"] = (chosen or [value for _, value in held_out])[-1]
    return out


def _cell(pairs: Sequence[tuple[float, JsonDict]]) -> Cell:
    values = [value for value, _ in pairs]
    if len(values) > 1:
        low, high = t_interval(values) or (None, None)
        return Cell(values, low, high)
    about = pairs[0][1]
    return Cell(values, about.get("low"), about.get("high"), "low" in about)


def _curves(runs: Sequence[Run]) -> dict[str, tuple[list[int], list[list[float]]]]:
    """Return the losses of each stage at the steps that all seeds have reached."""
    out: dict[str, tuple[list[int], list[list[float]]]] = {}
    for name in dict.fromkeys(stage.name for run in runs for stage in run.stages):
        logs = [s for run in runs for s in run.stages if s.name == name]
        tables = [{int(r["step"]): float(r["loss"]) for r in log.metrics if "loss" in r} for log in logs]
        steps = sorted(set.intersection(*map(set, tables))) if tables else []
        if steps:
            out[name] = steps, [[table[step] for step in steps] for table in tables]
    return out


def results_table(rows: Sequence[SweepRow], measures: Sequence[SweepMeasure], seeds: int) -> Table:
    """Return the table for the terminal.

    Args:
        rows: Results of the combinations.
        measures: Columns.
        seeds: Number of seeds.
    """
    caption = "mean over seeds with Student's 95% interval" if seeds > 1 else "one seed; intervals are over items"
    table = Table(title="Combinations", caption=caption)
    table.add_column("settings", overflow="fold")
    for measure in measures:
        table.add_column(measure.key, justify="right")
    table.add_column("state", overflow="fold")
    for row in rows:
        cells = [Text(in_words(row.cells.get(m.key), m.metric, "\n")) for m in measures]
        table.add_row(Text(visible(row.label)), *cells, Text(visible(row.state)))
    return table


def in_words(cell: Cell | None, metric: str, gap: str = " ") -> str:
    """Return a measure as text, with its interval; "–" if there is none.

    Args:
        cell: The measure. None: it was not measured.
        metric: Kind of figure, as in `SweepMeasure`.
        gap: Text between value and interval.
    """
    if cell is None:
        return "–"

    def shown(value: float | None) -> str:
        return format_score(value, metric) if metric else format_number(value)

    span = f"{gap}[{shown(cell.low)}, {shown(cell.high)}]" if cell.low is not None else ""
    return shown(cell.mean) + span


@dataclass(frozen=True)
class Lane:
    """Hold one line of a plot: places in percent of the axis."""

    label: str
    text: str
    at: float
    low: float
    high: float
    dots: list[float]


def lanes(rows: Sequence[SweepRow], measure: SweepMeasure) -> tuple[list[Lane], list[str]]:
    """Return the lines of a measure's plot, and the labels of five marks on its axis."""
    shown = [(row, row.cells[measure.key]) for row in rows if measure.key in row.cells]
    ends = [v for _, c in shown for v in (*c.values, c.low, c.high) if v is not None]
    start, end = min(ends), max(ends)
    pad = 0.04 * (end - start) or abs(end) * 0.05 or 1.0
    start, end = start - pad, end + pad

    def place(value: float | None, other: float) -> float:
        return round(100 * ((other if value is None else value) - start) / (end - start), 2)

    out = [
        Lane(row.label, in_words(c, measure.metric), place(c.mean, 0), place(c.low, c.mean), place(c.high, c.mean),
             [place(v, v) for v in c.values])
        for row, c in shown
    ]  # fmt: skip
    return out, [format_number(start + (end - start) * i / 4, 3) for i in range(5)]


def loss_charts(rows: Sequence[SweepRow]) -> list[Chart]:
    """Return a chart of the training loss for each stage: of each combination the mean over seeds at each step."""
    charts = []
    for stage in dict.fromkeys(name for row in rows for name in row.curves):
        series, every = [], 1
        for number, row in enumerate(r for r in rows if stage in r.curves):
            steps, losses = row.curves[stage]
            mean = [fmean(at) for at in zip(*losses, strict=True)]
            style = LINE_STYLES[number % len(LINE_STYLES)]
            line = "dashed" if number // len(LINE_STYLES) % 2 else ""
            one, each = thin(Series(row.label, steps, mean, style=style, line=line, points=len(steps) < 3))
            every = max(every, each)
            series.append(Series(one.name, one.x, one.y, style=style, line=line, points=one.points))
        spoken = f"Training loss of {len(series)} combinations by step"
        charts.append(Chart(f"{stage}.loss", f"{stage}: loss", "mean over seeds", series, spoken, every=1, log=True))
    return charts


def write_page(
    folder: Path, name: str, about: Mapping[str, Any], rows: Sequence[SweepRow], measures: Sequence[SweepMeasure]
) -> Path:
    """Write `sweep.html` into the sweep's folder: one file that opens offline; return its path.

    Args:
        folder: The sweep's folder.
        name: Name of the recipe.
        about: What was swept: `axes`, `seeds` and, with early stopping, `halving` and `rungs` in sentences.
        rows: Results of the combinations.
        measures: Their measures.
    """
    plots = [(m, *lanes(rows, m)) for m in measures]
    page = render_template(
        "sweep.html.j2", name=name, about=about, rows=rows, measures=measures, plots=plots, charts=loss_charts(rows),
        cell=in_words,
    )  # fmt: skip
    target = folder / "sweep.html"
    write_text(target, hide_values(page))
    return target
