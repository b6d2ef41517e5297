"""What held-out pairs and steps say of a reward model, by numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from posttrain.eval.calibration import auc, calibration_error, correlation, judged_pairs, judged_steps, reliability


def test_reliability_and_its_error_by_hand() -> None:
    said, was = [0.05, 0.15, 0.15, 0.95, 1.0], [0, 1, 0, 1, 1]
    table = reliability(said, was)
    assert [(round(b["from"], 9), b["n"]) for b in table] == [(0.0, 1), (0.1, 2), (0.9, 2)]
    assert [b["was"] for b in table] == [0, 0.5, 1] and table[1]["said"] == pytest.approx(0.15)
    # (1 * 0.05 + 2 * 0.35 + 2 * 0.025) / 5
    assert calibration_error(table) == pytest.approx(0.16)
    assert table[1]["low"] == pytest.approx(0.09453121)  # Wilson, one of two
    assert calibration_error([]) == 0
    with pytest.raises(ValueError, match="as many probabilities as outcomes"):
        reliability([0.5], [])


def test_auc_by_hand_and_by_counting_pairs() -> None:
    assert auc([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == 0.75
    assert auc([1, 1], [True, False]) == 0.5 and auc([1, 2], [True, True]) is None
    rng = random.Random(0)
    scores, right = [rng.randrange(6) for _ in range(60)], [rng.random() < 0.4 for _ in range(60)]
    both = [(a, b) for (a, x), (b, y) in itertools.product(zip(scores, right, strict=True), repeat=2) if x and not y]
    slow = sum((a > b) + 0.5 * (a == b) for a, b in both) / len(both)
    assert auc(scores, right) == pytest.approx(slow)


def test_correlation_by_hand() -> None:
    assert correlation([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert correlation([1, 2], [5, 5]) is None and correlation([1], [2]) is None


def test_pairs_by_hand() -> None:
    def pair(c: float, r: float, p: float, long: int, short: int) -> dict[str, float]:
        return {"chosen": c, "rejected": r, "probability": p, "chosen_tokens": long, "rejected_tokens": short}

    ln3 = math.log(3)
    found = judged_pairs([pair(ln3, 0, 1, 9, 5), pair(0, ln3, 0.9, 4, 8), pair(1, 1, 1, 5, 5), pair(0, ln3, 0.5, 5, 4)])
    assert found["pairs"] == 4 and found["undecided"] == 1
    assert found["accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["margin"] == pytest.approx(0)
    # ln 4/3; 0.9 ln 4 + 0.1 ln 4/3; ln 2; (ln 4 + ln 4/3) / 2
    losses = [0.28768207, 0.9 * 1.38629436 + 0.1 * 0.28768207, 0.69314718, 0.83698822]
    assert found["loss"] == pytest.approx(sum(losses) / 4)
    # It said 3/4 of the first answer (it was: 1), of the second (0.1) and the fourth (0.5); 1/2 of the tie.
    assert found["calibration"]["error"] == pytest.approx(3 / 4 * abs(0.75 - 1.6 / 3))
    assert found["length"]["prefers_longer"] == pytest.approx(2 / 3)  # first and second; not the fourth
    assert found["length"]["people_prefer_longer"] == pytest.approx((1 + 0.1 + 0.5) / 3)
    # d / ln 3 = (1, -1, 0, -1) and lengths (4, -4, 0, 1): 1.8125 / sqrt(0.6875 * 8.1875)
    assert found["length"]["correlation"] == pytest.approx(0.76395173)


def test_steps_by_hand() -> None:
    found = judged_steps(
        [
            {"scores": [0.9, 0.2], "targets": [1.0, 0.0]},
            {"scores": [0.8, 0.6], "targets": [0.75, 0.25]},
            {"scores": [0.7], "targets": [1.0]},
        ]
    )
    assert found["chains"] == 3 and found["steps"] == 5 and found["right_steps"] == 3
    assert found["accuracy"] == 0.8 and found["auc"] == 1.0
    assert found["first_error"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least one chain"):
        judged_steps([])
