"""Find what a model has to write in the turns that it learns, for any chat template.

The text of a learnt turn begins with the prompt that the model is given at inference: the turns before it, rendered
with the generation prompt. What follows is the turn as the template writes it, up to its end. So training and inference
show the model the same text, token by token.

Some generation prompts open a block of reasoning ("<think>") which the rendered turn lacks or writes otherwise, and
some templates cut the reasoning from the very turn that is taught. The turn is then put together: the prompt, the
reasoning of the row, the closing mark, and the rest as the template writes it. What can't be put together is refused.

A conversation is one text if each learnt turn stands in it just as the model writes it. A turn that later prompts show
otherwise (without its reasoning, for instance) is learnt in a text of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from posttrain.core.image_tokens import IMAGE_MARK
from posttrain.core.types import Message
from posttrain.data.bad_rows import BadRow
from posttrain.data.chat_template import Conversation, TextSearch, call_texts, left_out, quote, squash
from posttrain.data.pictures import Picture
from posttrain.data.template_source import template_of, template_variables
from posttrain.data.think_marks import PAIR, Block, PromptBlock, close_of, prompt_block, split_block
from posttrain.data.turn_shapes import TurnShape, shape_of, window

LossOn = Literal["completion", "assistant", "all"]
MANY = 16
"""Learnt turns of a conversation from which on not every prompt is rendered whole."""
CUT_REASONING = "reasoning of earlier turns left out by the template"
SPELT = "special tokens spelt in texts, encoded as ordinary text"
OWN_TEXT = "turns that later prompts show otherwise, trained in separate texts"
EMPTY_BLOCK = "answers without reasoning to a prompt that opens a block of it, trained with an empty block"
FOLDED = "reasoning written in front of the answer, since the template has no field for it"
UNPROMPTED = "turns for which the template writes no prompt"
IN_WINDOW = "turns of long conversations, each checked against its prompt with the turns shortly before it alone"
UNENDED = "turns in plain text before the last one, trained without an end token"
RENDERED_TEXTS = "texts that are rendered already, whose special tokens are kept"
NOTES = {
    CUT_REASONING: "turns",
    SPELT: "tokens",
    OWN_TEXT: "turns",
    EMPTY_BLOCK: "turns",
    FOLDED: "turns",
    UNPROMPTED: "turns",
    IN_WINDOW: "turns",
    UNENDED: "turns",
    RENDERED_TEXTS: "texts",
}
"""What is counted while rendering, with the unit of the number."""

NO_END = (
    "no end token: the tokenizer has none, and no chat template writes one",
    "A model learns to stop by an end token. Give the tokenizer one with model.add_tokens, and a model.chat_template "
    "that writes it after each turn",
)


@dataclass(frozen=True)
class Rendered:
    """Hold a rendered conversation.

    Attributes:
        text: The text, for `tokenize`.
        spans: Half-open ranges of characters that carry loss.
        closed: True if an end token closes the last turn. False: the tokenizer's own is added.
        answer_end: Where the text of the last turn ends, before its end token.
        notes: Numbers of what is worth telling, by the names of `NOTES`.
        pictures: Pictures of the conversation, for the image tokens in the text, in order.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    closed: bool = True
    answer_end: int = 0
    notes: Mapping[str, int] = field(default_factory=dict)
    pictures: tuple[Picture, ...] = ()

    def without_end(self) -> Rendered:
        """Return the conversation up to the text of its last turn, which has no end then."""
        spans = ((self.spans[-1][0], self.answer_end),)
        return Rendered(self.text, spans, notes=self.notes, pictures=self.pictures)


@dataclass(frozen=True)
class LearntTurn:
    """Hold a turn as the model writes it: `prompt`, then `answer`, which ends the turn with `mark`."""

    prompt: str
    answer: str
    mark: str
    closed: bool
    followed_by_assistant: bool = False


def render_with_loss(
    tokenizer: Any,
    messages: Sequence[Message],
    loss_on: LossOn,
    tools: Sequence[Mapping[str, Any]] = (),
    arguments: Mapping[str, Any] | None = None,
    special_tokens: str = "text",
) -> list[Rendered]:
    """Return the texts that teach a conversation, with the spans that carry loss: one text if possible.

    Args:
        tokenizer: Tokenizer with the template.
        messages: Turns of the conversation.
        loss_on: The last assistant turn, every assistant turn, or everything.
        tools: Descriptions of the tools that the conversation may call.
        arguments: Arguments of the template for this conversation.
        special_tokens: "text" or "allow", as for `render_chat`.

    Raises:
        BadRow: No turn can be learnt, one is empty, or the template does not write a turn as the model has to.
    """
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    last = len(messages) - 1
    if not turns and loss_on != "all":
        raise BadRow("no assistant turn in it")
    if loss_on == "completion" and turns[-1] != last:
        raise BadRow(f"the last turn is the {messages[-1]['role']}'s, not the assistant's")
    if loss_on != "assistant":
        turns = [i for i in turns if i == last]
    learnt = [i for i in turns if messages[i].get("train", True)]
    if turns and not learnt and loss_on != "all":
        raise BadRow("no turn to train on: each has train: false")
    conversation = Conversation(tokenizer, messages, tools, arguments, special_tokens)
    for i in learnt:
        if not messages[i]["content"].strip() and not messages[i].get("tool_calls"):
            raise BadRow("empty completion")
    return _Lesson(conversation, learnt).everything() if loss_on == "all" else _Lesson(conversation, learnt).texts()


class _Lesson:
    """Put the texts together from which the turns `learnt` of a conversation are learnt."""

    def __init__(self, conversation: Conversation, learnt: Sequence[int]) -> None:
        self.conversation, self.learnt = conversation, learnt
        self.notes: Counter[str] = Counter()
        if conversation.specials:
            self.notes[SPELT] = conversation.specials.total()
        folded = sum(bool(m.get("reasoning_content")) for m in conversation.messages)
        if folded and conversation.dialect.reasoning == "content":
            self.notes[FOLDED] = folded

    def texts(self) -> list[Rendered]:
        """Return the texts, in the order of the turns that they end with."""
        groups: list[tuple[LearntTurn, list[tuple[int, int]]]] = []
        exact = self._rendered_whole()
        for i in reversed(self.learnt):
            if i not in exact and (span := self._in_window(i, *groups[-1])):
                groups[-1][1].insert(0, span)
                self.notes[IN_WINDOW] += 1
                continue
            turn = self._turn(i)
            text = turn.prompt + turn.answer
            for host, spans in reversed(groups):
                end = _end_inside(turn, host.prompt, self.conversation)
                if end:
                    spans.insert(0, (len(turn.prompt), end))
                    break
            else:
                groups.append((turn, [(len(turn.prompt), len(text))]))
        self.notes[CUT_REASONING] += self.conversation.check(groups[0][0].prompt, self.learnt[-1], True)
        self.notes[OWN_TEXT] = len(groups) - 1
        out = []
        for n, (turn, spans) in enumerate(reversed(groups), 1):
            text, notes = turn.prompt + turn.answer, self._told() if n == len(groups) else {}
            end, pictures = len(text) - len(turn.mark), self.conversation.pictures
            out.append(Rendered(text, tuple(spans), turn.closed, end, notes, pictures))
        return out

    def _rendered_whole(self) -> set[int]:
        """Return the turns whose whole prompt is rendered; of many, some from all parts of the conversation.

        Rendering the prompt of each of n turns takes time that grows with the square of n.
        """
        learnt = self.learnt
        return set(learnt if len(learnt) <= MANY else [*learnt[:2], *learnt[:: len(learnt) // 8], *learnt[-4:]])

    def _in_window(self, i: int, host: LearntTurn, spans: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
        """Return the span of turn i in a later prompt, found by rendering the turns shortly before it alone.

        The later prompt must have these turns just as they are rendered alone, and turn i as the model writes it.
        None: it does not.
        """
        near = window(self.conversation.messages, i)
        lesson = _Lesson(self.conversation.like(near), [len(near) - 1])
        turn = lesson._turn(len(near) - 1)
        first = next(m["content"].strip() for m in near if m["role"] != "system")
        start = turn.prompt.find(first) if first else -1
        body = turn.answer[: len(turn.answer) - len(turn.mark)]
        at = host.prompt.rfind(turn.prompt[start:] + body, 0, spans[0][0]) if start >= 0 else -1
        if at < 0:
            return None
        begin = at + len(turn.prompt) - start
        inside = LearntTurn(host.prompt[:begin], turn.answer, turn.mark, turn.closed, self._answered_next(i))
        end = _end_inside(inside, host.prompt, self.conversation)
        return (begin, end) if end else None

    def _answered_next(self, i: int) -> bool:
        """Return True if the turn after turn i is the assistant's too."""
        following = self.conversation.messages[i + 1 : i + 2]
        return bool(following) and following[0]["role"] == "assistant"

    def everything(self) -> list[Rendered]:
        """Return the whole conversation as one text, all of which carries loss but turns with train: false."""
        text, closed, end = self.conversation.render(), True, 0
        if self.learnt:
            turn = self._turn(self.learnt[-1])
            closed, whole = turn.closed, turn.prompt + turn.answer
            text = text if text.startswith(whole) else whole
            end = len(whole) - len(turn.mark)
        self.notes[CUT_REASONING] += self.conversation.check(text)
        spans, at, last = [], 0, len(self.conversation.messages) - 1
        for i, message in enumerate(self.conversation.messages):
            if message["role"] == "assistant" and not message.get("train", True):
                turn = self._turn(i)
                whole = turn.prompt + turn.answer
                stop = len(whole) if turn.mark and text.startswith(whole) or i == last else 0
                stop = stop or _end_inside(turn, text, self.conversation)
                if not stop:
                    raise BadRow(f"turn {i + 1} has train: false, and later turns change it: use loss_on: assistant")
                spans.append((at, len(turn.prompt)))
                at = stop
        spans.append((at, len(text)))
        kept = tuple(s for s in spans if s[0] < s[1])
        return [Rendered(text, kept, closed, end, self._told(), self.conversation.pictures)]

    def _told(self) -> dict[str, int]:
        return {name: number for name, number in self.notes.items() if number}

    def _turn(self, i: int) -> LearntTurn:
        """Return turn i as the model writes it."""
        conversation = self.conversation
        shape = shape_of(conversation, i)
        rendered = conversation.render(i + 1)
        prompt = conversation.render(i, generation=True) if shape.prompt is not None else None
        if prompt is None:
            self.notes[UNPROMPTED] += 1
            prompt, answer = self._without_prompt(i, rendered, shape)
        else:
            answer = self._answer(i, prompt, rendered, shape)
        ending = shape.ending
        tail = (ending.mark if ending.written else "") + ending.drop
        if not answer.endswith(tail):
            raise BadRow(f"the chat template changes turn {i + 1} so that its end can't be found")
        answer = answer[: len(answer) - len(tail)]
        answer = answer + ending.mark if ending.mark else answer.rstrip()
        self._check_answer(i, answer, shape)
        prompt, answer = self._past_header(i, prompt, answer)
        if not ending.closed and conversation.tokenizer.eos_token_id is None and not ending.mark:
            raise BadRow(*NO_END)
        return LearntTurn(prompt, answer, ending.mark, ending.closed, self._answered_next(i))

    def _check_answer(self, i: int, answer: str, shape: TurnShape) -> None:
        """Check that the answer shows reasoning, content and calls of the turn. Raises BadRow."""
        reasoning, content = self.conversation.parts(i)
        search, message = TextSearch(answer), self.conversation.messages[i]
        if shape.lead is not None and not reasoning:  # then what it has besides the content is known too
            expected = f"{shape.lead}{message['content']}{shape.ending.mark}"
            if answer != expected and squash(answer) != squash(expected):
                raise BadRow(f"{left_out(message, i)}: {quote(content)} stands otherwise in it")
            return
        if not search.has(content):
            raise BadRow(f"{left_out(message, i)}: {quote(content)} is not in it")
        if not search.has(reasoning):
            raise BadRow(f"the chat template leaves out the reasoning of turn {i + 1}, which is trained on")
        missing = next((t for t in call_texts(message) if not search.has(t)), None)
        if missing is not None:
            raise BadRow(f"{left_out(message, i, True)}: {quote(missing)} is not in it")

    def _without_prompt(self, i: int, rendered: str, shape: TurnShape) -> tuple[str, str]:
        """Return the text before the content of turn i and the rest, where the template does not prompt for it."""
        ending, content = shape.ending, self.conversation.messages[i]["content"]
        kept = len(rendered) - len((ending.mark if ending.written else "") + ending.drop)
        for text in (content, content.strip(), content.lstrip(), content.rstrip()):
            if rendered[:kept].endswith(text):
                return rendered[: kept - len(text)], rendered[kept - len(text) :]
        raise BadRow(f"the chat template changes turn {i + 1} so that its text can't be told from the rest")

    def _answer(self, i: int, prompt: str, rendered: str, shape: TurnShape) -> str:
        """Return what follows the prompt: turn i as the template writes it, its reasoning put in if need be."""
        end = self._prompt_end(i, prompt, shape)
        block = shape.block if end == shape.prompt else prompt_block(end)
        at = len(prompt) - len(end) + (block.at if block else len(end))
        body = self._body(i, prompt[:at], rendered, shape)
        if block is None:
            return self._with_reasoning(i, body)
        given = prompt[at:]
        if body.startswith(given):
            rest = body[len(given) :]
            if block.closed:
                self._refuse_reasoning(i)
                return rest
            own = split_block(rest, opened=True)
            if own is not None and self._shows_reasoning(i, own.inner):
                return rest
            return self._continue_block(i, block, own.rest if own else rest)
        own = split_block(body)
        rest = own.rest if own else body
        if block.closed:
            self._refuse_reasoning(i)
            return rest
        if own is not None and self._shows_reasoning(i, own.inner):
            return _continued(own.inner, block) + own.close + rest
        return self._continue_block(i, block, rest)

    def _past_header(self, i: int, prompt: str, answer: str) -> tuple[str, str]:
        """Return prompt and answer with the header between two turns of the assistant in the prompt.

        Some templates write no generation prompt after an assistant's turn, though they write a header between two.
        """
        conversation = self.conversation
        if i and conversation.messages[i - 1]["role"] == "assistant" and conversation.render(i) == prompt:
            header = conversation.dialect.header
            said = answer.find(conversation.parts(i)[1]) if conversation.parts(i)[1] else len(answer)
            for suffix in (header[n:] for n in range(len(header) // 2)):  # it begins with the end of a user's turn
                if suffix.strip() and (at := answer.find(suffix, 0, max(said, 0))) >= 0:
                    at += len(suffix)
                    return prompt + answer[:at], answer[at:]
        return prompt, answer

    def _prompt_end(self, i: int, prompt: str, shape: TurnShape) -> str:
        """Return the generation prompt after the text of the turn before."""
        assert shape.prompt is not None
        if prompt.endswith(shape.prompt):
            return shape.prompt
        before = self.conversation.render(i)
        if not prompt.startswith(before):
            raise BadRow(f"the chat template writes another prompt for turn {i + 1} than for others like it")
        return prompt[len(before) :]

    def _body(self, i: int, head: str, rendered: str, shape: TurnShape) -> str:
        """Return what the rendered turn has after the part of the prompt that both share."""
        if rendered.startswith(head):
            return rendered[len(head) :]
        # Some templates write earlier turns otherwise once the answer is there. What stands between the text of the
        # turn before and the answer must be the end of the prompt, or the prompt's beginning with the usual header.
        text = self.conversation.messages[i - 1]["content"].rpartition(IMAGE_MARK)[2].strip()
        since = head[head.rfind(text) + len(text) :] if text in head else ""
        usual, header = self.conversation.dialect.header, shape.header
        ends = bool(header) and since.endswith(header)
        if not ends and not (since.startswith(header) and usual.endswith(since[len(header) :])):
            header = since
        key, message = text + header, self.conversation.messages[i]
        body = rendered.partition(key)[2] if key.strip() and rendered.count(key) == 1 else ""
        plain = header == shape.header and not message.get("tool_calls") and not self.conversation.parts(i)[0]
        if not body or (plain and not body.lstrip().startswith(self.conversation.parts(i)[1])):
            raise BadRow(
                f"what the chat template writes before turn {i + 1} is not the prompt that the model is given for it"
            )
        return body

    def _shows_reasoning(self, i: int, inner: str) -> bool:
        return TextSearch(inner).has(self.conversation.parts(i)[0])

    def _refuse_reasoning(self, i: int) -> None:
        if self.conversation.parts(i)[0]:
            source = template_of(self.conversation.tokenizer, self.conversation.tools or None)
            reads = ", ".join(sorted(template_variables(source))) or "none"
            raise BadRow(
                f"turn {i + 1} has reasoning, and the generation prompt of the chat template allows none",
                f"model.chat_template_args may change that. Arguments of the chat template: {reads}",
            )

    def _continue_block(self, i: int, block: PromptBlock, rest: str) -> str:
        """Return the reasoning of turn i, the mark that closes the block which the prompt has opened, and the rest."""
        reasoning, content = self.conversation.parts(i)
        self._needs_answer(i, content)
        written = self._written_block(i)
        if written is not None:  # as the row has it
            return _continued(written.inner, block) + written.close + _spaced(written.rest, rest, content)
        if not reasoning:
            self.notes[EMPTY_BLOCK] += 1
        line = "\n" if "\n" in block.after else ""
        close = self.conversation.dialect.close or f"{line}{close_of(block.open)}{line * 2}"
        return _joined(reasoning + close, rest)

    def _with_reasoning(self, i: int, body: str) -> str:
        """Return the answer to a plain prompt, with the reasoning that the template has cut from it put back."""
        reasoning, content = self.conversation.parts(i)
        if not reasoning or TextSearch(body).has(reasoning):
            return body
        self._needs_answer(i, content)
        own = split_block(body)
        if own is not None and own.open and not own.inner.strip():
            line = "\n" if "\n" in own.inner else ""
            return f"{own.open}{line}{reasoning}{line}{own.close}{own.rest}"
        written = self._written_block(i)
        if body.lstrip().startswith(content) and own is None:
            if written is not None:
                return written.open + written.inner + written.close + _spaced(written.rest, body, content)
            if PAIR[1] in template_of(self.conversation.tokenizer, self.conversation.tools or None):
                return f"{PAIR[0]}\n{reasoning}\n{PAIR[1]}\n\n{body.lstrip()}"
        raise BadRow(f"the chat template leaves out the reasoning of turn {i + 1}, which is trained on")

    def _written_block(self, i: int) -> Block | None:
        """Return the block of reasoning that the row has in the content of turn i."""
        message = self.conversation.messages[i]
        if message.get("reasoning_content"):
            return None
        return split_block(message["content"], self.conversation.dialect.opened)

    def _needs_answer(self, i: int, content: str) -> None:
        if not content and not self.conversation.messages[i].get("tool_calls"):
            raise BadRow(f"the chat template leaves nothing of turn {i + 1} to train on: it has reasoning alone")


def _continued(reasoning: str, block: PromptBlock) -> str:
    """Return reasoning without the white space with which the prompt's block already begins."""
    return reasoning.removeprefix(block.after) if reasoning.startswith(block.after) else reasoning.lstrip()


def _spaced(written: str, rest: str, content: str) -> str:
    """Return the rest of a turn with the white space that the row has before its answer."""
    if content and rest.lstrip().startswith(content):
        return written[: len(written) - len(written.lstrip())] + rest.lstrip()
    return rest


def _joined(start: str, rest: str) -> str:
    """Return two texts one after the other; what ends the first and begins the second is written once."""
    rest = rest if start.endswith(">") or not start.endswith("\n") else rest.lstrip("\n")
    overlap = next((n for n in range(min(len(start), len(rest)), 0, -1) if start.endswith(rest[:n])), 0)
    return start + rest[overlap:]


def _end_inside(turn: LearntTurn, text: str, conversation: Conversation) -> int:
    """Return where the turn ends in a later text that has it just as the model writes it; 0 if it does not.

    It does not if the turn ends in words there: the model also has to write the end token, which the text lacks.
    """
    body = turn.prompt + turn.answer[: len(turn.answer) - len(turn.mark)]
    if not text.startswith(body):
        return 0
    if turn.mark and turn.closed and text.startswith(turn.mark, len(body)):
        return len(body) + len(turn.mark)
    # Another special token may end the turn when a next one follows: <|end|> for <|return|>, or the next role's.
    pattern = conversation.dialect.control.pattern
    start = len(text) - len(text[len(body) :].lstrip())
    match = pattern.match(text, start) if pattern and not turn.followed_by_assistant else None
    return match.end() if match else 0
