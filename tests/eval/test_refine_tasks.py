"""Evaluation of self-refine: rates, the comparison at equal tokens by hand, the whole way, and what a crash leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from posttrain.config import ModelConfig
from posttrain.core.errors import DataError, PosttrainError
from posttrain.core.files import read_lines
from posttrain.core.item_statistics import compare, summarize
from posttrain.core.statistics import mean_difference
from posttrain.core.types import Rollout
from posttrain.data.prompts import RenderedPrompt
from posttrain.eval import refine_tasks as refining
from posttrain.eval import sampled_tasks
from posttrain.eval.evaluation_tasks import make_evaluation
from posttrain.eval.refine_evaluation import RefineEvaluation
from posttrain.eval.sampled_tasks import answer_of
from posttrain.eval.tasks import evaluate_model
from posttrain.models.tiny_model import tiny_tokenizer
from posttrain.rewards.verifiers import same_answer
from posttrain.sampling.refine_turns import RefineTurn

LAB = {"kind": "lab", "size": 7, "held_out": True}
V = {"kind": "function", "name": "v", "function": "v"}


def task(environment: dict[str, Any] | None = None, **changes: Any) -> RefineEvaluation.Config:
    base = {"name": "t", "problems": LAB, "n": 4, "judge": {"kind": "numeric"}}
    loop = {"kind": "refine", "rounds": 2, **(environment or {})}
    return RefineEvaluation.Config.model_validate({**base, "environment": loop, **changes})


def judged(text: str, right: bool, tokens: int = 10, **scores: float) -> Rollout:
    return Rollout([5] * tokens, [-1.0] * tokens, "end", text, {"judge": float(right), **scores})


def problem(
    number: int,
    answers: list[tuple[str, bool]],
    spent: list[int],
    tokens: tuple[int, int, int],
    stopped: str,
    samples: list[tuple[str, bool, float]],
) -> dict[str, Any]:
    """An item as the evaluation makes it. tokens: written, of requests, of other models."""
    written, requests, external = tokens
    pairs = zip(answers, spent, strict=True)
    chain = {
        "answers": [{"text": t, "judge": float(r), "right": r, "spent": s} for (t, r), s in pairs],
        "turns": [], "stopped": stopped, "changed": answers[0] != answers[-1],
        "written": written, "requests": requests, "external": external,
    }  # fmt: skip
    config = task(rank_by=[V])
    completions = sampled_tasks.completion_records(config, [judged(t, r, v=v) for t, r, v in samples])
    return {
        "id": number, "value": float(answers[-1][1]), "correct": answers[-1][1], "failed": False, "prompt_tokens": 4,
        "chain": chain, "completions": completions, "curves": sampled_tasks.curves_of(config, completions),
    }  # fmt: skip


A, B, C = ("1", True), ("2", False), ("3", False)
PROBLEMS = [
    # wrong, then right; its own feedback then finds nothing: 28 + 12 tokens
    problem(0, [B, A], [10, 35], (28, 12, 0), "verdict", [(*A, 1), (*A, 2), (*B, 3), (*B, 4)]),
    # right, right, wrong in two rounds: 40 + 10 tokens
    problem(1, [A, A, B], [10, 30, 50], (40, 10, 0), "rounds", [(*A, 1), (*A, 2), (*A, 3), (*A, 4)]),
    # right at once, and another model wrote 10 tokens to say so: 14 + 6 + 10 tokens
    problem(2, [A], [10], (14, 6, 10), "sources", [(*A, 9), (*B, 1), (*B, 2), (*B, 3)]),
    # wrong twice: 16 + 4 tokens
    problem(3, [C, C], [10, 20], (16, 4, 0), "agreement", [(*A, 1), (*A, 2), (*B, 3), (*C, 4)]),
]


def test_the_rates_by_hand() -> None:
    summary = refining.summary_of_refining(task(rank_by=[V]), PROBLEMS)
    refine = summary["refine"]
    points = [(p["k"], p["value"], p["tokens"]) for p in refine["points"]]
    # Round 1: 35, 30, the whole chain of 30, 20. Round 2: whole chains of 40, 50, 30, 20. And 4 of the prompt.
    assert points == [(0, 0.5, 14.0), (1, 0.75, 4 + 115 / 4), (2, 0.5, 39.0)]
    # one of two: Wilson's interval of 2 of 4
    assert (refine["points"][0]["low"], refine["points"][0]["high"]) == pytest.approx((0.150039, 0.849961), abs=1e-6)
    assert [refine[name] for name in ("gained", "lost", "kept_right", "kept_wrong")] == [1, 1, 1, 1]
    assert refine["changed"] == 0.5 and refine["change"]["difference"] == 0 and refine["change"]["p_value"] == 1
    assert refine["stopped"] == {"agreement": 1, "rounds": 1, "sources": 1, "verdict": 1}
    assert refine["tokens"] == {"prompt": 4.0, "written": 24.5, "requests": 8.0, "external": 2.5}
    assert summary["failed"] == {} and summary["samples"] == 4 and summary["completion_tokens"] == 10
    assert [s["name"] for s in summary["strategies"]] == ["mean", "pass", "vote", "best:v", "weighted:v"]
    whole = summarize(PROBLEMS, "sample")
    assert (whole["metric"], whole["value"], whole["interval"]) == ("accuracy", 0.5, "95% Wilson")


def test_the_comparison_at_equal_tokens_by_hand() -> None:
    """Chains of 40, 50, 30 and 20 tokens after the prompt are 3.5 samples of 10."""
    equal = refining.at_equal_tokens(task(rank_by=[V]), PROBLEMS, seed=3)
    assert (equal["k"], equal["compared_at"], equal["enough"]) == (3.5, 3.5, True)
    against = {a["name"]: a for a in equal["against"]}
    assert list(against) == ["mean", "vote", "best:v", "weighted:v"]
    # Votes of 3 and of 4. 0: of {1 1 2} twice, {1 2 2} twice, and a tie of all. 3: {1 1 2}, {1 1 3}, and {1 2 3} twice
    # with a third each; of all, 1 has two.
    votes = [0.5, 1.0, 0.0, (8 / 12 + 1) / 2]
    assert against["vote"]["value"] == pytest.approx(sum(votes) / 4)
    after = [1.0, 0.0, 1.0, 0.0]
    difference, (low, high), p = mean_difference(votes, after, seed=3)
    found = [against["vote"][key] for key in ("difference", "low", "high", "p_value")]
    assert difference == pytest.approx(0.5 - sum(votes) / 4) and low < difference < high
    assert found == pytest.approx([difference, low, high, p])
    # Best of 3 and of 4: the highest is wrong in 0 and 3; in 2 it is right, and in three of four sets of three.
    assert against["best:v"]["value"] == pytest.approx((0 + 1 + (3 / 4 + 1) / 2 + 0) / 4)
    assert against["mean"]["value"] == pytest.approx((0.5 + 1 + 0.25 + 0.5) / 4)


def test_too_few_samples_are_named_and_cheap_chains_are_worth_one() -> None:
    three = [{**p, "completions": p["completions"][:3]} for p in PROBLEMS]
    equal = refining.at_equal_tokens(task(n=3, rank_by=[V]), three)
    assert (equal["k"], equal["compared_at"], equal["enough"]) == (3.5, 3.0, False)
    long = [{**p, "completions": [{**c, "tokens": 100} for c in p["completions"]]} for p in PROBLEMS]
    equal = refining.at_equal_tokens(task(rank_by=[V]), long)
    assert (equal["k"], equal["compared_at"], equal["enough"]) == (0.35, 1.0, True)
    assert {a["value"] for a in equal["against"]} == {(0.5 + 1 + 0.25 + 0.5) / 4}  # all are one sample


def test_tokens_that_a_reward_model_reads_count_on_both_sides() -> None:
    """A sample of 10 tokens that the model reads 7.5 for is half of 35 tokens; votes still have 3.5 samples."""
    read = [
        {**p, "completions": [{**c, "read": {"v": 5 + 5 * (n % 2)}} for n, c in enumerate(p["completions"])]}
        for p in PROBLEMS
    ]
    equal = refining.at_equal_tokens(task(rank_by=[V]), read)
    assert (equal["k"], equal["enough"]) == (3.5, True)
    against = {a["name"]: a for a in equal["against"]}
    assert {name: a["k"] for name, a in against.items()} == {"mean": 3.5, "vote": 3.5, "best:v": 2.0, "weighted:v": 2.0}
    # Best of 2: wrong in half of the pairs of 0 with one right, and so on.
    assert against["best:v"]["value"] == pytest.approx((1 / 6 + 1 + 1 / 2 + 1 / 6) / 4)
    before = {a["name"]: a for a in refining.at_equal_tokens(task(rank_by=[V]), PROBLEMS)["against"]}
    assert against["vote"]["value"] == before["vote"]["value"]
    # An item has the tokens that were read for its samples.
    plain = judged("20", True, v=1.0)
    sampled = [replace(plain, rewards={**plain.rewards, "v/tokens": 6.0}), judged("7", False, v=0.0)]
    turns = [RefineTurn("answer", "20", 0, 1)]
    chain = refining.RefineChain(Rollout([5], [0.0], "stop", "20"), turns, [judged("20", True)], [], "rounds")
    asked = RenderedPrompt([1, 2], "7+4+9=", {"answer": "20", "source": "lab:1"})
    item = refining.refined_item(task(n=2, rank_by=[V]), 3, asked, sampled, chain)
    assert [c.get("read") for c in item["completions"]] == [{"v": 6}, None]


def test_one_problem_by_hand() -> None:
    """Answer of 3 tokens, request of 4 (a model wrote 7 about the answer), feedback of 2, request of 2, answer of 4."""
    turns = [
        RefineTurn("answer", "so 20.0", 0, 3), RefineTurn("request", "check", 3, 7), RefineTurn("feedback", "no", 7, 9),
        RefineTurn("request", "again", 9, 11), RefineTurn("answer", "20", 11, 15),
    ]  # fmt: skip
    mask = [True] * 3 + [False] * 4 + [True] * 2 + [False] * 2 + [True] * 4
    rollout = Rollout(list(range(15)), [-1.0] * 15, "length", "…", mask=mask)
    first, last = refining.answer_rollouts(rollout, turns)
    assert (first.text, first.finish, list(first.tokens)) == ("so 20.0", "end", [0, 1, 2])
    assert (last.text, last.finish, list(last.tokens)) == ("20", "length", [11, 12, 13, 14])
    config = task(n=2)
    question = RenderedPrompt([1, 2], "7+4+9=", {"answer": "20", "source": "lab:1"})
    chain = refining.RefineChain(rollout, turns, [judged("so 20.0", True), judged("20", True)], [7], "cut")
    item = refining.refined_item(config, 3, question, [judged("20", True), judged("7", False)], chain)
    assert [(a["text"], a["right"], a["spent"]) for a in item["chain"]["answers"]] == [
        ("so 20.0", True, 3), ("20", True, 15 + 7),
    ]  # fmt: skip
    assert {n: item["chain"][n] for n in ("written", "requests", "external", "stopped", "changed")} == {
        "written": 9, "requests": 6, "external": 7, "stopped": "cut", "changed": False,
    }  # fmt: skip
    assert refining.tokens_of_chain(item) == 22 and item["chain"]["turns"][2] == {
        "kind": "feedback", "text": "no", "tokens": 2,
    }  # fmt: skip
    assert (item["value"], item["correct"], item["failed"], item["output"]) == (1.0, True, False, "20")
    assert item["curves"]["vote"] == [0.5, 0.5]
    # The same number is the same answer; where one has no answer, or nothing votes, texts are compared.
    without = refining.refined_item(task(n=2, vote=None), 3, question, [judged("20", True)] * 2, chain)
    assert without["chain"]["changed"] and "vote" not in without["curves"]


def test_programs_as_votes_are_texts() -> None:
    """Programs with the same number in them are others, for votes and for agreement."""
    one, two = "def f(x):\n return x[:-1]", "def f(x):\n return x[::-1]"
    config = task(n=2, vote="whole")
    assert len({answer_of(text, config) for text in (one, two, f"{one}\n")}) == 2
    assert answer_of(" 2.0 ", config) == answer_of("2", config)
    assert same_answer(one, one + " ", "whole") and not same_answer(one, two, "whole")


def test_an_answer_that_the_judge_failed_on_is_wrong_and_counted() -> None:
    config, question = task(n=1), RenderedPrompt([1], "?", {"answer": "1"})
    broken = Rollout([5], [-1.0], "end", "1", {})
    rollout = Rollout([5, 6, 7], [-1.0] * 3, "stop", "", mask=[True, False, True])
    turns = [RefineTurn("answer", "1", 0, 1), RefineTurn("request", "r", 1, 2), RefineTurn("answer", "1", 2, 3)]
    chain = refining.RefineChain(rollout, turns, [judged("1", True), broken], [], "agreement")
    item = refining.refined_item(config, 0, question, [broken], chain)
    assert item["failed"] and not item["correct"] and item["chain"]["answers"][1]["judge"] is None
    summary = refining.summary_of_refining(config, [item])
    assert summary["failed"] == {"judge": 2} and summary["refine"]["lost"] == 1
    sound = {**item, "failed": False}
    assert compare([sound], [item], "sample")["failed"] == {"before": 0, "after": 1}


def digits(text: str, example: dict[str, Any]) -> float:
    """Right where the text has a digit: something that a random model does now and then."""
    return float(any(c.isdigit() for c in text))


def note(answer: str, example: dict[str, Any]) -> str | None:
    """Count capitals, which no special token has."""
    count = sum(c.isupper() for c in answer)
    return f"{count} capitals" if count else None


RANDOM = {
    "judge": {"kind": "function", "function": "digits"},
    "sampler": {"max_tokens": 24},
    "rank_by": [{"kind": "length", "unit": "characters", "target": 10, "width": 40}],
    "vote": "whole",
    "n": 3,
    "environment": {
        "kind": "refine", "rounds": 2, "answers": "inline", "stop": list("uvwyz 0123456789"), "agreement": False,
        "feedback": [{"kind": "function", "function": "note"}], "verdict": None,
    },
}  # fmt: skip
GIVEN = {"digits": digits, "note": note}
MODEL = ModelConfig(source="tiny:llama")


def random_task(**changes: Any) -> RefineEvaluation.Config:
    return task(**{**RANDOM, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refine") / "calm"
    evaluate_model(MODEL, [random_task()], folder, 0, GIVEN)
    return folder


def test_the_whole_way(made: Path) -> None:
    items, summary = read_lines(made / "t.jsonl"), json.loads((made / "t.json").read_text())
    assert len(items) == 7 and all(len(i["completions"]) == 3 for i in items)
    stopped = [i["chain"]["stopped"] for i in items]
    assert "rounds" in stopped
    for item in items:
        for c in item["completions"]:
            assert c["right"] == bool(digits(c["text"], {})) and c["scores"]["length"] <= 0
        chain = item["chain"]
        kinds = [t["kind"] for t in chain["turns"]]
        whole = ["answer", "request", "feedback", "request", "answer", "request", "feedback", "request", "answer"]
        assert kinds == whole[: len(kinds)] and (chain["stopped"] != "rounds" or kinds == whole)
        texts = [t["text"] for t in chain["turns"] if t["kind"] == "answer"]
        assert texts == [a["text"] for a in chain["answers"]] and item["output"] == texts[-1]
        for answer in chain["answers"]:
            assert answer["right"] == bool(digits(answer["text"], {}))
        assert sum(t["tokens"] for t in chain["turns"]) == chain["written"] + chain["requests"]
        assert max(t["tokens"] for t in chain["turns"] if t["kind"] != "request") <= 24
        for turn, before in zip(chain["turns"][1:], chain["turns"], strict=False):
            if before["kind"] == "answer":
                said = note(before["text"], {})
                assert said in turn["text"] if said else "capitals" not in turn["text"]
    assert summary["kind"] == "sample" and summary["value"] == sum(i["value"] for i in items) / 7
    assert summary["refine"]["points"][-1]["value"] == summary["value"]
    assert sum(summary["refine"]["stopped"].values()) == 7


def test_a_problem_s_item_does_not_depend_on_what_else_is_sampled(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampled_tasks, "COMPLETIONS_PER_CHUNK", 8)  # one problem a chunk
    evaluate_model(MODEL, [random_task()], tmp_path, 0, GIVEN)
    assert (tmp_path / "t.jsonl").read_bytes() == (made / "t.jsonl").read_bytes()
    fewer = random_task(n=2, problems={**LAB, "size": 4})
    evaluate_model(MODEL, [fewer], tmp_path / "fewer", 0, GIVEN)
    pairs = list(zip(read_lines(tmp_path / "fewer" / "t.jsonl"), read_lines(made / "t.jsonl"), strict=False))
    assert len(pairs) == 4
    for some, every in pairs:
        assert some["chain"] == every["chain"] and some["completions"] == every["completions"][:2]


def test_it_resumes_where_it_was_killed(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled_tasks, "COMPLETIONS_PER_CHUNK", 16)  # two problems a chunk
    calls = 0

    def dies(answer: str, example: dict[str, Any]) -> str | None:
        nonlocal calls
        calls += 1
        if example["source"].endswith(":5") and calls < 1000:
            calls = 1000
            raise KeyboardInterrupt
        return note(answer, example)

    with pytest.raises(KeyboardInterrupt):
        evaluate_model(MODEL, [random_task()], tmp_path, 0, {**GIVEN, "note": dies})
    assert len(read_lines(tmp_path / "t.partial.jsonl")) == 4
    evaluate_model(MODEL, [random_task()], tmp_path, 0, {**GIVEN, "note": dies})
    assert (tmp_path / "t.jsonl").read_bytes() == (made / "t.jsonl").read_bytes()
    summaries = [json.loads((folder / "t.json").read_text()) for folder in (made, tmp_path)]
    assert {**summaries[0], "seconds": 0} == {**summaries[1], "seconds": 0}


def test_judges_and_sources_that_fail(tmp_path: Path) -> None:
    """A judge's failures count as wrong and are named; a source that fails would change the chain, and stops."""

    def sometimes(text: str, example: dict[str, Any]) -> float:
        if len(text) == 13:
            raise ValueError("no idea")
        return digits(text, example)

    (summary,) = evaluate_model(MODEL, [random_task()], tmp_path / "judge", 0, {**GIVEN, "digits": sometimes})
    items = read_lines(tmp_path / "judge" / "t.jsonl")
    texts = [x["text"] for i in items for x in (*i["completions"], *i["chain"]["answers"])]
    assert summary["failed"] == {"judge": sum(len(text) == 13 for text in texts)} and summary["failed"]["judge"] > 0
    assert [i["correct"] for i in items if i["failed"]] == [False]

    def broken(answer: str, example: dict[str, Any]) -> str:
        raise ValueError("no connection")

    with pytest.raises(PosttrainError, match=r"(?s)feedback.*no connection"):
        evaluate_model(MODEL, [random_task()], tmp_path / "source", 0, {**GIVEN, "note": broken})
    assert not (tmp_path / "source" / "t.json").exists()


def test_problems_must_be_turns_where_requests_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="problems are plain text.*kind lab: chat: true"):
        evaluate_model(MODEL, [task()], tmp_path, 0)
    evaluation = make_evaluation(task(problems={**LAB, "chat": True}))
    tokenizer = tiny_tokenizer()
    assert len(evaluation.read(tokenizer, 512).items) == 7
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        evaluation.read(tokenizer, 512)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": {"kind": "calculator"}}, r"needs \{kind: refine"),
        ({"sampler": {"max_tokens": 9, "min_tokens": 2}}, "min_tokens would hold in every turn anew"),
        ({"sampler": {"temperature": 0}}, "would be the same"),
        ({"sampler": {"stop": ["end"]}}, "sampler.stop would end a whole chain"),
        ({"sampler": {"stop_tokens": [3]}}, "sampler.stop_tokens would end a whole chain"),
        ({"k": [8]}, "k holds 8, and there are 4 completions"),
        ({"chain_temperature": -1}, "chain_temperature"),
        ({"headline": "vote"}, "headline"),
        ({"rank_by": [{"kind": "self_consistency"}]}, "`vote` measures agreement"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        base = {"name": "t", "problems": LAB, "n": 4, "environment": {"kind": "refine"}}
        RefineEvaluation.Config.model_validate({**base, **changes})
