"""Turn numbers into charts: the data that page/chart.js draws with uPlot, grouped as the method's metrics say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from posttrain.core.types import Metric
from posttrain.report.formatting import format_number
from posttrain.report.load import JsonDict, StageLog

POINTS = 1000
"""Steps drawn one by one; of more, means over equal runs of them are drawn."""
ROUNDING = 1e-6
"""Values of both signs that are all smaller are rounding errors around 0."""
RUN_STYLES = ("s2", "s3", "s4", "s5", "s6", "s7", "s1", "s0")
"""Colours of runs over each other, in their order."""
FOLDED_GROUPS = ("Details", "Other")

COMMON = (
    Metric("loss", "Loss", "", "Training", "lower"),
    Metric("grad_norm", "Gradient norm", "before clipping", "Training"),
    Metric("lr", "Learning rate", "", "Training"),
    Metric("router_loss", "Router loss", "balance of experts", "Training", "lower"),
    Metric("tokens_per_second", "Speed", "tokens/s", "Speed and memory", "higher"),
    Metric("memory_mb", "Memory", "peak so far, MB", "Speed and memory", "lower"),
    Metric("seconds", "Time", "s/step", "Speed and memory", "lower"),
    Metric("phases/sample", "Time: sampling", "s/step", "Speed and memory", "lower"),
    Metric("phases/learn", "Time: training", "s/step", "Speed and memory", "lower"),
    Metric("held_out_seconds", "Time: held-out rows", "s/measurement", "Details", "lower"),
    Metric("sampled_tokens", "Sampled tokens", "per step", "Speed and memory"),
    Metric("learned_tokens", "Trained tokens", "per step, prompts included", "Speed and memory"),
    Metric("phases/*", "Time: *", "s/step", "Details", "lower"),
    Metric("tokens", "Tokens", "per step", "Details"),
    Metric("loss_tokens", "Tokens with loss", "per step", "Details"),
    Metric("computed_tokens", "Computed tokens", "per step, shared prefixes once", "Details"),
    Metric("micro_batches", "Micro-batches", "per step", "Details"),
)
"""Metrics that all training stages log; those that a method describes itself take precedence."""
HIDDEN = ("step", "skipped", "epoch")


@dataclass(frozen=True)
class Series:
    """Hold one curve of a chart.

    Attributes:
        style: CSS variable with its colour.
        low, high: Limits of the band around it, such as a 95% interval.
        line: Empty for a solid line, `dashed`, or `none`.
        points: Whether each value gets a point.
        smooth: Whether the page's smoothing applies.
        labels: What the caption says of each point, in place of its number.
        sizes: Diameters of points that have an interval each, drawn as a bar, in pixels.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    style: str = "accent"
    line: str = ""
    points: bool = False
    smooth: bool = False
    labels: Sequence[str] = ()
    sizes: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """Hold a chart.

    Attributes:
        spoken: What screen readers say.
        x: What lies across; `step` has whole numbers.
        percent: Whether values are shown in percent.
        marks: Steps to mark, since they were skipped.
        every: Steps that each point is the mean of; the band then spans their lowest and highest value.
        band: What the band means; empty if there is none.
        last: The last value; None if the chart has no single one.
        log: Whether a logarithmic axis is offered.
        named: Whether points with an interval each have their series' name beside them.
    """

    key: str
    title: str
    unit: str
    series: Sequence[Series]
    spoken: str = ""
    x: str = "step"
    x_log: bool = False
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    percent: bool = False
    marks: Sequence[int] = ()
    every: int = 1
    band: str = ""
    better: str = ""
    last: float | None = None
    log: bool = False
    named: bool = False

    @property
    def data(self) -> str:
        """Return what the page's script draws, as JSON; what is empty is left out."""
        names = ("x", "x_log", "x_range", "y_range", "percent", "marks", "every", "named")
        out: dict[str, Any] = {n: getattr(self, n) for n in names if getattr(self, n)}
        out["series"] = [{f.name: v for f in fields(s) if (v := _plain(getattr(s, f.name)))} for s in self.series]
        return json.dumps(out, separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True)
class StageCharts:
    """Hold the charts of a stage.

    Attributes:
        groups: Title of each group and its charts.
        folded: Groups that are shown on demand.
        constant: (key, title with unit, value) of what never changed or was measured once.
        equal: (key, title, title of the equal metric, value) of what is equal to another metric at every step.
        skipped: Steps that were skipped.
    """

    groups: list[tuple[str, list[Chart]]]
    folded: list[tuple[str, list[Chart]]]
    constant: list[tuple[str, str, float]]
    single: bool
    equal: list[tuple[str, str, str, float]]
    skipped: list[int]

    @property
    def empty(self) -> bool:
        """Return True if there is nothing to draw."""
        return not (self.groups or self.folded or self.constant)


def stage_charts(stage: StageLog) -> StageCharts:
    """Return the charts of a stage, grouped and titled by its method.json."""
    known = _known(stage)
    skipped = [int(r["step"]) for r in stage.metrics if r.get("skipped")]
    columns = _stage_columns(stage)
    groups: dict[str, list[Chart]] = {}
    constant, equal, drawn = [], [], dict[tuple[Any, ...], str]()
    over = _drawn_over(known, columns)
    longest = max((len(x) for x, _ in columns.values()), default=0)
    for key in _in_order(columns, known):
        metric, (x, y) = describe_metric(key, known), columns[key]
        if key in over.values():
            continue
        values, low, high = (*x, *y), *(columns.get(f"{key}_{side}", ((), ()))[1] for side in ("low", "high"))
        second = over.get(key)
        if second is None and (len(set(y)) == 1 or (max(map(abs, y)) < ROUNDING and min(y) < 0 < max(y))):
            constant.append((key, _titled(metric), 0.0 if len(set(y)) > 1 else y[-1]))
        elif second is None and values in drawn:
            equal.append((key, _titled(metric), drawn[values], y[-1]))
        else:
            drawn[values] = metric.title
            series = Series("", x, y, *((low, high) if len(low) == len(high) == len(y) else ()))
            chart = _chart(metric, f"{stage.name}.{key}", series, longest)
            if second is not None:
                chart = _with_second(chart, describe_metric(second, known), *columns[second], stage.chosen)
            marks = skipped if any(key in r for r in stage.metrics) else ()
            groups.setdefault(metric.group or "Other", []).append(replace(chart, marks=marks))
    shown = [(title, charts) for title, charts in groups.items() if title not in FOLDED_GROUPS]
    folded = [(title, charts) for title, charts in groups.items() if title in FOLDED_GROUPS]
    single = any(len(columns[key][0]) == 1 for key, _, _ in constant)
    return StageCharts(shown, folded, constant, single, equal, skipped)


def _known(stage: StageLog) -> list[Metric]:
    """Return the metrics that a stage describes, its own first."""
    own = [_metric(m) for m in stage.method.get("metrics") or [] if isinstance(m, Mapping) and m.get("name")]
    return [*own, *COMMON]


def _stage_columns(stage: StageLog) -> dict[str, tuple[list[float], list[float]]]:
    return _columns(stage.metrics) | {
        k: v for k, v in _columns(map(flatten_phases, stage.timings)).items() if k != "step"
    }


def compared_charts(stages: Sequence[tuple[str, StageLog]]) -> list[tuple[str, list[Chart]]]:
    """Return the charts of one stage of several runs over each other, by group; those of details are left out.

    stages: Name of each run and its stage. Colours are those of `RUN_STYLES`, in this order.
    """
    known = [metric for _, stage in stages for metric in _known(stage)]
    columns = [_stage_columns(stage) for _, stage in stages]
    groups: dict[str, list[Chart]] = {}
    for key in _in_order({k: None for of_run in columns for k in of_run}, known):
        metric = describe_metric(key, known)
        found = [(name, i, c[key]) for i, ((name, _), c) in enumerate(zip(stages, columns, strict=True)) if key in c]
        if metric.group in (*FOLDED_GROUPS, "") or len({v for _, _, (_, y) in found for v in y}) == 1:
            continue
        series = []
        for name, i, (x, y) in found:
            few = len(y) == 1 or metric.group == "Held out"
            line = Series(name, x, y, style=RUN_STYLES[i % 8], points=few, smooth=not few and smoothable(y))
            series.append(replace(thin(line)[0], low=(), high=()))
        spoken = "; ".join(f"{name} from {format_number(y[0])} to {format_number(y[-1])}" for name, _, (_, y) in found)
        low = min(v for _, _, (_, y) in found for v in y)
        chart = Chart(f"{stages[0][1].name}.{key}", metric.title, metric.unit, series, f"{metric.title}: {spoken}",
                      better=metric.better, log=low > 0)  # fmt: skip
        groups.setdefault(metric.group, []).append(chart)
    return list(groups.items())


def _drawn_over(known: Sequence[Metric], columns: Mapping[str, Any]) -> dict[str, str]:
    """Return the metrics that are drawn in the chart of another one, by the name of that one."""
    return {m.over: m.name for m in known if m.over and m.name in columns and m.over in columns}


def _with_second(
    chart: Chart, metric: Metric, x: Sequence[float], y: Sequence[float], chosen: Mapping[str, Any]
) -> Chart:
    """Return the chart with a second curve in it, and a mark at the step whose weights the model has.

    Args:
        chart: Chart of the first curve.
        metric: Metric of the second curve.
        x: Its steps.
        y: Its values.
        chosen: Content of the stage's best_step.json; empty: no step was chosen.
    """
    (first,), step = chart.series, chosen.get("model_step")
    # Limits that `thin` gives to a long curve are left out: the chart's caption explains those of the first curve.
    second = replace(thin(Series(metric.title.lower(), x, y))[0], low=(), high=(), style="s5", points=len(x) <= POINTS)
    series = [replace(first, name="training"), second]
    if step is not None and step in x:
        series.append(
            Series(f"the model: step {step:,}", [step], [y[list(x).index(step)]], style="s3", line="none", points=True)
        )
    spoken = f"{chart.spoken}; {metric.title.lower()} from {format_number(y[0])} to {format_number(y[-1])}"
    log = chart.log and min(y) > 0
    return replace(chart, series=series, spoken=spoken, log=log)


def describe_metric(key: str, known: Sequence[Metric]) -> Metric:
    """Return the metric that describes a key: of its own name, else of its family, else one with the bare name."""
    metric = next((m for m in known if m.name == key), None)
    if metric is None:
        metric = next((m for m in known if m.name.endswith("*") and key.startswith(m.name[:-1])), None)
        if metric is not None:
            rest = key.removeprefix(metric.name[:-1]).replace("_", " ")
            metric = replace(metric, title=metric.title.replace("*", rest))
    return metric or Metric(key, key)


def smoothable(y: Sequence[float]) -> bool:
    """Return whether a curve is noisy: its steps up and down sum to more than four times its range."""
    values = np.asarray(y, dtype=np.float64)
    return len(y) >= 8 and float(np.abs(np.diff(values)).sum()) > 4 * float(np.ptp(values))


def thin(series: Series, limit: int = POINTS) -> tuple[Series, int]:
    """Return the series with at most `limit` points, and the number of steps in each.

    A longer series becomes the means of equal runs of values; the band spans each run's lowest and highest value, so
    that no spike is lost.
    """
    if len(series.y) <= limit:
        return series, 1
    every = -(-2 * len(series.y) // limit)
    starts = range(0, len(series.y), every)
    runs = [np.asarray(series.y[i : i + every], dtype=np.float64) for i in starts]
    x = [series.x[min(i + (every - 1) // 2, len(series.x) - 1)] for i in starts]
    mean, low, high = ([float(f(run)) for run in runs] for f in (np.mean, np.min, np.max))
    return replace(series, x=x, y=mean, low=low, high=high), every


def _chart(metric: Metric, key: str, series: Series, longest: int) -> Chart:
    sparse = metric.group == "Held out" or len(series.y) < 0.5 * longest
    first, last, count = float(series.y[0]), float(series.y[-1]), len(series.y)
    log = min(series.y) >= 0 and max(series.y) > 0
    series = replace(series, points=sparse, smooth=not sparse and smoothable(series.y))
    series, every = thin(series)
    band = "lowest and highest" if every > 1 else "95% interval" if series.low else ""
    spoken = f"{metric.title} over {count:,} steps, from {format_number(first)} to {format_number(last)}"
    return Chart(key, metric.title, metric.unit, [series], spoken, every=every, band=band, better=metric.better,
                 last=last, log=log)  # fmt: skip


def _metric(record: Mapping[str, Any]) -> Metric:
    return Metric(**{f.name: str(record.get(f.name) or "") for f in fields(Metric)})


def _titled(metric: Metric) -> str:
    inside = f"{metric.group.lower()}: " if metric.group == "Held out" else ""
    return f"{inside}{metric.title}"


def _columns(records: Iterable[JsonDict]) -> dict[str, tuple[list[float], list[float]]]:
    """Return (steps, values) of every key, without what is no finite number."""
    out: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        for key, value in record.items():
            if isinstance(value, int | float) and math.isfinite(value):
                x, y = out.setdefault(key, ([], []))
                x.append(record["step"])
                y.append(float(value))
    return out


def flatten_phases(record: JsonDict) -> JsonDict:
    """Return a record of timings.jsonl with the seconds of each phase as phases/NAME."""
    phases = {f"phases/{k.replace(' ', '_')}": v for k, v in (record.get("phases") or {}).items()}
    return {k: v for k, v in record.items() if k != "phases"} | phases


def _in_order(columns: Mapping[str, Any], known: Sequence[Metric]) -> list[str]:
    """Return the keys to show, without limits of bands, in the order of the known metrics; unknown ones come last."""
    names = [m.name for m in known]

    def place(key: str) -> tuple[int, str]:
        family = (i for i, n in enumerate(names) if n.endswith("*") and key.startswith(n[:-1]))
        return (names.index(key) if key in names else next(family, len(names))), key

    limits = {f"{k}_{side}" for k in columns for side in ("low", "high")}
    return sorted((k for k in columns if k not in limits and k not in HIDDEN), key=place)


def _plain(value: Any) -> Any:
    """Return what is written as JSON: numbers to five digits, whole ones without a point."""
    if isinstance(value, str | bool):
        return value
    return [v if isinstance(v, str) else int(v) if v == int(v) else float(f"{v:.5g}") for v in value]
