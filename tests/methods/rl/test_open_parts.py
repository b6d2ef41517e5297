"""Advantages, policy losses and KL estimators from outside the package: named in a recipe, settings checked, used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from posttrain.config.names import ADVANTAGES, KL_ESTIMATORS, POLICY_LOSSES
from posttrain.core.errors import RecipeError
from posttrain.core.progress import Track
from posttrain.methods.rl.compute_advantages import AdvantageInputs
from posttrain.methods.rl.policy_losses import PolicyLossInputs
from tests.methods.rl.cases import fill_advantages
from tests.methods.rl.test_policy_gradient import batch_of, model, settings, work

HERE = "tests.methods.rl.test_open_parts"


def centred(batch: AdvantageInputs, *, scale: float = 1.0) -> Tensor:
    return batch.to_tokens(scale * (batch.rewards_R - batch.rewards_R.mean()))


def by_completion(batch: AdvantageInputs) -> Tensor:
    return batch.rewards_R


def halved(batch: PolicyLossInputs, *, factor: float = 0.5) -> tuple[Tensor, dict[str, Tensor]]:
    return -factor * batch.ratio_N * batch.advantages_N, {"halved": torch.ones_like(batch.ratio_N).sum()}


def absolute(logprobs_N: Tensor, reference_logprobs_N: Tensor, *, factor: float = 1.0) -> Tensor:
    return factor * (logprobs_N - reference_logprobs_N).abs()


def test_an_advantage_of_ones_own() -> None:
    config = settings("grpo", advantages={"name": f"{HERE}:centred", "scale": 2.0})
    cases = batch_of()
    fill_advantages(config, cases)
    mean = sum(c.rollout.reward for c in cases) / len(cases)
    for c in cases:
        assert c.advantages.tolist() == pytest.approx([2 * (c.rollout.reward - mean)] * c.length)
    again = type(config).model_validate(config.model_dump(mode="json"))
    assert again == config and again.advantages.settings == {"scale": 2.0}


def test_advantages_of_completions_are_refused_where_tokens_are_expected() -> None:
    with pytest.raises(RecipeError, match=r"by_completion returned shape \(12,\).* return batch.to_tokens"):
        fill_advantages(settings("grpo", advantages=f"{HERE}:by_completion"), batch_of())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantages": {"name": f"{HERE}:centred", "scael": 2.0}}, "scael"),
        ({"advantages": f"{HERE}:nothing"}, "there is no 'nothing'"),
        ({"policy_loss": "cliped"}, "no policy loss is called 'cliped'. Did you mean clipped?"),
        ({"policy_loss": {"name": f"{HERE}:halved", "factor": "much"}}, "factor"),
        ({"kl": {"coefficient": 0.1, "estimator": "k4"}}, "no KL estimator is called 'k4'"),
        ({"method": "gpro"}, "no RL method is called 'gpro'. Did you mean gspo or grpo?"),
    ],
)
def test_what_can_t_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        settings(**{"method": "grpo", **changes})


def test_a_policy_loss_and_an_estimator_of_ones_own_in_a_step(tmp_path: Path) -> None:
    kl = {"coefficient": 0.1, "estimator": {"name": f"{HERE}:absolute", "factor": 3.0}}
    config = settings("grpo", policy_loss={"name": f"{HERE}:halved", "factor": 0.25}, kl=kl, mini_batches=2)
    trainer = work(config, tmp_path)
    trainer.reference = model(1)
    metrics = trainer.step(0, Track("t", 1, shown=False)).metrics
    assert metrics["halved"] == pytest.approx(1.0) and "clip_fraction" not in metrics and metrics["ratio_max"] >= 1
    plain = settings("grpo", policy_loss="reinforce", mini_batches=2)
    assert plain.ratio == "token" and plain.loss_aggregation == "seq-mean-token-mean"


def test_every_name_can_be_loaded() -> None:
    for names, key in ((ADVANTAGES, "advantages"), (POLICY_LOSSES, "policy_loss")):
        for name in names:
            needs = {"gae": {"critic": {}}, "remax": {"greedy_baseline": True}}.get(name, {})
            assert callable(getattr(settings("dapo", **{key: name}, **needs), key).load(names))
    for name in KL_ESTIMATORS:
        assert callable(settings("grpo", kl={"coefficient": 0.1, "estimator": name}).kl.estimator.load(KL_ESTIMATORS))
