"""Choose chains of critique and revision for the page and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.core.errors import DataError
from posttrain.methods.data.revision_chain import Chain, drop_reason, finished_chunks, read_chains
from posttrain.report.formatting import format_number
from posttrain.report.load import numbered_folders, read_json

KEPT = 4
"""Chains on the page that gave rows."""
EACH = 2
"""Chains for each reason why a round or a chain gave nothing."""


@dataclass(frozen=True)
class ChainsView:
    """Hold a stage's chains: its statistics (empty until it is finished), and (why it is shown, chain)."""

    stage: str
    stats: dict[str, Any]
    count: int
    shown: list[tuple[str, Chain]]


def stages_with_chains(run: Path) -> list[Path]:
    """Return the folders of the stages that kept chains, in order."""
    return [p for p in numbered_folders(run / "stages") if finished_chunks(p / "chains")]


def chain_views(run: Path, notes: list[str]) -> list[ChainsView]:
    """Return a view of every stage with chains; what can't be read is added to `notes`."""
    out = []
    for folder in stages_with_chains(run):
        stage = folder.name.split("-", 1)[1]
        try:
            chains = read_chains(folder / "chains")
        except DataError as error:
            notes.append(f"chains of stage {stage} can't be read: {error}")
            continue
        out.append(
            ChainsView(
                stage, read_json(folder / "data" / "stats.json", notes) or {}, len(chains), choose_chains(chains)
            )
        )
    return out


def choose_chains(chains: Sequence[Chain]) -> list[tuple[str, Chain]]:
    """Return chains to look at, each once, with the reason: some that gave rows, some of each way not to."""
    found: dict[str, list[tuple[str, Chain]]] = {"": []}
    for c in chains:
        ended = f"ended early: {c.stopped}" if c.stopped else ""
        for why in (drop_reason(c) or ended, *(r.why for r in c.rounds if r.why)):
            group = found.setdefault(why, [])
            if len(group) < (EACH if why else KEPT):
                group.append((why or "gave a row", c))
                break
    return [shown for group in found.values() for shown in group]


def amounts(chain: Chain) -> list[tuple[str, str]]:
    """Return each reward of a chain's first and last answer, as "0 → 1"."""
    first, last = chain.initial, chain.answer
    if first.reward is None or last.reward is None:
        return []
    both = {"reward": (first.reward, last.reward)}
    both |= {name: (first.parts[name], last.parts[name]) for name in first.parts if name in last.parts}
    return [(name, f"{format_number(a, 3)} → {format_number(b, 3)}") for name, (a, b) in both.items()]
