"""Measure which labels go together with words that name groups of people."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from hashlib import blake2b
from statistics import NormalDist
from typing import Any

from posttrain.data.group_terms import GroupTerms
from posttrain.data.text_similarity import words_of

LEAST_ROWS = 30
"""Rows that mention a group, and rows that do not, before the two are compared."""
LEAST_EXPECTED = 5
"""Rows expected in each cell of the table if label and group were independent."""
LEVEL = 0.05
"""Adjusted p-value below which an association is marked."""


class GroupMentions:
    """Find the groups that a text mentions, by words and runs of words, without case."""

    def __init__(self, terms: GroupTerms) -> None:
        self._single: dict[str, set[str]] = defaultdict(set)
        self._runs: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for group, listed in terms.items():
            for term in listed:
                words = words_of(term)
                if len(words) == 1:
                    self._single[words[0]].add(group)
                elif words:
                    self._runs[words[0]].append((f" {' '.join(words)} ", group))

    def groups(self, text: str) -> set[str]:
        """Return the groups that a text mentions."""
        words = words_of(text)
        different = set(words)
        found: set[str] = set()
        for word in different & self._single.keys():
            found |= self._single[word]
        if begun := different & self._runs.keys():
            joined = f" {' '.join(words)} "
            found |= {group for word in begun for run, group in self._runs[word] if run in joined}
        return found


class Associations:
    """Count labels of inputs that mention a group and of those that do not, by task.

    An input that several rows share (other wordings, demonstrations) counts once.
    """

    def __init__(self) -> None:
        self._mentions: dict[str, GroupMentions] = {}
        self._labels: dict[str, Counter[str]] = defaultdict(Counter)
        self._groups: dict[str, Counter[str]] = defaultdict(Counter)
        self._both: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
        self._seen: set[int] = set()

    def add(self, task: str, terms: GroupTerms, text: str, label: str) -> None:
        """Count an input with its label.

        Args:
            task: Name of its task.
            terms: Words of each group; of a task always the same.
            text: The input.
            label: Its label.
        """
        if not terms:
            return
        key = f"{task}\0{label}\0{text}".encode("utf-8", "surrogatepass")
        digest = int.from_bytes(blake2b(key, digest_size=8).digest(), "little")
        if digest in self._seen:
            return
        self._seen.add(digest)
        if task not in self._mentions:
            self._mentions[task] = GroupMentions(terms)
        self._labels[task][label] += 1
        for group in self._mentions[task].groups(text):
            self._groups[task][group] += 1
            self._both[task][group, label] += 1

    def stats(self) -> dict[str, Any]:
        """Return the table: of each task, group and label with enough rows the counts, rates and log-odds ratio.

        The log-odds ratio is ln(a d / b c), with a rows that mention the group and have the label, b that mention it
        and have another, c and d those that do not mention it; 0.5 is added to each if one is 0 (Haldane, Anscombe).
        Its standard error is sqrt(1/a + 1/b + 1/c + 1/d). p-values are corrected for the number of comparisons (Holm).
        Of two labels, one is shown: the other's ratio is the same with the other sign.
        """
        rows, few = [], 0
        for task, labels in sorted(self._labels.items()):
            total = sum(labels.values())
            names = sorted(labels)
            for group, mentions in sorted(self._groups[task].items()):
                for label in names[-1:] if len(names) == 2 else names:
                    a = self._both[task][group, label]
                    table = a, mentions - a, labels[label] - a, total - mentions - labels[label] + a
                    if len(names) < 2 or not _enough(table):
                        few += len(names) > 1
                        continue
                    rows.append({"task": task, "group": group, "label": label, **_association(*table)})
        adjusted = holm([row["p"] for row in rows])
        for row, p in zip(rows, adjusted, strict=True):
            row |= {"p_adjusted": p, "marked": p < LEVEL}
        rows.sort(key=lambda row: (row["p_adjusted"], -abs(row["log_odds_ratio"])))
        return {
            "inputs": sum(sum(labels.values()) for labels in self._labels.values()),
            "comparisons": len(rows),
            "too_few_rows": few,
            "marked": sum(row["marked"] for row in rows),
            "rows": rows,
        }


def _enough(table: tuple[int, int, int, int]) -> bool:
    a, b, c, d = table
    total = a + b + c + d
    if min(a + b, c + d) < LEAST_ROWS:
        return False
    return min(row * column / total for row in (a + b, c + d) for column in (a + c, b + d)) >= LEAST_EXPECTED


def _association(a: int, b: int, c: int, d: int) -> dict[str, Any]:
    """Return counts, rates, log-odds ratio, 95% interval and p-value of a table of two by two."""
    add = 0.5 if 0 in (a, b, c, d) else 0.0
    w, x, y, z = (n + add for n in (a, b, c, d))
    ratio = math.log(w * z / (x * y))
    error = math.sqrt(1 / w + 1 / x + 1 / y + 1 / z)
    normal = NormalDist()
    half = normal.inv_cdf(0.975) * error
    return {
        "mentions": a + b,
        "with_label": a,
        "others": c + d,
        "others_with_label": c,
        "rate": a / (a + b),
        "others_rate": c / (c + d),
        "log_odds_ratio": ratio,
        "low": ratio - half,
        "high": ratio + half,
        "p": 2 * normal.cdf(-abs(ratio) / error),
    }


def holm(p_values: Iterable[float]) -> list[float]:
    """Return adjusted p-values: the i-th smallest of m times (m - i + 1), no smaller than those before, at most 1.

    Source: Holm 1979, Scandinavian Journal of Statistics 6:65.
    """
    values = list(p_values)
    out, highest = [1.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, values[i] * (len(values) - rank)))
        out[i] = highest
    return out
