"""Gold scorer: the stage's rewards (the proxy) and a scorer that is not trained on, on the same samples, with the KL.

If the proxy rises with the distance from the first model while gold falls, the policy exploits mistakes of the proxy
(arXiv 2210.10760).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from posttrain.config.rl import RolloutConfig
from posttrain.core import distributed
from posttrain.core.progress import Phases
from posttrain.core.statistics import interval_of_means
from posttrain.core.types import RolloutGroup
from posttrain.data.prompts import RenderedPrompt
from posttrain.losses.aggregation import sequence_index
from posttrain.losses.kl import sequence_kl
from posttrain.methods.rl.collect_rollouts import RolloutCollector, sample_groups, score_groups
from posttrain.methods.rl.sequence_logprobs import (
    TrainingSequence,
    reference_logprobs,
    sampler_is_exact,
    sequence_outputs,
)
from posttrain.models.language_model import LanguageModel
from posttrain.rewards.reward_log import LOG
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.protocol import Request
from posttrain.sampling.rollout_store import write_rollouts
from posttrain.trainer.stage import Functions

GOLD = "gold"
"""Name of the scorer among a rollout's rewards, and of the folder of the rollouts."""


class GoldScorer:
    """Sample the held-out problems from the same random streams each time, and score the samples twice."""

    def __init__(
        self,
        config: RolloutConfig,
        collector: RolloutCollector,
        questions: Sequence[RenderedPrompt],
        policy: LanguageModel,
        reference: LanguageModel,
        folder: Path,
        seed: int,
        functions: Functions | None,
    ) -> None:
        """Make the measurement.

        Args:
            config: Settings of the stage.
            collector: Its sampler and rewards are used.
            questions: The held-out problems.
            policy: The model that is trained.
            reference: The model that the stage started from.
            folder: The stage's folder; rollouts are kept in `folder`/gold.
            seed: Seed of the random streams.
            functions: Rewards given from Python, by name.
        """
        assert config.held_out is not None and config.held_out.gold is not None
        self.config, self.collector, self.questions = config, collector, questions
        self.policy, self.reference, self.folder = policy, reference, folder
        self.samples = config.held_out.samples
        self.streams = np.random.SeedSequence([seed, 7]).generate_state(len(questions), np.uint64)
        scorer = config.held_out.gold.model_copy(update={"name": GOLD, "weight": 1.0})
        proxy = collector.rewards
        self.scorer = RewardStack([scorer], functions, proxy.tokenizer, folder / LOG, proxy.environment)

    def close(self) -> None:
        """End the scorer's processes."""
        self.scorer.close()

    def measure(self, step: int, phases: Phases) -> dict[str, float]:
        """Return means with 95% intervals (bootstrap over problems) of proxy, gold and KL; the samples are kept.

        A sample that the proxy or gold failed on counts in neither, and in `gold_failed`.
        """
        with phases("gold"):
            seeded = zip(self.questions, self.streams, strict=True)
            requests = [Request(q.tokens, self.samples, int(stream), q.problem) for q, stream in seeded]
            groups = sample_groups(self.collector.sampler, requests, self.config.sampler, Phases(phases.track))
            proxy = [with_reward(g) for g in score_groups(self.collector.rewards, groups)]
            gold = score_groups(self.scorer, proxy)
            scored = [with_reward(_with_gold(*both)) for both in zip(proxy, gold, strict=True)]
            texts, numbers = [q.text for q in self.questions], list(range(len(self.questions)))
            if distributed.is_main():
                write_rollouts(self.folder / GOLD, step, scored, None, texts, numbers)
            missing = self.samples * len(groups) - sum(len(g.rollouts) for g in scored)
            return self._metrics(scored) | {"gold_failed": float(missing)}

    def _metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        sequences = [TrainingSequence(g.prompt, r, n) for n, g in enumerate(groups) for r in g.rollouts]
        if not sequences:
            return {}
        rewards = [s.rollout.reward for s in sequences]
        golds = [s.rollout.rewards[GOLD] for s in sequences]
        columns = {"proxy": rewards, "gold": golds, "kl_sequence": self._kl(sequences)}
        table = np.array(
            [
                [
                    statistics.fmean(v for v, s in zip(c, sequences, strict=True) if s.group == g)
                    for c in columns.values()
                ]
                for g in sorted({s.group for s in sequences})
            ]
        )
        out: dict[str, float] = {"proxy_std": statistics.pstdev(rewards), "gold_std": statistics.pstdev(golds)}
        if min(out.values()) > 0:  # constant numbers have no correlation
            out["proxy_gold"] = statistics.correlation(rewards, golds)
        for name, column, (low, high) in zip(columns, table.T, interval_of_means(table), strict=True):
            out |= {name: float(column.mean()), f"{name}_low": low, f"{name}_high": high}
        return out

    def _kl(self, sequences: Sequence[TrainingSequence]) -> list[float]:
        """Return the KL of each completion from the stage's first model, nats."""
        reference = reference_logprobs(self.config, sequences, self.reference)
        if sampler_is_exact(self.policy, self.config.sampler):
            own = tuple(s.sampled_logprobs() for s in sequences)
        else:
            own, _ = sequence_outputs(self.config, sequences, self.policy)
        lengths = torch.tensor([s.length for s in sequences])
        found = sequence_kl(torch.cat(own), torch.cat(reference), sequence_index(lengths), len(sequences))
        return [float(x) for x in found.double()]


def with_reward(group: RolloutGroup) -> RolloutGroup:
    """Return the group without rollouts on which a reward failed."""
    return replace(group, rollouts=[r for r in group.rollouts if r.rewarded])


def _with_gold(proxy: RolloutGroup, gold: RolloutGroup) -> RolloutGroup:
    """Return the rollouts with gold's number beside the proxy's; without a reward where gold failed."""
    pairs = zip(proxy.rollouts, gold.rollouts, strict=True)
    both = [
        replace(r, rewards={**r.rewards, **s.rewards}, reward=r.reward if s.rewarded else s.reward) for r, s in pairs
    ]
    return replace(proxy, rollouts=both)
