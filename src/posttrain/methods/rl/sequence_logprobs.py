"""The second step: log-probabilities of the completions under the policy and the reference, and the critic's values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.config import SamplingConfig
from posttrain.config.rl import RLConfig, RolloutConfig, truncating_setting
from posttrain.config.rollout_sampler import RolloutSamplerConfig
from posttrain.core import distributed
from posttrain.core.image_tokens import extended
from posttrain.core.ragged import RaggedBatch, micro_batches
from posttrain.core.types import PartialRollout, Rollout, Sample
from posttrain.data.prompts import RenderedPrompt
from posttrain.methods.rl.collect_rollouts import PromptGroup
from posttrain.models.language_model import LanguageModel
from posttrain.sampling.replay_buffer import oldest
from posttrain.trainer.reference_model import without_adapters
from posttrain.trainer.token_budget import token_budget

Tensors = tuple[Tensor, ...]
"""A tensor of each sequence, on the CPU: one number for each token that the model wrote."""


@dataclass(frozen=True)
class TrainingSequence:
    """A prompt with one scored completion.

    Only tokens that the model wrote count: what an environment wrote in between is context, without loss, ratio or
    advantage, and in no mean or count.

    Attributes:
        prompt: Token ids of the prompt.
        rollout: The completion.
        group: Number of the prompt's group in the batch.
        age: Steps since its first token was sampled.
        replayed: True for a stored success that was added to the group.
    """

    prompt: Sequence[int]
    rollout: Rollout
    group: int
    age: int = 0
    replayed: bool = False

    @property
    def length(self) -> int:
        """Return the number of tokens that the model wrote."""
        return self.rollout.length

    def sample(self, number: int, weight: float = 1.0) -> Sample:
        """Return the sequence in the learner's form; `weight` 0 leaves it out of the loss."""
        tokens = extended(self.prompt, self.rollout.tokens)
        mask = self.rollout.mask or [True] * len(self.rollout.tokens)
        weights = [0.0] * len(self.prompt) + [weight if mine else 0.0 for mine in mask]
        return Sample(tokens, weights, meta={"sequence": number, "group": self.group, "shared": len(self.prompt)})

    def targets(self, row: Tensor) -> Tensor:
        """Return the places in the batch of the tokens that the model wrote; `row`: those of the whole sequence."""
        own = row[len(self.prompt) :]
        mask = self.rollout.mask
        return own if mask is None else own[torch.tensor(mask, dtype=torch.bool, device=row.device)]

    def turn_weights(self, later: float) -> Tensor:
        """Return 1 for each token that the model wrote before the environment's first reply, `later` for those after."""
        mask = self.rollout.mask or ()
        first = next((i for i, mine in enumerate(mask) if not mine), self.length)
        return torch.cat([torch.ones(first), torch.full((self.length - first,), later)])

    def sampled_logprobs(self) -> Tensor:
        """Return the sampler's log-probabilities of the tokens that the model wrote."""
        return torch.tensor([self.rollout.logprobs[i] for i in self.rollout.own], dtype=torch.float32)


def training_sequences(
    groups: Sequence[PromptGroup], questions: Sequence[RenderedPrompt], step: int
) -> list[TrainingSequence]:
    """Return the scored completions of a batch, group by group; replayed ones come last in their group.

    Args:
        groups: The groups of the step.
        questions: Prompts, by number.
        step: Number of the step, for the ages.
    """
    return [
        TrainingSequence(questions[group.problem].tokens, r, n, step - oldest(r, step), replayed)
        for n, group in enumerate(groups)
        for rollouts, replayed in ((group.kept, False), (group.replayed, True))
        for r in rollouts
    ]


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of a batch's sequences before it is trained on.

    Attributes:
        sampled: Of the sampler.
        before: Of the policy before the first update; the sampler's if it computes the same numbers, and for tokens
            of an earlier policy, which is gone.
        old: Denominator of the ratios. None: the learner's own numbers, in the only update of a fresh batch.
        reference: Of the model that the stage started from. None: not needed.
        values: Of the critic. None: there is no critic.
    """

    sampled: Tensors
    before: Tensors
    old: Tensors | None = None
    reference: Tensors | None = None
    values: Tensors | None = None

    def select(self, places: Sequence[int]) -> Logprobs:
        """Return those of some of the sequences."""
        parts = (self.sampled, self.before, self.old, self.reference, self.values)
        return Logprobs(*(None if p is None else tuple(p[i] for i in places) for p in parts))  # type: ignore[arg-type]


def sampler_is_exact(model: LanguageModel, sampler: RolloutSamplerConfig) -> bool:
    """Return True if the sampler's log-probabilities are the learner's: float32 everywhere, the whole distribution."""
    whole = truncating_setting(sampler) is None and sampler.kv_cache is None
    return whole and sampler.backend == "local" and next(model.parameters()).dtype == torch.float32


def compute_logprobs(
    settings: RLConfig,
    sequences: Sequence[TrainingSequence],
    policy: LanguageModel,
    reference: LanguageModel | None = None,
) -> Logprobs:
    """Compute what the advantages and the loss need to know of the batch before its first update.

    Args:
        settings: Settings of the step.
        sequences: The whole batch; each rank computes a part.
        policy: The model that is trained.
        reference: The model that the stage started from; its adapters are switched off. None: not needed.
    """
    sampled = tuple(s.sampled_logprobs() for s in sequences)
    before, values, exact = sampled, None, sampler_is_exact(policy, settings.sampler)
    many = not settings.single_update
    if settings.critic is not None or ((many or settings.kl_in_reward) and not exact):
        own, of_critic = sequence_outputs(settings, sequences, policy, values=settings.critic is not None)
        values = None if settings.critic is None else of_critic
        before = tuple(s if r.age else o for r, s, o in zip(sequences, sampled, own, strict=True))
    against = None if reference is None else reference_logprobs(settings, sequences, reference)
    return Logprobs(sampled, before, before if many else None, against, values)


@torch.no_grad()
def sequence_outputs(
    settings: RolloutConfig, sequences: Sequence[TrainingSequence], model: LanguageModel, values: bool = False
) -> tuple[Tensors, Tensors]:
    """Return a model's log-probabilities of the sequences, and the critic's values (without them: the same again).

    Args:
        settings: Settings of the step: temperature and token budget.
        sequences: The whole batch; each rank computes a part.
        model: The model.
        values: Compute the critic's values as well.
    """
    want, columns = ("values", (0, 2)) if values else ("logprobs", (0, 0))

    def compute(mine: Sequence[TrainingSequence]) -> list[Tensors]:
        out: list[Tensors] = [(torch.zeros(0), torch.zeros(0)) for _ in mine]  # an empty completion has no output
        for places, batch, targets in forward_batches(model, mine, token_budget(settings.systems, model)):
            part = [mine[i] for i in places]
            outputs = model(batch, want, targets, temperature=temperatures(settings.sampler, part, targets.device))
            lengths = [s.length for s in part]
            split = [outputs[c].float().cpu().split(lengths) for c in columns]
            for i, *tensors in zip(places, *split, strict=True):
                out[i] = tuple(tensors)
        return out

    found = by_group_over_ranks(sequences, compute)
    return tuple(f[0] for f in found), tuple(f[1] for f in found)


def reference_logprobs(
    settings: RolloutConfig, sequences: Sequence[TrainingSequence], frozen: LanguageModel
) -> Tensors:
    """Return the log-probabilities of the model that the stage started from.

    Args:
        settings: Settings of the step.
        sequences: The whole batch; each rank computes a part.
        frozen: That model, or the policy whose adapters are switched off.
    """
    with without_adapters(frozen):
        return sequence_outputs(settings, sequences, frozen)[0]


def by_group_over_ranks(
    sequences: Sequence[TrainingSequence], compute: Callable[[Sequence[TrainingSequence]], list[Tensors]]
) -> list[Tensors]:
    """Return the result of each sequence; each rank computes whole groups, whose sequences share a prompt."""
    n = distributed.world()
    mine = [s for s in sequences if s.group % n == distributed.rank()] if n > 1 else sequences
    results = [iter(of_rank) for of_rank in distributed.all_gather_object(compute(mine))]
    return [next(results[s.group % n]) for s in sequences]


def forward_batches(
    model: LanguageModel, sequences: Sequence[TrainingSequence], budget: int
) -> Iterator[tuple[list[int], RaggedBatch, Tensor]]:
    """Yield (places of the sequences, ragged batch, targets): group by group, within a budget of tokens.

    Args:
        model: Packs the batches.
        sequences: Those without tokens are left out.
        budget: Tokens of a batch.
    """
    written = [i for i, s in enumerate(sequences) if s.length]
    sizes = [len(sequences[i].prompt) + len(sequences[i].rollout.tokens) for i in written]
    for chosen in micro_batches(sizes, budget):
        places = [written[c] for c in chosen]
        batch = model.pack([sequences[i].sample(0) for i in places])
        rows = zip(batch.rows, places, strict=True)
        yield places, batch, torch.cat([sequences[i].targets(row) for row, i in rows])


def temperatures(
    sampling: SamplingConfig, sequences: Sequence[TrainingSequence], device: torch.device
) -> float | Tensor:
    """Return what divides the logits of each token, as when it was sampled; one number if all tokens have the same.

    Args:
        sampling: Settings of the step, for completions that do not tell.
        sequences: Sequences of a forward pass.
        device: Device of the result.
    """
    pieces = [s.rollout.pieces or [PartialRollout(len(s.rollout.tokens), 0, sampling.temperature)] for s in sequences]
    different = {p.temperature for of in pieces for p in of}
    if len(different) == 1:
        return different.pop()
    values = []
    for s, of in zip(sequences, pieces, strict=True):
        each = [p.temperature for p in of for _ in range(p.tokens)]
        values += [each[i] for i in s.rollout.own]
    return torch.tensor(values, dtype=torch.float32, device=device)
