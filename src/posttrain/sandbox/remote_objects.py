"""The tests' side of a program that runs in another sandbox: what they hold of its objects.

A `RemoteObject` forwards calls, attributes and items. It is equal to itself alone and has no operators, so that no code
of the program takes part in a comparison. This runs next to the tests, without anything else of the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.sandbox.program_channel import ProgramChannel

VERDICTS = {
    name
    for kind in (str, bytes, set, float)
    for name in dir(kind)
    if name.startswith(("is", "startswith", "endswith")) and not name.startswith("__")
}
"""Methods of plain values that compare: an object of the program would be the judge of its own value."""
FORWARDED = {"__name__", "__qualname__", "__annotations__"}
"""The names with two underscores that are."""


class ProgramFailed(BaseException):
    """The program is gone, or broke the protocol: the tests can't catch this, nor pass after it."""


class TestsFault(BaseException):
    """The tests do something that is not supported, whatever the program is."""


class ProgramExit(SystemExit):
    """The program called sys.exit()."""


class RemoteObject:
    """An object of the program."""

    __slots__ = ("_channel", "_class", "_kind", "_name", "_number")

    def __init__(self, channel: ProgramChannel, number: int, kind: str, of: int | None, name: str) -> None:
        for key, value in zip(self.__slots__, (channel, of, kind, name, number), strict=True):
            object.__setattr__(self, key, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._channel.call(self._number, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in FORWARDED:
            raise AttributeError(f"{name!r} of an object of the program")
        if name in VERDICTS:
            raise AttributeError(self._channel.note(f"{name}() of an object of the program, which would judge itself"))
        return self._channel.ask("attribute", self._number, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._channel.send_value("assign", self._number, name, value)

    def _apply(self, function: str, *args: Any) -> Any:
        return self._channel.send_value("function", function, self._number, args)

    def _data(self, function: str, *args: Any) -> Any:
        """Read an object like a container: only one of a class that the tests name. Others stand for plain values."""
        if self._class not in self._channel.named:
            raise TypeError(self._channel.note(f"{function} of an object ({self._name}) instead of a plain value"))
        return self._apply(function, *args)

    def __len__(self) -> int:
        return checked(self._data("len"), int)

    def __getitem__(self, key: Any) -> Any:
        return self._data("getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._data("setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        self._data("delitem", key)

    def __iter__(self) -> Iterator[Any]:
        if self._kind in ("iterator", "generator"):
            return self  # type: ignore[return-value]
        iterator = self._data("iter")
        return iterator if isinstance(iterator, RemoteObject) else iter(iterator)

    def __next__(self) -> Any:
        if self._kind not in ("iterator", "generator"):
            raise TypeError(f"{self._name!r} object is not an iterator")
        return self._channel.next_item(self._number, self._kind)

    def __bool__(self) -> bool:
        return checked(self._apply("bool"), bool)

    def __str__(self) -> str:
        return checked(self._apply("str"), str)

    def __repr__(self) -> str:
        return checked(self._apply("repr"), str)

    def __eq__(self, other: object) -> bool:
        if self is not other:
            self._channel.note(f"an object of the program ({self._name}) is equal to nothing but itself")
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, RemoteObject) and checked(value._apply("isinstance", self), bool)

    def __enter__(self) -> Any:
        return self._apply("enter")

    def __exit__(self, *_: object) -> None:
        """Leave; what the tests raised is never swallowed."""
        self._apply("exit")

    async def _wait(self) -> Any:
        """Wait for a coroutine of the program, which runs in its own loop."""
        return self._apply("await")

    def __mro_entries__(self, bases: Any) -> Any:
        raise self._channel.fault("the tests derive a class from one of the program")


def checked(value: Any, kind: type) -> Any:
    """Return the value if it is of exactly this type. Raises TypeError."""
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, and the program returned {type(value).__name__}")
    return value


class ProgramModule(ModuleType):
    """Stands for the program where tests import it: ``from solution import add``."""

    def __init__(self, name: str, names: Mapping[str, Any]) -> None:
        super().__init__(name)
        self._names = names

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self._names[name]
        except KeyError:
            raise AttributeError(f"the program has no {name!r}") from None
