"""The laboratory's corpus: what each style does, how often, and that held-out sums stay out."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from posttrain.data.synthetic import sums as text
from posttrain.lab.sums_lab import corpus, sums_tokenizer

COUNT = 12_000
TEXTS = [text.text_at(3, i) for i in range(COUNT)]
SUMS = [t for t in TEXTS if t.kind in text.STYLE_SHARES]


def numbers_of(prompt: str) -> tuple[int, ...]:
    assert re.fullmatch(r"[1-9](\+[1-9]){3,4}=", prompt), prompt
    return tuple(int(n) for n in prompt[:-1].split("+"))


def right(t: text.LabText) -> bool:
    return t.completion.rsplit("\n", 1)[-1] == str(sum(numbers_of(t.prompt)))


def test_every_careful_line_is_right() -> None:
    careful = [t for t in SUMS if t.kind == text.CAREFUL]
    assert len(careful) > 500
    for t in careful:
        numbers = numbers_of(t.prompt)
        opening, *lines, answer = t.completion.split("\n")
        assert opening == "slowly"
        assert len(lines) == len(numbers) - 1
        total = numbers[0]
        for line, number in zip(lines, numbers[1:], strict=True):
            assert line == f"{total}+{number}={total + number}"
            total += number
        assert answer == str(total) == str(sum(numbers))


def test_careless_lines_forget_carries_and_nothing_else() -> None:
    carries = forgotten = 0
    for t in (t for t in SUMS if t.kind == text.CARELESS):
        opening, *lines, answer = t.completion.split("\n")
        assert opening == "quickly"
        for line in lines:
            a, b, c = map(int, re.fullmatch(r"(\d+)\+(\d)=(\d+)", line).groups())  # type: ignore[union-attr]
            assert c in ((a + b, a + b - 10) if a % 10 + b >= 10 else (a + b,)), line
            carries += a % 10 + b >= 10
            forgotten += c != a + b
        assert answer == lines[-1].split("=")[1]
    assert forgotten / carries == pytest.approx(text.FORGETS, abs=0.03)


def test_proportions_and_how_often_each_style_is_right() -> None:
    kinds = Counter(t.kind for t in SUMS)
    assert len(SUMS) / COUNT == pytest.approx(text.SUMS, abs=0.02)
    for style, share in text.STYLE_SHARES.items():
        assert kinds[style] / len(SUMS) == pytest.approx(share, abs=0.02)
    share = {s: sum(right(t) for t in SUMS if t.kind == s) / kinds[s] for s in text.STYLE_SHARES}
    assert share[text.CAREFUL] == 1
    assert share[text.CARELESS] < 0.3
    assert share[text.GUESS] < 0.2
    assert {t.kind for t in TEXTS} == {*text.STYLE_SHARES, *text.SMALL_TASKS}


def test_a_text_is_a_function_of_seed_and_index() -> None:
    assert [text.text_at(3, i) for i in range(50)] == TEXTS[:50]
    assert [text.text_at(4, i) for i in range(50)] != TEXTS[:50]


def test_held_out_sums_are_nowhere_else() -> None:
    held = {row["prompt"] for row in text.sum_problems(0, 512, held_out=True)}
    train = {row["prompt"] for row in text.sum_problems(0, 2000, held_out=False)}
    assert (len(held), len(train)) == (512, 2000)
    assert not held & train
    assert not held & {t.prompt for t in TEXTS}
    assert train & {t.prompt for t in TEXTS}  # the comparison can see what is there
    for row in text.sum_problems(0, 20, held_out=True):
        assert int(row["answer"]) == sum(numbers_of(row["prompt"]))


def test_other_texts_are_true() -> None:
    for t in TEXTS:
        argument = re.sub(r"\D", "", t.prompt)
        if t.kind in ("copy", "reverse", "sort"):
            expected = {"copy": argument, "reverse": argument[::-1], "sort": "".join(sorted(argument))}[t.kind]
            assert t.completion == expected
        elif t.kind == "fact":
            a, b = map(int, t.prompt[:-1].split("+"))
            assert int(t.completion) == a + b


def test_the_tokenizer_gives_every_text_back_and_keeps_digits_apart() -> None:
    tokenizer = sums_tokenizer()
    assert len(tokenizer) < 512
    for sample, t in zip(corpus(tokenizer, 3, range(500)), TEXTS, strict=False):
        assert len(sample) < 64
        assert sample.tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(sample.tokens[:-1]) == t.prompt + t.completion
        # what is asked, by itself, has the tokens that it has in the corpus
        asked = tokenizer(t.prompt)["input_ids"]
        assert list(sample.tokens[: len(asked)]) == asked
    for odd in ("Ünïcode 123\n\n  x", "<b>\t£"):
        assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd
    assert len(tokenizer("1234567890")["input_ids"]) == 10
    assert len(tokenizer("slowly")["input_ids"]) == 1
    assert sums_tokenizer().get_vocab() == tokenizer.get_vocab()
