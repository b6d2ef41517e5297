"""Where the time and the tokens of a reinforcement-learning stage went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PHASES = {
    "sample": "sampling",
    "reward": "rewards",
    "score": "log-probabilities before learning",
    "learn": "learning",
    "held_out": "held-out problems",
}


@dataclass(frozen=True)
class Phase:
    """A phase's seconds over all steps and their share; tokens: sampled, or learnt from, None where neither is done."""

    name: str
    seconds: float
    share: float
    tokens: int | None


def phases(timings: Sequence[dict[str, Any]]) -> list[Phase]:
    """What the records of timings.jsonl come to, in the order of a step; none where they name no phases."""
    seconds: dict[str, float] = {}
    for record in timings:
        for name, took in (record.get("phases") or {}).items():
            seconds[name] = seconds.get(name, 0.0) + float(took)
    total = sum(seconds.values())
    tokens = {
        name: sum(int(r.get(key) or 0) for r in timings)
        for name, key in (("sample", "sampled_tokens"), ("learn", "learned_tokens"))
    }
    order = [*(n for n in PHASES if n in seconds), *(n for n in seconds if n not in PHASES)]
    return [
        Phase(PHASES.get(n, n.replace("_", " ")), seconds[n], seconds[n] / total, tokens.get(n)) for n in order if total
    ]
