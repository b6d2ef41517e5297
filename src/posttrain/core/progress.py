"""Progress that a person can read: a live bar in a terminal, one line in a notebook, lines now and then elsewhere."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from posttrain.core.console import VisibleConsole
from posttrain.core.visible_text import visible

QUIET_SECONDS = 10.0
"""Seconds between lines where there is no terminal."""
PHASE_SECONDS = 4.0
"""Seconds after which a phase that begins gets a line there all the same: it may be a long one."""
NOTEBOOK_SECONDS = 0.5
"""Seconds between two changes of the line in a notebook."""


def clock(seconds: float) -> str:
    """Write seconds as 3:07, or 1:02:03."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Track:
    """Show the progress of one long job. The estimate comes from the pace of this process."""

    def __init__(
        self, what: str, total: int, done: int = 0, shown: bool = True, console: Console | None = None
    ) -> None:
        self.what, self.total, self.first, self.done = what, total, done, done
        self.began = self.last_line = self.last_update = time.monotonic()
        self.aside = self.aside_left = 0.0
        self.console = console or VisibleConsole()
        self.shown = shown
        self.last_phase = ""
        self.bar: Progress | None = None
        self.notebook_line = _NotebookLine() if shown and self.console.is_jupyter else None
        if shown and self.console.is_terminal:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
            )
            self.bar = Progress(*columns, console=self.console)
            self.bar.start()
            self.task = self.bar.add_task(escape(visible(what)), total=total, completed=done, text="")

    def update(self, done: int, **values: Any) -> None:
        """Report that `done` units are finished; `values` are shown as name and value, in order."""
        self.done = done
        now = time.monotonic()
        fresh = done - self.first
        left = (now - self.began - self.aside) / fresh * (self.total - done) + self.aside_left if fresh > 0 else 0.0
        parts = [f"{k.replace('_', ' ')} {_short(v)}" for k, v in values.items()]
        text = "  ".join([*parts, f"left {clock(left)}"])
        if self.bar is not None:
            self.bar.update(self.task, completed=done, text=visible(text))
        elif self.notebook_line is not None:
            self.notebook_line.show(self._record(text), last=done >= self.total)
        elif self.shown and (now - self.last_update >= QUIET_SECONDS or done >= self.total):  # phases hide no result
            self.last_line = self.last_update = now
            self._line(text)

    def set_total(self, total: int) -> None:
        """Set the number of units, once it is known."""
        self.total = total
        if self.bar is not None:
            self.bar.update(self.task, total=total)

    def set_aside(self, seconds: float, left: float) -> None:
        """Count seconds as spent on other work than the units, and expect `left` more seconds of it."""
        self.aside += seconds
        self.aside_left = left

    def say(self, text: str) -> None:
        """Print a line about the job, at once."""
        if self.bar is not None or self.notebook_line is not None:
            self.console.print(f"{self.what}: {text}", highlight=False, markup=False, soft_wrap=True)
        elif self.shown:
            self._line(text)

    def phase(self, text: str) -> None:
        """Report what is being done within the current unit; outside a terminal, now and then."""
        if self.bar is not None:
            self.bar.update(self.task, text=visible(text))
        elif self.notebook_line is not None:
            self.notebook_line.show(self._record(text))
        elif self.shown:
            new = text.split(" ")[0] != self.last_phase
            if time.monotonic() - self.last_line < (PHASE_SECONDS if new else QUIET_SECONDS):
                return
            self.last_line, self.last_phase = time.monotonic(), text.split(" ")[0]
            self._line(text)

    def counter(self, what: str, total: int, every: int = 1, done: int = 0) -> Callable[..., None]:
        """Return a function that counts its calls, and shows every so many of them as the phase "WHAT done/total".

        Args:
            what: What is done.
            total: Number of calls in all.
            every: Calls between two lines.
            done: Calls before the first.
        """
        calls = itertools.count(done + 1)

        def count(*_: Any) -> None:
            now = next(calls)
            if (now - done) % every == 0:
                self.phase(f"{what} {now}/{total}")

        return count

    def _line(self, text: str) -> None:
        """Print one record as one line, however long, with the time."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self.console.print(f"{stamp}  {self._record(text)}", highlight=False, markup=False, soft_wrap=True)
        self.console.file.flush()

    def _record(self, text: str) -> str:
        return visible(f"{self.what} {self.done}/{self.total}  {text}")

    def close(self) -> None:
        """Stop drawing; what was drawn stays."""
        if self.bar is not None:
            self.bar.stop()

    def __enter__(self) -> Track:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _NotebookLine:
    """Show one line below a notebook's cell, and change it in place: a line for each record would flood the cell."""

    def __init__(self) -> None:
        self.handle: Any = None
        self.changed = -NOTEBOOK_SECONDS

    def show(self, text: str, last: bool = False) -> None:
        """Show the text in place of the one before; too soon after that one, only the last of all."""
        now = time.monotonic()
        if now - self.changed < NOTEBOOK_SECONDS and not last:
            return
        from IPython.display import display

        content = {"text/plain": text}
        self.changed = now
        if self.handle is None:
            self.handle = display(content, raw=True, display_id=True)
        else:
            self.handle.update(content, raw=True)


def _short(value: Any) -> str:
    """Write a number with four significant digits (more if its whole part has more)."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1000 <= abs(value) < 1e9 else f"{value:#.4g}".rstrip(".")


class Phases:
    """Measure seconds by phase, and show the current phase."""

    def __init__(self, track: Track) -> None:
        self.track = track
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        self.track.phase(name.replace("_", " "))
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
