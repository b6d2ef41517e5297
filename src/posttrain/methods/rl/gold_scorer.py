"""What a policy's rewards are worth while it is trained by them: proxy and gold on the same samples, over the KL.

The proxy is what a stage learns from; gold is a scorer that nothing learns from. Where the first goes on rising with
the distance from the first model and the second falls, the policy has found the proxy's mistakes (arXiv 2210.10760).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from posttrain.config import RLConfig
from posttrain.core import distributed
from posttrain.core.progress import Phases
from posttrain.core.statistics import interval_of_means
from posttrain.core.types import RolloutGroup
from posttrain.data.prompts import RenderedPrompt
from posttrain.losses.aggregation import sequence_index
from posttrain.losses.kl import sequence_kl
from posttrain.methods.rl.collect import Collector
from posttrain.methods.rl.gather import judge, sample
from posttrain.methods.rl.policy_objectives import Rolled
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.protocol import Request
from posttrain.sampling.rollout_store import write_rollouts
from posttrain.trainer.stage import Functions

NAME = "gold"
"""The scorer's name among a rollout's rewards, and the folder of the rollouts."""


class Gold:
    """Samples the held-out problems, from the same random streams each time, and judges them twice.

    reference: fills in log-probabilities of the model that the stage began with.
    """

    def __init__(
        self,
        config: RLConfig,
        collector: Collector,
        questions: Sequence[RenderedPrompt],
        reference: Callable[[Sequence[Rolled]], None],
        folder: Path,
        seed: int,
        functions: Functions | None,
    ) -> None:
        assert config.held_out is not None and config.held_out.gold is not None
        self.config, self.collector, self.questions = config, collector, questions
        self.reference, self.folder = reference, folder
        self.samples = config.held_out.samples
        self.streams = np.random.SeedSequence([seed, 7]).generate_state(len(questions), np.uint64)
        scorer = config.held_out.gold.model_copy(update={"name": NAME, "weight": 1.0})
        self.scorer = RewardStack([scorer], functions)

    def close(self) -> None:
        """End what the scorer runs."""
        self.scorer.close()

    def measure(self, step: int, phases: Phases) -> dict[str, float]:
        """Means with 95% intervals (bootstrap over problems) of proxy, gold and KL a sequence; the samples are kept.

        A sample that the proxy or gold fails on counts in neither, and in `gold_failed`.
        """
        with phases("gold"):
            asked = zip(self.questions, self.streams, strict=True)
            requests = [Request(q.tokens, self.samples, int(stream), q.problem) for q, stream in asked]
            groups = sample(self.collector.sampler, requests, self.config.sampler, Phases(phases.track))
            proxy = judge(self.collector.rewards, groups).groups
            gold = judge(self.scorer, proxy)
            failed = {(e.group, e.index) for e in gold.excluded}
            judged = [_both(g, *both, failed) for g, both in enumerate(zip(proxy, gold.groups, strict=True))]
            texts, numbers = [q.text for q in self.questions], list(range(len(self.questions)))
            if distributed.is_main():
                write_rollouts(self.folder / NAME, step, judged, None, texts, numbers)
            asked_for = self.samples * len(groups)
            return self._numbers(judged, asked_for - sum(len(g.rollouts) for g in judged))

    def _numbers(self, groups: Sequence[RolloutGroup], failed: int) -> dict[str, float]:
        rolled = [Rolled(g.prompt, r, n) for n, g in enumerate(groups) for r in g.rollouts]
        counted = {"gold_failed": float(failed)}
        if not rolled:
            return counted
        divergence = self._divergence(rolled)
        rewards = [r.rollout.reward for r in rolled]
        golds = [r.rollout.rewards[NAME] for r in rolled]
        there = sorted({r.group for r in rolled})
        columns = {"proxy": rewards, "gold": golds, "kl_sequence": divergence}
        table = np.array(
            [
                [statistics.fmean(v for v, r in zip(c, rolled, strict=True) if r.group == g) for c in columns.values()]
                for g in there
            ]
        )
        out: dict[str, float] = {"proxy_std": statistics.pstdev(rewards), "gold_std": statistics.pstdev(golds)}
        if min(out.values()) > 0:  # of numbers that are all the same there is no correlation
            out["proxy_gold"] = statistics.correlation(rewards, golds)
        for name, column, (low, high) in zip(columns, table.T, interval_of_means(table), strict=True):
            out |= {name: float(column.mean()), f"{name}_low": low, f"{name}_high": high}
        return out | counted

    def _divergence(self, rolled: Sequence[Rolled]) -> list[float]:
        """KL from the stage's first model of each completion, nats."""
        self.reference(rolled)
        own = self.collector.own_logprobs(rolled)
        lengths = torch.tensor([r.length for r in rolled])
        reference = torch.cat([torch.zeros(0) if r.reference is None else r.reference for r in rolled])
        found = sequence_kl(torch.cat(own), reference, sequence_index(lengths), len(rolled))
        return [float(x) for x in found.double()]


def _both(g: int, proxy: RolloutGroup, gold: RolloutGroup, failed: set[tuple[int, int]]) -> RolloutGroup:
    """The rollouts that have both, gold's number beside the proxy's parts. failed: (group, place) without gold's."""
    there = [r for i, r in enumerate(proxy.rollouts) if (g, i) not in failed]
    pairs = zip(there, gold.rollouts, strict=True)
    return replace(proxy, rollouts=[replace(r, rewards={**r.rewards, NAME: s.rewards[NAME]}) for r, s in pairs])
