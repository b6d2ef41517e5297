"""Agreement of a reward model with people or outcomes: accuracy, calibration, length bias, AUC.

Functions of numbers that import numpy alone, as `posttrain.core.statistics`, whose intervals they use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.core.statistics import mean_interval

BINS = 10
"""Of the reliability plot, equally wide."""


def reliability(
    probabilities: Sequence[float], outcomes: Sequence[float], bins: int = BINS, low: float = 0.0
) -> list[dict[str, float]]:
    """Compare stated probabilities with how often they came true, in bins.

    Bins are equally wide from `low` to 1, the last one closed; a bin without numbers is left out. Source:
    Niculescu-Mizil & Caruana 2005, ICML, figure 1.

    Args:
        probabilities: The stated probabilities, in [low, 1].
        outcomes: 0 or 1, or shares if the truth itself is soft.
        bins: Number of bins.
        low: Lowest probability.

    Returns:
        One entry for each bin: its edges (from, to), n, the mean probability `said`, the mean outcome `was`, and the
        95% interval of that mean (low, high) by `mean_interval`.

    Raises:
        ValueError: Lengths differ, or a number is outside its range.
    """
    stated, was = np.asarray(probabilities, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    if stated.shape != was.shape or stated.ndim != 1:
        raise ValueError(f"expected as many probabilities as outcomes, got {stated.shape} and {was.shape}")
    if bins < 1 or not 0 <= low < 1:
        raise ValueError(f"expected at least one bin and 0 <= low < 1, got {bins} and {low}")
    if len(stated) and not (stated.min() >= low and stated.max() <= 1 and was.min() >= 0 and was.max() <= 1):
        raise ValueError(f"expected probabilities in [{low}, 1] and outcomes in [0, 1]")
    place = np.minimum(((stated - low) / (1 - low) * bins).astype(int), bins - 1)
    out = []
    for b in range(bins):
        in_bin = place == b
        if not in_bin.any():
            continue
        down, up = mean_interval(was[in_bin].tolist())
        edges = [low + (1 - low) * i / bins for i in (b, b + 1)]
        entry = {"from": edges[0], "to": edges[1], "n": int(in_bin.sum()), "said": float(stated[in_bin].mean())}
        out.append({**entry, "was": float(was[in_bin].mean()), "low": down, "high": up})
    return out


def calibration_error(table: Sequence[Mapping[str, float]]) -> float:
    """Expected calibration error: sum over bins of n_b / n |said_b - was_b|, of a table by `reliability`.

    Source: Naeini, Cooper & Hauskrecht 2015, AAAI; Guo et al., arXiv 1706.04599 eq. 3. Degenerate: an empty table: 0.
    """
    total = sum(b["n"] for b in table)
    return sum(b["n"] * abs(b["said"] - b["was"]) for b in table) / total if total else 0.0


def auc(scores: Sequence[float], right: Sequence[bool]) -> float | None:
    """Chance that a right item scores above a wrong one, ties counting 1/2 (area under the ROC curve).

    U / (n_right n_wrong), by midranks. Source: Hanley & McNeil 1982, Radiology 143:29. None where either kind is
    missing: there is nothing to tell apart. Raises ValueError where lengths differ.
    """
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(right, dtype=bool)
    if x.shape != y.shape:
        raise ValueError(f"expected as many scores as labels, got {x.shape} and {y.shape}")
    many, few = int(y.sum()), int((~y).sum())
    if not many or not few:
        return None
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[y].sum() - many * (many + 1) / 2) / (many * few))


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Pearson's r; None for fewer than two points, or if either side does not vary."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"expected as many numbers on both sides, got {a.shape} and {b.shape}")
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return None
    return float(np.clip(((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std()), -1.0, 1.0))


def judged_pairs(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarize held-out pairs of a reward model.

    Items have chosen and rejected (its rewards), probability (that chosen is better), and chosen_tokens,
    rejected_tokens.

    accuracy: share of pairs in which the answer that people prefer (probability above 1/2: chosen) has the higher
    reward; a tie counts 1/2; pairs that people find equal have no right answer and are left out (`undecided`).
    calibration: the stated sigma(|r_c - r_r|) in [1/2, 1] for the answer that it prefers, against how often people
    prefer that one. length: Pearson's r between the differences of reward and of length in tokens over the pairs (arXiv
    2310.03716), and the shares of pairs (not of equal length) in which it, and people, prefer the longer answer.

    Raises:
        ValueError: There are no items.
    """
    if not items:
        raise ValueError("expected at least one pair, got none")
    d = np.array([i["chosen"] - i["rejected"] for i in items], dtype=np.float64)
    p = np.array([i["probability"] for i in items], dtype=np.float64)
    longer = np.array([i["chosen_tokens"] - i["rejected_tokens"] for i in items], dtype=np.float64)
    decided = p != 0.5
    right = np.where(d == 0, 0.5, ((d > 0) == (p > 0.5)).astype(np.float64))[decided].tolist()
    stated = 1 / (1 + np.exp(-np.abs(d)))
    was = np.where(d > 0, p, np.where(d < 0, 1 - p, 0.5))
    table = reliability(stated.tolist(), was.tolist(), low=0.5)
    out: dict[str, Any] = {"pairs": len(items), "undecided": int((~decided).sum())}
    if right:
        low, high = mean_interval(right)
        out |= {"accuracy": float(np.mean(right)), "low": low, "high": high}
    # What a model that knows the labels' own probabilities would get: the loss can't fall below it.
    loss = p * np.logaddexp(0, -d) + (1 - p) * np.logaddexp(0, d)
    signed = np.where(p > 0.5, d, -d)
    out |= {"loss": float(loss.mean()), "margin": float(signed[decided].mean()) if right else 0.0}
    uneven = longer != 0
    out["calibration"] = {"error": calibration_error(table), "bins": table}
    out["length"] = {
        "correlation": correlation(d.tolist(), longer.tolist()),
        "prefers_longer": _share((d * longer > 0) + 0.5 * (d == 0), uneven),
        "people_prefer_longer": _share(np.where(longer > 0, p, 1 - p), uneven),
    }
    return out


def _share(values: Any, which: Any) -> float | None:
    return float(np.asarray(values, dtype=np.float64)[which].mean()) if which.any() else None


def judged_steps(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarize held-out chains of a process reward model. Items have scores and targets, one for each step.

    accuracy: share of steps whose score is on the target's side of 1/2, with its interval; auc: of separating steps
    with a target of at least 1/2 from the others; calibration against the targets themselves; first_error: share of
    chains in which the first step scored below 1/2 (or none) is the first whose target is.

    Raises:
        ValueError: There are no items.
    """
    if not items:
        raise ValueError("expected at least one chain, got none")
    scores = [float(s) for i in items for s in i["scores"]]
    targets = [float(t) for i in items for t in i["targets"]]
    right = [float((s >= 0.5) == (t >= 0.5)) for s, t in zip(scores, targets, strict=True)]
    low, high = mean_interval(right)
    table = reliability(scores, targets)
    same = [float(_first(i["scores"]) == _first(i["targets"])) for i in items]
    first_low, first_high = mean_interval(same)
    return {
        "chains": len(items), "steps": len(scores), "right_steps": sum(t >= 0.5 for t in targets),
        "accuracy": float(np.mean(right)), "low": low, "high": high,
        "auc": auc(scores, [t >= 0.5 for t in targets]),
        "first_error": float(np.mean(same)), "first_error_low": first_low, "first_error_high": first_high,
        "calibration": {"error": calibration_error(table), "bins": table},
    }  # fmt: skip


def _first(values: Sequence[float]) -> int:
    return next((i for i, v in enumerate(values) if v < 0.5), len(values))
