"""Read what stands in columns beside a conversation: system message, earlier turns, tools, template arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.core.types import Message
from posttrain.data.bad_rows import BadRow, Row
from posttrain.data.cells import is_empty, parse_json, read_text
from posttrain.data.row_fields import SourceRow, ignore_hint
from posttrain.data.tool_calls import read_tools
from posttrain.data.turns import make_message, read_turns

SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
CONTEXT_COLUMNS = {*SYSTEM_COLUMNS, "history"}
TOOL_COLUMNS = ("tools", "functions")
TEMPLATE_COLUMNS = ("chat_template_kwargs",)
RESERVED = ("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message")
"""Arguments of a template that are not the row's to give."""


def add_context(turns: Sequence[Message], row: SourceRow, system: str | None) -> tuple[Message, ...]:
    """Return a conversation with the system message and the earlier turns of the row's columns.

    Args:
        turns: The conversation.
        row: The row, with columns such as `system` and `history`.
        system: System message of the settings, which replaces the row's.

    Raises:
        BadRow: A column can't be used, or the row has two different system messages.
    """
    if not system and CONTEXT_COLUMNS.isdisjoint(row):
        return tuple(turns)
    earlier = read_history(row)
    firsts = [part[0] for part in (turns, earlier) if part and part[0]["role"] == "system"]
    message = make_message("system", system) if system else _system(row, firsts)
    rest = [turn for part in (earlier, turns) for turn in part if not any(turn is first for first in firsts)]
    return (*([message] if message else []), *rest)


def _system(row: SourceRow, firsts: Sequence[Message]) -> Message | None:
    """Return the system message of a row: its first turn, or a column's."""
    given = {name: read_text(row[name], name) for name in SYSTEM_COLUMNS if not is_empty(row.peek(name))}
    if len({text.strip() for text in (*given.values(), *(first["content"] for first in firsts))}) > 1:
        places = [*(f"column {name}" for name in given), *("a first turn" for _ in firsts)]
        raise BadRow(f"two different system messages ({' and '.join(places)})", ignore_hint("system"))
    if firsts or not given:
        return firsts[0] if firsts else None
    return make_message("system", next(iter(given.values())))


def read_history(row: SourceRow) -> list[Message]:
    """Return the turns of the column `history`: pairs of a prompt and an answer, or turns. Raises BadRow."""
    if is_empty(row.peek("history")):
        return []
    value = parse_json(row["history"], "history")
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return read_turns(value, "history", row.notes)
    if not isinstance(value, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        raise BadRow("history: expected a list of [prompt, answer] pairs, or of turns", ignore_hint("history"))
    texts = [read_text(text, "history") for pair in value for text in pair]
    return [make_message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def read_row_tools(row: SourceRow) -> tuple[Row, ...]:
    """Return the tools of the column `tools`, or `functions` as older OpenAI files call it. Raises BadRow."""
    given = {name: read_tools(row[name], name) for name in TOOL_COLUMNS if not is_empty(row.peek(name))}
    if len(given) > 1 and given["tools"] != given["functions"]:
        raise BadRow("the columns tools and functions differ")
    return next(iter(given.values()), ())


def read_template_args(row: SourceRow) -> dict[str, Any] | None:
    """Return the template arguments in the column `chat_template_kwargs`. Raises BadRow."""
    (column,) = TEMPLATE_COLUMNS
    if is_empty(row.peek(column)):
        return None
    value = parse_json(row[column], column)
    if not isinstance(value, dict):
        raise BadRow(f'{column} is {type(value).__name__}, expected an object such as {{"enable_thinking": false}}')
    if taken := [name for name in value if name in RESERVED or name.startswith(("tokenize", "return_"))]:
        raise BadRow(f"{column} has {taken[0]!r}, which is no argument for a row to give")
    return {name: argument for name, argument in value.items() if argument is not None} or None
