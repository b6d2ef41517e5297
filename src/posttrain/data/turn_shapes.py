"""Find out how a template writes the last turn of a conversation of a certain shape: its prompt, its end.

The shape of a conversation is its roles and which fields the turns have. A conversation of the same shape, with words
that occur nowhere else in place of its texts, is rendered once: what the template writes between the words is its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.core.types import Message
from posttrain.data.bad_rows import BadRow
from posttrain.data.chat_template import Conversation, TextSearch, left_out
from posttrain.data.special_text import ControlTokens
from posttrain.data.think_marks import PromptBlock, prompt_block

WORD = "Qz7f0X{}w"
NEXT = "Qz7f0Xnext"
WINDOW = 24
"""Turns whose shape is looked at; of a longer conversation, the system message and the last ones."""


@dataclass(frozen=True)
class Ending:
    """Describe how a template ends a turn.

    Attributes:
        mark: What it writes after the turn's text to end it.
        drop: What the rendering of the conversation up to this turn has after the mark, which is no part of the turn.
        written: False if that rendering lacks the mark, which the template writes before a next turn only.
        closed: True if the mark ends with a special token.
    """

    mark: str
    drop: str
    written: bool
    closed: bool


@dataclass(frozen=True)
class TurnShape:
    """Describe how a template writes the last turn, an assistant's, of conversations of one shape.

    Attributes:
        prompt: End of the generation prompt, after the text of the turn before; None if the template refuses to prompt
            for the turn.
        header: What stands between the text of the turn before and the turn, where the turn is rendered.
        block: The block of reasoning that `prompt` opens or closes.
        lead: What the turn has between prompt and content; None for turns with calls or reasoning, and for those that
            do not begin with the prompt, or whose prompt opens or closes a block of reasoning.
        ending: How the turn ends.
        own_system: True if the template writes a system message of its own in place of the conversation's.
    """

    prompt: str | None
    header: str
    block: PromptBlock | None
    lead: str | None
    ending: Ending
    own_system: bool = False


def shape_of(conversation: Conversation, i: int) -> TurnShape:
    """Return the shape of the turns up to turn i, an assistant's.

    Raises:
        BadRow: The template leaves out a turn of such conversations.
    """
    turns = window(conversation.messages, i)
    key = (_key(turns), json.dumps(conversation.tools, default=str) if conversation.tools else "")
    shapes: dict[Any, TurnShape | str] = conversation.dialect.shapes
    if key not in shapes:
        try:
            shapes[key] = _Words(conversation, turns).shape()
        except BadRow as error:
            shapes[key] = str(error)
    known = shapes[key]
    if isinstance(known, str):
        raise BadRow(known)
    if known.own_system:
        _check_system(conversation, turns)
    return known


def _check_system(conversation: Conversation, turns: Sequence[Message]) -> None:
    """Check that the system message that a template writes is that of the conversation. Raises BadRow."""
    words = _Words(conversation, turns).spoken.messages
    said = [turn if turn["role"] == "system" else word for turn, word in zip(turns, words, strict=True)]
    search = TextSearch(conversation.like(said).render())
    for k, turn in enumerate(turns):
        if turn["role"] == "system" and not search.has(turn["content"]):
            raise BadRow(left_out(turn, k))


def window(messages: Sequence[Message], i: int, size: int = WINDOW) -> list[Message]:
    """Return the turns up to turn i; of many, the system message and the last ones from a user's turn on.

    Args:
        messages: Turns of the conversation.
        i: Number of the last turn.
        size: Number of turns that are many.
    """
    if i < size:
        return list(messages[: i + 1])
    start = next((k for k in range(i - size + 2, i) if messages[k]["role"] == "user"), i - size + 2)
    return [*(m for m in messages[:1] if m["role"] == "system"), *messages[start : i + 1]]


def _structure(value: Any) -> Any:
    """Return a value of JSON with a constant in place of each text and number."""
    if isinstance(value, Mapping):
        return {key: _structure(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_structure(item) for item in value]
    return type(value).__name__


def _key(turns: Sequence[Message]) -> str:
    shape = []
    for m in turns:
        if len(m) == 2:
            shape.append(m["role"] if m["content"].strip() else f"{m['role']}-")
            continue
        calls = [(c.get("function", c).get("name"), _structure(c)) for c in m.get("tool_calls", ())]
        fields = [m["role"], bool(m["content"].strip()), bool(m.get("reasoning_content")), calls, "name" in m]
        shape.append(json.dumps(fields, default=str))
    return "\n".join(shape)


class _Words:
    """Render a conversation of words in the shape of another."""

    def __init__(self, conversation: Conversation, turns: Sequence[Message]) -> None:
        self.like, self.turns = conversation, turns
        self.words: list[list[str]] = []
        self.called: set[str] = set()
        self.count = 0
        self.prompt: str | None = None
        self.spoken = conversation.like([self._in_words(m) for m in turns])

    def _word(self) -> str:
        self.count += 1
        word = WORD.format(self.count)
        self.words[-1].append(word)
        return word

    def _in_words(self, message: Message) -> Message:
        self.words.append([])
        out: dict[str, Any] = {k: v for k, v in message.items() if k != "images"}  # a word stands for them too
        if message.get("reasoning_content"):
            out["reasoning_content"] = f"Qz7f0Xr{len(self.words)}w"
        if message["content"].strip():
            out["content"] = self._word()
        if message.get("tool_calls"):
            out["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        return out  # type: ignore[return-value]

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call.get("function", call)
        return {**call, "function": {**function, "arguments": self._value(function.get("arguments"))}}

    def _value(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._value(item) for item in value]
        if isinstance(value, str):
            value = self._word()
            self.called.add(value)
        return value

    def shape(self) -> TurnShape:
        """Return the shape. Raises BadRow if a word is missing."""
        last = len(self.turns) - 1
        whole = self.spoken.render()
        try:
            prompt: str | None = self.spoken.render(last, generation=True) if last else None
        except BadRow:
            prompt = None
        self.prompt = prompt
        own_system = False
        for k, words in enumerate(self.words):
            text = whole if k == last or prompt is None else prompt
            for word in words:
                if word not in text and self.turns[k]["role"] == "system":
                    own_system = True
                elif word not in text:
                    raise BadRow(left_out(self.turns[k], k, word in self.called))
        tail, block, lead = prompt, None, None
        for word in self.words[last]:
            if whole.count(word) > 1:
                raise BadRow(f"the chat template writes the text of turn {last + 1} more than once")
        if prompt is not None:
            turn = self.turns[last]
            before = [w for words in self.words[:last] for w in words if w in prompt]
            tail = prompt[max((prompt.rfind(w) + len(w) for w in before), default=0) :]
            block = prompt_block(tail)
            plain = not turn.get("tool_calls") and not turn.get("reasoning_content") and block is None
            if whole.startswith(prompt) and plain:
                lead = whole[len(prompt) :].partition(self.words[last][0])[0]
        return TurnShape(tail, self._header(whole), block, lead, self._ending(whole), own_system)

    def _header(self, whole: str) -> str:
        """Return what stands between the last word of the turns before and the first one of the last turn."""
        message, own = self.spoken.messages[-1], [w for w in self.words[-1] if w in whole]
        own += [w for w in (message.get("reasoning_content"),) if w and w in whole]
        start = min((whole.find(w) for w in own), default=len(whole))
        before = [whole.rfind(w, 0, start) + len(w) for words in self.words[:-1] for w in words if w in whole[:start]]
        return whole[max(before, default=0) : start]

    def _after(self, text: str) -> str:
        """Return what stands after the last word of the last turn."""
        words = self.words[-1]
        return text[max((text.rfind(w) + len(w) for w in words if w in text), default=0) :]

    def _ending(self, whole: str) -> Ending:
        tail, control = self._after(whole), self.like.dialect.control
        following = self._following()
        common = tail if following is None else os.path.commonprefix([tail, following])
        called = bool(self.turns[-1].get("tool_calls"))
        for text in (common, tail):
            if end := self._closing(text, control, whole):
                begin = _run_start(text, end, control) if called else 0
                return Ending(text[begin:end], tail[end:], True, True)
        if common.strip() and not called:
            return Ending(common.rstrip(), tail[len(common.rstrip()) :], True, False)
        if following is not None and not tail.strip() and (mark := self._mark_before_next(following, control)):
            return Ending(mark, tail, False, True)
        kept = len(tail.rstrip())
        return Ending("", tail[kept:], True, False)

    def _following(self) -> str | None:
        """Return what the template writes between this turn and the text of a next one."""
        calls = self.turns[-1].get("tool_calls") or []
        nexts: list[dict[str, Any]] = [{"role": "user", "content": NEXT}]
        if calls:
            nexts.insert(0, {"role": "tool", "content": NEXT, "name": calls[0].get("function", {}).get("name")})
            if calls[0].get("id"):
                nexts[0]["tool_call_id"] = calls[0]["id"]
        for turn in nexts:
            try:
                text = self.like.like([*self.spoken.messages, turn]).render()  # type: ignore[list-item]
            except BadRow:
                continue
            head, found, _ = text.rpartition(NEXT)
            if found and all(w in head for w in self.words[-1]):
                return self._after(head)
        return None

    def _closing(self, text: str, control: ControlTokens, whole: str) -> int:
        """Return where the special tokens end that close the turn; 0 if there are none."""
        if control.pattern is None:
            return 0
        # Some templates always write a prompt, or a system message, after the last turn: another turn begins there.
        opener, end = self._opener(whole, control), 0
        for match in control.pattern.finditer(text):
            if match[0] == opener:
                break
            if match[0].startswith("</") and f"<{match[0][2:-1]}" in self._answer(whole):
                continue  # it closes a part of the answer, such as a call
            end = match.end()
            if match[0] == self.like.tokenizer.eos_token:
                break
        return end

    def _answer(self, whole: str) -> str:
        """Return the last turn without its header, as far as it differs from the prompt for it."""
        return whole[len(os.path.commonprefix([self.prompt or "", whole])) :]

    def _opener(self, whole: str, control: ControlTokens) -> str:
        """Return the special token with which the template begins a turn: that which begins the text."""
        begin, text = str(self.like.tokenizer.bos_token or ""), whole.lstrip()
        if begin and text.startswith(begin) and text.count(begin) == 1:
            text = text.removeprefix(begin).lstrip()
        match = control.pattern.match(text) if control.pattern else None
        return match[0] if match and match[0] != self.like.tokenizer.eos_token else ""

    def _mark_before_next(self, following: str, control: ControlTokens) -> str:
        """Return the end that only a next turn brings; a single special token is that turn's beginning."""
        found = list(control.pattern.finditer(following)) if control.pattern else []
        if len(found) < 2 or found[0][0] == self._opener(self.spoken.render(), control):
            return ""
        return following[: found[0].end()]


def _run_start(text: str, end: int, control: ControlTokens) -> int:
    """Return where the run of special tokens begins that ends at `end`."""
    start = end
    for match in reversed(list(control.pattern.finditer(text, 0, end)) if control.pattern else []):
        if text[match.end() : start].strip():
            break
        start = match.start()
    return start
