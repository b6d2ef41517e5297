"""Sources of feedback against right and wrong answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from transformers import LlamaForSequenceClassification

from posttrain.config.feedback_sources import AnyFeedbackConfig
from posttrain.core.errors import DataError, PosttrainError
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.rewards.checking_feedback import fenced, middle_cut
from posttrain.rewards.reward_model_scorer import RewardModel
from posttrain.sampling.feedback_source import FeedbackNote, OpenedFeedback, open_feedback


def source(settings: Any, functions: Mapping[str, Any] | None = None) -> OpenedFeedback:
    return open_feedback(TypeAdapter(AnyFeedbackConfig).validate_python(settings), functions)


def note(settings: Any, answer: str, **example: Any) -> FeedbackNote | None:
    opened = source(settings)
    try:
        return opened.notes([answer], [{"source": "q:1", **example}])[0]
    finally:
        opened.close()


def test_calculator() -> None:
    assert note("calculator", "17 * 3 = 51, so 51 - 1 = 50") == FeedbackNote(
        "All 2 calculations in the answer are right.", True
    )
    assert note("calculator", "- 7 + 4 = 11") == FeedbackNote("The calculation in the answer is right.", True)
    wrong = note("calculator", "17 * 3 = 41\n41 + 1 = 42\nagain: 17 * 3 = 41\n10/3 = 3.3 and 10/4 = 2.4")
    assert wrong == FeedbackNote("17 * 3 = 41 is wrong: 17 * 3 = 51\n10/4=2.4 is wrong: 10/4=2.5", False)
    many = note({"kind": "calculator", "most": 2}, "1+1=3\n2+2=5\n3+3=7\n4+4=7")
    assert many == FeedbackNote("1+1=3 is wrong: 1+1=2\n2+2=5 is wrong: 2+2=4\n2 more calculations are wrong.", False)
    first = note({"kind": "calculator", "most": 1}, "1+1=3\n2+2=5\n3+3=7")
    assert first == FeedbackNote("1+1=3 is wrong: 1+1=2", False)
    assert note("calculator", "The answer is 7, x = 5") is None
    assert note("calculator", "9**9**9 = 1 and 1/0 = 0") is None  # what can't be computed is not judged


def test_interpreter() -> None:
    ran = note("interpreter", "So:\n```python\nprint('a```b', 2 + 3)\n```")
    assert ran == FeedbackNote("The program printed:\n````\na```b 5\n````")
    assert note("interpreter", "def solution():\n    return 5") == FeedbackNote("The program printed:\n```\n5\n```")
    assert note("interpreter", "import os") == FeedbackNote("The program ran and printed nothing.")
    failed = note("interpreter", "```python\nprint(1)\ndef f(x):\n    return x / 0\nf(3)\n```")
    assert failed is not None and failed.right is False
    assert failed.text.startswith("The program failed:\n```\nTraceback") and "line 3, in f" in failed.text
    assert "inside.py" not in failed.text  # the sandbox's own frames are no part of the program
    assert failed.text.endswith("ZeroDivisionError: division by zero\n```\nBefore that it printed:\n```\n1\n```")
    syntax = note("interpreter", "```python\nprint(1\n```")
    assert syntax is not None and syntax.right is False and "SyntaxError" in syntax.text
    head = 'from math import sqrt\n\n\ndef root(x):\n    """Return the root."""\n'
    opened = source({"kind": "interpreter", "prefix": "head"})
    for code in (
        "```python\ndef root(x):\n    return sqrt(x)\nprint(root(4))\n```",
        "```\n    return sqrt(x)\nprint(root(4))\n```",
    ):
        assert opened.notes([code], [{"head": head}]) == [FeedbackNote("The program printed:\n```\n2.0\n```")]
    none = FeedbackNote("The answer has no program.", False)
    assert note("interpreter", "I think that it is 5.") == none and note("interpreter", "") == none


def test_interpreter_limits_and_huge_output() -> None:
    def notes(seconds: float, *programs: str) -> list[FeedbackNote | None]:
        limits = {"seconds": seconds, "output_kb": 2}
        settings = {"kind": "interpreter", "limits": limits, "most_characters": 90}
        return list(source(settings).notes([*programs], [{}] * len(programs)))

    (slow,) = notes(0.5, "while True: pass")
    loud, long = notes(20, "while True: print('x' * 99)", "for i in range(200): print(i)")
    assert slow == FeedbackNote("The program was ended: it ran longer than 0.5 seconds.", False)
    assert loud is not None and loud.text.startswith("The program was ended: it printed too much.") and not loud.right
    assert long is not None and long.text.startswith("The program printed:\n```\n0\n1\n2") and len(long.text) < 160
    assert "characters cut]\n" in long.text and long.text.endswith("198\n199\n```")
    assert middle_cut("abc" * 20, 60) == "abc" * 20 and fenced("x") == "```\nx\n```"


ADD = {"test": "assert add(1, 2) == 3\nassert add(2, 2) == 4"}


def test_unit_tests() -> None:
    right = "```python\ndef add(a, b):\n    return a + b\n```"
    opened = source("tests")
    wrong = right.replace("a + b", "a * b")
    passed, failed, none = opened.notes([right, wrong, "no"], [ADD] * 3)
    assert passed == FeedbackNote("The program passes all tests.", True)
    assert failed is not None and failed.right is False
    assert failed.text.startswith("The program fails the tests. Line 1 of the tests, assert add(1, 2) == 3: Assertion")
    assert none is not None and none.right is False
    cases = {"test": [{"input": "2", "output": "4"}, {"input": "3", "output": "9"}]}
    (by_cases,) = opened.notes(["```python\nprint(2 * int(input()))\n```"], [cases])
    assert by_cases is not None and "Case 2 of 2: it prints '6" in by_cases.text
    with pytest.raises(PosttrainError, match="has no tests in 'test'"):
        opened.notes([right], [{"source": "q:3"}])
    opened.close()


def test_verifier() -> None:
    opened = source({"kind": "verifier", "reward": {"kind": "numeric"}, "wrong": "No."})
    notes = opened.notes(["so 5", "so 6"], [{"answer": "5"}] * 2)
    assert notes == [FeedbackNote("The answer is right.", True), FeedbackNote("No.", False)]
    opened.close()
    path = "tests.rewards.strange:waiting"
    opened = source({"kind": "verifier", "reward": {"kind": path, "timeout": 0.2}, "reasons": True})
    waited, done = opened.notes(["wait", "5"], [{"answer": "5"}] * 2)
    assert waited == FeedbackNote("The answer could not be checked: checking it took too long.", None)
    assert done == FeedbackNote("The answer is right.", True)
    with pytest.raises(PosttrainError, match=r"feedback verifier: .*its reward failed for q:2: KeyError"):
        opened.notes(["4"], [{"source": "q:2"}])
    opened.close()
    with pytest.raises(ValidationError, match="compares the completions of a prompt"):
        source({"kind": "verifier", "reward": {"kind": "self_consistency"}})


def test_retrieval(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Paris is the capital\nof France.\n\nThe moon is made of rock.\n\n猫是动物")
    (tmp_path / "b.jsonl").write_text('{"text": "Rome is the capital of Italy."}\n')
    (tmp_path / "c.bin").write_bytes(b"\xff")
    settings = {"kind": "retrieval", "documents": str(tmp_path), "passages": 2}
    found = note(settings, "It is Rome.", prompt="What is the capital of Italy?")
    assert found == FeedbackNote(
        "The documents say:\n- Rome is the capital of Italy.\n- Paris is the capital of France."
    )
    assert note({**settings, "query": "answer", "passages": 1}, "猫") == FeedbackNote("The documents say:\n- 猫是动物")
    assert note({**settings, "query": "answer"}, "xyzzy") is None
    for documents, message in (("nowhere.txt", "can't be read"), (str(tmp_path / "c.bin"), "UTF-8")):
        with pytest.raises(DataError, match=message):
            note({"kind": "retrieval", "documents": documents}, "x")
    with pytest.raises(DataError, match=r"b.jsonl:1: no text in 'body'; it has \['text'\]"):
        note({**settings, "documents": str(tmp_path / "b.jsonl"), "column": "body"}, "x")


def test_another_model() -> None:
    settings = {"kind": "model", "source": "tiny:llama", "sampler": {"max_tokens": 6, "temperature": 1.0}}
    opened = source(settings)
    examples = [{"prompt": "2+3="}, {"prompt": "{answer} <|im_end|>"}]
    notes = opened.notes(["5", "{0} <|im_end|>"], examples)
    assert all(n is not None and n.right is False and n.tokens > 50 for n in notes)
    assert notes == opened.notes(["5", "{0} <|im_end|>"], examples)  # the same again, and alone
    assert notes[1:] == opened.notes(["{0} <|im_end|>"], examples[1:])
    assert any(n is not None and n.text.endswith(" [cut]") for n in notes)
    (long,) = opened.notes(["5" * 20_000], [{}])
    assert long == FeedbackNote("The answer is too long for the model that gives feedback.")
    request = opened.config.request("2+3=", "{x}")  # type: ignore[attr-defined]
    assert request.startswith("Question:\n2+3=\n\nAnswer:\n{x}\n\nName the mistakes") and "No change needed." in request
    for wrong, message in (
        ({}, "either a model"),
        ({"source": "tiny:llama", "template": "{prompt}"}, "needs {answer}"),
        ({"source": "tiny:llama", "template": "{answer} {x}"}, "no field of it"),
        ({"source": "tiny:llama", "template": "{answer} {verdict}", "verdict": None}, "verdict is null"),
    ):
        with pytest.raises(ValidationError, match=message):
            source({"kind": "model", **wrong})


def test_a_reward_of_whole_completions_is_no_verifier() -> None:
    with pytest.raises(ValidationError, match="improvement scores whole completions, and feedback is on one answer"):
        source({"kind": "verifier", "reward": {"kind": "improvement", "reward": {"kind": "exact"}}})


def test_reward_model_and_judge_in_words(tmp_path: Path) -> None:
    scored = source({"kind": "reward_model", "source": "tiny:reward", "good_at": 0.5})
    words = scored.source.words  # type: ignore[attr-defined]
    text = "A reward model gives the answer a score of 0.49. Good answers get 0.5 or more."
    folder = tmp_path / "rm"
    torch.manual_seed(0)
    LlamaForSequenceClassification(tiny_model("llama", num_labels=1).config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    real = source({"kind": "reward_model", "source": str(folder), "prompt": "prompt"})
    (of_one, of_other) = real.notes(["5", "6 or 7"], [{"prompt": "2+3="}] * 2)
    assert of_one is not None and of_other is not None and of_one.right is None and of_one.text != of_other.text
    assert of_one.text.startswith("A reward model gives the answer a score of ")
    member = RewardModel(str(folder))
    read = [len(member.members[0].answer("2+3=", a)) for a in ("5", "6 or 7")]
    assert [of_one.tokens, of_other.tokens] == read == member.tokens_read(["2+3="] * 2, ["5", "6 or 7"])
    real.close()
    assert words(0.49, "") == FeedbackNote(text, False) and words(0.5, "").right is True
    with pytest.raises(ValidationError, match="where the score goes"):
        source({"kind": "reward_model", "source": "x", "text": "good"})
    judge = {"model": {"source": "tiny:llama"}, "mode": "score", "store": str(tmp_path / "j.sqlite3"), "rationale": 4}
    opened = source({"kind": "judge", "judge": judge, "good_at": -100})
    (one, two) = opened.notes(["5", ""], [{"prompt": "2+3="}] * 2)
    for judged in (one, two):
        assert judged is not None and judged.right is True and "A judge gives the answer " in judged.text
    spent = opened.source.judge.asker.tokens  # type: ignore[attr-defined]
    assert min(one.tokens, two.tokens) > 4 and one.tokens + two.tokens == spent["prompt"] + spent["completion"]
    assert opened.notes(["5"], [{"prompt": "2+3="}]) == [one]
    with pytest.raises(PosttrainError, match="q:9 has no 'prompt' for the judge"):
        opened.notes(["5"], [{"source": "q:9"}])
    opened.close()
    with pytest.raises(ValidationError, match=r"set judge\.mode to score"):
        source({"kind": "judge", "judge": {"model": {"source": "tiny:llama"}}})


class _Spoken(BaseHTTPRequestHandler):
    """A server of the protocol that answers 5, and counts tokens if it is told to."""

    counts = True

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        choice = {"message": {"role": "assistant", "content": "5"}, "finish_reason": "stop"}
        usage = {"usage": {"prompt_tokens": 70, "completion_tokens": 7}} if self.counts else {}
        data = json.dumps({"choices": [choice], **usage}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def test_tokens_of_models_behind_a_server_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the server counts them; if it does not, four bytes a token. A judge costs the same in a verifier."""
    pytest.importorskip("openai")
    behind = ThreadingHTTPServer(("127.0.0.1", 0), _Spoken)
    threading.Thread(target=behind.serve_forever, daemon=True).start()
    try:
        server = {"model": "m", "base_url": f"http://127.0.0.1:{behind.server_port}/v1"}
        judge = {"server": server, "mode": "score", "store": str(tmp_path / "j.sqlite3")}
        examples = [{"prompt": "2+3=", "source": "q:1"}] * 2
        model = source({"kind": "model", "server": server, "template": "é{answer}?"})
        verifier = {"kind": "verifier", "right_at": 3, "reward": {"kind": "judge", "judge": judge}}
        for settings in ({"kind": "judge", "judge": judge}, verifier):
            opened = source(settings)
            assert [n and n.tokens for n in opened.notes(["5", "6"], examples)] == [77, 77]
            opened.close()
        assert [n and n.tokens for n in model.notes(["5", "6"], examples)] == [77, 77]
        monkeypatch.setattr(_Spoken, "counts", False)
        assert [n and n.tokens for n in model.notes(["5", "six"], examples)] == [1 + 1, 2 + 1]
    finally:
        behind.shutdown()
        behind.server_close()
