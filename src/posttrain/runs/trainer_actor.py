"""The Ray actor that keeps one trainer: a process with torchrun's environment, its output, and how it ended.

The class travels to the cluster by value and imports the standard library and ray alone. Training is in a process of
its own because it needs the main thread (for signals), and so that how it ended is known whatever ended it.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from typing import IO, Any


class TrainerActor:
    """Start, watch and end one trainer."""

    def __init__(self) -> None:
        self.process: Any = None
        self.printed: Any = deque(maxlen=20)
        self.chunks: Any = queue.Queue()
        threading.Thread(target=self._end_with, args=(os.getppid(),), daemon=True).start()

    def _end_with(self, parent: int) -> None:
        """End this process when Ray's process of this machine is gone: the trainer would keep the run's folder.

        Ray sees to this itself, but not where a killed process stays as a zombie: in a container without an init.
        """
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    def place(self) -> tuple[str, str, int]:
        """Return the id of this machine, its address, and a port that is free on it."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), port

    def start(self, frame: bytes, environment: dict[str, str], folder: str, shown: bool) -> None:
        """Start the process.

        Args:
            frame: What it reads from its standard input.
            environment: Variables that are set for it, besides those of this machine.
            folder: Its working folder.
            shown: Keep what it prints for `output`; False: only the last lines, for `ending`.
        """
        if not os.path.isdir(folder):
            raise FileNotFoundError(
                f"{socket.gethostname()} has no folder {folder}: all machines of the cluster need the same file system"
            )
        replies, child_end = os.pipe()
        # The process may join the cluster as one that Ray has not started.
        plain = {n: v for n, v in os.environ.items() if n not in ("RAY_JOB_ID", "RAY_RAYLET_PID")}
        values = {**plain, **environment, "POSTTRAIN_REPLY": str(child_end)}
        command = [sys.executable, "-P", "-c", "from posttrain.runs.trainer_process import main; main()"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=values,
            cwd=folder,
            pass_fds=[child_end],
            start_new_session=True,  # a Ctrl-C in the terminal comes through the driver alone
        )
        os.close(child_end)
        self.replies = os.fdopen(replies, "rb")
        streams = ((1, self.process.stdout), (2, self.process.stderr))
        self.readers = [threading.Thread(target=self._read, args=(*s, shown), daemon=True) for s in streams]
        for thread in self.readers:
            thread.start()
        try:
            self.process.stdin.write(len(frame).to_bytes(8, "little") + frame)
            self.process.stdin.flush()  # and left open: the process ends when this end of the pipe is gone
        except OSError:
            pass  # it has ended, and `ending` says how

    def _read(self, number: int, stream: IO[bytes], shown: bool) -> None:
        while chunk := os.read(stream.fileno(), 65536):
            self.printed.append(chunk[-2000:])
            if shown:
                self.chunks.put((number, chunk))

    def output(self) -> list[tuple[int, bytes]]:
        """Return what was printed since the last call, as (1 or 2 for the stream, bytes); wait up to 2 s for it."""
        out = []
        try:
            out.append(self.chunks.get(timeout=2))
            while True:
                out.append(self.chunks.get_nowait())
        except queue.Empty:
            return out

    def ending(self) -> tuple[bytes, str]:
        """Wait for the end of the process; return its reply (empty: none) and how it ended, with its last lines."""
        reply = self.replies.read()
        code = self.process.wait()
        for thread in self.readers:
            thread.join(2)
        printed = b"".join(self.printed).decode(errors="replace").strip()[-1500:]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return reply, how + (f"; it last printed: {printed}" if printed else "")

    def signal(self, number: int) -> None:
        """Send a signal to the process."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """End the process at once, and wait until it has ended."""
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
