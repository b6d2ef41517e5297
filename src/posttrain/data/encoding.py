"""Turn records into token ids and loss weights, by the chat template or as plain text."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.core.progress import Track
from posttrain.core.types import Sample
from posttrain.data import chat_template as chat
from posttrain.data.formats import BadRow, Record
from posttrain.data.parts import PlacedRow
from posttrain.data.rows import Rows

BATCH = 1000
"""Rows tokenized at a time."""
BATCH_CHARACTERS = 2_000_000
"""Length of their texts, at most."""
Encoded = tuple[list[int], list[float]]
"""Token ids and loss weights."""
_T = TypeVar("_T")
_Opened = tuple[int, tuple[PlacedRow, Sequence[Record], Callable[..., Any]]]


@dataclass(frozen=True)
class PlainTurns:
    """Hold turns that are joined without a template: (text, whether it carries loss).

    Attributes:
        turns: The turns.
        apart: Tokenize each turn on its own, as the replies of an environment are. False: two turns, whose text is
            tokenized as one.
    """

    turns: list[tuple[str, bool]]
    apart: bool = False


def require_chat_template(
    tokenizer: Any, instead: str = "data.chat=false to join prompt and completion as plain text"
) -> None:
    """Raise DataError if the tokenizer has no chat template; `instead` says how to do without."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"the tokenizer has no chat template, as base models have none. Give model.chat_template, or {instead}"
        )


def token_limit(config: DataConfig, context: int | None) -> int:
    """Return the largest number of tokens of a sample, given the model's length in tokens."""
    return min(config.max_tokens or context or 2**62, context or 2**62)


def encode_rows(
    rows: Rows,
    read: Callable[[PlacedRow], tuple[Sequence[Record], Callable[..., _T]]],
    tokenizer: Any,
    context: int | None,
) -> list[_T]:
    """Read rows and make an item of each; bad rows are collected, and cut ones counted.

    Args:
        rows: The rows.
        read: Returns for a row the records to encode (one, or the two answers of a pair), and a function that makes
            the item of their tokens and weights. Both may raise BadRow.
        tokenizer: The tokenizer.
        context: The model's length in tokens.

    Returns:
        The items, in the order of the rows.

    Raises:
        DataError: The tokenizer has no chat template, or rows can't be used.
    """
    items = sorted(encode_stream(rows, read, tokenizer, context), key=lambda item: item[0])
    rows.check(len(items))
    return [item for _, item in items]


def encode_stream(
    rows: Rows,
    read: Callable[[PlacedRow], tuple[Sequence[Record], Callable[..., _T]]],
    tokenizer: Any,
    context: int | None,
) -> Iterator[tuple[int, _T]]:
    """Yield the items that `encode_rows` makes, as the rows are in their files; only a few are in memory.

    Args:
        rows: The rows; the caller has to check them at the end.
        read: As for `encode_rows`.
        tokenizer: The tokenizer.
        context: The model's length in tokens.

    Returns:
        (place in the order, item) of each row.
    """

    def opened(row: PlacedRow) -> tuple[PlacedRow, Sequence[Record], Callable[..., _T]]:
        records, make = read(row)
        if row.config.chat and any(record.messages for record in records):
            require_chat_template(tokenizer)
        return row, records, make

    total, done = len(rows.order), 0
    with Track("tokenizing", total, shown=total > 5 * BATCH and os.environ.get("RANK", "0") == "0") as progress:
        for batch in _batches(rows.stream(opened)):
            yield from _encode_batch(batch, rows, tokenizer, context)
            done += len(batch)
            progress.update(done)


def _encode_batch(
    batch: Sequence[_Opened], rows: Rows, tokenizer: Any, context: int | None
) -> Iterator[tuple[int, Any]]:
    rendered = []
    for rank, (row, records, make) in batch:
        with rows.bad.collect(row.source):
            rendered.append((rank, row, make, [_render(record, tokenizer, row.config) for record in records]))
    encoded = iter(_encode([r for *_, texts in rendered for r in texts], tokenizer))
    for rank, row, make, texts in rendered:
        parts, limit = [next(encoded) for _ in texts], token_limit(row.config, context)
        with rows.bad.collect(row.source):
            item = make(*_fit(parts, limit, row.config))
            rows.truncated += any(len(tokens) > limit for tokens, _ in parts)
            yield rank, item


def _batches(items: Iterable[_Opened]) -> Iterator[list[_Opened]]:
    """Divide rows into batches by their number and the length of their texts."""
    batch: list[_Opened] = []
    size = 0
    for item in items:
        batch.append(item)
        size += sum(_length(record) for record in item[1][1])
        if len(batch) == BATCH or size > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _length(record: Record) -> int:
    return len(record.text or "") + sum(len(message["content"]) for message in record.messages)


def _fit(parts: Sequence[Encoded], limit: int, config: DataConfig) -> list[Encoded]:
    """Cut what is longer than `limit`. Raises BadRow if it must not be cut, or if no token with loss is left."""
    most = max(len(tokens) for tokens, _ in parts)
    if most > limit and config.on_long == "bad_row":
        raise BadRow(f"too long ({most} tokens, and the limit is {limit})")
    cut = [(tokens[:limit], weights[:limit]) for tokens, weights in parts]
    if not all(any(weights) for _, weights in cut):
        raise BadRow("no loss token left" + (f" (cut at {limit} tokens)" if most > limit else ""))
    return cut


def _render(record: Record, tokenizer: Any, config: DataConfig) -> chat.Rendered | PlainTurns:
    if record.text is not None:
        if not record.text.strip():
            raise BadRow("empty text")
        return PlainTurns([("", config.loss_on == "all"), (record.text, True)])
    if config.chat:
        return chat.render_with_loss(tokenizer, record.messages, config.loss_on)
    *before, last = record.messages
    if last["role"] != "assistant" or not last["content"].strip():
        raise BadRow("empty completion" if last["role"] == "assistant" else "the last turn is not the assistant's")
    if config.loss_on == "assistant" and any(m["role"] == "assistant" for m in before):
        return PlainTurns([(m["content"], m["role"] == "assistant") for m in record.messages], apart=True)
    prompt = "".join(m["content"] for m in before)
    return PlainTurns([(prompt, config.loss_on == "all"), (last["content"], True)])


def _encode(rendered: Sequence[chat.Rendered | PlainTurns], tokenizer: Any) -> list[Encoded]:
    """Return tokens and weights of each, tokenizing in few calls."""
    from_chat = iter(chat.tokenize_rendered(tokenizer, [r for r in rendered if isinstance(r, chat.Rendered)]))
    plain = [r for r in rendered if isinstance(r, PlainTurns)]
    firsts = without_end(chat.tokenize(tokenizer, [r.turns[0][0] for r in plain], special=True), tokenizer)
    wholes = without_end(
        chat.tokenize(tokenizer, ["" if r.apart else "".join(t for t, _ in r.turns) for r in plain], special=True),
        tokenizer,
    )
    from_plain = (_encode_plain(*parts, tokenizer) for parts in zip(plain, firsts, wholes, strict=True))
    return [next(from_chat) if isinstance(r, chat.Rendered) else next(from_plain) for r in rendered]


def without_end(encoded: Sequence[list[int]], tokenizer: Any) -> list[list[int]]:
    """Return token ids without the end token that some tokenizers append."""
    return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in encoded]


def _encode_plain(plain: PlainTurns, first: list[int], whole: list[int], tokenizer: Any) -> Encoded:
    """Return the first turn (with what the tokenizer puts first), the other turns, and the end of text with loss."""
    pieces = [first]
    if not plain.apart and whole[: len(first)] == first:
        pieces.append(whole[len(first) :])
    else:
        pieces += [chat.continuation(tokenizer, text) for text, _ in plain.turns[1:]]
    if tokenizer.eos_token_id is not None:
        pieces.append([tokenizer.eos_token_id])
    carries_loss = [*(loss for _, loss in plain.turns), True]
    tokens = [t for piece in pieces for t in piece]
    weights = [float(loss) for piece, loss in zip(pieces, carries_loss, strict=False) for _ in piece]
    return tokens, [0.0, *weights[1:]] if weights else []


def prompt_tokens(row: dict[str, Any], tokenizer: Any, config: DataConfig) -> list[int]:
    """Return the token ids of a row's prompt, generation prompt included, as a model that answers it reads them.

    Args:
        row: A row with `messages`, and `source` for messages of errors.
        tokenizer: The tokenizer.
        config: Settings of the data.

    Raises:
        DataError: The chat template refuses the row.
    """
    if not config.chat:
        text = "".join(m["content"] for m in row["messages"])
        return without_end(chat.tokenize(tokenizer, [text], special=True), tokenizer)[0]
    try:
        return chat.tokenize(tokenizer, [chat.render_chat(tokenizer, row["messages"], generation=True)])[0]
    except BadRow as error:
        raise DataError(f"{row.get('source', 'a row')}: {error}") from error


def prompt_with_completion(
    row: dict[str, Any], completion: str, tokenizer: Any, config: DataConfig, end: bool = False
) -> Sample:
    """Return the row's prompt with a completion, whose tokens have weight 1.

    Args:
        row: A row with `messages`, and `source` for messages of errors.
        completion: Text of the answer.
        tokenizer: The tokenizer.
        config: Settings of the data.
        end: Give the token that ends the answer weight 1 too.

    Raises:
        DataError: The completion is empty, or the chat template refuses the row.
    """
    record = Record((*row["messages"], {"role": "assistant", "content": completion}))
    try:
        rendered = _render(record, tokenizer, config.model_copy(update={"loss_on": "completion"}))
    except BadRow as error:
        raise DataError(f"{row.get('source', 'a row')}: {error}") from error
    if isinstance(rendered, chat.Rendered) and not end:
        rendered = chat.Rendered(rendered.text, ((rendered.spans[-1][0], rendered.answer_end),))
    tokens, weights = _encode([rendered], tokenizer)[0]
    if not isinstance(rendered, chat.Rendered) and not end and tokens[-1] == tokenizer.eos_token_id:
        tokens, weights = tokens[:-1], weights[:-1]
    return Sample(tokens, weights, row.get("source", ""))
