"""Replay: stored successes are sampled again more often, and stand in where a group has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from posttrain.config import RLConfig
from posttrain.methods.rl.collect_rollouts import PromptGroup
from posttrain.methods.rl.hooks import Hook
from posttrain.sampling.replay_buffer import Replay


class ReplaySuccesses(Hook):
    """Draw some prompts from the store of rare successes, and add the stored one to a group without a success."""

    def __init__(self, config: RLConfig, seed: int) -> None:
        assert config.exploration.replay is not None
        self.config, self.success, self.seed = config.exploration.replay, config.exploration.success, seed
        self.store = Replay(self.config, config.exploration.max_staleness)
        self.dropped = 0

    def before_step(self, step: int, settings: RLConfig) -> RLConfig:
        self.dropped = self.store.expire(step)
        return settings

    def choose_prompts(self, step: int, attempt: int, prompts: list[int]) -> list[int]:
        known = [p for p in self.store.kept if p not in prompts]
        again = 0 if attempt else min(int(self.config.share * len(prompts)), len(known))
        if not again:
            return prompts
        picked = np.random.default_rng([self.seed, 4, step]).choice(known, again, replace=False)
        return [*prompts[:-again], *(int(i) for i in picked)]

    def after_rewards(self, step: int, groups: Sequence[PromptGroup]) -> list[PromptGroup]:
        out = []
        for group in groups:
            stored = self.store.visit(group.problem, group.kept, self.success)
            out.append(group if stored is None else replace(group, replayed=(stored,)))
        return out

    def metrics(self, step: int, groups: Sequence[PromptGroup]) -> dict[str, float]:
        replayed = sum(len(g.replayed) for g in groups)
        return {
            "replayed": float(replayed),
            "replay_kept": float(len(self.store.kept)),
            "replay_dropped": float(self.dropped),
        }

    def state_dict(self) -> Any:
        return self.store.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.store.load_state_dict(state)
