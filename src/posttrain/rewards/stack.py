"""A stack of rewards: the number of each for every rollout, their weighted sum, and an account of failures."""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from posttrain.config.environment import EnvironmentBase, ScoredPart
from posttrain.config.rewards import CustomRewardConfig, RewardConfig, RewardsConfig, RewardTermConfig
from posttrain.core.errors import RewardError
from posttrain.core.types import Rollout, RolloutGroup, Step, turn_name
from posttrain.core.visible_text import visible
from posttrain.rewards.outcome import LONGEST_NOTE, NOT_GRADED, WITHOUT_END, LabelError, RewardOutcome, attempt
from posttrain.rewards.ray_pool import open_pool
from posttrain.rewards.reward import Reward, RewardContext, RewardTerm, reward_term
from posttrain.rewards.reward_log import RewardLog
from posttrain.rewards.token_spans import token_spans, tokens_of
from posttrain.rewards.worker_pool import RewardCall

OFTEN = 0.05
"""Share of failures above which a reward is named in the terminal."""
SHOWN = 3
"""Number of failures of a reward that are kept with message and traceback."""
NOT_SAMPLED = "sampling"
"""Stands for the reward's name if a rollout came with finish ``error``, and was not scored."""


@dataclass(frozen=True, slots=True)
class ScoredGroups:
    """Result of a call.

    Attributes:
        groups: In their order, each rollout in its place with its rewards, or with NaN and its `failures`.
        metrics: Of this call, flat, with counts of failures also if they are 0.
    """

    groups: list[RolloutGroup]
    metrics: dict[str, float]

    @property
    def failed(self) -> list[Rollout]:
        """Return the rollouts without a reward."""
        return [r for g in self.groups for r in g.rollouts if not r.rewarded]


@dataclass(frozen=True, slots=True)
class ReadText:
    """Hold the text of the tokens that rewards read, up to its end.

    Attributes:
        text: The text that the tokens begin with.
        start: Place in it of the text that rewards were given.
        first: Place of the first token in the completion.
        last: One past the place of the last token.
    """

    text: str
    start: int
    first: int
    last: int


@dataclass
class Account:
    """Counts of one reward since the stack was made, with its first failures and their places."""

    scored: int = 0
    errors: int = 0
    timeouts: int = 0
    died: int = 0
    first: list[dict[str, Any]] = field(default_factory=list)
    named: bool = False
    """True once the terminal has named it as failing often."""

    @property
    def cut_off(self) -> int:
        """Return how many calls were cut off by time or memory."""
        return self.timeouts + self.died


COUNTS = ("scored", "errors", "timeouts", "died")


class RewardStack:
    """Rewards made from their settings; call it with groups.

    Args:
        config: The settings, or a list of settings of rewards.
        functions: Callables by name, for rewards that name one instead of an import path. They run in this process,
            without a time limit.
        tokenizer: Finds the tokens of scored steps. None: such rewards give their means alone.
        log: File that gets what rewards print. None: it is shown only.
        environment: Settings of the environment that answers within the completions. Rewards read the part of a
            completion that it names (of self-refine the last answer); rewards of its turns read all.

    Raises:
        RewardError: A reward can't be made, or can't score such completions.
    """

    def __init__(
        self,
        config: RewardsConfig | Sequence[RewardConfig],
        functions: Mapping[str, Callable[..., Any]] | None = None,
        tokenizer: Any = None,
        log: Path | None = None,
        environment: EnvironmentBase | None = None,
    ) -> None:
        self.tokenizer, self.environment = tokenizer, environment
        self.log = RewardLog(log)
        self._lock = threading.RLock()  # one call at a time: groups of coming steps are scored in threads of their own
        self.config = config if isinstance(config, RewardsConfig) else RewardsConfig(terms=list(config))
        self.terms: list[RewardTerm] = [reward_term(t, functions or {}) for t in self.config.terms]
        self.accounts = {t.name: Account() for t in self.terms}
        isolated = [t for t in self.terms if t.function is None]
        self._slot = {t.name: i for i, t in enumerate(isolated)}
        specs = [t.config.model_dump(mode="json") for t in isolated]
        context = RewardContext(tokenizer, environment, log, self.config.workers)
        for term in self.terms:
            check_environment_kind(term.config, environment)
            if isinstance(term.function, Reward):
                term.function.bind(context)
        self.pool = open_pool(specs, self.log, self.config.workers) if isolated else None

    def __enter__(self) -> RewardStack:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes, and name the rewards that failed often."""
        for line in self.often_failed():
            print(line, flush=True)
        if self.pool is not None:
            self.pool.close()
        for term in self.terms:
            if isinstance(term.function, Reward):
                term.function.close()
        self.log.close()

    def often_failed(self) -> list[str]:
        """Return a line for each reward that failed on more than 5% of its completions."""
        out = []
        for name, a in self.accounts.items():
            failed, total = a.errors + a.cut_off, a.scored + a.errors + a.cut_off
            if failed > OFTEN * total and not a.named:
                a.named = True
                config = next(t.config for t in self.terms if t.name == name)
                meaning = "count as wrong" if config.cut_off_is_wrong else "have no reward"
                cut = f", of which {a.cut_off:,} were cut off and {meaning}" if a.cut_off else ""
                out.append(
                    f"! reward {name!r} failed on {failed:,} of {total:,} completions ({failed / total:.0%}){cut}"
                )
        return out

    def state_dict(self) -> dict[str, dict[str, int]]:
        """Return how much was scored and failed so far, so that limits hold over a run that is interrupted."""
        return {name: {n: getattr(a, n) for n in COUNTS} for name, a in self.accounts.items()}

    def load_state_dict(self, numbers: Mapping[str, Mapping[str, int]]) -> None:
        """Restore the counts; a reward that is missing in them starts from zero."""
        self.accounts = {t.name: Account() for t in self.terms}
        for name, counts in numbers.items():
            if name in self.accounts:
                for count in COUNTS:
                    setattr(self.accounts[name], count, int(counts[count]))

    def __call__(self, groups: Sequence[RolloutGroup]) -> ScoredGroups:
        """Score every rollout by every reward.

        A rollout that a reward failed on has the numbers of the other rewards in its `rewards`, NaN as its sum, and the
        messages in its `failures`.

        Raises:
            RewardError: A reward failed as often as the settings allow, or has never worked.
        """
        with self._lock:
            return self._score(groups)

    def _score(self, groups: Sequence[RolloutGroup]) -> ScoredGroups:
        outcomes = self.outcomes(groups)
        scored = [
            replace(
                group,
                rollouts=[
                    self._scored(
                        r, {name: of_groups[g][i] for name, of_groups in outcomes.items() if i in of_groups[g]}
                    )
                    for i, r in enumerate(group.rollouts)
                ],
            )
            for g, group in enumerate(groups)
        ]
        before = self.state_dict()
        self._count(outcomes)
        self._check_limits()
        return ScoredGroups(scored, self._metrics(scored, outcomes, before))

    def _scored(self, rollout: Rollout, each: Mapping[str, RewardOutcome]) -> Rollout:
        """Return a rollout with the outcomes of its rewards, by name."""
        if rollout.finish == "error":
            return replace(rollout, reward=math.nan, failures={NOT_SAMPLED: f"error: {rollout.text}"})
        values = {name: o.value for name, o in each.items() if o.value is not None}
        failures = {name: f"{o.failure}: {o.message}" for name, o in each.items() if o.failure}
        steps = {} if failures else self._steps(rollout, each)
        reward = math.nan if failures else self._total(values)
        values |= {f"{name}/{figure}": value for name, o in each.items() for figure, value in o.figures.items()}
        notes = {n: note for n, o in each.items() if (note := self._note(n, o, rollout.finish))}
        return replace(rollout, rewards=values, reward=reward, steps=steps, failures=failures, notes=notes)

    def _note(self, name: str, outcome: RewardOutcome, finish: str) -> str:
        """Return why a reward gave its number, on one line; empty if it is not known."""
        if outcome.value is None:
            return ""
        config = next(t.config for t in self.terms if t.name == name)
        wrong = config.is_correctness and not config.scores_steps and outcome.value == 0
        parts = [WITHOUT_END] if wrong and finish == "length" else []
        parts += [NOT_GRADED] if outcome.cut_off else []
        parts += [outcome.message] if outcome.message else []
        return visible(" ".join("; ".join(parts).split()))[:LONGEST_NOTE]

    def failures_as_wrong(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Return rollouts to take means of: those that a reward of right answers failed on as wrong ones.

        The reward is then the lowest of the others, and at most 0. Failures of a reward that knows no right and wrong
        are left out.
        """
        out = []
        for r in rollouts:
            lost = [t for t in self.terms if t.name in r.failures or NOT_SAMPLED in r.failures]
            if any(t.config.is_correctness for t in lost):
                worst = {
                    t.name: min([0.0, *(o.rewards[t.name] for o in rollouts if t.name in o.rewards)]) for t in lost
                }
                figures = {n for o in rollouts for n in o.rewards if n.partition("/")[0] in worst and "/" in n}
                values = {**worst, **dict.fromkeys(figures, 0.0), **r.rewards}
                r = replace(r, rewards=values, reward=self._total(values))
            out += [r] if r.rewarded else []
        return out

    def _total(self, values: Mapping[str, float]) -> float:
        return sum(t.config.weight * values[t.name] for t in self.terms if t.name in values)

    def _steps(self, rollout: Rollout, each: Mapping[str, RewardOutcome]) -> dict[str, list[Step]]:
        """Return the tokens of the scored steps, by reward, without steps that have no token (after the text)."""
        out: dict[str, list[Step]] = {}
        for name, outcome in each.items():
            if outcome.turns is not None:
                out |= {name: []} | {turn_name(name, turn): [step] for turn, step in outcome.turns.items()}
        scored = {name: o.steps for name, o in each.items() if o.steps is not None}
        if not scored or self.tokenizer is None:
            return out
        read = self._read_text(rollout)
        spans = token_spans(self.tokenizer, rollout.tokens[read.first : read.last], read.text)
        for name, steps in scored.items():
            in_tokens = [(*tokens_of(spans, read.start + a, read.start + b), score) for a, b, score in steps]
            out[name] = [(a + read.first, b + read.first, score) for a, b, score in in_tokens if b > a]
        return out

    def _part(self, rollout: Rollout) -> ScoredPart | None:
        """Return the part of a completion that rewards read. None: all of it."""
        if self.environment is None or self.tokenizer is None or rollout.finish == "error":
            return None
        return self.environment.scored_part(rollout, self.tokenizer)

    def _read_text(self, rollout: Rollout) -> ReadText:
        """Return the text of the tokens that rewards read, and where the text that they were given begins in it."""
        part = self._part(rollout)
        if part is None:
            return ReadText(rollout.text, 0, 0, len(rollout.tokens))
        text = str(self.tokenizer.decode(list(rollout.tokens[part.first : part.last]), skip_special_tokens=True))
        start = max(0, text.find(part.text))
        return ReadText(text[: start + len(part.text)], start, part.first, part.last)

    def _as_read(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """Return groups whose completions have the texts that rewards read."""
        if self.environment is None or self.tokenizer is None:
            return list(groups)
        out = []
        for group in groups:
            parts = [(r, self._part(r)) for r in group.rollouts]
            read = [r if part is None else replace(r, text=part.text) for r, part in parts]
            out.append(replace(group, rollouts=read))
        return out

    def outcomes(self, groups: Sequence[RolloutGroup]) -> dict[str, list[dict[int, RewardOutcome]]]:
        """Return the outcome of each sampled rollout, by reward, group and place; failures are not counted."""
        sampled = [[i for i, r in enumerate(g.rollouts) if r.finish != "error"] for g in groups]
        results: dict[str, list[dict[int, RewardOutcome]]] = {t.name: [{} for _ in groups] for t in self.terms}
        whole, groups = groups, self._as_read(groups)
        calls: list[RewardCall] = []
        targets: list[tuple[str, int, list[int]]] = []
        for term in self.terms:
            config, into = term.config, results[term.name]
            if config.form == "batch":
                self._batches(term, groups, sampled, into)
                continue
            if config.form == "rollouts":
                _rollouts(term, whole if config.needs_environment else groups, sampled, into)
                continue
            for g, group in enumerate(groups):
                for places in [sampled[g]] if config.form == "group" else [[i] for i in sampled[g]]:
                    if not places:
                        continue
                    if config.needs_several and len(group.rollouts) == 1:
                        # A single answer was sampled (a held-out problem's): nothing to agree with, and no failure.
                        into[g][places[0]] = RewardOutcome()
                        continue
                    args, count = _arguments(term, group, places)
                    if term.function is None:
                        limit = config.timeout * (count or 1)
                        calls.append(RewardCall(self._slot[term.name], args, count, limit, config.scores_steps))
                        targets.append((term.name, g, places))
                    else:
                        into[g].update(zip(places, self._call(term, args, count), strict=True))
        if self.pool is not None and calls:
            wrong = {t.name for t in self.terms if t.config.cut_off_is_wrong}
            for (name, g, places), got in zip(targets, self.pool.run(calls), strict=True):
                outcomes = [_counted_wrong(o) if name in wrong else o for o in got]
                results[name][g].update(zip(places, outcomes, strict=True))
        return results

    def _batches(
        self,
        term: RewardTerm,
        groups: Sequence[RolloutGroup],
        sampled: list[list[int]],
        into: list[dict[int, RewardOutcome]],
    ) -> None:
        """Score pairs of prompt and completion in batches; if a batch raises, score each of its pairs alone."""
        column, size = getattr(term.config, "prompt", "prompt"), getattr(term.config, "batch_size", 64)
        pairs: list[tuple[int, int, Any, str]] = []
        for g, group in enumerate(groups):
            if group.example.get(column) is None:
                error = LabelError(
                    f"the example has no {column!r} to score a completion with; it has {sorted(group.example)}"
                )
                into[g].update({i: RewardOutcome(failure="error", message=f"LabelError: {error}") for i in sampled[g]})
            else:
                prompt = _prompt_of(term, group.example)
                pairs.extend((g, i, prompt, group.rollouts[i].text) for i in sampled[g])
        for start in range(0, len(pairs), size):
            batch = pairs[start : start + size]
            got = self._call(term, ([p[2] for p in batch], [p[3] for p in batch]), len(batch))
            if len(batch) > 1 and all(o.failure and o.trace for o in got):
                got = [self._call(term, ([p[2]], [p[3]]), 1)[0] for p in batch]
            for (g, i, _, _), outcome in zip(batch, got, strict=True):
                into[g][i] = outcome

    def _call(self, term: RewardTerm, args: Sequence[Any], count: int | None) -> list[RewardOutcome]:
        """Call a reward in this process; what a function of the user prints is kept."""
        assert term.function is not None
        own = isinstance(term.config, CustomRewardConfig) or hasattr(term.config, "scorer")
        with self.log.printed() if own else nullcontext():
            return attempt(term.function, args, count, term.config.scores_steps)

    def _count(self, outcomes: Mapping[str, list[dict[int, RewardOutcome]]]) -> None:
        for name, of_groups in outcomes.items():
            account = self.accounts[name]
            for g, of_rollouts in enumerate(of_groups):
                for i, o in sorted(of_rollouts.items()):
                    failure = o.failure or o.cut_off
                    account.scored += o.value is not None and failure is None
                    account.errors += failure == "error"
                    account.timeouts += failure == "timeout"
                    account.died += failure == "died"
                    if failure and len(account.first) < SHOWN:
                        shown = {"group": g, "rollout": i, "failure": failure, "message": o.message, "trace": o.trace}
                        account.first.append(shown)

    def _check_limits(self) -> None:
        """Raise RewardError if a reward failed too often."""
        for name, a in self.accounts.items():
            never = not a.scored and bool(a.errors or a.cut_off)
            errors = self.config.on_error == "stop" and a.errors >= self.config.max_errors
            cuts = self.config.on_timeout == "stop" and a.cut_off >= self.config.max_errors
            if never or errors or cuts:
                why = "has not worked once" if never else "failed too often"
                raise RewardError(
                    f"reward {name!r} {why}: {a.errors} errors, {a.timeouts} timed out, {a.died} died, {a.scored} "
                    f"scored\n{self.account_of(name)}\nFix it, or continue without the rollouts that it fails on: "
                    "on_error: exclude (on_timeout: exclude for calls that were cut off)"
                )

    def account_of(self, name: str) -> str:
        """Return the messages and tracebacks of a reward's first failures as text."""
        lines = []
        for f in self.accounts[name].first:
            lines.append(f"  group {f['group']}, rollout {f['rollout']}: {f['failure']}: {f['message']}")
            lines.extend("    " + line for line in f["trace"].splitlines())
        return "\n".join(lines)

    def _metrics(
        self,
        groups: Sequence[RolloutGroup],
        outcomes: Mapping[str, list[dict[int, RewardOutcome]]],
        before: Mapping[str, Mapping[str, int]],
    ) -> dict[str, float]:
        """Return means and standard deviations over the scored rollouts (absent if there are none), and failures."""
        rollouts = [r for g in groups for r in g.rollouts]
        columns = {"reward": [r.reward for r in rollouts if r.rewarded]}
        out = {"reward/excluded": float(len(rollouts) - len(columns["reward"]))}
        for name, of_groups in outcomes.items():
            columns[f"reward/{name}"] = [o.value for d in of_groups for o in d.values() if o.value is not None]
        for name, values in columns.items():
            if values:
                out[f"{name}/mean"] = statistics.fmean(values)
                out[f"{name}/std"] = statistics.pstdev(values)
        for name, counts in self.state_dict().items():
            out |= {f"reward/{name}/{f}": float(counts[f] - before[name][f]) for f in COUNTS if f != "scored"}
        return out


def tokens_read(stack: RewardStack, groups: Sequence[RolloutGroup]) -> dict[str, list[list[int]]]:
    """Return the number of tokens that each reward model or judge reads for each rollout, by reward and group.

    Args:
        stack: The stack.
        groups: The groups, which the stack has scored.
    """
    out = {}
    for term in stack.terms:
        count = getattr(term.function, "tokens_read", None)
        if callable(count):
            texts = [[r.text for r in g.rollouts] for g in groups]
            out[term.name] = [
                count([_prompt_of(term, g.example)] * len(of_group), of_group)
                for g, of_group in zip(groups, texts, strict=True)
            ]
    return out


def _prompt_of(term: RewardTerm, example: Mapping[str, Any]) -> Any:
    """Return the prompt of a row as a scorer gets it, with tools and template arguments if it reads them."""
    column = getattr(term.config, "prompt", "prompt")
    prompt = example[column]
    context = {k: example[k] for k in ("tools", "template_args") if example.get(k)}
    if context and column == "messages" and getattr(term.config, "reads_context", False):
        return {"messages": prompt, **context}
    return prompt


def check_environment_kind(config: RewardTermConfig, environment: EnvironmentBase | None) -> None:
    """Raise RewardError if a reward scores the turns of another environment than the one that answers, or of none."""
    needed = config.needs_environment
    if needed and (environment is None or environment.kind != needed):
        there = "there is none" if environment is None else f"this one is {environment.kind}"
        raise RewardError(
            f"reward {config.title!r} scores the turns of an environment of kind {needed}, and {there}: set "
            f"environment: {{kind: {needed}}} in a stage of reinforcement learning"
        )


def _rollouts(
    term: RewardTerm, groups: Sequence[RolloutGroup], sampled: list[list[int]], into: list[dict[int, RewardOutcome]]
) -> None:
    """Score the records of all rollouts in one call."""
    assert term.function is not None
    places = [(g, i) for g, of_group in enumerate(sampled) for i in of_group]
    if places:
        rollouts, examples = [groups[g].rollouts[i] for g, i in places], [groups[g].example for g, _ in places]
        for (g, i), outcome in zip(places, term.function(rollouts, examples), strict=True):
            into[g][i] = outcome


def _counted_wrong(outcome: RewardOutcome) -> RewardOutcome:
    """Return the outcome of an answer that a call was cut off at: wrong, so that a hanging grader never helps it."""
    if outcome.failure not in ("timeout", "died"):
        return outcome
    return RewardOutcome(0.0, message=outcome.message, cut_off=outcome.failure)


def _arguments(term: RewardTerm, group: RolloutGroup, places: Sequence[int]) -> tuple[tuple[Any, ...], int | None]:
    """Return the arguments of a call (a text or all texts of a group, and the example), and how many it returns."""
    if term.config.form == "group":
        return ([group.rollouts[i].text for i in places], dict(group.example)), len(places)
    rollout = group.rollouts[places[0]]
    return (rollout.text, {**group.example, "completion_tokens": rollout.length, "finish": rollout.finish}), None
