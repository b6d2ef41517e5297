"""Tokenise rows into a store of samples, in memory or in the cache on the disk, for everything that trains on rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from posttrain.config import DataConfig
from posttrain.core.by_number import ByNumber
from posttrain.data.encoding import RowReader, encode_stream
from posttrain.data.image_reader import image_reader
from posttrain.data.readers import Source, find_sources
from posttrain.data.rows import Rows, open_rows
from posttrain.data.sample_cache import cache_key, cached_store, is_cached
from posttrain.data.sample_store import SampleStore, SampleWriter, vocabulary_size


class ItemReader(RowReader, Protocol):
    """Read one kind of items from rows: samples for fine-tuning, pairs of answers, answers with a label.

    Attributes:
        kind: Name of the kind with all settings of the reader, for the key of the cache.
        samples: Number of samples of an item.
        fields: (name, type) of the numbers that are kept with each sample.
    """

    kind: str
    samples: int
    fields: tuple[tuple[str, str], ...]

    def check(self, rows: Rows) -> None:
        """Raise DataError if the layout of the rows does not fit."""

    def statistics(self, rows: Rows, store: SampleStore, tokenizer: Any) -> dict[str, Any]:
        """Return the manifest's entry.

        Args:
            rows: The rows, after they were read.
            store: The samples made of them.
            tokenizer: The tokenizer, for examples.
        """


class ReadAgain(ByNumber[dict[str, Any]]):
    """Give the texts of each item of a store, read from its source again."""

    def __init__(self, config: DataConfig, sources: Sequence[Source], store: SampleStore, reader: ItemReader) -> None:
        """Hold on to where the rows are.

        Args:
            config: Settings of the data.
            sources: Its sources, which are opened when the first row is needed.
            store: The samples.
            reader: Reads the items.
        """
        self._config, self._sources, self._store, self._reader = config, sources, store, reader

    @cached_property
    def _rows(self) -> Rows:
        return open_rows(self._config, sources=self._sources)

    def __len__(self) -> int:
        return len(self._store) // self._reader.samples

    def item(self, number: int) -> dict[str, Any]:
        first = number * self._reader.samples
        part, row_number, position = (int(self._store.columns[name][first]) for name in ("part", "number", "position"))
        row = self._rows.parts[part].read_again(position, row_number)
        return self._reader.parse(row).about


def store_items(
    config: DataConfig, tokenizer: Any, context: int | None, reader: ItemReader
) -> tuple[SampleStore, Sequence[dict[str, Any]], dict[str, Any]]:
    """Return the samples of all items, end to end, the texts of each item, and the manifest's entry.

    Those of large sources are kept on the disk once they are tokenised, and found there by the next run.

    Args:
        config: Settings of the data.
        tokenizer: The tokenizer, with the chat template.
        context: The model's length in tokens, the limit if config.max_tokens gives none.
        reader: Reads the items.

    Raises:
        DataError: A source or layout can't be read, or (unless config.on_bad_row is skip) there are bad rows: the
            message has file, row and reason of the first ten, and their number.
    """
    sources = find_sources(config)
    if not is_cached(sources):
        texts: list[tuple[int, dict[str, Any]]] = []
        rows = open_rows(config, sources=sources)
        store, stats = _tokenise(rows, tokenizer, context, reader, texts=texts)
        return store, [text for _, text in sorted(texts, key=lambda item: item[0])], stats

    def make(folder: Path) -> tuple[SampleStore, dict[str, Any]]:
        return _tokenise(open_rows(config, sources=sources), tokenizer, context, reader, folder)

    key = cache_key(config, sources, tokenizer, context, reader.kind)
    store, stats = cached_store(key, make)
    _give_reader(store, tokenizer)
    return store, ReadAgain(config, sources, store, reader), {**stats, "source": config.name}


def _tokenise(
    rows: Rows,
    tokenizer: Any,
    context: int | None,
    reader: ItemReader,
    folder: Path | None = None,
    texts: list[tuple[int, dict[str, Any]]] | None = None,
) -> tuple[SampleStore, dict[str, Any]]:
    """Return the samples of all rows, in a folder or in memory, and the manifest's entry about them.

    With `texts`, it gets the texts of each item, with the row's place in the order.
    """
    reader.check(rows)

    names = [part.source.name for part in rows.parts]
    writer, count = SampleWriter(names, vocabulary_size(tokenizer), folder, reader.fields), 0
    for rank, row, parsed, samples, values in encode_stream(rows, reader, tokenizer, context):
        for sample in samples:  # samples of one row stay in this order
            writer.add(rank, sample, row.part, row.found.number, row.found.position, values)
        count += 1
        if texts is not None:
            texts.append((rank, parsed.about))
    rows.check(count)
    store = writer.finish()
    _give_reader(store, tokenizer)
    return store, reader.statistics(rows, store, tokenizer)


def _give_reader(store: SampleStore, tokenizer: Any) -> None:
    """Let a store make the vision tower's inputs of its pictures, if it has any."""
    if store.images is not None:
        store.images.reader = image_reader(tokenizer)
