"""Rows that can't be used: why, how many, and whether they stop the run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from posttrain.core.errors import DataError

Row = dict[str, Any]
SHOWN_ROWS = 10
"""Rows that a message or a manifest names one by one."""
LISTED_ROWS = 100_000
"""Rows that are kept one by one; of more, only the number is kept, so that memory stays bounded."""
REASONS = 1000
"""Different reasons that are counted apart; more are counted together."""
SURROGATE = re.compile("[\ud800-\udfff]")
SURROGATE_HINT = (
    "A lone surrogate is half of a character, left by a cut through a text; no tokenizer reads it. Remove the JSON "
    "escapes from \\ud800 to \\udfff that stand alone"
)


class BadRow(Exception):
    """Signal that a row can't be used.

    Attributes:
        hint: Advice that is the same for all rows with this problem, such as a list of allowed values. A message about
            many rows shows it once.
    """

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


class FilteredRow(Exception):
    """Signal that the settings leave a row out, which is counted and is no error."""


@dataclass
class BadRows:
    """Collect rows that can't be used.

    Attributes:
        policy: "stop" for an error if there is a bad row, "skip" to leave them out.
        policies: The policies of files that have another one, by name.
        filtered: Number of rows that data.classes.margin left out; they are not bad.
        count: Number of bad rows.
        stopping: Number of those that stop the run.
        counts: Number of bad rows by reason, without the particulars of a row.
        by_file: Number of bad and filtered rows by file.
    """

    policy: Literal["stop", "skip"] = "stop"
    policies: dict[str, Literal["stop", "skip"]] = field(default_factory=dict)
    filtered: int = 0
    count: int = 0
    stopping: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    by_file: Counter[str] = field(default_factory=Counter)
    _entries: list[dict[str, Any]] = field(default_factory=list)
    _hints: dict[str, None] = field(default_factory=dict)

    def add(self, source: str, error: BadRow | str) -> None:
        """Add a row by its place (`file:row`) and the reason why it can't be used."""
        file, _, row = source.rpartition(":")
        reason = str(error)
        self.count += 1
        self.by_file[file] += 1
        self.stopping += self.policies.get(file, self.policy) == "stop"
        short = short_reason(reason)
        self.counts[short if short in self.counts or len(self.counts) < REASONS else "other reasons"] += 1
        if len(self._entries) < LISTED_ROWS:
            self._entries.append({"file": file, "row": int(row) if row.isdigit() else row, "reason": reason})
        if (hint := getattr(error, "hint", "")) and len(self._hints) < SHOWN_ROWS:
            self._hints[hint] = None

    @contextmanager
    def collect(self, source: str) -> Iterator[None]:
        """Catch BadRow and FilteredRow of the code inside and count them for the row at this place."""
        try:
            yield
        except BadRow as error:
            self.add(source, error)
        except FilteredRow:
            self.filtered += 1
            self.by_file[source.rpartition(":")[0]] += 1

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Return file, row and reason of each bad row (of LISTED_ROWS at most), by file and row number."""
        return sorted(self._entries, key=lambda e: (e["file"], e["row"] if isinstance(e["row"], int) else 0))

    @property
    def dropped(self) -> dict[str, int]:
        """Return the number of rows left out by reason, the filtered ones included."""
        return dict(self.counts) | ({"filtered": self.filtered} if self.filtered else {})

    def check(self, total: int, used: int) -> None:
        """Raise DataError for bad rows whose policy is "stop", and in any case if no row can be used."""
        if self.stopping or (self.count and not used):
            raise DataError(self._message(total))
        if self.filtered and not used:
            raise DataError(f"all {self.filtered:,} rows lie within data.classes.margin of a cut")

    def _message(self, total: int) -> str:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.counts.most_common(SHOWN_ROWS))
        reasons += ", …" if len(self.counts) > SHOWN_ROWS else ""
        lines = [f"{self.count:,} of {total:,} rows can't be used ({reasons}):"]
        lines += [f"  {b['file']}:{b['row']}: {b['reason']}" for b in self.rows[:SHOWN_ROWS]]
        lines += [f"  and {self.count - SHOWN_ROWS:,} more"] if self.count > SHOWN_ROWS else []
        advice = "Fix these rows, or skip them with on_bad_row: skip beside their source (skipped rows are counted)"
        if any("too long" in reason for reason in self.counts):
            advice += "; on_long: truncate cuts long ones"
        return "\n".join([*lines, *self._hints, advice])


def short_reason(reason: str) -> str:
    """Return a reason without the particulars of a row, under which it is counted."""
    return reason.split(":")[0].split(" (")[0]


def check_values(row: dict[str, Any]) -> None:
    """Raise BadRow if a value anywhere in a row can't be used.

    That is a text, or the name of a field, with a lone surrogate, and a BadRow that stands for an object which can't be
    read.
    """
    for name, value in row.items():
        _check(name, "the name of a field")
        _check(value, repr(name))


def _check(value: Any, where: str) -> None:
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            if found := SURROGATE.search(value):
                raise BadRow(f"lone surrogate: \\u{ord(found[0]):04x} in {where}", SURROGATE_HINT)
        elif isinstance(value, BadRow):
            raise value
        elif isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            todo += value
