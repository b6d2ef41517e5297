"""The policy-gradient methods: what each is a choice of, and the loss that the learner is given.

The formulas are in `posttrain.losses`; docs/policy-gradients.md says where they come from.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from posttrain.config import RLConfig
from posttrain.core.ragged import RaggedBatch
from posttrain.core.types import Piece, Rollout, Sample
from posttrain.losses import advantages as adv
from posttrain.losses import policy_loss as policy
from posttrain.losses.aggregation import Aggregation, denominator, reduce, sequence_index, token_weights
from posttrain.losses.kl import kl, penalised_rewards, token_rewards
from posttrain.losses.process_advantages import Relative, at_last_tokens, from_steps_on, relative_steps
from posttrain.models.language_model import LanguageModel
from posttrain.trainer.train_step import LossFunction


@dataclass(frozen=True)
class Method:
    """A row of the table in `functional.policy`. low, high: the clip where the recipe gives none."""

    advantages: Literal["group", "centred", "leave_one_out", "moving", "whitened", "baseline", "greedy", "critic"]
    loss: Literal["clipped", "reinforce", "cispo"]
    ratio: Literal["token", "sequence_mean", "sequence"]
    aggregation: Aggregation
    low: float = 0.2
    high: float = 0.2


METHODS = {
    "grpo": Method("group", "clipped", "token", "sequence"),
    "dr_grpo": Method("centred", "clipped", "token", "constant"),
    "dapo": Method("group", "clipped", "token", "token", 0.2, 0.28),
    "gspo": Method("group", "clipped", "sequence_mean", "sequence", 3e-4, 4e-4),
    "cispo": Method("group", "cispo", "token", "token", 1.0, 4.0),
    "rloo": Method("leave_one_out", "reinforce", "sequence", "constant"),
    "reinforce": Method("moving", "reinforce", "sequence", "constant"),
    "remax": Method("greedy", "reinforce", "sequence", "constant"),
    "reinforce_pp": Method("whitened", "clipped", "token", "token"),
    "reinforce_pp_baseline": Method("baseline", "clipped", "token", "token"),
    "ppo": Method("critic", "clipped", "token", "token"),
}
"""CISPO's clips bound the weight itself: 1 - low (0: no lower bound) and 1 + high."""

STEPS: dict[str, Relative] = {
    "group": "group",
    "centred": "centred",
    "baseline": "centred",
    "leave_one_out": "leave_one_out",
    "moving": "batch",
    "greedy": "batch",
}
"""By kind of advantage, what a step's score is compared with. The others take it as a reward at its last token."""


@dataclass
class Rolled:
    """A rollout on its way to the learner. Tensors have one number for each token that the model wrote, on the CPU:
    what an environment put in between is context, and no part of any loss, ratio, mean or count.

    group: its prompt's number in the batch. old: log-probabilities before the batch's first update (None: they are
    the learner's own, on the first and only update). reference: of the model that the stage began with. values: of the
    critic. signal: whether there is anything to learn from it. age: steps since its first token was sampled. replayed:
    it is there a second time, in place of a success that its group lacks.
    """

    prompt: Sequence[int]
    rollout: Rollout
    group: int
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))
    old: Tensor | None = None
    reference: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    signal: bool = True
    age: int = 0
    replayed: bool = False

    @property
    def length(self) -> int:
        """Tokens that the model wrote."""
        return self.rollout.length

    def sample(self, number: int) -> Sample:
        """As the learner takes it; no weight where there is nothing to learn."""
        weight = 1.0 if self.signal else 0.0
        tokens = [*self.prompt, *self.rollout.tokens]
        mask = self.rollout.mask or [True] * len(self.rollout.tokens)
        weights = [0.0] * len(self.prompt) + [weight if mine else 0.0 for mine in mask]
        return Sample(tokens, weights, meta={"rolled": number, "group": self.group, "shared": len(self.prompt)})

    def targets(self, row: Tensor) -> Tensor:
        """T-indices of the tokens that the model wrote, of `row`: those of the whole sample."""
        own = row[len(self.prompt) :]
        mask = self.rollout.mask
        return own if mask is None else own[torch.tensor(mask, dtype=torch.bool, device=row.device)]

    def sampled(self) -> Tensor:
        """The sampler's log-probabilities of the tokens that the model wrote."""
        return torch.tensor([self.rollout.logprobs[i] for i in self.rollout.own], dtype=torch.float32)


def sampled_logprobs(rolled: Sequence[Rolled]) -> list[Tensor]:
    return [r.sampled() for r in rolled]


def outcome(config: RLConfig, rollout: Rollout) -> float:
    """The weighted sum of the rewards that judge the whole completion: without those that judge its steps."""
    if not rollout.steps:
        return rollout.reward
    judged = (p for p in config.rewards.terms if p.title not in rollout.steps)
    return sum((p.weight * rollout.rewards[p.title] for p in judged), 0.0)


def mixed(rollouts: Sequence[Rollout]) -> bool:
    """Whether a group has something to teach: rewards, or scores of steps, that differ."""
    names = {name for r in rollouts for name in r.steps}
    scores = [{score for r in rollouts for _, _, score in r.steps.get(name, ())} for name in names]
    return any(len(different) > 1 for different in ({r.reward for r in rollouts}, *scores))


def step_scores(config: RLConfig, rolled: Sequence[Rolled]) -> list[tuple[float, Tensor, Tensor, Tensor]]:
    """By reward that judges steps: (weight, scores_K, last_K, completion_K), over all rollouts laid end to end.

    A step counts if the model wrote some of it, and ends with the last token of it that the model wrote.
    """
    found: list[tuple[float, Tensor, Tensor, Tensor]] = []
    for part in config.rewards.terms:
        scores, last, completion, start = [], [], [], 0
        for i, r in enumerate(rolled):
            own = r.rollout.own
            for first, end, score in r.rollout.steps.get(part.title, ()):
                at = bisect_left(own, end) - 1
                if at >= bisect_left(own, first):
                    scores.append(score)
                    last.append(start + at)
                    completion.append(i)
            start += len(own)
        if scores and part.weight:
            places = torch.tensor(last), torch.tensor(completion)
            found.append((part.weight, torch.tensor(scores, dtype=torch.float64), *places))
    return found


def temperatures(config: RLConfig, rolled: Sequence[Rolled], device: torch.device) -> float | Tensor:
    """What divides the logits of the rollouts' tokens, as when sampled; one number where all have the same."""
    pieces = [r.rollout.pieces or [Piece(len(r.rollout.tokens), 0, config.sampler.temperature)] for r in rolled]
    different = {p.temperature for of in pieces for p in of}
    if len(different) == 1:
        return different.pop()
    values = []
    for r, of in zip(rolled, pieces, strict=True):
        each = [p.temperature for p in of for _ in range(p.tokens)]
        values += [each[i] for i in r.rollout.own]
    return torch.tensor(values, dtype=torch.float32, device=device)


def even_out(rolled: Sequence[Rolled]) -> None:
    """Groups of different sizes count the same: advantages times mean size / size of the group."""
    sizes = Counter(r.group for r in rolled)
    mean = len(rolled) / max(1, len(sizes))
    for r in rolled:
        r.advantages = r.advantages * (mean / sizes[r.group])


def give_advantages(
    config: RLConfig, rolled: Sequence[Rolled], baseline: float | None = None, greedy: Sequence[float] = ()
) -> None:
    """Fill in advantages (and returns, for a critic) of a whole batch, and who has something to teach.

    baseline: REINFORCE's moving average of rewards before this batch (None: the batch's own mean). greedy: ReMax's
    reward of the greedy answer to each prompt, by group; NaN where there is none: then the rewards of its completions
    teach nothing.
    """
    if not rolled:
        return
    method = METHODS[config.method]
    lengths = torch.tensor([r.length for r in rolled])
    sequence = sequence_index(lengths)
    group = torch.tensor([r.group for r in rolled])
    rewards = torch.tensor([outcome(config, r.rollout) for r in rolled], dtype=torch.float64)
    steps = step_scores(config, rolled)
    penalty = None
    if config.kl.coefficient and config.kl.where == "reward":
        before = [r.old if r.old is not None else s for r, s in zip(rolled, sampled_logprobs(rolled), strict=True)]
        reference = torch.cat([r.reference for r in rolled if r.reference is not None])
        penalty = kl(torch.cat(before), reference, config.kl.estimator)
    if method.advantages in ("whitened", "critic"):
        nothing = torch.zeros(len(sequence))
        tokens = token_rewards(rewards, nothing if penalty is None else penalty, config.kl.coefficient, sequence)
        for weight, scores, last, _ in steps:
            tokens = tokens + (weight * at_last_tokens(scores, last, sequence)).to(tokens.dtype)
        if method.advantages == "whitened":
            flat = adv.reinforce_plus_plus(tokens, sequence, config.gamma)
        else:
            values = torch.cat([r.values for r in rolled if r.values is not None])
            flat, returns = adv.gae(tokens, values, sequence, config.gamma, config.lam)
            flat = adv.whiten(flat)
            for r, part in zip(rolled, returns.split(lengths.tolist()), strict=True):
                r.returns = part.float()
    else:
        if penalty is not None:
            rewards = penalised_rewards(rewards, penalty, config.kl.coefficient, sequence)
        flat = _of_sequences(method, rewards, group, baseline, greedy)[sequence]
        for weight, scores, last, completion in steps:
            relative = relative_steps(scores, group[completion], completion, STEPS[method.advantages])
            flat = flat + weight * from_steps_on(relative, last, sequence)
        if method.advantages == "baseline":
            flat = adv.whiten(flat)
    always = bool(config.entropy or method.advantages == "critic")
    always |= bool(config.kl.coefficient) and config.kl.where == "loss"
    for r, part in zip(rolled, flat.float().split(lengths.tolist()), strict=True):
        cut = config.mask_truncated and r.rollout.finish in ("length", "turns")
        r.advantages = part
        r.signal = bool(r.length) and not cut and (always or bool(part.any()))


def _of_sequences(
    method: Method, rewards: Tensor, group: Tensor, baseline: float | None, greedy: Sequence[float]
) -> Tensor:
    if method.advantages == "group":
        return adv.group_relative(rewards, group)
    if method.advantages in ("centred", "baseline"):
        return adv.group_relative(rewards, group, "none")
    if method.advantages == "leave_one_out":
        return adv.leave_one_out(rewards, group)
    if method.advantages == "greedy":
        found = adv.remax(rewards, torch.tensor(list(greedy), dtype=rewards.dtype), group)
        return torch.where(found.isnan(), 0.0, found)
    return adv.reinforce(rewards, baseline)


@dataclass
class Extremes:
    """What can't be summed over micro-batches."""

    mismatch: float = 0.0
    ratio: float = 1.0


def policy_loss(
    config: RLConfig, rolled: Sequence[Rolled], fresh: bool, comparable: bool, extremes: Extremes
) -> LossFunction:
    """The loss of one optimizer step on `rolled`, all of that step's rollouts, those without signal among them.

    fresh: the weights are those that sampled (a batch's first update), so that the difference between sampler and
    learner can be seen, where the two speak of the same distribution (`comparable`: nothing was cut off).
    """
    method = METHODS[config.method]
    alone = config.updates * config.passes == 1 and not config.off_policy
    kind = config.aggregation or method.aggregation
    stepwise = any(r.rollout.steps for r in rolled)
    if method.loss == "reinforce" and not alone and kind == "constant" and not stepwise:
        kind = "sequence"  # the ratio of a whole sequence, once for each
    constant = 1.0 if method.loss == "reinforce" else float(config.sampler.max_tokens)
    written = torch.tensor([r.length for r in rolled])
    divisor, everything = denominator(kind, written), denominator("token", written)
    want = "values" if method.advantages == "critic" else "logprobs"
    cap, beta = config.importance_cap, config.kl.coefficient if config.kl.where == "loss" else 0.0

    def loss(model: LanguageModel, batch: RaggedBatch, count: float) -> tuple[Tensor, dict[str, Tensor]]:
        if "rolled" not in batch.samples[0].meta:
            return _in_step(model, batch, want), {}
        mine = [rolled[s.meta["rolled"]] for s in batch.samples]
        device = batch.tokens_T.device
        lengths = torch.tensor([r.length for r in mine], device=device)
        targets = torch.cat([r.targets(row) for row, r in zip(batch.rows, mine, strict=True)])
        out = model(
            batch, want, targets, temperature=temperatures(config, mine, device), entropy=config.entropy != 0,
            probe=config.value_trunk == "probe",
        )  # fmt: skip
        logprobs = out[0]
        sequence = sequence_index(lengths)
        weights = token_weights(kind, sequence, lengths, constant)
        sampled = torch.cat(sampled_logprobs(mine)).to(device)
        old = logprobs.detach() if mine[0].old is None else _cat(mine, "old", device)
        advantages = torch.cat([r.advantages for r in mine]).to(device)
        values, metrics, ratio = _objective(
            method, config, alone, stepwise, logprobs, old, advantages, sequence, lengths
        )
        if cap is not None:
            importance, more = policy.truncated_importance(old, sampled, cap)
            values = values * importance
            metrics |= {k: v for k, v in more.items() if k.startswith("importance")}
        if beta:
            divergence = kl(logprobs, _cat(mine, "reference", device), config.kl.estimator)
            values = values + beta * divergence
        if config.entropy:
            values = values + policy.entropy_bonus(out[1], config.entropy)
        if fresh and comparable:
            now = torch.tensor([r.age == 0 for r in mine], device=device)[sequence]
            difference = (logprobs.detach() - sampled).abs() * now
            metrics["mismatch"], metrics["fresh"] = difference.sum(), now.sum()
            metrics["mismatch_kl"] = (kl(sampled, logprobs.detach(), "k3") * now).sum()
            extremes.mismatch = max(extremes.mismatch, float(difference.max()))
        total = reduce(values, weights, divisor)
        if want == "values":
            before, returns = (_cat(mine, name, device) for name in ("values", "returns"))
            error, more = policy.value_loss(out[2], before, returns, config.clip_value)
            total = total + config.value_coefficient * error.sum() / everything
            metrics |= {"value_loss": error.detach().sum(), **more}
        if ratio is not None:
            extremes.ratio = max(extremes.ratio, float(ratio.detach().max()))
        return total, {name: value.double() / count for name, value in metrics.items()}

    return loss


def _in_step(model: LanguageModel, batch: RaggedBatch, want: str) -> Tensor:
    """A pass that only keeps ranks in step: every weight takes part, and nothing is added."""
    out = model(batch, want, batch.rows[0][-1:])
    return 0.0 * (out[0].sum() + (out[2].sum() if want == "values" else 0.0))  # type: ignore[no-any-return]


def _cat(mine: Sequence[Rolled], name: str, device: torch.device) -> Tensor:
    parts: list[Any] = [getattr(r, name) for r in mine]
    return torch.cat(parts).to(device)


def _objective(
    method: Method,
    config: RLConfig,
    alone: bool,
    stepwise: bool,
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    sequence: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, policy.Metrics, Tensor | None]:
    """Losses by token, sums for metrics, and the ratio. stepwise: advantages differ within a sequence."""
    low = method.low if config.clip_low is None else config.clip_low
    high = method.high if config.clip_high is None else config.clip_high
    if method.loss == "reinforce" and alone:
        return policy.reinforce(logprobs, advantages), {}, None
    if method.ratio == "token":
        ratio = policy.token_ratio(logprobs, old)
    else:
        whole = policy.sequence_token_ratio if stepwise else policy.sequence_ratio
        ratio = whole(logprobs, old, sequence, lengths, mean=method.ratio == "sequence_mean")
    if method.loss == "cispo":
        return *policy.cispo(ratio, logprobs, advantages, 1 + high, max(0.0, 1 - low)), ratio
    return *policy.clipped(ratio, advantages, low, high, config.clip_dual), ratio
