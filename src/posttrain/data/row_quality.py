"""Measure rows of instructions while they are written: breadth, lengths, labels, group terms, truncated rows."""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from posttrain.data.group_associations import Associations
from posttrain.data.group_terms import GroupTerms, terms_of
from posttrain.data.text_similarity import UNSPACED, interval_counts

WORD_COUNT_EDGES = (0, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
"""Edges of the histograms of words."""
MOST_LABELS = 100
"""Different labels of a task that are counted one by one; of more, the rest together."""
LONG_ROWS_SHOWN = 5
SHORT_INPUT = 200
"""Characters of an input that is searched apart from its prompt."""
_UNSPACED = re.compile(f"[{UNSPACED}]")

InstructionRow = Mapping[str, Any]


class RowQuality:
    """Measure rows one at a time; counts, lengths and a hash of each row are kept.

    A row has `prompt` (a text or messages) and `completion`; `task`, `type`, `cluster`, `language` and `domain`;
    `wording`, `inverted`, `shots`, `rationale`; `label` (None: it has none), `input` and `place`.
    """

    def __init__(
        self,
        group_terms: Mapping[str, GroupTerms] | None = None,
        tokens_of: Callable[[InstructionRow], int | None] | None = None,
        context: int | None = None,
    ) -> None:
        """Prepare the counts.

        Args:
            group_terms: Words of groups by task. Of a task that is missing: those of its language, if there are any.
            tokens_of: Returns the tokens of a row as it is trained on, or None for a row that surely fits. None:
                truncated rows are not counted.
            context: Most tokens of a row; longer ones are truncated. None: the model has no limit.
        """
        self.group_terms, self.tokens_of, self.context = dict(group_terms or {}), tokens_of, context
        self.rows = 0
        self._shares: dict[str, Counter[str]] = {
            name: Counter() for name in ("task", "type", "cluster", "language", "domain")
        }
        self._about: dict[str, dict[str, Any]] = {}
        self._counts: dict[str, Counter[Any]] = defaultdict(Counter)
        self._prompt_words: dict[str, array[int]] = defaultdict(lambda: array("i"))
        self._completion_words: dict[str, array[int]] = defaultdict(lambda: array("i"))
        self._labels: dict[str, Counter[str]] = defaultdict(Counter)
        self._associations = Associations()
        self._truncated, self._truncated_rows = Counter[str](), list[dict[str, Any]]()
        self._digests: set[int] = set()

    def add(self, row: InstructionRow) -> None:
        """Measure a row."""
        self.rows += 1
        task = row["task"]
        for name, counts in self._shares.items():
            counts[str(row[name])] += 1
        if task not in self._about:
            self._about[task] = {name: row[name] for name in ("type", "cluster", "language", "domain")}
        own = self._counts[task]
        own["wording", row["wording"]] += 1
        own["shots", row["shots"]] += 1
        own["inverted"] += bool(row["inverted"])
        own["rationale"] += bool(row["rationale"])
        self._prompt_words[task].append(count_words(prompt_text(row)))
        self._completion_words[task].append(count_words(row["completion"]))
        text = f"{row['prompt']!r}\0{row['completion']}".encode("utf-8", "surrogatepass")
        self._digests.add(int.from_bytes(blake2b(text, digest_size=8).digest(), "little"))
        label = row["label"]
        if label is not None and not row["inverted"]:
            labels = self._labels[task]
            known = str(label) in labels or len(labels) < MOST_LABELS
            labels[str(label) if known else ""] += 1
            if known:
                terms = self.group_terms.get(task)
                self._associations.add(task, terms_of(row["language"], terms), row["input"], str(label))
        if self.tokens_of is not None:
            self._measure_tokens(row, self.tokens_of(row))

    def _measure_tokens(self, row: InstructionRow, tokens: int | None) -> None:
        if self.context is not None and tokens is not None and tokens > self.context:
            self._truncated[row["task"]] += 1
            if len(self._truncated_rows) < LONG_ROWS_SHOWN:
                self._truncated_rows.append({"task": row["task"], "place": row["place"], "tokens": tokens})

    def stats(self) -> dict[str, Any]:
        """Return what was measured: breadth, tasks, labels, bias, truncated."""
        every = [self._prompt_words, self._completion_words]
        prompts, completions = (array("i", (n for counts in words.values() for n in counts)) for words in every)
        breadth = {
            "rows": self.rows,
            "repeated_rows": self.rows - len(self._digests),
            **{
                f"{name}s": {
                    "count": len(counts),
                    "effective": round(effective_number(counts.values()), 2),
                    "rows": dict(counts.most_common(50)),
                }
                for name, counts in self._shares.items()
            },
            "shots": dict(sorted(self._total("shots").items())),
            "wordings": sum(len({key for key in counts if key[0] == "wording"}) for counts in self._counts.values()),
            "inverted": sum(counts["inverted"] for counts in self._counts.values()),
            "rationale": sum(counts["rationale"] for counts in self._counts.values()),
            "prompt_words": _histogram(prompts),
            "completion_words": _histogram(completions),
        }
        return {
            "breadth": breadth,
            "tasks": {task: self._task(task) for task in sorted(self._about)},
            "labels": {task: label_balance(counts) for task, counts in sorted(self._labels.items())},
            "bias": self._associations.stats(),
            "truncated": None if self.tokens_of is None else self._truncation(),
        }

    def _total(self, name: str) -> Counter[Any]:
        total = Counter[Any]()
        for counts in self._counts.values():
            for key, count in counts.items():
                if isinstance(key, tuple) and key[0] == name:
                    total[key[1]] += count
        return total

    def _task(self, task: str) -> dict[str, Any]:
        counts = self._counts[task]
        return {
            **self._about[task],
            "rows": self._shares["task"][task],
            "wordings": len([key for key in counts if key[0] == "wording"]),
            "with_shots": sum(n for key, n in counts.items() if key[0] == "shots" and key[1]),
            "inverted": counts["inverted"],
            "rationale": counts["rationale"],
            "prompt_words": quantiles(self._prompt_words[task]),
            "completion_words": quantiles(self._completion_words[task]),
        }

    def _truncation(self) -> dict[str, Any]:
        return {
            "context": self.context,
            "rows": sum(self._truncated.values()),
            "tasks": dict(self._truncated.most_common()),
            "examples": self._truncated_rows,
        }


def measure_rows(
    rows: Iterable[InstructionRow],
    group_terms: Mapping[str, GroupTerms] | None = None,
    tokens_of: Callable[[InstructionRow], int | None] | None = None,
    context: int | None = None,
) -> dict[str, Any]:
    """Measure rows, of which one at a time is in memory.

    Args:
        rows: The rows, as `RowQuality` describes them.
        group_terms: Words of groups by task. Of a task that is missing: those of its language.
        tokens_of: Returns the tokens of a row. None: truncated rows are not counted.
        context: Most tokens of a row. None: no limit.

    Returns:
        breadth, tasks, labels, bias, truncated.
    """
    quality = RowQuality(group_terms, tokens_of, context)
    for row in rows:
        quality.add(row)
    return quality.stats()


def prompt_text(row: InstructionRow) -> str:
    """Return the text of a row's prompt, of messages all of them."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def row_texts(row: InstructionRow) -> list[str]:
    """Return the texts of a row in which evaluations may leak: each message of the prompt, completion, short input.

    A long input is found in the prompt; a short one may have to be a whole text to count.
    """
    prompt = row["prompt"]
    messages = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    return [*messages, row["completion"], *([row["input"]] if len(row["input"]) <= SHORT_INPUT else [])]


def count_words(text: str) -> int:
    """Return the number of words between white space; in scripts without spaces every character is one."""
    if text.isascii():
        return len(text.split())
    spaced, characters = _UNSPACED.subn(" ", text)
    return len(spaced.split()) + characters


def effective_number(counts: Iterable[int]) -> float:
    """Return exp of the entropy of shares: the number of equally frequent kinds that would vary as much."""
    values = [n for n in counts if n]
    total = sum(values)
    return math.exp(-sum(n / total * math.log(n / total) for n in values)) if total else 0.0


def label_balance(counts: Mapping[str, int]) -> dict[str, Any]:
    """Return counts of labels, the share of the most frequent, and entropy over its highest value (1: all alike)."""
    total, kinds = sum(counts.values()), len(counts)
    return {
        "rows": total,
        "count": kinds,
        "largest": max(counts.values()) / total,
        "balance": math.log(effective_number(counts.values())) / math.log(kinds) if kinds > 1 else 0.0,
        "labels": dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))),
    }


def quantiles(values: Iterable[int]) -> dict[str, int]:
    """Return the 5%, 50% and 95% quantiles and the highest of numbers."""
    ordered = sorted(values)
    if not ordered:
        return {}
    last = len(ordered) - 1
    return {name: ordered[round(share * last)] for name, share in (("low", 0.05), ("median", 0.5), ("high", 0.95))} | {
        "longest": ordered[-1]
    }


def _histogram(words: Sequence[int]) -> dict[str, list[int]]:
    return {"edges": list(WORD_COUNT_EDGES), "counts": interval_counts(words, WORD_COUNT_EDGES)}
