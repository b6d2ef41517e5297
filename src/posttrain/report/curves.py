"""Give the curves of a run to a notebook or a script: a table of every step, a figure, the results as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from posttrain.core.errors import CheckpointError, MissingExtraError
from posttrain.core.visible_text import visible
from posttrain.report.charts import Chart, Series, flatten_phases, stage_charts
from posttrain.report.formatting import format_p, format_score
from posttrain.report.load import JsonDict, Run, StageLog, TaskRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

LEFT_OUT = "Speed and memory"
"""Group of charts that a figure has only if its metrics are named."""
CHARTS_ACROSS = 3
"""Most charts of a figure beside each other."""


def curve_table(run: Run, stage: str | None = None) -> DataFrame:
    """Return a table with a row for each step of each stage, in order.

    The columns are `stage`, `step` and every key of metrics.jsonl and timings.jsonl; seconds by phase are phases/NAME.
    A metric that a step did not log is NaN there. Step 0 holds what was measured before training.

    Args:
        run: The run, finished or not.
        stage: Name of the only stage to return. None: all.

    Raises:
        CheckpointError: No stage with this name has logged a step.
    """
    import pandas

    records = [
        {"stage": log.name, "step": step, **record} for log in _stages(run, stage) for step, record in _steps(log)
    ]
    return pandas.DataFrame.from_records(records) if records else pandas.DataFrame(columns=["stage", "step"])


def _stages(run: Run, name: str | None) -> list[StageLog]:
    """Return the stages that have logged steps; if `name` is given, the one with this name."""
    logged = [log for log in run.stages if log.metrics]
    chosen = [log for log in logged if name in (None, log.name)]
    if name is not None and not chosen:
        have = ", ".join(log.name for log in logged) or "none yet"
        raise CheckpointError(f"{run.folder} has no steps of a stage {name!r}; stages with steps: {have}")
    return chosen


def _steps(log: StageLog) -> list[tuple[int, JsonDict]]:
    """Return each step of a stage with its metrics and timings."""
    timings = {record["step"]: flatten_phases(record) for record in log.timings}
    return [(record["step"], {**timings.get(record["step"], {}), **record}) for record in log.metrics]


def curve_figure(run: Run, metrics: Sequence[str] = (), stage: str | None = None) -> Figure:
    """Return a matplotlib figure with the charts of the report's page: values, held-out values, intervals.

    Args:
        run: The run, finished or not.
        metrics: Columns of `curve_table` to draw, a chart each. Empty: the charts that the page shows unfolded, without
            those of speed and memory.
        stage: Name of the only stage to draw. None: all.

    Raises:
        CheckpointError: There is no step to draw yet, or no stage with this name has one.
        MissingExtraError: matplotlib is not installed.
        ValueError: A metric was not logged.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise MissingExtraError("figures need the package matplotlib: pip install 'posttrain[notebook]'") from error
    logs = _stages(run, stage)
    charts = [(log.name, chart) for log in logs for chart in _charts(log, metrics)]
    missing = [name for name in metrics if not any(chart.key.endswith(f".{name}") for _, chart in charts)]
    if missing:
        known = sorted({key for log in logs for _, record in _steps(log) for key in record})
        raise ValueError(f"no metric {missing[0]!r} was logged; there are: {', '.join(known)}")
    if not charts:
        raise CheckpointError(f"{run.folder} has no curve to draw yet: no stage has logged two steps")
    across = min(CHARTS_ACROSS, len(charts))
    down = -(-len(charts) // across)
    size = (4.2 * across, 2.8 * down)
    figure, axes = plt.subplots(down, across, squeeze=False, figsize=size, layout="constrained")
    for place, (name, chart) in zip(axes.flat, charts, strict=False):
        _draw(place, chart, f"{name}: {chart.title}" if len(logs) > 1 else chart.title)
    for place in axes.flat[len(charts) :]:
        place.remove()
    if "inline" in plt.get_backend():  # the notebook shows what a cell returns; an open figure would appear twice
        plt.close(figure)
    return figure


def _charts(log: StageLog, metrics: Sequence[str]) -> list[Chart]:
    """Return the charts of a stage: of the named metrics that it logged, in this order, or those of its page."""
    found = stage_charts(log)
    if not metrics:
        return [chart for group, charts in found.groups if group != LEFT_OUT for chart in charts]
    known = {chart.key: chart for _, charts in [*found.groups, *found.folded] for chart in charts}
    steps = _steps(log)
    charts = []
    for name in metrics:
        pairs = [(step, record[name]) for step, record in steps if isinstance(record.get(name), int | float)]
        if pairs:  # what never changes, or is drawn into another chart, has no chart on the page
            x, y = [step for step, _ in pairs], [value for _, value in pairs]
            plain = Series("", x, y, points=len(pairs) == 1)
            key = f"{log.name}.{name}"
            charts.append(known.get(key) or Chart(key, name, "", [plain]))
    return charts


def _draw(axes: Axes, chart: Chart, title: str) -> None:
    """Draw one chart."""
    for series in chart.series:
        style = {"": "-", "dashed": "--", "none": ""}[series.line]
        marker = "o" if series.points else ""
        (line,) = axes.plot(series.x, series.y, style, marker=marker, markersize=4, label=series.name or "_")
        if series.low:
            axes.fill_between(series.x, series.low, series.high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel(chart.unit)
    axes.spines[["top", "right"]].set_visible(False)
    if any(series.name for series in chart.series):
        axes.legend(fontsize=8, frameon=False)


def results_html(run: Run, lines: Sequence[tuple[str, Any]]) -> str:
    """Return the tasks before and after with 95% intervals as an HTML table, and named lines below it.

    Args:
        run: The run.
        lines: Name and text of each line.
    """
    head = Markup("<tr><th>task</th><th>items</th><th>before</th><th>after</th><th>difference</th><th>p</th></tr>")
    rows = [_row(row) for row in run.rows()]
    table = Markup("<table>{}{}</table>").format(head, Markup("").join(rows)) if rows else Markup("")
    below = [Markup("{}: <code>{}</code>").format(name, visible(str(text))) for name, text in lines]
    return str(table + Markup("<br>").join(below))


def _row(row: TaskRow) -> Markup:
    def span(side: JsonDict | None, key: str = "value") -> str:
        names = (key, "low", "high")
        value, low, high = (format_score((side or {}).get(k), row.metric, key == "difference") for k in names)
        return f"{value} [{low}, {high}]" if side else "–"

    change = row.comparison
    cells = [visible(row.task), f"{row.n:,}", span(row.before), span(row.after), span(change, "difference")]
    cells.append(format_p((change or {}).get("p_value")))
    return Markup("<tr>{}</tr>").format(Markup("").join(Markup("<td>{}</td>").format(escape(c)) for c in cells))
