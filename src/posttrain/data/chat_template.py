"""Render conversations and find the characters that carry loss, for any chat template.

The loss of an assistant turn covers what the model has to write there: everything between the generation prompt, as
this template renders it, and the end of the turn, its end token included. The beginning is found by rendering the
conversation before the turn, which works for any template. The end is where the turn's text ends if that text follows
the generation prompt directly. Otherwise (the template inserts or changes text) it is found by rendering the
conversation with other texts in place of the turn: what follows them follows the turn. The beginning is found in this
way too if the template refuses the conversation before the turn, or renders it differently. White space after the end
token carries no loss. If a template writes no end token after the last turn, the tokenizer's own is added, with loss.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

from posttrain.core.types import Message
from posttrain.data.bad_rows import BadRow
from posttrain.data.template_source import apply_template, check_template_args, template_args, template_of


@dataclass(frozen=True)
class Rendered:
    """Hold a rendered conversation.

    Attributes:
        text: The text.
        spans: Half-open ranges of characters that carry loss.
        closed: True if an end token closes the last turn.
        answer_end: Where the text of the last turn ends, before its end token.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    closed: bool = True
    answer_end: int = 0


def render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    generation: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """Return the template's text of a conversation.

    Args:
        tokenizer: Tokenizer with the template, and with the recipe's arguments of it.
        messages: Turns of the conversation.
        generation: Add the generation prompt.
        tools: Descriptions of the tools that the conversation may call.
        arguments: Arguments of the template for this conversation, over those of the recipe.

    Raises:
        BadRow: The template refuses the conversation, with its own message, or has no such argument.
    """
    if arguments:
        check_template_args(template_of(tokenizer, tools or None), tuple(arguments))
    return apply_template(tokenizer, messages, generation, list(tools) or None, template_args(tokenizer, arguments))


def render_with_loss(
    tokenizer: Any, messages: Sequence[Message], loss_on: Literal["completion", "assistant", "all"]
) -> Rendered:
    """Return the text of a conversation and the spans that carry loss.

    Args:
        tokenizer: Tokenizer with the template.
        messages: Turns of the conversation.
        loss_on: The last assistant turn, every assistant turn, or everything.

    Raises:
        BadRow: The conversation has no assistant turn or an empty one, or the template changes a turn so that its text
            can't be found.
    """
    text = render_chat(tokenizer, messages)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    last = len(messages) - 1
    if not turns and loss_on != "all":
        raise BadRow("no assistant turn in it")
    if loss_on == "completion" and turns[-1] != last:
        raise BadRow(f"the last turn is the {messages[-1]['role']}'s, not the assistant's")
    if loss_on != "assistant":
        turns = [i for i in turns if i == last]
    spans, closed, answer_end = [], True, 0
    for i in turns:
        if not messages[i]["content"].strip():
            raise BadRow("empty completion")
        start, end, closed, answer_end = _turn(tokenizer, messages, i, text)
        spans.append((start, end))
    if loss_on == "all":
        spans = [(0, len(text))]
    return Rendered(text, tuple(spans), closed or turns[-1] != last, answer_end)


def _turn(tokenizer: Any, messages: Sequence[Message], i: int, text: str) -> tuple[int, int, bool, int]:
    """Return start and end of assistant turn i, True if an end token closes it, and the end of its own text."""
    specials = special_tokens(tokenizer)
    content = messages[i]["content"].strip()
    before = _try(tokenizer, messages[:i], generation=True) if i else ""
    start = len(before) if before and text.startswith(before) else -1
    own = -1
    if start >= 0:
        at = _past_space(text, start)
        # Only directly here, and only if the turn ends after it: "<|end|>" contains the text "end" too.
        if text.startswith(content, at) and _ends_turn(text, at + len(content), specials):
            own = at + len(content)
    if own < 0:
        start, own = _by_sentinel(tokenizer, messages, i, text, start)
    limit = len(text)
    if i < len(messages) - 1:
        # A special token that appears only together with the next turn is the beginning of that turn.
        common = len(os.path.commonprefix([_try(tokenizer, messages[: i + 1]), text]))
        limit = common if common >= own else limit
    end, closed = _close(text, own, limit, specials)
    return start, end, closed, own


def _past_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _ends_turn(text: str, at: int, specials: tuple[str, ...]) -> bool:
    at = _past_space(text, at)
    return at == len(text) or text.startswith(specials, at)


def _try(tokenizer: Any, messages: Sequence[Message], generation: bool = False) -> str:
    try:
        return render_chat(tokenizer, messages, generation)
    except BadRow:
        return ""


def _by_sentinel(tokenizer: Any, messages: Sequence[Message], i: int, text: str, start: int) -> tuple[int, int]:
    """Return start and end of turn i, found by rendering the conversation with two other texts in its place.

    `start` is where the turn is known to begin, or -1.
    """
    changed = BadRow(f"the chat template changes turn {i + 1} so that its text can't be told from the rest")
    around: list[list[str]] = []
    for sentinel in ("Qz7f0Xw", "Kj9vR2b"):
        while sentinel in text:
            sentinel += sentinel[0]
        other = [*messages[:i], {"role": messages[i]["role"], "content": sentinel}, *messages[i + 1 :]]
        parts = render_chat(tokenizer, other).split(sentinel)  # type: ignore[arg-type]
        if len(parts) != 2:
            raise changed
        around.append(parts)
    (head, tail), other_way = around
    own = len(text) - len(tail)
    if other_way != [head, tail] or not text.endswith(tail):
        raise changed
    if not 0 <= start <= own:
        start = len(head)
        if not text.startswith(head) or start > own:
            raise changed
    if not text[start:own].strip():
        raise BadRow(f"the chat template leaves nothing of turn {i + 1} to train on")
    return start, own


def _close(text: str, own: int, limit: int, specials: tuple[str, ...]) -> tuple[int, bool]:
    """Return where a turn with own text up to `own` ends, after its special tokens, and True if there are any."""
    at, closed = own, False
    while True:
        begins = _past_space(text, at)
        hit = next((s for s in specials if text.startswith(s, begins)), None)
        # The first special token closes the turn. A second one counts only at the end of the whole text: before
        # another turn it is the beginning of that turn.
        if hit is None or begins + len(hit) > limit or (closed and text[begins + len(hit) :].strip()):
            return at, closed
        at, closed = begins + len(hit), True


_SPECIALS: WeakKeyDictionary[Any, tuple[Any, tuple[str, ...]]] = WeakKeyDictionary()


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the texts of all special tokens, longest first, with those that have no name (<|eot_id|>)."""
    now = (len(tokenizer), tuple(map(str, tokenizer.all_special_tokens)))
    known = _SPECIALS.get(tokenizer)
    if known is None or known[0] != now:
        added = (getattr(tokenizer, "added_tokens_decoder", None) or {}).values()
        texts = {*now[1], *(str(t.content) for t in added if t.special)} - {""}
        known = _SPECIALS[tokenizer] = (now, tuple(sorted(texts, key=lambda t: (-len(t), t))))
    return known[1]


def tokenize(tokenizer: Any, texts: Sequence[str], special: bool = False) -> list[list[int]]:
    """Return the token ids of each text.

    Args:
        tokenizer: The tokenizer.
        texts: The texts.
        special: Add the tokenizer's special tokens. A chat template writes its own.
    """
    if not texts:
        return []
    out = tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in out["input_ids"]]


def tokenize_rendered(tokenizer: Any, conversations: Sequence[Rendered]) -> list[tuple[list[int], list[float]]]:
    """Return tokens and weights of each conversation, up to the end of its last span.

    The tokens before a span are those of the text before it alone, since the model sees these when it has to write the
    span: if a token of the whole text would cross the border, the two sides are tokenized separately. Text between
    special tokens is tokenized separately, and once only if it is repeated (as generation prompts are).
    """
    if not conversations:
        return []
    marks = _marks(tokenizer, conversations[0].text)
    plans = [_plan(c, marks) for c in conversations]
    texts = list({c.text[a:cut]: None for c, plan in zip(conversations, plans, strict=True) for a, _, cut, _ in plan})
    ids = dict(zip(texts, tokenize(tokenizer, texts), strict=True))
    out = []
    for c, plan in zip(conversations, plans, strict=True):
        tokens: list[int] = []
        weights: list[float] = []
        for a, b, cut, weight in plan:
            longer = ids[c.text[a:cut]]
            if b == a:
                segment = longer
                tokens += segment
            elif longer[: len(segment)] == segment:
                tokens += longer[len(segment) :]
                segment = longer
            else:
                rest = continuation(tokenizer, c.text[b:cut])
                tokens += rest
                segment = segment + rest
            weights += [weight] * (len(tokens) - len(weights))
        if not c.closed and tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
            weights.append(1.0)
        if weights:
            weights[0] = 0.0
        out.append((tokens, weights))
    return out


def end_of_turn_token(tokenizer: Any) -> int | None:
    """Return the special token with which the chat template ends an assistant's turn.

    A model that answers in the template writes it when it has finished, even if it is not the tokenizer's end token.
    None if there is no template, or if the template has no such token.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        rendered = render_with_loss(
            tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "completion"
        )
    except BadRow:  # a template for other roles
        return None
    after = tokenize(tokenizer, [rendered.text[rendered.answer_end :]])[0]
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    return next((t for t in after if t in special), None)


def _plan(c: Rendered, marks: re.Pattern[str] | None) -> list[tuple[int, int, int, float]]:
    """Return (beginning of its segment, from, to, weight) of each part of the text up to the last span.

    Segments begin at `marks`; the edges of spans cut them into parts.
    """
    stop = c.spans[-1][1]
    begins = {m.start() for m in marks.finditer(c.text, 0, stop)} if marks else set()
    cuts = sorted({0, stop, *begins, *(edge for span in c.spans for edge in span)})
    plan, a = [], 0
    for low, high in zip(cuts, cuts[1:], strict=False):
        a = low if low in begins else a
        plan.append((a, low, high, float(any(start <= low < end for start, end in c.spans))))
    return plan


def _splits(tokenizer: Any, mark: str) -> bool:
    """Return True if text before this special token and text from it on are tokenized independently."""
    for left, right in (("a", "b"), ("a ", " b"), ("a\n", "\n\nb")):
        whole, before, after = tokenize(tokenizer, [left + mark + right, left, mark + right])
        if whole != before + after or len(tokenize(tokenizer, [mark])[0]) != 1:
            return False
    return True


def _marks(tokenizer: Any, text: str) -> re.Pattern[str] | None:
    """Return a pattern of the special tokens at which a text can be split before it is tokenized."""
    marks = [s for s in special_tokens(tokenizer) if s in text and _splits(tokenizer, s)]
    return re.compile("|".join(map(re.escape, marks))) if marks else None


def continuation(tokenizer: Any, piece: str) -> list[int]:
    """Return the tokens of a text that continues another, without the space that some tokenizers put first."""
    return continuations(tokenizer, [piece])[0]


def continuations(tokenizer: Any, pieces: Sequence[str]) -> list[list[int]]:
    """Return `continuation` of each text."""
    named = (str(t) for t in tokenizer.all_special_tokens)
    anchor = next((t for t in named if t and _splits(tokenizer, t)), "")
    return [ids[1 if anchor else 0 :] for ids in tokenize(tokenizer, [anchor + piece for piece in pieces])]
