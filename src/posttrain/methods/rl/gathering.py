"""A problem's completions as they come in: sampled in rounds or over several steps, judged when there is an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from posttrain.core.types import Rollout, RolloutGroup
from posttrain.data.prompts import RenderedPrompt
from posttrain.methods.rl.policy_objectives import mixed
from posttrain.rewards.stack import Excluded, Scored
from posttrain.sampling.replay_buffer import PARTIAL, plain, rollout_of


@dataclass
class Gathering:
    """A group in the making. problem: its number. born: the step that it was begun in.

    rollouts: in the order in which they were begun; judged ones have their rewards. excluded: by place, those that got
    none. judged: how many, from the first on, have been looked at. replayed: earlier successes that stand in, last.
    """

    problem: int
    born: int
    rollouts: list[Rollout] = field(default_factory=list)
    excluded: dict[int, Excluded] = field(default_factory=dict)
    judged: int = 0
    replayed: list[Rollout] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether every completion has ended."""
        return all(r.finish != PARTIAL for r in self.rollouts)

    @property
    def kept(self) -> list[Rollout]:
        """Those with a reward, of a group that was judged."""
        return [r for i, r in enumerate(self.rollouts) if i not in self.excluded]

    @property
    def mixed(self) -> bool:
        """Whether there is something to learn."""
        return mixed([*self.kept, *self.replayed])

    def successes(self, success: float) -> int:
        """How many have a reward of at least `success`."""
        return sum(r.reward >= success for r in self.kept)

    def drop(self) -> int:
        """Leave out what has not ended; how many that was."""
        ended = [r for r in self.rollouts if r.finish != PARTIAL]
        dropped, self.rollouts = len(self.rollouts) - len(ended), ended
        return dropped

    def unjudged(self, question: RenderedPrompt) -> RolloutGroup:
        """What is to be judged, as a group."""
        return RolloutGroup(question.tokens, question.problem, self.rollouts[self.judged :])

    def judge(self, group: RolloutGroup, excluded: Sequence[Excluded]) -> None:
        """Take over the outcome of `unjudged`: rollouts with their rewards, and those that got none."""
        start, failed = self.judged, {e.index: e for e in excluded}
        there = iter(group.rollouts)
        for i in range(len(self.rollouts) - start):
            if i in failed:
                self.excluded[start + i] = failed[i]
            else:
                self.rollouts[start + i] = next(there)
        self.judged = len(self.rollouts)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        out = {"problem": self.problem, "born": self.born, "judged": self.judged}
        excluded = [[i, {**asdict(e), "rollout": plain(e.rollout)}] for i, e in sorted(self.excluded.items())]
        return {**out, "rollouts": [plain(r) for r in self.rollouts], "excluded": excluded}

    @classmethod
    def of(cls, numbers: dict[str, Any]) -> Gathering:
        """What `numbers` were made from."""
        rollouts = [rollout_of(r) for r in numbers["rollouts"]]
        excluded = {i: Excluded(**{**e, "rollout": rollout_of(e["rollout"])}) for i, e in numbers["excluded"]}
        return cls(numbers["problem"], numbers["born"], rollouts, excluded, numbers["judged"])


def scored(ready: Sequence[Gathering], questions: Sequence[RenderedPrompt]) -> Scored:
    """Judged groups as rewards give them, without what was replayed."""
    groups, excluded = [], []
    for g, gathering in enumerate(ready):
        question = questions[gathering.problem]
        groups.append(RolloutGroup(question.tokens, question.problem, gathering.kept))
        excluded += [replace(e, group=g, index=i) for i, e in sorted(gathering.excluded.items())]
    return Scored(groups, excluded, {})
