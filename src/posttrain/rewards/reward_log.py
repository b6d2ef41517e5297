"""Keep what rewards print, in a file of the run."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

LONGEST_LOG = 16 << 20
"""Bytes after which no more lines are kept."""


class RewardLog:
    """A file that gets the lines that rewards print; it is made with the first one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = 0
        self._lock = threading.Lock()

    def write(self, line: str) -> None:
        """Append a line."""
        with self._lock:
            size = self.path.stat().st_size if self.path.exists() else 0
            if size > LONGEST_LOG:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = line if size + len(line) <= LONGEST_LOG else "no more lines are kept"
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text + "\n")
            self.lines += 1

    @contextlib.contextmanager
    def printed(self) -> Iterator[None]:
        """Keep what is printed in a block of this process too; it appears where it did before."""
        kept = io.StringIO()
        shown = sys.stdout

        class Both(io.TextIOBase):
            def write(self, text: str) -> int:
                kept.write(text)
                return shown.write(text)

            def flush(self) -> None:
                shown.flush()

        try:
            with contextlib.redirect_stdout(Both()):
                yield
        finally:
            for line in kept.getvalue().splitlines():
                self.write(line)
