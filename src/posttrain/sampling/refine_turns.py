"""The turns of a finished rollout of the self-refine loop, found by its tokens and mask alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from posttrain.config.names import SAME_ANSWER
from posttrain.core.imports import load_object
from posttrain.core.types import Rollout
from posttrain.sampling.multi_turn import reply_turn
from posttrain.sampling.refine_prompts import gives_verdict, said, turn_text

if TYPE_CHECKING:
    from posttrain.sampling.refine_environment import RefineEnvironment

TurnKind = Literal["answer", "feedback", "request"]
REQUEST = "Wk3v9Zd"
"""Stands for a request, to find what a template writes around it."""
StoppedBy = Literal["rounds", "verdict", "agreement", "sources", "cut"]


@dataclass(frozen=True, slots=True)
class RefineTurn:
    """Hold a turn of a rollout.

    Attributes:
        kind: answer and feedback: written by the model; request: by the environment.
        text: The text without what the chat template has around it, end token, stop string and surrounding spaces.
        first: Place of its first token in the rollout's tokens.
        last: One past the place of its last token.
    """

    kind: TurnKind
    text: str
    first: int
    last: int


def refine_turns(rollout: Rollout, tokenizer: Any, config: RefineEnvironment.Config) -> list[RefineTurn]:
    """Return the turns of a rollout of the self-refine environment, in order; together they hold all its tokens.

    Args:
        rollout: The rollout; one that was read from a file will do.
        tokenizer: The tokenizer that it was sampled with.
        config: Settings of the environment.
    """
    runs = list(_runs(rollout, config))
    around = _around_reply(config, tokenizer) if any(kind == "request" for kind, _, _ in runs) else ("", "")
    out: list[RefineTurn] = []
    for kind, first, last in runs:
        if kind == "request":
            text = str(tokenizer.decode(list(rollout.tokens[first:last]), skip_special_tokens=False))
            out.append(RefineTurn("request", _inside(text, *around), first, last))
        else:
            out.append(_own_turn(kind, rollout, tokenizer, config, first, last))
    return out


def last_answer(rollout: Rollout, tokenizer: Any, config: RefineEnvironment.Config) -> RefineTurn:
    """Return the last answer of a chain; an empty one if it has no tokens.

    Args:
        rollout: The rollout.
        tokenizer: The tokenizer that it was sampled with.
        config: Settings of the environment.
    """
    *_, (_, first, last) = [("answer", 0, 0), *(run for run in _runs(rollout, config) if run[0] == "answer")]
    return _own_turn("answer", rollout, tokenizer, config, first, last)


def stopped_by(rollout: Rollout, turns: Sequence[RefineTurn], config: RefineEnvironment.Config) -> StoppedBy:
    """Return what ended a rollout: all rounds done, own verdict, agreement, satisfied sources, or something else (cut).

    cut is a limit of tokens, an error, or a stop string of the recipe.

    Args:
        rollout: The rollout.
        turns: Its turns, of `refine_turns`.
        config: Settings of the environment.
    """
    if rollout.finish != "stop" or not turns or turns[-1].kind == "request":
        return "cut"
    if turns[-1].kind == "feedback":
        return "verdict" if config.verdict is not None and gives_verdict(turns[-1].text, config.verdict) else "cut"
    answers = [t.text for t in turns if t.kind == "answer"]
    if len(answers) > config.rounds:
        return "rounds"
    if (
        config.agreement
        and len(answers) > 1
        and load_object(SAME_ANSWER)(*map(said, answers[-2:]), config.final_answer)
    ):
        return "agreement"
    return "sources" if config.feedback and config.satisfied else "cut"


def _runs(rollout: Rollout, config: RefineEnvironment.Config) -> Iterator[tuple[TurnKind, int, int]]:
    """Yield the kind and the places of every turn."""
    mask = [True] * len(rollout.tokens) if rollout.mask is None else list(rollout.mask)
    edges = [i for i in range(len(mask)) if i == 0 or mask[i] != mask[i - 1]] + [len(mask)]
    written = 0
    for first, last in pairwise(edges):
        if not mask[first]:
            yield "request", first, last
            continue
        yield ("feedback" if config.own and written % 2 else "answer"), first, last
        written += 1


def _own_turn(
    kind: TurnKind, rollout: Rollout, tokenizer: Any, config: RefineEnvironment.Config, first: int, last: int
) -> RefineTurn:
    """Return a turn that the model wrote, with its text."""
    return RefineTurn(kind, turn_text(_text(rollout, tokenizer, first, last), config.stop), first, last)


def _text(rollout: Rollout, tokenizer: Any, first: int, last: int) -> str:
    """Return the text of the model's tokens; the rollout's own if it was cut at a stop string of the recipe."""
    piece = str(tokenizer.decode(list(rollout.tokens[first:last]), skip_special_tokens=True))
    if last == len(rollout.tokens) and rollout.finish == "stop" and rollout.text:
        before = str(tokenizer.decode(list(rollout.tokens[:first]), skip_special_tokens=True))
        left = rollout.text.removeprefix(before)
        if rollout.text.startswith(before) and piece.startswith(left):
            return left
    return piece


def _around_reply(config: RefineEnvironment.Config, tokenizer: Any) -> tuple[str, str]:
    """Return what the chat template writes before and after a request."""
    if config.answers == "inline":
        return "", ""
    before, _, after = reply_turn(config, tokenizer, REQUEST).partition(REQUEST)
    return before, after


def _inside(text: str, before: str, after: str) -> str:
    """Return a request without what is around it; the model may have written the first part, its end token, itself."""
    text = text.removesuffix(after)
    start = next((at for at in range(len(before)) if text.startswith(before[at:])), len(before))
    return text.removeprefix(before[start:]).strip()
