"""Chains of critique and revision, for the page and for the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.core.errors import DataError
from posttrain.methods.data.revision_chain import Chain, chunks_there, outcome, read_chains
from posttrain.report import words

KEPT = 4
"""Chains on the page that gave rows."""
EACH = 2
"""Chains for each reason why a round or a chain came to nothing."""


@dataclass(frozen=True)
class View:
    """A stage's chains. stats: its account, empty while it is not finished. shown: (why it is shown, chain)."""

    stage: str
    stats: dict[str, Any]
    count: int
    shown: list[tuple[str, Chain]]


def stages_with_chains(run: Path) -> list[Path]:
    """Folders of the stages that kept chains, in their order."""
    found = [p for p in (run / "stages").glob("*-*") if p.name.split("-")[0].isdigit() and chunks_there(p / "chains")]
    return sorted(found, key=lambda p: int(p.name.split("-")[0]))


def chain_views(run: Path, notes: list[str]) -> list[View]:
    """What the page shows of every stage with chains; what can't be read goes into the notes."""
    out = []
    for folder in stages_with_chains(run):
        stage = folder.name.split("-", 1)[1]
        try:
            chains = read_chains(folder / "chains")
            path = folder / "data" / "stats.json"
            stats = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (DataError, ValueError) as error:
            notes.append(f"chains of stage {stage} can't be read: {error}")
            continue
        out.append(View(stage, stats, len(chains), choose(chains)))
    return out


def choose(chains: Sequence[Chain]) -> list[tuple[str, Chain]]:
    """Chains to look at, each once, with why: some that gave rows, then some for each thing that went otherwise."""
    found: dict[str, list[tuple[str, Chain]]] = {"": []}
    for c in chains:
        ended = f"ended early: {c.stopped}" if c.stopped else ""
        for why in (outcome(c) or ended, *(r.why for r in c.rounds if r.why)):
            group = found.setdefault(why, [])
            if len(group) < (EACH if why else KEPT):
                group.append((why or "gave a row", c))
                break
    return [shown for group in found.values() for shown in group]


def amounts(chain: Chain) -> list[tuple[str, str]]:
    """Of a chain's first and last answer: each reward, as "0 → 1"."""
    first, last = chain.initial, chain.answer
    if first.reward is None or last.reward is None:
        return []
    both = {"reward": (first.reward, last.reward)}
    both |= {name: (first.parts[name], last.parts[name]) for name in first.parts if name in last.parts}
    return [(name, f"{words.number(a, 3)} → {words.number(b, 3)}") for name, (a, b) in both.items()]
