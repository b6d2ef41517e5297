"""Prepare rows for supervised fine-tuning: map, render, tokenize, check and count them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from posttrain.config import DataConfig
from posttrain.core.types import Sample
from posttrain.data.encoding import encode_rows, require_chat_template
from posttrain.data.formats import Record, to_record
from posttrain.data.rows import open_rows


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
    """Read, map, render, tokenize and check the configured rows.

    Args:
        config: Settings of the data.
        tokenizer: The tokenizer, with the chat template.
        context: The model's length in tokens, the limit if config.max_tokens gives none.

    Raises:
        DataError: A source or layout can't be read, or (unless config.on_bad_row is skip) there are bad rows: the
            message has file, row and reason of the first ten, and their number.
    """
    rows = open_rows(config)
    kept = rows.read(lambda row, source: (source, to_record(row, rows.layout, config)))
    if config.chat and any(record.messages for _, record in kept):
        require_chat_template(tokenizer)
    samples, prompts, truncated = list[Sample](), [], 0
    for i, [(tokens, weights)], cut in encode_rows(rows, [(s, (r,)) for s, r in kept], tokenizer, context):
        source, record = kept[i]
        truncated += cut
        samples.append(Sample(tokens, weights, source, record.extra or {}))
        prompts.append(prompt_and_completion(record, source))
    rows.check(len(samples))
    return Prepared(samples, rows.statistics(samples, tokenizer, truncated), prompts)


def prompt_and_completion(record: Record, source: str) -> dict[str, Any]:
    """Return the turns before the last one, the last user text and the completion, for evaluation and reports."""
    before = list(record.messages[:-1])
    user = [m["content"] for m in before if m["role"] == "user"]
    completion = record.messages[-1]["content"] if record.messages else record.text
    return {
        **(record.extra or {}),
        "source": source,
        "messages": before,
        "prompt_text": user[-1] if user else "",
        "completion": completion,
    }
