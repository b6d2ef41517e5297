"""Read documents for continued pretraining: every token is trained once, in pieces of a sequence's length."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from posttrain.config import DataConfig
from posttrain.core.epoch_order import RowWeights, epoch_order, epoch_size
from posttrain.core.errors import DataError
from posttrain.core.types import Sample
from posttrain.data.encoding import Encoded, ParsedRow
from posttrain.data.parts import PlacedRow
from posttrain.data.rows import PreparedItems, Rows
from posttrain.data.sample_store import SampleStore
from posttrain.data.stored_items import store_items


@dataclass(frozen=True)
class Documents(PreparedItems[Sample]):
    """Hold pieces of documents, those of a document side by side. They may be in files.

    Attributes:
        items: Tokens and weights; column `bytes` is the size of the whole document in UTF-8.
        stats: Entry of the manifest and of the report.
    """

    items: SampleStore

    @property
    def samples(self) -> SampleStore:
        """Return the pieces."""
        return self.items

    @cached_property
    def _contents(self) -> list[Hashable]:
        """Return for each piece its place in its document, with the hashes of all pieces of the document."""
        found: dict[int, list[int]] = {}
        for piece, document in enumerate(document_numbers(self.items).tolist()):
            found.setdefault(document, []).append(self.items.content(piece))
        return [(place, tuple(pieces)) for pieces in found.values() for place in range(len(pieces))]

    def content(self, number: int) -> Hashable:
        """Return a value of a piece that is equal for the same piece of another document with the same tokens.

        Documents are held out, or left out because they are also trained on, as a whole.
        """
        return self._contents[number]


def cut_document(tokens: Sequence[int], weights: Sequence[float], length: int, overlap: int) -> list[Encoded]:
    """Cut a document into pieces of at most `length` tokens, in which every token carries its loss once.

    Each piece after the first begins with the `overlap` tokens before it, as context without loss: the first token of a
    sequence has nothing that predicts it, so one is needed for no token to be lost.

    Args:
        tokens: Token ids.
        weights: One number a token; the first is 0.
        length: Most tokens of a piece.
        overlap: Tokens of context, at least 1 and less than `length`.

    Returns:
        (tokens, weights) of each piece.
    """
    pieces = [(list(tokens[:length]), list(weights[:length]))]
    for start in range(length, len(tokens), length - overlap):
        end = start + length - overlap
        pieces.append((list(tokens[start - overlap : end]), [0.0] * overlap + list(weights[start:end])))
    return pieces


class _DocumentReader:
    """Read documents and cut them."""

    samples, images = 1, False
    fields: tuple[tuple[str, str], ...] = (("bytes", "<u8"),)

    def __init__(self, length: int, overlap: int, begin: int | None, begun_by: int | None) -> None:
        """Make a reader.

        Args:
            length: Most tokens of a piece.
            overlap: Tokens of context that begin a piece after the first.
            begin: Token that is put before a text as context.
            begun_by: Token with which the tokenizer begins a text, if it puts one.
        """
        self.length, self.overlap, self.begin, self.begun_by = length, overlap, begin, begun_by
        self.kind = f"documents-{length}-{overlap}"

    def check(self, rows: Rows) -> None:
        """Accept every layout."""

    def parse(self, row: PlacedRow) -> ParsedRow:
        record = row.record()
        texts = [record.text or "", *(message["content"] for message in record.messages)]
        about = {"text": "".join(texts), "plain": record.text is not None}
        return ParsedRow([record], about)

    def make(self, parsed: ParsedRow, encoded: Sequence[Encoded], source: str) -> tuple[list[Sample], dict[str, float]]:
        tokens, weights = encoded[0]
        if parsed.about["plain"] and self.begin is not None and tokens[:1] not in ([self.begin], [self.begun_by]):
            tokens, weights = [self.begin, *tokens], [0.0, *([1.0] * len(tokens))]
        pieces = cut_document(tokens, weights, self.length, self.overlap)
        size = len(parsed.about["text"].encode("utf-8", "surrogatepass"))
        return [Sample(t, w, source) for t, w in pieces if any(w)], {"bytes": size}

    def statistics(self, rows: Rows, store: SampleStore, tokenizer: Any) -> dict[str, Any]:
        return rows.statistics(store, tokenizer) | document_stats(store)


def prepare_documents(
    config: DataConfig, tokenizer: Any, *, context: int | None, length: int, overlap: int
) -> Documents:
    """Prepare the configured documents: read, tokenize and cut them.

    A text gets the token that ends documents, with loss; what begins it is the token with which the tokenizer begins a
    text, or else the one that ends documents: in packed pretraining data a text follows the end of another.

    Args:
        config: Settings of the data. All tokens carry loss, whatever its `loss_on` is; `max_tokens` limits documents.
        tokenizer: The tokenizer.
        context: The model's length in tokens. None: it names none.
        length: Most tokens of a piece.
        overlap: Tokens of context that begin a piece after the first.

    Raises:
        DataError: As `posttrain.data.sft_rows.prepare`; or the pieces are longer than the model's context.
    """
    if context is not None and length > context:
        raise DataError(f"sequence_length is {length}, and the model's context has {context} tokens: lower it")
    whole = config.model_copy(update={"loss_on": "all"})
    begun = tokenizer.bos_token_id if tokenizer(["a"])["input_ids"][0][0] == tokenizer.bos_token_id else None
    reader = _DocumentReader(length, overlap, tokenizer.eos_token_id, begun)
    store, _, stats = store_items(whole, tokenizer, None, reader)
    return Documents(store, stats)


def document_numbers(store: SampleStore) -> np.ndarray:
    """Return for each piece the number of its document, from 0; pieces of a document lie side by side."""
    columns = [np.asarray(store.columns[name]) for name in ("part", "number", "position")]
    new = np.zeros(len(store), dtype=np.int64)
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return np.cumsum(new)


def document_sizes(store: SampleStore) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes and the tokens with loss of each document."""
    if not len(store):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    numbers = document_numbers(store)
    first = np.flatnonzero(np.diff(numbers, prepend=-1))
    tokens = np.bincount(numbers, np.asarray(store.columns["loss"]))
    return np.asarray(store.columns["bytes"])[first].astype(np.int64), tokens.astype(np.int64)


def document_stats(store: SampleStore) -> dict[str, Any]:
    """Return what the manifest's entry says of the sizes of documents: their number, pieces, tokens and bytes."""
    sizes, tokens = document_sizes(store)
    size = int(sizes.sum())
    return {
        "used": len(sizes),
        "samples": len(store),
        "tokens": int(store.lengths.sum()),
        "loss_tokens": store.loss_tokens,
        "bytes": size,
        "tokens_per_byte": int(tokens.sum()) / max(1, size),
    }


def piece_bytes(store: SampleStore) -> np.ndarray:
    """Return the bytes of each piece: those of its document, shared out by tokens with loss."""
    sizes, tokens = document_sizes(store)
    numbers = document_numbers(store)
    return np.asarray(store.columns["loss"]) * (sizes / np.maximum(tokens, 1))[numbers]


@dataclass(frozen=True)
class TokenStream:
    """Describe pieces that are drawn in epochs.

    Attributes:
        lengths: Tokens of each piece.
        loss: Those of them with loss.
        seed: Seed of the orders.
        weights: How often each is drawn in an epoch. None: once.
    """

    lengths: np.ndarray
    loss: np.ndarray
    seed: int
    weights: RowWeights | None = None

    def first(self, count: int) -> np.ndarray:
        """Return the numbers of the first pieces that are drawn, epoch after epoch."""
        size = epoch_size(len(self.lengths), self.weights)
        epochs = range(-(-count // size))
        drawn = [epoch_order(self.seed, epoch, len(self.lengths), self.weights) for epoch in epochs]
        return np.concatenate([np.empty(0, dtype=np.int64), *drawn])[:count]

    def up_to(self, tokens: float) -> np.ndarray:
        """Return the numbers of the pieces that are drawn until they have this many tokens with loss, or just more."""
        size = epoch_size(len(self.lengths), self.weights)
        mean = max(1.0, float(self.loss.mean()))
        count = size
        while float(self.loss[(drawn := self.first(count))].sum()) < tokens:
            count += max(size, int(tokens / mean))
        return drawn[: 1 + int(np.searchsorted(np.cumsum(self.loss[drawn]), tokens))]


def mixed_batches(
    domain: TokenStream,
    replay: TokenStream | None,
    share: float,
    *,
    budget: int,
    epochs: float,
    max_steps: int | None,
) -> list[np.ndarray]:
    """Plan the batches of all steps: pieces of the domain with a share of general text between them.

    Both streams are laid on one line by the tokens with loss that precede the middle of each piece: t / (1 - share) in
    the domain's stream, t / share in the other. Read along the line, general text has its share of the tokens of any
    stretch, up to a piece. A batch takes pieces until the next would exceed the budget. All of it follows from the
    lengths and seeds, so that a resumed run continues with the same batches.

    Args:
        domain: Pieces of the domain.
        replay: Pieces of general text. None: none.
        share: Share of the tokens with loss that is general text, 0 <= share < 1.
        budget: Tokens of a batch, context included.
        epochs: Passes over the domain's pieces.
        max_steps: Number of batches, in place of epochs. None: those that `epochs` need.

    Returns:
        The numbers of the pieces of each batch; those of `replay` are -1 - number.
    """
    size = epoch_size(len(domain.lengths), domain.weights)
    count = max(1, round(size * epochs))
    while True:
        numbers, lengths = _line(domain, replay, share, count)
        batches = _divide(numbers, lengths, budget)
        if max_steps is None or len(batches) > max_steps:
            return batches[:max_steps]
        count += max(size, count * (max_steps - len(batches)) // len(batches))


def _line(domain: TokenStream, replay: TokenStream | None, share: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers and lengths of the first `count` pieces of the domain and the general text between them."""
    drawn = domain.first(count)
    loss = domain.loss[drawn].astype(np.float64)
    if replay is None or not share:
        return drawn, domain.lengths[drawn]
    total = float(loss.sum()) * share / (1 - share)
    general = replay.up_to(total)
    other = replay.loss[general].astype(np.float64)
    places = np.concatenate([(np.cumsum(loss) - loss / 2) / (1 - share), (np.cumsum(other) - other / 2) / share])
    order = np.argsort(places, kind="stable")
    order = order[places[order] <= loss.sum() / (1 - share)]
    numbers = np.concatenate([drawn, -1 - general])[order]
    return numbers, np.concatenate([domain.lengths[drawn], replay.lengths[general]])[order]


def _divide(numbers: np.ndarray, lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Divide pieces into batches of at most `budget` tokens, one piece at least."""
    ends = np.cumsum(lengths)
    batches, start = [], 0
    while start < len(numbers):
        before = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + budget, side="right")))
        batches.append(numbers[start:end])
        start = end
    return batches
