"""Targets on an H100, beside the figures of a run: met or not, and on which card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Target:
    """A figure: its name, the least that is wanted, whether it is a share, and how it follows from the results."""

    name: str
    least: float
    share: bool
    found: Callable[[Results], float | None]


def number(results: Results, item: str, name: str) -> float | None:
    """The number of an item that ran; None: there is none."""
    value = results.get(item, {}).get("numbers", {}).get(name)
    return float(value) if isinstance(value, int | float) else None


def best(results: Results, name: str, *items: str) -> float | None:
    """The largest of a number over items; None: no item has it."""
    return max((v for item in items if (v := number(results, item, name)) is not None), default=None)


def ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


OWN, TRL = ("speed sft 0.5B", "speed sft 0.5B, compiled"), "speed trl sft 0.5B"


def dpo(results: Results) -> float | None:
    return ratio(*(number(results, f"speed {who}dpo 0.5B", "pairs per second") for who in ("", "trl ")))


def grpo(results: Results) -> float | None:
    return ratio(*(number(results, f"speed {who}grpo 0.5B", "seconds per step") for who in ("trl ", "")))


TARGETS = [
    Target("SFT 0.5B, share of the card's matrix rate", 0.5, True, lambda r: best(r, "of the card's rate", *OWN)),
    Target("SFT 0.5B, tokens per second over TRL's best", 1.5, False,
           lambda r: ratio(best(r, "tokens per second", *OWN), number(r, TRL, "tokens per second"))),
    Target("DPO 0.5B, pairs per second over TRL's", 1.8, False, dpo),
    Target("GRPO 0.5B, TRL's step with generate over ours", 3.0, False, grpo),
    Target("decoding 1.5B, 256 sequences, share of the bandwidth", 0.6, True,
           lambda r: number(r, "speed decoding 1.5B", "of the bandwidth")),
]  # fmt: skip


def reached(results: Results) -> list[str]:
    """Return a line for each target: the figure, what is wanted, met or not, the card."""
    card = results.get("device", {}).get("numbers", {}).get("device", "a card that was not asked for its name")
    lines = [f"targets (an H100), on {card}"]
    for target in TARGETS:
        value = target.found(results)
        wanted = f"{target.least:.0%}" if target.share else f"{target.least:g} times"
        if value is None:
            lines.append(f"  {target.name:<54} not measured; wanted {wanted}")
            continue
        shown = f"{value:.1%}" if target.share else f"{value:.2f} times"
        verdict = "a CPU: says nothing" if card == "cpu" else "met" if value >= target.least else "NOT MET"
        lines.append(f"  {target.name:<54} {shown:>12}; wanted {wanted:>9}: {verdict}")
    return lines
