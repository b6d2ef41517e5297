"""Look at the first rows of data, and say what kind they are of: what `posttrain new` chooses a method by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.data.formats import recognise
from posttrain.data.readers import HEAD_ROWS, find_sources

KIND_OF_LAYOUT = {
    "messages": "chats",
    "sharegpt": "chats",
    "openassistant": "chats",
    "prompt_completion": "exchanges",
    "alpaca": "exchanges",
    "flan": "exchanges",
    "rated": "exchanges",
    "preference": "pairs",
    "hh_rlhf": "pairs",
    "ultrafeedback": "pairs",
    "gsm8k": "answers",
    "verifiable": "answers",
    "text": "documents",
}
"""Layout of rows -> kind."""
KIND_TITLES = {
    "chats": "conversations",
    "exchanges": "prompts with completions",
    "pairs": "prompts with a better and a worse answer",
    "thumbs": "answers, each good or bad",
    "answers": "prompts with a right answer",
    "classes": "texts with a label",
    "documents": "plain text",
}
MOST_CLASSES = 20
FEW_TO_MEASURE = 200
"""Below, a result says little, and is warned of."""


@dataclass(frozen=True)
class DataLook:
    """Hold what was found in data.

    Attributes:
        source: The source, as `data.source` has it.
        kind: A key of `KIND_TITLES`.
        rows: Number of rows.
        settings: Further settings of a `data` block that rows of this kind need.
        classes: The labels, of kind classes.
        rewards: Kind of the reward that compares answers, of kind answers.
        notes: What was found, in sentences.
    """

    source: str
    kind: str
    rows: int
    settings: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    rewards: str = ""
    notes: tuple[str, ...] = ()


def look_at_data(source: str) -> DataLook:
    """Read the first rows of a source and recognise their kind.

    Raises:
        DataError: It can't be read, holds no row, or its columns are of no known kind.
        ModelError: It has to come from the Hub, which can't be reached.
    """
    (found,) = find_sources(DataConfig(source=source))
    head = [r.row for r in islice(found.scan(), HEAD_ROWS) if isinstance(r.row, dict)]
    if not head:
        raise DataError(f"data source {source!r} holds no row that can be read")
    count, columns = found.rows.count, sorted(set().union(*head))
    kind, settings, classes, rewards = _recognise(head, columns)
    notes = [f"{source}: {count:,} rows, {KIND_TITLES[kind]} (columns {', '.join(columns)})"]
    if classes:
        notes.append(f"labels: {', '.join(classes)}")
    if count < FEW_TO_MEASURE:
        notes.append(f"! {count:,} rows are few: differences that are measured will be small beside their intervals")
    return DataLook(source, kind, count, settings, classes, rewards, tuple(notes))


def _recognise(head: Sequence[dict[str, Any]], columns: list[str]) -> tuple[str, dict[str, Any], tuple[str, ...], str]:
    """Return (kind, settings, classes, reward) of rows."""
    first = head[0]
    try:
        layout = recognise(first, "auto")
    except DataError:
        if made := _classes(head, columns):
            return made
        raise
    if layout == "text" and (made := _classes(head, columns)):
        return made
    kind = KIND_OF_LAYOUT[layout]
    if kind == "exchanges" and {"label", "kto_tag"} & set(columns):
        kind = "thumbs"
    return kind, {}, (), _reward(head) if kind == "answers" else ""


def _classes(
    head: Sequence[dict[str, Any]], columns: list[str]
) -> tuple[str, dict[str, Any], tuple[str, ...], str] | None:
    """Return what a table of texts with a label is; None if it is none.

    The label is the column with the fewest different texts, at most `MOST_CLASSES` and each in two rows or more; the
    text is the column with the longest cells.
    """
    values = {name: [str(row.get(name, "")) for row in head] for name in columns}
    few = {n: set(v) for n, v in values.items() if 2 <= len(set(v)) <= min(MOST_CLASSES, len(v) // 2)}
    text = max(columns, key=lambda name: sum(map(len, values[name])))
    few.pop(text, None)
    if not few or any("{" in name or "}" in name for name in columns):
        return None
    named = [name for name in few if name in ("label", "class", "category", "sentiment", "intent", "topic")]
    label = min(named or few, key=lambda name: len(few[name]))
    names = tuple(sorted(few[label]))
    if any("{" in name or "}" in name for name in names):  # they would be fields of the template
        return None
    settings = {
        "prompt": f"{{{text}}}\n\nAnswer with one of: {', '.join(names)}.",
        "completion": f"{{{label}}}",
    }
    return "classes", settings, names, ""


def _reward(head: Sequence[dict[str, Any]]) -> str:
    """Return `numeric` if every answer ends in a number, else `exact`."""
    for row in head:
        answer = str(row["answer"]).rsplit("####", 1)[-1].strip().replace(",", "").lstrip("$")
        try:
            float(answer)
        except ValueError:
            return "exact"
    return "numeric"
