"""The few functions of pytest that tests of data sets use, for a sandbox without pytest.

This runs next to the tests, without anything else of the package.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any


class RaisesContext:
    """Expect an exception in a with block; `value` is it afterwards."""

    def __init__(self, expected: Any, match: str | None) -> None:
        self.expected, self.match = expected, match
        self.value: Any = None
        self.type: Any = None

    def __enter__(self) -> RaisesContext:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if kind is None:
            raise AssertionError(f"did not raise {self.expected}")
        if not issubclass(kind, self.expected):
            return False
        self.type, self.value = kind, error
        if self.match is not None and not re.search(self.match, str(error)):
            raise AssertionError(f"{str(error)!r} does not match {self.match!r}")
        return True


def raises(expected: Any, *args: Any, match: str | None = None, **kwargs: Any) -> Any:
    """Expect an exception in a with block, or of a call.

    Args:
        expected: The class of the exception, or a tuple of classes.
        args: A function and its arguments. Empty: a with block follows.
        match: Pattern that is searched in the exception's text.
        kwargs: Keyword arguments of the function.
    """
    context = RaisesContext(expected, match)
    if not args:
        return context
    with context:
        args[0](*args[1:], **kwargs)
    return context


class Approximate:
    """Equal numbers within a tolerance, also in lists, tuples and dicts."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None, nan_ok: bool = False) -> None:
        self.expected, self.nan_ok = expected, nan_ok
        self.absolute = 1e-12 if abs is None else abs
        self.relative = (1e-6 if abs is None else 0.0) if rel is None else rel

    def __eq__(self, other: object) -> bool:
        return self._close(self.expected, other)

    def _close(self, expected: Any, value: Any) -> bool:
        if isinstance(expected, Mapping):
            same = isinstance(value, Mapping) and value.keys() == expected.keys()
            return same and all(self._close(v, value[k]) for k, v in expected.items())  # type: ignore[index]
        if isinstance(expected, Sequence) and not isinstance(expected, str):
            same = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == len(expected)
            return same and all(map(self._close, expected, value))
        if not isinstance(expected, (int, float, complex)) or not isinstance(value, (int, float, complex)):
            return bool(expected == value)
        if expected == value:
            return True
        if math.isnan(abs(expected)) or math.isnan(abs(value)):
            return self.nan_ok and math.isnan(abs(expected)) and math.isnan(abs(value))
        if math.isinf(abs(expected)) or math.isinf(abs(value)):
            return False
        return abs(expected - value) <= max(self.absolute, self.relative * abs(expected))


def fail(reason: str = "") -> None:
    """Fail the test."""
    raise AssertionError(reason)


def fixture(function: Any = None, **_: Any) -> Any:
    """Mark a function whose result is the argument of its name."""

    def marked(function: Any) -> Any:
        function.is_fixture = True
        return function

    return marked if function is None else marked(function)


class Marks:
    """Decorators of tests: parametrize; others change nothing."""

    def __getattr__(self, name: str) -> Any:
        def mark(*args: Any, **_: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) else lambda function: function

        return mark

    def parametrize(self, names: Any, values: Any, **_: Any) -> Callable[[Any], Any]:
        """Call the test once for each row of values."""
        keys = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
        rows = [dict(zip(keys, v if len(keys) > 1 else [v], strict=True)) for v in values]

        def marked(function: Any) -> Any:
            function.parameters = [*getattr(function, "parameters", ()), rows]
            return function

        return marked


def calls_of(function: Any, names: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the arguments of each call of a test: of parametrize, and of fixtures.

    Raises:
        LookupError: An argument is neither.
    """
    needed = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    for rows in itertools.product(*getattr(function, "parameters", ())):
        arguments = {k: v for row in rows for k, v in row.items()}
        for name in needed:
            if name not in arguments:
                made = names.get(name)
                if not getattr(made, "is_fixture", False):
                    raise LookupError(f"the test {function.__name__} takes {name!r}, which nothing provides")
                value = made(**next(calls_of(made, names)))  # type: ignore[misc]
                arguments[name] = next(value) if inspect.isgenerator(value) else value
        yield arguments


def pytest_module() -> ModuleType:
    """Return the module that tests import as pytest."""
    module = ModuleType("pytest")
    module.__dict__.update(raises=raises, approx=Approximate, fail=fail, fixture=fixture, mark=Marks())
    return module
