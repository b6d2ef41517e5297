"""Follow the fields of rows: which are read, which have no effect, and which must not be overlooked.

No field is dropped silently. A field that nothing reads is counted and shown, and one that changes the meaning of a row
in other programs makes a bad row unless the settings say that it can be ignored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.bad_rows import BadRow, Row
from posttrain.data.cells import is_empty

MEDIA = frozenset(("image", "images", "audio", "audios", "video", "videos"))
"""Columns, fields of turns and types of their parts that are no text."""
LOSS_COLUMNS = frozenset(
    "weight weights sample_weight loss_weight loss_scale mask loss_mask assistant_mask assistant_masks completion_mask "
    "input_ids logprobs kl KL ref_chosen_logps ref_rejected_logps reference_chosen_logps "
    "reference_rejected_logps".split()
)
"""Columns that change a row's loss in other programs."""
TURN_FIELDS = frozenset(
    "prefix partial train_detail training_detail loss_mask loss_weight loss_scale logprobs channel recipient "
    "tool_plan refusal input_ids token_ids".split()
)
"""Fields of turns, besides MEDIA, that change in other programs what is shown to the model or what it learns."""
NEUTRAL_AT_ONE = ("weight", "weights", "sample_weight", "loss_weight", "loss_scale")


@dataclass
class FieldNotes:
    """Note what happened to the fields of one row.

    Attributes:
        ignore: Names of columns, fields of turns and types of content parts that the settings leave out.
        read: Columns that were read.
        unread: Fields inside of columns that nothing reads, such as `messages[].id`.
        ignored: Fields with a value that were left out.
        passed_on: Columns that reach rewards and graders, which may read any of them.
        images: Turns may have parts that are images.
    """

    ignore: frozenset[str] = frozenset()
    read: set[str] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)
    ignored: set[str] = field(default_factory=set)
    passed_on: Set[str] = frozenset()
    images: bool = False

    def without_ignored(self, values: Mapping[str, Any], place: str = "") -> Row:
        """Return an object without the fields that the settings leave out; `place` is what precedes their names."""
        if not self.ignore or self.ignore.isdisjoint(values):
            return dict(values)
        self.ignored.update(f"{place}{name}" for name in self.ignore & values.keys() if not is_empty(values[name]))
        return {name: value for name, value in values.items() if name not in self.ignore}

    def note_unread(self, values: Mapping[str, Any], known: Set[str], place: str) -> None:
        """Note the fields of an object that have a value and that nothing reads.

        Args:
            values: The object.
            known: Fields that are read.
            place: What precedes the names of its fields, such as `messages[].`.
        """
        if more := values.keys() - known:
            self.unread.update(f"{place}{name}" for name in more if not is_empty(values[name]))


class SourceRow(dict[str, Any]):
    """Hold one row of a source, and note which columns are read (by `row[name]` and `row.get(name)`).

    Attributes:
        notes: What happened to its fields.
    """

    def __init__(self, values: Mapping[str, Any], ignore: Iterable[str] = (), notes: FieldNotes | None = None) -> None:
        self.notes = FieldNotes(frozenset(ignore)) if notes is None else notes
        super().__init__(self.notes.without_ignored(values))

    def __getitem__(self, name: str) -> Any:
        self.notes.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.notes.read.add(name)
        return super().get(name, default)

    def peek(self, name: str) -> Any:
        """Return a column without counting it as read; None if it is missing."""
        return super().get(name)

    def replaced(self, **columns: Any) -> SourceRow:
        """Return the row with other values in some columns; what is read of it counts for this row too."""
        return SourceRow({**self, **columns}, notes=self.notes)


def source_row(row: Row, ignore: Iterable[str] = ()) -> SourceRow:
    """Return a row that notes what is read of it: itself if it does already."""
    return row if isinstance(row, SourceRow) else SourceRow(row, ignore)


def changes_meaning(name: str, value: Any) -> bool:
    """Return True if a field that other programs act on has a value on which they would."""
    return not (is_empty(value) or value is False or (name in NEUTRAL_AT_ONE and value == 1))


def refuse_columns(row: SourceRow, names: Set[str]) -> None:
    """Raise BadRow if one of these columns has a value and was not read."""
    for name in sorted(names & row.keys()):
        value = row.peek(name)
        if name not in row.notes.read and changes_meaning(name, value):
            what = "it would not reach the model"
            if name in LOSS_COLUMNS:
                what = "it changes the loss in other programs"
            raise BadRow(f"column {name!r} is not supported here ({what})", ignore_hint(name))


def ignore_hint(name: str) -> str:
    """Return how to leave a field out."""
    return f"If the rows are right without it: data.ignore: [{name}]"


@dataclass
class FieldCounts:
    """Count the rows in which a field had a value and no effect.

    Attributes:
        unused: By column or place inside of one (`messages[].id`): fields that nothing read.
        passed_on: Columns that only rewards and graders may read.
        ignored: Fields that the settings leave out.
    """

    unused: Counter[str] = field(default_factory=Counter)
    passed_on: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)

    def add(self, row: SourceRow) -> None:
        """Count the fields of a row after it was read."""
        notes = row.notes
        if left := row.keys() - notes.read:
            for name in left:
                if not is_empty(row.peek(name)):
                    (self.passed_on if name in notes.passed_on else self.unused)[name] += 1
        if notes.unread or notes.ignored:
            self.unused.update(notes.unread)
            self.ignored.update(notes.ignored)

    def entry(self) -> dict[str, dict[str, int]]:
        """Return the part of the manifest's entry about the fields, the most frequent first."""
        parts = {"unused": self.unused, "passed_on": self.passed_on, "ignored": self.ignored}
        ordered = {name: sorted(c.items(), key=lambda item: (-item[1], item[0])) for name, c in parts.items()}
        return {name: dict(items) for name, items in ordered.items() if items}
