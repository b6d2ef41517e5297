"""Read the examples of a task from its table, and keep them on the disk: in memory are a few numbers of each."""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.core.errors import DataError
from posttrain.data.bad_rows import BadRow, BadRows, Row, short_reason
from posttrain.data.cells import is_missing, missing_field, read_text
from posttrain.data.instruction_tasks import InstructionTask
from posttrain.data.instruction_wordings import INPUT_FIELDS, LABELLED, Template
from posttrain.data.parts import PlacedRow
from posttrain.data.rows import Rows, open_rows
from posttrain.data.text_copies import LONG_INPUT, SEVERAL, compared_words, core_text, template_words

log = logging.getLogger("posttrain")
MAX_LABELS = 200
"""Most different answers of a task whose labels are taken from its rows."""
SAMPLED = 1000
"""Examples by which words are found that most examples of a task have."""
MOST_CHARACTERS = 1_000_000
"""Most characters of a text: a longer one fits no context, and takes minutes to compare."""
NEAR_CUT = "within data.classes.margin of a cut"
EXAMPLES_SHOWN = 3
"""Examples of each cause for which rows are left out."""


@dataclass(frozen=True, slots=True)
class Example:
    """Hold one example of a task.

    Attributes:
        fields: Texts by the name of the field; an optional one without a value is empty.
        output: The right answer.
        rationale: The reasoning; empty if there is none.
        place: `file:row`.
    """

    fields: Mapping[str, str]
    output: str
    rationale: str
    place: str

    def input_text(self, kind: str) -> str:
        """Return the input as one text, for comparing; `kind` is the type of the task."""
        named = [*(n for n in INPUT_FIELDS[kind] if n != "what"), *(["context"] if "context" in self.fields else [])]
        return "\n".join(text for n in named if (text := self.fields[n]))


@dataclass
class Dropped:
    """Count what is left out, by cause, with a few examples of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def add(self, cause: str, place: str, text: str) -> None:
        """Count one example.

        Args:
            cause: Why it is left out.
            place: Its place, `file:row`.
            text: Its input.
        """
        self.counts[cause] += 1
        shown = self.examples.setdefault(cause, [])
        if len(shown) < EXAMPLES_SHOWN:
            shown.append({"place": place, "text": text[:300]})

    def merge(self, other: Dropped) -> None:
        """Add the counts of another one."""
        self.counts.update(other.counts)
        for cause, shown in other.examples.items():
            mine = self.examples.setdefault(cause, [])
            mine += shown[: EXAMPLES_SHOWN - len(mine)]


class ExampleStore:
    """Hold the examples of a task in a file, and by number in memory: where it is, and hashes of its texts.

    The numbers are `input_keys` (a hash of the words of the input; of SEVERAL words in any order), `pair_keys` (of all
    texts; no two are equal), `answer_keys` (of the output, as of the input), `groups` (of the group and the table, so
    that two tasks of one table have the same; 0 for none), `long_inputs` (1 if the input has LONG_INPUT words) and
    `with_rationale`.

    Attributes:
        task: The task.
        path: The file.
        labels: Values of the output that are labels, in their order; empty for other types.
        dropped: What was left out.
        read: Number of rows that could be used.
    """

    def __init__(self, task: InstructionTask, path: Path) -> None:
        self.task, self.path = task, path
        self._offsets = array("q", [0])
        self._columns = {name: array("Q") for name in ("input_keys", "pair_keys", "answer_keys", "groups")}
        self._columns |= {name: array("B") for name in ("long_inputs", "with_rationale")}
        self.labels: list[str] = list(task.labels or ())
        self.dropped = Dropped()
        self.read = 0
        self._map: mmap.mmap | None = None
        self._common: frozenset[str] | None = None

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def column(self, name: str) -> np.ndarray:
        """Return a number of each example: input_keys, pair_keys, groups, long_inputs or with_rationale."""
        values = self._columns[name]
        return np.frombuffer(values, dtype=np.uint64 if values.typecode == "Q" else np.uint8)

    def __getitem__(self, number: int) -> Example:
        if self._map is None:
            with self.path.open("rb") as f:
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        return Example(*json.loads(self._map[self._offsets[number] : self._offsets[number + 1]]))

    def __iter__(self) -> Iterator[Example]:
        """Return the examples in file order, without the random access by which `[]` finds one."""
        with self.path.open("rb") as f:
            for line in islice(f, len(self)):
                yield Example(*json.loads(line))

    def close(self) -> None:
        """Close the file."""
        if self._map is not None:
            self._map.close()
            self._map = None

    @property
    def common_words(self) -> frozenset[str]:
        """Return the words of a template by which the inputs were written (`template_words`); often there are none."""
        if self._common is None:
            kind = self.task.type
            self._common = template_words([compared_words(e.input_text(kind)) for e in islice(iter(self), SAMPLED)])
        return self._common

    def core_text(self, example: Example) -> str:
        """Return an input without the words of a template at its beginning and its end."""
        return core_text(example.input_text(self.task.type), self.common_words)

    def words(self, example: Example) -> list[str]:
        """Return the words of an input by which it is compared; all of them if it has no others than common ones."""
        words = compared_words(example.input_text(self.task.type))
        common = self.common_words
        return [word for word in words if word not in common] or words if common else words

    def drop(self, number: int, cause: str) -> None:
        """Count an example as left out, with its text if it is among the first of this cause."""
        self.dropped.counts[cause] += 1
        shown = self.dropped.examples.setdefault(cause, [])
        if len(shown) < EXAMPLES_SHOWN:
            example = self[number]
            shown.append({"place": example.place, "text": example.input_text(self.task.type)[:300]})

    @cached_property
    def demonstrations(self) -> list[Example]:
        """Return the examples that the task's file shows."""
        return [
            Example(
                {n: shown.get(n, "") for n in self.task.fields}, shown["output"], shown.get("rationale", ""), f"{i}"
            )
            for i, shown in enumerate(self.task.demonstrations, 1)
        ]

    def fill_from(self, rows: Rows, count: Callable[..., None]) -> None:
        """Read all rows of the task's table.

        Args:
            rows: The table.
            count: Called after each row.

        Raises:
            DataError: Rows can't be used, and data.on_bad_row is stop; or none can be used.
        """
        reader, seen = _RowReader(self.task), set[int]()
        labels: dict[str, None] = {}
        with self.path.open("wb") as f:
            for _, (example, group) in rows.stream(reader, frozenset()):
                count()
                self.read += 1
                key = _hash(json.dumps([list(example.fields.values()), example.output, example.rationale]))
                if key in seen:
                    self.dropped.add("the same row again", example.place, example.input_text(self.task.type))
                    continue
                seen.add(key)
                f.write(line := _line(example))
                self._offsets.append(self._offsets[-1] + len(line))
                text = example.input_text(self.task.type)
                words = compared_words(text)
                numbers = (_text_key(text, words), key, _text_key(example.output), group)
                for column, number in zip(
                    self._columns.values(), (*numbers, len(words) >= LONG_INPUT, bool(example.rationale)), strict=True
                ):
                    column.append(number)
                if self.task.type in LABELLED and len(labels) <= MAX_LABELS:
                    labels[example.output] = None
        rows.check(self.read)
        self._note_bad(rows.bad)
        self._take_labels(labels)

    def _note_bad(self, bad: BadRows) -> None:
        self.dropped.counts.update({NEAR_CUT if cause == "filtered" else cause: n for cause, n in bad.dropped.items()})
        for entry in bad.rows:
            shown = self.dropped.examples.setdefault(short_reason(entry["reason"]), [])
            if len(shown) < EXAMPLES_SHOWN:
                shown.append({"place": f"{entry['file']}:{entry['row']}", "text": entry["reason"][:300]})

    def _take_labels(self, found: Mapping[str, None]) -> None:
        task = self.task
        if task.type not in LABELLED:
            return
        if task.labels is not None:
            if len(found) == 1 < self.read:
                log.warning(
                    "task %s: all %d rows have the label %r, so %s can't be learnt. Are output and rows right?",
                    *(task.name, self.read, *found, ", ".join(repr(v) for v in task.labels if v not in found)),
                )
            return
        if len(found) > MAX_LABELS:
            raise DataError(
                f"task {task.name!r}: more than {MAX_LABELS} different answers ({', '.join(map(repr, [*found][:3]))}), "
                f"and a task of type {task.type} has few labels. Is output right ({task.output})? Else use another type"
            )
        if len(found) < 2:
            raise DataError(
                f"task {task.name!r}: the answer is {next(iter(found))!r} in all rows, so there is nothing to choose. "
                "Is output right, or the range of rows? labels: {value: [word], ...} names values that no row has"
            )
        self.labels = sorted(found, key=lambda v: (0, int(v), v) if v.isascii() and v.isdigit() else (1, 0, v))


class _RowReader:
    """Make an example of a row. Raises BadRow for one that can't be used."""

    def __init__(self, task: InstructionTask) -> None:
        self.task = task
        self.fields = {name: Template(text) for name, text in task.fields.items()}
        self.output = Template(task.output)
        self.rationale = None if task.rationale is None else Template(task.rationale)
        self.contexts = {wording.has_context for wording in task.all_wordings}
        self.table = "\0".join(_one_name(entry.source) for entry in task.data.sources())

    def __call__(self, placed: PlacedRow) -> tuple[Example, int]:
        row, task = placed.row, self.task
        fields = {}
        for name, template in self.fields.items():
            text = _fill(template, row) if name in INPUT_FIELDS[task.type] else _fill_if_there(template, row)
            if not text and name in INPUT_FIELDS[task.type]:
                raise BadRow(f"empty {name}", f"Task {task.name!r} needs a text there")
            fields[name] = text
        if bool(fields.get("context")) not in self.contexts:
            there = "with" if fields.get("context") else "without"
            raise BadRow(
                f"no wording for a row {there} a context", f"Task {task.name!r} needs shipped_wordings or another"
            )
        output = _fill(self.output, row)
        if not output:
            raise BadRow("empty output", f"Task {task.name!r} needs an answer in every row")
        if task.labels is not None and output not in task.labels:
            raise BadRow(
                f"unknown label: {output!r} is not in labels",
                f"Task {task.name!r} has labels for {', '.join(map(repr, task.labels))}",
            )
        rationale = "" if self.rationale is None else _fill_if_there(self.rationale, row)
        if (longest := max(map(len, (*fields.values(), output, rationale)))) > MOST_CHARACTERS:
            most = f"{MOST_CHARACTERS:,}"
            raise BadRow(f"a text of {longest:,} characters", f"Task {task.name!r}: expected {most} at most")
        group = row.get(task.group) if task.group is not None else None
        return Example(fields, output, rationale, placed.source), _group_key(group, f"{self.table}\0{task.group}")


def _one_name(source: str) -> str:
    """Return a source by a name that is the same however its path is spelled."""
    return os.path.realpath(source) if os.path.isfile(source) else source


def _group_key(value: Any, column: str) -> int:
    """Return a hash of a group's name and its column, with the table's name; 0 for a row that is in no group."""
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        return 0
    simple = isinstance(value, str | int | float)
    text = cell_text(value, "group") if simple else json.dumps(value, sort_keys=True, default=str)
    return _hash(f"{column}\0{text}") | 1


def _text_key(text: str, words: Sequence[str] | None = None) -> int:
    """Return a hash of the words of a text, of SEVERAL in any order; `words` are its words, if they are known."""
    words = compared_words(text) if words is None else words
    return _hash("\0".join(sorted(words) if len(words) >= SEVERAL else words) or text)


def _fill(template: Template, row: Row) -> str:
    values = {name: value_at(row, name) for name in template.fields}
    if missing := [name for name, value in values.items() if is_missing(value)]:
        raise missing_field(missing[0], values[missing[0]])
    return template.fill({name: cell_text(value, name) for name, value in values.items()}).strip()


def _fill_if_there(template: Template, row: Row) -> str:
    """Return a filled template; an empty text if one of its columns has no value."""
    values = {name: value_at(row, name) for name in template.fields}
    if any(is_missing(value) or (isinstance(value, str) and not value.strip()) for value in values.values()):
        return ""
    return template.fill({name: cell_text(value, name) for name, value in values.items()}).strip()


def value_at(row: Row, name: str) -> Any:
    """Return the value of a column, or inside of one: answers.text.0 is the first item of `text` in `answers`.

    Returns:
        None if there is no such column, key or item.
    """
    if name in row or "." not in name:
        return row.get(name)
    first, *parts = name.split(".")
    value = row.get(first)
    for part in parts:
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def cell_text(value: Any, name: str) -> str:
    """Return a cell as text: a whole number without .0 (a column of labels with a gap holds floats), true as `true`.

    Args:
        value: The cell.
        name: Name of the column, for messages.

    Raises:
        BadRow: The cell is missing, or a list or an object.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return read_text(value, name)


def _line(example: Example) -> bytes:
    return f"{json.dumps([example.fields, example.output, example.rationale, example.place])}\n".encode()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def open_table(task: InstructionTask) -> Rows:
    """Open the table of a task, and check that it has the columns that the task names.

    Raises:
        DataError: The table can't be opened, or lacks a column.
    """
    try:
        rows = open_rows(task.data, layout="template")
    except DataError as error:
        raise DataError(f"task {task.name!r}: {error}") from error
    named = {f"fields.{name}": text for name, text in task.fields.items()} | {"output": task.output}
    named |= {} if task.rationale is None else {"rationale": task.rationale}
    wanted = [(key, column) for key, text in named.items() for column in Template(text).fields]
    for key, column in [*wanted, *([("group", task.group)] if task.group is not None else [])]:
        made = task.data.classes is not None and column == "label"
        if not made and not rows.has(column) and not ("." in column and rows.has(column.split(".")[0])):
            shown = column if key == "group" else f"{{{column}}}"
            raise DataError(f"task {task.name!r}: {key} names {shown}, and the columns are {rows.columns}")
    return rows


def store_examples(task: InstructionTask, path: Path, count: Callable[..., None] = lambda: None) -> ExampleStore:
    """Read the rows of a task's table into a file.

    Args:
        task: The task.
        path: The file, which is written.
        count: Called after each row.

    Raises:
        DataError: The table or its rows can't be used.
    """
    store = ExampleStore(task, path)
    try:
        store.fill_from(open_table(task), count)
    except DataError as error:
        named = f"task {task.name!r}"
        raise error if str(error).startswith(named) else DataError(f"{named}: {error}") from error
    return store
