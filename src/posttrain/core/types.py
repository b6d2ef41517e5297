"""The records that travel between the parts, and the one legend of shapes.

Names of tensors end in their shape, one letter a dimension:

    T  tokens of a ragged batch, end to end, no padding
    N  tokens that are asked for (they carry loss, or their log-probability is wanted), N <= T
    S  segments of a ragged batch
    G  completions of one prompt
    V  vocabulary
    H  hidden size
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict


class Message(TypedDict):
    """One turn of a conversation, with the field names that chat templates read.

    Attributes:
        role: system, user, assistant or tool.
        content: Text of the turn; empty for a turn that only calls tools.
        reasoning_content: Reasoning before the answer, apart from `content`.
        tool_calls: Calls of an assistant's turn: {"id", "type": "function", "function": {"name", "arguments"}}, the
            arguments as an object.
        tool_call_id: Call that a tool's turn answers.
        name: Name of the tool, or of the speaker.
        train: False: the turn carries no loss, whatever `loss_on` says.
        images: Pictures, one for each `core.image_tokens.IMAGE_MARK` in `content`.
    """

    role: str
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    train: NotRequired[bool]
    images: NotRequired[list[Any]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence of token ids, and what each token counts in the loss.

    tokens: token ids, whole sequence (prompt and completion), never truncated silently; `core.image_tokens.ImageTokens`
        if some stand for pictures.
    weights: one number a token; 0 means that the token carries no loss. The weight belongs to the token as a
        *target*: the first token of a sequence has nothing that predicts it, so its weight must be 0.
    source: where the row came from, ``file:row``, for messages.
    meta: whatever the row carried that a method or a report may want (an answer, an id).
    """

    tokens: Sequence[int]
    weights: Sequence[float]
    source: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.weights):
            raise ValueError(f"{self.source or 'sample'}: {len(self.tokens)} tokens but {len(self.weights)} weights")
        if len(self.weights) and self.weights[0] != 0:
            raise ValueError(f"{self.source or 'sample'}: the first token has no predecessor and can't carry loss")

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Metric:
    """Describe a number that a method logs, for the report.

    Attributes:
        name: Key in metrics.jsonl or timings.jsonl. A `*` at its end stands for a family, such as `reward/*`.
        title: Title in plain words; a `*` in it becomes the rest of the key.
        unit: Unit, or a few words on what is measured.
        group: Heading under which the report draws it. Groups appear in the order of their first metric; those that
            are named "Details" or have no name are folded away.
        better: `higher`, `lower`, or empty if neither is better.
        over: Name of another metric, in whose chart it is drawn as a second curve. Empty: it has a chart.
    """

    name: str
    title: str
    unit: str = ""
    group: str = ""
    better: str = ""
    over: str = ""


Step = tuple[int, int, float]
"""A step of a completion and its score: its first token, one past its last, the number."""


def turn_name(reward: str, turn: int) -> str:
    """Return the name in `Rollout.steps` of the scores of a turn, from 1; no reward's own name has an @."""
    return f"{reward}@{turn}"


def turn_of(name: str, reward: str) -> int:
    """Return the number of the turn if `turn_name` made the name for this reward, else 0."""
    before, _, number = name.rpartition("@")
    return int(number) if before == reward and number.isdecimal() else 0


@dataclass(frozen=True, slots=True)
class PartialRollout:
    """A run of a rollout's tokens that were sampled together: how many, in which step (from 0), at what temperature."""

    tokens: int
    step: int
    temperature: float


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion of a prompt.

    tokens: completion ids, the end or stop token included where one was sampled.
    logprobs: log-probability of each under the policy that sampled it, temperature and cut-offs applied.
    finish: why it ended: ``end`` (a token that ends a turn or text), ``stop`` (a stop string or token, or an
        environment that is done), ``length``, ``turns`` (it asked its environment more often than it may).
    text: decoded, without the end token or stop string.
    rewards: every reward's own number by name, before weights; reward: their weighted sum. Under NAME/FIGURE further
        numbers that a reward returns, which count nothing in the sum.
    mask: for each token whether the model wrote it; None: it wrote all. What an environment wrote is context to the
        model: it has log-probability 0 here, no loss, and no part in ratios, divergences, entropies and lengths.
    steps: by the name of a reward that judges steps, those that it has a score for, before weights, in order. A reward
        that scores turns has none under its name, and each turn under that of `turn_name`.
    pieces: when and how its tokens were sampled, in order. Empty: in the step at hand, as the settings say.
    failures: by the name of a reward that failed, its message: then `reward` is NaN, and the rollout is not trained on.
    notes: by the name of a reward, why it gave its number, where it says so.
    """

    tokens: Sequence[int]
    logprobs: Sequence[float]
    finish: str
    text: str = ""
    rewards: Mapping[str, float] = field(default_factory=dict)
    reward: float = 0.0
    mask: Sequence[bool] | None = None
    steps: Mapping[str, Sequence[Step]] = field(default_factory=dict)
    pieces: Sequence[PartialRollout] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mask is not None and len(self.mask) != len(self.tokens):
            raise ValueError(f"a rollout of {len(self.tokens)} tokens has a mask of {len(self.mask)}")

    @property
    def rewarded(self) -> bool:
        """Return True if no reward failed on it."""
        return math.isfinite(self.reward)

    @property
    def length(self) -> int:
        """Return how many tokens the model wrote."""
        return len(self.tokens) if self.mask is None else sum(self.mask)

    @property
    def replies(self) -> int:
        """Count the replies of an environment: runs of tokens that the model did not write."""
        mask = self.mask or ()
        return sum(not mine and (i == 0 or mask[i - 1]) for i, mine in enumerate(mask))

    @property
    def own(self) -> Sequence[int]:
        """Return the places of the tokens that the model wrote, ascending."""
        return range(len(self.tokens)) if self.mask is None else [i for i, mine in enumerate(self.mask) if mine]


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All completions of one prompt; ``example`` is what the row carried besides it (an answer, an id)."""

    prompt: Sequence[int]
    example: Mapping[str, Any]
    rollouts: Sequence[Rollout]
