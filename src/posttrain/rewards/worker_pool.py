"""A few processes that call the rewards that may hang, and that are killed and replaced when they do.

Results come back in the order of the calls, whichever process ran them; each call starts with the same random state and
hash seed, so that its result depends on its arguments alone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from posttrain.core.errors import RewardError
from posttrain.rewards.outcome import Outcome
from posttrain.rewards.worker import read_frame, write_frame

WALL = 4.0
"""Time by the clock that a call may take, over its processor time: other processes want the machine too."""
START = 120.0
"""Seconds that a worker may take to import what it needs."""
MEMORY_GIB = 4.0
"""Memory of a worker beyond what it maps from files."""


@dataclass(frozen=True, slots=True)
class Call:
    """part: index of the reward. count: numbers that it returns, None for one. limit: seconds of processor time."""

    part: int
    args: tuple[Any, ...]
    count: int | None
    limit: float


class Worker:
    """One process. `call` gives outcomes, or says ``timeout`` or ``died``: then it is of no more use."""

    def __init__(self, parts: Sequence[dict[str, Any]], memory_gib: float) -> None:
        environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "posttrain.rewards.worker"]
        # -m must find this package wherever the parent found it.
        environment["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, start_new_session=True
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.requests, self.replies, errors = self.process.stdin, self.process.stdout, self.process.stderr
        self.said: deque[bytes] = deque(maxlen=20)
        threading.Thread(target=self.said.extend, args=(errors,), daemon=True).start()
        setup = {"path": [p or os.getcwd() for p in sys.path], "parts": list(parts), "memory_gib": memory_gib}
        answer = self._ask(setup, START)
        if answer is not None:
            self.kill()
            if answer in ("timeout", "died"):
                raise RewardError(f"the rewards' worker process did not start ({answer}): {self.last_words()}")
            raise RewardError(str(answer).removeprefix("RewardError: "))

    def call(self, call: Call) -> list[Outcome] | str:
        return self._ask((call.part, call.args, call.count, call.limit), WALL * call.limit)  # type: ignore[no-any-return]

    def _ask(self, frame: Any, seconds: float) -> Any:
        """The reply, or ``timeout`` or ``died``."""
        late = threading.Event()

        def end() -> None:
            late.set()
            self.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            write_frame(self.requests, frame)
            return read_frame(self.replies)
        except (EOFError, OSError):
            code = self.process.wait()
            return "timeout" if late.is_set() or code == -getattr(signal, "SIGPROF", 0) else "died"
        finally:
            timer.cancel()

    def last_words(self) -> str:
        """How it ended, and the end of what it wrote to stderr."""
        code = self.process.wait()
        said = b"".join(self.said.copy()).decode(errors="replace").strip()[-500:]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return how + (f"; it last wrote: {said}" if said else "")

    def kill(self) -> None:
        """End it, and what it started."""
        if self.process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL) if hasattr(os, "killpg") else self.process.kill()

    def close(self) -> None:
        self.kill()
        self.process.wait()
        for stream in (self.requests, self.replies):
            with contextlib.suppress(OSError):
                stream.close()


def _close_all(workers: list[Worker | None]) -> None:
    for i, worker in enumerate(workers):
        if worker is not None:
            worker.close()
            workers[i] = None


class Pool:
    """Workers for the given rewards (settings as plain data).

    The first starts at once, so that what can't be built says so before anything heavy loads (RewardError); the others
    start when there is work for them.
    """

    def __init__(self, parts: Sequence[dict[str, Any]], workers: int = 2, memory_gib: float = MEMORY_GIB) -> None:
        self.parts = parts
        self.memory_gib = memory_gib
        self.workers: list[Worker | None] = [None] * workers
        self._finalizer = weakref.finalize(self, _close_all, self.workers)
        self.workers[0] = Worker(parts, memory_gib)

    def run(self, calls: Sequence[Call]) -> list[list[Outcome]]:
        """Outcomes of every call, in order."""
        results: list[list[Outcome]] = [[] for _ in calls]
        todo = iter(range(len(calls)))
        lock = threading.Lock()

        def serve(slot: int) -> None:
            while True:
                with lock:
                    at = next(todo, None)
                if at is None:
                    return
                results[at] = self._call(slot, calls[at])

        slots = min(len(self.workers), len(calls))
        if slots:
            with ThreadPoolExecutor(slots) as threads:
                list(threads.map(serve, range(slots)))
        return results

    def _call(self, slot: int, call: Call) -> list[Outcome]:
        """One call; one in whose midst the process dies is tried once more, since something else may have killed it."""
        size = call.count or 1
        try:
            pickle.dumps(call.args)
        except Exception as error:
            return [Outcome(failure="error", message=f"the example can't be sent to a worker process: {error}")] * size
        words = ""
        for _ in range(2):
            worker = self.workers[slot] = self.workers[slot] or Worker(self.parts, self.memory_gib)
            answer = worker.call(call)
            if not isinstance(answer, str):
                return answer
            words = worker.last_words()
            worker.close()
            self.workers[slot] = None
            if answer == "timeout":
                message = f"cut off: over {call.limit:g} s of processor time or {WALL * call.limit:g} s by the clock"
                return [Outcome(failure="timeout", message=message)] * size
        message = f"the worker process died twice in this call ({words}): out of memory, or a crash in native code"
        return [Outcome(failure="died", message=message)] * size

    def close(self) -> None:
        """End all processes. The pool may be used again: they start anew."""
        _close_all(self.workers)
