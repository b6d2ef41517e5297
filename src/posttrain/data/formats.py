"""Map rows to records: published layouts, recognised by their columns or named, and templates over any table."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.config import ClassesConfig, DataConfig
from posttrain.core.errors import DataError
from posttrain.core.types import Message
from posttrain.data.bad_rows import BadRow, FilteredRow, Row
from posttrain.data.cells import (
    is_missing,
    missing_field,
    parse_json,
    read_number,
    read_text,
    required_field,
)
from posttrain.data.image_turns import IMAGE_COLUMNS, has_images, place_images
from posttrain.data.row_context import add_context, read_row_tools, read_template_args
from posttrain.data.row_fields import SourceRow, refuse_columns, source_row
from posttrain.data.turns import make_message, read_turns


@dataclass(frozen=True)
class Record:
    """Hold one row of any layout: a conversation, or plain text.

    Attributes:
        messages: Turns of the conversation; empty for plain text.
        text: Plain text; None for a conversation.
        extra: Other fields of the row that a method or a report uses.
        tools: Descriptions (JSON schema) of the tools that the conversation may call, for the chat template.
        template_args: Arguments of the chat template for this row (column `chat_template_kwargs`), such as
            enable_thinking.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    extra: Row | None = None
    tools: tuple[Row, ...] = ()
    template_args: Row | None = None


@dataclass(frozen=True)
class RowLayout:
    """Describe a published layout.

    Attributes:
        needs: Columns that are required.
        map: Makes the record of a row; raises BadRow.
        fits: Returns False if a first row with these columns is of another layout.
    """

    needs: tuple[str, ...]
    map: Callable[[SourceRow], Record]
    fits: Callable[[Row], bool] = lambda row: True


def _part(row: SourceRow, value: Any, role: str, name: str) -> list[Message]:
    """Return the turns of a column that holds text, one turn, or a list of turns."""
    if isinstance(value, dict) and value.keys() & {"role", "from"}:
        value = [value]
    if isinstance(value, list):
        return read_turns(value, name, row.notes)
    text = read_text(value, name)
    return [make_message(role, text)]


def _exchange(row: SourceRow, prompt: str, completion: str) -> tuple[Message, ...]:
    """Return the turns of a column with the prompt and a column with the completion."""
    asked = _part(row, required_field(row, prompt), "user", prompt)
    return (*asked, *_part(row, required_field(row, completion), "assistant", completion))


def _extra(row: SourceRow, *names: str) -> Row:
    """Return fields that stay with the record; nothing is trained on them, so they don't count as read."""
    return {n: row.peek(n) for n in ("id", "choices", *names) if row.peek(n) is not None}


def _required_extra(row: SourceRow, name: str) -> Row:
    if is_missing(row.peek(name)):
        raise missing_field(name, row.peek(name))
    return _extra(row, name)


def _pair_of(prompt: str, completion: str) -> Callable[[SourceRow], Record]:
    """Return a mapping for a layout that is a column with the prompt and a column with the completion."""
    return lambda row: Record(_exchange(row, prompt, completion), extra=_extra(row, "rating"))


def _turns_of(column: str) -> Callable[[SourceRow], Record]:
    return lambda row: Record(tuple(read_turns(required_field(row, column), column, row.notes)), extra=_extra(row))


def _open_assistant_tree(row: SourceRow) -> Record:
    """Map a row that `open_assistant` made of a tree."""
    if not row["messages"]:
        raise BadRow("no answer in this tree")
    return _turns_of("messages")(row)


def _verifiable(row: SourceRow) -> Record:
    return Record(_exchange(row, "prompt", "answer"), extra={**_extra(row), "answer": row["answer"]})


def _rated(row: SourceRow) -> Record:
    extra = _required_extra(row, "rating")
    if not is_missing(row.peek("completion")) or ("completion" in row and is_missing(row.peek("text"))):
        return Record(_exchange(row, "prompt", "completion"), extra=extra)
    return Record(text=_plain_text(row), extra=extra)


def _preference(row: SourceRow) -> Record:
    """Map a pair to its chosen answer, as supervised fine-tuning reads it; the rejected one goes to `extra`."""
    chosen = required_field(row, "chosen")
    extra = _required_extra(row, "rejected")
    answer = _part(row, chosen, "assistant", "chosen")
    if answer[0]["role"] not in ("system", "user"):
        answer = [*_prompt_turns(row, needed=isinstance(chosen, str)), *answer]
    return Record(tuple(answer), extra=extra)


PROMPT_COLUMNS = ("prompt", "instruction", "question", "inputs", "conversations", "messages")
"""Columns that can hold the prompt of a pair; the first one with a value does."""


def _prompt_turns(row: SourceRow, needed: bool) -> list[Message]:
    column = next((name for name in PROMPT_COLUMNS if not is_missing(row.peek(name))), None)
    if column is None:
        if needed:
            raise missing_field("prompt", row.peek("prompt"))
        return []
    if column in ("conversations", "messages"):
        return read_turns(row[column], column, row.notes)
    if column == "instruction":
        return [make_message("user", _instruction(row))]
    return _part(row, row[column], "user", column)


def _ultrafeedback(row: SourceRow) -> Record:
    """Map a row to the completion with the highest overall score, the first of equals."""
    completions = row_completions(row)
    if not completions:
        raise BadRow(NO_COMPLETIONS)
    best = max(completions, key=lambda c: read_number(c.get("overall_score") or 0, "overall_score"))
    asked = _part(row, required_field(row, "instruction"), "user", "instruction")
    return Record((*asked, *_part(row, required_field(best, "response"), "assistant", "response")), extra=_extra(row))


NO_COMPLETIONS = "completions: expected a list of objects, each with response and overall_score"


def row_completions(row: Row) -> list[Row]:
    """Return the completions of a row in the ultrafeedback layout. Raises BadRow."""
    completions = parse_json(required_field(row, "completions"), "completions")
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        raise BadRow(NO_COMPLETIONS)
    if isinstance(row, SourceRow):
        for completion in completions:
            row.notes.note_unread(completion, {"response", "overall_score"}, "completions[].")
    return completions


def _instruction(row: SourceRow) -> str:
    """Return the prompt of Alpaca's columns: the instruction, and its input if there is one."""
    prompt = read_text(required_field(row, "instruction"), "instruction")
    more = "" if is_missing(row.get("input")) else read_text(row["input"], "input")
    return f"{prompt}\n\n{more}" if more.strip() else prompt


def _alpaca(row: SourceRow) -> Record:
    asked = make_message("user", _instruction(row))
    return Record((asked, *_part(row, required_field(row, "output"), "assistant", "output")), extra=_extra(row))


def _hh(row: SourceRow) -> Record:
    """Map the chosen one of two "\\n\\nHuman: …\\n\\nAssistant: …" dialogues."""
    messages: list[Message] = []
    for part in str(required_field(row, "chosen")).split("\n\nHuman:")[1:]:
        human, *answers = part.split("\n\nAssistant:")
        messages.append(make_message("user", human.strip()))
        messages.extend(make_message("assistant", a.strip()) for a in answers)
    if not messages:
        raise BadRow("no '\\n\\nHuman:' turn in it")
    return Record(tuple(messages), extra=_required_extra(row, "rejected"))


def _gsm8k(row: SourceRow) -> Record:
    messages = _exchange(row, "question", "answer")
    final = read_text(row["answer"], "answer").rsplit("####", 1)[-1].strip()
    return Record(messages, extra={**_extra(row), "answer": final})


def _plain_text(row: SourceRow) -> str:
    text = read_text(required_field(row, "text"), "text")
    return text


def _plain(row: SourceRow) -> Record:
    return Record(text=_plain_text(row), extra=_extra(row))


LAYOUTS: dict[str, RowLayout] = {
    "hh_rlhf": RowLayout(("chosen", "rejected"), _hh, lambda r: str(r["chosen"]).startswith("\n\nHuman:")),
    "preference": RowLayout(("chosen", "rejected"), _preference),
    "messages": RowLayout(("messages",), _turns_of("messages")),
    "sharegpt": RowLayout(("conversations",), _turns_of("conversations")),
    "ultrafeedback": RowLayout(("instruction", "completions"), _ultrafeedback),
    "openassistant": RowLayout(("message_id", "parent_id", "text", "role"), _open_assistant_tree),
    "rated": RowLayout(("rating", "text"), _rated),
    "prompt_completion": RowLayout(("prompt", "completion"), _pair_of("prompt", "completion")),
    "alpaca": RowLayout(("instruction", "output"), _alpaca),
    "gsm8k": RowLayout(("question", "answer"), _gsm8k, lambda r: "####" in str(r["answer"])),
    "verifiable": RowLayout(("prompt", "answer"), _verifiable),
    "flan": RowLayout(("inputs", "targets"), _pair_of("inputs", "targets")),
    "text": RowLayout(("text",), _plain),
}
"""Layouts in the order in which they are tried: the more specific columns first."""


def recognise(row: Row, wanted: str) -> str:
    """Return the name of a table's layout, found by its first row.

    Args:
        row: First row of the table.
        wanted: Name of a layout, whose columns are checked, or "auto".

    Raises:
        DataError: No layout fits; the message has the columns of the row and those that each layout needs.
    """
    names = list(LAYOUTS) if wanted == "auto" else [wanted]
    for name in names:
        layout = LAYOUTS[name]
        alternative = name == "rated" and {"rating", "prompt", "completion"} <= row.keys()
        if (alternative or all(c in row for c in layout.needs)) and (wanted != "auto" or layout.fits(row)):
            return name
    wants = "; ".join(f"{n}: {', '.join(LAYOUTS[n].needs)}" for n in names)
    near = max(LAYOUTS, key=lambda n: (len(set(LAYOUTS[n].needs) & row.keys()) / len(LAYOUTS[n].needs), n))
    hint = f" The nearest is {near}." if wanted == "auto" and set(LAYOUTS[near].needs) & row.keys() else ""
    raise DataError(
        f"the columns {sorted(row)} are no known layout ({wants}).{hint} Rename columns (data.columns: {{prompt: "
        "question}), or make instructions of any table with data.prompt and data.completion templates"
    )


def class_label(row: Row, classes: ClassesConfig) -> str:
    """Return the class of a row's number. Raises BadRow if it is no number, FilteredRow within the margin of a cut."""
    value = read_number(required_field(row, classes.column), classes.column)
    if classes.margin and any(abs(value - cut) < classes.margin for cut in classes.cuts):
        raise FilteredRow
    return classes.names[sum(value >= cut for cut in classes.cuts)]


def fill(template: str, row: Row) -> str:
    """Return a template with its {column} fields filled from the row. Raises BadRow for a missing value."""
    out = []
    for text, name, _, _ in string.Formatter().parse(template):
        out.append(text)
        if name is not None:
            out.append(read_text(required_field(row, name), name))
    return "".join(out)


def check_templates(config: DataConfig, columns: set[str]) -> None:
    """Check that every {field} of the templates is a column. Raises DataError with the names of all columns."""
    if (config.prompt is None) != (config.completion is None):
        raise DataError("data.prompt and data.completion go together: give both templates, or neither")
    made = {"label"} if config.classes else set()
    templates = {"prompt": (config.prompt, columns | made), "completion": (config.completion, columns | made)}
    if config.passages is not None:
        if "passages" in columns:
            raise DataError("data.passages makes the field passages, and the rows have it: rename it by data.columns")
        if "{passages}" not in (config.prompt or ""):
            raise DataError(
                "data.passages has no effect if data.prompt does not name {passages}: give data.prompt, such as "
                '"{passages} {question}", and data.completion'
            )
        templates["prompt"][1].add("passages")
        templates["passages.query"] = (config.passages.query, columns | made)
    for name, (template, known) in templates.items():
        try:
            parts = [p for p in string.Formatter().parse(template or "") if p[1] is not None]
        except ValueError as error:
            raise DataError(f"data.{name}: {error}; write {{{{ and }}}} for braces that are meant as such") from error
        if any(spec or conversion for _, _, spec, conversion in parts):
            raise DataError(f"data.{name}: a field is a column's name alone, {{{parts[0][1]}}}, without !r or :.2f")
        unknown = [f for _, f, _, _ in parts if f not in known]
        if unknown:
            raise DataError(f"data.{name} names {{{unknown[0]}}}, and the columns are {sorted(known)}")


def to_record(row: Row, layout: str, config: DataConfig) -> Record:
    """Map one row, with the templates and the system message of the settings applied.

    Args:
        row: The row, with columns renamed.
        layout: Name of its layout; not used if the settings have templates.
        config: Settings of the data.

    Raises:
        BadRow: The row can't be used.
    """
    own = source_row(row, config.ignore)
    own.notes.images = True
    if config.prompt is not None and config.completion is not None:
        asked, answer = make_message("user", fill(config.prompt, own)), fill(config.completion, own)
        system = [make_message("system", config.system)] if config.system else []
        turns = _with_images((*system, asked, make_message("assistant", answer)), own, config)
        return Record(turns, extra=_extra(own))
    record = LAYOUTS[layout].map(own)
    if record.text is not None:
        refuse_columns(own, frozenset(IMAGE_COLUMNS))
        return record
    messages = _with_images(add_context(record.messages, own, config.system), own, config)
    _check_train_flags(messages, config)
    return replace(record, messages=messages, tools=read_row_tools(own), template_args=read_template_args(own))


def _with_images(messages: tuple[Message, ...], row: SourceRow, config: DataConfig) -> tuple[Message, ...]:
    """Return the turns with the pictures of the row. Raises BadRow."""
    return place_images(messages, row, config) if has_images(messages, row) else messages


def _check_train_flags(messages: Sequence[Message], config: DataConfig) -> None:
    """Refuse a flag that asks for loss outside of the assistant's turns, unless all turns have one."""
    for i, message in enumerate(messages):
        if message.get("train") and config.loss_on != "all":
            raise BadRow(
                f"a turn of the {message['role']} asks for loss (turn {i + 1})",
                "Loss is on turns of the assistant, or with data.loss_on: all on every turn; data.ignore: [NAME OF THE "
                "FLAG] leaves such flags out",
            )
        if "train" in message and message["train"]:
            del message["train"]
