"""The stage: people's labels, a judge's on the same texts, answers sampled from the policy; killed, it goes on."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import posttrain
from posttrain.config import RLConfig
from posttrain.core.errors import DataError
from posttrain.core.files import read_lines
from posttrain.report import judge_figures as report
from posttrain.sampling.rollout_store import rollout_steps

REVIEWS = {
    "kind": "ratings",
    "data": {
        "source": "packaged:movie_reviews.tsv",
        "prompt": "Write a sentence of a movie review.",
        "completion": "{text}",
        "shuffle_seed": 1,
        "rows": [0, 60],
    },
    "ratings": "ratings",
    "pairs_per_prompt": 20,
}


def recipe(tmp_path: Path, *stages: dict[str, Any], **changes: Any) -> posttrain.Recipe:
    return posttrain.Recipe.model_validate(
        {"name": "f", "model": {"source": "tiny:llama"}, "stages": list(stages), **changes}
    )


def judge(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {"model": {"source": "tiny:gpt2"}, "store": str(tmp_path / "judge.sqlite3"), **changes}


def test_people_and_a_judge_label_the_same_texts(tmp_path: Path) -> None:
    """Two stages side by side: the same pairs, two kinds of labels, a report on the judge against the people."""
    human = {"method": "feedback", "name": "human", "labels": "human", "answers": REVIEWS}
    ai = {"method": "feedback", "name": "ai", "labels": "judge", "answers": REVIEWS, "judge": judge(tmp_path)}
    screen = io.StringIO()
    result = posttrain.run(recipe(tmp_path, human, ai), tmp_path / "run", console=Console(file=screen, width=500))
    stages = result.folder / "stages"
    mine, theirs = (read_lines(stages / f / "data" / "rows.jsonl") for f in ("0-human", "1-ai"))
    ties = {u["source"] for u in read_lines(stages / "1-ai" / "left_out.jsonl") if u["reason"] == "a tie"}
    assert 15 <= len(mine) <= 20 and len(ties) < 3
    mine = [r for r in mine if r["source"] not in ties]
    assert [r["source"] for r in mine] == [r["source"] for r in theirs]
    for r, s in zip(mine, theirs, strict=True):
        assert {r["chosen"], r["rejected"]} == {s["chosen"], s["rejected"]}
        assert r["probability"] > 0.5 < s["probability"] and r["margin"] > 0 < s["margin"]
        assert (r["labels"], s["labels"], r["prompt"]) == ("human", "judge", "Write a sentence of a movie review.")
        same = r["chosen"] == s["chosen"]
        assert s["human_probability"] == pytest.approx(r["probability"] if same else 1 - r["probability"])
        assert sum(s["judge"]["orders"]) / 2 == pytest.approx(s["probability"])
    raters = json.loads((stages / "0-human" / "raters.json").read_text())
    assert raters["units"] == 60 and 0.5 < raters["alpha"]["interval"] < 0.95
    found = json.loads((stages / "1-ai" / "judge.json").read_text())
    said = screen.getvalue()  # what is wrong with the judge is said when its stage ends, and once more with the report
    assert found["warnings"] and all(f"! 1-ai: {w}" in said.replace("\n", " ") for w in found["warnings"])
    assert said.index("! 1-ai") < said.index("feedback of stage")
    judged = len(mine) + len(ties)
    agree = (sum(r["chosen"] == s["chosen"] for r, s in zip(mine, theirs, strict=True)) + len(ties) / 2) / judged
    assert found["people"]["agreement"]["value"] == pytest.approx(agree) and found["cost"]["questions"] == 2 * judged
    shown = "\n".join(report.feedback_lines(result.folder, 2))
    assert "Krippendorff's alpha" in shown and "agrees with people" in shown and f"{agree:.3f}" in shown
    page = result.report.read_text()
    assert 'id="feedback"' in page and "Disagreements to look at" in page
    assert not result.model.exists()  # nothing was trained, and the run is done all the same
    assert json.loads((result.folder / "manifest.json").read_text())["status"] == "done"


def sampled(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    answers = {
        "kind": "samples",
        "problems": {"kind": "lab", "size": 10},
        "n": 3,
        "sampler": {"max_tokens": 5},
        "prompts_at_once": 4,
        "pairs_per_prompt": 2,
    }
    return {"method": "feedback", "labels": "judge", "answers": {**answers, **changes}, "judge": judge(tmp_path)}


def test_answers_of_the_policy_are_kept_and_sampled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken off behind the first lot, and again while judging, the stage ends in the rows of one that was not."""
    from posttrain.judge.local_judge import LocalJudge
    from posttrain.sampling.engine import LocalSampler

    sample, verdicts = LocalSampler.sample, LocalJudge._verdicts
    asked: list[int] = []

    def counts(self: Any, chunk: Any, *rest: Any) -> Any:
        asked.append(len(chunk))
        return verdicts(self, chunk, *rest)

    # The same batches in every run: a tie may be none when it is computed beside other questions.
    monkeypatch.setattr("posttrain.judge.local_judge.FORWARD_TOKENS", 1000)
    monkeypatch.setattr(LocalJudge, "_verdicts", counts)
    whole = posttrain.run(recipe(tmp_path, sampled(tmp_path)), tmp_path / "whole")
    monkeypatch.setattr(LocalJudge, "_verdicts", verdicts)
    rows = read_lines(whole.folder / "stages" / "0-feedback" / "data" / "rows.jsonl")
    assert 10 < len(rows) <= 20 and all(r["chosen"].strip() != r["rejected"].strip() for r in rows)
    assert rollout_steps(whole.folder / "stages" / "0-feedback" / "rollouts") == [1, 2, 3]
    calls: list[int] = []

    def breaks(self: Any, requests: Any, *rest: Any) -> Any:
        calls.append(len(requests))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(self, requests, *rest)

    monkeypatch.setattr(LocalSampler, "sample", breaks)
    again = sampled(tmp_path) | {"judge": judge(tmp_path, store=str(tmp_path / "other.sqlite3"))}
    with pytest.raises(KeyboardInterrupt):
        posttrain.run(recipe(tmp_path, again), tmp_path / "broken")
    judged: list[int] = []

    def breaks_too(self: Any, chunk: Any, *rest: Any) -> Any:
        judged.append(len(chunk))
        if len(judged) == 3:
            raise KeyboardInterrupt
        return verdicts(self, chunk, *rest)

    monkeypatch.setattr(LocalJudge, "_verdicts", breaks_too)
    with pytest.raises(KeyboardInterrupt):
        posttrain.run(recipe(tmp_path, again), tmp_path / "broken")
    result = posttrain.run(recipe(tmp_path, again), tmp_path / "broken")
    assert calls == [4, 4, 4, 2]  # the second lot was begun twice, no other
    assert sum(judged) - judged[2] == sum(asked) >= 2 * len(rows)  # no question was answered twice; ties are no rows
    found = read_lines(result.folder / "stages" / "0-feedback" / "data" / "rows.jsonl")
    assert [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in found] == [
        {k: r[k] for k in ("prompt", "chosen", "rejected")} for r in rows
    ]
    assert [r["probability"] for r in found] == pytest.approx([r["probability"] for r in rows], abs=1e-4)


def test_what_got_no_row_is_in_a_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifteen pairs of equal ratings, an answer that is its prompt again, and one that is empty: all by name."""
    path = tmp_path / "ratings.jsonl"
    rows = [{"prompt": f"p{i}", "completion": f"{j}", "ratings": [1]} for i in range(15) for j in range(2)]
    rows += [{"prompt": "q", "completion": c, "ratings": [r]} for c, r in (("good", 2), ("bad", 1))]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    people = {"method": "feedback", "labels": "human",
              "answers": {"kind": "ratings", "data": {"source": str(path)}, "ratings": "ratings"}}  # fmt: skip
    result = posttrain.run(recipe(tmp_path, people), tmp_path / "people")
    left = read_lines(result.folder / "stages" / "0-feedback" / "left_out.jsonl")
    assert len(left) == 15 and {x["reason"] for x in left} == {"tie"} and len({x["source"] for x in left}) == 15
    from posttrain.sampling.engine import LocalSampler

    sample = LocalSampler.sample

    def echoing(self: Any, requests: Any, *rest: Any) -> Any:
        groups = sample(self, requests, *rest)
        asked = str(requests[0].example["messages"][-1]["content"])
        texts = [f" {asked}\n", "", groups[0].rollouts[2].text or "x"]
        groups[0] = replace(
            groups[0], rollouts=[replace(r, text=t) for r, t in zip(groups[0].rollouts, texts, strict=True)]
        )
        return groups

    monkeypatch.setattr(LocalSampler, "sample", echoing)
    result = posttrain.run(recipe(tmp_path, sampled(tmp_path, prompts_at_once=10)), tmp_path / "sampled")
    left = read_lines(result.folder / "stages" / "0-feedback" / "left_out.jsonl")
    found = {x["reason"] for x in left}
    assert {"the answer is the prompt again", "empty answer", "prompts with fewer than two answers"} <= found
    stored = json.loads((result.folder / "stages" / "0-feedback" / "judge.json").read_text())
    assert stored["answers_left_out"]["the answer is the prompt again"] == 1


def test_thumbs_stay_thumbs_and_what_can_not_be_labelled_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "thumbs.jsonl"
    rows = [{"prompt": "p", "completion": c, "label": c == "good"} for c in ("good", "worse")]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    answers = {"kind": "thumbs", "data": {"source": str(path)}}
    stage = {"method": "feedback", "labels": "human", "answers": answers}
    result = posttrain.run(recipe(tmp_path, stage), tmp_path / "run")
    made = read_lines(result.folder / "stages" / "0-feedback" / "data" / "rows.jsonl")
    assert [(r["completion"], r["label"]) for r in made] == [("good", True), ("worse", False)]
    path.write_text(json.dumps({"prompt": "p", "completions": ["a", "b"]}) + "\n")
    with pytest.raises(DataError, match="labels: human needs people's labels, and these rows have none"):
        posttrain.run(recipe(tmp_path, {**stage, "answers": {**answers, "kind": "candidates"}}), tmp_path / "none")
    with pytest.raises(ValueError, match="nobody has labelled sampled answers"):
        recipe(tmp_path, {**sampled(tmp_path), "labels": "human", "judge": None})
    with pytest.raises(ValueError, match="labels: judge needs a judge"):
        recipe(tmp_path, {**stage, "labels": "judge"})


def test_a_later_stage_reads_the_labels_and_a_judge_rewards_directly(tmp_path: Path) -> None:
    """feedback → SFT on the chosen answers → reinforcement by the judge's score, in one recipe."""
    score = judge(tmp_path, mode="score", scale={"bad": 0, "good": 1})
    ai = {"method": "feedback", "name": "ai", "labels": "judge", "answers": REVIEWS, "judge": judge(tmp_path)}
    sft = {"method": "sft", "data": {"source": "stage:ai"}, "batch_size": 4, "max_steps": 2}
    rl = {
        "method": "rloo",
        "problems": {"kind": "lab", "size": 8},
        "rewards": {"terms": [{"kind": "judge", "judge": score}]},
        "sampler": {"max_tokens": 4},
        "prompts_per_step": 2,
        "group_size": 2,
        "steps": 2,
    }
    result = posttrain.run(recipe(tmp_path, ai, sft, rl), tmp_path / "run")
    metrics = read_lines(result.folder / "stages" / "2-rl" / "metrics.jsonl")
    assert len(metrics) == 2 and all(0 < m["reward"] < 1 for m in metrics)
    assert (result.model / "model.safetensors").exists()
    assert isinstance(recipe(tmp_path, rl).stages[0], RLConfig)
