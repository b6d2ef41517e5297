"""Replay: rare successes are stored, sampled again more often, and stand in where a group has no success."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from posttrain.config import ReplayConfig, RLConfig
from posttrain.core.types import Rollout
from posttrain.methods.rl.collect_rollouts import PromptGroup
from posttrain.methods.rl.hooks import Hook
from posttrain.sampling.replay_buffer import oldest, rollout_from_json, rollout_to_json


class Replay(Hook):
    """Store one rare success per problem, the newest: the most likely of its group (arXiv 2510.02245: these serve best).

    Attributes:
        kept: The stored success of each problem, the newest last.
    """

    def __init__(self, config: ReplayConfig, max_staleness: int, *, seed: int = 0, success: float = 1.0) -> None:
        """Make an empty store.

        Args:
            config: Its settings.
            max_staleness: Most steps that the oldest token of a stored success may be old.
            seed: Seed of the draws.
            success: Lowest reward of a success.
        """
        self.config, self.max_staleness, self.seed, self.success = config, max_staleness, seed, success
        self.kept: dict[int, Rollout] = {}
        self.dropped = 0

    def before_step(self, step: int, settings: RLConfig) -> RLConfig:
        self.dropped = self.expire(step)
        return settings

    def choose_prompts(self, step: int, attempt: int, prompts: list[int]) -> list[int]:
        known = [p for p in self.kept if p not in prompts]
        again = 0 if attempt else min(int(self.config.share * len(prompts)), len(known))
        if not again:
            return prompts
        picked = np.random.default_rng([self.seed, 4, step]).choice(known, again, replace=False)
        return [*prompts[:-again], *(int(i) for i in picked)]

    def after_rewards(self, step: int, groups: Sequence[PromptGroup]) -> list[PromptGroup]:
        stored = [self.visit(g.problem, g.kept, self.success) for g in groups]
        return [g if r is None else replace(g, replayed=(r,)) for g, r in zip(groups, stored, strict=True)]

    def expire(self, step: int) -> int:
        """Drop what is too old to be trained on in this step, and return the number dropped."""
        old = [p for p, r in self.kept.items() if step - oldest(r, step) > self.max_staleness]
        for problem in old:
            del self.kept[problem]
        return len(old)

    def visit(self, problem: int, rollouts: Sequence[Rollout], success: float) -> Rollout | None:
        """Store a success of a fresh group if successes are rare in it; return the stored one if it has none.

        The store of a problem that is solved often is emptied.

        Args:
            problem: Number of the problem.
            rollouts: The group.
            success: Lowest reward of a success.
        """
        right = [r for r in rollouts if r.reward >= success]
        if not right:
            return self.kept.get(problem) if rollouts else None
        self.kept.pop(problem, None)
        if len(right) <= self.config.rare * len(rollouts):
            self.kept[problem] = max(right, key=lambda r: sum(r.logprobs) / max(1, len(r.tokens)))
            while len(self.kept) > self.config.size:
                del self.kept[next(iter(self.kept))]
        return None

    def metrics(self, step: int, groups: Sequence[PromptGroup]) -> dict[str, float]:
        replayed = float(sum(len(g.replayed) for g in groups))
        return {"replayed": replayed, "replay_kept": float(len(self.kept)), "replay_dropped": float(self.dropped)}

    def state_dict(self) -> list[Any]:
        return [[problem, rollout_to_json(r)] for problem, r in self.kept.items()]

    def load_state_dict(self, state: Sequence[Any]) -> None:
        self.kept = {int(problem): rollout_from_json(r) for problem, r in state}
