"""The judge held here: labels against transformers' own logits, orders, scores, principles, rationales, the store."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.config import JudgeConfig, ModelConfig, RewardsConfig
from posttrain.config.rl import KLConfig
from posttrain.core.errors import CheckpointError, DataError, RecipeError
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.data.comparisons import AnswerPair
from posttrain.judge.answer_store import Store
from posttrain.judge.asker import Asker, JudgeAnswer, JudgeRequest, OnAnswer
from posttrain.judge.judge_prompts import mark_of, question, read_label
from posttrain.judge.judge_summary import summarize_judge
from posttrain.judge.labels import OPPOSED, AnswerScore, Judge, JudgedPair, Verdict, above, combined
from posttrain.judge.local_judge import _alone
from posttrain.judge.server_judge import label_probabilities
from posttrain.recipe.machine_checks import blocks
from posttrain.recipe.parsing import load_recipe, shipped
from posttrain.rewards import RewardStack
from posttrain.rewards.model_rewards import ScalarReward
from tests.judge.serving import PAIRS


def opened(tmp_path: Path, source: str = "tiny:llama", **changes: Any) -> Judge:
    return Judge.open(JudgeConfig(model=ModelConfig(source=source), store=str(tmp_path / "judge.sqlite3"), **changes))


def test_a_template_that_marks_no_text_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = JudgeConfig(
        model=ModelConfig(source="tiny:llama"), store=str(tmp_path / "s"), template="{first} or {second}?"
    )
    for name in ("stage labels", "stage labels", "reward judge"):
        Judge.open(config, name).close()
    marked = config.model_copy(update={"template": "<{mark}>{first}</{mark}> or <{mark}>{second}</{mark}>?"})
    Judge.open(marked, "stage marked").close()
    Judge.open(config.model_copy(update={"template": None}), "stage plain").close()
    told = [r.getMessage() for r in caplog.records]
    assert [t.split(":")[0] for t in told] == ["stage labels", "reward judge"] and all("{mark}" in t for t in told)


def test_the_judges_of_shipped_recipes_mark_every_text() -> None:
    found = [b for name in shipped() for _, b in blocks(load_recipe(name)) if isinstance(b, JudgeConfig) and b.template]
    assert len(found) >= 3
    for config in found:
        for text in ("{prompt}{answer}", "{first}", "{second}"):
            assert text not in config.template or f"<{{mark}}>\n{text}\n</{{mark}}>" in config.template


def chain(model: Any, tokens: list[int], start: int) -> float:
    """The probability of tokens[start:] after the rest, one sequence at a time, by transformers."""
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return math.exp(sum(logprobs[i - 1, tokens[i]].item() for i in range(start, len(tokens))))


def test_labels_are_the_models_own_probabilities_in_both_orders(judge_folder: Path, tmp_path: Path) -> None:
    """Against transformers' logits on the same text: P(A) + P(" A") over the labels' sum; the mean of both orders."""
    with opened(tmp_path, str(judge_folder)) as judge:
        judged = judge.compare(PAIRS[:3])
    model, tokenizer = (c.from_pretrained(judge_folder) for c in (AutoModelForCausalLM, AutoTokenizer))
    for j in judged:
        expected = []
        for first, second, mine in ((j.pair.a, j.pair.b, "A"), (j.pair.b, j.pair.a, "B")):
            text = question(judge.config, j.pair.prompt, (first, second), ())
            mark = mark_of(str(j.pair.prompt), *sorted((first, second)))
            told = text.replace(f"<{mark}>", "<").replace(f"</{mark}>", ">")
            assert f"Answer A: <{first}>\n\nAnswer B: <{second}>\n\nWhich answer is better? Reply with A or B" in told
            ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
            ids = list(ids if isinstance(ids, list) else ids["input_ids"])
            mass = {}
            for label in "AB":
                ways = [tokenizer(t)["input_ids"] for t in (label, " " + label)]
                mass[label] = sum(chain(model, ids + w, len(ids)) for w in ways)
            expected.append(mass[mine] / sum(mass.values()))
        assert j.orders == pytest.approx(tuple(expected), abs=1e-4)
        assert j.p_a == pytest.approx(sum(expected) / 2, abs=1e-4) and j.margin == pytest.approx(2 * j.p_a - 1)


def test_scores_are_expectations_and_one_is_not_ten(tmp_path: Path) -> None:
    """1 to 10 by a byte-level model, for which "10" is "1" and then "0": P("1") is without what goes on to "10"."""
    with opened(tmp_path, mode="score", question="How good?") as judge:
        (score,) = judge.score(["Say hi."], ["Hi."])
        assert score.expectation is not None and score.verdict is not None
        text = question(judge.config, "Say hi.", ["Hi."], ())
        assert "How good? Reply with a whole number from 1 (worst) to 10 (best) only." in text
        model, tokenizer, _ = judge.asker.backend._open()  # type: ignore[attr-defined]
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        ids = list(ids if isinstance(ids, list) else ids["input_ids"])
        mass = {}
        for n in range(1, 11):
            ways = [tokenizer(t)["input_ids"] for t in (str(n), f" {n}")]
            mass[n] = sum(chain(_plain(), ids + w, len(ids)) for w in ways)
        mass[1] -= mass[10]
        expected = sum(n * p for n, p in mass.items()) / sum(mass.values())
        assert score.expectation == pytest.approx(expected, abs=1e-4)
        assert score.verdict.mass == pytest.approx(sum(mass.values()), rel=1e-3)
        with pytest.raises(RecipeError, match="needs judge.mode=score"):
            opened(tmp_path).score(["p"], ["a"])
    found = {(1,): 0.5, (1, 0): 0.2, (1, 0, 0): 0.05, (2,): 0.1}
    assert [_alone(t, found) for t in found] == pytest.approx([0.3, 0.15, 0.05, 0.1])


def _plain() -> Any:
    from posttrain.models.tiny_model import tiny_model

    return tiny_model("llama")


def test_numbers_by_hand() -> None:
    assert combined((0.9, 0.3), "probabilities") == pytest.approx(0.6)
    # odds 9 and 3/7: the root of their product is 1.96396, and 1.96396 / 2.96396 is 0.66261
    assert combined((0.9, 0.3), "logits") == pytest.approx(0.66261, abs=1e-5)
    # a constant preference for the first place, +3 on the logit of both orders, goes: logit p is 1
    biased = 1 / (1 + math.exp(-4)), 1 - 1 / (1 + math.exp(-2))
    assert combined(biased, "logits") == pytest.approx(1 / (1 + math.exp(-1)))
    assert combined((1.0, 1.0), "logits") == pytest.approx(1 - 1e-6)
    worth = {"6": 6.0, "7": 7.0}
    assert above({"6": 0.0, "7": 1.0}, {"6": 0.5, "7": 0.5}, worth) == 0.75
    assert above({"6": 0.5, "7": 0.5}, {"6": 0.5, "7": 0.5}, worth) == 0.5
    # a judge that always says the same prefers neither, whatever rounding makes of it
    assert (
        combined((1.0, 0.0), "logits") == combined((0.7, 0.3), "logits") == combined((0.9, 0.1), "probabilities") == 0.5
    )
    thirds = {"6": 1 / 3, "7": 0.1 + 0.2, "8": 1 - 1 / 3 - (0.1 + 0.2)}
    assert above(thirds, thirds, {**worth, "8": 8.0}) == 0.5


def test_what_a_template_would_not_ask_is_refused(tmp_path: Path) -> None:
    principles = tmp_path / "principles.txt"
    principles.write_text("Be short.\n")
    given = {"model": {"source": "tiny:llama"}, "template": "{first} or {second}?"}
    for more, named in (
        ({"principles": str(principles)}, "principles"),
        ({"question": "Which is kinder?"}, "question"),
    ):
        with pytest.raises(ValueError, match=f"{named} would never be asked: template has no field"):
            JudgeConfig.model_validate({**given, **more})
        JudgeConfig.model_validate({**given, **more, "template": f"{{{named}}} {given['template']}"})


def test_settings_that_would_do_nothing_are_refused() -> None:
    judge = {"model": {"source": "tiny:llama"}}
    for more, named in (
        ({"mode": "score", "labels": ("C", "D")}, "labels"),
        ({"mode": "score", "labels": ("C", "D"), "combine": "logits"}, "labels and combine"),
        ({"scale": {"bad": 0, "good": 1}}, "scale"),
    ):
        with pytest.raises(ValueError, match=f"{named} would do nothing: mode is"):
            JudgeConfig.model_validate({**judge, **more})
    JudgeConfig.model_validate({**judge, "mode": "score", "scale": {"bad": 0, "good": 1}})
    worded = {"template": "{first} or {second}? They are {scale}.", "scale": {"bad": 0, "good": 1}}
    JudgeConfig.model_validate({**judge, **worded})  # the template names them
    with pytest.raises(ValueError, match="spread would do nothing: combine is mean"):
        ScalarReward.Config.model_validate({"source": "x", "spread": 2})
    with pytest.raises(ValueError, match=r"kl.gain would do nothing: .* unless kl.target"):
        KLConfig.model_validate({"coefficient": 0.1, "gain": 0.2})
    whole = KLConfig(coefficient=0.1).model_dump(), ScalarReward.Config(source="x").model_dump()
    assert KLConfig.model_validate(whole[0]) and ScalarReward.Config.model_validate(whole[1])  # recipes hold all fields


def test_replies_are_read_only_where_they_say_one_thing() -> None:
    letters, numbers = ("A", "B"), tuple(str(n) for n in range(1, 11))
    cases = {
        "B": "B",
        " a.": "A",
        "**B**": "B",
        "Answer: A": "A",
        "B, because A is longer": "B",
        "The better is B.": "B",
    }
    assert {text: read_label(text, letters) for text in cases} == cases
    assert [read_label(t, letters) for t in ("", "neither", "It is a tie of A and B", "a good answer is hard")] == [
        None, None, None, "A",
    ]  # fmt: skip
    scores = {"7": "7", "10": "10", "Score: 8/10": "8", "I give it 9 out of 10.": "9", "7.5": None, "1 or 2": "1"}
    assert {text: read_label(text, numbers) for text in scores} == scores
    assert read_label("0", numbers) is None and read_label("between 3 and 4", numbers) is None
    assert read_label("Positive.", ("negative", "positive")) == "positive"


def test_probabilities_of_a_servers_tokens() -> None:
    """In the protocol's form. "1" then "0" is 10: of 0.5 on "1", 0.6 go on to "10"."""
    tops = [("B", {"A": math.log(0.2), "B": math.log(0.6), " B": math.log(0.1), "The": math.log(0.1)})]
    assert label_probabilities(tops, "AB") == pytest.approx({"A": 0.2, "B": 0.7})
    numbers = tuple(str(n) for n in range(1, 11))
    tops = [("1", {"1": math.log(0.5), "7": math.log(0.3)}), ("0", {"0": math.log(0.6), "<end>": math.log(0.4)})]
    found = label_probabilities(tops, numbers)
    assert found is not None
    assert {k: v for k, v in found.items() if v} == pytest.approx({"1": 0.2, "10": 0.3, "7": 0.3})
    assert label_probabilities([("I", {"I": -0.1, "A": -3.0})], "AB") is None  # it begins with other words
    words = ("negative", "positive")
    tops = [("Pos", {"Pos": math.log(0.5), "neg": math.log(0.3), "Negative": math.log(0.1)}), ("itive", {"itive": 0.0})]
    assert label_probabilities(tops, words) == pytest.approx({"positive": 0.5, "negative": 0.4})
    both = [("very ", {"very ": 0.0}), ("good", {"good": 0.0})]
    assert label_probabilities(both, ("very bad", "very good")) is None  # not told apart yet: the text is read


class Counting:
    """A backend that counts and can break down: for the asker and the store alone."""

    def __init__(self, fails_at: int = 10**9) -> None:
        self.asked: list[str] = []
        self.fails_at = fails_at

    def identity(self) -> dict[str, Any]:
        return {"kind": "counting"}

    def account(self) -> dict[str, Any]:
        return {"seconds": 0.0}

    def answer(self, asks: Sequence[JudgeRequest], on_answer: OnAnswer) -> None:
        for i, ask in enumerate(asks):
            if len(self.asked) == self.fails_at:
                raise RuntimeError("broke down")
            self.asked.append(ask.messages[0]["content"])
            on_answer([(i, JudgeAnswer("A", {"A": 0.9, "B": 0.1}, "label", 10, 1, 0.5))])


def ask(text: str, **changes: Any) -> JudgeRequest:
    return JudgeRequest(({"role": "user", "content": text},), **changes)


def test_nothing_is_asked_twice_and_what_was_answered_stays(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite3")
    broken = Counting(fails_at=2)
    with pytest.raises(RuntimeError, match="broke down"):
        Asker(broken, store)([ask("a"), ask("b"), ask("a"), ask("c")])
    assert broken.asked == ["a", "b"] and len(store) == 2  # the question that is there twice was asked once
    store.close()
    again, backend = Store(tmp_path / "s.sqlite3"), Counting()
    asker = Asker(backend, again)
    assert [a.text for a in asker([ask("a"), ask("b"), ask("a"), ask("c")])] == ["A"] * 4
    assert backend.asked == ["c"] and asker.cost()["from_store"] == 2 and asker.cost()["prompt_tokens"] == 30
    assert asker.cost()["answer_seconds"] == 1.5 and asker.cost()["seconds"] == 0.0
    # Everything that an answer may depend on makes another question of it; the seed only where something is drawn.
    for other in (ask("a", labels=("A", "B")), ask("a", max_tokens=9), ask("a", attempt=1), ask("a", opening="So")):
        asker([other])
    asker([ask("a", seed=5)])
    assert backend.asked == ["c", "a", "a", "a", "a"]
    row = sqlite3.connect(tmp_path / "s.sqlite3").execute("SELECT question, judge FROM answers").fetchone()
    assert "messages" in row[0] and "counting" in row[1]  # the prompt itself is kept
    (tmp_path / "text").write_text("not a database, and longer than a header" * 9)
    with pytest.raises(CheckpointError, match="can't be used as a judge's store"):
        Store(tmp_path / "text")


def test_principles_are_drawn_by_the_questions_content(tmp_path: Path) -> None:
    file = tmp_path / "principles.txt"
    file.write_text("# kinds of goodness\nBe kind.\n\nBe brief.\nBe right.\n")
    with opened(tmp_path, principles=str(file), principles_per_question=2) as judge:
        judged = judge.compare(PAIRS)
        turned = judge.compare([AnswerPair(p.prompt, p.b, p.a) for p in PAIRS[::-1]])[::-1]
        assert [j.principles for j in judged] == [
            j.principles for j in turned
        ]  # whatever the order of rows and answers
        assert {len(j.principles) for j in judged} == {2} and len({j.principles for j in judged}) == 3
        text = question(judge.config, "p", ("a", "b"), ["Be kind.", "Be right."])
        assert text.startswith("Judge by these principles:\n- Be kind.\n- Be right.\n\nHere are two answers")
        assert judge.asker.counts["asked"] == 24  # a pair the other way round is the same two questions
    with pytest.raises(DataError, match="holds none"):
        file.write_text("# nothing\n")
        opened(tmp_path, principles=str(file))
    with pytest.raises(RecipeError, match="is 9, and .* holds 1"):
        file.write_text("one")
        opened(tmp_path, principles=str(file), principles_per_question=9)


def test_a_rationale_comes_first_and_is_part_of_the_question(tmp_path: Path) -> None:
    with opened(tmp_path, rationale=12) as judge:
        plain = Judge(judge.config.model_copy(update={"rationale": 0}), judge.asker).compare(PAIRS[:2])
        judged = judge.compare(PAIRS[:2])
        assert all(len(j.rationales) == 2 for j in judged) and not plain[0].rationales
        assert judged[0].orders != plain[0].orders
        assert len(judge.asker.store) == 12  # 4 verdicts at once, 4 rationales, 4 verdicts after them
        database = judge.asker.store.database
        texts = [q for (q,) in database.execute("SELECT question FROM answers WHERE question LIKE '%assistant%'")]
        assert len(texts) == 4 and all("Now the verdict: reply with A or B only." in q for q in texts)


def test_both_answers_of_a_pair_are_scored_by_the_same_principles(tmp_path: Path) -> None:
    """Drawn once for both; without a number all of them are in every question."""
    file = tmp_path / "principles.txt"
    file.write_text("Be kind.\nBe brief.\nBe right.\n")
    scale = {"bad": 0.0, "good": 1.0}
    for wanted in (1, 0):
        with opened(tmp_path, mode="score", scale=scale, principles=str(file), principles_per_question=wanted) as judge:
            asked: list[str] = []
            answer = judge.asker.backend.answer

            def watched(
                asks: Sequence[JudgeRequest], on_answer: OnAnswer, asked: list[str] = asked, go: Any = answer
            ) -> None:
                asked += [a.messages[-1]["content"] for a in asks]
                go(asks, on_answer)

            judge.asker.backend.answer = watched  # type: ignore[method-assign]
            judged = judge.compare(PAIRS)
        lines = [[x for x in text.splitlines() if x.startswith("- Be ")] for text in asked]
        assert lines[::2] == lines[1::2] and {len(x) for x in lines} == {wanted or 3}
        for j, shown in zip(judged, lines[::2], strict=True):
            assert [f"- {judge.principles[i]}" for i in j.principles] == shown
        assert len({tuple(x) for x in lines}) == (3 if wanted else 1)


def test_a_pair_whose_means_and_draws_say_the_opposite_gets_no_label(tmp_path: Path) -> None:
    """a: 5 with 0.6, 1 with 0.4, so 3.4; b: 4 for sure. b has the higher mean, a the higher score in 0.6 of draws. A
    row with a margin below 0 would be refused by what learns from it."""
    with opened(tmp_path, mode="score", scale={"1": 1.0, "4": 4.0, "5": 5.0}) as judge:
        said = {
            "a": {"1": 0.4, "4": 0.0, "5": 0.6},
            "b": {"1": 0.0, "4": 1.0, "5": 0.0},
            "c": {"1": 0.9, "4": 0.1, "5": 0},
        }

        def scores(prompts: Any, answers: Sequence[str], *rest: Any) -> list[AnswerScore]:
            worth = judge.config.scale
            return [AnswerScore(sum(worth[x] * p for x, p in said[t].items()), Verdict(said[t], 1.0)) for t in answers]

        judge._scores = scores  # type: ignore[method-assign]
        one, other = judge.compare([AnswerPair("p", "a", "b", "f:1"), AnswerPair("p", "b", "c", "f:2")])
    assert one.p_a is None and one.why == OPPOSED and one.scores == pytest.approx((3.4, 4.0))
    assert other.p_a == pytest.approx(0.95) and other.margin == pytest.approx(4 - 1.3)
    report = summarize_judge([one, other])
    assert report["left_out"] == {OPPOSED: 1} and report["unlabelled"] == [{"source": "f:1", "why": OPPOSED}]


def test_a_question_beyond_the_context_is_left_out_and_said(tmp_path: Path) -> None:
    with opened(tmp_path) as judge:
        judged = judge.compare([AnswerPair("p", "word " * 500, "x"), PAIRS[0]])
    assert judged[0].p_a is None and "too long" in judged[0].why and judged[1].p_a is not None
    report = summarize_judge(judged)
    assert (report["pairs"], report["judged"], report["left_out"]) == (2, 1, {"refused": 1})
    assert "1 of 2 pairs got no label" in report["warnings"][0]


def verdicts(orders: Sequence[tuple[float, float]], human: Sequence[float | None], **more: Any) -> list[JudgedPair]:
    return [
        JudgedPair(AnswerPair("p", "aaa", "b", f"r:{i}", h), sum(o) / 2, sum(o) - 1, o, **more)
        for i, (o, h) in enumerate(zip(orders, human, strict=True))
    ]


def test_the_report_by_hand() -> None:
    """Four pairs: both orders agree in three; the first place is named in 5 of 8 questions; people agree in two, a tie
    counts half."""
    orders = [(0.9, 0.8), (0.9, 0.1), (0.2, 0.3), (0.6, 0.7)]
    r = summarize_judge(verdicts(orders, [0.9, 0.9, 0.9, 0.6]))
    assert r["consistency"]["value"] == 0.75 and r["consistency"]["n"] == 4
    # first places: .9 .2 | .9 .9 | .2 .7 | .6 .3 -> five over one half
    assert r["position"]["first"]["value"] == 5 / 8
    assert r["position"]["mean_probability"]["value"] == pytest.approx(4.7 / 8)
    assert r["ties"] == 1 and r["people"]["agreement"]["value"] == (1 + 0.5 + 0 + 1) / 4
    assert r["people"]["kappa"]["value"] == pytest.approx(0.25)
    assert r["people"]["one_order"]["value"] == pytest.approx((2 + 1 + 0 + 2) / 8)
    assert r["people"]["one_person"] == pytest.approx(0.825)
    assert r["length"]["longer"]["value"] == pytest.approx(2 / 3)  # the tie takes neither
    assert r["length"]["longer_by_people"]["value"] == 1
    (worst,) = r["disagreements"]
    assert worst["source"] == "r:2" and worst["judge"] == 0.25 and worst["people"] == 0.9
    low, high = r["people"]["agreement"]["low"], r["people"]["agreement"]["high"]
    assert low < 0.625 < high
    # Wilson by hand for 2 of 2: from 1 / (1 + 1.96^2 / 2) = 0.3424
    two = summarize_judge(verdicts([(0.9, 0.8)] * 2, [0.9, 0.9]))
    assert two["people"]["agreement"]["low"] == pytest.approx(0.3424, abs=1e-4)


@pytest.mark.parametrize(
    ("orders", "human", "said"),
    [
        ([(0.9, 0.1)] * 12, [None] * 12, "always names the first answer (100% of 24 questions)"),
        ([(0.1, 0.9)] * 12, [None] * 12, "always names the second answer"),
        ([(0.5, 0.5)] * 12, [None] * 12, "Every pair is a tie"),
        ([(0.2, 0.2)] * 30, [0.9] * 30, "the opposite of what people say"),
        ([(0.9, 0.9)] * 6 + [(0.1, 0.1)] * 6, [0.9, 0.1] * 6, "can't be told from chance"),
        ([(0.9, 0.9)] * 40, [None] * 40, "takes the longer answer in 100%"),
        ([(0.9, 0.2)] * 30, [None] * 30, "In only 0% of the pairs does it stand by its word"),
    ],
)
def test_judges_that_can_not_be_trusted_are_said(
    orders: list[tuple[float, float]], human: list[float | None], said: str
) -> None:
    assert any(said in w for w in summarize_judge(verdicts(orders, human))["warnings"])


def test_a_good_judge_gets_no_warning() -> None:
    orders = [(0.9, 0.8), (0.1, 0.2)] * 20
    assert summarize_judge(verdicts(orders, [0.9, 0.1] * 20))["warnings"] == []
    same = [JudgedPair(AnswerPair("p", "a", "b"), 0.5, 0.0, None, (5.0, 5.0))] * 4
    assert any("always gives the same score, 5.00" in w for w in summarize_judge(same)["warnings"])


def test_a_judge_as_reward(tmp_path: Path) -> None:
    """The stack's numbers are the judge's expectations; a second stack asks nothing; an empty text is the worst."""
    judge: Mapping[str, Any] = {
        "model": {"source": "tiny:llama"},
        "mode": "score",
        "scale": {"bad": 0, "good": 1},
        "store": str(tmp_path / "judge.sqlite3"),
    }
    config = RewardsConfig.model_validate({"terms": [{"kind": "judge", "judge": judge}]})
    texts = ["Hi there.", "Go away.", ""]
    group = RolloutGroup([1], {"prompt": "Say hi."}, [Rollout([5], [0.0], "end", t) for t in texts])
    for _ in range(2):
        with RewardStack(config) as stack:
            rewards = [r.reward for r in stack([group]).groups[0].rollouts]
    assert rewards[2] == 0 and 0 < rewards[0] < 1 and rewards[0] != rewards[1]
    with opened(tmp_path, mode="score", scale={"bad": 0.0, "good": 1.0}) as mine:
        direct = mine.score(["Say hi."] * 2, texts[:2])
        assert [s.expectation for s in direct] == rewards[:2] and mine.asker.counts["from the store"] == 2
    with pytest.raises(ValueError, match=r"set judge.mode to score"):
        pairwise = {"model": judge["model"], "store": judge["store"]}
        RewardsConfig.model_validate({"terms": [{"kind": "judge", "judge": pairwise}]})
