"""Show the quality of the rows that an instruction-building stage wrote: on the page, and in the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain.report.load import numbered_folders, read_json

LABELS_SHOWN = 6
ASSOCIATIONS_SHOWN = 20
SHARES = ("clusters", "languages", "domains", "types")
"""Parts of the breadth that have a table each."""


@dataclass(frozen=True)
class InstructionQualityView:
    """Hold the quality report of a stage.

    Attributes:
        stage: Name of the stage.
        quality: What was measured; parts that were not looked for are missing.
        tasks: A row of the table for each task.
        shares: (title, effective number, [(name, rows)]) of clusters, languages, domains and types.
        bars: (title, [(interval, rows)], largest number) of each histogram.
        associations: The first rows of the table of labels and groups.
        left_out: (cause, number, example) of what was left out.
        folder: The stage's data. None: there is none, because the rows were built for `posttrain inspect` alone.
    """

    stage: str
    quality: dict[str, Any]
    tasks: list[dict[str, Any]]
    shares: list[tuple[str, float, list[tuple[str, int]]]]
    bars: list[tuple[str, list[tuple[str, int]], int]]
    associations: list[dict[str, Any]]
    left_out: list[tuple[str, int, str]]
    folder: Path | None = None

    def first_rows(self, count: int) -> list[dict[str, Any]]:
        """Return the first rows that were written."""
        path = None if self.folder is None else self.folder / "rows.jsonl"
        if path is None or not path.is_file():
            return []
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in islice(lines, count)]


def instruction_qualities(run: Path, notes: list[str]) -> list[InstructionQualityView]:
    """Return a view of every finished stage that measured its rows; what can't be read is added to `notes`."""
    out = []
    for folder in numbered_folders(run / "stages"):
        stats = read_json(folder / "data" / "stats.json", notes)
        if isinstance(stats, dict) and isinstance(stats.get("quality"), dict):
            out.append(quality_view(folder.name.split("-", 1)[1], stats, folder / "data"))
    return out


def quality_view(stage: str, stats: Mapping[str, Any], folder: Path | None = None) -> InstructionQualityView:
    """Return the view of a stage's stats.json.

    Args:
        stage: Name of the stage.
        stats: The content of stats.json.
        folder: The folder with rows.jsonl, if it is there.
    """
    quality = stats["quality"]
    breadth = quality["breadth"]
    histograms = (("Words of a prompt", "prompt_words"), ("Words of an output", "completion_words"))
    bars = [(title, _bars(breadth[name])) for title, name in histograms]
    examples = stats.get("dropped_examples") or {}
    return InstructionQualityView(
        stage,
        quality,
        [_task(name, task, quality) for name, task in quality["tasks"].items()],
        [(name, breadth[name]["effective"], list(breadth[name]["rows"].items())) for name in SHARES],
        [(title, pairs, max([1, *(n for _, n in pairs)])) for title, pairs in bars],
        quality["bias"]["rows"][:ASSOCIATIONS_SHOWN],
        [(cause, n, _shown(examples.get(cause))) for cause, n in (stats.get("dropped") or {}).items()],
        folder,
    )


def _shown(examples: Any) -> str:
    first = examples[0] if isinstance(examples, list) and examples else None
    return f"{first['place']}: {first['text']}" if isinstance(first, dict) else ""


def _task(name: str, task: Mapping[str, Any], quality: Mapping[str, Any]) -> dict[str, Any]:
    labels = (quality.get("labels") or {}).get(name)
    difficulty = (quality.get("difficulty") or {}).get(name)
    return {**task, "name": name, "labels": labels and labels_in_words(labels), "balance": labels, "nll": difficulty}


def labels_in_words(labels: Mapping[str, Any]) -> str:
    """Return the most frequent labels with their shares."""
    shown = list(labels["labels"].items())[:LABELS_SHOWN]
    words = ", ".join(f"{label or '(others)'} {n / labels['rows']:.0%}" for label, n in shown)
    left = labels["count"] - len(shown)
    return words + (f" and {left} more" if left > 0 else "")


def _bars(histogram: Mapping[str, list[int]]) -> list[tuple[str, int]]:
    edges, counts = histogram["edges"], histogram["counts"]
    names = [f"{a:,} to {b - 1:,}" for a, b in zip(edges, edges[1:], strict=False)] + [f"from {edges[-1]:,}"]
    pairs = list(zip(names, counts, strict=True))
    last = max((i for i, (_, n) in enumerate(pairs) if n), default=0)
    return pairs[: last + 1]


def quality_lines(view: InstructionQualityView) -> Iterator[str]:
    """Yield the quality report in lines of text, for the terminal."""
    quality, breadth = view.quality, view.quality["breadth"]
    rows = breadth["rows"]
    shot = rows - breadth["shots"].get("0", breadth["shots"].get(0, 0))
    yield (
        f"{'rows':<11}{rows:,} of {breadth['tasks']['count']} tasks (as many as {breadth['tasks']['effective']:g} of "
        f"one size), {breadth['wordings']:,} wordings; {_share(shot, rows)} with demonstrations, "
        f"{_share(breadth['rationale'], rows)} with reasoning, {_share(breadth['inverted'], rows)} inverted"
    )
    for name, effective, counts in view.shares:
        listed = ", ".join(f"{value or '(none)'} {n:,}" for value, n in counts[:12])
        more = f" and {breadth[name]['count'] - 12} more" if breadth[name]["count"] > 12 else ""
        yield f"{name:<11}{breadth[name]['count']} ({effective:g} of one size): {listed}{more}"
    for cause, n, example in view.left_out:
        yield f"{'left out':<11}{n:,} {cause}" + (f" (for example {example[:80]})" if example else "")
    yield from _duplicate_lines(quality)
    yield from _leak_lines(quality)
    for task in view.tasks:
        yield f"{'task':<11}{task_in_words(task)}"
    yield from _bias_lines(view)
    yield f"{'truncated':<11}{truncation_in_words(quality)}"
    for title, pairs, most in view.bars:
        yield title.lower()
        width = max(len(name) for name, _ in pairs)
        yield from (f"  {name:>{width}} {n:>9,} {'█' * -(-40 * n // most)}".rstrip() for name, n in pairs)


def task_in_words(task: Mapping[str, Any]) -> str:
    """Return a line about a task: rows, lengths, labels, difficulty."""
    language = task["language"] + (f", {task['domain']}" if task["domain"] else "")
    words = f"{task['prompt_words'].get('median', 0)} + {task['completion_words'].get('median', 0)} words"
    line = f"{task['name']}: {task['rows']:,} rows ({task['cluster']}; {language}; {words})"
    if task["labels"]:
        line += f"; labels {task['labels']}"
    if (task["nll"] or {}).get("rows"):
        line += f"; {task['nll']['nll']:.2f} nats a token"
    return line


def truncation_in_words(quality: Mapping[str, Any]) -> str:
    """Return a sentence on the rows that are longer than the model's context."""
    truncated = quality.get("truncated")
    if truncated is None:
        return "not known: there is no tokenizer, or the model names no length"
    return f"{_rows(truncated['rows'], 'is', 'are')} longer than the model's {truncated['context']:,} tokens"


def _rows(count: int, one: str, several: str) -> str:
    return f"1 row {one}" if count == 1 else f"{count:,} rows {several}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "0%"


def _duplicate_lines(quality: Mapping[str, Any]) -> Iterator[str]:
    found = quality.get("duplicates")
    if found is None:
        yield f"{'duplicates':<11}not looked for (near_duplicates is null)"
        return
    yield (
        f"{'duplicates':<11}{found['near'] + found['exact']:,} of {found['texts']:,} examples nearly repeat an earlier "
        f"one of their task (Jaccard from {found['threshold']:g}); {'left out' if found['dropped'] else 'kept'}"
    )
    if found["crowded"]:
        yield f"{'':<11}{found['crowded']:,} examples have so many neighbours that not all were compared"
    for pair in found["examples"][:2]:
        yield f"{'':<11}{pair['similarity']:.2f} {pair['place']}: {pair['text'][:70]!r}, as {pair['earlier']['place']}"


def _leak_lines(quality: Mapping[str, Any]) -> Iterator[str]:
    found = quality.get("leaks")
    if found is None:
        yield f"{'leaks':<11}not looked for (leaks is null)"
        return
    for name, part in found["evaluations"].items():
        left_out = sum((found.get("examples") or {}).get(name, {}).values())
        yield (
            f"{'leaks':<11}{name}: {_rows(part['leaking_rows'], 'has', 'have')} text of {part['leaked_items']:,} of "
            f"its {part['items']:,} items{_searched(part)}"
            + (f"; {left_out:,} examples were {_fate(found)}" if left_out else "")
        )
        yield from (f"{'':<11}row {e['row'] + 1}: {e['words'][:90]!r}" for e in part["examples"][:2])
    for name, why in found["not_searched"].items():
        yield f"{'leaks':<11}{name}: not looked for: {why}"


def _searched(part: Mapping[str, Any]) -> str:
    """Return how many items were searched for, if not all were: of the others nothing is long enough to tell."""
    searched = part.get("searched", part["items"])
    return "" if searched == part["items"] else f" ({searched:,} searched for; the others are too short)"


def _fate(found: Mapping[str, Any]) -> str:
    return "left out for it" if found.get("dropped") else "found with it"


def _bias_lines(view: InstructionQualityView) -> Iterator[str]:
    bias = view.quality["bias"]
    if not bias["inputs"]:
        return
    yield (
        f"{'groups':<11}{bias['marked']} of {bias['comparisons']} associations of a label with words of a group are "
        f"marked (Holm's correction, 5%); {bias['too_few_rows']} have too few rows"
    )
    for row in [r for r in view.associations if r["marked"]][:8]:
        yield (
            f"{'':<11}{row['task']}: {row['label']} {row['rate']:.0%} of {row['mentions']:,} with {row['group']}, "
            f"{row['others_rate']:.0%} of the others; log odds {row['log_odds_ratio']:+.2f} "
            f"[{row['low']:+.2f}, {row['high']:+.2f}]"
        )
