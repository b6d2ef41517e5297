"""The groups of a step: problems drawn, completions sampled and judged; long ones are under way for several steps.

Everything is a function of (seed, step), the weights, and what `Gatherer.numbers` puts into the checkpoint.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from posttrain.config import RLConfig, SamplingConfig
from posttrain.core import distributed
from posttrain.core.progress import Phases
from posttrain.core.types import RolloutGroup
from posttrain.data.prompts import RenderedPrompt
from posttrain.methods.rl.curriculum import Curriculum
from posttrain.methods.rl.exploration import allot
from posttrain.methods.rl.gathering import Gathering
from posttrain.rewards.stack import Excluded, RewardStack, Scored
from posttrain.sampling.protocol import Request, Sampler
from posttrain.sampling.replay_buffer import PARTIAL, Growth, Replay, oldest


class Gatherer:
    """Makes a step's groups. What it remembers: what is known of problems, rare successes, completions under way.

    tokenizer: joins the pieces of completions that are carried over.
    """

    def __init__(
        self,
        config: RLConfig,
        sampler: Sampler,
        rewards: RewardStack,
        questions: Sequence[RenderedPrompt],
        seed: int,
        tokenizer: Any = None,
    ) -> None:
        self.config, self.sampler, self.rewards = config, sampler, rewards
        self.questions, self.seed = questions, seed
        self.curriculum = Curriculum(config.curriculum, len(questions)) if config.curriculum else None
        self.replay = Replay(config.replay, config.max_staleness) if config.replay else None
        self.carried: list[Gathering] = []
        self.counted: Counter[str] = Counter()
        """Of the step at hand."""
        context = int(getattr(sampler, "context", 2**31))
        self.growth = Growth(
            config.carry, config.sampler, context, lambda t, plain: tokenizer.decode(t, skip_special_tokens=plain)
        )

    def gather(self, step: int, now: RLConfig, phases: Phases) -> tuple[list[Gathering], dict[str, float]]:
        """(groups, whole and judged; what exploration did). now: the settings, with what is steered as it stands."""
        self.counted = Counter()
        waiting, self.carried = self.carried, []
        if self.replay is not None:
            self.counted["replay_dropped"] = self.replay.expire(step)
        chosen = self.problems(step, 0)
        drawn, expected = len(chosen), self._expected(chosen)
        ready = self._attempt(chosen, (step, 0), now, phases, waiting)
        for redraw in range(1, self.config.redraws + 1):
            flat = [i for i, g in enumerate(ready) if not g.mixed]
            if not flat:
                break
            fresh = self.problems(step, redraw)[: len(flat)]
            drawn += len(fresh)
            more = [g for g in self._attempt(fresh, (step, redraw), now, phases) if g.mixed]
            for i, g in zip(flat, more, strict=False):
                ready[i] = g
        return ready, {"drawn": float(drawn), **expected, **self._accounts(ready, step)}

    def problems(self, step: int, redraw: int) -> list[int]:
        """Every epoch a fresh permutation, or by the curriculum; what is drawn again comes from a stream of its own."""
        count, size = len(self.questions), self.config.prompts_per_step
        if self.curriculum is not None:
            chosen = self.curriculum.draw(np.random.default_rng([self.seed, 3, step, redraw]), size)
        elif redraw:
            rng = np.random.default_rng([self.seed, 1, step, redraw])
            chosen = [int(i) for i in rng.choice(count, size, replace=count < size)]
        else:
            places = range(step * size, (step + 1) * size)
            epochs = {p // count for p in places}
            orders = {e: np.random.default_rng([self.seed, 0, e]).permutation(count) for e in epochs}
            chosen = [int(orders[p // count][p % count]) for p in places]
        if self.replay is not None and not redraw:
            known = [p for p in self.replay.kept if p not in chosen]
            again = min(int(self.replay.config.share * size), len(known))
            if again:  # they take the places of others
                picked = np.random.default_rng([self.seed, 4, step]).choice(known, again, replace=False)
                chosen[-again:] = [int(i) for i in picked]
        return chosen

    def _attempt(
        self,
        chosen: Sequence[int],
        salt: tuple[int, int],
        now: RLConfig,
        phases: Phases,
        waiting: Sequence[Gathering] = (),
    ) -> list[Gathering]:
        """Sample and judge the chosen problems, and go on with those that wait; the groups that are whole, in order.

        salt: step and redraw. A problem that is there twice has streams of its own each time. The rest is carried.
        """
        begun = [Gathering(i, salt[0]) for i in chosen]
        there = [*waiting, *begun]
        first = now.allocate.first if now.allocate is not None else now.group_size
        self._grow(there, [0] * len(waiting) + [first] * len(begun), salt, now.sampler, phases)
        self._score(there, phases)
        if now.allocate is not None:
            self._allocate(there, len(begun), salt, now, phases)
        ready = [g for g in there if g.whole and g.rollouts]
        self.carried += [g for g in there if not g.whole]
        for g in ready:
            if self.curriculum is not None:
                self.curriculum.record(g.problem, g.successes(now.success), len(g.kept))
            if self.replay is not None:
                again = self.replay.visit(g.problem, g.kept, now.success)
                g.replayed = [] if again is None else [again]
        return ready

    def _grow(
        self,
        there: Sequence[Gathering],
        new: Sequence[int],
        salt: tuple[int, ...],
        sampling: SamplingConfig,
        phases: Phases,
    ) -> None:
        """Sample: `new` completions of each, and the next piece of those that an earlier step left unfinished."""
        step, growth = salt[0], self.growth
        partial = [
            (g, i) for g in there for i, r in enumerate(g.rollouts) if r.finish == PARTIAL and r.pieces[-1].step < step
        ]
        begin = [(g, n) for g, n in zip(there, new, strict=True) if n]
        requests = []
        for (g, i), seed in zip(partial, self._streams(5, salt, len(partial)), strict=True):
            question, before = self.questions[g.problem], g.rollouts[i]
            tokens = [*question.tokens, *before.tokens]
            requests.append(Request(tokens, 1, seed, question.problem, growth.asked(before)))
        for (g, n), seed in zip(begin, self._streams(2, salt, len(begin)), strict=True):
            question = self.questions[g.problem]
            requests.append(Request(question.tokens, n, seed, question.problem, growth.asked()))
        groups = sample(self.sampler, requests, sampling, phases)
        for (g, i), group in zip(partial, groups, strict=False):
            length = len(self.questions[g.problem].tokens)
            g.rollouts[i] = growth.grown(length, g.rollouts[i], group.rollouts[0], step, sampling.temperature)
        for (g, _), group in zip(begin, groups[len(partial) :], strict=True):
            length = len(group.prompt)
            g.rollouts += [growth.grown(length, None, r, step, sampling.temperature) for r in group.rollouts]
        self.counted["samples"] += sum(new)
        self.counted["tokens"] += sum(r.length for group in groups for r in group.rollouts)
        for g in there:
            if self._last(g, step):
                self.counted["carry_dropped"] += g.drop()

    def _last(self, gathering: Gathering, step: int) -> bool:
        """Whether the group can't go on in the next step: it would be too old."""
        return step + 1 - gathering.born > self.config.max_staleness

    def _streams(self, kind: int, salt: tuple[int, ...], count: int) -> list[int]:
        """Seeds of that many random streams."""
        return [int(s) for s in np.random.SeedSequence([self.seed, kind, *salt]).generate_state(count, np.uint64)]

    def _score(self, there: Sequence[Gathering], phases: Phases) -> None:
        """Judge the groups that are whole, or what has come to them since."""
        todo = [g for g in there if g.whole and g.judged < len(g.rollouts)]
        with phases("reward"):
            outcome = judge(self.rewards, [g.unjudged(self.questions[g.problem]) for g in todo])
        for n, g in enumerate(todo):
            g.judge(outcome.groups[n], [e for e in outcome.excluded if e.group == n])

    def _allocate(
        self, there: Sequence[Gathering], begun: int, salt: tuple[int, int], now: RLConfig, phases: Phases
    ) -> None:
        """The rest of the budget of the `begun` groups, in rounds, to them and to what was carried and has no success.

        Groups that are not whole get nothing: their outcome isn't known yet.
        """
        assert now.allocate is not None
        first, most = now.allocate.first, now.allocate.most or 4 * now.group_size
        left, round_ = begun * (now.group_size - first), 0
        while left > 0:
            round_ += 1
            done = [g.successes(now.success) for g in there]
            old = [g.born < salt[0] and (s > 0 or self._last(g, salt[0])) for g, s in zip(there, done, strict=True)]
            closed = [not g.whole or not g.rollouts or o for g, o in zip(there, old, strict=True)]
            counts = [most if shut else len(g.rollouts) for g, shut in zip(there, closed, strict=True)]
            more = allot(done, counts, left, first, most)
            if not any(more):
                break
            if round_ == 1:
                self.counted["hard"] += sum(not s and n > 0 for s, n in zip(done, more, strict=True))
            self._grow(there, more, (*salt, round_), now.sampler, phases)
            self._score(there, phases)
            left -= sum(more)

    def _expected(self, chosen: Sequence[int]) -> dict[str, float]:
        """What the curriculum knows before the step."""
        if self.curriculum is None:
            return {}
        expected = float(self.curriculum.estimates()[list(chosen)].mean())
        return {"expected_success": expected, "problems_asked": float((self.curriculum.answers > 0).sum())}

    def _accounts(self, ready: Sequence[Gathering], step: int) -> dict[str, float]:
        """What was done in the step; nothing of what is off."""
        config, out = self.config, {}
        names = ["samples"]
        if config.allocate is not None:
            out["largest_group"] = float(max((len(g.rollouts) for g in ready), default=0))
            names += ["hard"]
        if self.replay is not None:
            out["replayed"] = float(sum(len(g.replayed) for g in ready))
            out["replay_kept"] = float(len(self.replay.kept))
            names += ["replay_dropped"]
        if config.carry is not None:
            out["carried"] = float(sum(r.finish == PARTIAL for g in self.carried for r in g.rollouts))
            names += ["carry_dropped"]
        ages = [step - oldest(r, step) for g in ready for r in [*g.kept, *g.replayed]]
        if config.off_policy and ages:
            out.update(staleness_mean=statistics.fmean(ages), staleness_max=float(max(ages)))
        return out | {name: float(self.counted[name]) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, for a checkpoint."""
        return {
            "curriculum": self.curriculum.state_dict() if self.curriculum is not None else None,
            "replay": self.replay.state_dict() if self.replay is not None else None,
            "carried": [g.state_dict() for g in self.carried],
        }

    def load_state_dict(self, numbers: dict[str, Any]) -> None:
        """Take it back."""
        if self.curriculum is not None:
            self.curriculum.load_state_dict(numbers["curriculum"])
        if self.replay is not None:
            self.replay.load_state_dict(numbers["replay"])
        self.carried = [Gathering.of(g) for g in numbers["carried"]]


def sample(
    sampler: Sampler, requests: Sequence[Request], sampling: SamplingConfig, phases: Phases
) -> list[RolloutGroup]:
    """The sampler's groups, with progress (of this rank); ranks sample a part each."""
    total, done = -(-sum(r.n for r in requests) // distributed.world()), 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        if done % 8 == 0:
            phases.track.phase(f"sampling {done}/{total}")

    with phases("sample"):
        return distributed.map_over_ranks(requests, lambda mine: sampler.sample(mine, sampling, count))


def judge(rewards: RewardStack, groups: Sequence[RolloutGroup]) -> Scored:
    """The groups with their rewards; ranks judge a part each, and metrics are of this one's."""
    if distributed.world() == 1:
        return rewards(groups)
    metrics: dict[str, float] = {}

    def part(mine: list[RolloutGroup]) -> list[tuple[RolloutGroup, list[Excluded]]]:
        scored = rewards(mine)
        metrics.update(scored.metrics)
        return [(g, [e for e in scored.excluded if e.group == i]) for i, g in enumerate(scored.groups)]

    found = distributed.map_over_ranks(groups, part)
    excluded = [replace(e, group=g) for g, (_, failed) in enumerate(found) for e in failed]
    return Scored([group for group, _ in found], excluded, metrics)
