"""Requests that a session works on, and their running completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from posttrain.core.types import Rollout
from posttrain.sampling.protocol import Request


@dataclass
class SessionPrompt:
    """A request being worked on.

    shift: what is added to the position of each new token: rotary positions of pictures may be fewer than their tokens.
    """

    index: int
    request: Request
    limit: int
    slot: int = -1
    logits_V: Tensor | None = None
    virtual: int = 0
    shift: int = 0
    started: int = 0
    running: int = 0
    done: dict[int, Rollout] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Return the positions before the first token that is drawn, those of virtual tokens included."""
        return len(self.request.tokens) + self.virtual


@dataclass
class SessionRow:
    """A running completion.

    gone: it has ended.
    """

    prompt: SessionPrompt
    number: int
    slot: int
    uniforms: np.ndarray
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    gone: bool = False


def step_inputs(rows: Sequence[SessionRow], drawn: Sequence[int], shared: bool) -> tuple[list[int], ...]:
    """Return what a decoding step takes of each row.

    Args:
        rows: The completions.
        drawn: Tokens that each has. The newest has not been computed yet.
        shared: Their prompts lie in a region of their own.

    Returns:
        Newest token, column and position; with `shared` also the prompt's slot, the row's number among those of that
        prompt, and the prompt's length.
    """
    lengths = [r.prompt.length for r in rows]
    positions = [n + d - 1 for n, d in zip(lengths, drawn, strict=True)]
    tokens = [r.tokens[-1] for r in rows]
    if not shared:
        return tokens, positions, positions
    taken: dict[int, int] = {}
    slots, ranks = [r.prompt.slot for r in rows], []
    for slot in slots:
        ranks.append(taken.get(slot, 0))
        taken[slot] = ranks[-1] + 1
    return tokens, [d - 1 for d in drawn], positions, slots, ranks, lengths
