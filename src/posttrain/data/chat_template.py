"""Conversations → text and the characters that carry loss, for any chat template.

What has to be learnt of an assistant turn is what the model will have to write there: everything between the
generation prompt, as this template renders it, and the end of the turn, its end token included. The beginning is found
by rendering the conversation before the turn, which needs nothing of the template. The end is where the turn's text
ends if that follows at once, and otherwise (the template puts something in between, or changes the text) it is found by
rendering the conversation with other texts in the turn's place: what follows them follows the turn. So is the beginning
where a template renders a conversation's beginning otherwise than the whole, or refuses it. White space behind the end
token is not learnt. Where a template writes no end token behind the last turn, the tokenizer's own is added and learnt.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

from posttrain.core.types import Message
from posttrain.data.formats import BadRow


@dataclass(frozen=True)
class Rendered:
    """A conversation's text; `spans` are the character ranges that carry loss; `closed`: the last ends a turn."""

    text: str
    spans: tuple[tuple[int, int], ...]
    closed: bool = True
    answer_end: int = 0
    """Where the last turn's own text ends, before its end token."""


def render(tokenizer: Any, messages: Sequence[Message], generation: bool = False) -> str:
    """The template's text of a conversation. Raises BadRow with the template's own complaint."""
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)
    except Exception as error:  # a template may raise anything it likes
        raise BadRow(f"the chat template refuses it: {error}") from error
    return str(text)


def render_with_loss(
    tokenizer: Any, messages: Sequence[Message], loss_on: Literal["completion", "assistant", "all"]
) -> Rendered:
    """Text and loss spans: of the last assistant turn, of every one, or of everything.

    Raises BadRow for a conversation without an assistant turn, an empty one, or one whose text the template changes
    so that it can't be found again.
    """
    text = render(tokenizer, messages)
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
    """(start, end, whether an end token closes it, where its own text ends) of assistant turn i."""
    specials = special_tokens(tokenizer)
    content = messages[i]["content"].strip()
    before = _try(tokenizer, messages[:i], generation=True) if i else ""
    start = len(before) if before and text.startswith(before) else -1
    own = -1
    if start >= 0:
        at = _past_space(text, start)
        # Only right here, and only with the turn's end behind it: the text "end" also stands in "<|end|>".
        if text.startswith(content, at) and _ends_turn(text, at + len(content), specials):
            own = at + len(content)
    if own < 0:
        start, own = _by_sentinel(tokenizer, messages, i, text, start)
    limit = len(text)
    if i < len(messages) - 1:
        # A special token that comes only with the next turn is that turn's beginning.
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
        return render(tokenizer, messages, generation)
    except BadRow:
        return ""


def _by_sentinel(tokenizer: Any, messages: Sequence[Message], i: int, text: str, start: int) -> tuple[int, int]:
    """The characters of turn i, from rendering the conversation with two other texts in its place.

    start: where the turn is known to begin, or -1.
    """
    changed = BadRow(f"the chat template changes turn {i + 1} so that its text can't be told from the rest")
    around = []
    for sentinel in ("Qz7f0Xw", "Kj9vR2b"):
        while sentinel in text:
            sentinel += sentinel[0]
        other = [*messages[:i], {"role": messages[i]["role"], "content": sentinel}, *messages[i + 1 :]]
        parts = render(tokenizer, other).split(sentinel)  # type: ignore[arg-type]
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
        raise BadRow(f"the chat template leaves nothing to learn of turn {i + 1}")
    return start, own


def _close(text: str, own: int, limit: int, specials: tuple[str, ...]) -> tuple[int, bool]:
    """Where a turn ends whose own text ends at `own`: behind the special tokens that follow it, up to `limit`."""
    at, closed = own, False
    while True:
        begins = _past_space(text, at)
        hit = next((s for s in specials if text.startswith(s, begins)), None)
        # The first special token closes the turn. One more only at the very end of the text: before another turn it
        # would be that turn's beginning.
        if hit is None or begins + len(hit) > limit or (closed and text[begins + len(hit) :].strip()):
            return at, closed
        at, closed = begins + len(hit), True


_SPECIALS: WeakKeyDictionary[Any, tuple[Any, tuple[str, ...]]] = WeakKeyDictionary()


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of all special tokens, longest first; those added without a name (<|eot_id|>) are among them."""
    now = (len(tokenizer), tuple(map(str, tokenizer.all_special_tokens)))
    known = _SPECIALS.get(tokenizer)
    if known is None or known[0] != now:
        added = (getattr(tokenizer, "added_tokens_decoder", None) or {}).values()
        texts = {*now[1], *(str(t.content) for t in added if t.special)} - {""}
        known = _SPECIALS[tokenizer] = (now, tuple(sorted(texts, key=lambda t: (-len(t), t))))
    return known[1]


def tokenize(tokenizer: Any, texts: Sequence[str], special: bool = False) -> list[list[int]]:
    """Token ids of each text; special=False adds none (a chat template writes its own)."""
    if not texts:
        return []
    out = tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in out["input_ids"]]


def tokenize_rendered(tokenizer: Any, conversations: Sequence[Rendered]) -> list[tuple[list[int], list[float]]]:
    """(tokens, weights) of each conversation, up to the end of its last span.

    The tokens before a span are those of the text before it alone, since that is what the model sees when it has to
    write the span: where a token of the whole text would straddle the border, the two sides are tokenized apart. What
    stands between special tokens is tokenized by itself, and once where it comes again (as generation prompts do).
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


def turn_end(tokenizer: Any) -> int | None:
    """The special token by which the chat template ends an assistant's turn; None without a template, or without one.

    A model that answers in the template says it when it has finished, whether or not it is the tokenizer's end token.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        rendered = render_with_loss(
            tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "completion"
        )
    except BadRow:  # a template for other roles: nothing is known of it
        return None
    behind = tokenize(tokenizer, [rendered.text[rendered.answer_end :]])[0]
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    return next((t for t in behind if t in special), None)


def _plan(c: Rendered, marks: re.Pattern[str] | None) -> list[tuple[int, int, int, float]]:
    """Steps of (where the segment begins, from, to, weight): at `marks` a segment begins, at spans' edges it pauses."""
    stop = c.spans[-1][1]
    begins = {m.start() for m in marks.finditer(c.text, 0, stop)} if marks else set()
    cuts = sorted({0, stop, *begins, *(edge for span in c.spans for edge in span)})
    plan, a = [], 0
    for low, high in zip(cuts, cuts[1:], strict=False):
        a = low if low in begins else a
        learnt = any(start <= low < end for start, end in c.spans)
        plan.append((a, low, high, 1.0 if learnt else 0.0))
    return plan


def _splits(tokenizer: Any, mark: str) -> bool:
    """Whether text before this special token and text from it on are tokenized without regard to each other."""
    for left, right in (("a", "b"), ("a ", " b"), ("a\n", "\n\nb")):
        whole, before, after = tokenize(tokenizer, [left + mark + right, left, mark + right])
        if whole != before + after or len(tokenize(tokenizer, [mark])[0]) != 1:
            return False
    return True


def _marks(tokenizer: Any, text: str) -> re.Pattern[str] | None:
    """The special tokens of a text at which it can be tokenized in segments."""
    marks = [s for s in special_tokens(tokenizer) if s in text and _splits(tokenizer, s)]
    return re.compile("|".join(map(re.escape, marks))) if marks else None


def continuation(tokenizer: Any, piece: str) -> list[int]:
    """Tokens of a text that goes on another: without the space that some tokenizers put before a text's beginning."""
    return continuations(tokenizer, [piece])[0]


def continuations(tokenizer: Any, pieces: Sequence[str]) -> list[list[int]]:
    """`continuation` of each text."""
    named = (str(t) for t in tokenizer.all_special_tokens)
    anchor = next((t for t in named if t and _splits(tokenizer, t)), "")
    return [ids[1 if anchor else 0 :] for ids in tokenize(tokenizer, [anchor + piece for piece in pieces])]
