"""The outcome of calling a reward, checked; and the labels of an example."""

from __future__ import annotations

import math
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from posttrain.core.errors import PosttrainError
from posttrain.core.types import Step

ExampleRow = Mapping[str, Any]
TRACE = 3000
"""Characters of a traceback that are kept, from its end."""
LARGEST_REWARD = 1e30
"""Largest size of a number: sums and squares of larger ones leave float32."""
LONGEST_NOTE = 300
"""Characters of a reason that are kept."""
WITHOUT_END = "no end token"
NOT_GRADED = "not graded"
"""Beginnings of notes on answers that count as wrong: cut at the longest length; too slow or too large to be graded."""


class LabelError(PosttrainError, ValueError):
    """Raised for an example without the label that a reward needs, or with one that it can't use."""


@dataclass(frozen=True, slots=True)
class RewardOutcome:
    """The outcome of a call for one rollout: a value, or a failure.

    Attributes:
        value: The number. None: a failure, or no opinion, which counts nothing in the sum.
        failure: ``error`` (it raised, or returned no finite number), ``timeout``, ``died`` (memory ran out, or the
            worker process ended twice during this call).
        message, trace: Of the failure; of a number, the reason that its reward gave.
        cut_off: Why an answer that the reward was cut off at counts as wrong, with value 0; None for other outcomes.
        steps: Of a reward that scores steps, (first character, one past the last, score) in order; value is their mean.
        turns: Of a reward that scores turns: a turn's number, from 1, to (first token, one past the last, score).
        figures: Further numbers of the rollout by name, which are logged and not trained on.
    """

    value: float | None = None
    failure: Literal["error", "timeout", "died"] | None = None
    message: str = ""
    trace: str = ""
    cut_off: Literal["timeout", "died"] | None = None
    steps: tuple[tuple[int, int, float], ...] | None = None
    turns: Mapping[int, Step] | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


class Explained(float):
    """A reward's number with its reason, which is kept with the rollout and shown to people, never to a model."""

    reason: str

    def __new__(cls, value: float, reason: str) -> Explained:
        made = super().__new__(cls, value)
        made.reason = reason
        return made


def as_number(value: Any) -> float:
    """Return a number, a bool, or an array or tensor of no dimensions as a finite float; else raise an error."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise TypeError(f"expected a number, and the reward returned {type(value).__name__}: {str(value)[:80]!r}")
    number = float(value)
    if not math.isfinite(number) or abs(number) > LARGEST_REWARD:
        raise ValueError(f"expected a finite number of at most {LARGEST_REWARD:g}, and the reward returned {number}")
    return number + 0.0  # minus zero is zero


def attempt(
    function: Callable[..., Any], args: Sequence[Any], count: int | None = None, steps: bool = False
) -> list[RewardOutcome]:
    """Call a reward and check its result; an exception becomes an outcome.

    Args:
        function: The reward.
        args: Its arguments.
        count: How many numbers it must return, each of which may fail alone. None: one, not in a list.
        steps: True if it returns [(first character, one past the last, score), …] instead of each number.

    Returns:
        One outcome for each number.
    """
    try:
        value = function(*args)
        if count is not None and isinstance(value, Mapping | set | frozenset | str | bytes):
            raise TypeError(
                f"expected a list of {count} numbers, one for each completion in their order, and the reward returned "
                f"a {type(value).__name__}: {str(value)[:80]}"
            )
        values = [value] if count is None else list(value)
        if len(values) != (1 if count is None else count):
            raise ValueError(f"expected {count} numbers, one a completion, and the reward returned {len(values)}")
    except MemoryError:
        return [RewardOutcome(failure="died", message="out of memory", trace=_trace())] * (count or 1)
    except (Exception, SystemExit) as error:
        message = f"{type(error).__name__}: {error}"[:TRACE]
        return [RewardOutcome(failure="error", message=message, trace=_trace())] * (count or 1)
    return [_checked(v, steps) for v in values]


def _checked(value: Any, steps: bool = False) -> RewardOutcome:
    try:
        if steps:
            scored = tuple(sorted(_step(s) for s in value))
            return RewardOutcome(sum(s[2] for s in scored) / max(1, len(scored)), steps=scored)
        return RewardOutcome(as_number(value), message=str(value.reason) if isinstance(value, Explained) else "")
    except Exception as error:
        return RewardOutcome(failure="error", message=str(error)[:TRACE])


def _step(value: Any) -> tuple[int, int, float]:
    start, end, score = value
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end):
        raise ValueError(f"expected steps as (first character, one past the last, score), and got {value!r}")
    return start, end, as_number(score)


def _trace() -> str:
    return traceback.format_exc()[-TRACE:]


def labels(example: ExampleRow, column: str) -> list[str]:
    """Return the right answers of an example as text. Raises LabelError if it has none, or one that is no text."""
    if example.get(column) is None:
        columns = sorted(k for k, v in example.items() if v is not None)
        raise LabelError(f"the example has no label {column!r} (it has {columns}); name its column with `label:`")
    value = example[column]
    out = []
    for label in value if isinstance(value, list | tuple) else [value]:
        usable = isinstance(label, str) or (isinstance(label, numbers.Real) and not isinstance(label, bool))
        if not usable or not str(label).strip() or str(label) in ("nan", "inf", "-inf"):
            raise LabelError(f"label {column!r} is {label!r}: expected text or a number, or a list of them")
        out.append(str(label).strip())
    if not out:
        raise LabelError(f"label {column!r} is an empty list: expected at least one right answer")
    return out
