"""Merges of random tensors against what mergekit made of them (benchmarks/record_mergekit.py)."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.methods.merge.averages import karcher_mean, model_stock, multi_slerp, slerp, weighted_mean
from posttrain.methods.merge.task_vectors import (
    combine,
    della_probabilities,
    drop_outliers,
    keep_largest,
)

RECORDED = json.loads((Path(__file__).parent / "recorded_mergekit.json").read_text())
MATRIX = "model.layers.0.mlp.down_proj.weight"
AVERAGES = {
    "linear": lambda case, base, x, w: weighted_mean(x, w, case.get("normalize", True)),
    "slerp": lambda case, base, x, w: slerp(x[0], x[1], case["t"]),
    "multislerp": lambda case, base, x, w: multi_slerp(x, w),
    "karcher": lambda case, base, x, w: karcher_mean(x, w),
    "model_stock": lambda case, base, x, w: model_stock(base, x, case.get("filter_wise", False)),
}


def thinned(case: dict[str, Any], delta: Tensor, number: int) -> Tensor:
    """Thin out one task vector; random masks are those that mergekit drew."""
    method, density = case["method"], case.get("density", [1, 1, 1])[number]
    if method == "ties":
        return keep_largest(delta, density)
    if method.startswith("breadcrumbs"):
        return drop_outliers(delta, density, case["gamma"])
    if method == "task_arithmetic":
        return delta
    draw = case["draws"][number]
    probabilities = torch.tensor(draw["probabilities"])
    if method.startswith("della"):
        expected = partial(della_probabilities, delta, density, case["epsilon"])
        torch.testing.assert_close(expected(), probabilities, atol=1e-6, rtol=0)
    kept = delta * torch.tensor(draw["mask"])
    if case.get("rescale", True):  # to the sum of sizes that was, where the papers divide by the probability
        kept = kept * (delta.abs().sum() / kept.abs().sum())
    return kept


@pytest.mark.parametrize("name", sorted(RECORDED["cases"]))
def test_the_same_as_mergekit(name: str) -> None:
    case = RECORDED["cases"][name]
    for tensor, values in case["result"].items():
        base, *models = [torch.tensor(source[tensor]) for source in RECORDED["sources"]]
        weights = case.get("weight", [1.0] * len(models))
        if case["method"] in AVERAGES:
            found = AVERAGES[case["method"]](case, base, models, weights)
        elif case["draws"] and tensor != MATRIX:
            continue
        else:
            deltas = [thinned(case, model - base, i) for i, model in enumerate(models)]
            signs = case["method"] in ("ties", "dare_ties", "della", "breadcrumbs_ties")
            divided = case.get("normalize", case["method"] in ("ties", "della"))
            found = base + case.get("lambda", 1.0) * combine(deltas, weights, signs, divided)
        torch.testing.assert_close(found, torch.tensor(values), atol=1e-6, rtol=0)
