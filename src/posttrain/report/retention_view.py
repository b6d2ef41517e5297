"""Show what a stage of continued pretraining kept of general text, and what it gained on its domain."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from posttrain.report.formatting import format_fixed, plain_text
from posttrain.report.load import Run, read_json

TEXT_KINDS = {"general": "general text", "domain": "held-out text of the domain"}


@dataclass(frozen=True)
class TextChange:
    """Hold the figures of one kind of text.

    Attributes:
        kind: general or domain.
        title: What the text is.
        documents: Number of documents.
        before, after: nats_per_token, perplexity, bits_per_byte and tokens_per_byte.
        change: value, low, high and p_value of the change in bits per byte.
    """

    kind: str
    title: str
    documents: int
    before: dict[str, float]
    after: dict[str, float]
    change: dict[str, float]


@dataclass(frozen=True)
class RetentionView:
    """Hold what a stage kept and gained; `warning` is empty if general text is as likely as before."""

    stage: str
    texts: list[TextChange]
    warning: str


def retentions(run: Run) -> list[RetentionView]:
    """Return the view of each stage that compared texts before and after."""
    out = []
    for stage in run.stages:
        path = stage.folder / "retention.json"
        found: Any = read_json(path, run.notes) if path.exists() else None
        if isinstance(found, dict):
            texts = [_change(kind, found[kind]) for kind in TEXT_KINDS if isinstance(found.get(kind), dict)]
            out.append(RetentionView(stage.name, texts, plain_text(found.get("warning"))))
    return out


def _change(kind: str, of: dict[str, Any]) -> TextChange:
    title = TEXT_KINDS[kind] + (f" ({plain_text(of.get('text'))})" if of.get("text") else "")
    before, after = (
        {**of[side], "perplexity": math.exp(min(700.0, of[side]["nats_per_token"]))} for side in ("before", "after")
    )
    return TextChange(kind, title, int(of["documents"]), before, after, of["change"])


def retention_lines(run: Run) -> list[str]:
    """Return lines on texts before and after each stage of a run, for the terminal; a warning begins with !."""
    out = []
    for view in retentions(run):
        for t in view.texts:
            before, after = (format_fixed(side["bits_per_byte"], 3) for side in (t.before, t.after))
            change, low, high = (f"{t.change[key]:+.3f}" for key in ("value", "low", "high"))
            out.append(f"{view.stage}: {t.title}: {before} -> {after} bits per byte ({change}, {low} to {high})")
        out += [f"! {view.stage}: {view.warning}"] if view.warning else []
    return out
