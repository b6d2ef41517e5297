"""Rewards that misbehave, for worker processes to find by import path."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def good(text: str, example: Mapping[str, Any], scale: float = 1.0) -> float:
    return scale * len(text)


def waiting(text: str, example: Mapping[str, Any]) -> float:
    while "wait" in text:
        pass
    return float(text == example["answer"])


def strange(text: str, example: Mapping[str, Any]) -> Any:
    """Does what the text says."""
    if text == "spin":
        while True:
            try:
                while True:
                    pass
            except BaseException:  # as careless code does: nothing it catches may save it
                pass
    if text == "sleep":
        time.sleep(1000)
    if text == "raise":
        raise KeyError("this one raises")
    if text == "exit":
        sys.exit(3)
    if text == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "memory":
        return len(bytearray(1 << 40))
    if text == "print":
        print("noise " * 10_000)
        sys.stdout.flush()
        assert sys.stdin.read() == ""
    answers: dict[str, Any] = {"nan": float("nan"), "inf": -float("inf"), "none": None, "text": "0.5", "list": [1.0]}
    if text == "big":
        return 10**400
    return answers.get(text, 1.0)


def killed_once(text: str, example: Mapping[str, Any]) -> float:
    """Kills its own process the first time: as an out-of-memory killer might."""
    mark = Path(example["mark"])
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 7.0


def draws(text: str, example: Mapping[str, Any]) -> float:
    """Depends on the random state and on the order of a set of strings: what must not differ between workers."""
    return random.random() + next(i for i, s in enumerate({"a", "b", "c", "d", "e", "f"}) if s == "d")


def ranks(texts: Sequence[str], example: Mapping[str, Any]) -> list[Any]:
    """A group reward: nonsense for one member where it says so, one number too few where asked."""
    out: list[Any] = [float(sorted(texts).index(t)) if t != "none" else None for t in texts]
    return out[:-1] if example.get("short") else out


def killed_actor_once(text: str, example: Mapping[str, Any]) -> float:
    """Kills the process that its own belongs to the first time, if that is an actor."""
    mark = Path(example["mark"])
    if not mark.exists():
        mark.touch()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(20)
    return 7.0
