"""Mix tasks: how many rows of each, and which; seeded, so that a task's rows do not depend on other tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from posttrain.data.instruction_settings import MixingConfig
from posttrain.data.word_hashes import mix

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15


def mixing_rates(mixing: MixingConfig, counts: Sequence[int], weights: Sequence[float]) -> list[float]:
    """Return the share of each task; they sum to 1. A task without examples has none.

    Args:
        mixing: proportional to the number of examples e; equal; or examples-proportional, min(e, maximum) (Raffel et
            al., arXiv 1910.10683, section 3.5.2, as FLAN uses it).
        counts: Examples of each task.
        weights: Factor of each task's share.
    """
    sizes = {
        "proportional": list(counts),
        "equal": [min(1, n) for n in counts],
        "examples-proportional": [min(n, mixing.maximum) for n in counts],
    }[mixing.kind]
    parts = [size * weight for size, weight in zip(sizes, weights, strict=True)]
    total = sum(parts)
    return [part / total if total else 0.0 for part in parts]


def mixed_counts(rates: Sequence[float], available: Sequence[int], total: int | None) -> list[int]:
    """Return how many rows of each task are taken.

    A task that has fewer rows than its share gives all of them, and the others share what is left by their rates.

    Args:
        rates: Share of each task.
        available: Rows that each task can give.
        total: Rows in all. None: the most for which no task has too few.

    Returns:
        Counts; they sum to `total`, or to less if all tasks together have fewer rows.
    """
    active = [i for i, (rate, n) in enumerate(zip(rates, available, strict=True)) if rate > 0 and n > 0]
    out = [0] * len(rates)
    if not active:
        return out
    if total is None:
        scale = min(available[i] / rates[i] for i in active)
        for i in active:
            out[i] = max(1, min(available[i], int(scale * rates[i] + 1e-6)))
        return out
    left = min(total, sum(available[i] for i in active))
    while active:
        share = sum(rates[i] for i in active)
        full = [i for i in active if left * rates[i] / share >= available[i]]
        if not full:
            break
        for i in full:
            out[i] = available[i]
        left -= sum(available[i] for i in full)
        active = [i for i in active if i not in full]
    if active:
        exact = [left * rates[i] / sum(rates[j] for j in active) for i in active]
        for i, part in zip(active, exact, strict=True):
            out[i] = int(part)
        # the largest remainders get the rows that rounding down left over
        order = sorted(range(len(active)), key=lambda j: (int(exact[j]) - exact[j], j))
        for j in order[: left - sum(int(part) for part in exact)]:
            out[active[j]] += 1
    return out


def task_seed(seed: int, task: str, purpose: str) -> int:
    """Return the seed of everything random in a task for one purpose.

    Args:
        seed: The seed of the build.
        task: Name of the task.
        purpose: What is drawn, so that one draw does not tell another.
    """
    text = f"{seed}\0{task}\0{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def ranks(pair_keys: np.ndarray, seed: int) -> np.ndarray:
    """Return a random number of each example, by its texts and the seed: splitmix64 of both."""
    return mix((pair_keys ^ np.uint64(seed)) + np.uint64(_STEP))


class Draws:
    """Draw random numbers from a key of 64 bits (splitmix64); made for each row, where random.Random is slow."""

    __slots__ = ("_state",)

    def __init__(self, key: int) -> None:
        self._state = key & _MASK

    def _next(self) -> int:
        self._state = (self._state + _STEP) & _MASK
        x = self._state
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        return x ^ (x >> 31)

    def uniform(self) -> float:
        """Return a number in [0, 1)."""
        return (self._next() >> 11) / 9007199254740992.0  # 2**53

    def below(self, count: int) -> int:
        """Return a whole number in [0, count)."""
        return self._next() * count >> 64

    def several(self, count: int, most: int) -> Iterator[int]:
        """Yield at most `most` different numbers in [0, count), in random order."""
        if count <= 2 * most:
            pool = list(range(count))
            for i in range(min(most, count)):
                j = i + self.below(count - i)
                pool[i], pool[j] = pool[j], pool[i]
                yield pool[i]
            return
        found = set[int]()
        while len(found) < most:
            drawn = self.below(count)
            if drawn not in found:
                found.add(drawn)
                yield drawn
