"""Tables that are converted: rows in, files out, with a count of what was dropped and why."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from posttrain.core.files import write_lines, write_text

Task = dict[str, Any]
KEPT_EXAMPLES = 3
"""Dropped rows of a cause that are shown."""


@dataclass
class Table:
    """Collect the rows of a table.

    Attributes:
        name: Name of the table's file and of its task file.
        tasks: Tasks over the table. None: they are in tasks/NAME.yaml.
        unique: Columns that identify a row: a second row with equal values is dropped.
        tsv: Write tab-separated values, for cells without tabs and line ends. False: JSONL.
    """

    name: str
    tasks: list[Task] | None = None
    unique: Sequence[str] = ()
    tsv: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    _seen: set[bytes] = field(default_factory=set, repr=False)

    def add(self, **row: Any) -> None:
        """Append a row, unless an equal one is there."""
        if self.unique:
            key = hashlib.blake2b("\0".join(str(row[c]) for c in self.unique).encode(), digest_size=12).digest()
            if key in self._seen:
                return self.drop("the same row twice", " | ".join(str(row[c]) for c in self.unique))
            self._seen.add(key)
        self.rows.append(row)

    def drop(self, cause: str, example: str) -> None:
        """Count a row that is not converted."""
        self.dropped[cause] += 1
        if len(shown := self.examples.setdefault(cause, [])) < KEPT_EXAMPLES:
            shown.append(example if len(example) <= 200 else example[:197] + "...")

    @property
    def file(self) -> str:
        """Return the name of the table's file."""
        return f"{self.name}.{'tsv' if self.tsv else 'jsonl'}"

    def write(self, folder: Path, task_files: Path) -> dict[str, Any]:
        """Write the table, then its task file.

        Args:
            folder: Where to.
            task_files: Folder of the task files that are written by hand.

        Returns:
            What was written, for the list of what is done.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.tsv:
            write_text(folder / self.file, tsv_text(self.rows))
        else:
            write_lines(folder / self.file, self.rows)
        text = (task_files / f"{self.name}.yaml").read_text(encoding="utf-8") if self.tasks is None else None
        write_text(folder / f"{self.name}.yaml", text or task_text(self.tasks or []))
        return {"rows": len(self.rows), "dropped": dict(self.dropped), "dropped_examples": self.examples}


def tsv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as tab-separated values with a header. Raises ValueError for a cell that would need quotes."""
    lines = ["\t".join(rows[0])]
    for row in rows:
        cells = [str(cell) for cell in row.values()]
        if bad := [cell for cell in cells if any(c in cell for c in "\t\r\n")]:
            raise ValueError(f"a cell with a tab or a line end does not go into a .tsv file: {bad[0]!r}")
        lines.append("\t".join(cells))
    return "".join(line + "\n" for line in lines)


def task_text(tasks: Sequence[Task]) -> str:
    """Return task files' text: a list of tasks."""
    return yaml.safe_dump(list(tasks), allow_unicode=True, sort_keys=False, width=110)


def translation_task(name: str, language: str, domain: str) -> Task:
    """Return the task file's entry of a table with English texts and their translations.

    Args:
        name: Name of the task and of its table.
        language: Language of the translations.
        domain: What the texts are about.
    """
    return {
        "name": name,
        "type": "translation",
        "language": "en",
        "output_language": language,
        "domain": domain,
        "data": {"source": f"{name}.jsonl"},
        "fields": {"input": "{english}"},
        "output": "{translation}",
        "group": "english",
    }
