"""Rewards of steps: what counts as an equation, as a result, as a step; and whose tokens they become."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import pytest
from pydantic import TypeAdapter

from posttrain.config import RewardConfig
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.models.tiny_model import tiny_tokenizer
from posttrain.rewards.outcome import LabelError
from posttrain.rewards.reward import build_reward
from posttrain.rewards.stack import RewardStack
from posttrain.rewards.step_rewards import result, split, true_line

TOKENIZER = tiny_tokenizer()


def score(text: Any, example: dict[str, Any], config: Any) -> Any:
    return build_reward(config, {})(text, example)


def part(**given: Any) -> Any:
    return TypeAdapter(RewardConfig).validate_python(given)


@pytest.mark.parametrize(
    ("line", "true"),
    [
        ("7+4=11", True),
        ("7+4=1", False),
        ("so 3 × (2 + 5) = 21 apples.", True),
        ("$3 + $4.50 = $7.50 in total", True),
        ("2*3 = 6 = 12/2", True),
        ("2*3 = 6 = 12/3", False),
        ("10/3 = 3.33", True),
        ("10/3 = 3.34", False),
        ("10/3 = 3", False),
        ("1,200 - 200 = 1,000, so", True),
        ("1. 3+4 = 7", True),
        ("- 3+4 = 7", True),
        ("2) 5-7=-2", True),
        ("-3 + 5 = 2", True),
        ("(3+4=7)", True),
        ("We have 5 - 2 = 3. Then", True),
        ("7 = 3 + 4", True),
        ("1/2 + 1/4 = 3/4", True),
        ("2^3=8", True),
        ("5 - 2 = 3 and 4 * 2 = 9", False),
        ("5 - 2 = 3 and 4 * 2 = 8", True),
        # Nothing to check.
        ("x = 5", None),
        ("7 = 7", None),
        ("the answer is 12", None),
        ("3 apples + 4 apples = 7 apples", None),
        ("10% of 50 = 5", None),
        ("3 + x = 9", None),
        ("2 + 2 == 5", None),
        ("1 + 1 >= 3", None),
        ("5 apples + 3 + 4 = 9", None),
        ("3 + 4 = seven", None),
        ("3 + 4 =", None),
        ("9/0 = 3", None),
        ("3 + 4 = 7 +x", True),
        ("3 + 4 = 5 2", None),
        # Signs of LaTeX and of other alphabets.
        ("2 x 3 + 1 = 7", True),
        ("2x3=7", False),
        (r"\(2 \times 3 + 1 = 7\)", True),
        (r"$5 \cdot 2 - 1 = 8$", False),
        ("2 ⋅ 3 + 1 = 7", True),
        (r"\frac{1}{2} + 1 = \boxed{1.5}", True),
        (r"1{,}200 \div 3 = 400", True),
        ("6 + 1 = 2 x 3 + 1", True),
        ("$2 + 2 = 4$ and $3*3=10$", False),
        ("0x3 + 1 = 7", None),
        # A part that can't be read before it, or that may change it after it.
        ("f(2) + 1 = 5", None),
        (r"\sqrt{9} + 1 = 4", None),
        ("√9 + 1 = 4", None),
        ("10% of 50 + 5 = 10", None),
        ("half of the 10 + 5 = 10", None),
        ("the sum of 3 + 4 = 8", False),
        ("5 times 2 + 1 = 11", None),
        ("log 100 + 1 = 3", None),
        ("a1 + 2 = 5", None),
        ("1e3 + 1 = 1001", None),
        ("1 200 + 300 = 1500", None),
        ("2 (3 + 4) = 14", None),
        ("10/4 = 2 R 2", None),
        ("10/4 = 2 with remainder 2", None),
        ("10/4 = 2, so 2 remain", False),
        ("60 + 30 = 1 hour 30 minutes", None),
        ("60 + 30 = 80 minutes", False),
        ("5*10^3=5k", None),
        ("2 * 500000 = 1 million", None),
        ("15 + 12 = 3 (mod 24)", None),
        ("15 + 12 = 3 apples", False),
        (r"3/2 = 1\frac{1}{2}", None),
        ("1+1 = 10 (binary)", None),
        ("2*2*2 = 2³", None),
        # Percent and thousands.
        ("1/2 = 50%", True),
        ("1/3 = 33.3%", True),
        ("1/3 = 34%", False),
        ("0.15 * 200 = 30%", True),
        ("1.200 + 300 = 1.500", None),
        ("1.2 + 300 = 1.5", False),
        ("", None),
    ],
)
def test_equations(line: str, true: bool | None) -> None:
    assert true_line(line) is true


def test_equations_of_many_forms_against_arithmetic() -> None:
    """Random sums written in many ways, right and wrong: true exactly where they are."""
    rng = random.Random(0)
    for _ in range(400):
        numbers = [rng.randint(1, 99) for _ in range(rng.choice((2, 3)))]
        operators = [rng.choice("+-*") for _ in numbers[1:]]
        left = str(numbers[0]) + "".join(f" {o} {n}" for o, n in zip(operators, numbers[1:], strict=True))
        value = eval(left)  # our own digits
        off = rng.choice((0, 0, 1, -1, 10))
        words = rng.choice(("", "so ", "Step 3: ", "we get (as said) ", "* "))
        behind = rng.choice(("", " apples", ".", ", which is it", "; done"))
        line = f"{words}{left.replace(' ', rng.choice(('', ' ')))} = {value + off}{behind}"
        assert true_line(line) is (off == 0), line


def test_long_lines_take_no_time() -> None:
    import time

    began = time.perf_counter()
    for line in ("1+" * 3000 + "1=3001", "=" * 5000, "(" * 3000 + "=1", "1 " * 3000 + "+1=2", "9**9**9**9=1" * 100):
        true_line(line)
    assert time.perf_counter() - began < 2


def test_valid_steps_by_hand() -> None:
    text = "slowly\n7+4=11\n11+9=21\n\n7+4=11\nso 21"
    config = part(kind="valid_steps")
    assert score(text, {}, config) == [(7, 14, 1.0), (14, 22, 0.0)]  # the same again, and words: no score
    assert text[7:14] == "7+4=11\n" and text[14:22] == "11+9=21\n"
    assert score(text, {}, part(kind="valid_steps", wrong=-1.0))[1] == (14, 22, -1.0)
    sentences = score("1+1=2. 2+2=5", {}, part(kind="valid_steps", separator=". "))
    assert sentences == [(0, 7, 1.0), (7, 12, 0.0)]
    assert score("", {}, config) == []
    assert list(split("a\n b \n\na\nc", "\n")) == [(0, 2, "a"), (2, 6, " b "), (9, 10, "c")]


def test_results_of_steps() -> None:
    expected = {
        "7+4=11": 11,
        "so x = 3 apples of 5": 3,
        "it is 4 and then 6": 6,
        "no number": None,
        "a = b": None,
        "1/2": Fraction(1, 2),
    }
    assert {line: result(line) for line in expected} == expected


def test_agreement_by_hand() -> None:
    texts = ["7+4=11\n11+9=20\n20", "7+4=1\n1+9=10\n20", "so 11\nnothing"]
    labelled = score(texts, {"steps": [11, "20"]}, part(kind="agreement", label="steps"))
    assert [[s[2] for s in steps] for steps in labelled] == [[1, 1, 1], [0, 0, 1], [1]]
    worked = score(texts, {"steps": "7+4 = 11\nthen 20"}, part(kind="agreement", label="steps"))
    assert worked == labelled
    # Of two others: 11 in one of them, 20 in one, 1 and 10 in none.
    among = score(texts, {}, part(kind="agreement"))
    assert [[s[2] for s in steps] for steps in among] == [[0.5, 0.5, 0.5], [0, 0, 0.5], [0.5]]
    assert [s[:2] for s in among[0]] == [(0, 7), (7, 15), (15, 17)]
    with pytest.raises(LabelError, match=r"no intermediate results 'steps' \(it has \['answer'\]\)"):
        score(texts, {"answer": 1}, part(kind="agreement", label="steps"))
    with pytest.raises(LabelError, match="holds 'x': expected one number in each"):
        score(texts, {"steps": [1, "x"]}, part(kind="agreement", label="steps"))
    assert score(texts[:1], {}, part(kind="agreement")) == [[]]  # nobody to agree with


def sampled(text: str) -> Rollout:
    tokens = [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]
    return Rollout(tokens, [-1.0] * len(tokens), "end", text)


def test_a_stack_gives_steps_their_tokens_and_adds_their_means() -> None:
    """Characters of two to four bytes before and in the steps: tokens are bytes here, and the end is one more."""
    parts = [
        part(kind="exact", name="right"),
        part(kind="valid_steps", weight=0.5),
        part(kind="agreement", weight=0.25, label="steps"),
        part(kind="process", name="prm", scorer="prm", weight=2.0),
    ]

    def prm(prompt: str, completion: str) -> list[tuple[int, int, float]]:
        assert prompt == "∑?"
        at = completion.index("=")
        return [(at, at + 1, 0.75), (0, 1, 0.25)]

    stack = RewardStack(parts, {"prm": prm}, TOKENIZER)
    text = "né 1+1=2 🙂\n2+1=4\n3"
    group = RolloutGroup([1], {"answer": "3", "steps": [2, 3], "prompt": "∑?"}, [sampled(text), sampled("= 3")])
    scored = stack([group]).groups[0].rollouts
    first = text.split("\n")[0].encode()
    line = len(first) + 1
    assert scored[0].steps == {
        "valid_steps": [(0, line, 1.0), (line, line + 6, 0.0)],
        "agreement": [(0, line, 1.0), (line, line + 6, 0.0), (line + 6, line + 7, 1.0)],
        "prm": [(0, 1, 0.25), (first.index(b"="), first.index(b"=") + 1, 0.75)],
    }
    assert scored[0].rewards == {"right": 1.0, "valid_steps": 0.5, "agreement": pytest.approx(2 / 3), "prm": 0.5}
    assert scored[0].reward == pytest.approx(1 + 0.25 + 0.25 * 2 / 3 + 1.0)
    assert scored[1].steps == {"valid_steps": [], "agreement": [(0, 3, 1.0)], "prm": [(0, 1, 0.25), (0, 1, 0.75)]}
    assert scored[1].rewards["valid_steps"] == 0.0
    # Without a tokenizer: the means alone.
    means = RewardStack(parts, {"prm": prm})([group]).groups[0].rollouts
    assert [r.rewards for r in means] == [r.rewards for r in scored] and not any(r.steps for r in means)


def test_steps_that_are_none_are_errors() -> None:
    for wrong, says in (
        ([(0, 1)], "not enough values"),
        ([(0, 0, 1.0)], "expected steps as"),
        ([(0, 1, float("nan"))], "finite"),
        (0.5, "not iterable"),
    ):
        stack = RewardStack(
            [part(kind="process", scorer="prm")], {"prm": lambda prompt, completion, wrong=wrong: wrong}, TOKENIZER
        )
        group = RolloutGroup([1], {"prompt": "?"}, [sampled("a")])
        with pytest.raises(Exception, match=says):
            stack([group])
    group = RolloutGroup([1], {}, [sampled("a")])
    with pytest.raises(Exception, match="no 'prompt' to score steps with"):
        RewardStack([part(kind="process", scorer="prm")], {"prm": lambda p, c: []}, TOKENIZER)([group])
