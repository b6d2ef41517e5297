"""Chat with --refine: what is shown, what stays in the conversation, and options that are wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.cli.refining_chat import RefiningChat
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer


class Scripted(RefiningChat):
    """Writes given turns in pieces of three characters; keeps what it was asked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.turns: list[str] = []
        self.seen: list[str] = []

    def _stream(self, ids: list[int], room: int) -> Iterator[str]:
        self.seen.append(str(self.tokenizer.decode(ids)))
        turn = self.turns.pop(0)
        return (turn[i : i + 3] for i in range(0, len(turn), 3))


def chat(template: bool = True, **options: Any) -> Scripted:
    tokenizer = tiny_tokenizer()
    if not template:
        tokenizer.chat_template = None
    return Scripted(tiny_model("llama"), tokenizer, options=options)


def checked(answer: str, example: Mapping[str, Any]) -> str:
    return f"{answer} to {example['prompt']}? <|im_end|>{{x}}"


def test_own_feedback_is_shown_and_the_last_answer_stays() -> None:
    talk = chat(rounds=2, task="math")
    talk.turns = ["so 5 or 6", "6 is wrong", "5", "No change needed."]
    shown = "".join(talk.ask("2+3="))
    assert shown == (
        "so 5 or 6\n\n-- feedback --\n6 is wrong\n\n-- revision 1 --\n5\n\n-- feedback --\nNo change needed."
        "\n\n-- no change --"
    )
    assert [m["content"] for m in talk.messages] == ["2+3=", "5"]
    assert talk.seen[1].count("<|im_start|>user") == 2 and "Check your solution." in talk.seen[1]
    talk.turns = ["7", "No change needed."]
    assert "".join(talk.ask("3+4=")).startswith("7\n\n-- feedback --")
    assert "6 is wrong" not in talk.seen[-1] and "so 5 or 6" not in talk.seen[-1]


def test_feedback_from_outside() -> None:
    talk = chat(feedback=["calculator"])
    talk.turns = ["2+3=6", "2+3=5"]
    shown = "".join(talk.ask("2+3="))
    assert shown == "2+3=6\n\n-- checked --\n2+3=6 is wrong: 2+3=5\n\n-- revision 1 --\n2+3=5"
    talk.turns = ["2+3=5"]
    right = "2+3=5\n\n-- checked: nothing is wrong --\nThe calculation in the answer is right."
    assert "".join(talk.ask("2+3=")) == right
    own = chat(feedback=["tests.cli.test_refining_chat:checked"])
    own.turns = ["6", "6"]
    assert "-- checked --\n6 to 2+3=? <|im_end|>{x}\n" in "".join(own.ask("2+3="))
    end = own.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = own.prompt_ids([{"role": "user", "content": "<|im_end|>"}])
    assert ids.count(end) == own.prompt_ids([{"role": "user", "content": "x"}]).count(end)


def test_without_a_chat_template() -> None:
    talk = chat(template=False, task="math")
    talk.turns = ["\n\n2+3=6\n\nQuestion: more", " it is 5\n\n", " 2+3=5"]
    shown = "".join(talk.ask("2+3="))
    assert shown == "\n\n2+3=6\n\n-- feedback --\n it is 5\n\n-- revision 1 --\n 2+3=5"
    assert talk.seen[1].startswith("2+3=2+3=6\n\nWhich steps of this solution are wrong") and "more" not in talk.seen[1]
    assert talk.seen[2].endswith("Mistakes:it is 5\n\nThe solution without these mistakes:")


def broken(answer: str, example: Mapping[str, Any]) -> str:
    return str(1 / 0)


def test_a_source_that_fails_does_not_end_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    talk = chat(feedback=["tests.cli.test_refining_chat:broken"])
    talk.turns = ["5"]
    talk._answer("2+3=")
    assert "5error: feedback broken: failed for your prompt: ZeroDivisionError" in capsys.readouterr().out
    assert [m["content"] for m in talk.messages] == ["2+3=", "5"]


def test_stopping_keeps_the_answer_that_was_begun() -> None:
    talk = chat()
    talk.turns = ["an answer", "some feedback"]
    pieces = talk.ask("x")
    while "feedback --" not in next(pieces):
        pass
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert [m["content"] for m in talk.messages] == ["x", "an answer"]
    pieces = talk.ask("y")
    pieces.close()  # type: ignore[attr-defined]
    assert len(talk.messages) == 2


def test_a_real_model_in_the_command() -> None:
    done = CliRunner().invoke(
        app, ["chat", "tiny:llama", "-p", "2+3=", "--refine", "--rounds", "2", "--max-new-tokens", "4"]
    )
    assert done.exit_code == 0, done.output
    assert done.output.count("-- feedback --") >= 1 and "-- revision 1 --" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "2"], "--rounds would do nothing: add --refine"),
        (["--refine", "--task", "maths"], "--task: "),
        (["--refine", "--feedback", "oracle"], "no source of feedback is called 'oracle'"),
        (["--refine", "--feedback", "retrieval"], "documents is needed"),
        (["--refine", "--feedback", "nowhere:f"], "module 'nowhere' can't be imported"),
    ],
)
def test_options_that_are_wrong(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["chat", "tiny:llama", "-p", "x", *options])
    output = " ".join((done.output + str(done.exception or "")).split())
    assert done.exit_code != 0 and message in output, output
