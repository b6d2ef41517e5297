"""Run tests of programs, each in a fork of this process, which is in a sandbox without any program.

A job comes through a socket, with the pipes to the program's own sandbox; the verdict goes back. This runs without
anything else of the package.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import gc
import inspect
import io
import json
import os
import random
import resource
import signal
import socket
import sys
import traceback
import unittest
from typing import Any

from posttrain.sandbox.program_channel import ProgramChannel
from posttrain.sandbox.pytest_functions import calls_of, pytest_module
from posttrain.sandbox.remote_objects import ProgramExit, ProgramFailed, ProgramModule, RemoteObject, TestsFault
from posttrain.sandbox.shown_asserts import SHOWN_VALUES, shown_values, with_messages

MODULES = ("solution", "main", "submission", "your_module")
"""Names by which tests import the program."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
REASON = 500
"""Characters of a reason."""


class BadTests(Exception):
    """The tests can't be run, whatever the program is."""


class Names(dict):  # type: ignore[type-arg]
    """Global names of the tests: their own, those of the prompt, built-in ones, else the program's."""

    def __init__(self, channel: ProgramChannel, tests: ast.Module, under_test: set[str]) -> None:
        super().__init__(__name__="__main__", __builtins__=builtins)
        self.channel, self.under_test = channel, under_test
        self.modules = modules_of(tests) - under_test
        self.fetched: dict[str, Any] = {}

    def __missing__(self, name: str) -> Any:
        if name.startswith("__") or (hasattr(builtins, name) and name not in self.under_test):
            raise KeyError(name)
        if name in self.modules:  # not the program's: it could put something else in its place
            return __import__(name)
        if name in self.fetched:
            return self.fetched[name]
        try:
            value = self.channel.ask("get", name, tuple(self.channel.records))
        except Exception:
            raise KeyError(name) from None
        if isinstance(value, RemoteObject) and value._kind == "class":
            self.channel.named.add(value._number)
        if isinstance(value, (RemoteObject, type)):
            self.fetched[name] = value
        return value


def used_names(tree: ast.AST) -> set[str]:
    """Return the names that a tree reads and does not define anywhere."""
    nodes = list(ast.walk(tree))
    read = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    own = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    own |= {n.name for n in nodes if isinstance(n, (*FUNCTIONS, ast.ClassDef))}
    own |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    own |= {n.name for n in nodes if isinstance(n, ast.ExceptHandler) and n.name}
    imports = [n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]
    own |= {(a.asname or a.name).split(".")[0] for n in imports for a in n.names}
    return read - own


def built_in_names(tests: ast.Module) -> set[str]:
    """Return built-in names by which tests may call the program, as in ``assert sum(10, 15) == 6``.

    There are none if the tests name anything else of the program: otherwise it could put its own `abs` or `len` into
    their comparisons.
    """
    names = used_names(tests)
    imports = {name for node in ast.walk(tests) for name in imported_modules(node)}
    if imports & set(MODULES) or any(not hasattr(builtins, n) and n not in modules_of(tests) for n in names):
        return set()
    return names & {n.func.id for n in ast.walk(tests) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}


def imported_modules(node: ast.AST) -> set[str]:
    """Return the top-level modules that a statement imports."""
    if isinstance(node, ast.ImportFrom):
        return {(node.module or "").split(".")[0]}
    return {a.name.split(".")[0] for a in node.names} if isinstance(node, ast.Import) else set()


def modules_of(tests: ast.Module) -> set[str]:
    """Return modules of the standard library that the tests use as ``math.isclose`` without importing them."""
    owners = {id(n.value) for n in ast.walk(tests) if isinstance(n, ast.Attribute)}
    names = [n for n in ast.walk(tests) if isinstance(n, ast.Name)]
    bare = {n.id for n in names if id(n) not in owners}
    return {n.id for n in names if n.id in sys.stdlib_module_names} - bare


def is_stub(node: ast.AST) -> bool:
    """Return True for a function or class that the prompt leaves to the program."""
    if isinstance(node, FUNCTIONS):
        return all(_says_nothing(n) for n in node.body)
    if isinstance(node, ast.ClassDef):
        if all(_says_nothing(n) for n in node.body):
            return not node.bases
        return any(is_stub(n) for n in node.body if isinstance(n, FUNCTIONS))
    return False


def _says_nothing(node: ast.AST) -> bool:
    raised = node.exc if isinstance(node, ast.Raise) else None
    raised = raised.func if isinstance(raised, ast.Call) else raised
    if isinstance(raised, ast.Name) and raised.id == "NotImplementedError":
        return True
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def parsed_head(source: str) -> ast.Module:
    """Parse the prompt's part of a program, whose last function may have no body yet."""
    lines = source.rstrip().splitlines()
    indent = len(lines[-1]) - len(lines[-1].lstrip()) if lines else 0
    for end in ("", "\n" + " " * (indent + 4) + "pass", "\n" + " " * indent + "pass"):
        try:
            return ast.parse(source.rstrip() + end)
        except SyntaxError:
            continue
    return ast.Module(body=[], type_ignores=[])


def define_head(source: str, names: Names) -> None:
    """Define what the prompt has in full next to the tests, where the program can't replace it."""
    kept = []
    for node in parsed_head(source).body:
        own = isinstance(node, (*FUNCTIONS, ast.ClassDef)) and (node.name in names.under_test or is_stub(node))
        if not own and not isinstance(node, ast.Expr):
            kept.append(node)
    exec(compile(ast.Module(body=kept, type_ignores=[]), "prompt", "exec"), names)
    for node in kept:
        if isinstance(node, ast.ClassDef):
            names.channel.records[node.name] = names[node.name]


def run_tests_of(names: Names, tests: ast.Module, source: str, entry_point: str) -> None:
    """Run the source of the tests, then `check`, test functions and unittest's cases.

    Args:
        names: Their global names.
        tests: The tests.
        source: Their source.
        entry_point: Expression that `check` is called with. Empty: it is not called.
    """
    cases: list[type] = []

    def run_cases(*_: Any, **__: Any) -> None:
        for case in [v for v in names.values() if isinstance(v, type) and issubclass(v, unittest.TestCase)]:
            if case not in cases:
                cases.append(case)
                run_case(case)

    unittest.main = run_cases  # type: ignore[assignment, misc]
    names[SHOWN_VALUES] = shown_values
    exec(compile(with_messages(tests, source), "tests", "exec"), names)
    defined = {n.name for n in tests.body if isinstance(n, (*FUNCTIONS, ast.ClassDef))}
    if "check" in defined and entry_point:
        names["check"](eval(entry_point, names))
    run_cases()
    for name in [n for n in names if n in defined]:
        value = names[name]
        if isinstance(value, type) and name.startswith("Test") and value not in cases:
            for method in [m for m in vars(value) if m.startswith("test")]:
                made = value()
                if hasattr(made, "setup_method"):
                    made.setup_method()
                run_function(getattr(made, method), names)
        elif name.startswith("test") and not isinstance(value, type) and callable(value):
            run_function(value, names)


def run_case(case: type[unittest.TestCase]) -> None:
    """Run a class of unittest. Raises AssertionError with its first failure."""
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(case)
    result = unittest.TextTestRunner(stream=io.StringIO()).run(suite)
    if not result.wasSuccessful():
        raise AssertionError(next((text.splitlines()[-1] for _, text in result.errors + result.failures), "failed"))


def run_function(function: Any, names: Names) -> None:
    """Call a test function with its arguments."""
    try:
        calls = list(calls_of(function, names))
    except LookupError as error:
        raise BadTests(str(error)) from None
    for arguments in calls:
        result = function(**arguments)
        if inspect.iscoroutine(result):
            asyncio.run(result)


def parsed_tests(source: str) -> ast.Module:
    """Parse the tests, and check that what they import is there. Raises BadTests."""
    try:
        tree = ast.parse(source)
        compile(source, "tests", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadTests(f"the tests don't compile: {error}") from None
    optional = {id(n) for node in ast.walk(tree) if isinstance(node, ast.Try) for n in ast.walk(node)}
    for node in [n for n in ast.walk(tree) if id(n) not in optional]:
        for name in imported_modules(node):
            if name not in (*MODULES, "pytest", *sys.stdlib_module_names):
                try:
                    __import__(name)
                except ImportError:
                    raise BadTests(f"the tests import {name!r}, which the sandbox's Python does not have") from None
    return tree


def verdict_of(job: dict[str, Any], channel: ProgramChannel) -> tuple[bool, str]:
    """Run the tests of a job.

    Returns:
        True if they pass, and why not.

    Raises:
        BadTests: They can't be run, whatever the program is.
    """
    tests, entry_point = parsed_tests(job["tests"]), job["entry_point"]
    candidates = used_names(ast.parse(entry_point)) or built_in_names(tests)
    names = Names(channel, tests, candidates)
    try:
        define_head(job["head"], names)
    except Exception as error:
        raise BadTests(f"the source before the program fails: {type(error).__name__}: {error}") from None
    sys.modules["pytest"] = pytest_module()
    for name in MODULES:
        sys.modules[name] = ProgramModule(name, names)
    channel.await_program()
    if candidates and not entry_point:
        names.under_test = {n for n in candidates if defines(channel, n)}
        if len(names.under_test) != 1:
            return False, f"expected one of {sorted(candidates)} of the program, found {len(names.under_test)}"
    try:
        run_tests_of(names, tests, job["tests"], entry_point)
    except BadTests:
        raise
    except SystemExit as error:
        if isinstance(error, ProgramExit) or error.code:
            return False, f"SystemExit: {error}"
    except (TestsFault, ProgramFailed):
        pass
    except BaseException as error:
        if not channel.faulty:
            return False, reason_of(error, job["tests"])
    if channel.faulty:
        raise BadTests(channel.faulty)
    if not channel.asked:
        raise BadTests("the tests end without a call of the program" + _hint(tests))
    return not channel.broken, channel.broken


def reason_of(error: BaseException, tests: str) -> str:
    """Return the line of the tests at which an exception left them, and what it says."""
    said = f"{type(error).__name__}: {error}".removesuffix(": ")
    numbers = [n for frame, n in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == "tests"]
    if not numbers:
        return said
    line = tests.splitlines()[numbers[-1] - 1].strip()
    return f"line {numbers[-1]} of the tests, {line}: {said}"


def defines(channel: ProgramChannel, name: str) -> bool:
    """Return True if the program defines a name."""
    try:
        channel.ask("get", name, ())
    except Exception:
        return False
    return True


def _hint(tests: ast.Module) -> str:
    if any(isinstance(n, ast.FunctionDef) and n.name == "check" for n in tests.body):
        return ": they define check(), and the example has no name to call it with (see `entry_point`)"
    return ""


def run_job(job: dict[str, Any], pipes: list[int], control: socket.socket) -> None:
    """Run one job and send its verdict.

    Args:
        job: The tests, and what goes with them.
        pipes: To and from the program.
        control: Where the verdict goes.
    """
    for name, value in job["limits"].items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    random.seed(0)
    channel = ProgramChannel(pipes[0], pipes[1], job["copies"])
    try:
        passed, reason = verdict_of(job, channel)
        if not passed and channel.notes:
            reason += f" ({'; '.join(channel.notes)})"
        verdict = {"passed": passed, "reason": reason[:REASON]}
    except BadTests as error:
        verdict = {"bad": str(error)[:REASON]}
    except ProgramFailed as error:
        verdict = {"passed": False, "reason": str(error)[:REASON]}
    send_message(control, verdict)


def send_message(control: socket.socket, value: Any) -> None:
    """Send a value, with its length before it."""
    data = json.dumps(value).encode()
    control.sendall(len(data).to_bytes(4, "big") + data)


def receive_job(control: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return the next job and the pipes to its program. Raises EOFError if there are no more."""
    head, pipes, _, _ = socket.recv_fds(control, 4, 2)
    data = b""
    while head and len(data) < int.from_bytes(head, "big"):
        piece = control.recv(1 << 16)
        if not piece:
            break
        data += piece
    if not data:
        raise EOFError
    return json.loads(data), pipes


def main() -> None:
    """Run jobs until the socket closes."""
    control = socket.socket(fileno=int(sys.argv[1]))
    sys.argv[:] = ["tests.py"]
    sys.stdin = open(os.devnull)
    gc.freeze()  # forks share these objects' memory
    while True:
        try:
            job, pipes = receive_job(control)
        except EOFError:
            return
        child = os.fork()
        if not child:
            try:
                run_job(job, pipes, control)
            finally:
                os._exit(0)
        for pipe in pipes:
            os.close(pipe)
        if os.waitpid(child, 0)[1]:
            send_message(control, {"passed": False, "reason": "the tests ended by a signal: time or memory ran out"})


if __name__ == "__main__":
    main()
