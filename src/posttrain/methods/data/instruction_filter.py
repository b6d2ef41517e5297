"""Why a task or an example that a model wrote is dropped, and counts of what was written."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain.data.text_similarity import interval_counts, words_of

if TYPE_CHECKING:
    from posttrain.methods.data.task_loop import WrittenTask

BLOCKED = (
    "image images graph graphs picture pictures photo photos file files map maps draw plot video videos audio music "
    "song flowchart diagram upload download click website url"
).split()
"""Words of tasks that can't be done in writing."""
EXAMPLES_KEPT = 5
"""Examples of each reason that are kept."""
CUT = "cut at the longest length"
TO_REWRITING = re.compile(r"\b(new task|given task|rewritten task|the task above)\b", re.IGNORECASE)
SIMILARITY_EDGES = tuple(i / 10 for i in range(10))
LENGTH_EDGES = (0, 5, 10, 15, 20, 30, 40, 60, 80, 100)
NO_OBJECT = frozenset(
    "a an the this that these those some any each every all of to in on for from with by and or your you me my his her "
    "its their our it them us following given two three four five one short long brief new".split()
)
"""English words between a verb and its object that are neither."""


@dataclass
class Drops:
    """Count what was dropped by reason, with some examples of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, reason: str, text: str = "", count: int = 1) -> None:
        """Count texts that were dropped for a reason.

        Args:
            reason: The reason.
            text: One of them, as an example.
            count: How many.
        """
        self.counts[reason] += count
        if text and len(self.examples[reason]) < EXAMPLES_KEPT:
            self.examples[reason].append(text[:300])

    def as_dict(self) -> dict[str, Any]:
        """Return the counts, the most frequent first, and the examples."""
        return {"dropped": dict(self.counts.most_common()), "examples": {k: v for k, v in self.examples.items() if v}}


def fault_of_instruction(text: str, blocked: Iterable[str], shortest: int, longest: int) -> str:
    """Return why a task is dropped by itself; empty if it is not.

    Args:
        text: The task.
        blocked: Words that it must not hold.
        shortest: Fewest words.
        longest: Most words.
    """
    words = words_of(text)
    if len(words) < shortest:
        return f"fewer than {shortest} words"
    if len(words) > longest:
        return f"more than {longest} words"
    if not text[0].isalnum() and text[0] not in "¿¡\"'“«(":
        return "begins with punctuation"
    found = next((w for w in blocked if w in words), None)
    if found:
        return f"the blocked word {found!r}"
    if words[:3] == ["write", "a", "program"]:
        return "asks for a program"
    if TO_REWRITING.search(text):
        return "speaks of its rewriting"
    return ""


def faults_of_instances(
    instances: Sequence[Mapping[str, str]], seeds: Iterable[tuple[str, str]], longest: int
) -> list[str]:
    """Return why each example of a task is dropped; empty for those that are kept.

    Args:
        instances: Input and output of each.
        seeds: Inputs and outputs of the seed tasks.
        longest: Most characters of an output.
    """
    outputs: dict[str, set[str]] = defaultdict(set)
    for one in instances:
        outputs[one["input"]].add(one["output"])
    copied, seen = set(seeds), set[tuple[str, str]]()
    out = []
    for one in instances:
        pair = one["input"], one["output"]
        if not one["output"]:
            why = "no output"
        elif one["output"].split() == one["input"].split():
            why = "the output repeats the input"
        elif len(outputs[one["input"]]) > 1:
            why = "several outputs for one input"
        elif pair in seen:
            why = "the same example twice"
        elif pair in copied:
            why = "copied from a seed task"
        elif len(one["output"]) > longest:
            why = f"an output of more than {longest} characters"
        else:
            why = ""
        seen.add(pair)
        out.append(why)
    return out


def verb_and_object(instruction: str) -> tuple[str, str] | None:
    """Return the first word of an English instruction and the first content word after it: its verb and object, as a
    rule. None if there is no such word."""
    words = words_of(instruction)
    rest = [w for w in words[1:] if w not in NO_OBJECT]
    return (words[0], rest[0]) if rest else None


def diversity(kept: Sequence[WrittenTask]) -> dict[str, Any]:
    """Return counts that show how different the kept tasks are: pairs of verb and object, similarity, lengths."""
    pairs = Counter(f"{p[0]} {p[1]}" for t in kept if (p := verb_and_object(t.instruction)))
    verbs = Counter(p.split()[0] for p in pairs.elements())
    return {
        "verbs": len(verbs),
        "pairs": len(pairs),
        "most_frequent_pairs": dict(pairs.most_common(20)),
        "similarity": {
            "edges": list(SIMILARITY_EDGES),
            "counts": interval_counts([t.similarity for t in kept], SIMILARITY_EDGES),
        },
        "instruction_words": {
            "edges": list(LENGTH_EDGES),
            "counts": interval_counts([len(words_of(t.instruction)) for t in kept], LENGTH_EDGES),
        },
    }
