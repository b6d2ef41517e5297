"""A stack of rewards: every part of every rollout, their weighted sum, and an account of what failed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from posttrain.config.rewards import RewardConfig, RewardsConfig
from posttrain.core.errors import RewardError
from posttrain.core.types import Rollout, RolloutGroup, Step
from posttrain.rewards.outcome import LabelError, Outcome, attempt
from posttrain.rewards.token_spans import token_spans, tokens_of
from posttrain.rewards.verifiers import Component, component
from posttrain.rewards.worker_pool import Call, Pool

SHOWN = 3
"""Failures of a reward that are kept with message and traceback."""
NOT_SAMPLED = "sampling"
"""Stands for the reward's name where a rollout came with finish ``error``, and was not judged."""


@dataclass(frozen=True, slots=True)
class Excluded:
    """A rollout that got no reward. group, index: where it stood. reward: name of the first part that failed."""

    group: int
    index: int
    rollout: Rollout
    reward: str
    failure: str
    message: str


@dataclass(frozen=True, slots=True)
class Scored:
    """groups: as they came, each rollout with its rewards, those in `excluded` left out (a group may end up empty).
    metrics: of this call, flat; counts of failures are there when they are 0."""

    groups: list[RolloutGroup]
    excluded: list[Excluded]
    metrics: dict[str, float]


@dataclass
class Account:
    """What one reward did since the stack was built. first: its first failures, and where they were."""

    scored: int = 0
    errors: int = 0
    timeouts: int = 0
    died: int = 0
    first: list[dict[str, Any]] = field(default_factory=list)

    @property
    def cut_off(self) -> int:
        return self.timeouts + self.died


COUNTS = ("scored", "errors", "timeouts", "died")


class RewardStack:
    """Rewards built from their settings; call it with groups.

    functions: callables by name, for parts that name one instead of an import path; they run in this process, without
    a time limit. tokenizer: finds the tokens of what judges steps; without it these give their means alone, and no
    rollout's `steps`. Raises RewardError at once where a part can't be built.
    """

    def __init__(
        self,
        config: RewardsConfig | Sequence[RewardConfig],
        functions: Mapping[str, Callable[..., Any]] | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config if isinstance(config, RewardsConfig) else RewardsConfig(parts=list(config))
        self.parts: list[Component] = [component(p, functions or {}) for p in self.config.parts]
        self.accounts = {p.name: Account() for p in self.parts}
        isolated = [p for p in self.parts if p.isolated]
        self._slot = {p.name: i for i, p in enumerate(isolated)}
        specs = [p.config.model_dump(mode="json") for p in isolated]
        self.pool = Pool(specs, self.config.workers) if isolated else None

    def __enter__(self) -> RewardStack:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes."""
        if self.pool is not None:
            self.pool.close()

    def state_dict(self) -> dict[str, dict[str, int]]:
        """How much was scored and failed so far, for a checkpoint: limits hold over a run, however often it stops."""
        return {name: {n: getattr(a, n) for n in COUNTS} for name, a in self.accounts.items()}

    def load_state_dict(self, numbers: Mapping[str, Mapping[str, int]]) -> None:
        """Take it back; a part that isn't in it begins anew."""
        self.accounts = {p.name: Account() for p in self.parts}
        for name, counts in numbers.items():
            if name in self.accounts:
                self.accounts[name] = Account(first=[], **counts)

    def __call__(self, groups: Sequence[RolloutGroup]) -> Scored:
        """Score every rollout by every part.

        A rollout that a part failed on gets no reward: it is left out of its group and listed in `excluded`, with the
        parts that worked in its `rewards` and reward NaN. Raises RewardError where a part failed as often as the
        settings allow, or has never once worked.
        """
        outcomes = self._outcomes(groups)
        scored, excluded = [], []
        for g, group in enumerate(groups):
            kept = []
            for i, rollout in enumerate(group.rollouts):
                if rollout.finish == "error":
                    excluded.append(
                        Excluded(g, i, replace(rollout, reward=math.nan), NOT_SAMPLED, "error", rollout.text)
                    )
                    continue
                each = {p.name: outcomes[p.name][g][i] for p in self.parts}
                values = {name: o.value for name, o in each.items() if o.value is not None}
                bad = next((name for name, o in each.items() if o.failure), None)
                if bad is None:
                    total = sum(p.weight * values[p.name] for p in self.parts if p.name in values)
                    kept.append(replace(rollout, rewards=values, reward=total, steps=self._steps(rollout, each)))
                else:
                    marked = replace(rollout, rewards=values, reward=math.nan)
                    excluded.append(Excluded(g, i, marked, bad, each[bad].failure or "", each[bad].message))
            scored.append(replace(group, rollouts=kept))
        before = {name: (a.errors, a.timeouts, a.died) for name, a in self.accounts.items()}
        self._count(outcomes)
        self._judge()
        return Scored(scored, excluded, self._metrics(scored, excluded, outcomes, before))

    def _steps(self, rollout: Rollout, each: Mapping[str, Outcome]) -> dict[str, list[Step]]:
        """The tokens of the steps that were judged, by reward; a step without a token (behind the text) is left out."""
        judged = {name: o.steps for name, o in each.items() if o.steps is not None}
        if not judged or self.tokenizer is None:
            return {}
        spans = token_spans(self.tokenizer, rollout.tokens, rollout.text)
        out: dict[str, list[Step]] = {}
        for name, steps in judged.items():
            found = [(*tokens_of(spans, start, end), score) for start, end, score in steps]
            out[name] = [step for step in found if step[1] > step[0]]
        return out

    def _outcomes(self, groups: Sequence[RolloutGroup]) -> dict[str, list[dict[int, Outcome]]]:
        """By part and group, the outcome of each rollout that was sampled, by its place."""
        there = [[i for i, r in enumerate(g.rollouts) if r.finish != "error"] for g in groups]
        results: dict[str, list[dict[int, Outcome]]] = {p.name: [{} for _ in groups] for p in self.parts}
        calls: list[Call] = []
        targets: list[tuple[str, int, list[int]]] = []
        for part in self.parts:
            if part.form == "batch":
                self._batches(part, groups, there, results[part.name])
                continue
            for g, group in enumerate(groups):
                for places in [there[g]] if part.form == "group" else [[i] for i in there[g]]:
                    if not places:
                        continue
                    if part.config.kind == "self_consistency" and len(group.rollouts) == 1:
                        # A single answer was asked for (a held-out problem's): nothing to agree with, and no fault.
                        results[part.name][g][places[0]] = Outcome()
                        continue
                    args, count = _arguments(part, group, places)
                    if part.isolated:
                        limit = part.config.timeout * (count or 1)
                        calls.append(Call(self._slot[part.name], args, count, limit))
                        targets.append((part.name, g, places))
                    else:
                        assert part.function is not None
                        got = attempt(part.function, args, count, part.stepwise)
                        results[part.name][g].update(zip(places, got, strict=True))
        if self.pool is not None and calls:
            for (name, g, places), got in zip(targets, self.pool.run(calls), strict=True):
                results[name][g].update(zip(places, got, strict=True))
        return results

    def _batches(
        self, part: Component, groups: Sequence[RolloutGroup], there: list[list[int]], into: list[dict[int, Outcome]]
    ) -> None:
        """Score pairs of prompt and completion, some at a time; where a batch raises, each of its pairs by itself."""
        column, size = getattr(part.config, "prompt", "prompt"), getattr(part.config, "batch_size", 64)
        pairs: list[tuple[int, int, Any, str]] = []
        for g, group in enumerate(groups):
            if group.example.get(column) is None:
                error = LabelError(
                    f"the example has no {column!r} to score a completion by; it has {sorted(group.example)}"
                )
                into[g].update({i: Outcome(failure="error", message=f"LabelError: {error}") for i in there[g]})
            else:
                pairs.extend((g, i, group.example[column], group.rollouts[i].text) for i in there[g])
        assert part.function is not None
        for start in range(0, len(pairs), size):
            batch = pairs[start : start + size]
            got = attempt(part.function, ([p[2] for p in batch], [p[3] for p in batch]), len(batch), part.stepwise)
            if len(batch) > 1 and all(o.failure and o.trace for o in got):
                got = [attempt(part.function, ([p[2]], [p[3]]), 1, part.stepwise)[0] for p in batch]
            for (g, i, _, _), outcome in zip(batch, got, strict=True):
                into[g][i] = outcome

    def _count(self, outcomes: Mapping[str, list[dict[int, Outcome]]]) -> None:
        for name, of_groups in outcomes.items():
            account = self.accounts[name]
            for g, of_rollouts in enumerate(of_groups):
                for i, o in sorted(of_rollouts.items()):
                    account.scored += o.value is not None
                    account.errors += o.failure == "error"
                    account.timeouts += o.failure == "timeout"
                    account.died += o.failure == "died"
                    if o.failure and len(account.first) < SHOWN:
                        shown = {"group": g, "rollout": i, "failure": o.failure, "message": o.message, "trace": o.trace}
                        account.first.append(shown)

    def _judge(self) -> None:
        """Raise RewardError where a reward failed too often."""
        for name, a in self.accounts.items():
            never = not a.scored and bool(a.errors or a.cut_off)
            errors = self.config.on_error == "stop" and a.errors >= self.config.max_errors
            cuts = self.config.on_timeout == "stop" and a.cut_off >= self.config.max_errors
            if never or errors or cuts:
                why = "has not worked once" if never else "failed too often"
                raise RewardError(
                    f"reward {name!r} {why}: {a.errors} errors, {a.timeouts} timed out, {a.died} died, {a.scored} "
                    f"scored\n{self.account_of(name)}\nMend it, or go on without the rollouts it fails on: "
                    "on_error: exclude (on_timeout: exclude for what was cut off)"
                )

    def account_of(self, name: str) -> str:
        """The first failures of a reward, for a person: messages and tracebacks."""
        lines = []
        for f in self.accounts[name].first:
            lines.append(f"  group {f['group']}, rollout {f['rollout']}: {f['failure']}: {f['message']}")
            lines.extend("    " + line for line in f["trace"].splitlines())
        return "\n".join(lines)

    def _metrics(
        self,
        groups: Sequence[RolloutGroup],
        excluded: Sequence[Excluded],
        outcomes: Mapping[str, list[dict[int, Outcome]]],
        before: Mapping[str, tuple[int, int, int]],
    ) -> dict[str, float]:
        """Means and standard deviations over the rollouts that were scored; absent where there are none."""
        out: dict[str, float] = {"reward/excluded": float(len(excluded))}
        totals = [r.reward for g in groups for r in g.rollouts]
        columns = {"reward": totals}
        for name, of_groups in outcomes.items():
            columns[f"reward/{name}"] = [o.value for d in of_groups for o in d.values() if o.value is not None]
        for name, values in columns.items():
            if values:
                out[f"{name}/mean"] = statistics.fmean(values)
                out[f"{name}/std"] = statistics.pstdev(values)
        for name, a in self.accounts.items():
            for what, now, then in zip(
                ("errors", "timeouts", "died"), (a.errors, a.timeouts, a.died), before[name], strict=True
            ):
                out[f"reward/{name}/{what}"] = float(now - then)
        return out


def _arguments(part: Component, group: RolloutGroup, places: Sequence[int]) -> tuple[tuple[Any, ...], int | None]:
    """What a part is called with: a text, or all of a group's, and the example."""
    if part.form == "group":
        return ([group.rollouts[i].text for i in places], dict(group.example)), len(places)
    rollout = group.rollouts[places[0]]
    return (rollout.text, {**group.example, "completion_tokens": rollout.length, "finish": rollout.finish}), None
