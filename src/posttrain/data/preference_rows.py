"""Rows → preferences: two answers to one prompt of which one is better, or single answers that are good or bad.

Each pair's prompt is the same tokens twice, so that it is computed once; a row that can't be used is found and said.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.core.types import Message, Sample
from posttrain.data.formats import BadRow, Record, Row, label, number, to_record
from posttrain.data.marked_text import pieces
from posttrain.data.sft_rows import (
    SHOWN,
    _Bad,
    _complaint,
    _question,
    _stats,
    encoded,
    longest,
    needs_template,
    rows_of,
)

PAIRED = ("preference", "hh_rlhf", "ultrafeedback")
"""Layouts that hold two answers."""
ANSWERS = ("prompt", "chosen", "rejected", "completion", "completions", "instruction", "probability", "margin", "text")
"""Columns that `row` has under names of its own."""
YES = ("true", "yes", "good", "1", "1.0")
NO = ("false", "no", "bad", "0", "0.0")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt. Samples carry loss on the answer's tokens, the one that ends the turn included.

    prompt: tokens of the prompt, with which both samples begin. probability: that `chosen` is the better one, in
    (0.5, 1] (a soft label). margin: by how much, a difference of scores, >= 0. row: what was asked and said (messages,
    prompt_text, completion, rejected) and the row's other columns.
    """

    chosen: Sample
    rejected: Sample
    prompt: int
    probability: float = 1.0
    margin: float = 0.0
    source: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Unpaired:
    """One answer that is good or bad. prompt: tokens of the prompt, with which the sample begins."""

    sample: Sample
    prompt: int
    desirable: bool
    source: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PreparedPairs:
    """pairs; stats: what the manifest and the report say of them."""

    pairs: list[Pair]
    stats: dict[str, Any]

    @property
    def samples(self) -> list[Sample]:
        """Chosen and rejected by turns."""
        return [s for p in self.pairs for s in (p.chosen, p.rejected)]

    def labelled(self, count: int) -> list[list[tuple[str, Sample]]]:
        """Return the answers of the first `count` pairs, each with its label."""
        return [[("chosen", p.chosen), ("rejected", p.rejected)] for p in self.pairs[:count]]

    @property
    def items(self) -> list[Pair]:
        return self.pairs

    @property
    def sizes(self) -> list[int]:
        """Tokens to compute of each pair, its prompt once."""
        return [len(p.chosen) + len(p.rejected) - p.prompt for p in self.pairs]


@dataclass(frozen=True)
class PreparedUnpaired:
    """items; stats: what the manifest and the report say of them."""

    items: list[Unpaired]
    stats: dict[str, Any]

    @property
    def samples(self) -> list[Sample]:
        return [u.sample for u in self.items]

    def labelled(self, count: int) -> list[list[tuple[str, Sample]]]:
        """Return the first `count` answers, each alone with its label."""
        return [[("desirable" if u.desirable else "undesirable", u.sample)] for u in self.items[:count]]


Prepared = TypeVar("Prepared", PreparedPairs, PreparedUnpaired)


@dataclass(frozen=True)
class _Two:
    """A row's two answers, the better one first."""

    chosen: Record
    rejected: Record
    probability: float
    margin: float
    swapped: bool


def prepare_pairs(config: DataConfig, tokenizer: Any, *, context: int | None = None) -> PreparedPairs:
    """Pairs from rows laid out as preference, hh_rlhf or ultrafeedback (its best answer against its worst).

    Columns `probability` (that the chosen answer is the better one; below 0.5 the two change places, counted as
    `swapped`) and `margin` are optional; ultrafeedback's margin is the difference of its scores. context: the model's
    length in tokens. Raises DataError for settings that don't fit, and, with file, row and reason of the first ten,
    for rows that can't be used unless config.on_bad_row is skip: equal answers, ties, empty answers, a chosen answer
    that repeats the prompt, prompts that don't match, numbers out of their range, missing fields, too many tokens.
    """
    _fits(config)
    if config.prompt is not None or config.classes is not None:
        raise DataError(
            "data.prompt, data.completion and data.classes make one answer a row, and a pair has two. Name the "
            "columns instead: data.columns: {prompt: ..., chosen: ..., rejected: ...}"
        )
    table, layout, order = rows_of(config)
    if layout not in PAIRED:
        raise DataError(
            f"{config.source} is laid out as {layout}, which holds no pairs: expected columns prompt, chosen and "
            f"rejected ({', '.join(PAIRED)}). Rows with single answers and a label are for method: kto"
        )
    bad, kept, read = _Bad(), [], []
    for i in order:
        try:
            two = _two(table.rows[i], layout, config)
        except BadRow as error:
            bad.add(table.places[i], str(error))
            continue
        read.append((two, table.rows[i]))
        kept.append((table.places[i], (two.chosen, two.rejected)))
    needs_template(config, tokenizer)
    pairs, swapped, truncated = list[Pair](), 0, 0
    for i, (chosen, rejected), cut in encoded(kept, tokenizer, config, longest(config, context), bad):
        (file, line), (two, row) = kept[i][0], read[i]
        try:
            pairs.append(_pair(chosen, rejected, two, row, f"{file}:{line}"))
        except BadRow as error:
            bad.add((file, line), str(error))
            continue
        swapped += two.swapped
        truncated += cut
    _complain(bad, config, len(order), bool(pairs))
    out = PreparedPairs(pairs, {})
    said = [(tuple(p.chosen.tokens), tuple(p.rejected.tokens)) for p in pairs]
    repeats = Counter(said)
    out.stats.update(_stats(out.samples, tokenizer, config), used=len(pairs), swapped=swapped)
    out.stats.update(_read(table, layout, len(order), bad, truncated), duplicates=_more_than_once(repeats))
    out.stats.update(_contradictions([(pair, pair[::-1], p.source) for p, pair in zip(pairs, said, strict=True)]))
    out.stats["examples"] = _examples(out.labelled(2), tokenizer)
    return out


def prepare_unpaired(config: DataConfig, tokenizer: Any, *, context: int | None = None) -> PreparedUnpaired:
    """Single answers, each good or bad: column `label` (true or false), or a rating through data.classes.

    data.classes has two names then, the bad one first. Raises DataError as `prepare_pairs` does, the reasons being
    missing fields, labels that are neither, empty answers, a good answer that repeats the prompt, too many tokens.
    """
    _fits(config)
    if config.classes is not None and len(config.classes.names) != 2:
        raise DataError(f"data.classes.names are {config.classes.names}: expected two, the bad one first")
    table, layout, order = rows_of(config)
    if config.classes is None and not any("label" in row for row in table.rows):
        raise DataError(
            f"{config.source} has no column label (true or false), and its columns are {sorted(table.rows[0])}. "
            "Name it (data.columns: {label: thumbs_up}), or make it of a number: data.classes: {column: rating, "
            "cuts: [3], names: [bad, good]}"
        )
    bad, filtered, kept, read = _Bad(), 0, [], []
    for i in order:
        row = table.rows[i]
        try:
            if config.classes is None:
                desirable = _good(row)
            else:
                name = label(row, config.classes)
                if name is None:
                    filtered += 1
                    continue
                row, desirable = {**row, "label": name}, name == config.classes.names[1]
            record = to_record(row, layout, config)
            _answer(record, "the answer")
            if desirable:
                _repeats(record)
        except BadRow as error:
            bad.add(table.places[i], str(error))
            continue
        kept.append((table.places[i], (record,)))
        read.append((record, row, desirable))
    needs_template(config, tokenizer)
    items, truncated = list[Unpaired](), 0
    for i, [(tokens, weights)], cut in encoded(kept, tokenizer, config, longest(config, context), bad):
        (file, line), (record, row, desirable) = kept[i][0], read[i]
        source, truncated = f"{file}:{line}", truncated + cut
        carried = {**_others(row), **_question(record, source), "label": desirable}
        sample = Sample(tokens, weights, source)
        items.append(Unpaired(sample, _prompt(weights), desirable, source, carried))
    if filtered and not items and not bad.counts:
        raise DataError(f"all {filtered:,} rows lie within data.classes.margin of a cut")
    _complain(bad, config, len(order), bool(items))
    stats = _stats([u.sample for u in items], tokenizer, config)
    stats.update(_read(table, layout, len(order), bad, truncated), desirable=sum(u.desirable for u in items))
    stats["dropped"] |= {"filtered": filtered} if filtered else {}
    stats.update(
        _contradictions([((t := tuple(u.sample.tokens), u.desirable), (t, not u.desirable), u.source) for u in items])
    )
    out = PreparedUnpaired(items, stats)
    stats["examples"] = _examples(out.labelled(3), tokenizer)
    return out


def _examples(answers: Sequence[Sequence[tuple[str, Sample]]], tokenizer: Any) -> list[dict[str, Any]]:
    return [
        {"text": sample.source, "label": label, "pieces": pieces(sample, tokenizer)}
        for item in answers
        for label, sample in item
    ]


def apart(held_out: Prepared, trained: PreparedPairs | PreparedUnpaired, where: str) -> Prepared:
    """Held-out rows that are not trained on too, which would measure memory; the others are counted as dropped.

    Two pairs are the same whichever answer is the better one. Raises DataError where nine in ten are trained on: then
    the two are the same rows by mistake.
    """
    known = {_content(item) for item in trained.items}
    left: list[Any] = [item for item in held_out.items if _content(item) not in known]
    same = len(held_out.items) - len(left)
    if same > 0.9 * len(held_out.items):
        example = next(item for item in held_out.items if _content(item) in known).source
        raise DataError(
            f"{where}: {same} of {len(held_out.items)} held-out rows are trained on too ({example}, for one). Give "
            "held_out.data other rows: with data.rows [0, 2000], [2000, 2200] of the same shuffled file, for instance"
        )
    dropped = held_out.stats["dropped"] | ({"trained on too": same} if same else {})
    return type(held_out)(left, {**held_out.stats, "used": len(left), "dropped": dropped})


def _content(item: Pair | Unpaired) -> frozenset[tuple[int, ...]]:
    samples = (item.chosen, item.rejected) if isinstance(item, Pair) else (item.sample,)
    return frozenset(tuple(s.tokens) for s in samples)


def _fits(config: DataConfig) -> None:
    if config.loss_on != "completion":
        raise DataError(
            f"data.loss_on is {config.loss_on!r}, and preferences compare completions: leave it at completion"
        )


def _complain(bad: _Bad, config: DataConfig, total: int, any_left: bool) -> None:
    if bad.counts and (config.on_bad_row == "stop" or not any_left):
        raise DataError(_complaint(bad, total))


def _read(table: Any, layout: str, total: int, bad: _Bad, truncated: int) -> dict[str, Any]:
    """What the manifest says of how rows were read."""
    return {
        "sha256": table.hashes,
        "layout": layout,
        "rows": total,
        "dropped": dict(bad.counts),
        "bad_rows": bad.all,
        "truncated": truncated,
    }


def _more_than_once(repeats: Counter[Any]) -> int:
    return sum(n - 1 for n in repeats.values())


def _contradictions(rows: Sequence[tuple[Hashable, Hashable, str]]) -> dict[str, Any]:
    """Rows, each (what it says, the opposite, where it is), that say the opposite of an earlier one: how many, the
    first ten by name. They are learnt from all the same, and teach what both together say: neither."""
    first: dict[Hashable, str] = {}
    found = []
    for said, opposite, source in rows:
        if opposite in first:
            found.append(f"{source} against {first[opposite]}")
        first.setdefault(said, source)
    return {"contradictory": len(found), "contradictions": found[:SHOWN]} if found else {}


def _others(row: Row) -> Row:
    """The row's columns that are not its prompt and answers."""
    return {k: v for k, v in row.items() if k not in ANSWERS}


def _two(row: Row, layout: str, config: DataConfig) -> _Two:
    """A row's answers, checked. Raises BadRow."""
    chosen, rejected, margin = _scored(row, config) if layout == "ultrafeedback" else _given(row, layout, config)
    probability = 1.0 if row.get("probability") is None else number(row["probability"], "probability")
    if not 0 <= probability <= 1:
        raise BadRow(f"probability out of range: it is {probability:g}, expected a number from 0 to 1")
    if probability == 0.5:
        raise BadRow("a tie: its probability is 0.5")
    if row.get("margin") is not None:
        margin = number(row["margin"], "margin")
    if not 0 <= margin < math.inf:
        raise BadRow(f"margin out of range: it is {margin:g}, expected a difference of scores, 0 or more")
    swapped = probability < 0.5
    if swapped:
        chosen, rejected, probability = rejected, chosen, 1 - probability
    _answer(chosen, "the chosen answer")
    _answer(rejected, "the rejected answer")
    if chosen.messages[:-1] != rejected.messages[:-1]:
        raise BadRow("the prompts don't match" + _difference(chosen.messages[:-1], rejected.messages[:-1]))
    if chosen.messages[-1]["content"].strip() == rejected.messages[-1]["content"].strip():
        raise BadRow("the two answers are equal")
    _repeats(chosen)
    return _Two(chosen, rejected, probability, margin, swapped)


def _given(row: Row, layout: str, config: DataConfig) -> tuple[Record, Record, float]:
    """Chosen and rejected, each read as supervised fine-tuning reads the chosen one."""
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise BadRow(f"missing field {name!r}")
        if layout == "preference" and isinstance(row[name], list) != isinstance(row["chosen"], list):
            raise BadRow("one answer is text and the other a list of turns")
    other = {**row, "chosen": row["rejected"]}
    chosen, rejected = to_record(row, layout, config), to_record(other, layout, config)
    asked = row.get("prompt")
    if layout == "preference" and isinstance(row["chosen"], list) and asked is not None:
        same_prompt(asked, chosen.messages[:-1])
    return chosen, rejected, 0.0


def same_prompt(asked: Any, before: Sequence[Mapping[str, Any]]) -> None:
    """A row that gives the prompt and whole conversations must mean the same prompt by both: a text is one of the
    user's turns, a list all turns but the system's. Raises BadRow."""
    if isinstance(asked, str):
        said = [m["content"].strip() for m in before if m["role"] == "user"]
        if asked.strip() not in said:
            raise BadRow("the prompts don't match (the column prompt is no turn of the chosen conversation)")
    elif isinstance(asked, list) and asked:
        given = [(m.get("role", m.get("from")), m.get("content", m.get("value"))) for m in asked if isinstance(m, dict)]
        turns = [content for role, content in given if role != "system"]
        there = [m["content"] for m in before if m["role"] != "system"]
        if turns[-1:] != there[-1:]:
            raise BadRow("the prompts don't match (the column prompt ends otherwise than the chosen conversation's)")
        if turns != there:
            raise BadRow("the prompts don't match (the column prompt has other earlier turns than the conversation)")


def _scored(row: Row, config: DataConfig) -> tuple[Record, Record, float]:
    """The first of the best-scored completions, the last of the worst; answers without a score don't take part."""
    given = row.get("completions")
    if not isinstance(given, list) or not all(isinstance(c, dict) for c in given):
        raise BadRow("completions: expected a list of objects, each with response and overall_score")
    rated = [(number(c["overall_score"], "overall_score"), c) for c in given if c.get("overall_score") is not None]
    if len(rated) < 2:
        raise BadRow(f"fewer than two scored answers ({len(rated)} of {len(given)})")
    best = max(rated, key=lambda r: r[0])
    worst = min(reversed(rated), key=lambda r: r[0])
    if best[0] == worst[0]:
        raise BadRow(f"a tie: all scores are {best[0]:g}")
    one, other = (to_record({**row, "completions": [c]}, "ultrafeedback", config) for _, c in (best, worst))
    return one, other, best[0] - worst[0]


def _answer(record: Record, what: str) -> None:
    """There must be a prompt, and an assistant's turn with something in it."""
    if record.text is not None:
        raise BadRow("no prompt and answer in it")
    *before, last = record.messages
    if last["role"] != "assistant":
        raise BadRow(f"the last turn is not the assistant's ({what} ends with the {last['role']}'s)")
    if not last["content"].strip():
        raise BadRow(f"{what} is empty")
    if not any(m["content"].strip() for m in before):
        raise BadRow("empty prompt")


def _repeats(record: Record) -> None:
    answer = record.messages[-1]["content"].strip()
    if answer in (record.messages[-2]["content"].strip(), "".join(m["content"] for m in record.messages[:-1]).strip()):
        raise BadRow("the chosen answer equals the prompt")


def _difference(one: Sequence[Message], other: Sequence[Message]) -> str:
    if len(one) != len(other):
        return f" ({len(one)} turns before the chosen answer, {len(other)} before the rejected one)"
    turn = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    return f" (turn {turn + 1} differs)"


def _good(row: Row) -> bool:
    if row.get("label") is None:
        raise BadRow("missing field 'label'")
    said = str(row["label"]).strip().lower()
    if said not in (*YES, *NO):
        raise BadRow(f"label out of range: it is {row['label']!r}, expected one of {', '.join((*YES, *NO))}")
    return said in YES


def _prompt(weights: Sequence[float]) -> int:
    return next(i for i, w in enumerate(weights) if w)


Encoded = tuple[list[int], list[float]]


def _pair(chosen: Encoded, rejected: Encoded, two: _Two, row: Row, source: str) -> Pair:
    """Both answers as token ids. Raises BadRow where they are not two answers to one prompt there."""
    prompt = _prompt(chosen[1])
    if prompt != _prompt(rejected[1]) or chosen[0][:prompt] != rejected[0][:prompt]:
        raise BadRow("the prompts don't match (once rendered: the chat template writes them otherwise)")
    if chosen[0] == rejected[0]:
        raise BadRow("the two answers are equal (once cut or tokenized)")
    carried = {
        **_others(row),
        **_question(two.chosen, source),
        "rejected": two.rejected.messages[-1]["content"],
    }
    one, other = Sample(*chosen, source), Sample(*rejected, source)
    return Pair(one, other, prompt, two.probability, two.margin, source, carried)
