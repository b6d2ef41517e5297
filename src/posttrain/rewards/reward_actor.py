"""The Ray actor that calls rewards: a pool of one process, on any machine of the cluster.

The class travels by value: at its top the module imports the standard library alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any


class RewardActor:
    """Call rewards in a process beside this one, which is replaced when a call hangs or crashes.

    When the actor itself is lost Ray makes it again with the same arguments and repeats the call.
    """

    def __init__(self, path: Sequence[str], folder: str, rewards: Sequence[dict[str, Any]], memory_gib: float) -> None:
        """Note what it will call.

        Args:
            path: The trainer's `sys.path`.
            folder: The trainer's working folder, in which names of files are looked up if this machine has it.
            rewards: Settings of the rewards as plain data.
            memory_gib: Memory of the process.
        """
        sys.path[:] = [*path, *(p for p in sys.path if p not in path)]
        if os.path.isdir(folder):
            os.chdir(folder)
        self.rewards, self.memory_gib = rewards, memory_gib
        self.pool: Any = None
        self.lines: list[str] = []

    def write(self, line: str) -> None:
        """Keep a line that a reward printed, for the next reply."""
        self.lines.append(line)

    def open(self) -> str:
        """Start the process; return why the rewards can't be made, or nothing."""
        from posttrain.core.errors import RewardError
        from posttrain.rewards.worker_pool import Pool

        log: Any = self
        try:
            self.pool = self.pool or Pool(self.rewards, log, workers=1, memory_gib=self.memory_gib)
        except RewardError as error:
            return str(error) or "RewardError"
        return ""

    def call(self, call: Any) -> tuple[Any, list[str], tuple[str, int]]:
        """Return the outcomes of a call, the lines printed since the last one, and this machine and process."""
        if refused := self.open():
            raise RuntimeError(refused)
        outcomes = self.pool.run([call])[0]
        lines, self.lines = self.lines, []
        return outcomes, lines, (os.uname().nodename, os.getpid())
