"""Conversations → text and the characters that carry loss, for any chat template.

What has to be learnt of an assistant turn is what the model will have to write there: everything between the
generation prompt, as this template renders it, and the end of the turn, its end token included. Both ends are found by
rendering the conversation up to the turn, which needs nothing of the template. Where a template renders a
conversation's beginning otherwise than the whole (some drop earlier reasoning, some refuse one that starts with the
assistant), the turn is found by rendering once more with another text in its place. White space behind the end token
is not learnt. Where a template writes no end token behind the last turn, the tokenizer's own is added and learnt.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.data.layouts import BadRow
from posttrain.types import Message

SENTINELS = ("Qz7f0Xw", "Kj9vR2b")


@dataclass(frozen=True)
class Rendered:
    """A conversation's text; `spans` are the character ranges that carry loss; `closed` whether the last ends a turn."""

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
    if loss_on == "all":
        return Rendered(text, ((0, len(text)),))
    if not turns:
        raise BadRow("no assistant turn in it")
    if loss_on == "completion":
        turns = turns[-1:]
        if turns[0] != len(messages) - 1:
            raise BadRow(f"the last turn is the {messages[-1]['role']}'s, not the assistant's")
    spans, closed, answer_end = [], True, 0
    for i in turns:
        if not messages[i]["content"].strip():
            raise BadRow("empty completion")
        start, end, closed, answer_end = _turn(tokenizer, messages, i, text)
        spans.append((start, end))
    return Rendered(text, tuple(spans), closed or turns[-1] != len(messages) - 1, answer_end)


def _turn(tokenizer: Any, messages: Sequence[Message], i: int, text: str) -> tuple[int, int, bool, int]:
    """(start, end, whether an end token closes it, where its own text ends) of assistant turn i."""
    after = text
    if i < len(messages) - 1:
        after = _try(tokenizer, messages[: i + 1])
        # A last turn may be closed by more than an earlier one (an end-of-text token): what the whole has counts.
        after = os.path.commonprefix([after, text]) if after else ""
    before = _try(tokenizer, messages[:i], generation=True) if i else ""
    content = messages[i]["content"].strip()
    if i and before and after.startswith(before) and content in after[len(before) :]:
        start = len(before)
        own = start + after[start:].rindex(content) + len(content)
    else:
        start, own = _by_sentinel(tokenizer, messages, i, text)
    end, closed = _close(tokenizer, text, own)
    return start, end, closed, own


def _try(tokenizer: Any, messages: Sequence[Message], generation: bool = False) -> str:
    try:
        return render(tokenizer, messages, generation)
    except BadRow:
        return ""


def _by_sentinel(tokenizer: Any, messages: Sequence[Message], i: int, text: str) -> tuple[int, int]:
    """The characters of turn i, from rendering the conversation with two other texts in its place."""
    renders = []
    for sentinel in SENTINELS:
        other = [*messages[:i], {**messages[i], "content": sentinel}, *messages[i + 1 :]]
        renders.append(render(tokenizer, other))  # type: ignore[arg-type]
    at = renders[0].find(SENTINELS[0])
    head, tail = renders[0][:at], renders[0][at + len(SENTINELS[0]) :]
    if at < 0 or renders[1] != head + SENTINELS[1] + tail or not (text.startswith(head) and text.endswith(tail)):
        raise BadRow(f"the chat template changes turn {i + 1} so that its text can't be told from the rest")
    start, end = len(head), len(text) - len(tail)
    found, content = text[start:end].strip(), messages[i]["content"].strip()
    if not found or not content.endswith(found[-min(len(found), 40) :]):
        raise BadRow(f"the chat template leaves nothing to learn of turn {i + 1}")
    return start, end


def _close(tokenizer: Any, text: str, own: int) -> tuple[int, bool]:
    """Where a turn ends whose own text ends at `own`: behind the special tokens that follow it, if any do."""
    specials = sorted({str(t) for t in tokenizer.all_special_tokens} | _added(tokenizer), key=len, reverse=True)
    at, closed = own, False
    while True:
        skip = len(text[at:]) - len(text[at:].lstrip())
        hit = next((s for s in specials if s and text.startswith(s, at + skip)), None)
        # The first special token closes the turn. One more only at the very end of the text: before another turn it
        # would be that turn's beginning.
        if hit is None or (closed and text[at + skip + len(hit) :].strip()):
            return (at if closed else own), closed
        at, closed = at + skip + len(hit), True


def _added(tokenizer: Any) -> set[str]:
    decoder = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {str(t.content) for t in decoder.values() if t.special}


def tokenize(tokenizer: Any, texts: Sequence[str], special: bool = False) -> list[list[int]]:
    """Token ids of each text; special=False adds none (a chat template writes its own)."""
    if not texts:
        return []
    out = tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in out["input_ids"]]


def tokenize_rendered(
    tokenizer: Any, conversations: Sequence[Rendered], whole: bool = False
) -> list[tuple[list[int], list[float]]]:
    """(tokens, weights) of each conversation, up to the end of its last span (to the end of its text if `whole`).

    The text before a span is tokenized by itself as well, since that is what the model sees when it has to write the
    span: where the whole text's tokens don't begin with those (a token would straddle the border), the two sides are
    tokenized apart.
    """
    cuts: list[str] = []
    for c in conversations:
        cuts.extend(c.text[:edge] for span in c.spans for edge in span)
        if whole:
            cuts.append(c.text)
    found = iter(tokenize(tokenizer, cuts))
    out = []
    for c in conversations:
        tokens: list[int] = []
        weights: list[float] = []
        at = 0
        for start, end in c.spans:
            before, through = next(found), next(found)
            tokens, weights = _extend(tokenizer, tokens, weights, before, c.text[at:start], 0.0)
            tokens, weights = _extend(tokenizer, tokens, weights, through, c.text[start:end], 1.0)
            at = end
        if whole:
            tokens, weights = _extend(tokenizer, tokens, weights, next(found), c.text[at:], 0.0)
        if not c.closed and tokenizer.eos_token_id is not None:
            tokens, weights = [*tokens, tokenizer.eos_token_id], [*weights, 1.0]
        if weights:
            weights[0] = 0.0
        out.append((tokens, weights))
    return out


def _extend(
    tokenizer: Any, tokens: list[int], weights: list[float], longer: list[int], piece: str, weight: float
) -> tuple[list[int], list[float]]:
    """Go on to `longer` where it begins with the tokens so far, else by the tokens of the piece alone."""
    if longer[: len(tokens)] == tokens:
        return longer, weights + [weight] * (len(longer) - len(tokens))
    rest = tokenize(tokenizer, [piece])[0] if piece else []
    return tokens + rest, weights + [weight] * len(rest)
