"""Evaluation with many samples: items and curves by hand, the whole way on a tiny model, and what a crash leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from posttrain.config import ModelConfig
from posttrain.core.files import read_lines
from posttrain.core.item_statistics import compare, summarize
from posttrain.core.types import Rollout
from posttrain.data.prompts import RenderedPrompt
from posttrain.eval import sampled_tasks as sampled
from posttrain.eval.evaluation_tasks import GenerateTask, SampleTask
from posttrain.eval.tasks import evaluate_model

LAB = {"kind": "lab", "size": 7, "held_out": True}


def task(**changes: Any) -> SampleTask.Config:
    base = {"name": "t", "problems": LAB, "n": 4, "judge": {"kind": "numeric"}}
    return SampleTask.Config.model_validate({**base, **changes})


def rollout(text: str, right: bool, tokens: int = 3, **scores: float) -> Rollout:
    return Rollout([5] * tokens, [-1.0] * tokens, "end", text, {"judge": float(right), **scores})


def test_one_question_by_hand() -> None:
    """Answers 20, 20.0, none and 7 (right: 20); a verifier that likes the 7 best."""
    config = task(rank_by=[{"kind": "function", "name": "v", "function": "v"}])
    question = RenderedPrompt([1, 2], "7+4+9=", {"answer": "20", "source": "lab:1"})
    four = [
        rollout(*r, v=s) for r, s in ((("20", True), 1), (("so 20.0", True), 2), (("?", False), 0), (("7", False), 9))
    ]
    item = sampled.sampled_item(config, 3, question, four, rollout("7", False, v=9))
    assert [c["answer"] for c in item["completions"]] == ["20", "20", "?", "7"]
    assert item["curves"]["mean"] == [0.5, 0.5, 0.5]  # k = 1, 2, 4
    assert item["curves"]["pass"] == pytest.approx([1 / 2, 5 / 6, 1])
    # pairs: 20 20: 1; 20 and another, four times: 1/2; ? and 7: 0. All four: 20 has two.
    assert item["curves"]["vote"] == pytest.approx([1 / 2, 1 / 2, 1])
    # v = 1, 2, 0, 9: of pairs those without the 7 are (1, 2), (1, 0), (2, 0): right. All: the 7.
    assert item["curves"]["best:v"] == pytest.approx([1 / 2, 1 / 2, 0])
    # weighted: any pair with the 7 is lost; all: 20 has 3, the 7 has 9
    assert item["curves"]["weighted:v"] == pytest.approx([1 / 2, 1 / 2, 0])
    assert (item["value"], item["correct"], item["output"], item["prompt_tokens"]) == (0.5, False, "7", 2)
    assert sampled.headline_of(task(headline="vote"), item) == 1.0


def test_what_failed_is_wrong_and_chosen_last() -> None:
    config = task(n=2, vote=None, rank_by=[{"kind": "function", "name": "v", "function": "v"}])
    question = RenderedPrompt([1], "?", {"answer": "1"})
    broken = Rollout([5], [-1.0], "end", "1", {})
    item = sampled.sampled_item(config, 0, question, [broken, rollout("1", True, v=-5.0)], broken)
    assert item["completions"][0] == {
        "text": "1", "tokens": 1, "finish": "end", "judge": None, "right": False, "scores": {"v": None},
    }  # fmt: skip
    assert item["curves"]["best:v"] == [0.5, 1.0] and "vote" not in item["curves"]
    summary = sampled.summary_of(config, [item])
    assert summary["failed"] == {"judge": 2, "v": 2}


def test_the_summary_by_hand() -> None:
    """Two questions of two tokens; one always right, one never; answers of 3 and 5 tokens."""
    config = task(n=2)
    question = RenderedPrompt([1, 2], "?", {"answer": "1"})
    items = [
        sampled.sampled_item(config, i, question, [rollout(t, r, n)] * 2, rollout(t, r, n))
        for i, (t, r, n) in enumerate((("1", True, 3), ("2", False, 5)))
    ]
    summary = sampled.summary_of(config, items)
    assert (summary["prompt_tokens"], summary["completion_tokens"]) == (2.0, 4.0)
    points = {s["name"]: s["points"] for s in summary["strategies"]}
    assert list(points) == ["mean", "pass", "vote"]
    assert [(p["k"], p["tokens"], p["value"]) for p in points["vote"]] == [(1, 6.0, 0.5), (2, 10.0, 0.5)]
    # one of two: Wilson's interval, (0.5 + z^2/4 ± ...) / (1 + z^2/2) with z = 1.95996
    assert (points["pass"][1]["low"], points["pass"][1]["high"]) == pytest.approx((0.094531, 0.905469), abs=1e-6)
    assert summary["greedy"]["value"] == 0.5 and summary["greedy"]["tokens"] == 6.0
    whole = summarize(items, "sample")
    assert (whole["metric"], whole["value"], whole["n"], whole["interval"]) == ("accuracy", 0.5, 2, "95% Wilson")


def test_comparing_shares_and_comparing_rights() -> None:
    def items(values: list[float]) -> list[dict[str, Any]]:
        return [{"id": i, "value": v} for i, v in enumerate(values)]

    # Means of samples: every question rises by 1/4, so that any draw of questions does.
    one = compare(items([0.25, 0.5, 0.0]), items([0.5, 0.75, 0.25]), "sample")
    assert (one["difference"], one["low"], one["high"], one["gained"], one["lost"]) == (0.25, 0.25, 0.25, 3, 0)
    assert one["test"] == "paired bootstrap of means" and one["p_value"] == pytest.approx(2 / 5001)
    # Right or wrong: what is done for the other kinds.
    kinds = [[{"id": i, "value": float(v), "correct": v} for i, v in enumerate(s)] for s in ([1, 0, 0], [1, 1, 0])]
    assert compare(*kinds, "sample") == compare(*kinds, "choice")
    # Two questions, +1/2 and -1/4: a draw is the mean of two of them, so +1/2 (1/4), +1/8 (1/2), -1/4 (1/4).
    both = compare(items([0.0, 0.5]), items([0.5, 0.25]), "sample")
    assert both["difference"] == 0.125 and (both["low"], both["high"]) == (-0.25, 0.5)
    assert both["p_value"] == pytest.approx(0.5, abs=0.03)


def digits(text: str, example: dict[str, Any]) -> float:
    """Right where the text has a digit: something that a random model does now and then."""
    return float(any(c.isdigit() for c in text))


RANDOM = {
    "judge": {"kind": "function", "function": "digits"},
    "rank_by": [{"kind": "length", "unit": "characters", "target": 20, "width": 40}],
    "sampler": {"max_tokens": 8},
    "vote": "whole",
}
MODEL = ModelConfig(source="tiny:llama")


def test_the_whole_way_beside_another_kind(tmp_path: Path) -> None:
    data = {"source": "lab:sums", "rows": [0, 4], "chat": False}
    other = GenerateTask.Config.model_validate({"name": "g", "kind": "generate", "data": data, "max_new_tokens": 4})
    summaries = evaluate_model(MODEL, [task(**RANDOM), other], tmp_path, 0, {"digits": digits})
    items = read_lines(tmp_path / "t.jsonl")
    assert len(items) == 7 and all(len(i["completions"]) == 4 for i in items)
    assert any(c["right"] for i in items for c in i["completions"])
    for i in items:
        for c in (*i["completions"], i["greedy"]):
            assert c["right"] == bool(digits(c["text"], {})) and c["scores"]["length"] <= 0
    assert summaries[0]["value"] == pytest.approx(sum(i["value"] for i in items) / 7)
    assert json.loads((tmp_path / "t.json").read_text()) == summaries[0]
    assert {tuple(s) for s in json.loads((tmp_path / "t.samples.json").read_text())} == {
        ("prompt", "expected", "output")
    }
    # Another seed, other samples; the likeliest answers stay.
    evaluate_model(MODEL, [task(**RANDOM)], tmp_path / "other", 1, {"digits": digits})
    others = read_lines(tmp_path / "other" / "t.jsonl")
    assert [i["output"] for i in items] == [i["output"] for i in others]
    assert [i["completions"] for i in items] != [i["completions"] for i in others]


def test_it_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled, "COMPLETIONS_PER_CHUNK", 10)  # two questions a chunk
    evaluate_model(MODEL, [task(**RANDOM)], tmp_path / "calm", 0, {"digits": digits})
    calls = 0

    def dies(text: str, example: dict[str, Any]) -> float:
        nonlocal calls
        calls += 1
        if calls == 26:  # in the third of four chunks
            raise KeyboardInterrupt
        return digits(text, example)

    with pytest.raises(KeyboardInterrupt):
        evaluate_model(MODEL, [task(**RANDOM)], tmp_path / "killed", 0, {"digits": dies})
    partial = tmp_path / "killed" / "t.partial.jsonl"
    assert len(read_lines(partial)) == 4
    with partial.open("a") as f:
        f.write('{"id": 4, "prompt": "cut o')  # what a crash may leave
    evaluate_model(MODEL, [task(**RANDOM)], tmp_path / "killed", 0, {"digits": dies})
    assert calls == 25 + 1 + 3 * 5  # the chunk that it died in, and the last
    assert (tmp_path / "killed" / "t.jsonl").read_bytes() == (tmp_path / "calm" / "t.jsonl").read_bytes()
    summaries = [json.loads((tmp_path / s / "t.json").read_text()) for s in ("calm", "killed")]
    assert {**summaries[0], "seconds": 0} == {**summaries[1], "seconds": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": [8]}, "k holds 8, and there are 4 completions"),
        ({"headline": "best"}, "give rank_by a list"),
        ({"headline": "vote", "vote": None}, "headline is vote, and there is none"),
        ({"sampler": {"temperature": 0}}, "would be the same"),
        ({"rank_by": [{"kind": "math"}, {"kind": "math"}]}, "different names"),
        ({"rank_by": [{"kind": "self_consistency"}]}, "`vote` measures agreement"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        task(**changes)
    assert task(n=12).sizes == [1, 2, 4, 8, 12] and task(k=[3]).sizes == [1, 3, 4]
