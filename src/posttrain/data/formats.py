"""Map rows to records: published layouts, recognised by their columns or named, and templates over any table."""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from posttrain.config import ClassesConfig, DataConfig
from posttrain.core.errors import DataError
from posttrain.core.types import Message
from posttrain.data.bad_rows import BadRow, FilteredRow, Row
from posttrain.data.readers import Table

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "instruction"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "bing", "bard", "output"), "assistant"),
    **dict.fromkeys(("tool", "function", "function_response", "observation", "ipython"), "tool"),
}


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
    map: Callable[[Row], Record]
    fits: Callable[[Row], bool] = lambda row: True


def required_field(row: Row, name: str) -> Any:
    """Return a field of a row. Raises BadRow if it is missing or null."""
    if row.get(name) is None:
        raise BadRow(f"missing field {name!r}")
    return row[name]


def make_message(role: Any, content: Any) -> Message:
    """Return one turn with one of our four roles; `content` is text or a list of text parts. Raises BadRow."""
    ours = ROLES.get(str(role).lower())
    if ours is None:
        raise BadRow(f"unknown role {role!r}", f"Known roles: {', '.join(sorted(ROLES))}")
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(p["text"] for p in content)
    if not isinstance(content, str):
        raise BadRow(f"content of the {role} turn is {type(content).__name__}, expected text")
    return {"role": ours, "content": content}


def read_turns(value: Any) -> list[Message]:
    """Return the turns of a list in either spelling: role and content, or from and value. Raises BadRow."""
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise BadRow("expected a list of turns, each with role and content")
    contents = (m["content"] if m.get("content") is not None else m.get("value") for m in value)
    return [make_message(m.get("role") or m.get("from"), content) for m, content in zip(value, contents, strict=True)]


def _conversation(prompt: Any, completion: Any) -> tuple[Message, ...]:
    """Return the turns of a prompt and a completion, each given as text or as turns."""
    parts = (("user", prompt, "prompt"), ("assistant", completion, "completion"))
    both = (
        read_turns(value) if isinstance(value, list) else [make_message(role, _text(value, name))]
        for role, value, name in parts
    )
    return tuple(m for turns in both for m in turns)


def _text(value: Any, name: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise BadRow(f"{name} is {type(value).__name__}, expected text")
    return value


def read_number(value: Any, name: str, finite: bool = False) -> float:
    """Return a cell as a number.

    Args:
        value: The cell.
        name: Name of the column, for messages.
        finite: Refuse infinity too.

    Raises:
        BadRow: The cell holds no number, or "nan".
    """
    try:
        out = float(value)
    except (TypeError, ValueError) as error:
        raise BadRow(f"{name} is {value!r}, expected a number") from error
    if math.isnan(out):
        raise BadRow(f"{name} is not a number")
    if finite and math.isinf(out):
        raise BadRow(f"{name} is {value!r}, expected a number that is finite")
    return out


def _extra(row: Row, *names: str) -> Row:
    return {n: row[n] for n in ("id", "choices", *names) if row.get(n) is not None}


def _pair_of(prompt: str, completion: str) -> Callable[[Row], Record]:
    """Return a mapping for a layout that is a column with the prompt and a column with the completion."""

    def mapping(row: Row) -> Record:
        messages = _conversation(required_field(row, prompt), required_field(row, completion))
        return Record(messages, extra=_extra(row, "rating"))

    return mapping


def _turns_of(column: str) -> Callable[[Row], Record]:
    return lambda row: Record(tuple(read_turns(required_field(row, column))), extra=_extra(row))


def _open_assistant_tree(row: Row) -> Record:
    """Map a row that `open_assistant` made of a tree."""
    if "missing_parent" in row:
        raise BadRow(f"its parent is not in the file: {row['missing_parent']}")
    if not row["messages"]:
        raise BadRow("no answer in this tree")
    return _turns_of("messages")(row)


def _verifiable(row: Row) -> Record:
    answer = required_field(row, "answer")
    return Record(_conversation(required_field(row, "prompt"), answer), extra={**_extra(row), "answer": answer})


def _rated(row: Row) -> Record:
    extra = {**_extra(row), "rating": required_field(row, "rating")}
    if row.get("completion") is not None:
        return Record(_conversation(required_field(row, "prompt"), row["completion"]), extra=extra)
    return Record(text=_text(required_field(row, "text"), "text"), extra=extra)


def _preference(row: Row) -> Record:
    """Map a pair to its chosen answer, as supervised fine-tuning reads it; the rejected one goes to `extra`."""
    chosen = required_field(row, "chosen")
    extra = {**_extra(row), "rejected": required_field(row, "rejected")}
    if not isinstance(chosen, list):
        return Record(_conversation(required_field(row, "prompt"), chosen), extra=extra)
    conversation = read_turns(chosen)
    whole = conversation[0]["role"] in ("system", "user")
    prompt = () if whole or row.get("prompt") is None else _conversation(row["prompt"], ".")[:-1]
    return Record((*prompt, *conversation), extra=extra)


def _ultrafeedback(row: Row) -> Record:
    """Map a row to the completion with the highest overall score, the first of equals."""
    completions = row_completions(row)
    if not completions:
        raise BadRow(NO_COMPLETIONS)
    best = max(completions, key=lambda c: read_number(c.get("overall_score") or 0, "overall_score"))
    messages = _conversation(required_field(row, "instruction"), required_field(best, "response"))
    return Record(messages, extra=_extra(row))


NO_COMPLETIONS = "completions: expected a list of objects, each with response and overall_score"


def row_completions(row: Row) -> list[Row]:
    """Return the completions of a row in the ultrafeedback layout. Raises BadRow."""
    completions = required_field(row, "completions")
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        raise BadRow(NO_COMPLETIONS)
    return completions


def _alpaca(row: Row) -> Record:
    prompt, more = _text(required_field(row, "instruction"), "instruction"), _text(row.get("input") or "", "input")
    if more.strip():
        prompt = f"{prompt}\n\n{more}"
    return Record(_conversation(prompt, required_field(row, "output")), extra=_extra(row))


def _hh(row: Row) -> Record:
    """Map the chosen one of two "\\n\\nHuman: …\\n\\nAssistant: …" dialogues."""
    messages: list[Message] = []
    for part in str(required_field(row, "chosen")).split("\n\nHuman:")[1:]:
        human, *answers = part.split("\n\nAssistant:")
        messages.append(make_message("user", human.strip()))
        messages.extend(make_message("assistant", a.strip()) for a in answers)
    if not messages:
        raise BadRow("no '\\n\\nHuman:' turn in it")
    return Record(tuple(messages), extra={**_extra(row), "rejected": required_field(row, "rejected")})


def _gsm8k(row: Row) -> Record:
    answer = _text(required_field(row, "answer"), "answer")
    final = answer.rsplit("####", 1)[-1].strip()
    return Record(_conversation(required_field(row, "question"), answer), extra={**_extra(row), "answer": final})


def _plain(row: Row) -> Record:
    return Record(text=_text(required_field(row, "text"), "text"), extra=_extra(row))


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


def open_assistant(table: Table) -> Table:
    """Make one conversation of each message tree, from the root along the best-ranked answers.

    A message whose parent is not in the file becomes a row with the parent's id as `missing_parent`.

    Raises:
        DataError: No message begins a tree.
    """
    known = {row.get("message_id") for row in table.rows}
    children: dict[Any, list[int]] = {}
    readable = [(i, row) for i, row in enumerate(table.rows) if i not in table.bad]
    for i, row in readable:
        children.setdefault(row.get("parent_id") or None, []).append(i)
    orphans = [i for parent, ids in children.items() if parent is not None and parent not in known for i in ids]
    out = Table(hashes=table.hashes)
    for root in sorted([*children.get(None, []), *orphans, *table.bad]):
        if root in table.bad:
            out.add(table.bad[root], table.places[root])
            continue
        out.places.append(table.places[root])
        if table.rows[root].get("parent_id"):
            out.rows.append({"missing_parent": table.rows[root]["parent_id"]})
            continue
        path = [root]
        while answers := set(children.get(table.rows[path[-1]].get("message_id") or "", ())) - set(path):
            path.append(min(answers, key=lambda i: (_rank(table.rows[i]), i)))
        turns = [{"role": table.rows[i].get("role"), "content": table.rows[i].get("text")} for i in path]
        while turns and ROLES.get(str(turns[-1]["role"]).lower()) != "assistant":
            turns.pop()  # a question that nobody answered teaches nothing
        out.rows.append({"messages": turns})
    if not out.rows:
        raise DataError("no message of this OpenAssistant file begins a tree: expected some without a parent_id")
    return out


def _rank(row: Row) -> float:
    try:
        return read_number(row.get("rank"), "rank")
    except BadRow:  # questions, and answers that nobody ranked, come last
        return math.inf


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
            out.append(_text(required_field(row, name), name))
    return "".join(out)


def check_templates(config: DataConfig, columns: set[str]) -> None:
    """Check that every {field} of the templates is a column. Raises DataError with the names of all columns."""
    if (config.prompt is None) != (config.completion is None):
        raise DataError("data.prompt and data.completion go together: give both templates, or neither")
    for name, template in (("prompt", config.prompt), ("completion", config.completion)):
        try:
            parts = [p for p in string.Formatter().parse(template or "") if p[1] is not None]
        except ValueError as error:
            raise DataError(f"data.{name}: {error}; write {{{{ and }}}} for braces that are meant as such") from error
        if any(spec or conversion for _, _, spec, conversion in parts):
            raise DataError(f"data.{name}: a field is a column's name alone, {{{parts[0][1]}}}, without !r or :.2f")
        unknown = [f for _, f, _, _ in parts if f not in columns]
        if unknown:
            raise DataError(f"data.{name} names {{{unknown[0]}}}, and the columns are {sorted(columns)}")


def to_record(row: Row, layout: str, config: DataConfig) -> Record:
    """Map one row, with the templates and the system message of the settings applied.

    Args:
        row: The row, with columns renamed.
        layout: Name of its layout; not used if the settings have templates.
        config: Settings of the data.

    Raises:
        BadRow: The row can't be used.
    """
    if config.prompt is not None and config.completion is not None:
        record = Record(_conversation(fill(config.prompt, row), fill(config.completion, row)), extra=_extra(row))
    else:
        record = LAYOUTS[layout].map(row)
    if config.system and record.messages:
        rest = record.messages[1:] if record.messages[0]["role"] == "system" else record.messages
        record = Record((make_message("system", config.system), *rest), extra=record.extra)
    return record
