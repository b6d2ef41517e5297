"""Prepare chains of steps: split texts into steps, make samples of labelled chains, read rows with labels.

Each step is tokenized on its own, as a continuation of the text before it, so that it ends at the end of a token: the
same in training and when a finished text is scored.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.core.types import Sample
from posttrain.data.bad_rows import BadRow
from posttrain.data.cells import is_missing, parse_json, required_field
from posttrain.data.encoding import prompt_tokens, require_chat_template, token_limit
from posttrain.data.parts import PlacedRow
from posttrain.data.row_context import add_context, read_row_tools, read_template_args
from posttrain.data.row_fields import SourceRow
from posttrain.data.rows import PreparedItems, open_rows
from posttrain.data.special_text import guard
from posttrain.data.tokenizing import continuations, text_tokens
from posttrain.data.turns import make_message, read_turns, without_flags


@dataclass(frozen=True, slots=True)
class StepChain:
    """Hold a completion in steps, with labels.

    Attributes:
        prompt: Token ids of the prompt.
        steps: Text of each step.
        targets: Label of each step, in [0, 1]; None for a step without one.
        group: Number of the prompt; chains of one prompt share its computation.
        source: Place of the row, `file:row`.
    """

    prompt: Sequence[int]
    steps: Sequence[str]
    targets: Sequence[float | None]
    group: int
    source: str = ""


class PreparedChains(PreparedItems[Sample]):
    """Hold chains as samples and what the manifest and the report say about them.

    A sample has weight 1 at the end of each step with a label; its `meta` has these ends and their targets.
    """

    noun = "chains"
    advice = "Give held_out other rows"

    @property
    def samples(self) -> Sequence[Sample]:
        """Return the samples."""
        return self.items

    def content(self, number: int) -> Hashable:
        """Return the tokens of a chain."""
        return tuple(self.items[number].tokens)


def split_steps(text: str, separator: str) -> list[tuple[int, int]]:
    """Return the half-open range of characters of each step; together they are the whole text.

    A step ends after the separator, however often that is repeated; a part with nothing but white space belongs to the
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


def chain_samples(chains: Sequence[StepChain], tokenizer: Any) -> list[Sample]:
    """Return each chain as a sample to train on. Raises ValueError for a chain without a step or a label."""
    control = text_tokens(tokenizer)
    ids = iter(continuations(tokenizer, [guard(s, control) for c in chains for s in c.steps]))
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


def read_step_chains(
    config: DataConfig, tokenizer: Any, separator: str, *, context: int | None = None
) -> PreparedChains:
    """Read rows with `prompt`, `steps` (or `completions`: texts) and `labels` (true, false, 0 to 1, null).

    Args:
        config: Settings of the data.
        tokenizer: The tokenizer, with the chat template.
        separator: Text that ends a step; a step without it gets it, the last one excepted.
        context: The model's length in tokens.

    Raises:
        DataError: The source can't be read, or (unless config.on_bad_row is skip) there are bad rows.
    """
    if config.prompt is not None or config.classes is not None or config.loss_on != "completion":
        raise DataError(
            "data.prompt, data.completion, data.classes and data.loss_on do not go with rows of steps: name the "
            "columns instead, data.columns: {prompt: ..., steps: ..., labels: ...}"
        )
    if config.chat:
        require_chat_template(tokenizer)
    rows = open_rows(config, layout="steps")
    groups: dict[tuple[int, ...], int] = {}

    def chain_of(row: PlacedRow) -> StepChain:
        steps, targets = _labelled_steps(row.row)
        prompt = _prompt_ids(row.row, row.config, tokenizer)
        ended = [s if s.endswith(separator) else s + separator for s in steps[:-1]]
        group = groups.setdefault(tuple(prompt), len(groups))
        return StepChain(prompt, [*ended, steps[-1]], targets, group, row.source)

    limit, samples = token_limit(config, context), []
    for sample in chain_samples(rows.read(chain_of), tokenizer):
        if len(sample) > limit:
            rows.bad.add(sample.source, f"too long ({len(sample)} tokens, and the limit is {limit})")
        else:
            samples.append(sample)
    rows.check(len(samples))
    return PreparedChains(samples, rows.statistics(samples, tokenizer))


def _labelled_steps(row: SourceRow) -> tuple[list[str], list[float | None]]:
    required_field(row, "prompt")
    column = "steps" if not is_missing(row.peek("steps")) else "completions"
    steps = parse_json(row.get(column), column)
    labels = parse_json(required_field(row, "labels"), "labels")
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) and s.strip() for s in steps):
        raise BadRow("steps: expected a list of texts, none empty")
    if not isinstance(labels, list) or len(labels) != len(steps):
        count = len(labels) if isinstance(labels, list) else type(labels).__name__
        raise BadRow(f"labels: expected one for each of the {len(steps)} steps (found {count})")
    targets = [_target(value) for value in labels]
    if all(t is None for t in targets):
        raise BadRow("no step has a label")
    return steps, targets


def _prompt_ids(row: SourceRow, config: DataConfig, tokenizer: Any) -> list[int]:
    prompt = row["prompt"]
    turns = read_turns(prompt, "prompt", row.notes) if isinstance(prompt, list) else [make_message("user", prompt)]
    asked = {"messages": without_flags(add_context(turns, row, config.system))}
    context = {"tools": read_row_tools(row), "template_args": read_template_args(row)}
    try:
        tokens = prompt_tokens({**asked, **context}, tokenizer, config)
    except DataError as error:
        raise BadRow(str(error)) from error
    if not tokens:
        raise BadRow("empty prompt")
    return tokens


def _target(value: Any) -> float | None:
    if is_missing(value):
        return None
    if isinstance(value, bool | int | float) and 0 <= value <= 1:
        return float(value)
    raise BadRow(f"label out of range: it is {value!r}, expected true, false, a number from 0 to 1, or null")
