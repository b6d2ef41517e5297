"""Prepare rows for supervised fine-tuning: map, render, tokenize, check and count them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from posttrain.config import DataConfig
from posttrain.core.types import Sample
from posttrain.data.encoding import Encoded, ParsedRow
from posttrain.data.formats import Record
from posttrain.data.image_turns import without_images
from posttrain.data.learnt_turns import OWN_TEXT
from posttrain.data.parts import PlacedRow
from posttrain.data.rows import Chosen, PreparedItems, Rows
from posttrain.data.sample_store import SampleStore
from posttrain.data.stored_items import store_items
from posttrain.data.turns import answer_text


@dataclass(frozen=True)
class Prepared(PreparedItems[Sample]):
    """Hold samples to train on or to evaluate. They may be in files: each is read when it is asked for.

    Attributes:
        items: Tokens and weights.
        stats: Entry of the manifest and of the report.
        rows: For each sample, the prompt (messages or text), the completion and the choices, for evaluation.
    """

    items: SampleStore
    rows: Sequence[dict[str, Any]] = ()

    @property
    def samples(self) -> SampleStore:
        """Return the samples."""
        return self.items

    def content(self, number: int) -> Hashable:
        """Return a value of a sample that is equal for samples with the same tokens."""
        return self.items.content(number)

    def take(self, numbers: Sequence[int] | np.ndarray) -> Prepared:
        """Return the samples with these numbers, in this order; the statistics are a copy of those of all samples."""
        return replace(super().take(numbers), rows=Chosen(self.rows, numbers) if self.rows else ())


class _SampleReader:
    """Read samples for supervised fine-tuning."""

    kind, samples, images = "sft", 1, True
    fields: tuple[tuple[str, str], ...] = ()

    def check(self, rows: Rows) -> None:
        """Accept every layout."""

    def parse(self, row: PlacedRow) -> ParsedRow:
        record = row.record()
        return ParsedRow([record], prompt_and_completion(record, row.source))

    def make(self, parsed: ParsedRow, encoded: Sequence[Encoded], source: str) -> tuple[list[Sample], dict[str, float]]:
        return [Sample(*encoded[0], source)], {}

    def statistics(self, rows: Rows, store: SampleStore, tokenizer: Any) -> dict[str, Any]:
        stats = rows.statistics(store, tokenizer)
        if own := rows.notes[OWN_TEXT]:  # turns of some rows are samples of their own
            stats.update(used=len(store) - own, samples=len(store))
        return stats


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
    store, texts, stats = store_items(config, tokenizer, context, _SampleReader())
    return Prepared(store, stats, texts)


def prompt_and_completion(record: Record, source: str) -> dict[str, Any]:
    """Return the turns before the last one, the last user text and the completion, for evaluation and reports."""
    before = list(record.messages[:-1])
    user = [without_images(m)["content"] for m in before if m["role"] == "user"]
    return {
        **(record.extra or {}),
        **({"tools": record.tools} if record.tools else {}),
        **({"template_args": record.template_args} if record.template_args else {}),
        "source": source,
        "messages": before,
        "prompt_text": user[-1] if user else "",
        "completion": answer_text(record.messages[-1]) if record.messages else record.text,
    }
