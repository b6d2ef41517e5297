"""The laboratory of small programs: its language, talks and tests, against Python and the sandbox."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from posttrain.config import ModelConfig
from posttrain.config.feedback_sources import AnyFeedbackConfig
from posttrain.core.types import Message
from posttrain.data.prompt_sources import LabProgramPrompts
from posttrain.data.prompts import load_prompts
from posttrain.data.synthetic import program_talks as talks
from posttrain.data.synthetic import small_programs as language
from posttrain.lab.lab_settings import LabSettings
from posttrain.lab.make_lab import make_lab
from posttrain.lab.programs_lab import ProgramsLab
from posttrain.lab.talk_lab import written_talk
from posttrain.models import loading as load
from posttrain.sampling.feedback_source import open_feedback
from posttrain.sandbox import SandboxError, require_sandbox

ROWS = language.program_rows(0, 60, held_out=True)
make_tokenizer = cache(ProgramsLab.make_tokenizer)


@cache
def some_talks() -> list[list[Message]]:
    return [talks.program_talk_at(5, i) for i in range(1200)]


def python_result(program: str, given: list[int]) -> Any:
    names: dict[str, Any] = {}
    exec(program, names)  # a program of our own language
    try:
        return names["f"](list(given))
    except IndexError:
        return language.ERROR


def program_turns(talk: list[Message]) -> list[str]:
    return [t["content"] for t in talk if t["role"] == "assistant" and t["content"].startswith(language.PROGRAM_HEAD)]


def test_the_language_is_python() -> None:
    rng = random.Random(0)
    lines = [*language.STEP_LINES, *language.END_LINES]
    for line in lines:
        body = [line] if line in language.END_LINES else [line, " return x"]
        for _ in range(6):
            given = language.draw_list(rng)
            assert language.result_of(body, given) == python_result(language.written_program(body), given), line
    assert language.read_program("def f(x):\n x=x[1:]\n return x\n") == (" x=x[1:]", " return x")
    for other in ("", "def f(x):", "def f(x):\n x=x[1:]", "def f(x):\n return y", "def f(x):\n return x\n1"):
        assert language.read_program(other) is None
        assert not language.passes(other, ROWS[0]["test"])


def test_questions_and_tests() -> None:
    """Right programs pass all tests; hidden tests fail every program with slips, shown ones most."""
    shown = Counter[bool]()
    rng = random.Random(3)
    for _ in range(150):
        problem = language.draw_problem(rng, held_out=True)
        hidden = language.hidden_cases(problem)
        assert language.failing(problem.lines, [*problem.visible, *hidden]) is None
        assert language.read_tests(language.written_tests(hidden)) == hidden and len(hidden) >= language.HIDDEN
        for wrong in language.wrong_programs(problem.steps):
            assert language.failing(wrong, hidden) is not None
            shown[language.failing(wrong, problem.visible) is not None] += 1
    assert 0.85 < shown[True] / shown.total() < 1
    held = {row["answer"] for row in ROWS}
    written = some_talks()
    assert not held & {p for talk in written for p in program_turns(talk)[:1]} - {_slipped(t) for t in written}
    assert all(language.passes(row["answer"], row["test"]) for row in ROWS)


def _slipped(talk: list[Message]) -> str:
    """A first program that is a held-out one by a slip, for another question."""
    first = [*program_turns(talk), ""][0]
    return first if first and language.is_held_out_program(language.read_program(first) or ()) else ""


def test_how_often_programs_checks_and_revisions_are_right() -> None:
    first, after = Counter[bool](), Counter[tuple[str, bool]]()
    for i, talk in enumerate(some_talks()):
        rng = random.Random(f"program talk 5 {i}")
        problem = language.draw_problem(rng, held_out=False)
        if not talk[0]["content"].startswith(problem.question):
            continue
        wrong = {language.written_program(w) for w in language.wrong_programs(problem.steps)}
        texts = [t["content"] for t in talk]
        first[texts[1] not in wrong] += 1
        if texts[1] in wrong and len(texts) > 3:
            asked = texts[2].rsplit("\n", 1)
            if asked == [talks.AGAIN]:
                after["again", texts[3] not in wrong] += 1
            elif asked[-1] == talks.AGAIN and asked[0] != talks.RIGHT and "passes" not in asked[0]:
                after["told", texts[3] not in wrong] += 1
    assert 0.45 < first[True] / first.total() < 0.6
    shares = {name: after[name, True] / (after[name, True] + after[name, False]) for name in ("again", "told")}
    assert shares["told"] == pytest.approx(talks.FOLLOWS, abs=0.08) and shares["again"] < 0.3


def test_a_check_runs_the_program_in_words() -> None:
    step, end = (s for s in (language.ProgramStep("drop one", " x=x[1:]", " x=x[:-1]", 0.5), language.END_STEPS[1][1]))
    cases = (language.Case([1, 2], 1), language.Case([], 0))
    problem = language.ProgramProblem((step, end), cases)
    assert problem.question == "drop one, count\nf([1, 2]) == 1\nf([]) == 0"
    assert talks.run_check(problem, problem.lines) == "[1, 2]\n[2]\n1\nwant 1\n[]\n[]\n0\nwant 0\nright"
    assert talks.run_check(problem, problem.lines, lazy=True) == "[1, 2]\n[2]\n1\nwant 1\nright"
    assert talks.run_check(problem, (" x=x[1:]", " return x")) == "[1, 2]\n[2]\nwant 1\nwrong"
    assert talks.run_check(problem, (" return len(x)",)) == "[1, 2]\n2\nwant 1\nwrong"


def test_tests_say_in_the_sandbox_what_the_talks_say() -> None:
    try:
        require_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))
    shown = [language.Case([3, 1], [1, 3]), language.Case([], 0)]
    row = {"visible": "assert f([3, 1]) == [1, 3]\nassert f([]) == 0"}
    programs = [(" x=x[::-1]", " return x[0]"), (" x=sorted(x)", " return x"), (" x=x[1:]", " return x")]
    first = [language.Case([], 0)]
    config = TypeAdapter(AnyFeedbackConfig).validate_python({"kind": "tests", "tests": "visible"})
    source = open_feedback(config)
    try:
        for lines, cases in ((programs[0], first), (programs[1], shown), (programs[2], shown)):
            (note,) = source.notes(
                [language.written_program(lines)], [{**row, "visible": language.written_tests(cases)}]
            )
            assert note is not None and note.text == talks.tests_text(cases, lines) and note.right is False
        (note,) = source.notes([ROWS[0]["answer"]], [ROWS[0]])
        assert note is not None and note.right and note.text == talks.tests_text([], (" return x",))
    finally:
        source.close()


def test_the_tokenizer_writes_talks_as_its_template_does() -> None:
    """Turns are encoded one by one, and together they are what the template's text is; loss is on answers alone."""
    tokenizer = make_tokenizer()
    samples = ProgramsLab(LabSettings(seed=5, batch_size=200), tokenizer).batch(0)
    for talk, sample in zip(some_talks(), samples, strict=False):
        text = tokenizer.apply_chat_template(talk, tokenize=False)
        assert text == written_talk(talk) and list(sample.tokens) == tokenizer(text)["input_ids"]
        asked = tokenizer.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=False)
        assert list(sample.tokens[: len(asked)]) == list(asked) and not any(sample.weights[: len(asked)])
        trained = [i for i, w in zip(sample.tokens, sample.weights, strict=True) if w]
        assert tokenizer.decode(trained) == "".join(
            t["content"] + tokenizer.eos_token for t in talk if t["role"] == "assistant"
        )
        assert len(sample.tokens) < 256


def test_it_is_made_measured_and_opened_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    folder = load.lab_folder(3, "programs")
    tiny = LabSettings(
        kind="programs", steps=2, batch_size=4, width=16, layers=1, heads=2, measured=2, train_problems=9,
        held_out_problems=5,
    )  # fmt: skip
    said = make_lab(tiny, folder, shown=False)
    assert {"first", "check", "refined", "again", "tested"} <= said.keys()
    assert "2 held-out programs" in ProgramsLab.describe(said)
    assert load.resolve("lab:programs:3") == load.Resolved(str(folder), "folder")
    _, tokenizer = load.load_model(ModelConfig(source="lab:programs:3"))
    prompts = load_prompts(LabProgramPrompts.Config(size=3, held_out=True), tokenizer, context=256)
    assert prompts.items[0].text == f">{ROWS[0]['prompt']}\n<"
    assert {n: prompts.items[0].problem[n] for n in ("visible", "test", "answer")} == {
        n: ROWS[0][n] for n in ("visible", "test", "answer")
    }


def test_measured_after_the_words_of_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A right program, one that fails a shown test and is mended, and text that is none."""
    lab = ProgramsLab(LabSettings(kind="programs", measured=3), make_tokenizer())
    rows = ROWS[:3]
    asked: list[list[Message]] = [[{"role": "user", "content": r["prompt"]}] for r in rows]
    wrong = next(
        language.written_program(lines)
        for lines in ((" return x[0]",), (" return len(x)",))
        if not language.passes(language.written_program(lines), rows[1]["visible"])
    )
    seen: list[Any] = []

    def written(prompts: Any) -> list[str]:
        seen.extend(prompts)
        return [rows[1]["answer"]]

    def right_of(texts: Any) -> list[bool]:
        return [lab.is_right(text, row) for text, row in zip(texts, rows, strict=True)]

    assert lab.measure_more(asked, [rows[0]["answer"], wrong, "?"], written, right_of) == {"tested": 0.6667}
    assert len(seen) == 1 and seen[0][1]["content"] == wrong
    assert seen[0][2]["content"].startswith("The program fails the tests. Line ")
