"""Keep what rewards print, in a file of the run."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.core.visible_text import visible

LOG = "rewards.log"
"""Name of the file, in the folder of a stage or of evaluations."""
LONGEST_LOG = 16 << 20
"""Bytes after which no more lines are kept."""


class _Kept(io.StringIO):
    """Text printed in a block, without lines of workers and bars that rich draws from a thread: these are shown."""

    def __init__(self, shown: Any) -> None:
        super().__init__()
        self.shown = shown
        self.rich_proxied_file = getattr(shown, "rich_proxied_file", shown)


class RewardLog:
    """Show the lines that rewards print, and append them to a file, which is made with the first one.

    Attributes:
        path: The file. None: lines are shown only.
        lines: Lines since it was made.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lines = 0
        self._lock = threading.Lock()

    def write(self, line: str) -> None:
        """Keep a line, and show it; what a completion has put into it moves no cursor."""
        line = visible(line.rstrip())
        if not line:
            return
        print(f"reward: {line}", flush=True, file=getattr(sys.stdout, "shown", sys.stdout))
        if self.path is None:
            return
        with self._lock, contextlib.suppress(OSError):  # a full disk ends neither a worker's pipe nor the run
            self.lines += 1
            size = self.path.stat().st_size if self.path.exists() else 0
            if size > LONGEST_LOG:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write((line if size + len(line) <= LONGEST_LOG else "no more lines are kept") + "\n")

    @contextlib.contextmanager
    def printed(self) -> Iterator[None]:
        """Take the lines that are printed within the context by this process."""
        kept = _Kept(sys.stdout)
        try:
            with contextlib.redirect_stdout(kept):
                yield
        finally:
            for line in kept.getvalue().splitlines():
                self.write(line)

    def close(self) -> None:
        """Name the file if there are lines in it."""
        if self.lines:
            print(f"rewards printed {self.lines:,} line{'s' * (self.lines != 1)}: {self.path}", flush=True)
            self.lines = 0


def printed_lines(run: Path) -> list[str]:
    """Return a sentence for each log in the folder of a run."""
    out = []
    for path in (p for p in sorted(run.rglob(LOG)) if p.is_file()):
        count = path.read_bytes().count(b"\n")
        out.append(f"rewards printed {count:,} line{'s' * (count != 1)}: {path.relative_to(run).as_posix()}")
    return out
