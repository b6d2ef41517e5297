"""Write the figures of claims into a page, between `<!-- figures: FILE PLOTS -->` and `<!-- end of figures -->`.

    python benchmarks/claims/page.py docs/experiments/claims.md           # rewrites the page
    python benchmarks/claims/page.py docs/experiments/claims.md --check   # fails if it is not what the figures say

FILE is a result of a benchmark of claims (`--json`), relative to the repository; PLOTS the folder of its charts,
relative to the page. Every claim gets a heading, its verdicts, and a table with a row for each arm.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(<!-- figures: (?P<file>\S+) (?P<plots>\S+) -->\n).*?(?P<end><!-- end of figures -->)", re.DOTALL)
NOT_SHOWN = ("arms", "statement", "note", "sweeps", "verdict", "seconds")
TITLES = {"tokens_per_second": "tokens/s", "peak_memory_mb": "peak memory, MB", "trained": "trained parameters"}
"""Columns whose name in the figures is not a title."""

Leaf = tuple[tuple[str, ...], Any]


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Yield (path, value) of every number, interval and text in nested figures."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from leaves(part, (*path, str(name)))
    elif value is not None:
        yield path, value


def shown(path: tuple[str, ...], value: Any) -> str:
    """Return a figure as text: an interval as `mean [low, high]`, of one seed the figure alone."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        if path and path[-1] in ("by_seed", "made") or len(value) != 3:
            return ", ".join(shown((), v) for v in value)
        mean, low, high = (shown((), v) for v in value)
        return mean if low == "nan" else f"{mean} [{low}, {high}]"  # one seed has no interval
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown((), v)}" for name, v in value.items())
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"


def wrapped(text: str, first: str = "") -> str:
    """Return text in lines of a page; `first` begins it, and the others are indented by as much."""
    return textwrap.fill(text, 100, initial_indent=first, subsequent_indent=" " * len(first), break_long_words=False)


def of_claim(number: str, claim: Mapping[str, Any], chart: str | None) -> str:
    """Return the section of a claim.

    Args:
        number: Its number.
        claim: Its figures.
        chart: Path of its chart, from the page. None: it has none.
    """
    arms, verdict = list(claim["arms"]), claim["verdict"]
    cells: dict[str, dict[str, str]] = {}
    alone: list[str] = []
    for path, value in leaves({k: v for k, v in claim.items() if k not in NOT_SHOWN}):
        rows = [part for part in path if part in arms]
        column = ": ".join(TITLES.get(part, part.replace("_", " ")) for part in path if part not in arms)
        column = column.removesuffix(": difference")
        if path[-1] == "verdict" and isinstance(verdict, Mapping) and value in verdict.values():
            continue  # it is above the table
        if path[-1] == "by_seed" and len(value) == 1:
            continue  # it is the mean
        if rows:
            cells.setdefault(column, {})[rows[0]] = shown(path, value)
        else:
            alone.append(wrapped(f"{column}: {shown(path, value)}", "- "))
    verdicts = [f"**{verdict}**"]
    if isinstance(verdict, Mapping):
        verdicts = [wrapped(f"{name}: **{words}**", "- ") for name, words in verdict.items()]
    out = [f"### {number}. {claim['statement']}", ""]
    out += [*([wrapped(claim["note"]), ""] if claim["note"] else []), *verdicts, ""]
    if cells:
        out += ["| | " + " | ".join(cells) + " |", "|---" * (len(cells) + 1) + "|"]
        out += [f"| {arm} | " + " | ".join(column.get(arm, "") for column in cells.values()) + " |" for arm in arms]
        out.append("")
    end = [*alone, *([""] if alone else []), *([f"![chart of claim {number}]({chart})", ""] if chart else [])]
    return "\n".join([*out, *end])


def page_with_figures(path: Path) -> str:
    """Return the text of a page with its figures filled in."""

    def chart(folder: str, number: str) -> str | None:
        name = f"{folder}/claim-{number}.svg"
        return name if (path.parent / name).exists() else None

    def fill(found: re.Match[str]) -> str:
        record = json.loads((ROOT / found["file"]).read_text())
        sections = [of_claim(n, c, chart(found["plots"], n)) for n, c in record["claims"].items()]
        return found[1] + "\n" + "\n".join(sections) + "\n" + found["end"]

    return BLOCK.sub(fill, path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the figures of claims into a page.")
    parser.add_argument("page", type=Path)
    parser.add_argument("--check", action="store_true", help="fail if the page is not what the figures say")
    args = parser.parse_args()
    filled = page_with_figures(args.page)
    if args.check and filled != args.page.read_text():
        sys.exit(f"{args.page} is not what its figures say: run this without --check")
    args.page.write_text(filled)


if __name__ == "__main__":
    main()
