"""Encode rows that no chat template renders: plain texts, and prompts and completions that are joined as text.

Such a text may be rendered already, by the code that made the file: it begins or ends with a special token. Its special
tokens are kept then, and it gets one token that begins a text and one that ends it, not two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from posttrain.config import DataConfig
from posttrain.data.bad_rows import BadRow
from posttrain.data.formats import Record
from posttrain.data.learnt_turns import NO_END, RENDERED_TEXTS, SPELT, UNENDED
from posttrain.data.special_text import guard
from posttrain.data.tokenizing import continuations, special_tokens, text_tokens, tokenize


@dataclass(frozen=True)
class PlainTurns:
    """Hold turns that are joined without a template: (text, whether it carries loss).

    Attributes:
        turns: The turns, guarded (see `special_text`).
        apart: Tokenize each turn on its own, as the replies of an environment are. False: two turns, whose text is
            tokenized as one.
        end: The end token follows, with loss.
        notes: Numbers of what is worth telling.
    """

    turns: list[tuple[str, bool]]
    apart: bool = False
    end: bool = True
    notes: Mapping[str, int] = field(default_factory=dict)

    def without_end(self) -> PlainTurns:
        """Return the same turns without the token that ends the text."""
        return replace(self, end=False)


def plain_turns(record: Record, tokenizer: Any, config: DataConfig) -> PlainTurns:
    """Return a record as turns of plain text.

    Args:
        record: The record.
        tokenizer: The tokenizer.
        config: Settings of the data.

    Raises:
        BadRow: The text or the completion is empty, or the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise BadRow(*NO_END)
    if record.text is not None:
        if not record.text.strip():
            raise BadRow("empty text")
        return _turns([("", config.loss_on == "all"), (record.text, True)], tokenizer, config)
    require_texts(record.messages, {"tools": record.tools, "chat_template_kwargs": record.template_args})
    *before, last = record.messages
    if last["role"] != "assistant" or not last["content"].strip():
        raise BadRow("empty completion" if last["role"] == "assistant" else "the last turn is not the assistant's")
    if config.loss_on == "assistant" and any(m["role"] == "assistant" for m in before):
        learnt = [(m["content"], m["role"] == "assistant" and m.get("train", True)) for m in record.messages]
        turns, unended = _turns(learnt, tokenizer, config, apart=True), sum(bool(loss) for _, loss in learnt[:-1])
        return replace(turns, notes={**turns.notes, UNENDED: unended} if unended else turns.notes)
    if not last.get("train", True):
        raise BadRow("no turn to train on: each has train: false")
    prompt = "".join(m["content"] for m in before)
    return _turns([(prompt, config.loss_on == "all"), (last["content"], True)], tokenizer, config)


def require_texts(messages: Sequence[Mapping[str, Any]], columns: Mapping[str, Any]) -> None:
    """Raise BadRow if turns, or columns beside them, say more than plain text can show."""
    names = [name for m in messages for name in ("tool_calls", "reasoning_content", "images") if m.get(name)]
    if names := [*names, *(name for name, value in columns.items() if value)]:
        raise BadRow(f"{names[0]} can't be written as plain text: use a chat template (data.chat: true)")


def join_texts(row: Mapping[str, Any]) -> str:
    """Return the turns of a row's prompt as one text. Raises BadRow if they say more than text can show."""
    require_texts(row["messages"], {name: row.get(name) for name in ("tools", "template_args")})
    return "".join(m["content"] for m in row["messages"])


def _turns(turns: list[tuple[str, bool]], tokenizer: Any, config: DataConfig, apart: bool = False) -> PlainTurns:
    texts, notes = _prepared([text for text, _ in turns], tokenizer, config.special_tokens)
    while texts[-1].rstrip().endswith(tokenizer.eos_token):  # the one that ends the text is added when it is encoded
        texts[-1] = texts[-1].rstrip().removesuffix(tokenizer.eos_token)
    return PlainTurns([(text, loss) for text, (_, loss) in zip(texts, turns, strict=True)], apart, True, notes)


def _prepared(texts: Sequence[str], tokenizer: Any, special: str) -> tuple[list[str], dict[str, int]]:
    """Return texts that belong together, and what is worth telling.

    They are guarded unless they are rendered already; a token that begins the text is left to the tokenizer.
    """
    out, notes = list(texts), dict[str, int]()
    whole = "".join(texts).strip()
    if special != "allow" and whole.startswith(special_tokens(tokenizer)) or whole.endswith(special_tokens(tokenizer)):
        notes = {RENDERED_TEXTS: 1}
    elif special != "allow":
        found: Counter[str] = Counter()
        out = [guard(text, text_tokens(tokenizer), found) for text in texts]
        notes = {SPELT: found.total()} if found else {}
    first, begin = next((n for n, text in enumerate(out) if text), 0), str(tokenizer.bos_token or "")
    if begin and out[first].startswith(begin):
        while out[first].startswith(begin):
            out[first] = out[first].removeprefix(begin)
        if tokenizer.bos_token_id not in tokenize(tokenizer, ["a"], special=True)[0]:
            out[first] = begin + out[first]
    return out, notes


def plain_prompts(texts: Sequence[str], tokenizer: Any, special: str = "text") -> list[list[int]]:
    """Return the token ids of prompts in plain text, with what the tokenizer puts first.

    Args:
        texts: The prompts.
        tokenizer: The tokenizer.
        special: "text" or "allow", as for `render_chat`.
    """
    prepared = [_prepared([text], tokenizer, special)[0][0] for text in texts]
    return _without_end(tokenize(tokenizer, prepared, special=True), tokenizer)


def _without_end(encoded: Sequence[list[int]], tokenizer: Any) -> list[list[int]]:
    """Return token ids without the end token that some tokenizers append."""
    return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in encoded]


def encode_plain(plain: Sequence[PlainTurns], tokenizer: Any) -> list[tuple[list[int], list[float]]]:
    """Return tokens and weights of each, tokenizing in few calls."""
    firsts = _without_end(tokenize(tokenizer, [p.turns[0][0] for p in plain], special=True), tokenizer)
    joined = ["" if p.apart else "".join(text for text, _ in p.turns) for p in plain]
    wholes = _without_end(tokenize(tokenizer, joined, special=True), tokenizer)
    cut = [not p.apart and w[: len(f)] == f for p, f, w in zip(plain, firsts, wholes, strict=True)]
    behind = [text for p, c in zip(plain, cut, strict=True) if not c for text, _ in p.turns[1:]]
    rest = iter(continuations(tokenizer, behind))
    return [
        _joined(p, [f, *([w[len(f) :]] if c else [next(rest) for _ in p.turns[1:]])], tokenizer.eos_token_id)
        for p, f, w, c in zip(plain, firsts, wholes, cut, strict=True)
    ]


def _joined(plain: PlainTurns, pieces: list[list[int]], end: int) -> tuple[list[int], list[float]]:
    """Return the first turn (with what the tokenizer puts first), the other turns, and the end of text with loss."""
    if plain.end:
        pieces.append([end])
    carries_loss = [*(loss for _, loss in plain.turns), True]
    tokens = [t for piece in pieces for t in piece]
    weights = [float(loss) for piece, loss in zip(pieces, carries_loss, strict=False) for _ in piece]
    return tokens, [0.0, *weights[1:]] if weights else []
