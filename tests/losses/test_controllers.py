"""Coefficients that follow a measurement: by hand, and as a closed loop."""

from __future__ import annotations

import math

import pytest

from posttrain.losses.controllers import adaptive_kl, smoothed, toward_entropy


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.2),  # on target
        (6.6, 0.2 * 1.01),  # e = 0.1
        (5.4, 0.2 * 0.99),
        (60.0, 0.2 * 1.02),  # e held at 0.2
        (0.0, 0.2 * 0.98),  # e held at -0.2
        (-3.0, 0.2 * 0.98),  # an estimate may be negative
    ],
)
def test_adaptive_kl_by_hand(kl: float, expected: float) -> None:
    assert adaptive_kl(0.2, kl, 6.0) == pytest.approx(expected, rel=1e-12)


def test_adaptive_kl_with_another_gain_and_from_nothing() -> None:
    assert adaptive_kl(0.5, 2.2, 2.0, gain=2.0) == pytest.approx(0.5 * 1.2)
    assert adaptive_kl(0.0, 100.0, 1.0) == 0.0


@pytest.mark.parametrize(
    ("entropy", "expected"),
    [
        (0.4, 1.0),  # on target
        (0.36, 1.02),  # 10% low: e = 0.1
        (0.44, 0.98),
        (0.0, 1.04),  # held at 0.2
        (9.0, 0.96),
    ],
)
def test_toward_entropy_by_hand(entropy: float, expected: float) -> None:
    assert toward_entropy(1.0, entropy, 0.4) == pytest.approx(expected, rel=1e-12)


def test_toward_entropy_keeps_its_bounds() -> None:
    assert toward_entropy(1.19, 0.0, 0.4, 0.2, 0.5, 1.2) == 1.2
    assert toward_entropy(0.51, 9.0, 0.4, 0.2, 0.5, 1.2) == 0.5
    assert toward_entropy(0.0, 0.0, 0.4, 0.2, 0.001, 0.1) == 0.001


@pytest.mark.parametrize(
    "bad", [{"target": 0.0}, {"gain": -1.0}, {"entropy": math.nan}, {"value": math.inf}, {"low": 2.0, "high": 1.0}]
)
def test_what_makes_no_sense_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        toward_entropy(**{"value": 1.0, "entropy": 0.3, "target": 0.4, **bad})  # type: ignore[arg-type]


def test_a_temperature_finds_the_entropy_of_a_distribution() -> None:
    """A closed loop on real softmaxes: the temperature at which the entropy is the target, from either side."""
    logits = [3.0, 1.0, 0.5, 0.0, -1.0]

    def entropy(temperature: float) -> float:
        weights = [math.exp(z / temperature) for z in logits]
        p = [w / sum(weights) for w in weights]
        return -sum(x * math.log(x) for x in p)

    for start in (0.5, 1.5):
        temperature = start
        for _ in range(60):
            temperature = toward_entropy(temperature, entropy(temperature), 0.9, low=0.3, high=2.0)
        assert entropy(temperature) == pytest.approx(0.9, abs=0.01)


def test_smoothed_by_hand() -> None:
    assert smoothed(None, 3.0) == 3.0
    assert smoothed(smoothed(smoothed(None, 1.0), 2.0), 0.0) == pytest.approx(0.96)  # 1, 1.2, 0.96
    assert smoothed(4.0, 1.0, share=1.0) == 1.0
