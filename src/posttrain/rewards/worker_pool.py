"""Processes that call the rewards that may hang, and are killed and replaced if one does.

Results come back in the order of the calls, whichever process ran them; each call starts with the same random state and
hash seed, so that its result depends on its arguments alone.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

from posttrain.config.names import REWARDS
from posttrain.core.errors import RewardError
from posttrain.rewards.outcome import RewardOutcome
from posttrain.rewards.reward_log import RewardLog
from posttrain.rewards.worker import read_frame, write_frame

WALL = 4.0
"""Time by the clock that a call may take, as a multiple of its processor time: other processes use the machine too."""
START = 120.0
"""Seconds that a worker may take for its imports."""
LAST_LINES = 2.0
"""Seconds for the last lines that a process printed, if something that it started still holds its pipe."""
LONGEST_LINE = 2000
"""Longest printed line in bytes; a longer one is broken up."""
MEMORY_GIB = 4.0
"""Memory of a worker beyond what it maps from files."""


@dataclass(frozen=True, slots=True)
class RewardCall:
    """One call of a reward.

    Attributes:
        reward: Index of the reward.
        args: Its arguments.
        count: How many numbers it returns; None: one, not in a list.
        limit: Seconds of processor time.
        steps: True if it returns scores of steps instead of each number.
    """

    reward: int
    args: tuple[Any, ...]
    count: int | None
    limit: float
    steps: bool = False


class Worker:
    """A process that calls rewards; what they print appears in the log of the run."""

    def __init__(self) -> None:
        self.log: RewardLog | None = None
        self.busy = False  # a reply is awaited
        environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        # -P: a file here hides no module. Not -m, which warns that the package has imported the module already.
        command = [sys.executable, "-P", "-c", "from posttrain.rewards.worker import main; main()"]
        # It must find this package wherever the parent found it.
        environment["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, start_new_session=True
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.requests, self.replies, errors = self.process.stdin, self.process.stdout, self.process.stderr
        self.printed: deque[str] = deque(maxlen=20)
        self.forwarding = threading.Thread(target=self._forward, args=(errors,), daemon=True)
        self.forwarding.start()

    def set_up(self, rewards: Sequence[dict[str, Any]], memory_gib: float, log: RewardLog) -> None:
        """Make the process call these rewards from now on.

        Args:
            rewards: Their settings as plain data.
            memory_gib: Memory that the process may use beyond what it maps from files.
            log: Where what they print goes.

        Raises:
            RewardError: They can't be made, or the process ended.
        """
        self.log = log
        self.printed.clear()
        setup = {"path": [p or os.getcwd() for p in sys.path], "rewards": list(rewards), "memory_gib": memory_gib}
        answer = self._request(setup, START)
        if answer is not None:
            self.kill()
            if answer in ("timeout", "died"):
                raise RewardError(f"the rewards' worker process did not start ({answer}): {self.last_words()}")
            raise RewardError(str(answer).removeprefix("RewardError: "))

    def _forward(self, stream: IO[bytes]) -> None:
        """Show the lines that the process prints, and keep the last of them."""
        for line in iter(lambda: stream.readline(LONGEST_LINE), b""):
            text = line.decode(errors="replace").rstrip()
            self.printed.append(text)
            if self.log is not None:
                self.log.write(text)

    def call(self, call: RewardCall) -> list[RewardOutcome] | str:
        """Return the outcomes of a call, or ``timeout`` or ``died``: then the process is of no more use."""
        return self._request((call.reward, call.args, call.count, call.limit, call.steps), WALL * call.limit)  # type: ignore[no-any-return]

    def _request(self, frame: Any, seconds: float) -> Any:
        """Return the reply, or ``timeout`` or ``died``."""
        late = threading.Event()

        def end() -> None:
            late.set()
            self.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        self.busy = True
        try:
            write_frame(self.requests, frame)
            reply = read_frame(self.replies)
            self.busy = False
            return reply
        except (EOFError, OSError):
            code = self.process.wait()
            return "timeout" if late.is_set() or code == -getattr(signal, "SIGPROF", 0) else "died"
        finally:
            timer.cancel()

    def last_words(self) -> str:
        """Return how the process ended, and the last lines that it printed."""
        code = self.process.wait()
        printed = "\n".join(self.printed.copy()).strip()[-500:]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return how + (f"; it last printed: {printed}" if printed else "")

    def kill(self) -> None:
        """End the process, and those that it started."""
        if self.process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL) if hasattr(os, "killpg") else self.process.kill()

    def close(self) -> None:
        """End the process and close its pipes."""
        self.kill()
        self.process.wait()
        self.forwarding.join(LAST_LINES)
        for stream in (self.requests, self.replies):
            with contextlib.suppress(OSError):
                stream.close()


PARKED = 2
"""Processes of closed pools that are kept for the next: their imports take longer than most evaluations' calls."""
PARKED_KINDS = REWARDS.keys() - {"function"}
"""Rewards whose process may be kept: they run no code of the user's there, and programs in a sandbox alone."""
_parked: list[tuple[int, Worker]] = []  # with the process that started them: a fork shares the pipes with it
_parking = threading.Lock()


@atexit.register
def _end_parked() -> None:
    while _parked:
        owner, worker = _parked.pop()
        if owner == os.getpid():
            worker.close()


def _started(rewards: Sequence[dict[str, Any]], memory_gib: float, log: RewardLog) -> Worker:
    """Return a process that is set up, a parked one if there is one."""
    worker = None
    with _parking:
        while _parked and worker is None:
            owner, parked = _parked.pop()
            worker = parked if owner == os.getpid() and parked.process.poll() is None else None
    worker = worker or Worker()
    worker.set_up(rewards, memory_gib, log)
    return worker


def _park(worker: Worker) -> bool:
    """Keep a process for the next pool; False if there is no room, or it has ended or is in the middle of a call."""
    with _parking:
        if len(_parked) >= PARKED or worker.busy or worker.process.poll() is not None:
            return False
        worker.log = None
        _parked.append((os.getpid(), worker))
        return True


def _leave_nothing(settings: Any) -> bool:
    """Return True if rewards, and those in their settings, are of `PARKED_KINDS`."""
    if isinstance(settings, dict):
        return settings.get("kind", "exact") in PARKED_KINDS and all(map(_leave_nothing, settings.values()))
    return all(map(_leave_nothing, settings)) if isinstance(settings, list) else True


def _close_all(workers: list[Worker | None], park: bool = False) -> None:
    for i, worker in enumerate(workers):
        workers[i] = None
        # Without the lock unless asked: the end of a lost pool may come by garbage collection while it is held.
        if worker is not None and not (park and _park(worker)):
            worker.close()


def in_slots(
    calls: Sequence[RewardCall], slots: int, one: Callable[[int, RewardCall], list[RewardOutcome]]
) -> list[list[RewardOutcome]]:
    """Make calls in as many threads as there are slots; outcomes are in the order of the calls.

    Args:
        calls: The calls.
        slots: Number of slots.
        one: (slot, call) -> its outcomes.
    """
    results: list[list[RewardOutcome]] = [[] for _ in calls]
    todo = iter(range(len(calls)))
    lock = threading.Lock()

    def serve(slot: int) -> None:
        while True:
            with lock:
                number = next(todo, None)
            if number is None:
                return
            results[number] = one(slot, calls[number])

    slots = min(slots, len(calls))
    if slots:
        with ThreadPoolExecutor(slots) as threads:
            list(threads.map(serve, range(slots)))
    return results


def not_sent(call: RewardCall) -> list[RewardOutcome] | None:
    """Return the outcomes of a call whose arguments can't be sent to another process; None: they can."""
    try:
        pickle.dumps(call.args)
    except Exception as error:
        message = f"the example can't be sent to a worker process: {error}"
        return [RewardOutcome(failure="error", message=message)] * (call.count or 1)
    return None


class Pool:
    """Workers for the given rewards (settings as plain data).

    The first starts at once, so that a reward that can't be made is reported before anything heavy loads (RewardError);
    the others start when there is work for them.
    """

    def __init__(
        self, rewards: Sequence[dict[str, Any]], log: RewardLog, workers: int = 2, memory_gib: float = MEMORY_GIB
    ) -> None:
        self.rewards, self.log, self.memory_gib = rewards, log, memory_gib
        self.workers: list[Worker | None] = [None] * workers
        self._finalizer = weakref.finalize(self, _close_all, self.workers)
        self.workers[0] = _started(rewards, memory_gib, log)

    def run(self, calls: Sequence[RewardCall]) -> list[list[RewardOutcome]]:
        """Return the outcomes of every call, in order."""
        return in_slots(calls, len(self.workers), self._call)

    def _call(self, slot: int, call: RewardCall) -> list[RewardOutcome]:
        """Make one call, and once more if the process dies, since something else may have killed it."""
        size = call.count or 1
        if (refused := not_sent(call)) is not None:
            return refused
        words = ""
        for _ in range(2):
            worker = self.workers[slot] = self.workers[slot] or _started(self.rewards, self.memory_gib, self.log)
            answer = worker.call(call)
            if not isinstance(answer, str):
                return answer
            words = worker.last_words()
            worker.close()
            self.workers[slot] = None
            if answer == "timeout":
                message = f"cut off: over {call.limit:g} s of processor time or {WALL * call.limit:g} s by the clock"
                return [RewardOutcome(failure="timeout", message=message)] * size
        message = f"the worker process died twice in this call ({words}): out of memory, or a crash in native code"
        return [RewardOutcome(failure="died", message=message)] * size

    def close(self) -> None:
        """End all processes, or park them for the next pool. The pool can be used again: it starts new ones."""
        _close_all(self.workers, park=_leave_nothing(self.rewards))
