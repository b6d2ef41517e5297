"""The claim that step-wise rewards lower the variance of the gradient: measured on the gradient, not on the curve.

    python benchmarks/claims/gradient_variance.py --json figures.json

At two places of a run of the recipe `lab` (the base model, and after some steps) many batches of rollouts are sampled
from one policy, and the gradient of each batch is computed with several rewards on the same rollouts. Reported for each
reward: noise over signal, E|g - Eg|^2 / |Eg|^2, that is the number of batches whose mean has as much signal as noise;
and the cosine between the mean gradient and that of the right-or-wrong reward. |Eg|^2 is estimated without the part of
the noise in it. A seed is another laboratory. A quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from arms import fewer, interval, machine

import posttrain
from posttrain.config.rl import RLConfig
from posttrain.core.files import write_json
from posttrain.core.types import RolloutGroup
from posttrain.data.prompts import load_prompts
from posttrain.methods.rl.collect_rollouts import PromptGroup
from posttrain.methods.rl.compute_advantages import compute_advantages
from posttrain.methods.rl.rl_loss import Extremes, TrainingBatch, policy_gradient_loss
from posttrain.methods.rl.sequence_logprobs import compute_logprobs, training_sequences
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_model
from posttrain.recipe.parsing import load_recipe
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request

RIGHT = "{kind: exact, name: right, extract: last_line}"
STEPS = "{kind: valid_steps, name: steps, weight: %s}"
REWARDS = {
    "right or wrong": f"[{RIGHT}]",
    "with steps at half weight": f"[{RIGHT}, {STEPS % 0.5}]",
    "steps alone": f"[{STEPS % 1}]",
}
TRAINED = 10
"""Steps of the recipe before the second place."""


def gradient(policy: LanguageModel, config: RLConfig, groups: Sequence[RolloutGroup], questions: Any) -> torch.Tensor:
    """Return the gradient of a batch, as one vector.

    Args:
        policy: The model that sampled.
        config: The stage's settings, with the rewards.
        groups: The rollouts, one group for each prompt.
        questions: The prompts.
    """
    with RewardStack(config.rewards) as rewards:
        scored = rewards(groups).groups
    placed = [PromptGroup(i, 0, tuple(g.rollouts), len(g.rollouts)) for i, g in enumerate(scored)]
    sequences = training_sequences(placed, questions, 0)
    logprobs = compute_logprobs(config, sequences, policy)
    batch = TrainingBatch(config, len(groups), sequences, logprobs, compute_advantages(config, sequences, logprobs))
    samples = batch.samples()
    policy.zero_grad(set_to_none=True)
    if samples:
        count = math.fsum(sum(s.weights) for s in samples)
        policy_gradient_loss(batch, True, Extremes())(policy, policy.pack(samples), count)[0].backward()
    parts = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in policy.parameters()]
    return torch.cat(parts).double()


def measured(source: str, batches: int, seed: int) -> dict[str, dict[str, float]]:
    """Return noise over signal, and the cosine with the right-or-wrong reward, of each reward."""
    recipes = {n: load_recipe("lab", [f"model.source={source}", f"stages.rl.rewards={r}"]) for n, r in REWARDS.items()}
    configs: dict[str, Any] = {name: recipe.stages[0] for name, recipe in recipes.items()}
    first = configs["right or wrong"]
    hf, tokenizer = load_model(recipes["right or wrong"].model)
    policy = LanguageModel(hf).train()
    sampler = LocalSampler(policy, tokenizer)
    prompts = load_prompts(first.problems, tokenizer, context=None).items
    found: dict[str, list[torch.Tensor]] = {name: [] for name in REWARDS}
    for b in range(batches):
        drawn = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(1000 * seed + b))
        asked = [prompts[i] for i in drawn[: first.prompts_per_step].tolist()]
        seeds = range(b * len(asked), (b + 1) * len(asked))
        requests = [Request(q.tokens, first.group_size, s, q.problem) for q, s in zip(asked, seeds, strict=True)]
        policy.eval()
        with torch.no_grad():
            groups = sampler.sample(requests, first.sampler)
        policy.train()
        for name, config in configs.items():
            found[name].append(gradient(policy, config, groups, asked))
    return {name: against(torch.stack(of), torch.stack(found["right or wrong"])) for name, of in found.items()}


def against(gradients_BP: torch.Tensor, right_BP: torch.Tensor) -> dict[str, float]:
    """Return noise over signal, and the cosine of the means.

    The squared norm of the mean of B gradients is |Eg|^2 plus a B-th of the noise, which is subtracted; so is the
    covariance of the two, over B, from the product of the means. A signal that is not above 0 gives inf and nan.
    """
    count = len(gradients_BP)

    def product(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
        means = a.mean(0), b.mean(0)
        noise = float(((a - means[0]) * (b - means[1])).sum() / (count - 1))
        return float(means[0] @ means[1]) - noise / count, noise

    signal, noise = product(gradients_BP, gradients_BP)
    of_right, _ = product(right_BP, right_BP)
    both, _ = product(gradients_BP, right_BP)
    if signal <= 0 or of_right <= 0:
        return {"noise_over_signal": math.inf, "cosine": math.nan}
    return {"noise_over_signal": noise / signal, "cosine": both / math.sqrt(signal * of_right)}


def trained(seed: int, steps: int, work: Path) -> str:
    """Run the recipe for some steps, and return the folder of the model."""
    overrides = [f"model.source=lab:{seed}", f"seed={seed}", f"stages.rl.steps={steps}", "stages.rl.held_out=null"]
    folder = work / f"lab-{seed}"
    posttrain.run(load_recipe("lab", [*overrides, "evaluate=[]"]), folder)
    return str(folder / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description="The variance of the gradient with and without step-wise rewards.")
    parser.add_argument("--seeds", default="0,1,2", help="laboratories (0,1,2)")
    parser.add_argument("--batches", type=int, default=96, help="batches at each place (96)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    seeds = [int(n) for n in args.seeds.split(",")]
    places: dict[str, list[dict[str, dict[str, float]]]] = {"base model": [], f"after {TRAINED} steps": []}
    with tempfile.TemporaryDirectory() as work:
        for seed in seeds:
            for place, source in zip(places, (f"lab:{seed}", trained(seed, TRAINED, Path(work))), strict=True):
                places[place].append(measured(source, args.batches, seed))
                print(place, seed, json.dumps(places[place][-1]), flush=True)
    out: dict[str, Any] = {}
    for place, runs in places.items():
        noise = {name: [run[name]["noise_over_signal"] for run in runs] for name in REWARDS}
        plain = noise["right or wrong"]
        out[place] = {
            "noise_over_signal": {name: interval(of) for name, of in noise.items()},
            "cosine_with_right": {name: interval([run[name]["cosine"] for run in runs]) for name in REWARDS},
            "times_less": {name: fewer(of, plain) for name, of in noise.items() if of is not plain},
        }
        print(place, {name: f["verdict"] for name, f in out[place]["times_less"].items()})
    if args.json:
        claim = {
            "statement": "Step-wise rewards lower the variance of the gradient",
            "note": f"Laboratory, {args.batches} batches of the recipe `lab` at each place, each with every reward. "
            "Noise over signal: the number of batches whose mean has as much signal as noise. The cosine is that of "
            "the mean gradients.",
            "arms": {name: {"reward": reward} for name, reward in REWARDS.items()},
            "verdict": {f"{p}, {n}": f["verdict"] for p, of in out.items() for n, f in of["times_less"].items()},
            **out,
        }
        head = {"posttrain": posttrain.__version__, "machine": machine(), "seeds": seeds}
        write_json(args.json, {**head, "claims": {"11": claim}})


if __name__ == "__main__":
    main()
