"""Rows → samples: mapped, rendered, tokenized, checked, counted. Nothing is cut or left out in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.progress import track

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.core.types import Sample
from posttrain.data import chat_template as chat
from posttrain.data.formats import BadRow, Record, check_templates, label, open_assistant, recognise, to_record
from posttrain.data.marked_text import pieces
from posttrain.data.readers import Table, in_order, read_table

SHOWN = 10
"""Bad rows that are named one by one."""
BATCH = 1000
"""Rows tokenized at a time."""


@dataclass(frozen=True)
class Prepared:
    """samples; `rows`, aligned with them: what evaluation asks (prompt messages or text, completion, choices);
    `stats`: what the manifest and the report say of this data."""

    samples: list[Sample]
    stats: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class _Bad:
    """Rows that can't be used, all of them by name."""

    counts: Counter[str] = field(default_factory=Counter)
    all: list[dict[str, Any]] = field(default_factory=list)

    def add(self, place: tuple[str, int], reason: str) -> None:
        self.counts[reason.split(":")[0].split(" (")[0]] += 1
        self.all.append({"file": place[0], "row": place[1], "reason": reason})


def prepare(config: DataConfig, tokenizer: Any, *, context: int | None = None) -> Prepared:
    """Read, map, render, tokenize and check the configured rows.

    context: the model's length in tokens, the limit where config.max_tokens gives none. Raises DataError for sources
    and layouts that can't be read, and for bad rows unless config.on_bad_row is skip: with file, row and reason of
    the first ten, and how many there are.
    """
    table, layout, order = rows_of(config)
    bad, filtered = _Bad(), 0
    kept: list[tuple[tuple[str, int], Record]] = []
    for i in order:
        row = table.rows[i]
        try:
            if config.classes is not None:
                name = label(row, config.classes)
                if name is None:
                    filtered += 1
                    continue
                row = {**row, "label": name}
            kept.append((table.places[i], to_record(row, layout, config)))
        except BadRow as error:
            bad.add(table.places[i], str(error))
    if any(r.messages for _, r in kept):
        needs_template(config, tokenizer)
    samples, rows, truncated = _samples(kept, tokenizer, config, longest(config, context), bad)
    if bad.counts and config.on_bad_row == "stop":
        raise DataError(_complaint(bad, len(order)))
    if not samples:
        raise DataError(
            _complaint(bad, len(order))
            if bad.counts
            else f"all {filtered:,} rows lie within data.classes.margin of a cut"
        )
    dropped = dict(bad.counts) | ({"filtered": filtered} if filtered else {})
    stats = _stats(samples, tokenizer, config)
    stats.update(
        sha256=table.hashes, layout=layout, rows=len(order), dropped=dropped, bad_rows=bad.all, truncated=truncated
    )
    return Prepared(samples, stats, rows)


def rows_of(config: DataConfig) -> tuple[Table, str, np.ndarray]:
    """The source's rows with columns renamed, their layout, and which of them are taken, in which order.

    Raises DataError for a source, columns or templates that can't be used.
    """
    table = read_table(config)
    _rename(table.rows, config)
    columns = set().union(*table.rows)
    if config.classes is not None and config.classes.column not in columns:
        raise DataError(f"data.classes.column names {config.classes.column!r}, and the columns are {sorted(columns)}")
    check_templates(config, columns | ({"label"} if config.classes else set()))
    layout = "template" if config.prompt is not None else recognise(table.rows[0], config.layout)
    if layout == "openassistant":
        table = open_assistant(table)
    order = in_order(config, len(table.rows))
    return table, layout, order


def needs_template(config: DataConfig, tokenizer: Any) -> None:
    """Raises DataError where conversations are to be rendered and the tokenizer has no chat template."""
    if config.chat and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the tokenizer has no chat template, as base models have none. Give model.chat_template, or "
            "data.chat=false to join prompt and completion as plain text"
        )


def longest(config: DataConfig, context: int | None) -> int:
    """The most tokens that a sample may have."""
    return min(config.max_tokens or context or 2**62, context or 2**62)


def _rename(rows: list[dict[str, Any]], config: DataConfig) -> None:
    """`columns: {prompt: question}`: prompt is what the file calls question."""
    for ours, theirs in config.columns.items():
        if not any(theirs in row for row in rows):
            raise DataError(f"data.columns.{ours} names {theirs!r}, and the columns are {sorted(rows[0])}")
    for row in rows if config.columns else []:
        renamed = {ours: row.get(theirs) for ours, theirs in config.columns.items()}
        for theirs in config.columns.values():
            row.pop(theirs, None)
        row.update(renamed)


def _samples(
    kept: list[tuple[tuple[str, int], Record]], tokenizer: Any, config: DataConfig, limit: int, bad: _Bad
) -> tuple[list[Sample], list[dict[str, Any]], int]:
    samples: list[Sample] = []
    rows: list[dict[str, Any]] = []
    truncated = 0
    for i, [(tokens, weights)], cut in encoded([(place, (r,)) for place, r in kept], tokenizer, config, limit, bad):
        (file, number), record = kept[i]
        truncated += cut
        source = f"{file}:{number}"
        samples.append(Sample(tokens, weights, source, record.extra or {}))
        rows.append(_question(record, source))
    return samples, rows, truncated


def encoded(
    kept: Sequence[tuple[tuple[str, int], Sequence[Record]]],
    tokenizer: Any,
    config: DataConfig,
    limit: int,
    bad: _Bad,
) -> Iterator[tuple[int, list[tuple[list[int], list[float]]], bool]]:
    """(place in `kept`, (tokens, weights) of each of its records, whether any was cut at `limit`), bad rows left out.

    A row is one record or several (the answers of a pair), as many for each; it is bad where one of them is.
    """
    starts: Iterable[int] = range(0, len(kept), BATCH)
    for start in track(starts, "tokenizing", transient=True, disable=len(kept) <= 5 * BATCH):
        batch: list[tuple[int, list[chat.Rendered | Plain | Spoken]]] = []
        for i in range(start, min(start + BATCH, len(kept))):
            place, records = kept[i]
            try:
                batch.append((i, [_render(record, tokenizer, config) for record in records]))
            except BadRow as error:
                bad.add(place, str(error))
        flat = iter(_encode([r for _, rendered in batch for r in rendered], tokenizer, config))
        for i, rendered in batch:
            parts = [next(flat) for _ in rendered]
            most = max(len(tokens) for tokens, _ in parts)
            if most > limit and config.on_long == "bad_row":
                bad.add(kept[i][0], f"too long ({most} tokens, and the limit is {limit})")
                continue
            cut = most > limit
            parts = [(tokens[:limit], weights[:limit]) for tokens, weights in parts]
            if not all(any(weights) for _, weights in parts):
                bad.add(kept[i][0], f"no loss token left (cut at {limit} tokens)" if cut else "no loss token left")
                continue
            yield i, parts, cut


Plain = tuple[str, str]
"""(prompt, completion) joined without a template."""


@dataclass(frozen=True)
class Spoken:
    """Turns joined without a template, each tokenized by itself, as replies of an environment are; (text, learnt)."""

    turns: list[tuple[str, bool]]


def _render(record: Record, tokenizer: Any, config: DataConfig) -> chat.Rendered | Plain | Spoken:
    if record.text is not None:
        if not record.text.strip():
            raise BadRow("empty text")
        return "", record.text
    if not config.chat:
        *before, last = record.messages
        if last["role"] != "assistant" or not last["content"].strip():
            raise BadRow("empty completion" if last["role"] == "assistant" else "the last turn is not the assistant's")
        if config.loss_on == "assistant" and any(m["role"] == "assistant" for m in before):
            return Spoken([(m["content"], m["role"] == "assistant") for m in record.messages])
        return "".join(m["content"] for m in before), last["content"]
    return chat.render_with_loss(tokenizer, record.messages, config.loss_on)


def _encode(
    rendered: list[chat.Rendered | Plain | Spoken], tokenizer: Any, config: DataConfig
) -> list[tuple[list[int], list[float]]]:
    """(tokens, weights) of each, chat or plain."""
    turns = [r for r in rendered if isinstance(r, chat.Rendered)]
    plain = [r for r in rendered if isinstance(r, tuple)]
    from_chat = iter(chat.tokenize_rendered(tokenizer, turns))
    from_plain = iter(_encode_plain(plain, tokenizer, config))
    return [
        next(from_chat)
        if isinstance(r, chat.Rendered)
        else _encode_spoken(r, tokenizer)
        if isinstance(r, Spoken)
        else next(from_plain)
        for r in rendered
    ]


def _encode_spoken(spoken: Spoken, tokenizer: Any) -> tuple[list[int], list[float]]:
    """Turn by turn, the first with what the tokenizer puts first; end of text, which is learnt, at the end."""
    tokens: list[int] = []
    weights: list[float] = []
    for i, (text, learnt) in enumerate(spoken.turns):
        piece = chat.continuation(tokenizer, text) if i else chat.tokenize(tokenizer, [text], special=True)[0]
        if not i and piece and piece[-1] == tokenizer.eos_token_id:
            piece = piece[:-1]
        tokens += piece
        weights += [float(learnt)] * len(piece)
    if tokenizer.eos_token_id is not None:
        tokens.append(tokenizer.eos_token_id)
        weights.append(1.0)
    weights[0] = 0.0
    return tokens, weights


def _encode_plain(plain: list[Plain], tokenizer: Any, config: DataConfig) -> list[tuple[list[int], list[float]]]:
    """Prompt (with what the tokenizer puts first), completion, end of text; text alone learns all of it."""
    prompts = chat.tokenize(tokenizer, [p for p, _ in plain], special=True)
    wholes = chat.tokenize(tokenizer, [p + c for p, c in plain], special=True)
    out = []
    eos = tokenizer.eos_token_id
    for (_, completion), before, through in zip(plain, prompts, wholes, strict=True):
        before, through = (ids[:-1] if ids and ids[-1] == eos else ids for ids in (before, through))
        if through[: len(before)] != before:
            through = before + chat.continuation(tokenizer, completion)
        tokens = through if eos is None else [*through, eos]
        learnt = 0 if config.loss_on == "all" else len(before)
        weights = [0.0 if i < max(1, learnt) else 1.0 for i in range(len(tokens))]
        out.append((tokens, weights))
    return out


def _question(record: Record, source: str) -> dict[str, Any]:
    """What evaluation asks: everything before the last turn, and what is expected there."""
    before = list(record.messages[:-1])
    asked = [m["content"] for m in before if m["role"] == "user"]
    completion = record.messages[-1]["content"] if record.messages else record.text
    return {
        **(record.extra or {}),
        "source": source,
        "messages": before,
        "prompt_text": asked[-1] if asked else "",
        "completion": completion,
    }


def prompt_tokens(row: dict[str, Any], tokenizer: Any, config: DataConfig) -> list[int]:
    """Token ids of a row's prompt as the model sees it when it has to answer, generation prompt included.

    Raises DataError where the chat template refuses it.
    """
    if not config.chat:
        text = "".join(m["content"] for m in row["messages"])
        ids = chat.tokenize(tokenizer, [text], special=True)[0]
        return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    try:
        return chat.tokenize(tokenizer, [chat.render(tokenizer, row["messages"], generation=True)])[0]
    except BadRow as error:
        raise DataError(f"{row.get('source', 'a row')}: {error}") from error


def prompt_with_completion(
    row: dict[str, Any], completion: str, tokenizer: Any, config: DataConfig, end: bool = False
) -> Sample:
    """The row's prompt with this completion, weights 1 on the completion's tokens (and its end token if `end`)."""
    record = Record((*row["messages"], {"role": "assistant", "content": completion}))
    single = config.model_copy(update={"loss_on": "completion"})
    try:
        rendered = _render(record, tokenizer, single)
    except BadRow as error:
        raise DataError(f"{row.get('source', 'a row')}: {error}") from error
    if isinstance(rendered, chat.Rendered) and not end:
        start = rendered.spans[-1][0]
        rendered = chat.Rendered(rendered.text, ((start, rendered.answer_end),))
    tokens, weights = _encode([rendered], tokenizer, single)[0]
    if not isinstance(rendered, chat.Rendered) and not end and tokens[-1] == tokenizer.eos_token_id:
        tokens, weights = tokens[:-1], weights[:-1]
    return Sample(tokens, weights, row.get("source", ""))


def _complaint(bad: _Bad, total: int) -> str:
    count = sum(bad.counts.values())
    lines = [f"  {b['file']}:{b['row']}: {b['reason']}" for b in bad.all[:SHOWN]]
    more = [f"  and {count - SHOWN:,} more"] if count > SHOWN else []
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in bad.counts.most_common())
    return "\n".join(
        [f"{count:,} of {total:,} rows can't be used ({reasons}):", *lines, *more]
        + [
            "Mend them, or leave them out (they are counted) with data.on_bad_row=skip; long ones can be cut with "
            "data.on_long=truncate"
        ]
    )


def _stats(samples: list[Sample], tokenizer: Any, config: DataConfig) -> dict[str, Any]:
    lengths = [len(s) for s in samples]
    repeats = Counter(tuple(s.tokens) for s in samples)
    source = config.source if isinstance(config.source, str) else ", ".join(config.source)
    return {
        "source": source,
        "used": len(samples),
        "tokens": sum(lengths),
        "loss_tokens": int(sum(sum(1 for w in s.weights if w) for s in samples)),
        "longest": max(lengths, default=0),
        "median": int(np.median(lengths)) if lengths else 0,
        "duplicates": sum(n - 1 for n in repeats.values()),
        "examples": [{"text": s.source, "pieces": pieces(s, tokenizer)} for s in samples[:3]],
    }
