"""A reward, a feedback and an environment of one's own; nothing heavy is imported, since processes start with it."""

from __future__ import annotations

import time
from typing import Any


def vowels(text: str, example: dict[str, Any]) -> float:
    """A reward that takes a moment."""
    time.sleep(0.002)
    return sum(c in "aeiou" for c in text) / 10


def counted(answer: str, example: dict[str, Any]) -> str:
    """Say how long an answer is."""
    return f"{len(answer)} characters"


class Counting:
    """Answers with how often it was asked."""

    def start(self, example: dict[str, Any]) -> list[str]:
        return []

    def step(self, state: list[str], text: str) -> tuple[str | None, bool]:
        state.append(text)
        return f" n°{len(state)} ", False
