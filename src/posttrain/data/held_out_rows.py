"""Rows that are measured and never trained on: a part of a stage's own data, or other data without copies of it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from posttrain.core.errors import DataError
from posttrain.data.bad_rows import BadRows
from posttrain.data.rows import PreparedItems, manifest_entry, marked_example

log = logging.getLogger("posttrain")


P = TypeVar("P", bound=PreparedItems[Any])


def hold_out(
    data: P, fraction: float, most: int, seed: int, tokenizer: Any, where: str = "held_out"
) -> tuple[P, P | None]:
    """Divide data into rows to train on and rows to measure.

    round(fraction * rows) rows are measured, at least one and at most `most`. Rows that occur more than once are
    trained on, all of them: a measured copy would measure memory. Of rows with labels, both parts have both.

    Args:
        data: Prepared rows.
        fraction: Part of the rows to measure.
        most: Most rows to measure.
        seed: Seed of the choice.
        tokenizer: Its tokenizer, for the examples in the statistics.
        where: Name of the stage, for messages.

    Returns:
        (rows to train on, rows to measure); the second is None, with a warning, if no row can be spared.
    """
    count = len(data)
    wanted = min(most, max(1, round(fraction * count)), count - 1)
    chosen = _choose(data, wanted, seed) if wanted > 0 else []
    if not chosen or (hasattr(data, "label_of") and len(chosen) > most):
        if not count or len(items_of_row(data, 0)) == count:
            reason = "a single row"
        elif hasattr(data, "label_of"):
            reason = f"{count:,} rows (at most {most:,}): both parts would need a good and a bad one that occur once"
        else:
            reason = f"{count:,} rows, each of which occurs more than once"
        log.warning("%s: nothing is held out of %s, so nothing is measured during training", where, reason)
        return data, None
    measured = np.asarray(sorted(chosen))
    others = np.delete(np.arange(count), measured)
    trained, held_out = data.take(others), data.take(measured)
    _describe(data, trained, held_out, tokenizer)
    return trained, held_out


def _choose(data: Any, wanted: int, seed: int) -> list[int]:
    """Return the numbers of up to `wanted` items without a copy, of both labels if the items have any.

    The items that a row became are chosen together: they share most of their text.
    """
    order = np.random.default_rng([seed, 5]).permutation(len(data))
    chosen: dict[int, None] = {}
    at, size = 0, 2 * wanted + 32
    # A few candidates at a time: of data larger than memory, only the contents of candidates are kept.
    while len(chosen) < wanted and at < len(order):
        rows = [items_of_row(data, i) for i in order[at : at + size].tolist()]
        single = _without_copy(data, sorted(set().union(*rows)))
        for row in rows:
            fits = len(chosen) + len(row) <= wanted or not chosen and len(row) < len(data)
            if len(chosen) < wanted and fits and row.start not in chosen and single.issuperset(row):
                chosen.update(dict.fromkeys(row))
        at, size = at + size, 4 * size
    return _with_both_labels(data, list(chosen), order)


def items_of_row(data: Any, number: int) -> range:
    """Return the numbers of the items that the row of an item became; they lie side by side."""
    place, low, high = data.place(number), number, number + 1
    while place and low > 0 and data.place(low - 1) == place:
        low -= 1
    while place and high < len(data) and data.place(high) == place:
        high += 1
    return range(low, high)


def _without_copy(data: Any, numbers: Sequence[int]) -> set[int]:
    """Return those of the rows whose content no other row has."""
    if data.stats.get("duplicates") == 0 and not data.stats.get("contradictory"):
        return set(numbers)
    contents = {i: data.content(i) for i in numbers}
    wanted = set(contents.values())
    counts = Counter(content for i in range(len(data)) if (content := data.content(i)) in wanted)
    return {i for i, content in contents.items() if counts[content] == 1}


def _with_both_labels(data: Any, chosen: list[int], order: np.ndarray) -> list[int]:
    """Return the chosen rows, changed so that both parts of the data have rows of both labels; [] if that can't be."""
    label = getattr(data, "label_of", None)
    if label is None or not chosen:
        return chosen
    taken = dict.fromkeys(chosen)
    groups: dict[bool, list[int]] = {True: [], False: []}
    for i in order.tolist():
        groups[label(i)].append(i)
    for group in groups.values():
        held = [i for i in group if i in taken]
        if len(held) == len(group) and held:
            del taken[held.pop()]
        elif not held and len(group) > 1:
            single = _without_copy(data, group)
            held = [i for i in group if i in single][:1]
            if held and len(taken) > 1:
                taken.popitem()
            taken |= dict.fromkeys(held)
        if not held:
            return []
    return list(taken)


def _describe(data: Any, trained: Any, held_out: Any, tokenizer: Any) -> None:
    """Write into the statistics of both parts what differs from those of all rows."""
    stats, samples = data.stats, held_out.samples
    places = {held_out.place(i) or str(i) for i in range(len(held_out))}
    rows, by_source = len(places), Counter(place.rpartition(":")[0] for place in places)
    about: dict[str, Any] = {name: stats[name] for name in ("sha256", "layout") if name in stats}
    if sources := stats.get("sources"):
        trained.stats["sources"] = [{**s, "used": s["used"] - by_source[s["source"]]} for s in sources]
        measured = [{**s, "rows": by_source[s["source"]], "used": by_source[s["source"]]} for s in sources]
        about["sources"] = [s for s in measured if s["rows"]]
    # The rest is about all rows, and stands in the entry of those that are trained on.
    about |= {"rows": rows, "used": rows, "loss_tokens": samples.loss_tokens, "examples": examples(held_out, tokenizer)}
    held_out.stats.clear()
    held_out.stats.update(manifest_entry(samples.lengths, BadRows(), stats["source"], **about))
    trained.stats.update(
        used=stats["used"] - rows,
        held_out=rows,
        tokens=stats["tokens"] - held_out.stats["tokens"],
        loss_tokens=stats["loss_tokens"] - samples.loss_tokens,
        longest=int(trained.samples.lengths.max()),
        median=int(np.median(trained.samples.lengths)),
        examples=examples(trained, tokenizer),
        **({"samples": len(trained)} if "samples" in stats else {}),
    )
    if hasattr(data, "label_of"):
        for part in (trained, held_out):
            part.stats["desirable"] = part.items.good


def examples(data: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Return the first rows as examples for the report, the answers of a pair with their labels."""
    if hasattr(data, "labelled"):
        answers = [labelled for item in data.labelled(2) for labelled in item]
        return [marked_example(sample, tokenizer, label=label) for label, sample in answers]
    return [marked_example(sample, tokenizer) for sample in data.samples[:3]]


def drop_training_overlap(held_out: P, trained: PreparedItems[Any], where: str) -> P:
    """Return held-out data without the items that are also trained on, which would measure memory.

    Args:
        held_out: Held-out data.
        trained: Training data.
        where: Name of the stage, for messages.

    Returns:
        The remaining items; the others are counted as dropped.

    Raises:
        DataError: More than nine in ten are trained on: the two are the same rows by mistake.
    """
    contents = [held_out.content(i) for i in range(len(held_out))]
    # The contents of held-out rows are few; those of all trained rows may not fit in memory.
    wanted = set(contents)
    known = {content for i in range(len(trained)) if (content := trained.content(i)) in wanted}
    left = [i for i, content in enumerate(contents) if content not in known]
    total, same = len(contents), len(contents) - len(left)
    if same > 0.9 * total:
        example = held_out.place(next(i for i, content in enumerate(contents) if content in known))
        raise DataError(
            f"{where}: {same} of {total} held-out {held_out.noun} are trained on too (for example {example}). "
            f"{held_out.advice}"
        )
    out = held_out.take(left)
    out.stats.update(used=len(left), dropped=held_out.stats["dropped"] | ({"trained on too": same} if same else {}))
    return out
