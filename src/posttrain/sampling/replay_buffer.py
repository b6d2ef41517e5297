"""Rollouts that outlive their step, as plain values; and completions that grow piece by piece."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from posttrain.config import SamplingConfig
from posttrain.core.types import PartialRollout, Rollout
from posttrain.sampling.stop_strings import Decode, before_stop

PARTIAL = "partial"
"""Finish of a completion that continues in the next step."""


def rollout_to_json(rollout: Rollout) -> dict[str, Any]:
    """Return a rollout as JSON keeps it, without loss."""
    return asdict(rollout)


def rollout_from_json(values: Mapping[str, Any]) -> Rollout:
    """Return the rollout that `plain` was made from."""
    restored = {f.name: values[f.name] for f in fields(Rollout) if f.name in values}
    restored = {name: tuple(v) if isinstance(v, list) else v for name, v in restored.items()}
    return Rollout(**{**restored, "pieces": tuple(PartialRollout(**p) for p in values["pieces"])})


def oldest(rollout: Rollout, step: int) -> int:
    """Return the step in which the first token was sampled; `step` if not recorded."""
    return rollout.pieces[0].step if rollout.pieces else step


@dataclass(frozen=True)
class Growth:
    """Growth of completions in pieces over several steps.

    tokens: of a piece, at most (None: a completion ends in its step). sampling: as the settings have it. context: of
    the model, in tokens. decode: (tokens, leave out special ones) -> text. versioned: the sampler marks its tokens with
    the step whose weights sampled them.
    """

    tokens: int | None
    sampling: SamplingConfig
    context: int
    decode: Decode
    versioned: bool = False

    def asked(self, before: Rollout | None = None) -> int | None:
        """Return how many tokens to sample next, of a new completion or after `before`; None: up to the limit."""
        if self.tokens is None:
            return None
        return min(self.tokens, self.sampling.max_tokens - (len(before.tokens) if before else 0))

    def grown(self, prompt: int, before: Rollout | None, piece: Rollout, step: int, temperature: float) -> Rollout:
        """Join a completion and its newest piece; it is marked PARTIAL if only the piece's length ended it.

        Each token keeps the log-probability that it was sampled with. A stop string across the seam ends the completion
        where the sampler would have ended it.

        Args:
            prompt: Length of the prompt in tokens.
            before: The completion so far; None: nothing.
            piece: The newest tokens.
            step: Step in which they were sampled.
            temperature: Temperature at which they were sampled.
        """
        pieces = (PartialRollout(len(piece.tokens), step, temperature),)
        marked = replace(piece, pieces=piece.pieces or pieces if self.versioned else pieces)
        requested = self.asked(before)
        if requested is None:
            return marked
        whole = marked if before is None else self._joined(before, marked)
        short = len(piece.tokens) < requested  # what ended it was the context
        room = min(self.sampling.max_tokens, self.context - prompt) - len(whole.tokens)
        if whole.finish == "length" and not short and room > 0:
            return replace(whole, finish=PARTIAL)
        return whole

    def _joined(self, before: Rollout, piece: Rollout) -> Rollout:
        """Two pieces as one completion; its text is decoded as the sampler does."""
        tokens = (*before.tokens, *piece.tokens)
        logprobs = (*before.logprobs, *piece.logprobs)
        pieces, finish, kept = (*before.pieces, *piece.pieces), piece.finish, len(tokens)
        text: str | None = None
        if self.sampling.stop:
            seam = len(before.tokens)
            reach = seam + max(len(s.encode()) for s in self.sampling.stop)
            for n in range(seam + 1, min(reach, len(tokens)) + 1):
                text = before_stop(tokens[:n], self.sampling.stop, self.decode)
                if text is not None:
                    finish, kept = "stop", n
                    break
            if text is None and finish == "stop":
                text = before_stop(tokens, self.sampling.stop, self.decode)
        if text is None:
            shown = tokens[: kept - 1] if finish in ("end", "stop") else tokens[:kept]
            text = self.decode(shown, True)
        last = pieces[-1]
        if kept < len(tokens):
            pieces = (*pieces[:-1], replace(last, tokens=last.tokens - (len(tokens) - kept)))
        return Rollout(tokens[:kept], logprobs[:kept], finish, text, pieces=pieces)
