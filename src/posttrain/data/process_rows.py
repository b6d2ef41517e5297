"""Chains of steps: where a text's steps end, a chain as the learner takes it, and rows that come with labels.

A step is tokenized by itself, behind what came before it, so that its end is the end of a token: the same in training
and whenever a finished text is scored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.core.types import Sample
from posttrain.data import chat_template as chat
from posttrain.data.formats import BadRow, message, turns
from posttrain.data.formats import field as cell
from posttrain.data.readers import in_order, read_table
from posttrain.data.sft_rows import _Bad, _complaint, _rename, _stats, longest, needs_template, prompt_tokens


@dataclass(frozen=True, slots=True)
class Chain:
    """A prompt's tokens, the texts of the steps, and each step's label in [0, 1] (None: it has none).

    group: number of the prompt; chains of one prompt share its computation.
    """

    prompt: Sequence[int]
    steps: Sequence[str]
    targets: Sequence[float | None]
    group: int
    source: str = ""


@dataclass(frozen=True)
class PreparedChains:
    """samples: as the learner takes them, weight 1 at the end of each step with a label; meta has `ends` and `targets`
    (of those steps). stats: what the manifest and the report say of them."""

    samples: list[Sample]
    stats: dict[str, Any] = field(default_factory=dict)


def split_steps(text: str, separator: str) -> list[tuple[int, int]]:
    """Half-open ranges of characters, one a step, that together are the whole text.

    A step ends behind the separator, however often that is repeated; what holds nothing but white space belongs to the
    step before it (at the beginning: to the one after it). A text of white space alone has no step. Raises ValueError
    for an empty separator.
    """
    if not separator:
        raise ValueError("the separator is empty; give the text that ends a step")
    spans: list[tuple[int, int]] = []
    start = 0
    ends = [m.end() for m in re.finditer(f"(?:{re.escape(separator)})+", text)]
    for end in [*ends, *([len(text)] if not ends or ends[-1] < len(text) else [])]:
        piece = text[start:end]
        if piece.replace(separator, "").strip():
            spans.append((start, end))
        elif spans:
            spans[-1] = (spans[-1][0], end)
        else:
            continue  # white space at the beginning: the next step begins here
        start = end
    return spans


def chain_samples(chains: Sequence[Chain], tokenizer: Any) -> list[Sample]:
    """Each chain as the learner takes it. Raises ValueError for a chain without a step or a label."""
    ids = iter(chat.continuations(tokenizer, [s for c in chains for s in c.steps]))
    samples = []
    for c in chains:
        if len(c.steps) != len(c.targets) or all(t is None for t in c.targets):
            raise ValueError(f"{c.source or 'a chain'}: {len(c.steps)} steps and labels {list(c.targets)}")
        tokens, ends = list(c.prompt), []
        for _ in c.steps:
            tokens += next(ids)
            ends.append(len(tokens) - 1)
        kept = [(e, float(t)) for e, t in zip(ends, c.targets, strict=True) if t is not None]
        marked = {e for e, _ in kept}
        weights = [float(i in marked) for i in range(len(tokens))]
        meta = {"ends": [e for e, _ in kept], "targets": [t for _, t in kept]}
        samples.append(Sample(tokens, weights, c.source, {**meta, "group": c.group, "shared": len(c.prompt)}))
    return samples


def read_chains(config: DataConfig, tokenizer: Any, separator: str, *, context: int | None = None) -> PreparedChains:
    """Rows with `prompt` (text or turns), `steps` (or `completions`: texts) and `labels` (true, false, 0 to 1, null).

    A step that does not end with the separator gets one, the last excepted. Raises DataError for a source that can't
    be read and, by file and row, for rows that can't be used unless config.on_bad_row is skip.
    """
    if config.prompt is not None or config.classes is not None or config.loss_on != "completion":
        raise DataError(
            "data.prompt, data.completion, data.classes and data.loss_on do not go with rows of steps: name the "
            "columns instead, data.columns: {prompt: ..., steps: ..., labels: ...}"
        )
    needs_template(config, tokenizer)
    table = read_table(config)
    _rename(table.rows, config)
    order = in_order(config, len(table.rows))
    bad, chains, places = _Bad(), list[Chain](), []
    groups: dict[tuple[int, ...], int] = {}
    for i in order:
        file, line = table.places[i]
        try:
            chains.append(_chain(table.rows[i], config, tokenizer, separator, f"{file}:{line}", groups))
            places.append(table.places[i])
        except BadRow as error:
            bad.add(table.places[i], str(error))
    limit, samples = longest(config, context), []
    for sample, place in zip(chain_samples(chains, tokenizer), places, strict=True):
        if len(sample) > limit:
            bad.add(place, f"too long ({len(sample)} tokens, and the limit is {limit})")
        else:
            samples.append(sample)
    if bad.counts and (config.on_bad_row == "stop" or not samples):
        raise DataError(_complaint(bad, len(order)))
    stats = _stats(samples, tokenizer, config)
    stats.update(
        sha256=table.hashes, layout="steps", rows=len(order), dropped=dict(bad.counts), bad_rows=bad.all, truncated=0
    )
    return PreparedChains(samples, stats)


def _chain(
    row: dict[str, Any],
    config: DataConfig,
    tokenizer: Any,
    separator: str,
    source: str,
    groups: dict[tuple[int, ...], int],
) -> Chain:
    prompt, steps = cell(row, "prompt"), row.get("steps") if row.get("steps") is not None else row.get("completions")
    labels = cell(row, "labels")
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) and s.strip() for s in steps):
        raise BadRow("steps: expected a list of texts, none empty")
    if not isinstance(labels, list) or len(labels) != len(steps):
        many = len(labels) if isinstance(labels, list) else type(labels).__name__
        raise BadRow(f"labels: expected one for each of the {len(steps)} steps (found {many})")
    targets = [_label(value) for value in labels]
    if all(t is None for t in targets):
        raise BadRow("no step has a label")
    asked = turns(prompt) if isinstance(prompt, list) else [message("user", prompt)]
    if config.system:
        asked = [message("system", config.system), *(m for m in asked if m["role"] != "system")]
    try:
        tokens = prompt_tokens({"messages": asked}, tokenizer, config)
    except DataError as error:
        raise BadRow(str(error)) from error
    if not tokens:
        raise BadRow("empty prompt")
    last = len(steps) - 1
    texts = [s if i == last or s.endswith(separator) else s + separator for i, s in enumerate(steps)]
    return Chain(tokens, texts, targets, groups.setdefault(tuple(tokens), len(groups)), source)


def _label(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool | int | float) and 0 <= value <= 1:
        return float(value)
    raise BadRow(f"label out of range: it is {value!r}, expected true, false, a number from 0 to 1, or null")
