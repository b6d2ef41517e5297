"""Prepare rows for supervised fine-tuning: map, render, tokenize, check and count them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, overload

import numpy as np

from posttrain.config import DataConfig
from posttrain.core.types import Sample
from posttrain.data.encoding import Encoded, encode_stream
from posttrain.data.formats import Record
from posttrain.data.learnt_turns import OWN_TEXT
from posttrain.data.parts import PlacedRow
from posttrain.data.readers import Source, find_sources
from posttrain.data.rows import Chosen, PreparedItems, Rows, open_rows
from posttrain.data.sample_cache import cache_key, cached_store, is_cached
from posttrain.data.sample_store import SampleStore, SampleWriter, vocabulary_size
from posttrain.data.turns import answer_text


@dataclass(frozen=True)
class Prepared:
    """Hold samples to train on or to evaluate. They may be in files: each is read when it is asked for.

    Attributes:
        samples: Tokens and weights.
        stats: Entry of the manifest and of the report.
        rows: For each sample, the prompt (messages or text), the completion and the choices, for evaluation.
    """

    samples: Sequence[Sample]
    stats: dict[str, Any]
    rows: Sequence[dict[str, Any]] = field(default_factory=list)

    noun: ClassVar[str] = PreparedItems.noun
    advice: ClassVar[str] = PreparedItems.advice

    def __len__(self) -> int:
        return len(self.samples)

    def content(self, number: int) -> Hashable:
        """Return a value of a sample that is equal for samples with the same tokens."""
        samples = self.samples
        return samples.content(number) if isinstance(samples, SampleStore) else tuple(samples[number].tokens)

    def place(self, number: int) -> str:
        """Return the place of a sample's row, `file:row`."""
        return self.samples[number].source

    def take(self, numbers: Sequence[int] | np.ndarray) -> Prepared:
        """Return the samples with these numbers, in this order; the statistics are a copy of those of all samples."""
        samples = self.samples
        taken = samples.take(numbers) if isinstance(samples, SampleStore) else Chosen(samples, numbers)
        return Prepared(taken, dict(self.stats), Chosen(self.rows, numbers) if self.rows else ())


class PromptRows(Sequence[dict[str, Any]]):
    """Give the prompt and completion of each sample of a store, read again from its source."""

    def __init__(self, config: DataConfig, sources: Sequence[Source], store: SampleStore) -> None:
        """Hold on to where the rows are.

        Args:
            config: Settings of the data.
            sources: Its sources, which are opened when the first row is needed.
            store: The samples.
        """
        self._config, self._sources, self._store = config, sources, store

    @cached_property
    def _rows(self) -> Rows:
        return open_rows(self._config, sources=self._sources)

    def __len__(self) -> int:
        return len(self._store)

    @overload
    def __getitem__(self, number: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, number: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, number: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        part, row_number, position = (int(self._store.columns[name][number]) for name in ("part", "number", "position"))
        row = self._rows.parts[part].read_again(position, row_number)
        return prompt_and_completion(row.record(), row.source)


def prepare(config: DataConfig, tokenizer: Any, *, context: int | None = None) -> Prepared:
    """Prepare the configured rows: read, map, render, tokenize and check them.

    Rows of large sources are kept on the disk once they are tokenised, and found there by the next run.

    Args:
        config: Settings of the data.
        tokenizer: The tokenizer, with the chat template.
        context: The model's length in tokens, the limit if config.max_tokens gives none.

    Raises:
        DataError: A source or layout can't be read, or (unless config.on_bad_row is skip) there are bad rows: the
            message has file, row and reason of the first ten, and their number.
    """
    sources = find_sources(config)
    if not is_cached(sources):
        prompts: list[tuple[int, dict[str, Any]]] = []
        store, stats = _tokenise(open_rows(config, sources=sources), tokenizer, context, prompts=prompts)
        return Prepared(store, stats, [row for _, row in sorted(prompts, key=lambda prompt: prompt[0])])

    def make(folder: Path) -> tuple[SampleStore, dict[str, Any]]:
        return _tokenise(open_rows(config, sources=sources), tokenizer, context, folder)

    store, stats = cached_store(cache_key(config, sources, tokenizer, context), make)
    return Prepared(store, {**stats, "source": config.name}, PromptRows(config, sources, store))


def _tokenise(
    rows: Rows,
    tokenizer: Any,
    context: int | None,
    folder: Path | None = None,
    prompts: list[tuple[int, dict[str, Any]]] | None = None,
) -> tuple[SampleStore, dict[str, Any]]:
    """Return the samples of all rows, in a folder or in memory, and the manifest's entry about them.

    With `prompts`, it gets the prompt and completion of each sample, with the row's place in the order.
    """

    def read(row: PlacedRow) -> tuple[list[Record], Callable[[Encoded], tuple[Sample, PlacedRow, Record]]]:
        record = row.record()
        return [record], lambda encoded: (Sample(*encoded, row.source), row, record)

    names = [part.source.name for part in rows.parts]
    writer, count = SampleWriter(names, vocabulary_size(tokenizer), folder), 0
    for rank, (sample, row, record) in encode_stream(rows, read, tokenizer, context):
        writer.add(rank, sample, row.part, row.found.number, row.found.position)
        count += 1
        if prompts is not None:
            prompts.append((rank, prompt_and_completion(record, row.source)))
    rows.check(count)
    store = writer.finish()
    stats = rows.statistics(store, tokenizer)
    if own := rows.notes[OWN_TEXT]:  # turns of some rows are samples of their own
        stats.update(used=count - own, samples=count)
    return store, stats


def prompt_and_completion(record: Record, source: str) -> dict[str, Any]:
    """Return the turns before the last one, the last user text and the completion, for evaluation and reports."""
    before = list(record.messages[:-1])
    user = [m["content"] for m in before if m["role"] == "user"]
    return {
        **(record.extra or {}),
        **({"tools": record.tools} if record.tools else {}),
        **({"template_args": record.template_args} if record.template_args else {}),
        "source": source,
        "messages": before,
        "prompt_text": user[-1] if user else "",
        "completion": answer_text(record.messages[-1]) if record.messages else record.text,
    }
