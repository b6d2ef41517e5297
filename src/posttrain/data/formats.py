"""What a row is: the published layouts, recognised by their columns or named, each mapped to one record."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from posttrain.config import ClassesConfig, DataConfig
from posttrain.core.errors import DataError
from posttrain.core.types import Message
from posttrain.data.readers import Table

Row = dict[str, Any]
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "instruction"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "bing", "bard", "output"), "assistant"),
    **dict.fromkeys(("tool", "function", "function_response", "observation", "ipython"), "tool"),
}


class BadRow(Exception):
    """A row that can't be used, and why."""


@dataclass(frozen=True)
class Record:
    """One row, whatever it was laid out as: a conversation, or plain text, with what else it carried."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    extra: Row | None = None


@dataclass(frozen=True)
class Layout:
    """needs: columns that must be there. fits: whether a first row with these columns is of this layout."""

    needs: tuple[str, ...]
    map: Callable[[Row], Record]
    fits: Callable[[Row], bool] = lambda row: True


def field(row: Row, name: str) -> Any:
    """A field that must be there and not null."""
    if row.get(name) is None:
        raise BadRow(f"missing field {name!r}")
    return row[name]


def message(role: Any, content: Any) -> Message:
    """One turn, its role in our words; content may be a list of text parts."""
    if str(role).lower() not in ROLES:
        raise BadRow(f"unknown role {role!r} (known: {', '.join(sorted(ROLES))})")
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(p["text"] for p in content)
    if not isinstance(content, str):
        raise BadRow(f"content of the {role} turn is {type(content).__name__}, expected text")
    return {"role": ROLES[str(role).lower()], "content": content}


def turns(value: Any) -> list[Message]:
    """A list of turns in either spelling: role and content, or from and value."""
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise BadRow("expected a list of turns, each with role and content")
    out = []
    for m in value:
        content = m["content"] if m.get("content") is not None else m.get("value")
        out.append(message(m.get("role") or m.get("from"), content))
    return out


def _conversation(prompt: Any, completion: Any) -> tuple[Message, ...]:
    """Prompt and completion, each as text or as turns."""
    before = turns(prompt) if isinstance(prompt, list) else [message("user", _text(prompt, "prompt"))]
    after = (
        turns(completion) if isinstance(completion, list) else [message("assistant", _text(completion, "completion"))]
    )
    return (*before, *after)


def _text(value: Any, name: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise BadRow(f"{name} is {type(value).__name__}, expected text")
    return value


def number(value: Any, name: str) -> float:
    """A cell as a number. Raises BadRow where it is none, "nan" included."""
    try:
        out = float(value)
    except (TypeError, ValueError) as error:
        raise BadRow(f"{name} is {value!r}, expected a number") from error
    if out != out:
        raise BadRow(f"{name} is not a number")
    return out


def finite(value: Any, name: str) -> float:
    """The same, and no infinity."""
    out = number(value, name)
    if out in (float("inf"), float("-inf")):
        raise BadRow(f"{name} is {value!r}, expected a number that is finite")
    return out


def _extra(row: Row, *names: str) -> Row:
    return {n: row[n] for n in ("id", "choices", *names) if row.get(n) is not None}


def _messages(row: Row) -> Record:
    return Record(tuple(turns(field(row, "messages"))), extra=_extra(row))


def _tree(row: Row) -> Record:
    """What `open_assistant` made of a tree."""
    if "without" in row:
        raise BadRow(f"its parent is not in the file: {row['without']}")
    if not row["messages"]:
        raise BadRow("no answer in this tree")
    return _messages(row)


def _prompt_completion(row: Row) -> Record:
    return Record(_conversation(field(row, "prompt"), field(row, "completion")), extra=_extra(row, "rating"))


def _verifiable(row: Row) -> Record:
    answer = field(row, "answer")
    return Record(_conversation(field(row, "prompt"), answer), extra={**_extra(row), "answer": answer})


def _rated(row: Row) -> Record:
    rating = {"rating": field(row, "rating")}
    if row.get("completion") is not None:
        return Record(_conversation(field(row, "prompt"), row["completion"]), extra=_extra(row) | rating)
    return Record(text=_text(field(row, "text"), "text"), extra=_extra(row) | rating)


def _preference(row: Row) -> Record:
    """For supervised fine-tuning a pair is its chosen answer; the rejected one goes along."""
    chosen, rejected = field(row, "chosen"), field(row, "rejected")
    extra = {**_extra(row), "rejected": rejected}
    if isinstance(chosen, list):
        conversation = turns(chosen)
        starts = conversation[0]["role"] in ("system", "user")
        prompt = [] if starts or row.get("prompt") is None else list(_conversation(row["prompt"], "."))[:-1]
        return Record((*prompt, *conversation), extra=extra)
    return Record(_conversation(field(row, "prompt"), chosen), extra=extra)


def _ultrafeedback(row: Row) -> Record:
    """The completion with the highest overall score; the first of equals."""
    completions = field(row, "completions")
    if not isinstance(completions, list) or not completions or not all(isinstance(c, dict) for c in completions):
        raise BadRow("completions: expected a list of objects, each with response and overall_score")
    best = max(completions, key=lambda c: number(c.get("overall_score") or 0, "overall_score"))
    return Record(_conversation(field(row, "instruction"), field(best, "response")), extra=_extra(row))


def _alpaca(row: Row) -> Record:
    instruction, given = _text(field(row, "instruction"), "instruction"), _text(row.get("input") or "", "input")
    prompt = f"{instruction}\n\n{given}" if given.strip() else instruction
    return Record(_conversation(prompt, field(row, "output")), extra=_extra(row))


def _sharegpt(row: Row) -> Record:
    return Record(tuple(turns(field(row, "conversations"))), extra=_extra(row))


def _hh(row: Row) -> Record:
    """ "\\n\\nHuman: …\\n\\nAssistant: …" dialogues; the chosen one."""
    text = str(field(row, "chosen"))
    out: list[Message] = []
    for part in text.split("\n\nHuman:")[1:]:
        human, *answers = part.split("\n\nAssistant:")
        out.append(message("user", human.strip()))
        out.extend(message("assistant", a.strip()) for a in answers)
    if not out:
        raise BadRow("no '\\n\\nHuman:' turn in it")
    return Record(tuple(out), extra={**_extra(row), "rejected": field(row, "rejected")})


def _gsm8k(row: Row) -> Record:
    answer = _text(field(row, "answer"), "answer")
    final = answer.rsplit("####", 1)[-1].strip()
    return Record(_conversation(field(row, "question"), answer), extra={**_extra(row), "answer": final})


def _flan(row: Row) -> Record:
    return Record(_conversation(field(row, "inputs"), field(row, "targets")), extra=_extra(row))


def _plain(row: Row) -> Record:
    return Record(text=_text(field(row, "text"), "text"), extra=_extra(row))


LAYOUTS: dict[str, Layout] = {
    "hh_rlhf": Layout(("chosen", "rejected"), _hh, lambda r: str(r["chosen"]).startswith("\n\nHuman:")),
    "preference": Layout(("chosen", "rejected"), _preference),
    "messages": Layout(("messages",), _messages),
    "sharegpt": Layout(("conversations",), _sharegpt),
    "ultrafeedback": Layout(("instruction", "completions"), _ultrafeedback),
    "openassistant": Layout(("message_id", "parent_id", "text", "role"), _tree),
    "rated": Layout(("rating", "text"), _rated),
    "prompt_completion": Layout(("prompt", "completion"), _prompt_completion),
    "alpaca": Layout(("instruction", "output"), _alpaca),
    "gsm8k": Layout(("question", "answer"), _gsm8k, lambda r: "####" in str(r["answer"])),
    "verifiable": Layout(("prompt", "answer"), _verifiable),
    "flan": Layout(("inputs", "targets"), _flan),
    "text": Layout(("text",), _plain),
}
"""In the order in which they are tried: the more telling columns first."""


def recognise(row: Row, asked: str) -> str:
    """The layout of a table by its first row, or the one asked for once its columns are there.

    Raises DataError with the columns that were found and those that each layout needs.
    """
    names = [asked] if asked != "auto" else list(LAYOUTS)
    for name in names:
        layout = LAYOUTS[name]
        alternative = name == "rated" and {"rating", "prompt", "completion"} <= row.keys()
        if (alternative or all(c in row for c in layout.needs)) and (asked != "auto" or layout.fits(row)):
            return name
    wants = "; ".join(f"{n}: {', '.join(LAYOUTS[n].needs)}" for n in names)
    near = max(LAYOUTS, key=lambda n: (len(set(LAYOUTS[n].needs) & row.keys()) / len(LAYOUTS[n].needs), n))
    hint = f" The nearest is {near}." if asked == "auto" and set(LAYOUTS[near].needs) & row.keys() else ""
    raise DataError(
        f"the columns {sorted(row)} are no known layout ({wants}).{hint} Rename columns (data.columns: {{prompt: "
        "question}), or make instructions of any table with data.prompt and data.completion templates"
    )


def open_assistant(table: Table) -> Table:
    """Message trees → one conversation a tree: from the root along the best-ranked answers.

    A message whose parent is not in the file becomes a row that says so (`without`), and no conversation.
    """
    known = {row.get("message_id") for row in table.rows}
    children: dict[Any, list[int]] = {}
    for i, row in enumerate(table.rows):
        children.setdefault(row.get("parent_id") or None, []).append(i)
    out = Table(hashes=table.hashes)
    orphans = [i for parent, found in children.items() if parent is not None and parent not in known for i in found]
    for root in sorted([*children.get(None, []), *orphans]):
        out.places.append(table.places[root])
        if table.rows[root].get("parent_id"):
            out.rows.append({"without": table.rows[root]["parent_id"]})
            continue
        path: list[int] = [root]
        at: int | None = root
        while at is not None:
            follow = set(children.get(table.rows[at].get("message_id") or "", ())) - set(path)
            at = min(follow, key=lambda i: (_rank(table.rows[i]), i), default=None)
            path.extend([] if at is None else [at])
        said = [{"role": table.rows[i].get("role"), "content": table.rows[i].get("text")} for i in path]
        while said and ROLES.get(str(said[-1]["role"]).lower()) != "assistant":
            said.pop()  # a question that nobody answered teaches nothing
        out.rows.append({"messages": said})
    if not out.rows:
        raise DataError("no message of this OpenAssistant file begins a tree: expected some without a parent_id")
    return out


def _rank(row: Row) -> float:
    try:
        return number(row.get("rank"), "rank")
    except BadRow:  # questions, and answers that nobody ranked, come last
        return float("inf")


def label(row: Row, classes: ClassesConfig) -> str | None:
    """The class of a row's number; None within the margin of a cut. Raises BadRow where it is no number."""
    value = number(field(row, classes.column), classes.column)
    if classes.margin and any(abs(value - cut) < classes.margin for cut in classes.cuts):
        return None
    return classes.names[sum(value >= cut for cut in classes.cuts)]


def fill(template: str, row: Row) -> str:
    """A template with {column} fields filled from the row. Raises BadRow for a missing value."""
    out = []
    for text, name, _, _ in string.Formatter().parse(template):
        out.append(text)
        if name is not None:
            out.append(_text(field(row, name), name))
    return "".join(out)


def check_templates(config: DataConfig, columns: set[str]) -> None:
    """Every {field} of the templates must be a column. Raises DataError with the columns there are."""
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
    """Map one row, with templates and system message applied."""
    if config.prompt is not None and config.completion is not None:
        record = Record(_conversation(fill(config.prompt, row), fill(config.completion, row)), extra=_extra(row))
    else:
        record = LAYOUTS[layout].map(row)
    if config.system and record.messages:
        rest = record.messages[1:] if record.messages[0]["role"] == "system" else record.messages
        record = Record((message("system", config.system), *rest), extra=record.extra)
    return record
