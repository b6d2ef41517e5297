"""Ways to search a point with the highest score; each is a function of a score, deterministic given its values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from posttrain.core.errors import MissingExtraError
from posttrain.methods.merge.search_settings import population

Point = tuple[float, ...]
Score = Callable[[Point], float]
DECIMALS = 6
"""Decimals of the points of CMA-ES, so that a point reads as it was tried."""
STEP = 0.3
"""Standard deviation of the first population, as a share of each range."""


def grid_search(values: Sequence[Sequence[float]], score: Score) -> None:
    """Score every combination of values, the last coordinate first."""
    for point in itertools.product(*values):
        score(point)


def coordinate_search(start: Point, values: Sequence[Sequence[float]], score: Score, most: int | None) -> Point:
    """Improve one coordinate at a time until none can be improved; return the point that is left.

    Coordinate i takes the best of its values, the others as they are; of equal scores the earlier point stays. A point
    that was scored before is not counted again.

    Args:
        start: Where to begin.
        values: Values of each coordinate.
        score: The score of a point.
        most: Most points to score. None: no limit.
    """
    best, best_score = start, score(start)
    seen = {start}
    unchanged = 0
    while unchanged < len(values):
        for i, of_coordinate in enumerate(values):
            moved = False
            around = best
            for value in of_coordinate:
                point = (*around[:i], value, *around[i + 1 :])
                if most is not None and point not in seen and len(seen) >= most:
                    return best
                seen.add(point)
                if (found := score(point)) > best_score:
                    best, best_score, moved = point, found, True
            unchanged = 0 if moved else unchanged + 1
            if unchanged >= len(values):
                break
    return best


def cma_search(start: Point, ranges: Sequence[tuple[float, float]], score: Score, most: int, seed: int) -> None:
    """Score populations of CMA-ES (Hansen, arXiv 1604.00772; package cma) in a box, whole populations alone.

    Each coordinate is a share of its range; the first population is drawn around the start, with a standard deviation of
    STEP.

    Args:
        start: Where to begin; what lies outside of the box is moved to its edge.
        ranges: (low, high) of each coordinate.
        score: The score of a point.
        most: Most points to score.
        seed: Seed of the populations. They depend on nothing else that is drawn in the process.

    Raises:
        MissingExtraError: The package cma is not installed.
    """
    try:
        import cma
    except ImportError as error:
        raise MissingExtraError("search.method cma needs the package cma: pip install 'posttrain[search]'") from error
    low, high = np.array(ranges).T
    size, rng = population(len(ranges)), np.random.default_rng(seed)
    options = {
        "bounds": [0.0, 1.0], "popsize": size, "verbose": -9, "verb_log": 0, "verb_disp": 0,
        "randn": lambda *shape: rng.standard_normal(shape), "seed": float("nan"),
    }  # fmt: skip
    shares = np.clip((np.array(start) - low) / (high - low), 0.0, 1.0)
    search = cma.CMAEvolutionStrategy(shares.tolist(), STEP, options)
    for _ in range(most // size):
        if search.stop():
            break
        asked = search.ask()
        points = [tuple(np.round(low + x * (high - low), DECIMALS).tolist()) for x in asked]
        search.tell(asked, [-score(point) for point in points])
