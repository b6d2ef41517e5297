"""Every number that a method logs has a title: its own METRICS and the common ones leave none to its bare name."""

import json

import pytest

import posttrain
from posttrain.core.types import Metric
from posttrain.report import build_report
from posttrain.report.charts import COMMON, HIDDEN, describe_metric
from posttrain.report.load import read

PAIRS = [{"prompt": f"p{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(24)]
THUMBS = [{"prompt": f"p{i}", "completion": f"a {i}", "label": bool(i % 2)} for i in range(24)]
STEPS = [{"prompt": f"p{i}", "steps": [f"a {i}\n", "b"], "labels": [True, bool(i % 2)]} for i in range(24)]
SUMS = [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(24)]


def part(path, start, end):
    return {"source": str(path), "rows": [start, end]}


def rl(path, **more):
    problems = [{"kind": "rows", "data": {**part(path, a, b), "chat": False}} for a, b in ((0, 16), (16, 24))]
    gold = {"kind": "length", "target": 5, "width": 20}
    return {
        "problems": problems[0],
        "held_out": {"problems": problems[1], "every": 1, "gold": gold, "samples": 2},
        "rewards": {"terms": [{"kind": "exact"}, {"kind": "length", "target": 5, "width": 20}]},
        "sampler": {"max_tokens": 8}, "prompts_per_step": 2, "group_size": 2, "steps": 2, **more,
    }  # fmt: skip


def trained(path):
    return {"data": part(path, 0, 16), "batch_size": 4, "max_steps": 2}


STAGES = {
    "sft": (PAIRS, trained),
    "dpo": (PAIRS, lambda p: {**trained(p), "held_out": {"data": part(p, 16, 24), "every": 1}}),
    "kto": (THUMBS, lambda p: {**trained(p), "held_out": {"data": part(p, 16, 24), "every": 1}}),
    "reward_model": (PAIRS, lambda p: {**trained(p), "held_out": {"data": part(p, 16, 24), "every": 1}}),
    "process_reward": (
        STEPS,
        lambda p: {
            "labels": {"kind": "rows", "data": part(p, 0, 16), "held_out": part(p, 16, 24)},
            "batch_size": 4,
            "max_steps": 2,
        },
    ),
    "online_dpo": (SUMS, rl),
    "ppo": (
        SUMS,
        lambda p: rl(p, kl={"coefficient": 0.1}, critic={"clip": 0.2}, mini_batches=2, importance_sampling_cap=2.0),
    ),
}


@pytest.mark.parametrize("method", STAGES)
def test_every_metric_has_a_title(method, tmp_path):
    rows, settings = STAGES[method]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    stage = {"method": method, "name": "s", **settings(tmp_path / "rows.jsonl")}
    recipe = posttrain.Recipe.model_validate({"name": "r", "model": {"source": "tiny:llama"}, "stages": [stage]})
    folder = posttrain.run(recipe, tmp_path / "run").folder
    (log,) = read(folder).stages
    assert log.method["method"] == method and log.method["title"] != method
    known = [*(Metric(**m) for m in log.method["metrics"]), *COMMON]
    keys = {k for r in [*log.metrics, *log.timings] for k in r} - {"phases", *HIDDEN}
    limits = {f"{k}_{side}" for k in keys for side in ("low", "high")}
    assert [k for k in sorted(keys - limits) if describe_metric(k, known).title == k] == []
    assert len(log.metrics) >= 2 and "token_accuracy" in keys or method != "sft"
    page = build_report(folder).read_text()
    assert f"{log.method['title']} on " in page and "Other: " not in page


def test_a_method_from_outside_is_titled_by_its_method_json(make_run):
    folder = make_run()
    stage = folder / "stages" / "1-sft"
    described = {"name": "loss", "title": "Hinge loss", "unit": "points", "group": "Margins", "better": "lower"}
    (stage / "method.json").write_text(json.dumps({"method": "m:Hinge", "title": "Hinge", "metrics": [described]}))
    page = build_report(folder).read_text()
    for text in ("Hinge on 2,000 rows", "<strong>Hinge loss</strong>", "<h4>Margins</h4>", "points</span>"):
        assert text in page, text
    (stage / "method.json").write_text("{]")
    page = build_report(folder).read_text()
    assert "method.json of stage sft can&#39;t be read" in page and "<strong>Loss</strong>" in page
