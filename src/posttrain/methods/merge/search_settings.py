"""Settings of a search over the numbers of a merge."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from posttrain.config.base import Config

Place = tuple[str | int, ...]
"""Keys from the stage's settings to one number."""


class RangeConfig(Config):
    """An interval of numbers."""

    low: float
    high: float

    @model_validator(mode="after")
    def _order(self) -> RangeConfig:
        if not self.low < self.high:
            raise ValueError(f"expected low < high, got {self.low:g} and {self.high:g}")
        return self


class SearchConfig(Config):
    """A search over numbers of a merge, scored on items of the recipe's evaluations that are never reported."""

    method: Literal["grid", "coordinate", "cma"] = Field(
        "coordinate",
        description="grid: every combination of the values. coordinate: one number at a time, the best of its values. cma: CMA-ES in the ranges (arXiv 1604.00772; extra: search).",
    )
    coefficients: dict[str, list[float] | RangeConfig] = Field(
        min_length=1,
        description="Numbers of this stage's settings by place, such as models.0.weight, algorithm.density or algorithm.t.1 (of a list): the values that are tried, or for cma a range {low: 0, high: 1}.",
    )
    evaluations: dict[str, float] = Field(
        default_factory=dict,
        description="Evaluations that a merge is scored by, with their weights in the mean. Empty: all that have validation, weight 1 each.",
    )
    max_trials: int | None = Field(
        None,
        ge=2,
        description="Most merges that are tried, that with the numbers of the settings included. None: all of a grid; until coordinate finds nothing better.",
    )

    @model_validator(mode="after")
    def _fits(self) -> SearchConfig:
        for name, choice in self.coefficients.items():
            if isinstance(choice, RangeConfig) != (self.method == "cma"):
                wanted = "a range {low: 0, high: 1}" if self.method == "cma" else "a list of values"
                raise ValueError(f"coefficients.{name}: {self.method} takes {wanted}")
            if isinstance(choice, list) and (not choice or len(set(choice)) < len(choice)):
                raise ValueError(f"coefficients.{name}: expected different values, got {choice}")
        if self.method == "cma":
            if len(self.coefficients) == 1:
                raise ValueError("CMA-ES needs two numbers or more: search one by coordinate, with a list of values")
            least = 1 + population(len(self.coefficients))
            if self.max_trials is None or self.max_trials < least:
                raise ValueError(f"cma needs max_trials of at least {least}: the settings and one population")
        elif self.method == "grid":
            size = 1 + math.prod(len(c) for c in self.coefficients.values() if isinstance(c, list))
            if self.max_trials is not None and self.max_trials < size:
                raise ValueError(
                    f"the grid has up to {size} merges, and max_trials is {self.max_trials}: fewer values, or coordinate"
                )
        if any(not weight > 0 for weight in self.evaluations.values()):
            raise ValueError("evaluations: weights must be positive")
        return self


def population(dimensions: int) -> int:
    """Return the size of a population of CMA-ES: 4 + floor(3 ln n) (arXiv 1604.00772, table 1)."""
    return 4 + int(3 * math.log(dimensions))


def number_place(settings: Any, name: str) -> Place:
    """Return where a dotted name is in settings as plain data; keys may have dots themselves, as patterns do.

    Args:
        settings: The settings.
        name: The name.

    Raises:
        ValueError: There is no number of that name, with the names that there are.
    """
    found = _find(settings, name)
    if found is None:
        names = ", ".join(number_names(settings))
        raise ValueError(f"search.coefficients: {name!r} is no number that can be searched; there are {names}")
    return found


def _find(value: Any, name: str) -> Place | None:
    if not name:
        return () if isinstance(value, int | float) and not isinstance(value, bool) else None
    keys: list[Any] = list(value) if isinstance(value, Mapping) else []
    keys = list(range(len(value))) if isinstance(value, list) else keys
    for key in sorted(keys, key=lambda key: -len(str(key))):
        if name == str(key) or name.startswith(f"{key}."):
            rest = _find(value[key], name[len(str(key)) + 1 :])
            if rest is not None:
                return (key, *rest)
    return None


def number_names(value: Any, name: str = "") -> list[str]:
    """Return the dotted names of all numbers in settings as plain data."""
    if isinstance(value, Mapping | list):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        return [found for key, inner in pairs for found in number_names(inner, f"{name}.{key}" if name else str(key))]
    return [name] if isinstance(value, int | float) and not isinstance(value, bool) else []


def number_at(settings: Any, place: Place) -> float:
    """Return the number at a place."""
    for key in place:
        settings = settings[key]
    return float(settings)


def replace_numbers(settings: dict[str, Any], numbers: Mapping[Place, float]) -> dict[str, Any]:
    """Return settings with other numbers at some places."""

    def walk(value: Any, place: Place) -> Any:
        if place in numbers:
            return numbers[place]
        if isinstance(value, Mapping):
            return {key: walk(inner, (*place, key)) for key, inner in value.items()}
        return [walk(inner, (*place, i)) for i, inner in enumerate(value)] if isinstance(value, list) else value

    return walk(settings, ())  # type: ignore[no-any-return]
