"""Rollouts that outlive their step: rare successes that are kept, and completions that are not done yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from posttrain.config import ReplayConfig, SamplingConfig
from posttrain.core.types import Piece, Rollout
from posttrain.sampling.stop_strings import Decode, before_stop

PARTIAL = "partial"
"""Finish of a completion that continues in the next step."""


def rollout_to_json(rollout: Rollout) -> dict[str, Any]:
    """Return a rollout as JSON keeps it, without loss."""
    return asdict(rollout)


def rollout_from_json(values: Mapping[str, Any]) -> Rollout:
    """Return the rollout that `plain` was made from."""
    restored = {f.name: values[f.name] for f in fields(Rollout)}
    restored = {name: tuple(v) if isinstance(v, list) else v for name, v in restored.items()}
    return Rollout(**{**restored, "pieces": tuple(Piece(**p) for p in values["pieces"])})


def oldest(rollout: Rollout, step: int) -> int:
    """Return the step in which the first token was sampled; `step` if not recorded."""
    return rollout.pieces[0].step if rollout.pieces else step


@dataclass(frozen=True)
class Growth:
    """How completions grow piece by piece.

    tokens: of a piece, at most (None: a completion ends in its step). sampling: as the settings have it. context: of
    the model, in tokens. decode: (tokens, leave out special ones) -> text.
    """

    tokens: int | None
    sampling: SamplingConfig
    context: int
    decode: Decode

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
        marked = replace(piece, pieces=(Piece(len(piece.tokens), step, temperature),))
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


class Replay:
    """One rare success a problem, the newest; the least surprising of its group (arXiv 2510.02245 finds those to serve
    best). Its state goes in and out of a checkpoint.

    bound: steps that a kept one's oldest token may be old.
    """

    def __init__(self, config: ReplayConfig, bound: int) -> None:
        self.config, self.bound = config, bound
        self.kept: dict[int, Rollout] = {}
        """By problem, the newest last."""

    def expire(self, step: int) -> int:
        """Drop rollouts that are too old for this step; return how many."""
        old = [p for p, r in self.kept.items() if step - oldest(r, step) > self.bound]
        for problem in old:
            del self.kept[problem]
        return len(old)

    def visit(self, problem: int, rollouts: Sequence[Rollout], success: float) -> Rollout | None:
        """Store the rare success of a group of fresh rollouts; return the stored one for a group without success.

        A problem that is no longer rarely solved is dropped.

        Args:
            problem: Number of the problem.
            rollouts: The group.
            success: Reward from which a rollout is a success.
        """
        right = [r for r in rollouts if r.reward >= success]
        if not right:
            return self.kept.get(problem) if rollouts else None
        self.kept.pop(problem, None)
        if len(right) <= self.config.rare * len(rollouts):
            self.kept[problem] = max(right, key=lambda r: sum(r.logprobs) / max(1, len(r.tokens)))
            while len(self.kept) > self.config.size:
                del self.kept[next(iter(self.kept))]
        return None

    def state_dict(self) -> list[Any]:
        return [[problem, rollout_to_json(r)] for problem, r in self.kept.items()]

    def load_state_dict(self, numbers: Sequence[Any]) -> None:
        self.kept = {int(problem): rollout_from_json(r) for problem, r in numbers}
