"""Ours beside what TRL's own code made of the same tensors (benchmarks/record_trl_losses.py wrote the file).

Value, gradient in every log-probability, advantages and metrics; the tensors are read from the file, so neither TRL nor
a random number is needed here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.losses import advantages, kl
from posttrain.losses import policy_loss as policy
from posttrain.losses.aggregation import Aggregation, denominator, reduce, sequence_index, token_weights

RECORDED = json.loads((Path(__file__).parent / "recorded_trl.json").read_text(encoding="utf-8"))
DATA = RECORDED["tensors"]
LENGTHS = torch.tensor(DATA["lengths"])
GROUP = torch.tensor(DATA["group"])
REWARDS = torch.tensor(DATA["rewards"])
SEQUENCE = sequence_index(LENGTHS)


def flat(rows: list[list[float]]) -> Tensor:
    return torch.tensor([x for row in rows for x in row])


OLD, REFERENCE, SAMPLER = flat(DATA["old"]), flat(DATA["reference"]), flat(DATA["sampler"])

# Case: aggregation. Everything else is in the settings that were recorded.
AGGREGATION: dict[str, Aggregation] = {"grpo": "sequence", "dr_grpo": "constant", "dapo": "token", "cispo": "token"}


def our_advantages(name: str, settings: dict[str, Any]) -> Tensor:
    if name.startswith("rloo"):
        rewards = kl.penalised_rewards(REWARDS, kl.kl(OLD, REFERENCE, "k1"), settings["beta"], SEQUENCE)
        return advantages.leave_one_out(rewards, GROUP)
    return advantages.group_relative(REWARDS, GROUP, settings.get("scale_rewards", "group"))


def our_loss(name: str, settings: dict[str, Any], new: Tensor, advantages_R: Tensor) -> tuple[Tensor, policy.Metrics]:
    """As the table at the head of policy.py puts each method together."""
    kind = AGGREGATION[settings.get("loss_type", "grpo")]
    advantages_N, low = advantages_R[SEQUENCE], settings.get("epsilon", 0.2)
    high = settings.get("epsilon_high", low)
    sequence_level = name.startswith("rloo") or settings.get("importance_sampling_level") == "sequence"
    if sequence_level:
        ratio = policy.sequence_ratio(new, OLD, SEQUENCE, LENGTHS, mean=not name.startswith("rloo"))
    else:
        ratio = policy.token_ratio(new, OLD)
    if name == "cispo":
        loss, metrics = policy.cispo(ratio, new, advantages_N, high)
    else:
        loss, metrics = policy.clipped(ratio, advantages_N, low, high, settings.get("delta"))
    if "importance" in settings:
        per_sequence = (SEQUENCE, LENGTHS) if settings["importance"].startswith("sequence") else (None, None)
        weights, _ = policy.truncated_importance(OLD, SAMPLER, 1.3, *per_sequence)
        loss = loss * weights
    if settings.get("beta") and not name.startswith("rloo"):
        divergence = kl.kl(new, REFERENCE, "k3")
        loss = loss + settings["beta"] * (ratio * divergence if settings.get("use_bias_correction_kl") else divergence)
    weights = token_weights(kind, SEQUENCE, LENGTHS, DATA["longest"])
    return reduce(loss, weights, denominator(kind, LENGTHS)), metrics


@pytest.mark.parametrize("name", sorted(RECORDED["cases"]))
def test_loss_gradient_and_advantages_are_those_of_trl(name: str) -> None:
    case = RECORDED["cases"][name]
    advantages_R = our_advantages(name, case["settings"])
    assert advantages_R.tolist() == pytest.approx(case["advantages"], abs=2e-6)
    new = flat(DATA["new"]).requires_grad_()
    loss, _ = our_loss(name, case["settings"], new, advantages_R)
    (gradient,) = torch.autograd.grad(loss, new)
    assert loss.item() == pytest.approx(case["loss"], abs=2e-6)
    torch.testing.assert_close(gradient, flat(case["gradient"]), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "grpo_two_sided"])
def test_clipped_fractions_are_those_of_trl(name: str) -> None:
    """TRL's two-sided clip comes before its count, which it can't change: 1.5 is above 1.2."""
    case = RECORDED["cases"][name]
    _, metrics = our_loss(name, case["settings"], flat(DATA["new"]), our_advantages(name, case["settings"]))
    for ours, theirs in (("clip_low", "low_mean"), ("clip_high", "high_mean"), ("clip_fraction", "region_mean")):
        recorded = case["metrics"][f"clip_ratio/{theirs}"]
        assert recorded > 0, "a case in which nothing is clipped tests nothing"
        assert float(metrics[ours]) / len(SEQUENCE) == pytest.approx(recorded, abs=1e-6)


@pytest.mark.parametrize("name", ["importance_token", "importance_sequence"])
def test_importance_weights_and_mismatch_are_those_of_trl(name: str) -> None:
    case = RECORDED["cases"][name]
    per_sequence = (SEQUENCE, LENGTHS) if name == "importance_sequence" else (None, None)
    weights, metrics = policy.truncated_importance(OLD, SAMPLER, 1.3, *per_sequence)
    torch.testing.assert_close(weights, flat(case["importance"]), atol=1e-6, rtol=1e-5)
    assert 0 < int(metrics["importance_truncated"]) < len(SEQUENCE)
    recorded = case["metrics"]["sampling/sampling_logp_difference/mean"]
    assert float(metrics["mismatch"]) / len(SEQUENCE) == pytest.approx(recorded, abs=1e-6)


def test_kl_is_that_of_trl() -> None:
    ours = float(kl.kl(flat(DATA["new"]), REFERENCE, "k3").mean())
    assert ours == pytest.approx(RECORDED["cases"]["grpo_kl"]["metrics"]["kl"], abs=1e-6)
    ours = float(kl.kl(OLD, REFERENCE, "k1").mean())
    assert ours == pytest.approx(RECORDED["cases"]["rloo_kl"]["metrics"]["kl"], abs=1e-6)


def test_the_file_covers_the_methods_and_tells_them_apart() -> None:
    cases = RECORDED["cases"]
    assert RECORDED["trl"] == "1.16.0"
    assert {"grpo", "dapo", "dr_grpo", "gspo", "cispo", "rloo"} <= set(cases)
    assert len({round(c["loss"], 5) for c in cases.values()}) == len(cases), "two settings gave one loss"
    assert any(not any(row) for row in cases["grpo"]["gradient"]), "no group without signal"
