"""Render conversations through a tokenizer's chat template: one door for training and for inference.

A template may leave something out without an error: a system message, the result of a tool, a call. So every text that
goes in must come out again, white space aside; otherwise the conversation is refused. The one exception is the
reasoning of earlier turns, which many templates leave out on purpose; it is counted.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from posttrain.core.types import Message
from posttrain.data.bad_rows import BadRow
from posttrain.data.special_text import guard, guard_all, restore
from posttrain.data.template_dialect import as_read, dialect_of
from posttrain.data.template_source import apply_template, check_template_args, template_args, template_of
from posttrain.data.think_marks import split_block

QUOTED = 60
"""Characters of a text that a message quotes."""


class Conversation:
    """Hold a conversation in the form that the tokenizer's template reads, and render its beginnings.

    Attributes:
        tokenizer: Tokenizer with the template, and with the recipe's arguments of it.
        dialect: How the template reads turns.
        messages: The turns as given, their texts guarded against being read as special tokens.
        tools: Descriptions of the tools, guarded.
        arguments: Arguments of the template.
        specials: Special tokens that are spelt inside texts, with their number.
    """

    def __init__(
        self,
        tokenizer: Any,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        arguments: Mapping[str, Any] | None = None,
        special_tokens: str = "text",
    ) -> None:
        if arguments:
            check_template_args(template_of(tokenizer, tools or None), tuple(arguments))
        self.tokenizer, self.arguments = tokenizer, template_args(tokenizer, arguments)
        try:
            self.dialect = dialect_of(tokenizer, tools, self.arguments)
        except (ValueError, TypeError) as error:  # no template, or none for tools
            raise BadRow(f"the chat template refuses it: {error}") from error
        self.specials: Counter[str] = Counter()
        if special_tokens == "allow":
            self.messages, self.tools = list(messages), list(tools)
        else:
            self.messages = [self._guarded(m) for m in messages]
            self.tools = [guard_all(tool, self._guard) for tool in tools]
        self._turns = [as_read(m, self.dialect) for m in self.messages]
        self._texts: dict[tuple[int, bool], str] = {}

    def like(self, messages: Sequence[Message]) -> Conversation:
        """Return a conversation of other turns, already guarded, with the same tools and arguments."""
        other = copy.copy(self)
        other.messages, other._turns, other._texts = list(messages), [as_read(m, self.dialect) for m in messages], {}
        return other

    def _guard(self, text: str) -> str:
        return guard(text, self.dialect.control, self.specials)

    def _guarded(self, message: Message) -> Message:
        content = message["content"]
        block = split_block(content, self.dialect.opened) if message["role"] == "assistant" else None
        if block is None:
            guarded = self._guard(content)
        else:  # the marks of its reasoning are part of what the model writes
            guarded = block.open + self._guard(block.inner) + block.close + self._guard(block.rest)
        if len(message) == 2:
            return message if guarded == content else {"role": message["role"], "content": guarded}
        rest = {k: v for k, v in message.items() if k not in ("role", "content", "train")}
        guarded_rest = guard_all(rest, self._guard)
        train = {"train": message["train"]} if "train" in message else {}
        return {"role": message["role"], "content": guarded, **guarded_rest, **train}  # type: ignore[typeddict-item]

    def render(self, count: int | None = None, generation: bool = False) -> str:
        """Return the template's text of the first turns.

        Args:
            count: Number of turns. None: all.
            generation: Add the generation prompt.

        Raises:
            BadRow: The template refuses them, with its own message.
        """
        count = len(self._turns) if count is None else count
        key = (count, generation)
        if key not in self._texts:
            tools = self.tools or self.dialect.tools
            self._texts[key] = apply_template(self.tokenizer, self._turns[:count], generation, tools, self.arguments)
        return self._texts[key]

    def check(self, text: str, count: int | None = None) -> int:
        """Check that a rendering shows every text of the tools and of the first turns.

        Args:
            text: The rendering.
            count: Number of turns. None: all.

        Returns:
            Number of turns whose reasoning it leaves out.

        Raises:
            BadRow: Something is missing; the message names it.
        """
        search, without = TextSearch(text), 0
        if self.tools and not self.dialect.shows_tools:
            raise BadRow("the chat template does not show the tools of a conversation, and this one has tools")
        for tool in self.tools:
            name = tool.get("function", tool).get("name", "")
            if not search.has(str(name)):
                raise BadRow(f"the chat template leaves out a tool: {quote(name)} is not in it")
        for i, message in enumerate(self.messages[:count]):
            reasoning, content = self.parts(i)
            if not search.has(content):
                raise BadRow(f"{left_out(message, i)}: {quote(content)} is not in it")
            missing = next((t for t in call_texts(message) if not search.has(t)), None)
            if missing is not None:
                raise BadRow(f"{left_out(message, i, True)}: {quote(missing)} is not in it")
            without += not search.has(reasoning)
        return without

    def parts(self, i: int) -> tuple[str, str]:
        """Return reasoning and content of turn i, stripped, wherever the reasoning is written."""
        message = self.messages[i]
        reasoning, content = message.get("reasoning_content", ""), message["content"]
        if message["role"] == "assistant" and not reasoning:
            block = split_block(content, self.dialect.opened)
            if block is not None:
                reasoning, content = block.inner, block.rest
        return reasoning.strip(), content.strip()


def left_out(message: Message, i: int, call: bool = False) -> str:
    """Return the beginning of the message for a turn that is not in the rendering.

    Args:
        message: The turn.
        i: Its number, from 0.
        call: One of its calls is missing, not its text.
    """
    if call:
        return f"the chat template leaves out or changes a tool call of turn {i + 1}"
    return f"the chat template leaves out or changes turn {i + 1}, the {message['role']}'s"


def quote(text: Any) -> str:
    """Return the beginning of a text in quotation marks, as it was written."""
    text = restore(str(text))
    return repr(text if len(text) <= QUOTED else text[: QUOTED - 1] + "…")


def call_texts(message: Message) -> Iterator[str]:
    """Yield the names, argument names and argument values of a turn's calls, as texts that a rendering must show."""
    for call in message.get("tool_calls", ()):
        function = call.get("function", call)
        yield str(function.get("name", ""))
        yield from _leaves(function.get("arguments"))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value)


class TextSearch:
    """Search a rendering for texts as templates write them: trimmed, in JSON, with other white space."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._squashed: str | None = None

    def has(self, wanted: str) -> bool:
        """Return True if the rendering shows a text; an empty text is always shown."""
        wanted = wanted.strip()
        if not wanted or wanted in self.text:
            return True
        if self._squashed is None:
            self._squashed = squash(self.text)
        forms: tuple[Callable[[str], str], ...] = (str, _in_json, _in_ascii_json, _in_python)
        return any(squash(form(wanted)) in self._squashed for form in forms)


def squash(text: str) -> str:
    """Return a text without its white space."""
    return "".join(text.split())


def _in_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _in_ascii_json(text: str) -> str:
    return json.dumps(text)[1:-1]


def _in_python(text: str) -> str:
    return repr(text)[1:-1]


def render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    generation: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
    arguments: Mapping[str, Any] | None = None,
    special_tokens: str = "text",
) -> str:
    """Return the template's text of a conversation, for `tokenize`.

    Args:
        tokenizer: Tokenizer with the template, and with the recipe's arguments of it.
        messages: Turns of the conversation.
        generation: Add the generation prompt.
        tools: Descriptions of the tools that the conversation may call.
        arguments: Arguments of the template for this conversation, over those of the recipe.
        special_tokens: "text": special tokens that are spelt in a text are ordinary text (`special_text.restore` gives
            the text for people). "allow": they are special tokens.

    Raises:
        BadRow: The template refuses the conversation, has no such argument, or leaves out something of it.
    """
    conversation = Conversation(tokenizer, messages, tools, arguments, special_tokens)
    text = conversation.render(generation=generation)
    conversation.check(text)
    return text
