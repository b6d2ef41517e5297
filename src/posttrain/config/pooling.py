"""Check the names of pools of distributions, and what fits together; formulas in `posttrain.losses.ensemble_logprobs`."""

from __future__ import annotations

import math
from collections.abc import Sequence

POOLS = ("arithmetic", "geometric")
CONFIDENCES = ("entropy", "max_probability")


def check_pool(weights: Sequence[float], pool: str, confidence: str | None) -> None:
    """Check how distributions are pooled.

    Args:
        weights: A weight for each model.
        pool: One of POOLS.
        confidence: One of CONFIDENCES, or None.

    Raises:
        ValueError: An unknown name, weights that are infinite or have no positive sum, or a negative weight where none can be.
    """
    for given, known in ((pool, POOLS), (confidence, (None, *CONFIDENCES))):
        if given not in known:
            raise ValueError(f"expected one of {', '.join(map(str, known))}, got {given!r}")
    if not math.isfinite(sum(weights)) or sum(weights) <= 1e-8:
        raise ValueError(f"the weights {list(weights)} of an ensemble must be finite, with a positive sum")
    if min(weights) < 0 and (pool == "arithmetic" or confidence is not None):
        raise ValueError(
            f"the weights {list(weights)} of an ensemble must not be negative: only a geometric pool without confidence "
            "can take a distribution away"
        )
