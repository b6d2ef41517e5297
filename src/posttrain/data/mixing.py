"""Weights of sources: how often their rows are trained on in an epoch."""

from __future__ import annotations

from typing import Any

import numpy as np

from posttrain.config import DataConfig
from posttrain.core.epoch_order import RowWeights
from posttrain.core.errors import DataError
from posttrain.data.sample_store import SampleStore


def row_weights(data: Any) -> RowWeights | None:
    """Return how often each row of prepared data is drawn in an epoch; None: each once.

    Args:
        data: Prepared rows with their statistics (`PreparedItems`).
    """
    sources = data.stats.get("sources") or []
    weights = [float(source.get("weight", 1.0)) for source in sources]
    if all(weight == 1 for weight in weights):
        return None
    samples = getattr(data, "samples", None)
    if isinstance(samples, SampleStore):
        per_item = max(1, len(samples) // max(1, len(data)))
        return RowWeights(np.asarray(samples.columns["part"][::per_item]), weights)
    number = {source["source"]: i for i, source in enumerate(sources)}
    places = (data.place(i).rpartition(":")[0] for i in range(len(data)))
    return RowWeights(np.array([number[place] for place in places], dtype=np.int64), weights)


def refuse_weights(config: DataConfig, what: str) -> None:
    """Raise DataError if a source has a weight where rows are not trained on in epochs; `what` says where."""
    for entry in config.sources():
        if entry.weight != 1:
            raise DataError(
                f"{what}: {entry.source} has weight {entry.weight:g}, and weights are for rows that are trained on in "
                "epochs. Leave it out, or limit the source with max_rows"
            )
