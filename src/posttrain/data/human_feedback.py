"""Rows that people judged → answers, pairs with strengths, and how far the people agree."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from posttrain.config import DataConfig
from posttrain.config.feedback import CandidatesConfig, PairsConfig, RatingsConfig, ThumbsConfig
from posttrain.core.errors import DataError
from posttrain.data.comparisons import Candidate, LeftOut, Pair, Prompt, pair_up
from posttrain.data.formats import LAYOUTS, BadRow, Row, check_templates, fill, finite, number, recognise
from posttrain.data.preference_rows import same_prompt
from posttrain.data.rater_agreement import krippendorff_alpha
from posttrain.data.readers import Table, in_order, read_table
from posttrain.data.sft_rows import _Bad, _complaint, _rename

RowsConfig = RatingsConfig | PairsConfig | CandidatesConfig | ThumbsConfig
UP = {"true", "1", "1.0", "up", "good", "yes", "+1", "👍", "thumbs_up"}
DOWN = {"false", "0", "0.0", "-1", "-1.0", "down", "bad", "no", "👎", "thumbs_down"}


@dataclass(frozen=True)
class Answers:
    """pairs: to be judged, or labelled by people already. thumbs: rows (prompt, completion, label), of thumbs alone.

    left_out: all pairs and answers that teach nothing, {source, reason}. raters: how far people agree. stats: what the
    manifest and the report say of the rows. settled: people's own probability of what most of them prefer, a pair,
    which no judge can be expected to beat.
    """

    pairs: list[Pair]
    stats: dict[str, Any]
    raters: dict[str, Any] = field(default_factory=dict)
    thumbs: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)


@dataclass
class _Reading:
    """Rows on their way: what was left out and why, what people said of each unit."""

    config: RowsConfig
    table: Table
    bad: _Bad = field(default_factory=_Bad)
    dropped: LeftOut = field(default_factory=LeftOut)
    units: list[list[float]] = field(default_factory=list)
    used: int = 0


def read_answers(config: RowsConfig, count: Callable[[str], int] = len) -> Answers:
    """Read, check and pair. count: length of a text for the statistics (characters, or tokens by a tokenizer).

    Raises DataError for files and columns that can't be read, and for bad rows unless data.on_bad_row is skip: with
    file, row and reason of the first ten.
    """
    data = config.data
    table = read_table(data)
    _rename(table.rows, data)
    check_templates(data, set().union(*table.rows))
    order = in_order(data, len(table.rows))
    reading = _Reading(config, table)
    pairs, thumbs = READERS[config.kind](reading, config, order)
    if reading.bad.counts and (data.on_bad_row == "stop" or not (pairs or thumbs)):
        raise DataError(_complaint(reading.bad, len(order)))
    if not pairs and not thumbs:
        why = (
            ", ".join(f"{n:,} {reason}" for reason, n in reading.dropped.items()) or "every prompt has one answer alone"
        )
        raise DataError(f"{data.source}: no pair comes out of {len(order):,} rows ({why})")
    raters = _agreement(reading.units, isinstance(config, RatingsConfig))
    told = [max(p.human, 1 - p.human) for p in pairs if p.human is not None]
    if told:
        raters["mean_probability"] = fmean(told)
    return Answers(pairs, _stats(reading, pairs, thumbs, len(order), count), raters, thumbs, reading.dropped.all)


def _rows(reading: _Reading, order: Iterable[int]) -> Iterable[tuple[Row, str, tuple[str, int]]]:
    for i in order:
        file, line = reading.table.places[i]
        yield reading.table.rows[i], f"{file}:{line}", (file, line)


def _need(reading: _Reading, *columns: str | None) -> None:
    have = set().union(*reading.table.rows)
    for column in columns:
        if column is not None and column not in have:
            raise DataError(f"{reading.config.data.source}: no column {column!r}; the columns are {sorted(have)}")


def _asked(row: Row, data: DataConfig) -> Prompt:
    value: Any = fill(data.prompt, row) if data.prompt is not None else row.get("prompt")
    if isinstance(value, list):
        if not value or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in value):
            raise BadRow("prompt: expected text, or a list of turns with role and content")
        return value
    if not isinstance(value, str) or not value.strip():
        raise BadRow("empty prompt" if value is None or value == "" else "prompt is no text")
    return value


def _answer(row: Row, data: DataConfig, prompt: Prompt) -> str:
    value: Any = fill(data.completion, row) if data.completion is not None else row.get("completion")
    return _checked(value, prompt)


def _checked(value: Any, prompt: Prompt) -> str:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    if not isinstance(value, str) or not value.strip():
        raise BadRow("empty answer" if value is None or isinstance(value, str) else "the answer is no text")
    last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if value.strip() == last.strip():
        raise BadRow("the answer is the prompt again")
    return value


def _ratings(value: Any, name: str) -> tuple[dict[Any, float], bool]:
    """(ratings by rater, whether the raters are known) of a cell."""
    if isinstance(value, Mapping):
        return {r: finite(v, f"{name}.{r}") for r, v in value.items() if v is not None}, True
    if isinstance(value, str):
        if value.strip().startswith("{"):
            try:
                return _ratings(json.loads(value), name)
            except json.JSONDecodeError as error:
                raise BadRow(f"{name} begins with {{ and is not valid JSON") from error
        value = [v for v in value.strip().strip("[]").replace(";", ",").split(",") if v.strip()]
    if not isinstance(value, list | tuple):
        value = [] if value is None else [value]
    return {i: finite(v, name) for i, v in enumerate(value) if v is not None}, False


def _rated(reading: _Reading, config: RatingsConfig, order: np.ndarray) -> tuple[list[Pair], list[dict[str, Any]]]:
    _need(reading, config.ratings, config.rater, config.mean, config.spread)
    found: dict[str, dict[str, Candidate]] = {}
    prompts: dict[str, Prompt] = {}
    for row, source, place in _rows(reading, order):
        try:
            prompt = _asked(row, config.data)
            text = _answer(row, config.data, prompt)
            group = found.setdefault(_key(prompt), {})
            prompts.setdefault(_key(prompt), prompt)
            group[text] = _merged(group.get(text), _candidate(row, text, source, config))
        except BadRow as error:
            reading.bad.add(place, str(error))
    for group in found.values():
        reading.units.extend(list(c.ratings.values()) for c in group.values())
        reading.used += len(group)
    return _paired(reading, config, {k: list(g.values()) for k, g in found.items()}, prompts), []


def _candidate(row: Row, text: str, source: str, config: RatingsConfig) -> Candidate:
    if config.ratings is None:
        assert config.mean is not None
        spread = (
            number(row[config.spread], config.spread) if config.spread and row.get(config.spread) is not None else None
        )
        if spread is not None and spread < 0:
            raise BadRow(f"{config.spread} is {spread}, and a spread is never below 0")
        if row.get(config.mean) in (None, ""):
            raise BadRow(f"no rating in {config.mean!r}")
        return Candidate(text, source, mean=number(row[config.mean], config.mean), spread=spread)
    ratings, named = _ratings(row.get(config.ratings), config.ratings)
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
    """Two rows of the same answer: everyone's ratings together."""
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


def _paired(
    reading: _Reading,
    config: RatingsConfig | CandidatesConfig | ThumbsConfig,
    groups: Mapping[str, Sequence[Candidate]],
    prompts: Mapping[str, Prompt],
) -> list[Pair]:
    margin = config.min_margin if isinstance(config, RatingsConfig) else 0.0
    out: list[Pair] = []
    for g, (key, candidates) in enumerate(groups.items()):
        rng = np.random.default_rng([config.seed, g])
        if len(candidates) == 1:
            reading.dropped.note("a prompt's only answer", candidates[0].source)
        out += pair_up(prompts[key], candidates, config.pairs_per_prompt, rng, reading.dropped, margin)
    return out


def _chosen(reading: _Reading, config: PairsConfig, order: np.ndarray) -> tuple[list[Pair], list[dict[str, Any]]]:
    """Rows of one pair are put together: the share of people who chose each answer."""
    layout = recognise(reading.table.rows[order[0]], config.data.layout)
    if layout not in ("preference", "hh_rlhf"):
        raise DataError(f"{config.data.source}: expected pairs (prompt, chosen, rejected), and the layout is {layout}")
    _need(reading, config.rater)
    said: dict[tuple[str, str, str], list[float]] = {}
    first: dict[tuple[str, str, str], tuple[Prompt, str]] = {}
    raters: dict[tuple[str, str, str], set[str]] = {}
    for row, source, place in _rows(reading, order):
        try:
            prompt, chosen, rejected = _both(row, layout, config.data)
            share = number(row["probability"], "probability") if row.get("probability") is not None else 1.0
            if not 0 <= share <= 1:
                raise BadRow(f"probability is {share}, expected 0 to 1")
            a, b = sorted((chosen, rejected))
            key = (_key(prompt), a, b)
            if config.rater is not None:
                who = str(row.get(config.rater))
                if who in raters.setdefault(key, set()):
                    raise BadRow(f"rater {who!r} chose from this pair twice")
                raters[key].add(who)
            said.setdefault(key, []).append(share if chosen == a else 1 - share)
            first.setdefault(key, (prompt, source))
        except BadRow as error:
            reading.bad.add(place, str(error))
    out = []
    for key, shares in said.items():
        reading.used += len(shares)
        reading.units.append([float(s > 0.5) for s in shares])
        human = fmean(shares)
        prompt, source = first[key]
        if human == 0.5:
            reading.dropped.note("tie", source)
            continue
        out.append(Pair(prompt, key[1], key[2], source, human, 2 * human - 1))
    return out, []


def _both(row: Row, layout: str, data: DataConfig) -> tuple[Prompt, str, str]:
    """(prompt, chosen, rejected) of a row in a preference layout: each answer read as that layout reads the chosen."""
    if row.get("rejected") is None or row.get("chosen") is None:
        raise BadRow("missing field 'chosen'" if row.get("chosen") is None else "missing field 'rejected'")
    if layout == "preference" and isinstance(row["chosen"], list) != isinstance(row["rejected"], list):
        raise BadRow("one answer is text and the other a list of turns")
    records = [
        LAYOUTS[layout].map({**row, "chosen": row[x], "rejected": row[y]})
        for x, y in (("chosen", "rejected"), ("rejected", "chosen"))
    ]
    (*before, chosen), (*other, rejected) = (r.messages for r in records)
    if before != other:
        raise BadRow("the two answers have different prompts")
    if not any(str(m["content"]).strip() for m in before if m["role"] != "system"):
        raise BadRow("empty prompt")
    if chosen["role"] != "assistant" or rejected["role"] != "assistant":
        raise BadRow("a conversation must end with the assistant's answer")
    if isinstance(row["chosen"], list) and row.get("prompt") is not None:
        same_prompt(row["prompt"], before)
    asked = [dict(m) for m in before]
    if data.system and asked[0]["role"] != "system":
        asked = [{"role": "system", "content": data.system}, *asked]
    single = len(asked) == 1 and asked[0]["role"] == "user"
    prompt: Prompt = str(asked[0]["content"]) if single else asked
    texts = [_checked(m["content"], prompt) for m in (chosen, rejected)]
    if texts[0].strip() == texts[1].strip():
        raise BadRow("two answers are the same")
    return prompt, texts[0], texts[1]


def _candidates(
    reading: _Reading, config: CandidatesConfig, order: np.ndarray
) -> tuple[list[Pair], list[dict[str, Any]]]:
    _need(reading, config.completions)
    groups: dict[str, list[Candidate]] = {}
    prompts: dict[str, Prompt] = {}
    for row, source, place in _rows(reading, order):
        try:
            prompt = _asked({**row, "prompt": row.get("prompt") or row.get("instruction")}, config.data)
            listed = row.get(config.completions)
            if not isinstance(listed, list) or not listed:
                raise BadRow(f"{config.completions}: expected a list of answers")
            found = [
                _one(value, prompt, f"{source}[{i}]") for i, value in enumerate(listed)
            ]  # all, or none of a bad row
            groups.setdefault(_key(prompt), []).extend(found)
            prompts.setdefault(_key(prompt), prompt)
            reading.used += 1
        except BadRow as error:
            reading.bad.add(place, str(error))
    return _paired(reading, config, groups, prompts), []


def _one(value: Any, prompt: Prompt, source: str) -> Candidate:
    if not isinstance(value, Mapping):
        return Candidate(_checked(value, prompt), source)
    text = next((value[k] for k in ("response", "completion", "text", "content") if value.get(k) is not None), None)
    score = next((value[k] for k in ("overall_score", "score", "rating") if value.get(k) is not None), None)
    return Candidate(_checked(text, prompt), source, mean=None if score is None else number(score, "score"))


def _thumbs(reading: _Reading, config: ThumbsConfig, order: np.ndarray) -> tuple[list[Pair], list[dict[str, Any]]]:
    _need(reading, config.label, config.rater)
    found: dict[str, dict[str, Candidate]] = {}
    prompts: dict[str, Prompt] = {}
    for row, source, place in _rows(reading, order):
        try:
            prompt = _asked(row, config.data)
            text = _answer(row, config.data, prompt)
            word = str(row.get(config.label)).strip().lower()
            if word not in UP | DOWN:
                raise BadRow(f"{config.label} is {row.get(config.label)!r}, expected up or down (true, 1, ...)")
            who = 0 if config.rater is None else row.get(config.rater)
            group = found.setdefault(_key(prompt), {})
            prompts.setdefault(_key(prompt), prompt)
            one = Candidate(text, source, {who: float(word in UP)}, config.rater is not None)
            group[text] = _merged(group.get(text), one)
        except BadRow as error:
            reading.bad.add(place, str(error))
    rows = []
    for key, group in found.items():
        for c in group.values():
            reading.units.append(list(c.ratings.values()))
            reading.used += 1
            share = fmean(c.ratings.values())
            if share == 0.5:
                reading.dropped.note("as many up as down", c.source)
            else:
                made = {"prompt": prompts[key], "completion": c.text, "label": share > 0.5, "probability": share}
                rows.append({**made, "ratings": len(c.ratings), "source": c.source})
    return _paired(reading, config, {k: list(g.values()) for k, g in found.items()}, prompts), rows


READERS: dict[str, Callable[..., tuple[list[Pair], list[dict[str, Any]]]]] = {
    "ratings": _rated,
    "pairs": _chosen,
    "candidates": _candidates,
    "thumbs": _thumbs,
}


def _agreement(units: Sequence[Sequence[float]], numeric: bool) -> dict[str, Any]:
    """Krippendorff's alpha by the metrics that make sense, over the units with two ratings and more."""
    several = [u for u in units if len(u) > 1]
    if not several:
        return {}
    metrics = ("nominal", "ordinal", "interval") if numeric else ("nominal",)
    alphas = {m: krippendorff_alpha(several, m) for m in metrics}  # type: ignore[arg-type]
    out: dict[str, Any] = {"alpha": {m: a if a == a else None for m, a in alphas.items()}}
    return out | {"units": len(several), "ratings_per_unit": fmean(len(u) for u in several)}


def _stats(
    reading: _Reading,
    pairs: Sequence[Pair],
    thumbs: Sequence[Mapping[str, Any]],
    rows: int,
    count: Callable[[str], int],
) -> dict[str, Any]:
    texts = list(dict.fromkeys([t for p in pairs for t in (p.a, p.b)] + [t["completion"] for t in thumbs]))
    lengths = sorted(count(t) for t in texts)
    source = reading.config.data.source
    return {
        "source": source if isinstance(source, str) else ", ".join(source),
        "sha256": reading.table.hashes,
        "layout": reading.config.kind,
        "rows": rows,
        "used": reading.used,
        "pairs": len(pairs),
        "dropped": dict(reading.bad.counts) | dict(reading.dropped),
        "bad_rows": reading.bad.all,
        "left_out": reading.dropped.shown,
        "truncated": 0,
        "tokens": sum(lengths),
        "loss_tokens": 0,
        "longest": lengths[-1] if lengths else 0,
        "median": lengths[len(lengths) // 2] if lengths else 0,
        "duplicates": 0,
        "examples": [{"text": f"{p.prompt} → {p.a} | {p.b}", "pieces": []} for p in pairs[:3]],
    }
