"""Prepare what was measured after every stage for the page: size, speed and quality, and their trade-off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from posttrain.core.errors import DataError
from posttrain.core.item_statistics import compare
from posttrain.report.charts import Chart, Series
from posttrain.report.formatting import format_number, format_score
from posttrain.report.load import Evaluation, JsonDict, Run, TaskRow

STYLES = ("s0", "s2", "s3", "s4", "s5", "s6", "s7")
"""Colours of the stages."""
STAGE_SIZES = {
    "parameters": ("Parameters", "", 1e6),
    "disk_bytes": ("On disk", "MB", 1e6),
    "packed_bytes": ("Read in decoding", "MB", 1e6),
    "memory_bytes": ("In memory", "MB", 1e6),
    "peak_memory": ("Peak memory", "MB", 1e6),
}
"""Sizes of an evaluation of kind speed: title, unit, divisor."""
AXIS_WORDS = {"packed_bytes": "bytes read in decoding", "disk_bytes": "size on disk", "memory_bytes": "size in memory"}
"""Sizes that charts are drawn over, the first that all stages have."""
STAGE_RATES = {
    "prefill": "Prefill",
    "decode": "Decoding",
    "batch": "Decoding a batch",
    "decode_int8": "Decoding, int8 cache",
    "batch_int8": "Decoding a batch, int8 cache",
}
"""Rates of such an evaluation, in tokens a second, and their titles."""


@dataclass(frozen=True)
class StageFigure:
    """Hold a task's figure after a stage.

    Attributes:
        summary: Value with its interval.
        start: Paired comparison with the model before the first stage; None: it is that model, or there is none.
        previous: The same with the stage before, if that is not the start.
    """

    summary: JsonDict
    start: JsonDict | None
    previous: JsonDict | None


@dataclass(frozen=True)
class StageLine:
    """Hold a line of the table: the model before the first stage, or what a stage left.

    Attributes:
        name: `before`, or `after` and the name of the stage.
        sizes: By key of STAGE_SIZES, as tables show it: (number, text).
        rates: By key of STAGE_RATES: value, low and high.
        figures: Of each task; None: not measured.
    """

    name: str
    sizes: dict[str, tuple[float, str]]
    rates: dict[str, JsonDict]
    figures: list[StageFigure | None]


@dataclass(frozen=True)
class StageComparison:
    """Hold the table and its charts; `sizes` and `rates` are (key, title) of what was measured."""

    tasks: list[TaskRow]
    sizes: list[tuple[str, str]]
    rates: list[tuple[str, str]]
    lines: list[StageLine]
    charts: list[Chart]


def compare_stages(run: Run) -> StageComparison | None:
    """Return what was measured stage by stage; None if the run measured before and after alone, and no speed."""
    sides = _sides(run)
    speeds = {name: _speed(side) for name, side in sides.items()}
    if len(sides) < 2 or not (run.between or any(speeds.values())):
        return None
    columns = [[side.get(row.task, Evaluation()) for side in sides.values()] for row in run.rows()]
    # A task that was measured at both ends alone, such as one that needs what a stage makes, is in the other table.
    chosen = [
        (row, column)
        for row, column in zip(run.rows(), columns, strict=True)
        if not run.between or any(e.summary for e in column[1:-1])
    ]
    seed = int(run.manifest.get("seed") or 0)
    figures = [_figures(row, column, seed) for row, column in chosen]
    if not figures and not any(speeds.values()):
        return None
    lines = [
        StageLine(name, _sizes(speeds[name]), dict(speeds[name].get("rates") or {}), [column[i] for column in figures])
        for i, name in enumerate(sides)
    ]
    tasks = [row for row, _ in chosen]
    return StageComparison(
        tasks,
        [(key, title) for key, (title, _, _) in STAGE_SIZES.items() if any(key in line.sizes for line in lines)],
        [(key, title) for key, title in STAGE_RATES.items() if any(key in line.rates for line in lines)],
        lines,
        [chart for i, row in enumerate(tasks) for chart in _charts(row, lines, i)],
    )


def _sides(run: Run) -> dict[str, dict[str, Evaluation]]:
    """Return the evaluations by line of the table, in the order of the stages."""
    named = [str(s.get("name")) for s in run.manifest.get("stages") or []]
    stages = [name for name in named if run.makes(name) == "model"]
    last = next((n for n in reversed(stages) if n not in run.between), "")
    sides = {"before": run.before, **{f"after {n}": side for n, side in run.between.items()}}
    return sides | {f"after {last}" if last else "after": run.after} if run.after else sides


def _speed(side: Mapping[str, Evaluation]) -> JsonDict:
    """Return the summary of the first evaluation of kind speed; empty if there is none."""
    return next((e.summary for e in side.values() if e.summary.get("kind") == "speed"), {})


def _sizes(speed: JsonDict) -> dict[str, tuple[float, str]]:
    out = {}
    for key, (_, unit, divisor) in STAGE_SIZES.items():
        if isinstance(speed.get(key), int | float):
            value = float(speed[key])
            out[key] = value, f"{format_number(value / divisor, 4)} {unit or 'M'}"
    return out


def _figures(row: TaskRow, column: Sequence[Evaluation], seed: int) -> list[StageFigure | None]:
    """Return a task's figure of each line, compared item by item with the first and with the one before."""
    out: list[StageFigure | None] = []
    measured: list[Evaluation] = []
    for evaluation in column:
        if not evaluation.summary:
            out.append(None)
            continue
        start = _compared(measured[0], evaluation, row, seed) if measured else None
        previous = _compared(measured[-1], evaluation, row, seed) if len(measured) > 1 else None
        out.append(StageFigure(evaluation.summary, start, previous))
        measured.append(evaluation)
    return out


def _compared(old: Evaluation, new: Evaluation, row: TaskRow, seed: int) -> JsonDict | None:
    if not old.items or not new.items:
        return None
    try:
        return compare(old.items, new.items, row.kind, seed=seed)
    except (DataError, KeyError, TypeError, ValueError):  # other items, or damaged ones, which the page names
        return None


def _charts(row: TaskRow, lines: Sequence[StageLine], number: int) -> list[Chart]:
    """Return a task's figure against the size and the speed of each stage, as far as they were measured."""
    size = next((key for key in AXIS_WORDS if all(key in line.sizes for line in lines)), "")
    axes = []
    if size:
        axes.append((f"{AXIS_WORDS[size]}, MB", [line.sizes[size][0] / 1e6 for line in lines], False))
    if all("decode" in line.rates for line in lines):
        axes.append(("speed of decoding, tokens/s", [float(line.rates["decode"]["value"]) for line in lines], True))
    figures = [line.figures[number] for line in lines]
    if any(f is None for f in figures) or len({line.name for line in lines}) < 2 or row.kind == "behaviour":
        return []  # more of a behaviour is not better: no stage can beat another
    summaries = [f.summary for f in figures if f is not None]
    return [_chart(row, [line.name for line in lines], summaries, title, x, more) for title, x, more in axes]


def _chart(
    row: TaskRow, names: Sequence[str], summaries: Sequence[JsonDict], across: str, x: Sequence[float], more: bool
) -> Chart:
    """Return a chart of one point a stage with its interval, and the frontier: what no other stage beats in both.

    Args:
        row: The task.
        names: Names of the lines.
        summaries: Figures of the lines.
        across: Name and unit of what lies across.
        x: Its values.
        more: More of it is better.
    """
    higher = row.metric != "perplexity"
    y = [float(s["value"]) for s in summaries]
    best = frontier(x, y, more, higher)
    percent = row.metric == "accuracy"
    series = [
        Series("no stage is better in both", [x[i] for i in best], [y[i] for i in best], style="s1", line="dashed")
    ]
    for i, (name, summary) in enumerate(zip(names, summaries, strict=True)):
        low, high = float(summary["low"]), float(summary["high"])
        label = (
            f"{name}: {format_score(y[i], row.metric)} ({format_score(low, row.metric)} to "
            f"{format_score(high, row.metric)}) at {format_number(x[i], 4)} {across.split(', ')[-1]}"
        )
        series.append(Series(name, [x[i]], [y[i]], [low], [high], STYLES[i % len(STYLES)], line="none", points=True,
                             labels=[label], sizes=[11.0]))  # fmt: skip
    limits = [float(s[k]) for s in summaries for k in ("low", "high")]
    pad = 0.08 * (max(limits) - min(limits)) or 0.05
    room = 0.12 * (max(x) - min(x)) or 0.1 * max(x)
    title = f"{row.task} by {across.split(', ')[0]}"
    spoken = "; ".join(s.labels[0] for s in series[1:])
    return Chart(
        f"{row.task}.{across.split(', ')[0].replace(' ', '_')}",
        title,
        f"{row.metric}, over {across}",
        series,
        f"{title}. {spoken}",
        x=across,
        x_range=(max(0.0, min(x) - room), max(x) + room),
        y_range=(max(0.0, min(limits) - pad) if row.metric != "score" else min(limits) - pad,
                 min(1.0, max(limits) + pad) if percent else max(limits) + pad),
        percent=percent,
        better="higher" if higher else "lower",
        named=True,
    )  # fmt: skip


def frontier(x: Sequence[float], y: Sequence[float], more: bool, higher: bool) -> list[int]:
    """Return the points that no other point beats or equals in both while being better in one, by ascending x.

    Args:
        x: Costs, or rates.
        y: Quality.
        more: A larger x is better.
        higher: A larger y is better.
    """
    a, b = [v if more else -v for v in x], [v if higher else -v for v in y]
    points = range(len(x))
    kept = [
        i for i in points if not any(a[j] >= a[i] and b[j] >= b[i] and (a[j] > a[i] or b[j] > b[i]) for j in points)
    ]
    return sorted(kept, key=lambda i: x[i])
