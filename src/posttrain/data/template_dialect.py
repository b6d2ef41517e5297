"""Find out by rendering how a chat template reads turns: tools, arguments of calls, reasoning, content in parts.

A template that is given a field in a form that it does not read leaves it out without an error. So each template is
tried once with words that occur nowhere else, and every conversation is then given to it in the form that showed them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

from posttrain.core.types import Message
from posttrain.data.bad_rows import BadRow
from posttrain.data.special_text import ControlTokens
from posttrain.data.template_source import apply_template, template_of
from posttrain.data.think_marks import CLOSE, OPEN, PAIR, PromptBlock, prompt_block, split_block

USER, ANSWER, REASON, NAME, KEY, VALUE = (f"Qz7f0X{letter}" for letter in "uarnkv")
"""Words of the probes; they consist of letters and digits, so that no template escapes or splits them."""
_TOOL = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {KEY: {"type": "string", "description": "A text."}}},
    },
}
_READS_REASONING = re.compile(
    r"reasoning_content|\.(?:thinking|reasoning)\b|\[['\"](?:thinking|reasoning)['\"]\]|get\(['\"](?:thinking|reasoning)['\"]"
)


@dataclass(frozen=True)
class Dialect:
    """Describe the form in which a template reads turns.

    Attributes:
        tools: What stands for no tools: None, or an empty list for a template that needs one.
        shows_tools: True if the template shows the tools that a conversation may call.
        parts: True if the content of a turn must be a list of parts, as in templates for images and text.
        reasoning: Where the reasoning of an answer is read: in its field, at the beginning of the content, or nowhere.
        block: What to do with reasoning that is written in the content: keep it there, or move it to its field.
        arguments: Arguments of calls as an object or as the text of one.
        header: The generation prompt after a user's turn, with what ends that turn.
        prompt: The block of reasoning that the generation prompt opens or closes, if it does.
        close: Text between reasoning and answer, if the template shows both.
        control: The special tokens, and the added tokens with which the template separates turns.
        markup: What the template writes around turns.
        shapes: Shapes of conversations that were looked at (see `turn_shapes`).
    """

    tools: list[Any] | None
    shows_tools: bool
    parts: bool
    reasoning: Literal["field", "content", "nowhere"]
    block: Literal["keep", "field"]
    arguments: Literal["object", "text"]
    header: str
    prompt: PromptBlock | None
    close: str | None
    control: ControlTokens
    markup: str
    shapes: dict[Any, Any] = field(default_factory=dict, compare=False)

    @property
    def opened(self) -> bool:
        """Return True if the generation prompt opens a block of reasoning, which the answer continues."""
        return self.prompt is not None and not self.prompt.closed


_DIALECTS: WeakKeyDictionary[Any, dict[Any, Dialect]] = WeakKeyDictionary()


def dialect_of(tokenizer: Any, tools: Sequence[Any], arguments: Mapping[str, Any]) -> Dialect:
    """Return how the tokenizer's template reads turns, with these tools and arguments.

    Args:
        tokenizer: Tokenizer with the template.
        tools: Tools of the conversation; they may select another template.
        arguments: Arguments of the template.
    """
    own = json.dumps(arguments, sort_keys=True, default=str) if arguments else ""
    key = (template_of(tokenizer, tools or None), bool(tools), own, len(tokenizer), tokenizer.eos_token)
    known = _DIALECTS.setdefault(tokenizer, {})
    if key not in known:
        known[key] = _Probe(tokenizer, bool(tools), arguments).dialect(key[0])
    return known[key]


class _Probe:
    """Render probes; what the template refuses is an empty text."""

    def __init__(self, tokenizer: Any, tools: bool, arguments: Mapping[str, Any]) -> None:
        self.tokenizer, self.arguments, self.parts = tokenizer, arguments, False
        self.tools: list[Any] | None = [_TOOL] if tools else None

    def text(self, *turns: dict[str, Any], generation: bool = False) -> str:
        given = [as_parts(turn) for turn in turns] if self.parts else turns
        try:
            return apply_template(self.tokenizer, given, generation, self.tools, self.arguments)
        except BadRow:
            return ""

    def after_user(self, *turns: dict[str, Any], generation: bool = False) -> str:
        """Return what the template writes after a user's turn."""
        return self.text({"role": "user", "content": USER}, *turns, generation=generation).rpartition(USER)[2]

    def dialect(self, source: str) -> Dialect:
        user, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
        no_tools: list[Any] | None = None
        if self.tools is None and not self.text(user, generation=True):
            self.tools = []
            no_tools = self.tools = [] if self.text(user, generation=True) else None
        plain = self.text(user, answer, generation=True) or self.text(user, answer)
        if USER not in plain:
            self.parts = True
            self.parts = USER in (self.text(user, answer, generation=True) or self.text(user, answer))
        prompt = self.after_user(generation=True)
        reasoning, block, close = self._reasoning(source, prompt)
        return Dialect(
            no_tools,
            NAME in (self.text(user, generation=True) or plain),
            self.parts,
            reasoning,
            block,
            self._arguments(),
            prompt,
            prompt_block(prompt),
            close,
            *self._control(),
        )

    def _reasoning(
        self, source: str, prompt: str
    ) -> tuple[Literal["field", "content", "nowhere"], Literal["keep", "field"], str | None]:
        start, end = PAIR
        in_field = self.after_user({"role": "assistant", "content": ANSWER, **reasoning_fields(REASON)})
        content = f"{start}\n{REASON}\n{end}\n\n{ANSWER}"
        in_content = self.after_user({"role": "assistant", "content": content})
        if REASON in in_field:
            same = "".join(in_content.split()) == "".join(in_field.split())
            return "field", "keep" if same else "field", _between(in_field)
        # An empty block before the written one shows that the template looks for reasoning elsewhere.
        before = in_content.partition(REASON)[0]
        if REASON in in_content and not CLOSE.search(before) and len(OPEN.findall(before)) == 1:
            where: Literal["content", "nowhere"] = "nowhere" if _READS_REASONING.search(source) else "content"
            return where, "keep", _between(in_content)
        return "nowhere", "keep", None

    def _arguments(self) -> Literal["object", "text"]:
        """Return "text" if only that form of a call's arguments is shown."""
        tools, self.tools = self.tools, [_TOOL]
        shown: list[Literal["object", "text"]] = []
        for form in ("object", "text"):
            arguments: Any = {KEY: VALUE} if form == "object" else json.dumps({KEY: VALUE})
            call = {"id": "abcdefghi", "type": "function", "function": {"name": NAME, "arguments": arguments}}
            turn = {"role": "assistant", "content": "", "tool_calls": [call]}
            if all(word in self.after_user(turn) for word in (NAME, KEY, VALUE)):
                shown.append(form)  # type: ignore[arg-type]
        self.tools = tools
        return shown[0] if shown else "object"

    def _control(self) -> tuple[ControlTokens, str]:
        """Return the special tokens, with what else of the added tokens is written around turns; and all that is."""
        system, user = {"role": "system", "content": USER}, {"role": "user", "content": USER}
        answer = {"role": "assistant", "content": ANSWER}
        turns = (user, answer, user)
        written = self.text(system, *turns, generation=True) or self.text(*turns, generation=True)
        written += self.text(user, answer)
        texts = set(map(str, self.tokenizer.all_special_tokens))
        for token in (getattr(self.tokenizer, "added_tokens_decoder", None) or {}).values():
            text = str(token.content)
            mark = OPEN.fullmatch(text) or CLOSE.fullmatch(text)
            if token.special or (text in written and not text.isspace() and not mark):
                texts.add(text)
        return ControlTokens.of(texts), written


def _between(text: str) -> str | None:
    """Return what stands between the reasoning and the answer of a probe."""
    between = text.partition(REASON)[2].partition(ANSWER)
    return between[0] if between[1] else None


def reasoning_fields(reasoning: str) -> dict[str, str]:
    """Return the fields in which templates read reasoning, as transformers gives them."""
    return {"thinking": reasoning, "reasoning_content": reasoning}


def as_parts(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn with its content as a list of one part."""
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


def as_read(message: Message, dialect: Dialect) -> dict[str, Any]:
    """Return a turn in the form that the template reads.

    Args:
        message: The turn, its texts guarded.
        dialect: How the template reads turns.
    """
    turn: dict[str, Any] = {k: v for k, v in message.items() if k not in ("train", "reasoning_content", "tool_calls")}
    reasoning = message.get("reasoning_content", "")
    if message["role"] == "assistant":
        block = split_block(message["content"], dialect.opened)
        if block is not None and not reasoning and dialect.block == "field" and block.inner.strip():
            turn["content"], reasoning = block.rest.lstrip(), block.inner.strip()
        if reasoning and dialect.reasoning == "content" and block is None:
            turn["content"] = f"{PAIR[0]}\n{reasoning}\n{PAIR[1]}\n\n{message['content']}"
        elif reasoning:
            turn |= reasoning_fields(reasoning)
        if calls := message.get("tool_calls"):
            turn["tool_calls"] = [_as_called(call, dialect) for call in calls]
    return as_parts(turn) if dialect.parts else turn


def _as_called(call: Mapping[str, Any], dialect: Dialect) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments")
    if dialect.arguments == "text" and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}
