"""Read tools and calls of tools, in the spellings of OpenAI, LLaMA-Factory, Anthropic and others, as chat templates
expect them: arguments as an object, each tool as {"type": "function", "function": {...}}."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from posttrain.data.bad_rows import BadRow, Row
from posttrain.data.cells import is_empty, parse_json
from posttrain.data.row_fields import FieldNotes, ignore_hint

ARGUMENT_NAMES = ("arguments", "parameters", "input", "args")
"""Names under which a call holds its arguments; the first one is ours."""
CALL_MARK = "<tool_call>"
"""What models write before a call in the templates of Qwen, Hermes and many others."""
_MARKED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)


def parse_calls(value: Any, where: str, notes: FieldNotes | None = None, place: str = "") -> list[dict[str, Any]]:
    """Return one or more calls.

    Args:
        value: A call, a list of calls, or either as JSON.
        where: What holds it, for messages.
        notes: Gets the fields that nothing reads.
        place: What precedes names of fields in notes.

    Raises:
        BadRow: It is no call, or invalid JSON.
    """
    value = parse_json(value, where)
    calls = [value] if isinstance(value, dict) else value
    if not isinstance(calls, list) or not calls:
        raise BadRow(f"{where}: expected a call with name and arguments, or a list of calls")
    return [read_call(parse_json(call, where), where, notes or FieldNotes(), place) for call in calls]


def calls_in_text(text: str, names: Collection[str]) -> tuple[str, list[dict[str, Any]]]:
    """Return the text of an answer beside its calls, and the calls that a model wrote in it.

    Calls are JSON between <tool_call> and </tool_call>, or an answer that is a call or a list of calls as a whole, as
    Llama and Mistral write it (their marks are special tokens, which a text is without). If one of them can't be read,
    the answer is text.

    Args:
        text: The answer, without special tokens.
        names: Names of the tools; an answer without marks is a call only if it calls these.
    """
    marked = _MARKED.findall(text)
    stripped = text.strip()
    if not marked and stripped[:1] not in ("{", "["):
        return text, []
    try:
        calls = [call for part in marked or [stripped] for call in parse_calls(json.loads(part), "the answer")]
    except (BadRow, ValueError, RecursionError):
        return text, []
    if not marked and not all(call["function"]["name"] in names for call in calls):
        return text, []
    return (_MARKED.sub("", text).strip() if marked else ""), calls


def read_call(call: Any, where: str, notes: FieldNotes, place: str) -> dict[str, Any]:
    """Return one call, given as {"function": {"name", "arguments"}} or as {"name", "arguments"}.

    Args:
        call: The call.
        where: What holds it, for messages.
        notes: Gets the fields that nothing reads.
        place: What precedes names of its fields in notes.

    Raises:
        BadRow: It has no name, or its arguments are no object.
    """
    function = call.get("function") if isinstance(call, dict) and not is_empty(call.get("function")) else call
    if isinstance(call, dict) and isinstance(function, str):  # {"function": "name", "arguments": ...}
        function = {"name": function, **{name: call.get(name) for name in ARGUMENT_NAMES}}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise BadRow(f"{where}: expected a call with name and arguments")
    if call.get("type") not in (None, "function", "tool_use", "tool_call"):
        raise BadRow(f"{where}: a call of type {call['type']!r}, expected function")
    given = [name for name in ARGUMENT_NAMES if function.get(name) is not None]
    if len(given) > 1:
        raise BadRow(f"{where}: the call of {function['name']!r} has {' and '.join(given)}")
    arguments = _arguments(function.get(given[0]) if given else None, function["name"], where)
    out: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    number = call.get("id")
    if not is_empty(number):
        if not isinstance(number, str | int) or isinstance(number, bool):
            raise BadRow(f"{where}: the id of a call is {type(number).__name__}, expected text")
        out = {"id": str(number), **out}
    inside = call.get("function") is function
    apart = {"name", *ARGUMENT_NAMES}
    notes.note_unread(call, {"id", "type", "function"} | (set() if inside else apart), place)
    if inside:
        notes.note_unread(function, apart, f"{place}function.")
    return out


def _arguments(value: Any, name: str, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        value = parse_json(value, f"{where}: arguments of {name!r}") if value.strip() else {}
    if value is None:
        return {}
    if not isinstance(value, dict):
        kind = "text" if isinstance(value, str) else type(value).__name__
        raise BadRow(f"{where}: arguments of {name!r} are {kind}, expected an object, also as JSON")
    return value


def read_tools(value: Any, column: str) -> tuple[Row, ...]:
    """Return the descriptions of tools in a column.

    Args:
        value: List of tools, or the same as JSON; each {"type": "function", "function": {...}}, the inner object alone,
            or such an object as JSON.
        column: Name of the column, for messages.

    Raises:
        BadRow: It is no such list, or a tool has no name.
    """
    if is_empty(value):
        return ()
    value = parse_json(value, column)
    tools = [value] if isinstance(value, dict) else value
    if not isinstance(tools, list | tuple):
        kind = type(value).__name__
        raise BadRow(f"{column} is {kind}, expected a list of tools, also as JSON", ignore_hint(column))
    return tuple(_tool(parse_json(tool, column), column) for tool in tools)


def _tool(tool: Any, column: str) -> Row:
    function = tool.get("function") if isinstance(tool, dict) and "function" in tool else tool
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise BadRow(f"{column}: expected tools with a name, each alone or under 'function'", ignore_hint(column))
    if tool.get("type") not in (None, "function", "custom"):
        raise BadRow(f"{column}: a tool of type {tool['type']!r}, expected function")
    if function is tool:
        tool = {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
        function = tool["function"]
    if function.keys() & {"input_schema"} and "parameters" not in function:  # Anthropic's name
        renamed = {"parameters" if name == "input_schema" else name: value for name, value in function.items()}
        tool, function = {**tool, "function": renamed}, renamed
    if isinstance(function.get("parameters"), str):
        schema = parse_json(function["parameters"], f"{column}: parameters of {function['name']!r}")
        if not isinstance(schema, dict):
            raise BadRow(f"{column}: parameters of {function['name']!r} are text, expected an object, also as JSON")
        tool = {**tool, "function": {**function, "parameters": schema}}
    return tool
