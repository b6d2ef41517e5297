"""Prepare rows for supervised fine-tuning: map, render, tokenize, check and count them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from posttrain.config import DataConfig
from posttrain.core.types import Sample
from posttrain.data.encoding import Encoded, encode_rows
from posttrain.data.formats import Record
from posttrain.data.rows import PlacedRow, open_rows
from posttrain.data.turns import answer_text


@dataclass(frozen=True)
class Prepared:
    """Hold samples to train on or to evaluate.

    Attributes:
        samples: Tokens and weights.
        stats: Entry of the manifest and of the report.
        rows: For each sample, the prompt (messages or text), the completion and the choices, for evaluation.
    """

    samples: list[Sample]
    stats: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)


def prepare(config: DataConfig, tokenizer: Any, *, context: int | None = None) -> Prepared:
    """Prepare the configured rows: read, map, render, tokenize and check them.

    Args:
        config: Settings of the data.
        tokenizer: The tokenizer, with the chat template.
        context: The model's length in tokens, the limit if config.max_tokens gives none.

    Raises:
        DataError: A source or layout can't be read, or (unless config.on_bad_row is skip) there are bad rows: the
            message has file, row and reason of the first ten, and their number.
    """
    rows = open_rows(config)

    def read(row: PlacedRow) -> tuple[list[Record], Callable[[Encoded], tuple[Sample, dict[str, Any]]]]:
        record = row.record()
        prompt = prompt_and_completion(record, row.source)
        return [record], lambda encoded: (Sample(*encoded, row.source, record.extra or {}), prompt)

    made = encode_rows(rows, read, tokenizer, context)
    samples = [sample for sample, _ in made]
    return Prepared(samples, rows.statistics(samples, tokenizer), [prompt for _, prompt in made])


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
