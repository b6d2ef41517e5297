"""Evaluation by a scorer: items, means and win rates by hand, and the whole way on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import posttrain
from posttrain.core.errors import DataError
from posttrain.core.files import read_lines
from posttrain.core.item_statistics import compare, summarize, wins
from posttrain.core.types import Rollout
from posttrain.data.prompts import RenderedPrompt
from posttrain.eval.evaluation_tasks import ScoreTask
from posttrain.eval.scored_tasks import answer_statistics, scored_item
from posttrain.report import build_report
from posttrain.report.terminal import summary_table

LAB = {"kind": "lab", "size": 5, "held_out": True}


def item(number: int, *scores: float | None) -> dict[str, Any]:
    answers = [Rollout([5] * 3, [-1.0] * 3, "end", f"answer {k}") for k in range(len(scores))]
    return scored_item(number, RenderedPrompt([1], f"prompt {number}", {"source": "f:1"}), answers, scores)


def test_an_item_by_hand() -> None:
    one = item(3, 2.0, None, 5.0)
    assert (one["id"], one["value"], one["output"], one["prompt"]) == (3, 3.5, "answer 0", "prompt 3")
    assert [a["score"] for a in one["answers"]] == [2.0, None, 5.0]
    assert item(0, None)["value"] is None
    assert answer_statistics([one, item(1, None)])["failed"] == {"scorer": 2}
    assert "constant" not in answer_statistics([one]) and "constant" not in answer_statistics([item(0, 2.0)])
    assert answer_statistics([item(0, 2.0, None), item(1, 2.0)])["constant"] == 2.0


def test_win_rates_by_hand() -> None:
    """Prompt 0: after 1, 3 against before 2, 3: of four pairs 1 is won (3 > 2), 1 tied, 2 lost: 3/8. Prompt 1: won."""
    before, after = [item(0, 2.0, 3.0), item(1, 0.0, 0.0)], [item(0, 1.0, 3.0), item(1, 1.0, 2.0)]
    found = wins(before, after)
    assert found["value"] == pytest.approx((3 / 8 + 1) / 2)
    # Two prompts, drawn with replacement: the mean is 3/8, 11/16 or 1.
    assert (found["low"], found["high"]) == pytest.approx((3 / 8, 1.0))
    assert wins([item(0, 1.0)] * 3, [item(0, 1.0)] * 3) == {"value": 0.5, "low": 0.5, "high": 0.5}
    # Every prompt won or lost whole: Wilson's interval of 2 of 4.
    sharp = wins([item(i, 0.0) for i in range(4)], [item(i, 1.0 if i < 2 else -1.0) for i in range(4)])
    assert (sharp["value"], sharp["low"], sharp["high"]) == pytest.approx((0.5, 0.150039, 0.849961), abs=1e-6)
    with pytest.raises(DataError, match="got 1 and 2"):
        wins([item(0, 1.0)], [item(0, 1.0)] * 2)


def test_a_prompt_that_one_side_could_not_score_is_left_out_and_counted() -> None:
    before, after = [item(0, 1.0), item(1, None), item(2, 4.0)], [item(2, 7.0), item(1, 9.0), item(0, 1.5)]
    one = summarize(before, "score")
    assert (one["metric"], one["value"], one["n"], one["unscored"]) == ("score", 2.5, 2, 1)
    found = compare(before, after, "score")
    assert found["difference"] == pytest.approx((0.5 + 3) / 2) and found["n"] == 2
    assert (found["gained"], found["lost"], found["wins"]["value"]) == (2, 0, 1.0)
    assert found["before"]["value"] == 2.5 and found["after"]["value"] == 4.25
    alone = compare([{"id": 0, "value": 1.0}], [{"id": 0, "value": 2.0}], "score")  # from outside: it kept no answers
    assert alone["difference"] == 1.0 and "wins" not in alone


def test_before_and_after_by_a_scorer(tmp_path: Path) -> None:
    """Every answer of both sides with the number that the function gives it; win rate and means are of those."""
    recipe = posttrain.Recipe.model_validate(
        {
            "name": "s",
            "model": {"source": "tiny:llama"},
            "stages": [{"data": {"source": "lab:words", "rows": [0, 8], "chat": False}, "max_steps": 2,
                        "optimizer": {"lr": 3e-3}}],
            "evaluate": [{"name": "t", "kind": "score", "problems": LAB, "n": 3, "sampler": {"max_tokens": 8},
                          "scorer": {"kind": "function", "function": "digits"}}],
            "track": {"tensorboard": True},
        }
    )  # fmt: skip

    given = {"digits": lambda text, example: float(sum(c.isdigit() for c in text)) - len(text) / 100}
    result = posttrain.run(recipe, tmp_path / "run", rewards=given)
    sides = [read_lines(result.folder / "evaluations" / w / "t.jsonl") for w in ("before", "after")]
    for side in sides:
        assert [i["id"] for i in side] == [0, 1, 2, 3, 4] and all(len(i["answers"]) == 3 for i in side)
        assert all(a["score"] == given["digits"](a["text"], {}) for i in side for a in i["answers"])
    (entry,) = result.comparison
    slow = [
        (a["score"] > b["score"]) + (a["score"] == b["score"]) / 2
        for one, two in zip(*sides, strict=True)
        for a in two["answers"]
        for b in one["answers"]
    ]
    assert entry["wins"]["value"] == pytest.approx(sum(slow) / len(slow)) and len(slow) == 45
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(result.folder / "tensorboard" / "evaluations")).Reload()
    tracked = [(e.step, pytest.approx(e.value)) for e in events.Scalars("t")]
    assert [(0, entry["before"]["value"]), (1, entry["after"]["value"])] == tracked
    page = build_report(result.folder).read_text()
    assert f'data-metric="t.wins" data-value="{entry["wins"]["value"]}"' in page and "beats one from before" in page


def test_settings_that_make_no_sense_are_refused() -> None:
    base = {"name": "t", "problems": LAB, "scorer": {"kind": "numeric"}}
    for changes, why in (
        ({"n": 2, "sampler": {"temperature": 0}}, "all n answers would be the same"),
        ({"scorer": {"kind": "self_consistency"}}, "compares the answers of a prompt"),
    ):
        with pytest.raises(ValidationError, match=why):
            ScoreTask.Config.model_validate({**base, **changes})


def test_a_scorer_that_gives_all_the_same_is_named(tmp_path: Path) -> None:
    recipe = posttrain.Recipe.model_validate(
        {
            "name": "s",
            "model": {"source": "tiny:llama"},
            "evaluate": [{"name": "t", "kind": "score", "problems": LAB, "sampler": {"max_tokens": 4},
                          "scorer": {"kind": "function", "function": "flat"}}],
        }
    )  # fmt: skip
    result = posttrain.run(recipe, tmp_path / "run", rewards={"flat": lambda text, example: 3.0})
    said = "t, before: the scorer gave every answer 3"
    assert said in build_report(result.folder).read_text()
    assert said in str(summary_table(result.folder).caption)
