"""Critique and revision: what is asked of the model and what becomes of what it says; counted, resumed, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import posttrain
from posttrain.config import DataConfig, ModelConfig
from posttrain.core.errors import DataError
from posttrain.core.files import read_lines
from posttrain.core.progress import Track
from posttrain.core.types import Rollout
from posttrain.data.prompts import RenderedPrompt, load_prompts
from posttrain.data.sft_rows import prepare
from posttrain.methods.data import revision_chain as chains
from posttrain.methods.data.critique_revision import RefineConfig, RevisionLoop, open_writer
from posttrain.methods.data.revision_chain import Chain, chain_stats, finished_chunks, rows_of_chain
from posttrain.models.tiny_model import tiny_tokenizer
from posttrain.rewards.stack import RewardStack
from posttrain.runs.registry import prepare_stage
from posttrain.sampling.engine import LocalSampler
from posttrain.trainer.stage import StageContext

TOKENIZER = tiny_tokenizer()
PROBLEMS = {
    "kind": "rows",
    "answers": False,
    "data": {"source": "packaged:movie_reviews.tsv", "prompt": "{text}", "completion": "-", "rows": [0, 8]},
}
PRINCIPLES = ["Be short.", "Be kind."]


def settings(**changes: Any) -> RefineConfig:
    return RefineConfig.model_validate({"problems": PROBLEMS, "principles": "p.txt", "revisions": 1, **changes})


def carried(script: dict[str, list[Any]], stack: RewardStack | None = None, **changes: Any) -> tuple[list[Chain], Any]:
    """Chains of prompts whose texts are written by a script: prompt → what comes, a text or (text, finish)."""
    config = settings(**changes)
    heard: list[tuple[list[tuple[str, str]], int]] = []
    left = {prompt: list(texts) for prompt, texts in script.items()}

    def write(asked: Any, sampling: Any, longest: int, on_done: Any) -> list[Rollout]:
        out = []
        for messages, _ in asked:
            heard.append(([(m["role"], m["content"]) for m in messages], longest))
            given = left[messages[0]["content"]].pop(0)
            text, finish = given if isinstance(given, tuple) else (given, "end")
            out.append(Rollout((5,) * 3, (0.0,) * 3, finish, text))
        return out

    questions = {
        i: RenderedPrompt([1], p, {"messages": [{"role": "user", "content": p}], "source": f"s:{i}"})
        for i, p in enumerate(script)
    }
    streams = np.zeros((len(script), 1 + 2 * config.revisions), np.uint64)
    principles = PRINCIPLES if config.principles else []
    made = RevisionLoop(config, write, principles, (), stack, Track("t", 1, shown=False))(questions, streams)
    assert not any(left.values()), left  # all that the script has was asked for
    return made, heard


CUT = ("cut", "length")
SCRIPT = {
    "good": ["Long.", "Too long.", "Short."],
    "empty critique": ["a", " "],
    "cut critique": ["a", CUT],
    "empty revision": ["a", "c", "\n"],
    "cut revision": ["a", "c", CUT],
    "same": ["a  b", "c", "a b"],
    "echo": ["a", "c d", "c d"],
    "refused": ["a", ("no", "error")],
    "nothing": [" "],
    "no": [("no", "error")],
    "long": [("", "error"), ],
    "mended": [CUT, "c", "whole"],
}  # fmt: skip


def test_every_outcome_is_counted_under_its_reason() -> None:
    made, _ = carried(SCRIPT)
    assert [r.why for c in made for r in c.rounds] == [
        "", "critique: empty", "critique: cut at the longest length", "revision: empty",
        "revision: cut at the longest length", "revision: the same as the answer", "revision: the same as the critique",
        "critique: refused", "",
    ]  # fmt: skip
    rows = [row for c in made for row in rows_of_chain(c, "last")]
    assert [(r["messages"][0]["content"], r["messages"][1]["content"]) for r in rows] == [
        ("good", "Short."), ("mended", "whole"),
    ]  # fmt: skip
    assert rows[0]["initial"] == "Long." and rows[0]["revision"] == 1 and rows[0]["principle"] in PRINCIPLES
    stats = chain_stats(made, PRINCIPLES, len(rows), None)
    assert stats["chains"] == 12 == stats["rows"] + sum(stats["dropped"].values())
    assert stats["dropped"] == {
        "no revision could be used": 7, "first answer: refused": 2, "first answer: empty": 1,
    }  # fmt: skip
    assert stats["rounds"] == 9 == stats["usable"] + sum(stats["unusable"].values()) and stats["usable"] == 2
    assert stats["first_answers_cut"] == 1 and stats["rewards"] == {}
    assert stats["tokens"] == 3 * sum(map(len, SCRIPT.values()))
    assert sum(p["rounds"] for p in stats["principles"]) == 9 and sum(p["usable"] for p in stats["principles"]) == 2


def test_a_later_round_begins_from_the_newest_answer_that_could_be_used() -> None:
    script = {"p": ["one", "c1", "two", "c2", "two", "c3", "four"]}  # the second revision is the answer again
    (chain,), heard = carried(script, revisions=3, critique_tokens=40, sampler={"max_tokens": 70})
    assert [longest for _, longest in heard] == [70, 40, 70, 40, 70, 40, 70]
    assert [m[1] for m in [h for h, _ in heard][1::2]] == [("assistant", x) for x in ("one", "two", "two")]
    assert heard[5][0][:2] == [("user", "p"), ("assistant", "two")] and len(heard[5][0]) == 3
    assert heard[6][0][3] == ("assistant", "c3")
    assert {r.principle for r in chain.rounds[:2]} == {0, 1} and chain.rounds[2].principle == chain.rounds[0].principle
    assert [r.says for r in chain.rounds] == [PRINCIPLES[r.principle or 0] for r in chain.rounds]
    assert [r["messages"][-1]["content"] for r in rows_of_chain(chain, "all")] == ["two", "four"]
    assert [r["revision"] for r in rows_of_chain(chain, "all")] == [1, 2]
    assert [r["messages"][-1]["content"] for r in rows_of_chain(chain, "last")] == ["four"]


def test_it_stops_by_its_own_verdict() -> None:
    """Self-refine: no principle, and rounds until the critique is content; never with an answer that was cut."""
    script = {
        "at once": ["fine", "NO CHANGE is needed."],
        "later": ["bad", "Mend it.", "fine", "No change."],
        "never": ["bad", "Mend it.", "better", "Again.", "best"],
        "cut": [CUT, "No change.", "whole", "No change."],
    }
    made, heard = carried(script, principles=None, revisions=2, satisfied="no change")
    assert heard[4][0][2] == ("user", "Name the specific ways in which your last answer could be better.")
    assert [c.stopped for c in made] == [chains.BY_VERDICT, chains.BY_VERDICT, "", chains.BY_VERDICT]
    rows = [row for c in made for row in rows_of_chain(c, "last")]
    assert [r["messages"][-1]["content"] for r in rows] == ["fine", "fine", "best", "whole"]
    assert [r["revision"] for r in rows] == [0, 1, 2, 1] and "principle" not in rows[0]
    stats = chain_stats(made, [], 4, None)
    assert (stats["rounds"], stats["usable"], stats["unusable"], stats["dropped"]) == (7, 4, {}, {})
    assert stats["stopped"] == {chains.BY_VERDICT: 3} and stats["rounds"] == stats["usable"] + 3


def length(text: str, example: Any) -> float:
    if text == "broken":
        raise ValueError("no number for this")
    return -float(len(text))


def test_it_stops_by_a_reward_and_says_what_the_rounds_changed() -> None:
    """From -2 on it is enough; what gained it and what lost it are told apart. A reward that fails stops nothing."""
    script = {
        "at once": ["ab"],
        "gains": ["abcd", "c", "ab"],
        "worse": ["abc", "c", "abcdef", "c", "abcde"],
        "cut": [("a", "length"), "c", "abcd", "c", "abc"],  # it had enough, and no end
        "fails": ["broken", "c", "abcd", "c", "abcde"],
    }
    parts = [{"kind": "function", "name": "length", "function": "length"}]
    config = {"rewards": {"terms": parts, "on_error": "exclude"}, "stop_at": -2, "revisions": 2}
    with RewardStack(settings(**config).rewards, {"length": length}) as rewards:
        made, _ = carried(script, rewards, **config)
    assert [c.stopped for c in made] == [chains.BY_REWARD, chains.BY_REWARD, "", "", ""]
    assert made[4].initial.reward is None and "no number for this" in made[4].initial.failures["length"]
    assert [c.answer.reward for c in made] == [-2, -2, -5, -3, -5] and made[2].answer.parts == {"length": -5.0}
    stats = chain_stats(made, PRINCIPLES, 5, -2)
    assert stats["rewards"] == {
        "chains": 4,
        "failed": 1,
        "first_and_last": {"reward": [-2.5, -3.0], "length": [-2.5, -3.0]},  # (2+4+3+1)/4, (2+2+5+3)/4
        "reached": {"first": 2, "last": 2, "gained": 1, "lost": 1},
    }
    (row,) = rows_of_chain(made[0], "last")
    assert row["messages"][-1]["content"] == "ab" and row["revision"] == 0 and row["reward"] == -2


def test_chains_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    made, _ = carried(SCRIPT)
    chains.write_chains(tmp_path, 1, made[:5])
    chains.write_chains(tmp_path, 2, made[5:])
    assert chains.read_chains(tmp_path) == made and chains.read_chains(tmp_path, 2) == made[5:]
    (tmp_path / "chunk-000003.jsonl").write_text('{"problem": 1}\n')
    with pytest.raises(DataError, match="chunk-000003.jsonl can't be read as chains"):
        chains.read_chains(tmp_path)


MODEL = ModelConfig(source="tiny:llama")
REAL = {
    "revisions": 2, "sampler": {"max_tokens": 50, "stop": list("abcdefgh")}, "critique_tokens": 50,
    "prompts_at_once": 4,
    "rewards": {"terms": [{"kind": "function", "name": "even", "function": "even"}]},
}  # fmt: skip


def even(text: str, example: dict[str, Any]) -> float:
    return float(len(text) % 2 == 0)


def test_killed_and_gone_on_with_it_ends_in_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text("# two of them\nBe short.\n\nBe kind.\n")
    config = settings(principles=str(tmp_path / "p.txt"), **REAL)
    questions = load_prompts(config.problems, TOKENIZER, context=None).items
    context = StageContext(TOKENIZER, None, {"even": even})
    calm = prepare_stage(config, context).run(MODEL, tmp_path / "calm", 1)
    sample, calls = LocalSampler.sample, []

    def dies(self: Any, requests: Any, *rest: Any) -> Any:
        calls.append(len(requests))
        if len(calls) == 8:  # in the second chunk of two
            raise KeyboardInterrupt
        return sample(self, requests, *rest)

    monkeypatch.setattr(LocalSampler, "sample", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare_stage(config, context).run(MODEL, tmp_path / "killed", 1)
    killed = tmp_path / "killed"
    assert finished_chunks(killed / "chains") == [1] and not (killed / "data").exists()
    again = prepare_stage(config, context).run(MODEL, killed, 1)
    assert {**again, "seconds": 0} == {**calm, "seconds": 0}
    for name in (*(f"chains/chunk-{c:06d}.jsonl" for c in (1, 2)), "data/rows.jsonl", "data/stats.json"):
        assert (tmp_path / "calm" / name).read_bytes() == (killed / name).read_bytes()
    rows, stats = read_lines(killed / "data" / "rows.jsonl"), json.loads((killed / "data" / "stats.json").read_text())
    assert 0 < len(rows) == stats["rows"] and stats["chains"] == 8 and stats["usable"] > 0
    read_back = prepare(DataConfig(source=str(killed / "data" / "rows.jsonl")), TOKENIZER)  # as a later stage does
    for sample_, row in zip(read_back.samples, rows, strict=True):
        question = questions[row["problem"]]
        assert list(sample_.tokens[: len(question.tokens)]) == question.tokens
        assert row["reward"] == even(row["messages"][-1]["content"], {})
    found = chains.read_chains(killed / "chains")
    assert {r.says for c in found for r in c.rounds} == set(PRINCIPLES)


def test_what_leaves_no_room_is_counted_and_not_asked() -> None:
    config = settings(sampler={"max_tokens": 8})
    write = open_writer(config, MODEL)
    long, short = ([{"role": "user", "content": "x" * n}] for n in (3000, 5))
    one, two = write([(long, 1), (short, 1)], config.sampler, 8, lambda *_: None)
    assert (one.finish, one.text) == ("error", "no room in the context") and 0 < len(two.tokens) <= 8
    (chain,), _ = carried({"p": ["a", (one.text, one.finish)]})
    assert chain.rounds[0].why == "critique: no room in the context"


def test_nothing_usable_and_problems_in_plain_text_are_errors_that_say_why(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Be short.\n")
    base = {"method": "refine", "problems": PROBLEMS, "principles": str(tmp_path / "p.txt")}

    def recipe(**changes: Any) -> posttrain.Recipe:
        stage = {**base, "sampler": {"max_tokens": 2}, **changes}
        return posttrain.Recipe.model_validate({"name": "r", "model": {"source": "tiny:llama"}, "stages": [stage]})

    with pytest.raises(DataError, match=r"made no row of 8 chains \(8 no revision could be used, "):
        posttrain.run(recipe(critique_tokens=2), tmp_path / "none")
    assert finished_chunks(tmp_path / "none" / "stages" / "0-refine" / "chains") == [1]  # there to be looked at
    with pytest.raises(DataError, match="critiques are turns of a chat"):
        posttrain.run(recipe(problems={"kind": "lab"}), tmp_path / "plain")
    with pytest.raises(DataError, match=r"principles .*none.txt' can't be read"):
        posttrain.run(recipe(principles=str(tmp_path / "none.txt")), tmp_path / "missing")
    assert not (tmp_path / "missing" / "stages").exists()
