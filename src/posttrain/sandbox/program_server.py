"""Load a program as a module, and answer the calls of its tests, which run in another sandbox, through pipes.

This runs in the program's process, and the program can change all of it: nothing here protects anything. It turns
results into plain values; what checks and compares these is `remote_objects` on the side of the tests. It imports as
little as possible, since it starts once for each program.

Requests are frames of marshal (the tests are trusted, and run on the same interpreter), replies are frames of JSON with
tags: a list is ["l", ...], a tuple ["t", ...], an object that stays here ["o", number, kind, ...].
"""

from __future__ import annotations

import builtins
import io
import marshal
import os
import sys
from typing import TYPE_CHECKING

try:
    from _json import encode_basestring_ascii as quoted
except ImportError:
    from json.encoder import encode_basestring_ascii as quoted

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_DEEPEST = 200
"""Levels of nested containers that cross."""
_TEXT_KB = 64
"""Printed text of one call that crosses."""
_SMALL = 1 << 62
_VALUES = {
    ("fractions", "Fraction"): lambda v: (v.numerator, v.denominator),
    ("decimal", "Decimal"): lambda v: (str(v),),
    ("datetime", "date"): lambda v: (v.year, v.month, v.day),
    ("datetime", "time"): lambda v: (v.hour, v.minute, v.second, v.microsecond),
    ("datetime", "datetime"): lambda v: (v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond),
    ("datetime", "timedelta"): lambda v: (v.days, v.seconds, v.microseconds),
}
"""Values of the standard library that cross, and the arguments that make them again."""
_TAGS: dict[type, str] = {list: "l", tuple: "t", set: "s", frozenset: "z"}
_PLAIN: tuple[Any, ...] = (bool, int, float, str, list, tuple, set, frozenset, dict, bytes, bytearray)
_VIEWS = {type({}.keys()): "keys", type({}.values()): "values", type({}.items()): "items"}


def receive_frame(fd: int) -> bytes:
    """Return the next frame; end the process if the other side is gone."""
    out = b""
    size = 4
    while len(out) < size:
        piece = os.read(fd, size - len(out))
        if not piece:
            os._exit(0)
        out += piece
        if size == 4 and len(out) == 4:
            size = 4 + int.from_bytes(out, "big")
    return out[4:]


def send_frame(fd: int, text: str) -> None:
    """Write a frame."""
    data = text.encode("ascii")
    view = memoryview(len(data).to_bytes(4, "big") + data)
    while view:
        view = view[os.write(fd, view) :]


class ProgramServer:
    """The program's objects, by number, and the pipes to its tests."""

    def __init__(self, names: dict[str, Any], requests: int, replies: int) -> None:
        self.names, self.requests, self.replies = names, requests, replies
        self.kept: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.records: tuple[str, ...] = ()
        self.made: list[Any] = []
        """Records of the call that is being answered, by their numbers there."""
        self.places: dict[int, int] = {}
        """Places in `made`, by identity."""
        self.late: dict[int, Exception] = {}
        """What iterators raised after items that were sent."""

    def serve(self) -> None:
        """Answer until the tests end."""
        while True:
            self.answer(marshal.loads(receive_frame(self.requests)))

    def answer(self, request: tuple[Any, ...]) -> None:
        """Do what a request asks, and reply with a value or an exception."""
        number, operation, *rest = request
        out, sys.stdout = sys.stdout, io.StringIO()
        printed: Any = sys.stdout
        try:
            reply = getattr(self, "do_" + operation)(*rest)
        except BaseException as error:
            reply = self.raised(error)
        if sys.stdout is printed:
            sys.stdout = out
        text = printed.getvalue()
        if text:
            reply = f'"printed",{quoted(text[: _TEXT_KB << 10])},{reply}'
        send_frame(self.replies, f"[{number},{reply}]")

    def raised(self, error: BaseException) -> str:
        """Return the reply for an exception: its class, arguments and text."""
        token = getattr(error, "_posttrain_token", None)
        try:
            arguments, fields, text = self.encode(tuple(error.args)), self.encode(dict(vars(error))), str(error)
        except Exception:
            arguments, fields, text = '["t"]', '["d"]', ""
        kind = type(error)
        known = getattr(builtins, kind.__name__, None) is kind
        name = quoted(kind.__name__) if known else self.kept_object(kind)
        return f'"error",{name},{arguments},{fields},{quoted(text)},{"null" if token is None else int(token)}'

    # What is asked

    def do_get(self, name: str, records: tuple[str, ...]) -> str:
        """Return a name of the program."""
        self.records = records
        return '"value",' + self.encode(self.names[name])

    def do_call(self, of: Any, args: Any, kwargs: Any, objects: Any, copies: int) -> str:
        """Call an object of the program.

        Args:
            of: Number of the object.
            args: Positional arguments, encoded.
            kwargs: Named arguments, encoded.
            objects: Objects of the tests that are among the arguments.
            copies: 2 returns arguments that may have been changed, 1 only where the call returned None, 0 never.
        """
        self.made = self.new_records(objects)
        args, kwargs = self.decode(args), self.decode(kwargs)
        arguments = [*args, *kwargs.values()]
        made = self.made
        result = self.kept[of](*args, **kwargs)
        self.made = made
        reply = '"value",' + self.encode(result)
        changeable = bool(made) or any(isinstance(a, (list, dict, set, bytearray)) for a in arguments)
        if changeable and (copies == 2 or (copies == 1 and result is None)):
            reply += "," + self.encode(arguments)
        self.made = []
        return reply

    def do_attribute(self, of: int, name: str) -> str:
        """Return an attribute of an object."""
        return '"value",' + self.encode(getattr(self.kept[of], name))

    def do_assign(self, of: int, name: str, value: Any, objects: Any) -> str:
        """Set an attribute of an object.

        Args:
            of: Number of the object.
            name: Name of the attribute.
            value: Its value, encoded.
            objects: Objects of the tests that are in the value.
        """
        self.made = self.new_records(objects)
        setattr(self.kept[of], name, self.decode(value))
        return '"value",null'

    def do_next(self, of: int, count: int) -> str:
        """Return the next items of an iterator."""
        items, iterator = [], self.kept[of]
        if of in self.late:
            raise self.late.pop(of)
        for _ in range(count):
            try:
                items.append(next(iterator))
            except StopIteration:
                return '"value",' + self.encode((items, True))
            except Exception as error:
                if not items:
                    raise
                self.late[of] = error
                break
        return '"value",' + self.encode((items, False))

    def do_function(self, name: str, of: int, arguments: Any, objects: Any) -> str:
        """Apply a function to an object.

        Args:
            name: len, bool, str, repr, iter, or one of those below.
            of: Number of the object.
            arguments: Its other arguments.
            objects: Records among them.
        """
        self.made = self.new_records(objects)
        functions: dict[str, Callable[..., Any]] = {
            "getitem": lambda a, key: a[key],
            "setitem": lambda a, key, value: a.__setitem__(key, value),
            "delitem": lambda a, key: a.__delitem__(key),
            "enter": lambda a: a.__enter__(),
            "exit": lambda a: a.__exit__(None, None, None) and None,
            "isinstance": isinstance,
            "await": lambda a: __import__("asyncio").run(a),
        }
        function = functions.get(name) or getattr(builtins, name)
        return '"value",' + self.encode(function(self.kept[of], *self.decode(arguments)))

    # Values that leave

    def encode(self, value: Any, depth: int = 0, inside: bool = False) -> str:
        """Return a value as tagged JSON; what is not plain stays here, and its number leaves.

        Args:
            value: The value.
            depth: Its level in the value that crosses.
            inside: True if records that it holds go to the table of that value.
        """
        kind = type(value)
        if value is None:
            return "null"
        if kind is bool:
            return "true" if value else "false"
        if kind is int:
            return str(value) if -_SMALL < value < _SMALL else f'["n","{value:x}"]'
        if kind is str:
            return quoted(value)
        if kind is float:
            return {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}.get(repr(value), repr(value))
        if depth > _DEEPEST:
            raise ValueError(f"a value nested deeper than {_DEEPEST} levels")
        if not inside:
            return self.with_records(value)
        tag = _TAGS.get(kind)
        if tag:
            return f'["{tag}"' + "".join(["," + self.encode(v, depth + 1, True) for v in value]) + "]"
        if kind is dict:
            parts = [f",{self.encode(k, depth + 1, True)},{self.encode(v, depth + 1, True)}" for k, v in value.items()]
            return '["d"' + "".join(parts) + "]"
        return self.encode_other(value, depth)

    def with_records(self, value: Any) -> str:
        """Encode a value that may hold records: these follow it in a table, and are named by their place there."""
        before = len(self.made)
        self.places = {id(record): place for place, record in enumerate(self.made)}
        text = self.encode(value, 1, True)
        if not self.made:
            return text
        done, place = [], 0
        while place < len(self.made):  # grows while it is encoded
            record = self.made[place]
            done.append(f"[{quoted(type(record).__name__)},{self.encode(dict(vars(record)), 1, True)}]")
            place += 1
        del self.made[before:]
        return '["R",' + text + "," + ",".join(done) + "]"

    def encode_other(self, value: Any, depth: int) -> str:
        """Encode a value that is no plain one: a record, or a stand-in for an object that stays here."""
        kind = type(value)
        if kind.__name__ in self.records and self.names.get(kind.__name__) is kind:
            place = self.places.setdefault(id(value), len(self.made))
            if place == len(self.made):
                self.made.append(value)
            return f'["i",{place}]'
        if kind is bytes or kind is bytearray:
            return f'["{"b" if kind is bytes else "B"}","{value.hex()}"]'
        if kind is complex:
            return f'["c",{self.encode(value.real)},{self.encode(value.imag)}]'
        if kind is range:
            return f'["g",{value.start},{value.stop},{value.step}]'
        if kind in _VIEWS:
            return f'["v","{_VIEWS[kind]}",{self.encode(list(value), depth + 1, True)}]'
        parts = _VALUES.get((kind.__module__, kind.__name__))
        if parts is not None and not getattr(value, "tzinfo", None):
            return f'["x","{kind.__name__}",{self.encode(parts(value), depth + 1, True)}]'
        if isinstance(value, tuple) and hasattr(kind, "_fields"):  # a named tuple
            fields = self.encode(list(kind._fields))
            return f'["N",{quoted(kind.__name__)},{fields},{self.encode(tuple(value), depth, True)}]'
        for plain in _PLAIN:
            if isinstance(value, plain):
                return self.encode(plain(value), depth, True)
        if hasattr(kind, "tolist"):  # arrays and numbers of numpy
            return self.encode(value.tolist(), depth + 1, True)
        return self.kept_object(value)

    def kept_object(self, value: Any) -> str:
        """Keep an object, and return what the tests get to know: its number, kind, class and name."""
        number = self.numbers.get(id(value))
        if number is None:
            number = self.numbers[id(value)] = len(self.kept)
            self.kept.append(value)
        kind = type(value)
        name = quoted(str(getattr(value, "__name__", kind.__name__)))
        if isinstance(value, type) and issubclass(value, BaseException):
            base = next(c.__name__ for c in value.__mro__ if getattr(builtins, c.__name__, None) is c)
            return f'["o",{number},"exception",{quoted(base)},{name}]'
        if isinstance(value, type):
            return f'["o",{number},"class",null,{name}]'
        if hasattr(kind, "cr_await"):
            return f'["o",{number},"coroutine",null,{name}]'
        if hasattr(kind, "__next__") and hasattr(kind, "__iter__"):
            lazy = hasattr(kind, "send")
            return f'["o",{number},"{"generator" if lazy else "iterator"}",null,{name}]'
        if id(kind) not in self.numbers:
            self.kept_object(kind)
        return f'["o",{number},"object",{self.numbers[id(kind)]},{name}]'

    # Values that arrive

    def decode(self, value: Any) -> Any:
        """Return an argument. Tuples that begin with an Ellipsis stand for what marshal can't write."""
        kind = type(value)
        if kind is list:
            return [self.decode(v) for v in value]
        if kind is dict:
            return {self.decode(k): self.decode(v) for k, v in value.items()}
        if kind is tuple and value and value[0] is ...:
            return self.decode_special(*value[1:])
        if kind is tuple:
            return tuple([self.decode(v) for v in value])
        return value

    def decode_special(self, tag: str, *rest: Any) -> Any:
        """Decode a record, or an object that stayed here."""
        if tag == "object":
            return self.kept[rest[0]]
        if tag == "record":
            return self.made[rest[0]]
        if tag == "type":
            return getattr(builtins, rest[0])
        if tag == "function":
            return self.function_of_tests(*rest)
        if tag == "set":
            return set(self.decode(rest[0]))
        if tag == "frozenset":
            return frozenset(self.decode(rest[0]))
        if tag == "range":
            return range(*rest)
        if tag == "iterator":
            return self.iterator_of_tests(*rest)
        module, name, arguments = rest
        return getattr(__import__(module), name)(*arguments)

    def new_records(self, objects: Any) -> list[Any]:
        """Make the records of a request; the classes are in the program's own names."""
        self.made = made = [object.__new__(self.names[name]) for name, _ in objects]
        for record, (_, fields) in zip(made, objects):  # noqa: B905 (the interpreter may be an older one)
            vars(record).update({name: self.decode(value) for name, value in fields.items()})
        return made

    def function_of_tests(self, number: int, name: str) -> Any:
        """Return a function that calls one of the tests' own."""

        def function(*args: Any, **kwargs: Any) -> Any:
            made, self.made = self.made, []
            send_frame(self.replies, f'[{number},"callback",{self.encode(args)},{self.encode(kwargs)}]')
            while True:
                request = marshal.loads(receive_frame(self.requests))
                if request[1] == "returned":
                    self.made = self.new_records(request[3])
                    value = self.decode(request[2])
                    self.made = made
                    return value
                if request[1] == "raised":
                    self.made = made
                    error: Any = getattr(builtins, request[2], Exception)(*request[3])
                    error._posttrain_token = request[4]
                    raise error
                self.answer(request)

        function.__name__ = function.__qualname__ = name
        return function

    def iterator_of_tests(self, number: int) -> Any:
        """Yield the items of an iterator that the tests hold."""
        following = self.function_of_tests(number, "next")
        while True:
            item = following()
            if not item:
                return
            yield item[0]


def main() -> None:
    """Load the program and serve."""
    requests, replies = int(sys.argv[1]), int(sys.argv[2])
    sys.argv[:] = ["solution.py"]
    module = type(sys)("solution")
    sys.modules["solution"] = module
    server = ProgramServer(module.__dict__, requests, replies)
    try:
        exec(compiled(), module.__dict__)
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"[:500]
        send_frame(replies, f'[0,"failed",{quoted(text)}]')
        return
    builtins.input = server.function_of_tests(0, "input")
    send_frame(replies, '[0,"loaded"]')
    server.serve()


def compiled() -> Any:
    """Compile the program's first source that can be: with what goes before it, or alone."""
    sources = []
    for path in ("/main.py", "/alone.py"):
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                sources.append(file.read())
    for source in sources[:-1]:
        try:
            return compile(source, "solution.py", "exec")
        except (SyntaxError, ValueError):
            continue
    return compile(sources[-1], "solution.py", "exec")


if __name__ == "__main__":
    main()
