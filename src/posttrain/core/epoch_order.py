"""The order in which rows are trained on: a fresh permutation in every epoch, with weights for the rows of sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a recipe is checked without numpy
    import numpy as np


@dataclass(frozen=True)
class RowWeights:
    """Say how often rows are drawn in an epoch, by the source that they come from.

    A row of a source with weight w is drawn floor(w) times in every epoch. For the rest of w, round((w - floor(w)) n)
    of the n rows are drawn once more, at least one: they follow a random order of all n rows, which continues in the
    next epoch, so that no row has its second turn before every row has had its first.

    Attributes:
        sources: Number of each row's source.
        weights: Weight of each source.
    """

    sources: np.ndarray
    weights: Sequence[float]

    @cached_property
    def _rows(self) -> list[np.ndarray]:
        import numpy as np

        return [np.flatnonzero(self.sources == source) for source in range(len(self.weights))]

    def _parts(self, source: int) -> tuple[int, int]:
        """Return how often all rows of a source are drawn in an epoch, and how many are drawn once more."""
        count, whole = len(self._rows[source]), int(self.weights[source])
        rest = self.weights[source] - whole
        return whole, min(count, max(1, round(rest * count))) if rest and count else 0

    @cached_property
    def size(self) -> int:
        """Return the number of rows drawn in an epoch."""
        parts = map(self._parts, range(len(self.weights)))
        return sum(whole * len(rows) + more for rows, (whole, more) in zip(self._rows, parts, strict=True))

    def draw(self, seed: int, epoch: int) -> np.ndarray:
        """Return the rows of an epoch, source by source: a row that is drawn twice is there twice."""
        import numpy as np

        drawn = []
        for source, rows in enumerate(self._rows):
            whole, more = self._parts(source)
            drawn += [rows] * whole
            at, end = epoch * more, (epoch + 1) * more
            while at < end:
                turn, first = divmod(at, len(rows))
                order = np.random.default_rng([seed, 7, source, turn]).permutation(rows)
                taken = order[first : first + end - at]
                drawn.append(taken)
                at += len(taken)
        return np.concatenate(drawn) if drawn else np.empty(0, dtype=np.int64)


def epoch_size(count: int, weights: RowWeights | None) -> int:
    """Return the number of rows drawn in an epoch, of `count` rows."""
    return count if weights is None else weights.size


def epoch_order(seed: int, epoch: int, count: int, weights: RowWeights | None = None) -> np.ndarray:
    """Return the numbers of the rows of an epoch, in the order in which they are trained on.

    Args:
        seed: Seed of all orders.
        epoch: Number of the epoch, from 0.
        count: Number of rows.
        weights: How often each is drawn. None: every row once.
    """
    import numpy as np

    rng = np.random.default_rng([seed, epoch])
    if weights is None:
        return rng.permutation(count)
    return rng.permutation(weights.draw(seed, epoch))
