"""Values that cross between tests and program, written and read on the side of the tests.

Only plain values come in: None, bool, int, float, complex, str, bytes, lists, tuples, sets, dicts, ranges, numbers and
dates of the standard library, each made here and of exactly that type, so nothing that the program sends has methods of
the program's. Anything else of the program stays there, and the tests get a `RemoteObject`. This runs next to the
tests, without anything else of the package.
"""

from __future__ import annotations

import builtins
import datetime
import decimal
import fractions
from collections import namedtuple
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from posttrain.sandbox.remote_objects import RemoteObject, checked

if TYPE_CHECKING:
    from posttrain.sandbox.program_channel import ProgramChannel

_DEEPEST = 210
"""Levels of nested containers."""
_VALUES: dict[type, Any] = {
    fractions.Fraction: lambda v: (v.numerator, v.denominator),
    decimal.Decimal: lambda v: (str(v),),
    datetime.date: lambda v: (v.year, v.month, v.day),
    datetime.time: lambda v: (v.hour, v.minute, v.second, v.microsecond),
    datetime.datetime: lambda v: (v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond),
    datetime.timedelta: lambda v: (v.days, v.seconds, v.microseconds),
}
"""Values of the standard library that cross, and the arguments that make them again."""
_MAKERS: dict[str, Any] = {kind.__name__: kind for kind in _VALUES}
_PLAIN: tuple[Any, ...] = (bool, int, float, complex, str, bytes)
_VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.values()), type({}.items()))


class Encoder:
    """Write arguments: plain values as they are, the rest as tuples that begin with an Ellipsis."""

    def __init__(self, channel: ProgramChannel) -> None:
        self.channel = channel
        self.records: list[Any] = []
        self.places: dict[int, int] = {}
        """Places in `records`, by identity."""

    def table(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the records that were found, with their fields, which may hold more records."""
        out: list[tuple[str, dict[str, Any]]] = []
        while len(out) < len(self.records):
            record = self.records[len(out)]
            out.append((type(record).__name__, {k: self.encode(v) for k, v in vars(record).items()}))
        return out

    def encode(self, value: Any, depth: int = 0) -> Any:
        """Return a value that marshal can write.

        Raises:
            TestsFault: There is no such value.
        """
        if depth > _DEEPEST:
            raise self.channel.fault(f"the tests pass a value nested deeper than {_DEEPEST} levels")
        if value is None or type(value) in (bool, int, float, complex, str, bytes):
            return value
        for kind in (list, tuple):
            if isinstance(value, kind):
                return kind([self.encode(v, depth + 1) for v in value])
        if isinstance(value, dict):
            return {self.encode(k, depth + 1): self.encode(v, depth + 1) for k, v in value.items()}
        if isinstance(value, (set, frozenset)):
            items = [self.encode(v, depth + 1) for v in value]
            return (..., "set" if isinstance(value, set) else "frozenset", items)
        if isinstance(value, bytearray):
            return (..., "value", "builtins", "bytearray", (bytes(value),))
        for plain in _PLAIN:
            if isinstance(value, plain):
                return plain(value)
        return self._other(value, depth)

    def _other(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind is RemoteObject:
            return (..., "object", value._number)
        if self.channel.records.get(kind.__name__) is kind:
            place = self.places.setdefault(id(value), len(self.records))
            if place == len(self.records):
                self.records.append(value)
            return (..., "record", place)
        if kind is range:
            return (..., "range", value.start, value.stop, value.step)
        if kind in _VALUES and getattr(value, "tzinfo", None) is None:
            return (..., "value", kind.__module__, kind.__name__, _VALUES[kind](value))
        if isinstance(value, type) and hasattr(value, "posttrain_number"):
            return (..., "object", value.posttrain_number)
        own_name = str(getattr(value, "__name__", ""))
        if isinstance(value, type) and vars(builtins).get(own_name) is value:
            return (..., "type", own_name)
        if kind in _VIEWS:
            return [self.encode(v, depth + 1) for v in value]
        functions = self.channel.functions
        if hasattr(kind, "__next__"):
            functions.append(lambda: next(((item,) for item in value), ()))
            return (..., "iterator", len(functions) - 1)
        if callable(value):
            functions.append(value)
            return (..., "function", len(functions) - 1, own_name or "function")
        raise self.channel.fault(f"the tests pass a value of type {kind.__name__}, which can't cross to the program")


class Decoder:
    """Make values of a frame of the program, each of exactly its type."""

    def __init__(self, channel: ProgramChannel, existing: list[Any] | None = None) -> None:
        self.channel = channel
        self.existing = existing or []
        self.records: list[Any] = []

    def decode(self, value: Any, depth: int = 0) -> Any:
        """Return the value.

        Raises:
            ValueError, TypeError, KeyError, IndexError: It is of no known form.
        """
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) is not list or not value or type(value[0]) is not str or depth > _DEEPEST:
            raise ValueError("no tagged value")
        tag, rest = value[0], value[1:]
        if tag in ("l", "t", "s", "z"):
            items = [self.decode(v, depth + 1) for v in rest]
            return {"l": list, "t": tuple, "s": set, "z": frozenset}[tag](items)
        if tag == "d":
            items = [self.decode(v, depth + 1) for v in rest]
            return dict(zip(items[::2], items[1::2], strict=True))
        if tag == "n":
            return int(rest[0], 16)
        if tag in ("b", "B"):
            return (bytes if tag == "b" else bytearray).fromhex(rest[0])
        if tag == "c":
            return complex(*(float(x) for x in rest))
        if tag == "g":
            return range(*(checked(x, int) for x in rest))
        if tag == "v":
            items = self.decode(rest[1], depth + 1)
            if rest[0] == "values":
                return dict(enumerate(items)).values()
            return dict(items).items() if rest[0] == "items" else dict.fromkeys(items).keys()
        if tag == "x":
            arguments = self.decode(rest[1], depth + 1)
            return _MAKERS[rest[0]](*(checked(a, str if rest[0] == "Decimal" else int) for a in arguments))
        if tag == "N":
            return _named_tuple(checked(rest[0], str), tuple(self.decode(rest[1])))(*self.decode(rest[2], depth + 1))
        return self._object(tag, rest, depth)

    def _object(self, tag: str, rest: list[Any], depth: int) -> Any:
        if tag == "R":
            return self._with_records(rest[0], rest[1:], depth)
        if tag == "i":
            return self.records[checked(rest[0], int)]
        if tag != "o":
            raise ValueError("an unknown tag")
        number, kind, of, name = rest
        if type(number) is not int or type(name) is not str or number < 0:
            raise ValueError("an object of another form")
        known = self.channel.objects.get(number)
        if known is None:
            if kind == "coroutine":
                known = RemoteObject(self.channel, number, kind, of, name)._wait()
            elif kind == "exception":
                known = self._exception_class(number, of, name)
            elif kind in ("class", "object", "iterator", "generator") and type(of) in (int, type(None)):
                known = RemoteObject(self.channel, number, kind, of, name)
            else:
                raise ValueError("an object of an unknown kind")
            self.channel.objects[number] = known
        return known

    def _exception_class(self, number: int, base: Any, name: str) -> type:
        """Return a class that stands for one of the program's, or the prompt's own class of that name."""
        known = self.channel.records.get(name)
        if known is not None and issubclass(known, BaseException):
            return known
        found: Any = getattr(builtins, checked(base, str), None)
        if not (isinstance(found, type) and issubclass(found, BaseException)):
            raise ValueError("an exception without a base")
        odd = (StopIteration, StopAsyncIteration, UnicodeError, getattr(builtins, "BaseExceptionGroup", ()))
        if not issubclass(found, Exception) or any(issubclass(found, kind) for kind in odd):
            found = Exception
        return type(name, (found,), {"posttrain_number": number, "__str__": lambda self: self.posttrain_text})

    def _with_records(self, value: Any, table: list[Any], depth: int) -> Any:
        """Make the records, then fill them, so that they can refer to each other."""
        for place, (name, _) in enumerate(table):
            kind = self.channel.records[name]
            old = self.existing[place] if place < len(self.existing) else None
            self.records.append(old if type(old) is kind else object.__new__(kind))
        for record, (_, fields) in zip(self.records, table, strict=True):
            new = self.decode(fields, depth + 1)
            if type(new) is not dict or not all(type(k) is str for k in new):
                raise ValueError("a record of another form")
            vars(record).clear()
            vars(record).update(new)
        return self.decode(value, depth + 1)


@lru_cache(maxsize=256)
def _named_tuple(name: str, fields: tuple[str, ...]) -> Any:
    return namedtuple(name, fields)  # it checks that the names are identifiers
