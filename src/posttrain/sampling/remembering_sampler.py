"""A sampler that keeps the groups that are complete, so that they are not sampled again after an interruption."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.config import SamplingConfig
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.sampling.protocol import OnDone, Request, Sampler
from posttrain.sampling.replay_buffer import rollout_from_json, rollout_to_json


class RememberingSampler:
    """Ask another sampler once for each request: requests are told apart by seed, prompt and number of completions.

    The seed is not enough: which prompts get more completions may depend on rewards, and they may differ when they are
    called again.

    Attributes:
        groups: Completions of each request that is complete, by its `request_key`.
    """

    def __init__(self, sampler: Sampler, groups: Mapping[tuple[int, str], Sequence[Rollout]] | None = None) -> None:
        """Make a sampler.

        Args:
            sampler: Samples what is not known.
            groups: What is known.
        """
        self.sampler, self.groups = sampler, dict(groups or {})
        self._lock = threading.Lock()

    def sample(
        self, requests: Sequence[Request], params: SamplingConfig, on_done: OnDone | None = None
    ) -> list[RolloutGroup]:
        """Return one group for each request, in their order.

        Args:
            requests: The prompts.
            params: How tokens are drawn.
            on_done: Called as each completion ends.
        """
        missing = [i for i, r in enumerate(requests) if request_key(r) not in self.groups]
        ended: list[dict[int, Rollout]] = [{} for _ in missing]

        def take(index: int, number: int, rollout: Rollout) -> None:
            request, of = requests[missing[index]], ended[index]
            of[number] = rollout
            if len(of) == request.n:
                self._keep(request, [of[j] for j in range(request.n)])
            if on_done is not None:
                on_done(missing[index], number, rollout)

        if missing:
            found = self.sampler.sample([requests[i] for i in missing], params, take)
            for i, group in zip(missing, found, strict=True):
                self._keep(requests[i], group.rollouts)
        return [RolloutGroup(r.tokens, r.example, list(self.groups[request_key(r)])) for r in requests]

    def _keep(self, request: Request, rollouts: Sequence[Rollout]) -> None:
        with self._lock:
            self.groups[request_key(request)] = rollouts

    def state_dict(self) -> list[Any]:
        """Return what is known so far, as plain values."""
        with self._lock:
            known = list(self.groups.items())
        return [[*key, [rollout_to_json(r) for r in rollouts]] for key, rollouts in known]

    @staticmethod
    def from_state(state: Sequence[Any]) -> dict[tuple[int, str], list[Rollout]]:
        """Return the groups of `state_dict`; those of a checkpoint that knew seeds alone are asked for again."""
        known = [entry for entry in state if len(entry) == 3]
        return {(int(seed), str(of)): [rollout_from_json(r) for r in rollouts] for seed, of, rollouts in known}


def request_key(request: Request) -> tuple[int, str]:
    """Return what a request is told apart by: its seed, and a hash of its number of completions and its tokens."""
    content = f"{request.n} {list(request.tokens)}".encode()
    return request.seed, hashlib.blake2b(content, digest_size=16).hexdigest()
