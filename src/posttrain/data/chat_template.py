"""Render conversations through a tokenizer's chat template: one door for training and for inference.

A template may leave something out without an error: a system message, the result of a tool, a call. So every text that
goes in must come out again, as often, white space aside; otherwise the conversation is refused. The one exception is
the reasoning of earlier turns, which many templates leave out on purpose; it is counted.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from posttrain.core.image_tokens import IMAGE_MARK
from posttrain.core.types import Message
from posttrain.data.bad_rows import BadRow
from posttrain.data.image_reader import image_reader
from posttrain.data.image_turns import fragments, pictures_of, shown_to_template
from posttrain.data.pictures import Picture
from posttrain.data.special_text import guard, guard_all, restore
from posttrain.data.template_dialect import as_read, dialect_of
from posttrain.data.template_source import apply_template, check_template_args, template_args, template_of
from posttrain.data.think_marks import split_block

NO_PICTURES = "images are not read here: the turns are rendered as text alone"
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
        pictures: The pictures of the turns, in order.
        image_token: What the template writes for each; "" without pictures.
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
        self.pictures = pictures_of(messages)
        self.image_token = image_reader(tokenizer).token if self.pictures else ""
        self.specials: Counter[str] = Counter()
        if special_tokens == "allow":
            self.messages, self.tools = list(messages), list(tools)
        else:
            self.messages = [self._guarded(m) for m in messages]
            self.tools = [guard_all(tool, self._guard) for tool in tools]
        self._turns = [self._as_read(m) for m in self.messages]
        self._texts: dict[tuple[int, bool], str] = {}
        self._parts: dict[int, tuple[str, str]] = {}

    def like(self, messages: Sequence[Message]) -> Conversation:
        """Return a conversation of other turns, already guarded, with the same tools and arguments."""
        other = copy.copy(self)
        other.messages, other._turns = list(messages), [self._as_read(m) for m in messages]
        other._texts, other._parts = {}, {}
        return other

    def _as_read(self, message: Message) -> dict[str, Any]:
        if message.get("images"):
            return shown_to_template(message, self.tokenizer, self.image_token)
        return as_read(message, self.dialect)

    def _guard(self, text: str) -> str:
        return guard(text, self.dialect.control, self.specials)

    def _guarded(self, message: Message) -> Message:
        content = message["content"]
        if message.get("images"):
            texts = map(self._guard, content.split(IMAGE_MARK))
            return {**message, "content": IMAGE_MARK.join(texts)}
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

    def check(self, text: str, count: int | None = None, generation: bool = False) -> int:
        """Check that a rendering shows every text of the tools and of the first turns, as often as they have it.

        Args:
            text: The rendering.
            count: Number of turns. None: all.
            generation: It ends with the generation prompt.

        Returns:
            Number of turns whose reasoning it leaves out.

        Raises:
            BadRow: Something is missing; the message names it.
        """
        if self.tools and not self.dialect.shows_tools:
            raise BadRow("the chat template does not show the tools of a conversation, and this one has tools")
        messages, search, without = self.messages[:count], TextSearch(text), 0
        names = [str(tool.get("function", tool).get("name", "")) for tool in self.tools]
        calls = {i: list(call_texts(message)) for i, message in enumerate(messages) if "tool_calls" in message}
        contents, given = [], [*names, *(t for several in calls.values() for t in several)]
        for i in range(len(messages)):
            reasoning, content = self.parts(i)
            if reasoning and search.has(reasoning):
                given.append(reasoning)
            elif reasoning:
                without += 1
            contents.append(content)
        expected = TextSearch("\0".join([*given, *contents]))
        for name in names:
            if search.lacks(name, expected):
                raise BadRow(f"the chat template leaves out a tool: {quote(name)} is not in it")
        for i, content in enumerate(contents):
            if search.lacks(content, expected):
                raise BadRow(_missing(messages[i], i, content))
        for i, several in calls.items():
            if (missing := next((t for t in several if search.lacks(t, expected)), None)) is not None:
                raise BadRow(f"{left_out(messages[i], i, True)}: {quote(missing)} is not in it")
        # A text that the template writes too, such as "user", may be left out all the same.
        own, known = self.dialect.markup, expected.text
        if self.pictures:
            self._check_pictures(text, messages)
        doubtful = {t for t in contents if t and (t in own or text.count(t) > known.count(t))}
        if doubtful:
            self._check_in_words([i for i, t in enumerate(contents) if t in doubtful], len(messages), generation)
        return without

    def _check_pictures(self, text: str, messages: Sequence[Message]) -> None:
        """Check that a rendering has an image token for each picture, and the texts beside them. Raises BadRow."""
        written, wanted = text.count(self.image_token), len(pictures_of(messages))
        if written != wanted:
            raise BadRow(f"the chat template writes {written} image tokens ({self.image_token}) for {wanted} images")
        search = TextSearch(text)
        for i, message in enumerate(messages):
            for part in fragments(message["content"]) if message.get("images") else ():
                if not search.has(part):
                    raise BadRow(_missing(message, i, part))

    def _check_in_words(self, turns: Sequence[int], count: int, generation: bool) -> None:
        """Check that the template shows turns, with words that occur nowhere else in place of their texts.

        Equal texts become the same word: a template may leave out a text that it has written before.

        Raises:
            BadRow: A word is there less often than the text.
        """
        texts = {i: self.messages[i]["content"] for i in turns}
        words = {text: f"Qz7f0Xc{i}w" for i, text in texts.items()}
        spoken: list[Message] = list(self.messages[:count])
        for i, text in texts.items():
            spoken[i] = {**spoken[i], "content": words[text]}
        try:
            shown = self.like(spoken).render(generation=generation)
        except BadRow:  # it reads the texts
            return
        wanted = Counter(texts.values())
        for i, text in texts.items():
            if shown.count(words[text]) < wanted[text]:
                raise BadRow(_missing(self.messages[i], i, text))

    def parts(self, i: int) -> tuple[str, str]:
        """Return reasoning and content of turn i, stripped, wherever the reasoning is written."""
        if i not in self._parts:
            message = self.messages[i]
            reasoning, content = message.get("reasoning_content", ""), message["content"]
            if message.get("images"):  # its texts may be moved apart: see `_check_pictures`
                content = ""
            if message["role"] == "assistant" and not reasoning:
                block = split_block(content, self.dialect.opened)
                if block is not None:
                    reasoning, content = block.inner, block.rest
            self._parts[i] = reasoning.strip(), content.strip()
        return self._parts[i]


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


def _missing(message: Message, i: int, text: str) -> str:
    return f"{left_out(message, i)}: {quote(text)} is not in it as often as in the conversation"


class TextSearch:
    """Search a rendering for texts as templates write them: trimmed, in JSON, with other white space."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def squashed(self) -> str:
        """Return the rendering without white space."""
        return squash(self.text)

    def has(self, wanted: str) -> bool:
        """Return True if the rendering shows a text; an empty text is always shown."""
        wanted = wanted.strip()
        return not wanted or wanted in self.text or any(form in self.squashed for form in _forms(wanted))

    def lacks(self, wanted: str, given: TextSearch) -> bool:
        """Return True if the rendering shows a text less often than the texts have it that it must show."""
        wanted = wanted.strip()
        if not wanted or self.text.count(wanted) >= given.text.count(wanted):
            return False
        return sum(map(self.squashed.count, _forms(wanted))) < given.squashed.count(squash(wanted))


def _forms(text: str) -> set[str]:
    """Return the forms in which templates write a text, without white space: as it is, in JSON, as Python does."""
    written = json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1], repr(text)[1:-1]
    return {squash(form) for form in (text, *written)}


def squash(text: str) -> str:
    """Return a text without its white space."""
    return "".join(text.split())


def render_prompt(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    arguments: Mapping[str, Any] | None = None,
    special_tokens: str = "text",
) -> tuple[str, tuple[Picture, ...]]:
    """Return the template's text of a conversation with the generation prompt, and the pictures that stand in it.

    Args:
        tokenizer: As for `render_chat`, and so the others.
        messages: Turns of the conversation.
        tools: Likewise.
        arguments: Likewise.
        special_tokens: Likewise.

    Raises:
        BadRow: As there.
    """
    conversation = Conversation(tokenizer, messages, tools, arguments, special_tokens)
    text = conversation.render(generation=True)
    conversation.check(text, generation=True)
    return text, conversation.pictures


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
        BadRow: The template refuses the conversation, has no such argument, or leaves out something of it; or a turn
            has pictures.
    """
    conversation = Conversation(tokenizer, messages, tools, arguments, special_tokens)
    if conversation.pictures:
        raise BadRow(NO_PICTURES)
    text = conversation.render(generation=generation)
    conversation.check(text, generation=generation)
    return text
