"""The third step: advantages of a whole batch, before it is split (imports no torch by itself).

`advantages:` in a recipe names a function here or ``module:function`` of your own. It takes an `AdvantageInputs` and
returns one advantage for each token that the model wrote, often by `AdvantageInputs.to_tokens`; keyword-only parameters
are its settings. Formulas and sources are in `posttrain.losses.advantages`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from posttrain.config.names import ADVANTAGES, KL_ESTIMATORS
from posttrain.config.rl import RLConfig
from posttrain.core.errors import RecipeError
from posttrain.core.types import Rollout, turn_of

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.losses.process_advantages import Relative
    from posttrain.methods.rl.sequence_logprobs import Logprobs, Tensors, TrainingSequence

Discount = Annotated[float, Field(gt=0, le=1, description="Discount of a reward per token.")]
Lambda = Annotated[float, Field(ge=0, le=1, description="Lambda of generalized advantage estimation.")]


@dataclass(frozen=True)
class StepScores:
    """The scores of all steps of a batch by one reward; or of all its n-th turns, where it rewards turns.

    Attributes:
        weight: Weight of the reward.
        scores_K: Score of each step.
        last_K: Place of its last token among all N tokens.
        completion_K: Number of its completion.
        first_K: Place of its first token, for turns: each is credited to its own tokens. None: a step is also credited
            to the tokens before it.
    """

    weight: float
    scores_K: Tensor
    last_K: Tensor
    completion_K: Tensor
    first_K: Tensor | None = None

    def credit(self, values_K: Tensor, sequence_N: Tensor) -> Tensor:
        """Return values of the steps as values of the tokens that they are credited to."""
        from posttrain.losses.process_advantages import from_steps_on, within_steps

        if self.first_K is None:
            return from_steps_on(values_K, self.last_K, sequence_N)
        return within_steps(values_K, self.first_K, self.last_K, len(sequence_N))


@dataclass(frozen=True)
class AdvantageInputs:
    """Inputs of an advantage: R completions of the whole batch, with N tokens that the model wrote.

    Attributes:
        rewards_R: Weighted sum of the rewards of a completion, without those that score its steps; a KL penalty in
            the reward is subtracted.
        group_R: Number of the completion's prompt in the batch.
        lengths_R: Tokens that the model wrote.
        sequence_N: Number of the completion of each token.
        segment_N: Stretch of a completion within which rewards to go are summed: the whole completion, or each of its
            turns if these are rewarded one by one.
        token_rewards_N: The same rewards by token: of the completion at the last token of each of its segments, of its
            steps at their last tokens, and the KL penalty at each.
        steps: Scores of steps, one entry for each reward that gives them.
        baseline: Moving average of the rewards of earlier batches. None: there are none.
        greedy_rewards_P: Reward of the greedy completion of each prompt; NaN if it failed. None: greedy_baseline is
            off.
        values_N: Values of the critic. None: there is no critic.
    """

    rewards_R: Tensor
    group_R: Tensor
    lengths_R: Tensor
    sequence_N: Tensor
    segment_N: Tensor
    token_rewards_N: Tensor
    steps: tuple[StepScores, ...] = ()
    baseline: float | None = None
    greedy_rewards_P: Tensor | None = None
    values_N: Tensor | None = None

    def to_tokens(self, advantages_R: Tensor, steps: Relative = "centred") -> Tensor:
        """Return advantages of completions as advantages of tokens, with those of steps added.

        Args:
            advantages_R: Advantage of each completion.
            steps: What the score of a step is compared with (`posttrain.losses.process_advantages.relative_steps`).
        """
        from posttrain.losses.process_advantages import relative_steps

        flat = advantages_R[self.sequence_N]
        for s in self.steps:
            relative = relative_steps(s.scores_K, self.group_R[s.completion_K], s.completion_K, steps)
            flat = flat + s.weight * s.credit(relative, self.sequence_N)
        return flat


@dataclass(frozen=True)
class Advantages:
    """The outcome of a batch.

    Attributes:
        advantages: A tensor of each sequence, one number for each token that the model wrote.
        returns: What the critic learns, likewise. None: there is no critic.
        trained: For each sequence whether it has a gradient.
    """

    advantages: Tensors
    returns: Tensors | None
    trained: tuple[bool, ...]

    def select(self, places: Sequence[int]) -> Advantages:
        """Return those of some of the sequences."""
        returns = None if self.returns is None else tuple(self.returns[i] for i in places)
        return Advantages(tuple(self.advantages[i] for i in places), returns, tuple(self.trained[i] for i in places))


def grpo_advantages(batch: AdvantageInputs) -> Tensor:
    """Compute (reward - mean of the group) / (standard deviation of the group + 1e-4)."""
    from posttrain.losses import advantages

    return batch.to_tokens(advantages.group_relative(batch.rewards_R, batch.group_R), "group")


def dr_grpo_advantages(batch: AdvantageInputs) -> Tensor:
    """Compute reward - mean of the group."""
    from posttrain.losses import advantages

    return batch.to_tokens(advantages.group_relative(batch.rewards_R, batch.group_R, "none"), "centred")


def rloo_advantages(batch: AdvantageInputs) -> Tensor:
    """Compute reward - mean of the other rewards of the group."""
    from posttrain.losses import advantages

    return batch.to_tokens(advantages.leave_one_out(batch.rewards_R, batch.group_R), "leave_one_out")


def reinforce_advantages(batch: AdvantageInputs) -> Tensor:
    """Compute reward - moving average of earlier batches (in the first batch: its own mean)."""
    from posttrain.losses import advantages

    return batch.to_tokens(advantages.reinforce(batch.rewards_R, batch.baseline), "batch")


def remax_advantages(batch: AdvantageInputs) -> Tensor:
    """Compute reward - reward of the greedy completion of the prompt; 0 if that one failed."""
    from posttrain.losses import advantages

    if batch.greedy_rewards_P is None:
        raise RecipeError("advantages remax need greedy_baseline: true")
    found = advantages.remax(batch.rewards_R, batch.greedy_rewards_P, batch.group_R)
    return batch.to_tokens(found.nan_to_num(0.0), "batch")


def reinforce_pp_advantages(batch: AdvantageInputs, *, gamma: Discount = 1.0) -> Tensor:
    """Compute discounted rewards to go, whitened over the batch."""
    from posttrain.losses import advantages

    return advantages.reinforce_plus_plus(batch.token_rewards_N, batch.segment_N, gamma)


def reinforce_pp_baseline_advantages(batch: AdvantageInputs) -> Tensor:
    """Compute reward - mean of the group, whitened over the tokens of the batch."""
    from posttrain.losses import advantages

    return advantages.whiten(dr_grpo_advantages(batch))


def gae_advantages(batch: AdvantageInputs, *, gamma: Discount = 1.0, gae_lambda: Lambda = 1.0) -> tuple[Tensor, Tensor]:
    """Compute generalized advantage estimates, whitened over the batch, and the critic's returns.

    Args:
        batch: The inputs, with values of a critic.
        gamma: Discount per token.
        gae_lambda: Lambda; 1: return minus value.
    """
    from posttrain.losses import advantages

    if batch.values_N is None:
        raise RecipeError("advantages gae need a critic: {}")
    found, returns = advantages.gae(batch.token_rewards_N, batch.values_N, batch.segment_N, gamma, gae_lambda)
    return advantages.whiten(found), returns


def outcome_reward(settings: RLConfig, rollout: Rollout) -> float:
    """Return the weighted sum of the rewards of the whole completion, without those that score its steps."""
    if not rollout.steps:
        return rollout.reward
    whole = (p for p in settings.rewards.terms if p.title not in rollout.steps)
    return sum((p.weight * rollout.rewards[p.title] for p in whole), 0.0)


def step_scores(settings: RLConfig, sequences: Sequence[TrainingSequence]) -> tuple[StepScores, ...]:
    """Return the scores of steps over all sequences laid end to end, for each reward that gives them.

    A step counts if the model wrote some of it, and ends with the last token of it that the model wrote. A reward that
    scores turns has an entry for the first turns, one for the second turns, and so on, so that a turn is compared with
    the same turn of other completions.
    """
    import torch

    found = []
    names = {name for s in sequences for name in s.rollout.steps}
    for reward in settings.rewards.terms:
        if not reward.weight:
            continue
        turns = sorted((n for n in names if turn_of(n, reward.title)), key=lambda n: turn_of(n, reward.title))
        for name in [reward.title, *turns]:
            scores, first_of, last, completion, start = [], [], [], [], 0
            for i, s in enumerate(sequences):
                own = s.rollout.own
                for first, end, score in s.rollout.steps.get(name, ()):
                    begin, at = bisect_left(own, first), bisect_left(own, end) - 1
                    if at >= begin:
                        scores.append(score)
                        first_of.append(start + begin)
                        last.append(start + at)
                        completion.append(i)
                start += len(own)
            if scores:
                places = torch.tensor(last), torch.tensor(completion)
                of_turns = torch.tensor(first_of) if name != reward.title else None
                found.append(StepScores(reward.weight, torch.tensor(scores, dtype=torch.float64), *places, of_turns))
    return tuple(found)


def segments(steps: Sequence[StepScores], sequence_N: Tensor) -> Tensor:
    """Return the stretch of a completion that each token is in: the turns if any are rewarded one by one."""
    import torch

    from posttrain.losses.process_advantages import turn_segments

    turns = [(s.first_K, s.last_K) for s in steps if s.first_K is not None]
    if not turns:
        return sequence_N
    first, last = (torch.cat(places) for places in zip(*turns, strict=True))
    return turn_segments(sequence_N, first, last)


def advantage_inputs(
    settings: RLConfig,
    sequences: Sequence[TrainingSequence],
    logprobs: Logprobs,
    baseline: float | None = None,
    greedy: Sequence[float] | None = None,
) -> AdvantageInputs:
    """Return the inputs of a batch's advantages.

    Args:
        settings: Settings of the step.
        sequences: The whole batch, which is not empty.
        logprobs: Their log-probabilities before the update.
        baseline: Moving average of the rewards of earlier batches.
        greedy: Reward of the greedy completion of each prompt; NaN if it failed.
    """
    import torch

    from posttrain.losses.aggregation import sequence_index
    from posttrain.losses.kl import penalised_rewards, token_rewards
    from posttrain.losses.process_advantages import at_last_tokens

    lengths = torch.tensor([s.length for s in sequences])
    sequence = sequence_index(lengths)
    rewards = torch.tensor([outcome_reward(settings, s.rollout) for s in sequences], dtype=torch.float64)
    steps, penalty = step_scores(settings, sequences), torch.zeros(len(sequence))
    if settings.kl_in_reward:
        assert logprobs.reference is not None
        estimate = settings.kl.estimator.load(KL_ESTIMATORS)
        penalty = estimate(torch.cat(logprobs.before), torch.cat(logprobs.reference))
        penalty *= torch.cat([s.turn_weights(settings.kl.later_turns) for s in sequences])
    segment = segments(steps, sequence)
    segment_rewards = rewards
    if segment is not sequence:
        sequence_of_segment = torch.zeros(int(segment.max()) + 1, dtype=torch.long).scatter(0, segment, sequence)
        segment_rewards = rewards[sequence_of_segment]
    by_token = token_rewards(segment_rewards, penalty, settings.kl.coefficient, segment)
    for s in steps:
        by_token = by_token + (s.weight * at_last_tokens(s.scores_K, s.last_K, sequence)).to(by_token.dtype)
    if settings.kl_in_reward:
        rewards = penalised_rewards(rewards, penalty, settings.kl.coefficient, sequence)
    return AdvantageInputs(
        rewards,
        torch.tensor([s.group for s in sequences]),
        lengths,
        sequence,
        segment,
        by_token,
        steps,
        baseline,
        None if greedy is None else torch.tensor(list(greedy), dtype=rewards.dtype),
        None if logprobs.values is None else torch.cat(logprobs.values),
    )


def compute_advantages(
    settings: RLConfig,
    sequences: Sequence[TrainingSequence],
    logprobs: Logprobs,
    baseline: float | None = None,
    greedy: Sequence[float] | None = None,
) -> Advantages:
    """Compute the advantages of a whole batch, and find the sequences that have a gradient.

    Args:
        settings: Settings of the step.
        sequences: The whole batch.
        logprobs: Their log-probabilities before the update.
        baseline: Moving average of the rewards of earlier batches. None: there are none.
        greedy: Reward of the greedy completion of each prompt; NaN if it failed. None: none were sampled.
    """
    if not sequences:
        return Advantages((), () if settings.critic else None, ())
    inputs = advantage_inputs(settings, sequences, logprobs, baseline, greedy)
    found = settings.advantages.load(ADVANTAGES)(inputs)
    advantages_N, returns_N = found if isinstance(found, tuple) else (found, None)
    if advantages_N.shape != inputs.sequence_N.shape:
        raise RecipeError(
            f"advantages {settings.advantages.name} returned shape {tuple(advantages_N.shape)}, and there are "
            f"{len(inputs.sequence_N)} tokens: return batch.to_tokens(advantages of the completions)"
        )
    if settings.critic is not None and returns_N is None:
        raise RecipeError(f"advantages {settings.advantages.name} returned no returns for the critic: leave out critic")
    lengths = inputs.lengths_R.tolist()
    advantages = advantages_N.float().split(lengths)
    returns = None if returns_N is None else returns_N.float().split(lengths)
    # An entropy bonus, a KL penalty or a critic has a gradient even if all advantages are 0.
    always = bool(settings.entropy_coef or settings.critic or (settings.kl.coefficient and not settings.kl_in_reward))
    trained = tuple(
        bool(s.length)
        and not (settings.mask_truncated and s.rollout.finish in ("length", "turns"))
        and (always or bool(a.any()))
        for s, a in zip(sequences, advantages, strict=True)
    )
    return Advantages(advantages, returns, trained)
