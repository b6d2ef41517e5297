"""What a run's rewards drift to, on numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from posttrain.core.types import Rollout, RolloutGroup
from posttrain.report.reward_hacking import between_variance, follow_rewards, pearson, repetition, within_variance


def rollout(reward: float, tokens: int = 8, text: str = "x", same: bool = False, **parts: float) -> Rollout:
    ids = (1,) * tokens if same else tuple(range(tokens))
    return Rollout(ids, (0.0,) * tokens, "end", text, parts or {"right": reward}, reward)


def group(*rollouts: Rollout) -> RolloutGroup:
    return RolloutGroup((1,), {}, rollouts)


def test_repetition_by_hand() -> None:
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([1] * 7) == pytest.approx(3 / 4)  # 4 four-grams, one different
    assert repetition([1, 2, 1, 2, 1, 2]) == pytest.approx(1 / 3)


def test_correlation_and_variance_by_hand() -> None:
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert pearson([1, 2, 3], [1, 1, 1]) is None and pearson([], []) is None
    # (0, 1): 1/4 over two; (1, 1, 1): 0 over three.
    groups = [group(rollout(0), rollout(1)), group(rollout(1), rollout(1), rollout(1))]
    assert within_variance(groups, lambda r: r.reward) == pytest.approx(0.25 * 2 / 5)


def test_means_and_changes() -> None:
    steps = [[group(rollout(0, 4), rollout(1, 6))], [group(rollout(1, 6), rollout(1, 8))], [group(rollout(1, 20))]]
    found = follow_rewards(steps)
    assert found["steps"] == 3 and found["rollouts"] == 5
    assert found["parts"]["reward"]["mean"] == [0.5, 1, 1]
    assert found["parts"]["reward"]["change"] == 0.5
    assert found["length"]["mean"] == [5, 7, 20] and found["length"]["change"] == 15


def test_reward_up_while_length_drifts_is_a_warning() -> None:
    steps = [[group(rollout(0.1 * s, 8 + s), rollout(0.1 * s + 0.1, 9 + 2 * s))] for s in range(12)]
    assert any("the reward rises while length rises" in w for w in follow_rewards(steps)["warnings"])
    calm = [[group(rollout(0.1 * s, 8), rollout(0.1 * s + 0.1, 8))] for s in range(12)]
    assert not [w for w in follow_rewards(calm)["warnings"] if "length" in w]


def test_parts_that_move_apart_are_found() -> None:
    steps = [
        [group(rollout(1, right=s / 10, short=1 - s / 10), rollout(1, right=s / 10 + 0.1, short=0.9 - s / 10))]
        for s in range(12)
    ]
    found = follow_rewards(steps)
    assert [(p["a"], p["b"]) for p in found["apart"]] == [("right", "short")]
    assert any("parts move apart" in w for w in found["warnings"])


def test_the_suspicious_are_well_rewarded_and_repetitive() -> None:
    hack = rollout(1, 40, same=True)
    steps = [[group(rollout(0), rollout(0.2), rollout(0.1)), group(hack, rollout(0), rollout(0.2))]]
    (first, *_) = follow_rewards(steps)["suspects"]
    assert (first["step"], first["group"], first["rollout"]) == (0, 1, 0)
    assert first["repetition"] == pytest.approx(36 / 37)


def test_a_form_that_few_others_have_is_suspicious() -> None:
    """One in eight writes two boxed answers and is rewarded for it; where most do, none stands out."""
    odd = rollout(1, text="\\boxed{1} or \\boxed{2}")
    usual = [rollout(0.1 * i, text="\\boxed{3}") for i in range(3)]
    (first, *_) = follow_rewards([[group(odd, *usual), group(*usual, rollout(0.3, text="\\boxed{3}"))]])["suspects"]
    assert (first["group"], first["rollout"], first["markers"]) == (0, 0, ["several answers"])
    same = [[group(odd, rollout(0, text=odd.text), odd, rollout(0, text=odd.text))]]
    assert not [s for s in follow_rewards(same)["suspects"] if s["markers"]]


@pytest.mark.parametrize(
    ("text", "marker"), [("\\boxed{4}", "boxed"), ("<think>so</think> 4", "think tag"), ("", "empty")]
)
def test_a_marker_that_comes_is_named_and_so_is_repetition(text: str, marker: str) -> None:
    """The reward need not rise for a form to be new."""
    before, after = rollout(0.5, 8, "4"), rollout(0.5, 8, text)
    found = follow_rewards([[group(before, before)]] * 3 + [[group(before, after)]] * 3 + [[group(after, after)]] * 3)
    assert f"share of rollouts with '{marker}' changed by +100%" in found["warnings"]
    assert found["markers"][marker]["mean"] == [0] * 3 + [0.5] * 3 + [1] * 3
    steps = [[group(rollout(0.1 * s, 8), rollout(0.1 * s, 8, same=s > 5))] for s in range(9)]
    assert any("the reward rises while repetition rises" in w for w in follow_rewards(steps)["warnings"])


def test_completions_that_are_empty_or_cut_from_the_beginning_are_named() -> None:
    nothing = replace(rollout(0, 1, ""), finish="end")
    told = follow_rewards([[group(nothing, nothing, rollout(1))]] * 4)["warnings"]
    assert [w for w in told if w.startswith("67% of completions are empty")]
    cut = replace(rollout(0), finish="length")
    told = follow_rewards([[group(cut, rollout(1))]])["warnings"]
    assert [w for w in told if w.startswith("50% of completions are cut") and "max_tokens" in w]
    assert not [w for w in follow_rewards([[group(cut, rollout(1), rollout(0))]])["warnings"] if "cut at" in w]


def test_nothing_to_watch() -> None:
    assert follow_rewards([])["rollouts"] == 0 and follow_rewards([[]])["warnings"] == []


def test_variance_within_and_between_groups_by_hand() -> None:
    # Means 1/2 and 1 of two and three rollouts: mean 4/5; between (0.09 * 2 + 0.04 * 3) / 5 = 0.06; within 0.1; all of
    # them, 0 1 1 1 1, have variance 0.16.
    groups = [group(rollout(0), rollout(1)), group(rollout(1), rollout(1), rollout(1))]
    assert within_variance(groups, lambda r: r.reward) == pytest.approx(0.1)
    assert between_variance(groups, lambda r: r.reward) == pytest.approx(0.06)
    alike = [group(rollout(1), rollout(1))]
    part = follow_rewards([groups, alike, []])["parts"]["right"]
    assert part["within"] == [pytest.approx(0.1), 0, None] and part["between"] == [pytest.approx(0.06), 0, None]
    assert part["signal"] == [pytest.approx(0.1 / 0.16), None, None]
    assert part["early"] == pytest.approx(0.8)


def test_a_part_that_varies_between_problems_alone_is_named() -> None:
    steps = [[group(rollout(1, a=1, b=0), rollout(1, a=1, b=1)), group(rollout(0, a=0, b=1), rollout(0, a=0, b=0))]] * 6
    found = follow_rewards(steps)
    assert found["parts"]["a"]["signal"] == [0] * 6 and found["parts"]["b"]["signal"] == [1] * 6
    assert [w for w in found["warnings"] if w.startswith("0% of a's variance")]
    assert not [w for w in found["warnings"] if "b's variance" in w]
    (pair,) = found["correlations"]
    assert pair["all"] == pytest.approx(0) and pair["steps"] == [pytest.approx(0)] * 6


def test_a_part_that_never_varies_is_named() -> None:
    """A judge that gives everything the same score, say."""
    steps = [[group(rollout(1, a=1, b=7), rollout(0, a=0, b=7)), group(rollout(0, a=0, b=7), rollout(1, a=1, b=7))]] * 6
    told = [w for w in follow_rewards(steps)["warnings"] if "the same for every completion" in w]
    assert told == ["b was the same for every completion of the run: it gave no training signal"]


def test_more_judged_steps_with_the_reward_are_a_sign() -> None:
    def said(s: int, reward: float) -> Rollout:
        return replace(rollout(reward), steps={"valid": [(i, i + 1, 1.0) for i in range(1 + s)]})

    steps = [[group(said(s, 0.1 * s), said(s + 1, 0.1 * s + 0.1))] for s in range(12)]
    found = follow_rewards(steps)
    assert found["judged"]["mean"][:2] == [1.5, 2.5] and found["judged"]["correlation"] == pytest.approx(1)
    assert any("the reward rises while the number of judged steps rises" in w for w in found["warnings"])


def test_what_an_environment_wrote_is_no_length_and_no_repetition() -> None:
    mask = (True,) * 8 + (False,) * 30
    r = Rollout((*range(8), *(1,) * 30), (0.0,) * 38, "end", "x", {"right": 1.0}, 1.0, mask)
    found = follow_rewards([[group(r, rollout(0))]])
    assert found["length"]["mean"] == [8] and found["repetition"]["mean"] == [0]
