"""Compare what a model knew of general text and of a domain before a stage with what it knows after."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.core import distributed
from posttrain.core.files import read_object
from posttrain.core.statistics import perplexity_difference
from posttrain.data.text_documents import Documents, document_numbers, document_sizes
from posttrain.methods.sft_measurement import FOLDER, RowScore, measurements

GENERAL = "general"
"""Folder of a stage in which each measurement of general text is kept; prefix of its metrics."""
BEFORE = "before_extension"
"""Folder of a stage with the measurements of the model before its vocabulary was extended, in its own tokens."""
RETENTION_FILE = "retention.json"
"""File in a stage's folder with the comparison."""
log = logging.getLogger("posttrain")


def compare_texts(folder: Path, step: int, general: str, share: float | None) -> dict[str, Any]:
    """Compare the measurements before the first step with those at the step of the model.

    Args:
        folder: The stage's folder.
        step: The step whose weights the model has.
        general: What the general text is, in words.
        share: Share of general text in training. None: there was none.

    Returns:
        For `general` and `domain` (if measured) the figures before and after, and `warning`; {} if neither was.
    """
    found: dict[str, Any] = {}
    for kind, name in (("general", GENERAL), ("domain", FOLDER)):
        files = measurements(folder / name)
        original = folder / BEFORE / f"{name}.json"
        if {0, step} <= files.keys():
            first = original if original.is_file() else files[0]
            before, after = (read_object(file)["rows"] for file in (first, files[step]))
            found[kind] = compare_documents(before, after)
    if not found:
        return {}
    if "general" in found:
        found["general"]["text"] = general
    found["warning"] = _warning(found.get("general"), general, share)
    if found["warning"] and distributed.is_main():
        log.warning("%s", found["warning"])
    return found


def compare_documents(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compute bits per byte and nats per token of the same documents before and after, and the change.

        bits per byte = sum of nats over documents / (ln 2 · sum of bytes)

    The change has a paired bootstrap interval over documents: log2 of the interval of the ratio of
    exp(nats / bytes), which a logarithm leaves a percentile interval. Tokenizers may differ; bytes do not.

    Args:
        before: Records with nll (nats), tokens and bytes.
        after: Those of the same documents, in the same order.

    Returns:
        documents, bytes, before and after (nats_per_token, bits_per_byte, tokens_per_byte), change (value, low, high,
        p_value) in bits per byte.
    """
    ratio, (low, high), p = perplexity_difference(
        *([(row["nll"], row["bytes"]) for row in side] for side in (before, after)), ratio=True
    )
    value, low, high = (math.log2(x) for x in (ratio, low, high))
    size = sum(row["bytes"] for row in before)
    out: dict[str, Any] = {"documents": len(before), "bytes": size}
    for name, side in (("before", before), ("after", after)):
        nats, tokens = math.fsum(row["nll"] for row in side), sum(row["tokens"] for row in side)
        figures = {"nats_per_token": nats / tokens, "bits_per_byte": bits_per_byte(nats, size)}
        out[name] = {**figures, "tokens_per_byte": tokens / size}
    return {**out, "change": {"value": value, "low": low, "high": high, "p_value": p}}


def _warning(general: dict[str, Any] | None, text: str, share: float | None) -> str:
    if general is None or general["change"]["low"] <= 0:
        return ""
    change = general["change"]
    remedy = (
        "Mix general text in: replay: {data: {source: ...}, share: 0.05}"
        if share is None
        else f"Raise replay.share (it is {share:g})"
    )
    return (
        f"general text ({text}) has become less likely: {general['before']['bits_per_byte']:.3f} bits per byte before, "
        f"{general['after']['bits_per_byte']:.3f} after ({change['value']:+.3f}, 95% interval {change['low']:+.3f} to "
        f"{change['high']:+.3f}). {remedy}, lower optimizer.lr, or train an adapter"
    )


def bits_per_byte(nats: float, size: float) -> float:
    """Compute nats / (ln 2 · bytes): the loss for a byte of text, whatever the tokens are; 0 without a byte."""
    return nats / (math.log(2) * size) if size else 0.0


def document_rows(text: Documents, scores: Sequence[RowScore]) -> list[dict[str, Any]]:
    """Return the loss of each document, summed over its pieces.

    Args:
        text: The documents.
        scores: Those of each piece.

    Returns:
        Records with id, source, nll (nats), tokens (with loss), bytes.
    """
    numbers, (sizes, tokens) = document_numbers(text.samples), document_sizes(text.samples)
    nll = np.bincount(numbers, [s.nll for s in scores])
    first = np.flatnonzero(np.diff(numbers, prepend=-1))
    return [
        {"id": i, "source": text.place(int(at)), "nll": float(n), "tokens": int(t), "bytes": int(b)}
        for i, (at, n, t, b) in enumerate(zip(first, nll, tokens, sizes, strict=True))
    ]
