"""Read rows that people judged: ratings, choices, lists of answers, thumbs. Make pairs and measure agreement."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from posttrain.config import DataConfig
from posttrain.config.feedback import CandidatesConfig, Pairing, PairsConfig, RatingsConfig, ThumbsConfig
from posttrain.core.errors import DataError
from posttrain.data.bad_rows import SHOWN_ROWS, BadRow, Row
from posttrain.data.cells import is_good_label, is_missing, parse_json, read_number
from posttrain.data.comparisons import AnswerPair, Candidate, LeftOut, Prompt, pair_up
from posttrain.data.formats import fill
from posttrain.data.mixing import refuse_weights
from posttrain.data.parts import PlacedRow
from posttrain.data.preference_rows import check_pair, two_records
from posttrain.data.rater_agreement import krippendorff_alpha
from posttrain.data.row_context import TEMPLATE_COLUMNS, TOOL_COLUMNS, add_context
from posttrain.data.row_fields import MEDIA, SourceRow
from posttrain.data.rows import Rows, manifest_entry, open_rows
from posttrain.data.turns import make_message, read_turns, without_flags

_RowsConfig = RatingsConfig | PairsConfig | CandidatesConfig | ThumbsConfig
NOT_SHOWN = MEDIA | {*TOOL_COLUMNS, *TEMPLATE_COLUMNS}
"""Columns that a judge and the rows made here could not show."""


ANSWER_FIELDS = ("response", "completion", "text", "content")
SCORE_FIELDS = ("overall_score", "score", "rating")
"""Fields of a listed answer; the first one with a value is read."""


@dataclass(frozen=True)
class Answers:
    """Hold judged answers.

    Attributes:
        pairs: Pairs to be judged, or labelled by people already.
        stats: Entry of the manifest and of the report about the rows.
        raters: How far people agree. `mean_probability` is the mean probability of what most of them prefer in a pair,
            which no judge can be expected to beat.
        thumbs: Rows (prompt, completion, label) of kind thumbs.
        left_out: Source and reason of all pairs and answers that teach nothing.
    """

    pairs: list[AnswerPair]
    stats: dict[str, Any]
    raters: dict[str, Any] = field(default_factory=dict)
    thumbs: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)


@dataclass
class _Reading:
    """Collect the rows: answers by prompt, the ratings of each unit, and what is left out."""

    config: _RowsConfig
    rows: Rows
    left_out: LeftOut = field(default_factory=LeftOut)
    units: list[Sequence[float]] = field(default_factory=list)
    used: int = 0
    prompts: dict[str, Prompt] = field(default_factory=dict)
    answers: dict[str, dict[Hashable, Candidate]] = field(default_factory=dict)
    thumbs: list[dict[str, Any]] = field(default_factory=list)

    def need(self, *columns: str | None) -> None:
        """Raise DataError for a column that is missing."""
        for column in columns:
            if column is not None and not self.rows.has(column):
                raise DataError(f"{self.config.data.name}: no column {column!r}; the columns are {self.rows.columns}")

    def merge(self, prompt: Prompt, candidate: Candidate) -> None:
        """Add an answer to a prompt; the ratings of rows with the same answer are put together. Raises BadRow."""
        key = _key(prompt)
        merged = _merged(self.answers.get(key, {}).get(candidate.text), candidate)
        self.prompts.setdefault(key, prompt)
        self.answers.setdefault(key, {})[candidate.text] = merged

    def pairs(self, config: Pairing, min_margin: float = 0.0) -> list[AnswerPair]:
        """Make pairs of the answers to each prompt."""
        out: list[AnswerPair] = []
        for g, (key, group) in enumerate(self.answers.items()):
            candidates = list(group.values())
            if len(candidates) == 1:
                self.left_out.note("a prompt's only answer", candidates[0].source)
            rng = np.random.default_rng([config.seed, g])
            out += pair_up(self.prompts[key], candidates, config.pairs_per_prompt, rng, self.left_out, min_margin)
        return out


def read_answers(config: _RowsConfig, count: Callable[[str], int] = len) -> Answers:
    """Read and check the rows, and make pairs of the answers.

    Args:
        config: Settings of the data and of its columns.
        count: Returns the length of a text for the statistics, in characters or tokens.

    Raises:
        DataError: Files or columns can't be read, no pair comes out, or (unless data.on_bad_row is skip) there are
            bad rows.
    """
    refuse_weights(config.data, "feedback")
    rows = open_rows(config.data, None if isinstance(config, PairsConfig) else config.kind)
    reading, total = _Reading(config, rows), len(rows.order)
    pairs = ANSWER_READERS[config.kind](reading, config)
    thumbs, left_out = reading.thumbs, reading.left_out
    rows.check(len(pairs) + len(thumbs))
    if not pairs and not thumbs:
        why = ", ".join(f"{n:,} {reason}" for reason, n in left_out.items()) or "every prompt has one answer alone"
        raise DataError(f"{config.data.name}: no pair comes out of {total:,} rows ({why})")
    raters = _agreement(reading.units, isinstance(config, RatingsConfig))
    if certain := [max(p.human, 1 - p.human) for p in pairs if p.human is not None]:
        raters["mean_probability"] = fmean(certain)
    texts = dict.fromkeys([t for p in pairs for t in (p.a, p.b)] + [t["completion"] for t in thumbs])
    examples = [{"text": f"{p.prompt} → {p.a} | {p.b}", "pieces": []} for p in pairs[:3]]
    stats = manifest_entry(
        [count(t) for t in texts],
        rows.bad,
        config.data.name,
        sha256=rows.hashes,
        layout=config.kind,
        rows=total,
        examples=examples,
        **rows.by_source(),
        **rows.fields.entry(),
    )
    stats.update(used=reading.used, pairs=len(pairs), left_out=left_out.all[:SHOWN_ROWS])
    stats["dropped"] |= dict(left_out)
    return Answers(pairs, stats, raters, thumbs, left_out.all)


def _read_prompt(row: SourceRow, data: DataConfig, column: str = "prompt") -> Prompt:
    if data.prompt is not None:
        return _nonempty(fill(data.prompt, row))
    value = row.get(column)
    turns = read_turns(value, column, row.notes) if isinstance(value, list) and value else []
    turns = turns or [make_message("user", _nonempty(value))]
    whole = [dict(turn) for turn in without_flags(add_context(turns, row, data.system))]
    return str(whole[0]["content"]) if isinstance(value, str) and len(whole) == 1 else whole


def _nonempty(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRow("empty prompt" if is_missing(value) or value == "" else "prompt is no text")
    return value


def _read_answer(row: SourceRow, data: DataConfig) -> tuple[Prompt, str]:
    prompt = _read_prompt(row, data)
    value: Any = fill(data.completion, row) if data.completion is not None else row.get("completion")
    return prompt, _checked(value, prompt)


def _checked(value: Any, prompt: Prompt) -> str:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = _plain_answer(read_turns(value, "the answer")[0])
    if not isinstance(value, str) or not value.strip():
        raise BadRow("empty answer" if is_missing(value) or isinstance(value, str) else "the answer is no text")
    last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if value.strip() == last.strip():
        raise BadRow("the answer is the prompt again")
    return value


def _plain_answer(message: Mapping[str, Any]) -> str:
    if message.get("tool_calls") or message.get("reasoning_content"):
        raise BadRow("the answer calls tools or has reasoning apart from its text, and only texts are compared here")
    return str(message["content"])


def _read_ratings(value: Any, name: str) -> tuple[dict[Any, float], bool]:
    """Return the ratings of a cell by rater, and True if the raters are known."""
    if isinstance(value, Mapping):
        return {r: read_number(v, f"{name}.{r}", finite=True) for r, v in value.items() if v is not None}, True
    if isinstance(value, str):
        if value.strip().startswith("{"):
            return _read_ratings(parse_json(value, name), name)
        value = [v for v in value.strip().strip("[]").replace(";", ",").split(",") if v.strip()]
    if not isinstance(value, list | tuple):
        value = [] if value is None else [value]
    return {i: read_number(v, name, finite=True) for i, v in enumerate(value) if v is not None}, False


def _merge_rows(reading: _Reading, config: RatingsConfig | ThumbsConfig) -> None:
    """Add the answer of each row to its prompt, with its ratings; a thumb is a rating of 0 or 1."""

    def add(row: PlacedRow) -> None:
        prompt, text = _read_answer(row.row, row.config)
        candidate = _rated_candidate if isinstance(config, RatingsConfig) else _thumbed_candidate
        reading.merge(prompt, candidate(row.row, text, row.source, config))  # type: ignore[arg-type]

    reading.rows.read(add, NOT_SHOWN)
    candidates = [c for group in reading.answers.values() for c in group.values()]
    reading.units = [list(c.ratings.values()) for c in candidates]
    reading.used = len(candidates)


def _rated(reading: _Reading, config: RatingsConfig) -> list[AnswerPair]:
    reading.need(config.ratings, config.rater, config.mean, config.spread)
    _merge_rows(reading, config)
    return reading.pairs(config, config.min_margin)


def _rated_candidate(row: Row, text: str, source: str, config: RatingsConfig) -> Candidate:
    if config.ratings is None:
        assert config.mean is not None
        value = row.get(config.spread) if config.spread is not None else None
        spread = None if value is None else read_number(value, str(config.spread))
        if spread is not None and spread < 0:
            raise BadRow(f"{config.spread} is {spread}, and a spread is never below 0")
        if row.get(config.mean) in (None, ""):
            raise BadRow(f"no rating in {config.mean!r}")
        return Candidate(text, source, mean=read_number(row[config.mean], config.mean), spread=spread)
    ratings, named = _read_ratings(row.get(config.ratings), config.ratings)
    if not ratings:
        raise BadRow(f"no rating in {config.ratings!r}")
    if config.rater is not None:
        if row.get(config.rater) in (None, ""):
            raise BadRow(f"nobody in {config.rater!r}")
        if len(ratings) > 1:
            raise BadRow(f"several ratings by one rater ({row[config.rater]!r})")
        ratings, named = {row[config.rater]: next(iter(ratings.values()))}, True
    return Candidate(text, source, ratings, named)


def _merged(one: Candidate | None, two: Candidate) -> Candidate:
    """Return one candidate for two rows of the same answer, with everyone's ratings."""
    if one is None:
        return two
    if not one.ratings:
        raise BadRow(f"the same answer as {one.source}, and two means can't be put together")
    if one.named != two.named:
        raise BadRow(f"the same answer as {one.source}, with and without the raters' names")
    if one.named and (double := one.ratings.keys() & two.ratings.keys()):
        raise BadRow(f"rater {sorted(map(str, double))[0]!r} rated this answer in {one.source} too")
    more = two.ratings if two.named else {len(one.ratings) + i: v for i, v in enumerate(two.ratings.values())}
    return Candidate(one.text, one.source, {**one.ratings, **more}, one.named)


def _key(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, sort_keys=True)


@dataclass
class _Choice:
    """Collect what people chose from one pair: for each of them the probability that they prefer a."""

    prompt: Prompt
    a: str
    b: str
    source: str
    shares: list[float] = field(default_factory=list)
    raters: set[str] = field(default_factory=set)


def _chosen(reading: _Reading, config: PairsConfig) -> list[AnswerPair]:
    """Put the rows of one pair together: the share of people who chose each answer."""
    rows, choices = reading.rows, dict[tuple[str, str, str], _Choice]()
    if any(part.layout not in ("preference", "hh_rlhf") for part in rows.parts):
        raise DataError(
            f"{config.data.name}: expected pairs (prompt, chosen, rejected), and the layout is {rows.layout}"
        )
    reading.need(config.rater)

    def add(item: PlacedRow) -> None:
        row, source = item.row, item.source
        prompt, chosen, rejected = _two_answers(row, item.layout, item.config)
        share = read_number(row["probability"], "probability") if row.get("probability") is not None else 1.0
        if not 0 <= share <= 1:
            raise BadRow(f"probability is {share}, expected 0 to 1")
        a, b = sorted((chosen, rejected))
        choice = choices.setdefault((_key(prompt), a, b), _Choice(prompt, a, b, source))
        if config.rater is not None:
            rater = str(row.get(config.rater))
            if rater in choice.raters:
                raise BadRow(f"rater {rater!r} chose from this pair twice")
            choice.raters.add(rater)
        choice.shares.append(share if chosen == a else 1 - share)

    rows.read(add, NOT_SHOWN)
    pairs = []
    for c in choices.values():
        reading.used += len(c.shares)
        reading.units.append([float(s > 0.5) for s in c.shares])
        human = fmean(c.shares)
        if human == 0.5:
            reading.left_out.note("tie", c.source)
        else:
            pairs.append(AnswerPair(c.prompt, c.a, c.b, c.source, human, 2 * human - 1))
    return pairs


def _two_answers(row: SourceRow, layout: str, data: DataConfig) -> tuple[Prompt, str, str]:
    """Return prompt, chosen and rejected of a row. Raises BadRow."""
    records = two_records(row, layout, data)
    check_pair(*records)
    turns = [dict(m) for m in records[0].messages[:-1]]
    if not any(str(m["content"]).strip() for m in turns if m["role"] != "system"):
        raise BadRow("empty prompt")
    single = len(turns) == 1 and turns[0]["role"] == "user"
    prompt: Prompt = str(turns[0]["content"]) if single else turns
    chosen, rejected = (_checked(_plain_answer(record.messages[-1]), prompt) for record in records)
    return prompt, chosen, rejected


def _candidates(reading: _Reading, config: CandidatesConfig) -> list[AnswerPair]:
    reading.need(config.completions)

    def add(item: PlacedRow) -> None:
        row, source = item.row, item.source
        prompt = _read_prompt(row, item.config, "instruction" if is_missing(row.peek("prompt")) else "prompt")
        values = row.get(config.completions)
        if not isinstance(values, list) or not values:
            raise BadRow(f"{config.completions}: expected a list of answers")
        # All candidates are read before any is added: a bad row adds none.
        candidates = [_listed_candidate(value, prompt, f"{source}[{i}]") for i, value in enumerate(values)]
        for value in values:
            if isinstance(value, Mapping):
                row.notes.note_unread(value, {*ANSWER_FIELDS, *SCORE_FIELDS}, f"{config.completions}[].")
        reading.prompts.setdefault(_key(prompt), prompt)
        group = reading.answers.setdefault(_key(prompt), {})
        group.update({len(group) + i: c for i, c in enumerate(candidates)})
        reading.used += 1

    reading.rows.read(add, NOT_SHOWN)
    return reading.pairs(config)


def _listed_candidate(value: Any, prompt: Prompt, source: str) -> Candidate:
    if not isinstance(value, Mapping):
        return Candidate(_checked(value, prompt), source)
    text = next((value[k] for k in ANSWER_FIELDS if value.get(k) is not None), None)
    score = next((value[k] for k in SCORE_FIELDS if value.get(k) is not None), None)
    return Candidate(_checked(text, prompt), source, mean=None if score is None else read_number(score, "score"))


def _thumbed_candidate(row: Row, text: str, source: str, config: ThumbsConfig) -> Candidate:
    up = is_good_label(row.get(config.label), config.label)
    rater = 0 if config.rater is None else row.get(config.rater)
    return Candidate(text, source, {rater: float(up)}, config.rater is not None)


def _thumbs(reading: _Reading, config: ThumbsConfig) -> list[AnswerPair]:
    reading.need(config.label, config.rater)
    _merge_rows(reading, config)
    for key, group in reading.answers.items():
        for c in group.values():
            share = fmean(c.ratings.values())
            if share == 0.5:
                reading.left_out.note("as many up as down", c.source)
                continue
            row = {"prompt": reading.prompts[key], "completion": c.text, "label": share > 0.5, "probability": share}
            reading.thumbs.append({**row, "ratings": len(c.ratings), "source": c.source})
    return reading.pairs(config)


ANSWER_READERS: dict[str, Callable[..., list[AnswerPair]]] = {
    "ratings": _rated,
    "pairs": _chosen,
    "candidates": _candidates,
    "thumbs": _thumbs,
}


def _agreement(units: Sequence[Sequence[float]], numeric: bool) -> dict[str, Any]:
    """Return Krippendorff's alpha over the units with two ratings and more, by the metrics that make sense."""
    several = [u for u in units if len(u) > 1]
    if not several:
        return {}
    metrics = ("nominal", "ordinal", "interval") if numeric else ("nominal",)
    alphas = {m: krippendorff_alpha(several, m) for m in metrics}  # type: ignore[arg-type]
    out: dict[str, Any] = {"alpha": {m: a if a == a else None for m, a in alphas.items()}}
    return out | {"units": len(several), "ratings_per_unit": fmean(len(u) for u in several)}
