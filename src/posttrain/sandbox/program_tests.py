"""Run a program against its tests: two sandboxes, and a verdict that the program can't write.

The program runs in one sandbox and the tests in another, so that neither their source nor an expected value is in the
program's memory or files. Calls and plain values cross (see `remote_objects`); comparisons are made next to the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import socket
import subprocess
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain.config.sandbox import SandboxConfig
from posttrain.core.errors import PosttrainError
from posttrain.sandbox import bubblewrap

Copies = Literal["never", "auto", "always"]
SIDE_OF_TESTS = (
    "crossing_values", "program_channel", "pytest_functions", "remote_objects", "shown_asserts", "tests_server",
)  # fmt: skip
GRACE = 0.5
"""Seconds in which the tests notice that the program is gone."""
LONGEST_VERDICT = 1 << 16
_FUTURE = re.compile(r"^from __future__ import .*$", re.MULTILINE)
_HERE = Path(__file__).parent


class TestsError(PosttrainError, ValueError):
    """Raised for tests that can't be run, whatever the program is."""

    __test__ = False


@dataclass(frozen=True, slots=True)
class TestsResult:
    """Outcome of a program's tests.

    Attributes:
        passed: True if all tests ran and passed.
        reason: Why they did not pass.
    """

    __test__ = False

    passed: bool
    reason: str = ""


class TestsProcess:
    """A sandbox that runs the tests of one program after the other."""

    __test__ = False

    def __init__(self, limits: SandboxConfig) -> None:
        self.control, theirs = socket.socketpair()
        files = {f"/posttrain/sandbox/{m}.py": (_HERE / f"{m}.py").read_bytes() for m in SIDE_OF_TESTS}
        launch = bubblewrap.Launch(
            "/posttrain/sandbox/tests_server.py", files, [str(theirs.fileno())], pipes=[theirs.fileno()], lasting=True
        )
        with theirs:
            self.process = bubblewrap.start_sandbox(launch, limits)
        self._drain()
        self._finalizer = weakref.finalize(self, _close, self.process, self.control)

    def _drain(self) -> None:
        """Let what the tests print go nowhere."""
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                threading.Thread(target=_read_all, args=(stream,), daemon=True).start()

    def send(self, job: dict[str, Any], pipes: list[int]) -> None:
        """Send a job with the pipes to its program. Raises OSError if the process is gone."""
        data = json.dumps(job).encode()
        socket.send_fds(self.control, [len(data).to_bytes(4, "big")], pipes)
        self.control.sendall(data)

    def verdict(self, seconds: float) -> dict[str, Any] | None:
        """Return the verdict of the job; None if none comes in this time, or the process is gone."""
        data, until = b"", time.monotonic() + seconds
        while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
            if not select.select([self.control], [], [], max(0.0, until - time.monotonic()))[0]:
                return None
            piece = self.control.recv(LONGEST_VERDICT)
            if not piece or len(data) > LONGEST_VERDICT:
                return None
            data += piece
        return json.loads(data[4:])  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the process."""
        self._finalizer()


def _read_all(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError):
        while stream.read(1 << 16):
            pass


def _close(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    control.close()
    bubblewrap.end_sandbox(process)


_OF_THREAD = threading.local()
"""The sandbox for tests of each thread: the kernel ends it together with the thread that started it."""


def _tests_process(limits: SandboxConfig) -> TestsProcess:
    """Return this thread's sandbox for tests; a dead one is replaced."""
    known: dict[SandboxConfig, TestsProcess] = _OF_THREAD.__dict__.setdefault("processes", {})
    if limits in known and known[limits].process.poll() is not None:
        known.pop(limits).close()
    if limits not in known:
        known[limits] = TestsProcess(limits)
    return known[limits]


def run_tests(
    program: str,
    tests: str,
    head: str = "",
    entry_point: str = "",
    copies: Copies = "auto",
    limits: SandboxConfig | None = None,
) -> TestsResult:
    """Run tests on a program.

    Args:
        program: The program, loaded as a module named solution.
        tests: Source of the tests: asserts, `check(candidate)`, functions named test_..., classes of unittest.
        head: Source before the program. Functions and classes that it defines in full are the tests' own too.
        entry_point: What `check` is called with: a name of the program, or an expression. Empty: it is not called.
        copies: When lists, sets and dicts that the tests pass change as the program changes its copies: if the
            function returns None (auto), never, or always.
        limits: Limits of the program, and of the tests; `seconds` is the time of both together.

    Raises:
        SandboxError: There is no sandbox on this machine.
        TestsError: The tests can't be run, whatever the program is.
    """
    bubblewrap.require_sandbox()
    limits = limits or SandboxConfig()
    job = {
        "tests": tests,
        "head": head,
        "entry_point": entry_point,
        "copies": ("never", "auto", "always").index(copies),
        "limits": {n: v for n, v in bubblewrap.resource_limits(limits).items() if n in ("CPU", "AS")},
    }
    verdict: dict[str, Any] | None = None
    for _ in range(2):  # once more if the process for tests was ended by something else
        server = _tests_process(limits)
        until = time.monotonic() + limits.seconds
        with contextlib.suppress(OSError):
            verdict = _run_once(server, job, _files(program, head), limits, until)
        if verdict is not None:
            break
        server.close()
    if verdict is None:
        raise RuntimeError("the sandbox for tests ended twice without a verdict")
    if "bad" in verdict:
        raise TestsError(verdict["bad"])
    return TestsResult(verdict["passed"] is True, str(verdict["reason"]))


def after_head(head: str, program: str) -> str:
    """Return the source of a program after its head; its imports from __future__, which must be first, go before."""
    future = "".join(line + "\n" for line in _FUTURE.findall(program)) if head else ""
    return future + head + (_FUTURE.sub("", program) if future else program)


def _files(program: str, head: str) -> dict[str, bytes]:
    """Return the files of the program's sandbox: its source after the head, and alone, if that does not compile."""
    files = {"/server.py": (_HERE / "program_server.py").read_bytes()}
    files["/main.py"] = after_head(head, program).encode("utf-8", "replace")
    if head:
        files["/alone.py"] = program.encode("utf-8", "replace")
    return files


def _run_once(
    server: TestsProcess, job: dict[str, Any], files: dict[str, bytes], limits: SandboxConfig, until: float
) -> dict[str, Any] | None:
    """Start the program, have its tests run, and return the verdict; None: there is none."""
    program_reads, tests_write = os.pipe()
    tests_read, program_writes = os.pipe()
    try:
        server.send(job, [tests_write, tests_read])
        pipes = [program_reads, program_writes]
        process = bubblewrap.start_sandbox(
            bubblewrap.Launch("/server.py", files, [str(p) for p in pipes], pipes=pipes), limits
        )
    finally:  # the two sandboxes hold them now: an end that closes is noticed on the other side
        for fd in (program_reads, tests_write, tests_read, program_writes):
            os.close(fd)
    try:
        ended, _, _ = bubblewrap.watch_sandbox(process, limits, until, server.control.fileno())
    finally:
        bubblewrap.end_sandbox(process)
    verdict = server.verdict(GRACE)
    if verdict is None:
        server.close()
    return verdict if ended is None else {"passed": False, "reason": f"the program was ended: {ended}"}
