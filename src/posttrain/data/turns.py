"""Read turns of conversations in the spellings of OpenAI, ShareGPT, LLaMA-Factory, Anthropic, axolotl and others.

Every reader of rows uses these functions, so that a turn means the same in all of them. What a turn may hold is stated
in `posttrain.core.types.Message`; other fields are counted as unread, or refused if other programs act on them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.core.image_tokens import IMAGE_MARK
from posttrain.core.types import Message
from posttrain.data.bad_rows import BadRow
from posttrain.data.cells import is_empty, is_missing, parse_json
from posttrain.data.pictures import Picture
from posttrain.data.row_fields import MEDIA, TURN_FIELDS, FieldNotes, changes_meaning, ignore_hint
from posttrain.data.tool_calls import parse_calls, read_call

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "instruction"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatbot", "model", "chatgpt", "bing", "bard", "output"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **dict.fromkeys(("function_response", "function_result", "tool_response", "tool_result"), "tool"),
}
CALL_ROLES = ("function_call", "tool_call")
"""Roles of turns whose text is a call as JSON."""
REASONING = ("reasoning_content", "reasoning", "thinking")
TRAIN_FLAGS = ("train", "training", "trainable", "loss")
MASK_FLAGS = ("mask", "masked")
REFUSED_FIELDS = TURN_FIELDS | MEDIA
ASSISTANT_FIELDS = frozenset(("tool_calls", "function_call", *REASONING))
KNOWN_FIELDS = frozenset(("role", "from", "content", "value", "name", "weight", *TRAIN_FLAGS, *MASK_FLAGS))
KNOWN_FIELDS |= REFUSED_FIELDS | ASSISTANT_FIELDS
TEXT_PARTS = ("text", "input_text", "output_text")
THINKING_PARTS = ("thinking", "reasoning")
IMAGE_PARTS = ("image", "image_url", "input_image")
IMAGE_FIELDS = ("image", "image_url", "url", "path", "base64", "bytes", "source")
"""Fields of a part in which the picture is; without one it is in the row's column `images`."""
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


def make_message(role: Any, content: Any) -> Message:
    """Return one turn with one of our four roles; `content` is text or a list of text parts. Raises BadRow."""
    return read_turn({"role": role, "content": content})[0]


def read_turns(value: Any, name: str = "messages", notes: FieldNotes | None = None) -> list[Message]:
    """Return the turns of a conversation.

    Args:
        value: List of turns, each an object with role and content or from and value; or such a list as JSON.
        name: Name of the column, for messages and notes.
        notes: Gets the fields of turns that nothing reads.

    Raises:
        BadRow: The value is no conversation, or a turn can't be used.
    """
    value = _as_list(parse_json(value, name))
    if not isinstance(value, list | tuple) or not value or not all(isinstance(turn, dict) for turn in value):
        raise BadRow("expected a list of turns, each with role and content")
    notes = FieldNotes() if notes is None else notes
    return [message for i, turn in enumerate(value) for message in read_turn(turn, f"{name}[].", i + 1, notes)]


def read_turn(turn: dict[str, Any], place: str = "", number: int = 0, notes: FieldNotes | None = None) -> list[Message]:
    """Return one turn; several if it holds results of tools, as Anthropic's user turns do.

    Args:
        turn: The turn.
        place: What precedes names of its fields in notes, such as `messages[].`.
        number: Its number in the conversation, from 1, for messages; 0 if it is alone.
        notes: Gets the fields that nothing reads.

    Raises:
        BadRow: The turn can't be used.
    """
    if plain := _plain_turn(turn) or _read_before(turn):
        return [plain]
    notes = FieldNotes() if notes is None else notes
    turn = notes.without_ignored(turn, place)
    where = f" (turn {number})" if number else ""
    role, spelling = _role(turn, where)
    _refuse_fields(turn, role, where)
    parts = _Parts(role, where, place, notes)
    content = _one_of(turn, ("content", "value"), where)
    if spelling in CALL_ROLES:
        thought = _THOUGHT.match(content) if isinstance(content, str) else None
        parts.reasoning += [thought[1].strip("\n")] if thought else []
        parts.calls += parse_calls(content[thought.end() :] if thought else content, f"the {spelling} turn{where}")
    elif not is_missing(content):
        parts.add(content)
    _add_fields(turn, parts)
    messages = parts.messages()
    trained = _trained(turn, role, where)
    for message in messages:
        if not is_empty(turn.get("name")):
            message["name"] = _named(turn["name"], "name", where)
        if role == "tool" and not is_empty(turn.get("tool_call_id")):
            message["tool_call_id"] = _named(turn["tool_call_id"], "tool_call_id", where)
        if trained is not None:
            message["train"] = trained
    notes.note_unread(turn, KNOWN_FIELDS | {"tool_call_id"} if role == "tool" else KNOWN_FIELDS, place)
    return messages


def _plain_turn(turn: dict[str, Any]) -> Message | None:
    """Return a turn with a role and a text and nothing else, as most are; None for any other."""
    if len(turn) != 2:
        return None
    role = turn.get("role") or turn.get("from")
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    if not isinstance(role, str) or not isinstance(content, str) or role.lower() in CALL_ROLES:
        return None
    ours = ROLES.get(role.lower())
    return None if ours is None else {"role": ours, "content": content}


def _read_before(turn: dict[str, Any]) -> Message | None:
    """Return a turn with pictures that was read already; None for any other."""
    images = turn.get("images")
    return {**turn} if images and isinstance(images, list) and isinstance(images[0], Picture) else None  # type: ignore[return-value]


def answer_text(message: Message | Mapping[str, Any]) -> str:
    """Return what a turn says as text for reports and judges: its content, then its calls as JSON, one a line."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join([*([message["content"]] if message["content"] else []), *calls])


def says_nothing(message: Message) -> bool:
    """Return True for a turn without text, reasoning and calls."""
    return not (message["content"].strip() or message.get("reasoning_content") or message.get("tool_calls"))


def without_flags(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return turns without their flags on loss, which have no meaning where no turn of a prompt has loss."""
    return tuple({k: v for k, v in m.items() if k != "train"} for m in messages)  # type: ignore[misc]


def _as_list(value: Any) -> Any:
    """Return a conversation that is an object of lists ({"role": [...], "content": [...]}) as a list of turns."""
    if not isinstance(value, dict) or not value.keys() & {"role", "from"}:
        return value
    if not all(isinstance(cells, list) for cells in value.values()) or len({len(c) for c in value.values()}) > 1:
        return value
    return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]


def _role(turn: dict[str, Any], where: str) -> tuple[str, str]:
    """Return the role of a turn, and how the row spells it."""
    given = [turn[name] for name in ("role", "from") if not is_missing(turn.get(name))]
    if not given:
        raise BadRow(f"a turn has no role{where}")
    ours = [ROLES.get(name.lower()) if isinstance(name, str) else None for name in given]
    if None in ours:
        raise BadRow(f"unknown role {given[ours.index(None)]!r}", f"Known roles: {', '.join(sorted(ROLES))}")
    if len(set(ours)) > 1:
        raise BadRow(f"a turn has two roles{where}: role {given[0]!r} and from {given[1]!r}")
    return str(ours[0]), given[0].lower()


def _refuse_fields(turn: dict[str, Any], role: str, where: str) -> None:
    """Refuse fields that other programs act on."""
    for name in sorted(REFUSED_FIELDS & turn.keys()):
        if changes_meaning(name, turn[name]):
            raise BadRow(f"{name!r} of a turn is not supported{where}", ignore_hint(name))
    if role == "assistant":
        return
    for name in sorted(ASSISTANT_FIELDS & turn.keys()):
        if not is_empty(turn[name]):
            raise BadRow(f"{name!r} belongs to a turn of the assistant{where}: here the turn is the {role}'s")


def _one_of(turn: dict[str, Any], names: Sequence[str], where: str) -> Any:
    """Return the value of whichever of these fields is given; None if none is. Raises BadRow if two differ."""
    given = {name: turn[name] for name in names if not is_missing(turn.get(name))}
    first = next(iter(given.values()), None)
    if any(value != first for value in given.values()):
        raise BadRow(f"a turn has {' and '.join(given)}, which differ{where}")
    return first


def _named(value: Any, name: str, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise BadRow(f"{name} of a turn is {type(value).__name__}, expected text{where}")
    return value


def _add_fields(turn: dict[str, Any], parts: _Parts) -> None:
    """Add reasoning and calls that stand in fields beside the content."""
    given = {name: turn[name] for name in REASONING if not is_empty(turn.get(name))}
    for name, value in given.items():
        if not isinstance(value, str):
            raise BadRow(f"{name} of a turn is {type(value).__name__}, expected text{parts.where}")
    if len({"".join(parts.reasoning), *given.values()} - {""}) > 1:
        raise BadRow(f"a turn has reasoning twice, which differs{parts.where}")
    parts.reasoning = list(given.values())[:1] or parts.reasoning
    for name in ("tool_calls", "function_call"):
        if not is_empty(turn.get(name)):
            if parts.calls:
                raise BadRow(f"a turn has calls in two places, one of them {name}{parts.where}")
            place = f"{parts.place}{name}[]."
            parts.calls += parse_calls(turn[name], f"{name} of a turn{parts.where}", parts.notes, place)


class _Parts:
    """Collect the parts of one turn.

    Attributes:
        text: Parts of its text.
        reasoning: Parts of its reasoning.
        calls: Its calls.
        results: Turns with the results of tools.
        images: Its pictures as the row gives them, None for one that is in a column.
    """

    def __init__(self, role: str, where: str, place: str, notes: FieldNotes) -> None:
        self.role, self.where, self.place, self.notes = role, where, place, notes
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.results: list[Message] = []
        self.images: list[Any] = []

    def add(self, content: Any) -> None:
        """Add the content of the turn: text, a part, or a list of parts."""
        if isinstance(content, str):
            self.text.append(content)
            return
        parts = [content] if isinstance(content, dict) and "type" in content else content
        if not isinstance(parts, list | tuple):
            hint = "Write the result of a tool as text, for example as JSON" if self.role == "tool" else ""
            kind = type(content).__name__
            raise BadRow(f"content of the {self.role} turn is {kind}, expected text{self.where}", hint)
        for part in parts:
            if isinstance(part, str):
                self.text.append(part)
            elif isinstance(part, dict):
                self._add_part(part)
            else:
                raise BadRow(
                    f"content of the {self.role} turn is a list with {type(part).__name__} in it, expected text or "
                    f"parts with a type{self.where}"
                )

    def _add_part(self, part: dict[str, Any]) -> None:
        kind = part.get("type") if isinstance(part.get("type"), str) else "text" if "text" in part else None
        place = f"{self.place}content[]."
        if kind in self.notes.ignore:
            self.notes.ignored.add(f"{place}type {kind}")
        elif kind in TEXT_PARTS and isinstance(part.get("text"), str):
            self.text.append(part["text"])
            self.notes.note_unread(part, {"type", "text"}, place)
        elif kind in THINKING_PARTS and self.role == "assistant":
            self.reasoning.append(_plain(_one_of(part, ("thinking", "reasoning", "text"), self.where), self.where))
            self.notes.note_unread(part, {"type", "text", *THINKING_PARTS}, place)
        elif kind in IMAGE_PARTS and self.role != "assistant" and self.notes.images:
            value = _one_of(part, IMAGE_FIELDS, self.where)
            self.images.append({"base64": value} if isinstance(part.get("base64"), str) else value)
            self.text.append(IMAGE_MARK)
            self.notes.note_unread(part, {"type", "detail", *IMAGE_FIELDS}, place)
        elif kind == "tool_use" and self.role == "assistant":
            self.calls.append(read_call(part, f"tool_use of a turn{self.where}", self.notes, place))
        elif kind == "tool_result" and self.role == "user":
            result = _plain(part.get("content"), self.where)
            self.results.append({"role": "tool", "content": result})
            if not is_empty(part.get("tool_use_id")):
                self.results[-1]["tool_call_id"] = _named(part["tool_use_id"], "tool_use_id", self.where)
            self.notes.note_unread(part, {"type", "content", "tool_use_id"}, place)
        else:
            what = f"a part of type {kind!r}" if kind else f"a part without a type, with fields {sorted(part)},"
            hint = ignore_hint(kind) if kind is not None and kind not in TEXT_PARTS else ""
            raise BadRow(f"content of the {self.role} turn is a list with {what} that can't be used{self.where}", hint)

    def messages(self) -> list[Message]:
        """Return the turns. Raises BadRow if there is nothing in it at all."""
        message: Message = {"role": self.role, "content": "".join(self.text)}
        if reasoning := "".join(self.reasoning):
            message["reasoning_content"] = reasoning
        if self.calls:
            message["tool_calls"] = self.calls
        if self.images:
            if message["content"].count(IMAGE_MARK) != len(self.images):
                raise BadRow(f"a text has the code point U+FDD0, which stands for an image{self.where}")
            message["images"] = self.images
        if not (self.text or reasoning or self.calls or self.results):
            raise BadRow(f"the {self.role} turn has no content{self.where}")
        return [*self.results, *([message] if self.text or reasoning or self.calls else [])]


def _plain(value: Any, where: str) -> str:
    """Return the text of a part, which may be a list of text parts."""
    parts = value if isinstance(value, list) else [value]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise BadRow(f"a part of a turn holds something else than text{where}")
    return "".join(map(str, texts))


def _trained(turn: dict[str, Any], role: str, where: str) -> bool | None:
    """Return what the flags of a turn say: False for no loss, True if loss is asked for outside the assistant's turns.

    `weight` is OpenAI's, `train` and `training` are axolotl's, `loss` is ms-swift's, `masked` is torchtune's.
    """
    said = {name: _flag(turn[name], name, where) for name in TRAIN_FLAGS if not is_missing(turn.get(name))}
    said |= {name: not _flag(turn[name], name, where) for name in MASK_FLAGS if not is_missing(turn.get(name))}
    weight = turn.get("weight")
    if not is_missing(weight):
        if not isinstance(weight, int | float) or weight not in (0, 1):
            raise BadRow(f"weight of a turn is {weight!r}{where}", "A turn's weight is 0 (no loss) or 1")
        said["weight"] = weight == 1
    if len(set(said.values())) > 1:
        raise BadRow(f"the flags of a turn contradict each other{where}: {', '.join(said)}")
    if False in said.values():
        return False
    return True if role != "assistant" and any(name in TRAIN_FLAGS for name in said) else None


def _flag(value: Any, name: str, where: str) -> bool:
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise BadRow(f"{name} of a turn is {value!r}, expected true or false{where}", ignore_hint(name))
    return bool(value)
