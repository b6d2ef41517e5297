"""Items of evaluations: the figures of one model, and the paired comparison of two models on the same items.

Letters of a paired two-by-two table, used throughout: n items, of which ``gained`` went from wrong to right,
``lost`` from right to wrong; the rest are right both times or wrong both times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import gt, lt
from typing import Any

import numpy as np

from posttrain.core.errors import DataError
from posttrain.core.statistics import (
    Loss,
    interval_of_means,
    mean_interval,
    paired_change,
    perplexity_difference,
    perplexity_interval,
    wilson,
    zero_or_one,
)

Item = Mapping[str, Any]


def summarize(items: Sequence[Item], kind: str, *, level: float = 0.95, seed: int = 0) -> dict[str, Any]:
    """Compute the figures of one model on one task.

    Args:
        items: For kind choice and generate each has ``correct``; for perplexity ``nll`` and ``tokens``; for sample
            ``value``, an accuracy between 0 and 1; for score ``value``, any number, or None if no answer could be
            scored, which counts in ``unscored`` alone; for behaviour the same, with ``figures`` (`summarize_figures`);
            for speed ``value``, tokens a second in one repeat: the figure is their median, its limits are the lowest
            and the highest.
        kind: Kind of the task.
        level: Confidence level.
        seed: Seed of the bootstrap.

    Returns:
        {"metric", "value", "low", "high", "n", "interval"}, for behaviour with "figures".

    Raises:
        DataError: There are no items, or the kind is unknown.
    """
    figures = {"figures": summarize_figures(items, level, seed)} if kind == "behaviour" else {}
    missing = sum(i["value"] is None for i in items) if kind in ("score", "behaviour") else 0
    if missing:
        items = [i for i in items if i["value"] is not None]
    if not items:
        raise DataError("expected at least one item to evaluate, got none; is the range `rows` of the task empty?")
    percent = f"{100 * level:g}%"
    if kind == "perplexity":
        value, low, high = perplexity_interval(_losses(items), level, seed=seed)
        how = f"{percent} bootstrap"
    elif kind in ("sample", "score", "behaviour"):
        values = [float(i["value"]) for i in items]
        low, high = interval_of_means(np.array([values]).T, level, seed)[0]
        value, how = sum(values) / len(values), f"{percent} {'Wilson' if zero_or_one(values) else 'bootstrap'}"
    elif kind == "speed":
        values = sorted(float(i["value"]) for i in items)
        value, low, high, how = float(np.median(values)), values[0], values[-1], "lowest and highest repeat"
    elif kind in ("choice", "generate"):
        right = sum(bool(i["correct"]) for i in items)
        value, (low, high), how = right / len(items), wilson(right, len(items), level), f"{percent} Wilson"
    else:
        known = "choice, generate, perplexity, sample, score, behaviour or speed"
        raise DataError(f"expected a task of kind {known}, got {kind!r}")
    metric = kind if kind in ("perplexity", "score", "behaviour") else "tokens/s" if kind == "speed" else "accuracy"
    out = {"metric": metric, "value": value, "low": low, "high": high, "n": len(items), "interval": how}
    return out | ({"unscored": missing} if missing else {}) | figures


def summarize_figures(items: Sequence[Item], level: float = 0.95, seed: int = 0) -> list[dict[str, Any]]:
    """Compute the mean of every figure of the items, with the interval of `mean_interval`.

    Args:
        items: Each with ``figures``, name → number; None, or no such name: the figure does not apply to the item.
        level: Confidence level.
        seed: Seed of the bootstrap.

    Returns:
        {"name", "value", "low", "high", "n"} of each that applies to an item, in the order of their first appearance.
    """
    found: dict[str, list[float]] = {}
    for item in items:
        for name, value in item.get("figures", {}).items():
            found.setdefault(name, []).extend([] if value is None else [float(value)])
    return [
        {"name": name, "value": sum(v) / len(v), "low": low, "high": high, "n": len(v)}
        for name, v in found.items()
        if v
        for low, high in [mean_interval(v, level, seed)]
    ]


def compare_figures(pairs: Sequence[tuple[Item, Item]], level: float = 0.95, seed: int = 0) -> list[dict[str, Any]]:
    """Compute before, after and `paired_change` of every figure, on the items to which it applies on both sides.

    Args:
        pairs: Each item before and after.
        level: Confidence level.
        seed: Seed of the bootstrap.

    Returns:
        {"name", "before", "after", "n", "difference", "low", "high", "test", "p_value"} of each that an item has twice.
    """
    names = dict.fromkeys(name for old, _ in pairs for name in old.get("figures", {}))
    out = []
    for name in names:
        both = [(a["figures"].get(name), b.get("figures", {}).get(name)) for a, b in pairs]
        known = [(float(x), float(y)) for x, y in both if x is not None and y is not None]
        if known:
            x, y = ([pair[side] for pair in known] for side in (0, 1))
            means = {"before": sum(x) / len(x), "after": sum(y) / len(y), "n": len(x)}
            out.append({"name": name, **means, **paired_change(x, y, level=level, seed=seed)})
    return out


def compare(
    before: Sequence[Item], after: Sequence[Item], kind: str, *, task: str = "", level: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Compute one entry of ``comparison.json``: two models on the same items, matched by ``id``, in any order.

    difference is after minus before, with its interval (low, high). Accuracy: method 10 of Newcombe and McNemar's
    exact test; perplexity, and accuracies of several samples: paired bootstrap. gained and lost count the items that
    went from wrong to right and back; failed, those whose grader failed on a side, which are wrong there (of scores:
    left out on both sides); for perplexity, those whose loss per token fell and rose; for samples, those
    whose accuracy rose and fell; for scores, those whose mean rose and fell, and ``wins`` (see there) if items have
    ``answers``; for behaviour those whose number rose and fell, and ``figures``, each compared likewise.

    Args:
        before: Items of the model before, as `summarize` takes them.
        after: Items of the model after.
        kind: Kind of the task.
        task: Name of the task; without it the entry has no such key.
        level: Confidence level.
        seed: Seed of the bootstrap.

    Raises:
        DataError: An id comes twice or is missing on one side, or there are no items.
    """
    old, new = _by_id(before, "before"), _by_id(after, "after")
    if old.keys() != new.keys():
        raise DataError(
            f"expected the same items before and after, got {len(old)} and {len(new)}; "
            f"only before: {_some(old.keys() - new.keys())}; only after: {_some(new.keys() - old.keys())}. "
            "Evaluate both models on the same data and rows"
        )
    every = pairs = [(old[i], new[i]) for i in old]
    open_ended = kind in ("score", "behaviour")
    failed = {
        side: sum(bool(i.get("failed")) or (open_ended and i["value"] is None) for i in items.values())
        for side, items in (("before", old), ("after", new))
    }
    if open_ended:  # a prompt that one side has no score of can't be compared
        pairs = [(a, b) for a, b in pairs if a["value"] is not None and b["value"] is not None]
    # Both sides in the same order, so that the bootstrap draws the same items for both.
    sides = [
        summarize(list(side), kind, level=level, seed=seed) for side in ([a for a, _ in pairs], [b for _, b in pairs])
    ]
    if kind == "perplexity":
        losses = _losses([a for a, _ in pairs]), _losses([b for _, b in pairs])
        difference, (low, high), p = perplexity_difference(*losses, level=level, seed=seed)
        rates = [(a["nll"] / max(a["tokens"], 1), b["nll"] / max(b["tokens"], 1)) for a, b in pairs]
        gained, lost, test = sum(b < a for a, b in rates), sum(b > a for a, b in rates), "paired bootstrap"
        change = {"difference": difference, "low": low, "high": high, "test": test, "p_value": p}
    else:
        name = "correct" if kind in ("choice", "generate") else "value"
        values = [float(a[name] or 0) for a, _ in pairs], [float(b[name] or 0) for _, b in pairs]
        change = paired_change(*values, closed=kind != "score", level=level, seed=seed)
        gained, lost = (sum(up(b, a) for a, b in zip(*values, strict=True)) for up in (gt, lt))
    figures = {"figures": compare_figures(every, level, seed)} if kind == "behaviour" else {}
    answered = all("answers" in item for pair in pairs for item in pair)  # an evaluation from elsewhere may keep none
    return {
        **({"task": task} if task else {}),
        "before": {k: sides[0][k] for k in ("value", "low", "high", "n")},
        "after": {k: sides[1][k] for k in ("value", "low", "high", "n")},
        **change,
        "n": len(pairs), "gained": gained, "lost": lost, **({"failed": failed} if any(failed.values()) else {}),
        **({"wins": wins(*zip(*pairs, strict=True), level=level, seed=seed)} if kind == "score" and answered else {}),
        **figures,
    }  # fmt: skip


def wins(before: Sequence[Item], after: Sequence[Item], *, level: float = 0.95, seed: int = 0) -> dict[str, float]:
    """Compute how often an answer after scores above one before, both to the same prompt; ties count half.

        win rate = mean over prompts of the mean over x, y of [x > y] + [x = y] / 2

    x: the prompt's scores after; y: those before. The interval is the bootstrap's over prompts (Wilson's if every
    prompt is won or lost whole). 1/2: neither is better.

    Args:
        before: Items of kind score.
        after: The same prompts, in the same order.
        level: Confidence level.
        seed: Seed of the bootstrap.

    Returns:
        value, low, high.

    Raises:
        DataError: The two have different lengths.
        ValueError: There are no items.
    """
    if len(before) != len(after):
        raise DataError(f"expected the same prompts before and after, got {len(before)} and {len(after)}")
    rates = []
    for old, new in zip(before, after, strict=True):
        x, y = (np.array([a["score"] for a in i["answers"] if a["score"] is not None]) for i in (new, old))
        rates.append(float(((x[:, None] > y) + 0.5 * (x[:, None] == y)).mean()))
    low, high = mean_interval(rates, level, seed)
    return {"value": sum(rates) / len(rates), "low": low, "high": high}


def _losses(items: Sequence[Item]) -> list[Loss]:
    return [(float(i["nll"]), int(i["tokens"])) for i in items]


def _by_id(items: Sequence[Item], side: str) -> dict[Any, Item]:
    table: dict[Any, Item] = {}
    for item in items:
        if item["id"] in table:
            raise DataError(f"expected every item once, got id {item['id']!r} twice among the items {side}")
        table[item["id"]] = item
    return table


def _some(ids: set[Any]) -> str:
    names = sorted(map(repr, ids))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
