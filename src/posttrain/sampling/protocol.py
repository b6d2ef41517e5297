"""Protocol of samplers: prompts in, rollouts out; for the local engine and for servers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from posttrain.config import SamplingConfig
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.data.tokenizing import end_of_turn_token


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt (token ids, generation prompt included), and how many completions of it are wanted.

    seed: with a completion's number, all that its random stream depends on: not on what else is sampled.
    example: what the row carried besides (an answer, an id); handed through to the group. max_tokens: of each
    completion, where it is to be shorter than the sampling's own.
    """

    tokens: Sequence[int]
    n: int = 1
    seed: int = 0
    example: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None


OnDone = Callable[[int, int, Rollout], None]
"""Called as each completion ends: (request's index, completion's number, rollout)."""


class Sampler(Protocol):
    """Anything that completes prompts."""

    def sample(
        self, requests: Sequence[Request], params: SamplingConfig, on_done: OnDone | None = None
    ) -> list[RolloutGroup]:
        """Return one group for each request, in their order, with `n` rollouts each.

        Args:
            requests: The prompts.
            params: How tokens are drawn.
            on_done: Called as each completion ends.
        """


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a turn, of the model, the tokenizer and the chat template."""
    ends = model.generation_config.eos_token_id
    ids = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    end = end_of_turn_token(tokenizer)
    return sorted({*ids, *([end] if end is not None else [])})
