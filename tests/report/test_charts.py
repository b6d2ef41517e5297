"""Charts: what is drawn are the numbers, thinned without losing a spike, grouped and titled as the method says."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from posttrain.core.types import Metric
from posttrain.report.charts import COMMON, POINTS, Series, describe_metric, smoothable, stage_charts, thin
from posttrain.report.load import StageLog


def stage(records, method=None, timings=()):
    return StageLog("s", Path("0-s"), method or {}, list(records), list(timings))


def records(**columns):
    rows = zip(*columns.values(), strict=True)
    return [{"step": i, **dict(zip(columns, row, strict=True))} for i, row in enumerate(rows, 1)]


def charts_of(found):
    return {c.key.removeprefix("s."): c for _, charts in [*found.groups, *found.folded] for c in charts}


def test_thinning_keeps_means_and_every_spike():
    """Against a slow loop over equal runs; a short series stays as it is."""
    y = np.random.default_rng(0).normal(size=100_001)
    y[54_321], y[98_765] = 50.0, -50.0
    thinned, every = thin(Series("", list(range(1, 100_002)), y.tolist()))
    assert every == 201 and len(thinned.y) == 498 <= POINTS
    for i in (0, 100, 497):
        run = [y[j] for j in range(i * every, min((i + 1) * every, len(y)))]
        assert thinned.y[i] == pytest.approx(sum(run) / len(run))
        assert (thinned.low[i], thinned.high[i]) == (min(run), max(run))
        assert i * every < thinned.x[i] <= min((i + 1) * every, len(y))
    assert max(thinned.high) == 50 and min(thinned.low) == -50
    short = Series("", [1, 2], [3.0, 1.0])
    assert thin(short) == (short, 1)


def test_data_are_the_numbers_without_what_is_not_finite():
    rows = [{"step": s, "loss": v} for s, v in ((1, 4.0), (2, math.nan), (3, None), (4, 1.0), (5, 2.123456))]
    rows[1] |= {"skipped": 1}
    found = stage_charts(stage(rows))
    (chart,) = charts_of(found).values()
    assert json.loads(chart.data) == {
        "x": "step", "every": 1, "marks": [2],
        "series": [{"x": [1, 4, 5], "y": [4, 1, 2.1235], "style": "accent"}],
    }  # fmt: skip
    assert found.skipped == [2] and (chart.last, chart.log) == (2.123456, True)
    assert stage_charts(stage([{"step": 1, "loss": math.nan}])).empty and stage_charts(stage([])).empty


def test_groups_titles_and_units_come_from_the_method():
    """Families too; the common metrics follow, and what nobody describes is folded away under its bare name."""
    described = [
        {"name": "reward", "title": "Reward", "unit": "mean", "group": "Reward", "better": "higher"},
        {"name": "part/*", "title": "Part: *", "group": "Reward"},
        {"name": "loss", "title": "Policy loss", "unit": "nats", "group": "Optimisation"},
    ]
    up, down = [1.0, 2.0, 4.0], [3.0, 2.0, 0.0]
    rows = records(strange=up, lr=down, loss=[1.0, 1.5, 1.0], **{"part/a_b": [0.0, 1.0, 0.5]}, reward=[0.1, 0.0, 0.3])
    timings = [{"step": s, "seconds": s / 2, "phases": {"sample": s / 3, "odd one": s / 4}} for s in (1, 2, 3)]
    found = stage_charts(stage(rows, {"method": "m", "title": "M", "metrics": described}, timings))
    shown = [(group, [(c.title, c.unit) for c in charts]) for group, charts in found.groups]
    assert shown == [
        ("Reward", [("Reward", "mean"), ("Part: a b", "")]),
        ("Optimisation", [("Policy loss", "nats")]),
        ("Training", [("Learning rate", "")]),
        ("Speed and memory", [("Time", "s/step"), ("Time: sampling", "s/step")]),
    ]
    assert [(g, [c.title for c in cs]) for g, cs in found.folded] == [
        ("Details", ["Time: odd one"]),
        ("Other", ["strange"]),
    ]
    assert charts_of(found)["reward"].better == "higher"
    assert describe_metric("lr", COMMON).title == "Learning rate" and describe_metric("x", COMMON) == Metric("x", "x")


def test_what_never_changes_is_folded_away():
    """A constant, the rounding error around 0, and a part that is the whole reward."""
    rows = records(reward=[1.0, 2.0], lr=[1e-5, 1e-5], loss=[3e-8, -2e-8], **{"reward/only": [1.0, 2.0]})
    described = [{"name": "reward", "title": "Reward"}, {"name": "reward/*", "title": "Reward: *"}]
    found = stage_charts(stage(rows, {"metrics": described}))
    assert list(charts_of(found)) == ["reward"]
    assert found.constant == [("loss", "Loss", 0.0), ("lr", "Learning rate", 1e-5)]
    assert found.equal == [("reward/only", "Reward: only", "Reward", 2.0)]


def test_held_out_values_are_points_with_their_intervals():
    rows = records(loss=[5.0, 4.0, 3.0, 2.0])
    for row, value in ((rows[1], 0.25), (rows[3], 0.75)):
        row |= {"held_out/accuracy": value, "held_out/accuracy_low": value - 0.1, "held_out/accuracy_high": value + 0.2}
    described = [{"name": "held_out/accuracy", "title": "Accuracy", "group": "Held out"}]
    found = charts_of(stage_charts(stage(rows, {"metrics": described})))
    assert list(found) == ["held_out/accuracy", "loss"]  # the limits are no charts of their own
    (series,) = json.loads(found["held_out/accuracy"].data)["series"]
    assert (series["x"], series["y"], series["points"]) == ([2, 4], [0.25, 0.75], True)
    assert (series["low"], series["high"]) == ([0.15, 0.65], [0.45, 0.95])
    assert found["held_out/accuracy"].band == "95% interval" and "points" not in found["loss"].data


def test_noise_is_smoothed_and_schedules_are_not():
    rng = random.Random(0)
    falling = [1 / (1 + i / 9) for i in range(60)]
    assert smoothable([v + rng.gauss(0, 0.1) for v in falling]) and not smoothable(falling)
    warm = [min(i / 6, 0.5 * (1 + math.cos(math.pi * i / 60))) for i in range(60)]
    assert not smoothable(warm) and not smoothable([1.0] * 60) and not smoothable([0.0, 1.0] * 3)


def test_a_held_out_curve_is_drawn_over_the_training_curve_with_the_step_of_the_model():
    """At its own steps; with a logarithmic axis only if both are positive; alone if there is no training curve."""
    described = [
        {"name": "loss", "title": "Loss", "group": "Training"},
        {"name": "held_out/loss", "title": "Held out", "group": "Training", "over": "loss"},
    ]
    rows = [{"step": 0, "held_out/loss": 6.0}, *records(loss=[5.0, 4.0, 3.5, 3.0])]
    rows[2]["held_out/loss"], rows[4]["held_out/loss"] = 4.5, 4.75
    log = StageLog("s", Path("0-s"), {"metrics": described}, rows, [], {"model_step": 2})
    found = charts_of(stage_charts(log))
    assert list(found) == ["loss"]
    training, held_out, model = json.loads(found["loss"].data)["series"]
    assert (training["name"], training["x"], training["y"]) == ("training", [1, 2, 3, 4], [5, 4, 3.5, 3])
    assert (held_out["name"], held_out["x"], held_out["y"]) == ("held out", [0, 2, 4], [6, 4.5, 4.75])
    assert held_out["points"] and model == {
        "name": "the model: step 2", "x": [2], "y": [4.5], "style": "s3", "line": "none", "points": True
    }  # fmt: skip
    assert "held out from 6 to 4.75" in found["loss"].spoken and found["loss"].log and found["loss"].last == 3.0
    alone = stage_charts(
        stage([{"step": 0, "held_out/loss": 6.0}, {"step": 1, "held_out/loss": 5.0}], {"metrics": described})
    )
    assert list(charts_of(alone)) == ["held_out/loss"]
