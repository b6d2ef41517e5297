"""Discrete events: samplers decode, workers reward, trainers train, weights move; staleness is bounded.

Time advances from event to event on a heap. All sequences of a sampler advance by one token in each of its steps, so
between two events its state is a counter of steps and one heap of the counts at which sequences end.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scale.parts import Decoder, Lengths, elapsed, steps_in


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        decoder: A sampler.
        samplers: Number of samplers.
        batch: Groups of an update.
        group: Completions of a group (of one prompt).
        prompt: Tokens of a prompt.
        lengths: Distribution of completions.
        staleness: Most updates between the weights that sampled a token and those that train on it; 0: synchronous.
        train: Seconds of an update, from its tokens and the sum of their squared lengths.
        transfer: Seconds to move weights; samplers and trainers wait.
        hidden: True: the transfer is hidden behind decoding; only trainers wait.
        reward: Seconds of a worker for a completion.
        workers: Reward workers.
        recompute: True: keys and values are recomputed under new weights.
        failures: (seconds, part): part "trainer" or "sampler" is lost at this time.
        restart: Seconds until a lost part runs again.
        checkpoint: Updates between two checkpoints of the trainer.
    """

    decoder: Decoder
    samplers: int
    batch: int
    group: int
    prompt: int
    lengths: Lengths
    staleness: int
    train: Callable[[float, float], float]
    transfer: float
    hidden: bool = False
    reward: float = 0.0
    workers: int = 1
    recompute: bool = False
    failures: tuple[tuple[float, str], ...] = ()
    restart: float = 0.0
    checkpoint: int = 1


@dataclass(eq=False)
class Sequence:
    """A completion: its group, its length, tokens that are there, and (version, tokens) of its pieces."""

    group: int
    length: int
    done: int = 0
    pieces: list[tuple[int, int]] = field(default_factory=list)
    from_step: float = 0.0
    sampler: Any = None


@dataclass
class Group:
    """A prompt's completions: the version at which it was asked, and how many are not rewarded yet."""

    asked: int
    left: int
    sequences: list[Sequence] = field(default_factory=list)


@dataclass
class Update:
    """What an update was: times of its phases, tokens, staleness."""

    began: float
    trained: float
    ended: float
    completions: int
    tokens: int
    oldest: int
    stale_tokens: float


class Pool:
    """Workers that take jobs of equal length in the order of their arrival."""

    def __init__(self, workers: int, seconds: float) -> None:
        self.free = [0.0] * workers
        self.seconds, self.busy, self.waited = seconds, 0.0, 0.0

    def finish(self, now: float) -> float:
        """Return when a job that arrives now will be done."""
        start = max(now, heapq.heappop(self.free))
        heapq.heappush(self.free, start + self.seconds)
        self.busy += self.seconds
        self.waited += start - now
        return start + self.seconds


class Sampler:
    """Sequences that run, and those that wait; `steps` counts decoding steps."""

    def __init__(self, decoder: Decoder, prompt: int) -> None:
        self.decoder, self.prompt = decoder, prompt
        self.steps, self.at, self.stalled_until = 0.0, 0.0, 0.0
        self.running: list[tuple[float, int, Sequence]] = []
        self.waiting: deque[Sequence] = deque()
        self.cached, self.stamp, self.number = 0.0, 0, 0
        self.busy = self.sequence_seconds = 0.0
        self.changes: list[tuple[float, int]] = [(0.0, 0)]
        self.prefilled: set[int] = set()

    def advance(self, now: float) -> None:
        """Move to `now`: all running sequences get their tokens."""
        start = max(self.at, min(self.stalled_until, now))
        batch = len(self.running)
        if batch and now > start:
            first = self.decoder.step_seconds(batch)
            steps = steps_in(now - start, first, self.decoder.token_seconds, self.cached, batch)
            self.steps += steps
            self.cached += steps * batch
            self.busy += now - start
            self.sequence_seconds += (now - start) * batch
        self.at = max(self.at, now)

    def next_event(self) -> float:
        """Return when a sequence ends or the cache is full."""
        if not self.running:
            return float("inf")
        batch = len(self.running)
        steps = max(0.0, self.running[0][0] - self.steps)
        if batch > 1:
            steps = min(steps, max(0.0, (self.decoder.capacity - self.cached) / batch))
        first = self.decoder.step_seconds(batch)
        return max(self.at, self.stalled_until) + elapsed(steps, first, self.decoder.token_seconds, self.cached, batch)

    def stall(self, seconds: float) -> None:
        """Do something else than decoding for some time."""
        self.stalled_until = max(self.stalled_until, self.at) + seconds

    def admit(self) -> None:
        """Start waiting sequences while there is room in the cache; a group's prompt is computed once."""
        while self.waiting and len(self.running) < self.decoder.engine.most:
            sequence = self.waiting[0]
            context = self.prompt + sequence.done
            if self.running and self.cached + context > 0.95 * self.decoder.capacity:
                break
            self.waiting.popleft()
            fresh = 0 if sequence.group in self.prefilled else self.prompt
            self.prefilled.add(sequence.group)
            if fresh or sequence.done:
                self.stall(self.decoder.prefill_seconds(fresh + sequence.done))
            sequence.from_step, sequence.sampler = self.steps, self
            self.number += 1
            end = self.steps + sequence.length - sequence.done
            heapq.heappush(self.running, (end, self.number, sequence))
            self.cached += context

    def account(self, sequence: Sequence) -> None:
        """Note under which weights the tokens since the sequence started to run were sampled."""
        total = round(min(self.steps - sequence.from_step, sequence.length - sequence.done))
        begin, counted = sequence.from_step, 0
        index = max(0, bisect_right(self.changes, (begin, 1 << 60)) - 1)
        for i in range(index, len(self.changes)):
            end = self.changes[i + 1][0] if i + 1 < len(self.changes) else self.steps
            tokens = min(total, round(end - sequence.from_step)) - counted
            if tokens > 0:
                sequence.pieces.append((self.changes[i][1], tokens))
                counted += tokens
        if counted < total:
            sequence.pieces.append((self.changes[-1][1], total - counted))
        sequence.done += total

    def ended(self) -> list[Sequence]:
        """Take out the sequences that have all of their tokens."""
        out = []
        while self.running and self.running[0][0] <= self.steps + 1e-6:
            sequence = heapq.heappop(self.running)[2]
            self.account(sequence)
            self.cached -= self.prompt + sequence.length
            out.append(sequence)
        if not self.running:
            self.cached = 0.0
        return out

    def evict(self) -> None:
        """If the cache is full, let the sequences that began last wait; they keep their tokens."""
        if self.cached < (1 - 1e-6) * self.decoder.capacity:
            return
        self.running.sort(key=lambda entry: entry[2].from_step)
        while len(self.running) > 1 and self.cached > 0.95 * self.decoder.capacity:
            sequence = self.running.pop()[2]
            self.account(sequence)
            self.cached -= self.prompt + sequence.done
            self.waiting.appendleft(sequence)
        heapq.heapify(self.running)

    def lose(self) -> list[Sequence]:
        """Forget all tokens, as a lost process does; return the sequences, to be asked again."""
        lost = [entry[2] for entry in self.running] + list(self.waiting)
        for sequence in lost:
            sequence.done = 0
            sequence.pieces.clear()
        self.running.clear()
        self.waiting.clear()
        self.prefilled.clear()
        self.cached = 0.0
        return lost


def _load(sampler: Sampler) -> int:
    return len(sampler.running) + len(sampler.waiting)


class Run:
    """The simulation of a plan."""

    def __init__(self, plan: Plan, seed: int = 0) -> None:
        self.plan, self.rng = plan, np.random.default_rng(seed)
        self.samplers = [Sampler(plan.decoder, plan.prompt) for _ in range(plan.samplers)]
        self.pool = Pool(plan.workers, plan.reward)
        self.events: list[tuple[float, int, str, Any]] = []
        self.order = 0
        self.now, self.version = 0.0, 0
        self.groups: dict[int, Group] = {}
        self.complete: set[int] = set()
        self.asked = 0
        self.training: tuple[float, list[int]] | None = None
        self.updates: list[Update] = []
        self.lost_seconds = self.lost_tokens = 0.0
        self.epoch = self.turn = 0
        self.sending, self.down_until = False, 0.0
        for when, part in plan.failures:
            self.push(when, "failure", part)

    def push(self, when: float, kind: str, what: Any = None) -> None:
        self.order += 1
        heapq.heappush(self.events, (when, self.order, kind, what))

    def schedule(self, sampler: Sampler) -> None:
        """Ask for an event when the sampler's state changes next; earlier requests become void."""
        sampler.stamp += 1
        when = sampler.next_event()
        if when < float("inf"):
            self.push(when, "sampler", (sampler, sampler.stamp))

    def submit(self, sequences: Iterable[Sequence], sampler: Sampler) -> None:
        sampler.advance(self.now)
        sampler.waiting.extend(sequences)
        sampler.admit()

    def ask(self) -> None:
        """Ask for groups while fewer than (staleness + 1) batches are untrained."""
        touched = []
        while len(self.groups) < (self.plan.staleness + 1) * self.plan.batch:
            lengths = self.plan.lengths.draw(self.plan.group, self.rng)
            group = Group(self.version, self.plan.group, [Sequence(self.asked, int(n)) for n in lengths])
            self.groups[self.asked] = group
            self.asked += 1
            # The least loaded sampler takes the whole group, whose prompt it computes once.
            sampler = min(self.samplers, key=_load)
            self.submit(group.sequences, sampler)
            touched.append(sampler)
        for sampler in {id(s): s for s in touched}.values():
            self.schedule(sampler)

    def ready(self) -> list[int] | None:
        """Return the groups of the next update, or None if it has to wait.

        Groups that must be trained first are taken first. A group that was asked at version v is trained by the
        update of version v + staleness at the latest; as many of the groups with a deadline up to d have to be taken
        now as would not fit into the updates until d.
        """
        plan = self.plan
        if len(self.complete) < plan.batch:
            return None
        chosen = sorted(self.complete, key=lambda g: (self.groups[g].asked, g))[: plan.batch]
        for late in range(plan.staleness + 1):
            oldest = self.version - plan.staleness + late
            due = sum(group.asked <= oldest for group in self.groups.values()) - late * plan.batch
            if sum(self.groups[g].asked <= oldest for g in chosen) < due:
                return None
        return chosen

    def try_training(self) -> None:
        if self.training is not None or self.sending or self.now < self.down_until:
            return
        if (chosen := self.ready()) is not None:
            sequences = [s for g in chosen for s in self.groups[g].sequences]
            sizes = [self.plan.prompt + s.length for s in sequences]
            seconds = self.plan.train(float(sum(sizes)), float(sum(n * n for n in sizes)))
            self.training = (self.now, chosen)
            self.push(self.now + seconds, "trained", self.epoch)

    def trained(self) -> None:
        """Leave the groups, and send the new weights."""
        assert self.training is not None
        began, chosen = self.training
        oldest, stale, tokens = 0, 0.0, 0
        for g in chosen:
            for sequence in self.groups[g].sequences:
                oldest = max(oldest, self.version - min(v for v, _ in sequence.pieces))
                stale += sum((self.version - v) * n for v, n in sequence.pieces)
                tokens += sequence.length
            del self.groups[g]
            self.complete.discard(g)
        count = len(chosen) * self.plan.group
        ended = self.now + self.plan.transfer
        self.updates.append(Update(began, self.now, ended, count, tokens, oldest, stale / max(tokens, 1)))
        self.training, self.sending = None, True
        self.push(ended, "sent")
        if not self.plan.hidden:
            for sampler in self.samplers:
                sampler.advance(self.now)
                sampler.stall(self.plan.transfer)
                self.schedule(sampler)

    def sent(self) -> None:
        """Let samplers use the new weights, and ask for more."""
        self.version += 1
        self.sending = False
        for sampler in self.samplers:
            sampler.advance(self.now)
            sampler.changes.append((sampler.steps, self.version))
            if self.plan.recompute and sampler.cached:
                sampler.stall(self.plan.decoder.prefill_seconds(sampler.cached))
            self.schedule(sampler)
        self.ask()

    def sampler_event(self, sampler: Sampler) -> None:
        sampler.advance(self.now)
        for sequence in sampler.ended():
            self.push(self.pool.finish(self.now), "rewarded", sequence)
        sampler.evict()
        sampler.admit()
        self.schedule(sampler)

    def rewarded(self, sequence: Sequence) -> None:
        group = self.groups[sequence.group]
        group.left -= 1
        if not group.left:
            self.complete.add(sequence.group)

    def fail(self, part: str) -> None:
        """Lose a sampler, whose requests others get, or the trainer, which repeats updates since its checkpoint."""
        if part == "sampler":
            sampler = self.samplers[self.turn % len(self.samplers)]
            self.turn += 1
            sampler.advance(self.now)
            self.lost_tokens += sampler.cached
            lost = sampler.lose()
            sampler.stall(self.plan.restart)
            self.schedule(sampler)
            others = [s for s in self.samplers if s is not sampler] or [sampler]
            for sequence in lost:
                other = min(others, key=_load)
                self.submit([sequence], other)
                self.schedule(other)
            return
        repeated = self.updates[len(self.updates) - len(self.updates) % self.plan.checkpoint :]
        seconds = self.plan.restart + sum(u.trained - u.began for u in repeated)
        self.lost_seconds += seconds
        if self.training is None:
            self.down_until = self.now + seconds
            self.push(self.down_until, "retry")
        else:  # the update in progress begins anew
            self.epoch += 1
            _, chosen = self.training
            self.training = None
            sizes = [self.plan.prompt + s.length for g in chosen for s in self.groups[g].sequences]
            again = self.plan.train(float(sum(sizes)), float(sum(n * n for n in sizes)))
            self.training = (self.now + seconds, chosen)
            self.push(self.now + seconds + again, "trained", self.epoch)

    def go(self, updates: int) -> Run:
        """Simulate until so many updates are done; more may be simulated later."""
        if not self.asked:
            self.ask()
        while len(self.updates) < updates:
            self.now, _, kind, what = heapq.heappop(self.events)
            if kind == "sampler":
                sampler, stamp = what
                if stamp == sampler.stamp:
                    self.sampler_event(sampler)
            elif kind == "rewarded":
                self.rewarded(what)
            elif kind == "trained":
                if what == self.epoch:
                    self.trained()
            elif kind == "sent":
                self.sent()
            elif kind == "failure":
                self.fail(what)
            self.try_training()
        return self


def measured(plan: Plan, updates: int, seed: int = 0) -> dict[str, float]:
    """Return rates and shares of a run in its steady state.

    Args:
        plan: The run.
        updates: Updates that are measured, or the next multiple of staleness + 1: as many are asked for at once in the
            beginning, and they end in bursts. As many as are in flight, and two more, are not measured.
        seed: Of the lengths.

    Returns:
        completions and tokens per second, seconds of an update, shares of the time in which trainers train and weights
        move, sequences that a sampler runs on average, mean and largest staleness of tokens, busy reward workers.
    """
    updates += -updates % (plan.staleness + 1)
    skipped = plan.staleness + 2
    run = Run(plan, seed).go(skipped)
    before, first = _used(run), run.now
    run.go(skipped + updates)
    after, last = _used(run), run.now
    kept, span = run.updates[skipped:], last - first
    return {
        "completions per second": sum(u.completions for u in kept) / span,
        "tokens per second": sum(u.tokens for u in kept) / span,
        "seconds per update": span / len(kept),
        "trainers busy": sum(u.trained - u.began for u in kept) / span,
        "transfer": plan.transfer * len(kept) / span,
        "samplers busy": (after[0] - before[0]) / span / plan.samplers,
        "sequences per sampler": (after[1] - before[1]) / span / plan.samplers,
        "rewards busy": (after[2] - before[2]) / span / plan.workers,
        "mean staleness": float(np.mean([u.stale_tokens for u in kept])),
        "largest staleness": max(u.oldest for u in kept),
    }


def _used(run: Run) -> tuple[float, float, float]:
    for sampler in run.samplers:
        sampler.advance(run.now)
        run.schedule(sampler)
    return sum(s.busy for s in run.samplers), sum(s.sequence_seconds for s in run.samplers), run.pool.busy
