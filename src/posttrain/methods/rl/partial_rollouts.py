"""Partial rollouts: long completions grow by a number of tokens per step, and are trained on when their group ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from posttrain.config import RLConfig
from posttrain.methods.rl.collect_rollouts import PromptGroup
from posttrain.methods.rl.hooks import Hook
from posttrain.sampling.replay_buffer import PARTIAL


class PartialRollouts(Hook):
    """Hold groups with unfinished completions back for the next step; drop what would grow too old."""

    def __init__(self, config: RLConfig) -> None:
        self.max_staleness = config.exploration.max_staleness
        self.waiting: list[PromptGroup] = []
        self.dropped = 0

    def before_step(self, step: int, settings: RLConfig) -> RLConfig:
        self.dropped = 0
        return settings

    def before_sampling(self, step: int, attempt: int, prompts: Sequence[int]) -> list[PromptGroup]:
        continued = [] if attempt else self.waiting
        self.waiting = self.waiting if attempt else []
        return continued

    def after_sampling(self, step: int, groups: Sequence[PromptGroup]) -> list[PromptGroup]:
        return [self._drop(g) if g.expires(step, self.max_staleness) else g for g in groups]

    def _drop(self, group: PromptGroup) -> PromptGroup:
        """Leave out the completions that have not ended."""
        ended = tuple(r for r in group.rollouts if r.finish != PARTIAL)
        self.dropped += len(group.rollouts) - len(ended)
        return replace(group, rollouts=ended)

    def after_rewards(self, step: int, groups: Sequence[PromptGroup]) -> list[PromptGroup]:
        self.waiting += [g for g in groups if not g.complete]
        return [g for g in groups if g.complete and g.rollouts]

    def metrics(self, step: int, groups: Sequence[PromptGroup]) -> dict[str, float]:
        carried = sum(r.finish == PARTIAL for g in self.waiting for r in g.rollouts)
        return {"carried": float(carried), "carry_dropped": float(self.dropped)}

    def state_dict(self) -> list[Any]:
        return [g.state_dict() for g in self.waiting]

    def load_state_dict(self, state: Sequence[Any]) -> None:
        self.waiting = [PromptGroup.from_state(g) for g in state]
