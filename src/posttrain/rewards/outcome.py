"""What a reward is, and what comes of calling one."""

from __future__ import annotations

import math
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.core.errors import PosttrainError

Example = Mapping[str, Any]
Reward = Callable[[str, Example], float]
"""A completion and its example → a number. The example also has ``completion_tokens`` and ``finish`` of the rollout."""
GroupReward = Callable[[Sequence[str], Example], Sequence[float]]
"""All completions of one prompt → a number for each."""
Scorer = Callable[[Sequence[Any], Sequence[str]], Sequence[float]]
"""Prompts (as the examples hold them) and completions, pair by pair → a number for each pair."""

TRACE = 3000
"""Characters of a traceback that are kept, from its end."""


class LabelError(PosttrainError, ValueError):
    """An example without the label that a reward needs, or with one that it can't use."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one call gave for one rollout: a value, or a failure with its message and traceback; neither where it
    has no opinion, which then counts nothing in the sum.

    steps: of a reward that judges steps, (first character, one past the last, score) in order; value is their mean.

    failure: ``error`` (it raised, or returned no finite number), ``timeout``, ``died`` (memory ran out, or the worker
    process ended twice during this call).
    """

    value: float | None = None
    failure: Literal["error", "timeout", "died"] | None = None
    message: str = ""
    trace: str = ""
    steps: tuple[tuple[int, int, float], ...] | None = None


def as_number(value: Any) -> float:
    """A finite float, of a number, a bool, or an array or tensor of no dimensions. Raises TypeError and ValueError."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise TypeError(f"expected a number, and the reward returned {type(value).__name__}: {str(value)[:80]!r}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, and the reward returned {number}")
    return number + 0.0  # minus zero is zero


def attempt(
    function: Callable[..., Any], args: Sequence[Any], count: int | None = None, steps: bool = False
) -> list[Outcome]:
    """Call a reward and judge what it returns; whatever it raises becomes an outcome.

    count: None where it returns one number; else the numbers it must return, of which each may fail on its own. steps:
    instead of a number each is a list of (first character, one past the last, score).
    """
    try:
        value = function(*args)
        values = [value] if count is None else list(value)
        if len(values) != (1 if count is None else count):
            raise ValueError(f"expected {count} numbers, one a completion, and the reward returned {len(values)}")
    except MemoryError:
        return [Outcome(failure="died", message="out of memory", trace=_trace())] * (count or 1)
    except (Exception, SystemExit) as error:
        message = f"{type(error).__name__}: {error}"[:TRACE]
        return [Outcome(failure="error", message=message, trace=_trace())] * (count or 1)
    return [_checked(v, steps) for v in values]


def _checked(value: Any, steps: bool = False) -> Outcome:
    try:
        if steps:
            scored = tuple(sorted(_step(s) for s in value))
            return Outcome(sum(s[2] for s in scored) / max(1, len(scored)), steps=scored)
        return Outcome(as_number(value))
    except Exception as error:
        return Outcome(failure="error", message=str(error)[:TRACE])


def _step(value: Any) -> tuple[int, int, float]:
    start, end, score = value
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end):
        raise ValueError(f"expected steps as (first character, one past the last, score), and got {value!r}")
    return start, end, as_number(score)


def _trace() -> str:
    return traceback.format_exc()[-TRACE:]


def labels(example: Example, column: str) -> list[str]:
    """The right answers of an example as text. Raises LabelError where there is none, or it is empty or no text."""
    if example.get(column) is None:
        have = sorted(k for k, v in example.items() if v is not None)
        raise LabelError(f"the example has no label {column!r} (it has {have}); name its column with `label:`")
    value = example[column]
    out = []
    for one in value if isinstance(value, list | tuple) else [value]:
        usable = isinstance(one, str) or (isinstance(one, numbers.Real) and not isinstance(one, bool))
        if not usable or not str(one).strip() or str(one) in ("nan", "inf", "-inf"):
            raise LabelError(f"label {column!r} is {one!r}: expected text or a number, or a list of them")
        out.append(str(one).strip())
    if not out:
        raise LabelError(f"label {column!r} is an empty list: expected at least one right answer")
    return out
