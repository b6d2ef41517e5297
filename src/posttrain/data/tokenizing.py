"""Turn rendered texts into token ids, the same for training and for inference.

Special tokens that a template writes become tokens; those that are spelt inside a text (see `special_text`) become
ordinary text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from posttrain.core.errors import DataError
from posttrain.data.bad_rows import BadRow
from posttrain.data.learnt_turns import Rendered, render_with_loss
from posttrain.data.special_text import ControlTokens, cut_guarded, is_guarded, restore

Encoded = tuple[list[int], list[float]]
"""Token ids and loss weights."""


class _Known(NamedTuple):
    """Hold what is found once about a tokenizer: special tokens, all added ones, where a text splits."""

    now: Any
    special: ControlTokens
    every: ControlTokens
    splits: dict[str, bool]


_KNOWN: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()


def _known(tokenizer: Any) -> _Known:
    now = (len(tokenizer), tuple(map(str, tokenizer.all_special_tokens)))
    known = _KNOWN.get(tokenizer)
    if known is None or known.now != now:
        added = list((getattr(tokenizer, "added_tokens_decoder", None) or {}).values())
        specials = {*now[1], *(str(t.content) for t in added if t.special)} - {""}
        every = ControlTokens.of([*specials, *(str(t.content) for t in added)])
        known = _KNOWN[tokenizer] = _Known(now, ControlTokens.of(specials), every, {})
    return known


def text_tokens(tokenizer: Any) -> ControlTokens:
    """Return the special tokens that a text without a template must not contain."""
    return _known(tokenizer).special


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the texts of all special tokens, longest first, with those that have no name (<|eot_id|>)."""
    return _known(tokenizer).special.texts


def tokenize(tokenizer: Any, texts: Sequence[str], special: bool = False) -> list[list[int]]:
    """Return the token ids of each text.

    Args:
        tokenizer: The tokenizer.
        texts: The texts; guarded parts of them become ordinary text.
        special: Add the tokenizer's special tokens. A chat template writes its own.
    """
    if not texts:
        return []
    plain = [text for text in texts if not is_guarded(text)]
    ids = iter(_encode(tokenizer, plain, special))
    return [_guarded_ids(tokenizer, text, special) if is_guarded(text) else next(ids) for text in texts]


def _encode(tokenizer: Any, texts: Sequence[str], special: bool = False, split: bool = False) -> list[list[int]]:
    """Return what the tokenizer makes of each text; `split` encodes special tokens as text."""
    if not texts:
        return []
    options: dict[str, Any] = {"split_special_tokens": True} if split else {}
    out = tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False, **options)
    return [list(ids) for ids in out["input_ids"]]


def _guarded_ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Return the ids of a text with guarded parts: added tokens that are visible in it are tokens, and no others."""
    pattern = _known(tokenizer).every.pattern
    pieces = re.split(f"({pattern.pattern})", text) if pattern else [text]
    ids: list[int] = []
    first = True
    for piece in filter(None, pieces):
        if is_guarded(piece):
            ids += _as_text(tokenizer, piece, first)
        else:
            ids += _encode(tokenizer, [piece])[0] if first else continuation(tokenizer, piece)
        first = False
    if special:
        alone, added = (_encode(tokenizer, ["a"], special=add)[0] for add in (False, True))
        start = next((n for n in range(len(added)) if added[n : n + len(alone)] == alone), 0)
        ids = added[:start] + ids + added[start + len(alone) :]
    return ids


def _as_text(tokenizer: Any, piece: str, first: bool) -> list[int]:
    """Return the ids of a guarded piece as ordinary text.

    The whole piece is encoded by the tokenizer's own way of reading special tokens as text. Tokenizers for which that
    still gives one (it concerns added tokens that are not special, and some vocabularies) get the piece in parts, cut
    inside each guarded run, so that none can be found.

    Raises:
        DataError: A special token of a single character can't be told from the character.
    """
    text = restore(piece)
    forbidden = {tokenizer.convert_tokens_to_ids(t) for t in _known(tokenizer).every.texts if t in text}
    if first:
        ids = _encode(tokenizer, [text], split=True)[0]
    else:
        # After a line end, so that no tokenizer puts in the space that begins a text.
        line, whole = _encode(tokenizer, ["\n", "\n" + text], split=True)
        ids = whole[len(line) :] if whole[: len(line)] == line else [*forbidden]
    if forbidden.isdisjoint(ids) and ids:
        return ids
    for every in (False, True):
        parts = cut_guarded(piece, every)
        ids = [t for n, part in enumerate(parts) for t in _part_ids(tokenizer, part, first and n == 0)]
        if forbidden.isdisjoint(ids):
            return ids
    raise DataError(
        f"special tokens in {text[:60]!r} can't be encoded as text by this tokenizer. Remove them from the rows, or "
        "set data.special_tokens: allow"
    )


def _part_ids(tokenizer: Any, part: str, first: bool) -> list[int]:
    return _encode(tokenizer, [part])[0] if first else continuation(tokenizer, part)


def tokenize_rendered(tokenizer: Any, conversations: Sequence[Rendered]) -> list[list[Encoded]]:
    """Return tokens and weights of each conversation, up to the end of its last span: one sample, or several.

    The tokens before a span are those of the text before it alone, since the model sees these when it has to write the
    span: if a token of the whole text would cross the border, the two sides are tokenized separately. That border is in
    the prompt of a later span too, where the model sees the token that crosses it. Such a turn is a sample of its own.

    Text between special tokens is tokenized separately, and once only if it is repeated (as generation prompts are).
    """
    if not conversations:
        return []
    marks = _marks(tokenizer, conversations[0].text)
    plans = [_plan(c, marks) for c in conversations]
    texts = list({c.text[a:cut]: None for c, plan in zip(conversations, plans, strict=True) for a, _, cut, _ in plan})
    ids = dict(zip(texts, tokenize(tokenizer, texts), strict=True))
    return [_samples(tokenizer, c, plan, ids) for c, plan in zip(conversations, plans, strict=True)]


def _samples(
    tokenizer: Any, c: Rendered, plan: Sequence[tuple[int, int, int, float]], ids: Mapping[str, list[int]]
) -> list[Encoded]:
    """Return the samples of a conversation, given the tokens of its segments."""
    tokens: list[int] = []
    weights: list[float] = []
    crossed: set[int] = set()
    for a, b, cut, weight in plan:
        longer = ids[c.text[a:cut]]
        if b == a:
            segment = longer
            tokens += segment
        elif longer[: len(segment)] == segment:
            tokens += longer[len(segment) :]
            segment = longer
        else:
            crossed.add(b)
            rest = continuation(tokenizer, c.text[b:cut])
            tokens += rest
            segment = segment + rest
        weights += [weight] * (len(tokens) - len(weights))
    alone = [span for span in c.spans[:-1] if span[0] in crossed and c.spans[0][0]]
    if alone:
        others = tuple(span for span in c.spans if span not in alone)
        separate = [replace(c, spans=(span,), closed=True) for span in alone] + [replace(c, spans=others)]
        return [sample for samples in tokenize_rendered(tokenizer, separate) for sample in samples]
    if not c.closed and tokenizer.eos_token_id is not None:
        tokens.append(tokenizer.eos_token_id)
        weights.append(1.0)
    if weights:
        weights[0] = 0.0
    return [(tokens, weights)]


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
        )[-1]
    except BadRow:  # a template for other roles
        return None
    after = tokenize(tokenizer, [rendered.text[rendered.answer_end :]])[0]
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    return next((t for t in reversed(after) if t in special), None)


def _plan(c: Rendered, marks: re.Pattern[str] | None) -> list[tuple[int, int, int, float]]:
    """Return (beginning of its segment, from, to, weight) of each part of the text up to the last span.

    Segments begin at `marks`; the edges of spans cut them into parts.
    """
    stop = c.spans[-1][1]
    begins = {m.start() for m in marks.finditer(c.text, 0, stop)} if marks else set()
    cuts = sorted({0, stop, *begins, *(edge for span in c.spans for edge in span)})
    plan, a, at = [], 0, 0
    for low, high in zip(cuts, cuts[1:], strict=False):
        a = low if low in begins else a
        while c.spans[at][1] <= low:
            at += 1
        plan.append((a, low, high, float(c.spans[at][0] <= low)))
    return plan


def _splits(tokenizer: Any, mark: str) -> bool:
    """Return True if text before this special token and text from it on are tokenized independently; found once."""
    kept = _known(tokenizer).splits
    if mark not in kept:
        kept[mark] = _tried_splits(tokenizer, mark)
    return kept[mark]


def _tried_splits(tokenizer: Any, mark: str) -> bool:
    for left, right in (("a", "b"), ("a ", " b"), ("a\n", "\n\nb")):
        whole, before, after = _encode(tokenizer, [left + mark + right, left, mark + right])
        if whole != before + after or len(_encode(tokenizer, [mark])[0]) != 1:
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
