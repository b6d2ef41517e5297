"""A process that calls rewards, frames in, frames out.

A plain child process rather than one of `multiprocessing`, which would run the user's main script again in the child.
The limit on processor time ends the process by a signal that Python code can't catch or swallow, and does not depend on
how busy the machine is.
"""

from __future__ import annotations

import os
import pickle
import queue
import random
import signal
import struct
import sys
import threading
from typing import IO, Any

from posttrain.config.rewards import read_reward
from posttrain.rewards.outcome import attempt
from posttrain.rewards.reward import build_reward


def write_frame(stream: IO[bytes], value: Any) -> None:
    """Write the length (8 bytes), then the pickle."""
    data = pickle.dumps(value)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def read_frame(stream: IO[bytes]) -> Any:
    """Return the next frame. Raises EOFError if the other process is gone, also in the middle of a frame."""
    head = stream.read(8)
    size = struct.unpack("<Q", head)[0] if len(head) == 8 else 1
    data = stream.read(size) if len(head) == 8 else b""
    if len(data) != size:
        raise EOFError("the other process closed its end")
    return pickle.loads(data)


def _read_all(stream: IO[bytes], into: queue.Queue[Any]) -> None:
    try:
        while True:
            into.put(read_frame(stream))
    except BaseException:
        os._exit(0)  # the parent is gone: end now, even if a call hangs


def _limit_memory(gib: float) -> None:
    try:
        import resource
    except ImportError:  # not a POSIX system
        return
    resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30), resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _timer(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal's default action ends the process


def main() -> None:
    """Serve calls until the parent closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # Rewards do not reach the pipes: what they print goes to stderr, line by line, and they read an empty stdin.
    replies, requests = os.fdopen(os.dup(1), "wb"), os.fdopen(os.dup(0), "rb")
    os.dup2(2, 1)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="replace")  # type: ignore[union-attr]
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    inbox: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_read_all, args=(requests, inbox), daemon=True).start()

    functions: list[Any] = []
    while True:
        frame = inbox.get()
        if isinstance(frame, dict):  # the first, and again where another pool takes over this process
            sys.path[:] = frame["path"]
            try:
                functions = [build_reward(read_reward(spec), {}) for spec in frame["rewards"]]
            except Exception as error:
                write_frame(replies, f"{type(error).__name__}: {error}")
                return
            _limit_memory(frame["memory_gib"])
            write_frame(replies, None)
            continue
        number, args, count, limit, steps = frame
        random.seed(0)  # random draws must not depend on the earlier calls of this process
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(0)
        _timer(limit)
        outcomes = attempt(functions[number], args, count, steps)
        _timer(0)
        write_frame(replies, outcomes)


if __name__ == "__main__":
    main()
