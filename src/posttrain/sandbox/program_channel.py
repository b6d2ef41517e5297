"""The pipes between tests and the program that they test, and the checks of all that comes out of them.

This runs next to the tests, without anything else of the package.
"""

from __future__ import annotations

import builtins
import json
import marshal
import os
import sys
import threading
from typing import Any

from posttrain.sandbox.crossing_values import Decoder, Encoder
from posttrain.sandbox.remote_objects import ProgramExit, ProgramFailed, TestsFault, checked

_LONGEST = 1 << 24
"""Bytes of a frame."""
_BATCH = 256
"""Items of an iterator that are fetched at once; of a generator, one."""
NEVER_RAISED = (StopIteration, StopAsyncIteration, GeneratorExit, KeyboardInterrupt)
"""Exceptions with which a program could end a loop of the tests."""


class ProgramChannel:
    """The pipes to a program, and the objects on both of their sides."""

    def __init__(self, requests: int, replies: int, copies: int) -> None:
        self.requests, self.replies, self.copies = requests, replies, copies
        self.lock = threading.RLock()
        self.objects: dict[int, Any] = {}
        self.functions: list[Any] = [lambda *args: builtins.input(*args)]
        """The tests' functions that the program was given. The first one is its own input()."""
        self.raised: list[BaseException] = []
        self.ahead: dict[int, tuple[list[Any], bool, int]] = {}
        """Items of iterators that were fetched: items, True at the end, size of the next batch."""
        self.records: dict[str, type] = {}
        """Classes that the prompt defines in full, whose objects cross as records of their fields."""
        self.named: set[int] = set()
        """Classes of the program that the tests name."""
        self.notes: list[str] = []
        self.number, self.loaded, self.asked = 0, False, False
        self.broken, self.faulty = "", ""

    def note(self, text: str) -> str:
        """Keep what may explain a failure, and return it."""
        if len(self.notes) < 3 and text not in self.notes:
            self.notes.append(text)
        return text

    def fault(self, text: str) -> TestsFault:
        """Keep that the tests can't be run."""
        self.faulty = self.faulty or text
        return TestsFault(text)

    def fail(self, reason: str) -> ProgramFailed:
        """Close the channel for good."""
        self.broken = self.broken or reason
        return ProgramFailed(self.broken)

    def await_program(self) -> None:
        """Wait until the program is loaded. Raises ProgramFailed if it can't be."""
        if not self.loaded:
            frame = self.receive()
            if frame[1] != "loaded":
                raise self.fail(f"the program fails: {frame[2] if len(frame) > 2 else ''}")
            self.loaded = True

    def receive(self) -> list[Any]:
        """Return the next frame of the program.

        Raises:
            ProgramFailed: The program is gone, or sent something else.
        """
        if self.broken:
            raise ProgramFailed(self.broken)
        size = int.from_bytes(self._read(4), "big")
        if size > _LONGEST:
            raise self.fail(f"a value of over {_LONGEST >> 20} MiB")
        try:
            frame = json.loads(self._read(size).decode("ascii"))
        except (ValueError, RecursionError, MemoryError) as error:
            raise self.fail(f"no frame: {type(error).__name__}") from None
        if type(frame) is not list or len(frame) < 2 or type(frame[0]) is not int or type(frame[1]) is not str:
            raise self.fail("a frame of another form")
        return frame

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            piece = os.read(self.replies, min(size, 1 << 16))
            if not piece:
                raise self.fail("the program ended during its tests")
            parts.append(piece)
            size -= len(piece)
        return b"".join(parts)

    def send(self, *frame: Any) -> None:
        """Write a frame."""
        try:
            data = marshal.dumps(frame)
        except ValueError as error:
            raise self.fault(f"the tests pass a value that can't cross: {error}") from None
        view = memoryview(len(data).to_bytes(4, "big") + data)
        try:
            while view:
                view = view[os.write(self.requests, view) :]
        except OSError:
            raise self.fail("the program ended during its tests") from None

    def ask(self, operation: str, *parts: Any, originals: Any = None) -> Any:
        """Send a request, and return its value or raise its exception; the program may call the tests in between.

        Args:
            operation: Name of the request.
            parts: The rest of the request.
            originals: Arguments (values, records) that change if the program has changed its copies.

        Raises:
            ProgramFailed: The program is gone, or its reply is no reply.
        """
        with self.lock:
            if self.broken:
                raise ProgramFailed(self.broken)
            self.await_program()
            self.asked = True
            self.number += 1
            number = self.number
            self.send(number, operation, *parts)
            while True:
                frame = self.receive()
                if frame[1] != "callback":
                    break
                self._call_back(frame)
            try:
                if frame[0] != number:
                    raise ValueError("a reply to another request")
                error, value = self._read_reply(frame[1:], originals)
            except Exception as wrong:
                raise self.fail(f"a value of another form: {type(wrong).__name__}: {wrong}") from None
        if error is not None:
            raise error
        return value

    def _read_reply(self, reply: list[Any], originals: Any) -> tuple[BaseException | None, Any]:
        if reply[0] == "printed":
            sys.stdout.write(checked(reply[1], str))
            reply = reply[2:]
        if reply[0] == "error":
            return self._exception(*reply[1:]), None
        if reply[0] != "value":
            raise ValueError("a reply of another kind")
        value = Decoder(self).decode(reply[1])
        if len(reply) > 2 and originals is not None:
            self._copy_back(reply[2], *originals)
        return None, value

    def _exception(self, kind: Any, arguments: Any, fields: Any, text: str, token: Any) -> BaseException:
        """Make the exception that the program raised: a built-in one, or of a class that stands for the program's."""
        if type(token) is int and not isinstance(self.raised[token], NEVER_RAISED):
            return self.raised[token]  # one of the tests' own, which the program let through
        found: Any = getattr(builtins, kind, None) if type(kind) is str else Decoder(self).decode(kind)
        if not (isinstance(found, type) and issubclass(found, BaseException)):
            raise ValueError("an exception of no class")
        if issubclass(found, SystemExit):
            found = ProgramExit
        elif issubclass(found, NEVER_RAISED):
            found = RuntimeError
        arguments = Decoder(self).decode(arguments)
        error: BaseException
        try:
            error = found(*arguments)
        except Exception:
            error = RuntimeError(checked(text, str))
        for name, value in Decoder(self).decode(fields).items():
            if not name.startswith("_"):
                setattr(error, name, value)
        if hasattr(found, "posttrain_number"):
            error.posttrain_text = checked(text, str)  # type: ignore[attr-defined]
        return error

    def _call_back(self, frame: list[Any]) -> None:
        """Call a function of the tests, which the program was given, and send what it returns or raises."""
        try:
            function = self.functions[frame[0]]
            args, kwargs = Decoder(self).decode(frame[2]), Decoder(self).decode(frame[3])
        except Exception as error:
            raise self.fail(f"a call of another form: {type(error).__name__}") from None
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            self.raised.append(error)
            name = next(c.__name__ for c in type(error).__mro__ if getattr(builtins, c.__name__, None) is c)
            self.send(0, "raised", name, tuple(str(a) for a in error.args), len(self.raised) - 1)
            return
        encoder = Encoder(self)
        self.send(0, "returned", encoder.encode(result), encoder.table())

    def call(self, of: Any, args: Any, kwargs: Any) -> Any:
        """Call a function of the program.

        Args:
            of: Its number.
            args: Its arguments.
            kwargs: Its arguments by name.
        """
        encoder = Encoder(self)
        encoded = encoder.encode(list(args)), encoder.encode(kwargs)
        originals = ([*args, *kwargs.values()], encoder.records)
        return self.ask("call", of, *encoded, encoder.table(), self.copies, originals=originals)

    def send_value(self, operation: str, *parts: Any) -> Any:
        """Ask for an operation whose last part is a value."""
        encoder = Encoder(self)
        return self.ask(operation, *parts[:-1], encoder.encode(parts[-1]), encoder.table())

    def next_item(self, number: int, kind: str) -> Any:
        """Return the next item of an iterator. Raises StopIteration at its end."""
        items, ended, batch = self.ahead.get(number, ([], False, 1))
        if not items and not ended:
            reply = self.ask("next", number, batch)
            if type(reply) is not tuple or [type(x) for x in reply] != [list, bool]:
                raise self.fail("items of another form")
            items, ended = reply[0][::-1], reply[1]
            batch = min(_BATCH, 2 * batch) if kind == "iterator" else 1
        if not items:
            self.ahead[number] = ([], True, 1)
            raise StopIteration
        item = items.pop()
        self.ahead[number] = (items, ended, batch)
        return item

    def _copy_back(self, encoded: Any, values: list[Any], records: list[Any]) -> None:
        """Change the tests' own arguments as the program changed its copies."""
        decoder = Decoder(self, existing=records)
        changed = decoder.decode(encoded)
        if type(changed) is not list or len(changed) != len(values):
            raise ValueError("arguments of another number")
        for old, new in zip(values, changed, strict=True):
            _update(old, new)


def _update(old: Any, new: Any) -> Any:
    """Change a container in place so that it equals `new`; return it, or `new` if it is of another type."""
    if type(old) is not type(new) or old is new:
        return new
    if type(old) is list:
        old[:] = [*map(_update, old, new), *new[len(old) :]]
    elif type(old) is dict:
        merged = {k: _update(old[k], v) if k in old else v for k, v in new.items()}
        old.clear()
        old.update(merged)
    elif type(old) is set:
        old.clear()
        old.update(new)
    elif type(old) is bytearray:
        old[:] = new
    else:
        return new
    return old
