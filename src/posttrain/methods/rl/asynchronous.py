"""Asynchronous RL: the rollouts of coming steps are collected in threads while the policy is trained.

The prompts and random streams of a step are those of the synchronous run. Step s is begun once the weights have at
least version s - max_staleness (version v: after v steps), so that no token of it is older when it is trained on, and
steps are trained on in order: no prompt is left out because its completions take long. What is in flight is in the
checkpoint: whole batches, and of the others the prompts whose completions have all ended.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import torch

from posttrain.config import SamplingConfig
from posttrain.config.rl import RLConfig
from posttrain.core.errors import PosttrainError
from posttrain.core.progress import Phases, Track
from posttrain.data.prompts import RenderedPrompt
from posttrain.methods.rl.collect_rollouts import PromptGroup, RolloutBatch, RolloutCollector
from posttrain.methods.rl.hooks import Hook
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.behaviour_sampler import BehaviourSampler
from posttrain.sampling.protocol import Sampler
from posttrain.sampling.remembering_sampler import RememberingSampler
from posttrain.sampling.replay_buffer import oldest


@dataclass(frozen=True)
class _Collected:
    """Hold the finished batch of a step, and how much was sampled for it."""

    batch: RolloutBatch
    samples: int
    tokens: int


@dataclass(frozen=True)
class _InFlight:
    """Hold a step that is being collected.

    Attributes:
        step: Its number.
        sampling: How its completions are drawn.
        sampler: Knows the groups that are complete.
        result: The batch, or the error that ended it.
    """

    step: int
    sampling: SamplingConfig
    sampler: RememberingSampler
    result: Future[_Collected]

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        state: dict[str, Any] = {"step": self.step, "temperature": self.sampling.temperature}
        if not self.result.done() or self.result.exception() is not None:
            return state | {"sampled": self.sampler.state_dict()}
        found = self.result.result()
        groups = [g.state_dict() for g in found.batch.groups]
        counts = {"samples": found.samples, "tokens": found.tokens}
        return state | {"groups": groups, "metrics": dict(found.batch.metrics), **counts}


class AsynchronousCollector(RolloutCollector):
    """Collect the groups of a step, and begin those of the steps that follow."""

    def __init__(
        self,
        config: RLConfig,
        sampler: Sampler,
        answered: Sampler,
        rewards: RewardStack,
        questions: Sequence[RenderedPrompt],
        seed: int,
        *,
        behaviour: BehaviourSampler,
        hooks: Sequence[Hook] = (),
        tokenizer: Any = None,
    ) -> None:
        """Make a collector; `close` ends its threads.

        Args:
            config: Settings of the stage.
            sampler: Samples with the policy itself, for held-out problems and greedy baselines.
            answered: Samples what is trained on: `behaviour`, with the environment around it if there is one.
            rewards: Score the completions.
            questions: Prompts to draw from.
            seed: Seed of the draws and of every random stream.
            behaviour: Gets the policy's weights.
            hooks: Optional features, in the order in which they are called.
            tokenizer: Joins the pieces of partial rollouts.
        """
        super().__init__(config, sampler, rewards, questions, seed, hooks=hooks, tokenizer=tokenizer)
        self.answered, self.behaviour, self.tokenizer = answered, behaviour, tokenizer
        self.ahead, self.steps = config.ahead, config.steps
        self.growth = replace(self.growth, versioned=self.ahead > 0)
        self.flights: dict[int, _InFlight] = {}
        self.restored: dict[int, Mapping[str, Any]] = {}
        threads = torch.get_num_threads()  # another number would round the products of rewards differently
        self._threads = ThreadPoolExecutor(
            self.ahead + 1, "posttrain-rollouts", initializer=torch.set_num_threads, initargs=(threads,)
        )
        self._timing: dict[str, float] = {}
        self._last: tuple[float, float] | None = None

    def collect(self, step: int, sampling: SamplingConfig, phases: Phases) -> RolloutBatch:
        """Return the groups of a step, complete and scored; coming steps are begun with the newest weights.

        Args:
            step: Number of the step: the version of the policy's weights.
            sampling: How completions of the steps that are begun are drawn.
            phases: Times the waiting.
        """
        if self._last is None:
            self._last = time.perf_counter(), self.behaviour.measured()[0]
        ready = sum(f.result.done() for f in self.flights.values())
        with phases("wait"):  # workers that are processes take weights once they have answered
            self.behaviour.publish(step)
        for number in range(step, min(step + self.ahead, self.steps - 1) + 1):
            if number not in self.flights:
                self.flights[number] = self._begin(number, sampling)
                ready += self.flights[number].result.done()  # a checkpoint had it
        with phases("wait"):
            found = self._wait_for(step)
            stale = _stale(found.batch.groups, step - self.ahead) if self.ahead else 0
            if stale:  # of a checkpoint that was written when more was allowed
                self.flights[step] = self._begin(step, sampling)
                found = self._wait_for(step)
        self.samples, self.tokens = found.samples, found.tokens
        del self.flights[step]
        self._measure(ready, phases.seconds["wait"])
        metrics = {"stale_completions": float(stale)} if self.ahead else {}
        return RolloutBatch(found.batch.groups, {**found.batch.metrics, **metrics})

    def _begin(self, step: int, sampling: SamplingConfig) -> _InFlight:
        """Start collecting a step, from what a checkpoint has of it."""
        state = self.restored.pop(step, {})
        if state:
            sampling = sampling.model_copy(update={"temperature": state["temperature"]})
        sampler = RememberingSampler(self.answered, RememberingSampler.from_state(state.get("sampled", ())))
        if "groups" in state:
            batch = RolloutBatch(tuple(PromptGroup.from_state(g) for g in state["groups"]), state["metrics"])
            done: Future[_Collected] = Future()
            done.set_result(_Collected(batch, state["samples"], state["tokens"]))
            return _InFlight(step, sampling, sampler, done)
        assert isinstance(self.config, RLConfig)
        # Ahead of each other, steps must not share what a hook counts within a step.
        hooks = [copy.copy(h) for h in self.hooks] if self.ahead else self.hooks
        collector = RolloutCollector(
            self.config, sampler, self.rewards, self.questions, self.seed,
            hooks=hooks, tokenizer=self.tokenizer, at_once=self.ahead > 0,
        )  # fmt: skip
        collector.growth = self.growth

        def collect() -> _Collected:
            batch = collector.collect(step, sampling, Phases(Track("", 1, shown=False)))
            return _Collected(batch, collector.samples, collector.tokens)

        return _InFlight(step, sampling, sampler, self._threads.submit(collect))

    def _wait_for(self, step: int) -> _Collected:
        """Return a step's batch once it is there; an error in any step that is in flight ends the run at once."""
        wanted = self.flights[step].result
        while True:
            for number, flight in self.flights.items():
                if flight.result.done() and (error := flight.result.exception()) is not None:
                    if not isinstance(error, PosttrainError):
                        error.add_note(
                            f"This happened while the rollouts of step {number + 1} were collected, in a thread. The "
                            "same command resumes from the last checkpoint."
                        )
                    raise error
            if wanted.done():
                return wanted.result()
            wait([f.result for f in self.flights.values() if not f.result.done()], return_when=FIRST_COMPLETED)

    def _measure(self, ready: int, waited: float) -> None:
        """Keep what timings.jsonl gets: how long the learner and the sampler were idle, and how much waits."""
        assert self._last is not None
        now, (busy, asked), (began, before) = time.perf_counter(), self.behaviour.measured(), self._last
        self._last = now, busy
        idle = {"learner_idle_seconds": waited, "sampler_idle_seconds": max(0.0, now - began - (busy - before))}
        batches = {"batches_ready": float(ready), "batches_in_flight": float(len(self.flights))}
        self._timing = {**idle, **batches, "completions_in_flight": float(asked)}

    def timing(self) -> dict[str, float]:
        return self._timing

    def state_dict(self) -> dict[str, Any]:
        flights = {f.step: f.state_dict() for f in self.flights.values()}
        in_flight = {**self.restored, **flights}
        return super().state_dict() | {"in_flight": [in_flight[step] for step in sorted(in_flight)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.restored = {int(s["step"]): s for s in state.get("in_flight", ())}

    def close(self) -> None:
        """Wait until every thread has ended; what samples must be closed before."""
        self._threads.shutdown(wait=True, cancel_futures=True)


def _stale(groups: Sequence[PromptGroup], version: int) -> int:
    """Return how many completions have a token that was sampled with weights older than `version`."""
    return sum(oldest(r, version) < version for g in groups for r in g.rollouts)
