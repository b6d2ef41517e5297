"""Coefficients that follow a measurement: proportional control, in the logarithm, of one number a step.

Each step the value is multiplied by 1 + K e, with e the relative error held within ±0.2, so that one odd measurement
moves it by a fifth of K at most. Plain numbers in and out: the state between steps is the value itself.
"""

from __future__ import annotations

import math

HELD = 0.2
"""Largest relative error that counts."""


def adaptive_kl(beta: float, kl: float, target: float, gain: float = 0.1) -> float:
    """Compute the KL penalty's coefficient for the next step.

        e = clip(KL / target - 1, -0.2, 0.2)        beta' = beta (1 + K e)

    Source: arXiv 1909.08593 section 2.2 (there K = 0.1 and the KL of whole continuations).

    Args:
        beta: Coefficient of this step; 0 stays 0.
        kl: KL measured in this step, in the target's unit.
        target: KL to keep.
        gain: K.

    Raises:
        ValueError: Target or gain is not positive, or a number is not finite.
    """
    _check(beta, kl, target, gain)
    return beta * (1 + gain * max(-HELD, min(HELD, kl / target - 1)))


def toward_entropy(
    value: float, entropy: float, target: float, gain: float = 0.2, low: float = 0.0, high: float = math.inf
) -> float:
    """Compute a value that raises entropy (a temperature, a bonus's coefficient) for the next step.

        e = clip(1 - H / target, -0.2, 0.2)        value' = clip(value (1 + K e), low, high)

    The form is that of `adaptive_kl` with the sign turned. A temperature that holds the entropy of what is sampled:
    arXiv 2506.13284 (chosen by hand there); a coefficient that does: arXiv 1812.05905 section 5, 2505.22312 (MAGIC).

    Args:
        value: Value of this step; 0 stays at max(0, low).
        entropy: Entropy measured in this step, in the target's unit.
        target: Entropy to keep.
        gain: K.
        low: Lower bound of the result.
        high: Upper bound of the result.

    Raises:
        ValueError: Target or gain is not positive, low exceeds high, or a number is not finite.
    """
    _check(value, entropy, target, gain)
    if not low <= high:
        raise ValueError(f"low ({low}) must not be above high ({high})")
    return max(low, min(high, value * (1 + gain * max(-HELD, min(HELD, 1 - entropy / target)))))


def smoothed(before: float | None, measured: float, share: float = 0.2) -> float:
    """Compute an exponential mean, m' = m + share (x - m): of about the last 1 / share measurements.

    Args:
        before: m. None: this is the first measurement, and the result.
        measured: x.
        share: Weight of the newest measurement, above 0 and at most 1.
    """
    return measured if before is None else before + share * (measured - before)


def _check(value: float, measured: float, target: float, gain: float) -> None:
    if not (target > 0 and gain > 0):
        raise ValueError(f"target and gain must be positive, and are {target} and {gain}")
    if not (math.isfinite(value) and math.isfinite(measured)):
        raise ValueError(f"value and measurement must be finite, and are {value} and {measured}")
