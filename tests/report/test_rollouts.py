"""Rollouts on the page and in the terminal: what is shown is what the run kept."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import posttrain
from posttrain.cli.inspect_rollouts import print_drift, print_rollouts
from posttrain.core.errors import DataError
from posttrain.core.files import read_lines
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.report import build_report
from posttrain.report.load import read
from posttrain.report.rollouts import phases, spark, views
from posttrain.sampling import engine
from posttrain.sampling.rollout_store import groups_of, read_rollouts, rollout_steps, rollouts_path, write_rollouts


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three real steps of a tiny model, with a reward that fails now and then."""
    folder = tmp_path_factory.mktemp("rl")
    rows = [{"prompt": f"{i} <b>+</b> {i} =", "answer": str(2 * i)} for i in range(40)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def picky(text: str, example: dict[str, Any]) -> float:
        if len(text) % 3 == 0:
            raise RuntimeError("a multiple of three")
        return len(text) / 100

    data = {"source": str(folder / "problems.jsonl"), "chat": False}
    stage = {
        "method": "grpo",
        "name": "rl",
        "problems": {"kind": "rows", "data": {**data, "rows": [0, 30]}},
        "held_out": {"problems": {"kind": "rows", "data": {**data, "rows": [30, 40]}}, "every": 2},
        "rewards": {
            "terms": [
                {"kind": "exact", "name": "right"},
                {"kind": "function", "name": "picky", "function": "picky", "isolated": False},
            ],
            "on_error": "exclude",
        },
        "sampler": {"max_tokens": 20},
        "prompts_per_step": 4,
        "group_size": 4,
        "steps": 3,
        "optimizer": {"lr": 1e-3},
    }
    recipe = posttrain.Recipe.model_validate({"name": "seen", "model": {"source": "tiny:llama"}, "stages": [stage]})
    posttrain.run(recipe, folder / "run", rewards={"picky": picky})
    return folder / "run"


def test_the_page_shows_what_was_kept(run: Path) -> None:
    page = build_report(run).read_text()
    stage = run / "stages" / "0-rl"
    last = read_lines(stage / "metrics.jsonl")[-1]
    for name in (
        "reward",
        "held_out",
        "completions/mean_length",
        "frac_reward_zero_std",
        "entropy",
        "reward/right",
        "reward/picky",
    ):
        found = re.search(rf'data-metric="stage.rl.{name}.last" data-value="([^"]+)"', page)
        assert found and float(found[1]) == pytest.approx(last[name]), name
    assert "&lt;b&gt;+&lt;/b&gt;" in page and "<b>+</b>" not in page
    (view,) = views(read(run))
    rows = {s: read_rollouts(rollouts_path(stage / "rollouts", s)) for s in rollout_steps(stage / "rollouts")}
    assert view.steps == 3 and set(rows) == {1, 2, 3}
    best = max(r["reward"] for r in rows[3] if r["reward"] is not None)
    worst = min(r["reward"] for r in rows[3] if r["reward"] is not None)
    by_kind = {w: [s["reward"] for s in (*view.first, *view.more) if s["kind"] == w] for w in ("best", "worst")}
    assert by_kind["best"][0] == best and by_kind["worst"][0] == worst
    failed = sum(bool(r["failures"]) for of_step in rows.values() for r in of_step)
    assert failed and "a multiple of three" in page
    assert sum(m.get("failed/picky", 0) for m in read_lines(stage / "metrics.jsonl")) == failed


def test_a_run_of_empty_completions_ends_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever token comes first ends the turn here: nothing is written, nothing can be told apart, nothing crashes."""
    monkeypatch.setattr(engine, "stop_tokens", lambda model, tokenizer: range(259))
    (tmp_path / "problems.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i} =", "answer": "1"}) + "\n" for i in range(8))
    )
    stage = {
        "method": "grpo",
        "name": "rl",
        "problems": {"kind": "rows", "data": {"source": str(tmp_path / "problems.jsonl"), "chat": False}},
        "rewards": {"terms": [{"kind": "exact"}, {"kind": "length", "unit": "characters", "target": 9, "width": 9}]},
        "sampler": {"max_tokens": 9},
        "prompts_per_step": 4,
        "group_size": 3,
        "steps": 2,
        "kl": {"coefficient": 0.1},
        "mini_batches": 2,
    }
    recipe = posttrain.Recipe.model_validate({"name": "e", "model": {"source": "tiny:llama"}, "stages": [stage]})
    result = posttrain.run(recipe, tmp_path / "run")
    last = read_lines(result.folder / "stages" / "0-rl" / "metrics.jsonl")[-1]
    assert (last["step"], last["completions/mean_length"], last["frac_reward_zero_std"]) == (2, 1, 1)
    page = build_report(result.folder).read_text()
    assert "100% of completions are empty (last third)" in page
    for name in ("kl", "clip_fraction", "mismatch"):
        found = re.search(rf'data-metric="stage.rl.{name}.last" data-value="([^"]+)"', page)
        assert found and float(found[1]) == pytest.approx(last[name]), name


def test_the_page_says_where_the_time_went(run: Path) -> None:
    """Every phase's seconds, summed over the steps, with the tokens sampled and learnt from."""
    page = build_report(run).read_text()
    timings = read_lines(run / "stages" / "0-rl" / "timings.jsonl")
    (view,) = views(read(run))
    assert [p.name for p in view.phases][:2] == ["sampling", "rewards"] and "held-out problems" in page
    assert sum(p.share for p in view.phases) == pytest.approx(1)
    assert sum(p.seconds for p in view.phases) == pytest.approx(sum(sum(t["phases"].values()) for t in timings))
    for p in view.phases:
        found = re.search(rf'data-metric="rollouts.rl.phases.{p.name}" data-value="([^"]+)"', page)
        assert found and float(found[1]) == p.seconds
    rows = [r for s in (1, 2, 3) for r in read_rollouts(rollouts_path(run / "stages" / "0-rl" / "rollouts", s))]
    sampled = sum(len(r["tokens"]) for r in rows)  # those without a reward were sampled too
    assert {p.name: p.tokens for p in view.phases}["sampling"] == sampled
    assert {p.name: p.tokens for p in view.phases}["training"] == sum(t["learned_tokens"] for t in timings)
    assert phases([{"seconds": 1.0}]) == []


def test_held_out_answers_become_a_comparison(run: Path) -> None:
    """The first reward that is 0 or 1 judges; before and after on the same problems."""
    comparison = json.loads((run / "evaluations" / "comparison.json").read_text())
    assert [c["task"] for c in comparison] == ["rl-right"]
    items = read_lines(run / "evaluations" / "after" / "rl-right.jsonl")
    assert comparison[0]["after"]["n"] == len(items)
    assert comparison[0]["after"]["value"] == pytest.approx(sum(i["correct"] for i in items) / len(items))


def shown(run: Path, **options: Any) -> str:
    out = Console(file=io.StringIO(), width=100)
    print_rollouts(run, out, **options)
    return out.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_terminal_pages_through_rollouts(run: Path) -> None:
    rows = read_rollouts(rollouts_path(run / "stages" / "0-rl" / "rollouts", 2))
    text = shown(run, step=2, groups=4)
    assert text.count("problem ") == 4 and text.count(" tokens, ") == 16
    for row in rows:
        if row["reward"] is None:
            assert "no reward" in text
        else:
            assert f"#{row['rollout']}  reward {row['reward']:.3g}  advantage {row['advantage']:+.3f}" in text
    best = max((r for r in rows if r["reward"] is not None), key=lambda r: r["reward"])
    assert f"reward {best['reward']:.3g}" in shown(run, step=2, sort="best", groups=1).splitlines()[5]
    assert shown(run, held_out=True, groups=99).count("#0") == 10
    number = rows[0]["problem"]
    assert f"problem {number} " in shown(run, step=2, problem=number, groups=9)


def test_the_suspicious_come_in_the_order_of_the_report(tmp_path: Path) -> None:
    """By the report's score, whatever the reward's sign; then those below their group's mean, then the unjudged."""

    def rollout(text: str, tokens: list[int], reward: float) -> Rollout:
        return Rollout(tokens, [-1.0] * len(tokens), "end", text, {"a": reward}, reward)

    again, usual = [7] * 12, list(range(12))
    rollouts = [
        rollout("below the mean", usual, -0.9),
        rollout("usual", usual, -0.1),
        rollout("again and again", again, -0.1),
        rollout("unjudged", usual, math.nan),
        rollout("below and again", again, -0.9),
    ]
    where = tmp_path / "stages" / "0-rl" / "rollouts"
    write_rollouts(where, 1, [RolloutGroup((1, 2), {"answer": "4", "source": "s"}, rollouts)], None, ["q"], [0])
    text = shown(tmp_path, sort="suspicious")
    places = [text.index(f"#{i} ") for i in (2, 0, 1, 4, 3)]
    assert places == sorted(places)
    write_rollouts(
        tmp_path / "stages" / "0-rl" / "held_out",
        1,
        [RolloutGroup((1, 2), {"answer": "4", "source": "s"}, [r]) for r in (rollouts[1], rollouts[2], rollouts[4])],
        None,
        ["q"] * 3,
        [0, 1, 2],
    )
    text = shown(tmp_path, sort="suspicious", held_out=True)  # one answer a problem: compared with the step's mean
    assert text.index("problem 1 ") < text.index("problem 0 ")


def test_stages_whose_names_end_alike_are_told_apart(tmp_path: Path) -> None:
    for number, name in enumerate(("warm-rl", "rl")):
        (tmp_path / "stages" / f"{number}-{name}").mkdir(parents=True)
    found = [(s.name, s.folder.name) for s in read(tmp_path).stages]
    assert found == [("warm-rl", "0-warm-rl"), ("rl", "1-rl")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 9}, r"no rollouts of step 9; there are 3, the nearest at \[1, 2, 3\]"),
        ({"stage": "sft"}, "no rollouts of stage 'sft'.*there are: rl"),
        ({"sort": "big"}, "expected one of order, best"),
        ({"problem": 99}, "no problem 99"),
    ],
)
def test_what_is_not_there_is_said(run: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        print_rollouts(run, Console(file=io.StringIO()), **options)


def test_rollouts_come_back_as_they_were(tmp_path: Path) -> None:
    rollouts = [
        Rollout((5, 6), (-0.5, -1.25), "end", "héllo 👋", {"a": 1.0}, 2.0, notes={"a": "it greets"}),
        Rollout((), (), "length", "", {}, float("nan"), failures={"a": "boom"}),
    ]
    group = RolloutGroup((1, 2, 3), {"answer": ["x", "y"], "source": "s:1", "prompt": "ask"}, rollouts)
    path = write_rollouts(tmp_path, 7, [group], [[0.5, None]], ["ask"], [42])
    assert rollout_steps(tmp_path) == [7]
    rows = read_rollouts(path)
    assert [(r["problem"], r["answer"], r["advantage"], r["failures"]) for r in rows] == [
        (42, ["x", "y"], 0.5, {}),
        (42, ["x", "y"], None, {"a": "boom"}),
    ]
    (back,) = groups_of(rows)
    assert back.rollouts[0] == rollouts[0] and back.prompt == group.prompt
    assert back.rollouts[1].reward != back.rollouts[1].reward
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="can't be read as rollouts"):
        read_rollouts(path)


def test_replies_of_an_environment_are_marked(run: Path, tmp_path: Path) -> None:
    """On the page and in the terminal; in rollouts without any, nothing is."""
    assert 'class="reply"' not in build_report(run).read_text()
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    rollouts = folder / "stages" / "0-rl" / "rollouts"
    (group, *_) = groups_of(read_rollouts(rollouts_path(rollouts, 3)))
    one = replace(group.rollouts[0], text="<7+4>=11 <b>", reward=1.0)
    turns = [(True, "<7+4>"), (False, "=11 <b>")]
    write_rollouts(rollouts, 3, [replace(group, rollouts=[one])], [[0.5]], ["ask"], [1], lambda _: turns)
    assert read_rollouts(rollouts_path(rollouts, 3))[0]["turns"] == [[True, "<7+4>"], [False, "=11 <b>"]]
    page = build_report(folder).read_text()
    assert '&lt;7+4&gt;<span class="reply">=11 &lt;b&gt;</span></p>' in page and "<dt>replies</dt><dd>1</dd>" in page
    out = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
    print_rollouts(folder, out, step=3)
    assert "<7+4>\x1b[0m\x1b[36m=11 <b>\x1b[0m" in out.file.getvalue()  # type: ignore[attr-defined]


def test_parts_of_the_reward_on_the_page_and_in_the_terminal(run: Path) -> None:
    """Their means, their variances within and between problems, and how they go together, from the rollouts kept."""
    folder = run / "stages" / "0-rl" / "rollouts"
    (view,) = views(read(run))
    assert [p.name for p in view.parts] == ["reward", "picky", "right"]
    first = [r["parts"]["picky"] for r in read_rollouts(rollouts_path(folder, 1)) if r["reward"] is not None]
    picky = view.parts[1]
    assert picky.early == pytest.approx(sum(first) / len(first))
    last: dict[int, list[float]] = {}
    for r in read_rollouts(rollouts_path(folder, 3)):
        if r["reward"] is not None:
            last.setdefault(r["group"], []).append(r["parts"]["picky"])
    every = [v for values in last.values() for v in values]
    mean = sum(every) / len(every)
    within = sum((v - sum(vs) / len(vs)) ** 2 for vs in last.values() for v in vs) / len(every)
    total = sum((v - mean) ** 2 for v in every) / len(every)
    assert picky.within == pytest.approx(within) and picky.signal[1] == pytest.approx(within / total)
    assert picky.between == pytest.approx(total - within)
    assert [p[:2] for p in view.pairs] == [("picky", "right")]
    page = build_report(run).read_text()
    section = page[page.index('id="rollouts"') :]
    assert f">{100 * within / total:.0f}%<" in section and f'd="{picky.means}"' in section
    out = Console(file=io.StringIO(), width=140)
    print_drift(run, out, stage="rl")
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(rf"picky +{picky.early:.3g} +{picky.late:.3g} ", text) and "picky, right" in text
    with pytest.raises(DataError, match="no rollouts to watch in .* of stage 'sft'"):
        print_drift(run, out, stage="sft")


def test_sparklines_by_hand() -> None:
    assert spark([0.0, 1.0, 0.5]) == "M0.0,22.0L50.0,2.0L100.0,12.0"
    assert spark([1.0, None, 1.0], (0.0, 1.0)) == "M0.0,2.0M100.0,2.0"
    assert spark([3.0]) == "M0.0,12.0" and spark([None]) == ""
