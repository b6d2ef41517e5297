"""Ours beside what TRL's own code made of the same tensors (benchmarks/record_trl_preference.py wrote the file)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.losses import preference_loss as pref
from posttrain.losses.aggregation import sequence_index, sequence_sum

RECORDED = json.loads((Path(__file__).parent / "recorded_trl_preference.json").read_text(encoding="utf-8"))
DATA, CASES = RECORDED["tensors"], RECORDED["cases"]


def tokens(name: str) -> tuple[Tensor, Tensor]:
    """(log-probabilities a token, end to end, as leaves; lengths)."""
    flat = torch.tensor([x for row in DATA[name] for x in row], requires_grad=True)
    return flat, torch.tensor([len(row) for row in DATA[name]])


def sums(flat: Tensor, lengths: Tensor) -> Tensor:
    return sequence_sum(flat, sequence_index(lengths), len(lengths))


REFERENCES = {k: torch.tensor(DATA[f"reference_{k}"]) for k in ("chosen", "rejected", "mismatched")}


def flat(rows: list[list[float]]) -> list[float]:
    return [x for row in rows for x in row]


@pytest.mark.parametrize("name", ["dpo", "robust_dpo", "ipo", "dpo_norm"])
def test_with_a_reference(name: str) -> None:
    case, settings = CASES[name], CASES[name]["settings"]
    (chosen, n_chosen), (rejected, n_rejected) = tokens("chosen"), tokens("rejected")
    by_token = name in ("ipo", "dpo_norm")
    better = pref.log_ratio(sums(chosen, n_chosen), REFERENCES["chosen"], n_chosen if by_token else None)
    worse = pref.log_ratio(sums(rejected, n_rejected), REFERENCES["rejected"], n_rejected if by_token else None)
    beta, h = settings["beta"], better - worse
    if name == "robust_dpo":
        losses = pref.robust_dpo(h, beta, settings["label_smoothing"])
    else:
        losses = pref.ipo(h, beta) if name == "ipo" else pref.dpo(h, beta)
    loss = losses.sum() / len(losses)
    assert float(loss.detach()) == pytest.approx(case["loss"], rel=1e-5)
    for ours, theirs in zip(torch.autograd.grad(loss, (chosen, rejected)), ("chosen", "rejected"), strict=True):
        assert ours.tolist() == pytest.approx(flat(case[f"gradient_{theirs}"]), rel=1e-4, abs=1e-7)
    if by_token:
        return  # TRL logs rewards that are not divided by lengths there
    metrics = {k: float(v) / len(losses) for k, v in pref.pair_metrics(beta * better, beta * worse).items()}
    theirs = case["metrics"]
    assert metrics["reward_chosen"] == pytest.approx(theirs["rewards/chosen"], rel=1e-5)
    assert metrics["reward_rejected"] == pytest.approx(theirs["rewards/rejected"], rel=1e-5)
    assert metrics["margin"] == pytest.approx(theirs["rewards/margins"], rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(theirs["rewards/accuracies"], rel=1e-5)


@pytest.mark.parametrize("name", ["kto", "kto_weighted"])
def test_kto(name: str) -> None:
    case, settings = CASES[name], CASES[name]["settings"]
    given, lengths = tokens("chosen")
    mismatched = sums(*tokens("mismatched"))
    kl = pref.kl_estimate(pref.log_ratio(mismatched, REFERENCES["mismatched"]))
    assert float(kl) == pytest.approx(case["metrics"]["kl"], rel=1e-5) and float(kl) > 0.1
    ratios, desirable = pref.log_ratio(sums(given, lengths), REFERENCES["chosen"]), torch.tensor(DATA["desirable"])
    weights = settings.get("desirable_weight", 1.0), settings.get("undesirable_weight", 1.0)
    loss = pref.kto(ratios, desirable, kl, settings["beta"], *weights).mean()
    assert float(loss.detach()) == pytest.approx(case["loss"], rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, given)
    assert gradient.tolist() == pytest.approx(flat(case["gradient"]), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", ["cpo", "cpo_smoothed", "simpo", "orpo"])
def test_without_a_reference(name: str) -> None:
    case, settings = CASES[name], CASES[name]["settings"]
    by_token = name in ("simpo", "orpo")
    whole = []
    for side in ("chosen", "rejected"):
        given, lengths = tokens(side)
        summed = sums(given, lengths)
        whole.append((pref.per_token(summed, lengths) if by_token else summed).detach().requires_grad_())
    chosen, rejected = whole
    beta, h = settings["beta"], chosen - rejected
    losses = {
        "cpo": lambda: pref.dpo(h, beta),
        "cpo_smoothed": lambda: pref.dpo(h, beta, smoothing=settings["label_smoothing"]),
        "simpo": lambda: pref.simpo(h, beta, settings.get("simpo_gamma", 0.0)),
        "orpo": lambda: pref.orpo(pref.log_odds(chosen) - pref.log_odds(rejected), beta),
    }[name]()
    assert losses.tolist() == pytest.approx(case["losses"], rel=1e-5)
    for ours, theirs in zip(torch.autograd.grad(losses.sum(), whole), ("chosen", "rejected"), strict=True):
        assert ours.tolist() == pytest.approx(case[f"gradient_{theirs}"], rel=1e-4, abs=1e-7)


def test_every_recorded_case_is_compared() -> None:
    compared: dict[str, Any] = dict.fromkeys(
        ["dpo", "robust_dpo", "ipo", "dpo_norm", "kto", "kto_weighted", "cpo", "cpo_smoothed", "simpo", "orpo"]
    )
    assert RECORDED["trl"] == "1.16.0" and set(CASES) == set(compared)
