"""The requests for critiques and revisions, word for word, and the principle of each round."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.core.errors import DataError
from posttrain.core.files import read_small_text
from posttrain.core.types import Message
from posttrain.data.readers import packaged_or_own
from posttrain.judge.principles import by_content
from posttrain.sampling.refine_prompts import CRITIQUE_ALONE, REVISION_ALONE

if TYPE_CHECKING:
    from posttrain.methods.data.critique_revision import RefineConfig

CRITIQUE = "Name the specific ways in which your last answer goes against this principle: {principle}"
REVISION = "Write your answer again so that it keeps to this principle: {principle} Reply with the new answer alone."


@dataclass(frozen=True, slots=True)
class FinishedRound:
    """Hold a finished round, which is shown before a request."""

    prompt: str
    answer: str
    principle: str
    critique: str
    revision: str


def draw_principles(count: int, messages: Sequence[Message], rounds: int, seed: int) -> list[int]:
    """Return the numbers of the principles of a prompt's rounds, a function of its content and the seed.

    The rounds go through a shuffled list of all principles, so that each comes once before any is repeated.

    Args:
        count: Number of principles. 0: the result is empty.
        messages: The prompt.
        rounds: Number of rounds.
        seed: Seed of the stage's draws.
    """
    if not count:
        return []
    order = by_content(seed, [[m["role"], m["content"]] for m in messages]).permutation(count)
    return [int(order[i % count]) for i in range(rounds)]


def revision_turns(
    config: RefineConfig,
    examples: Sequence[FinishedRound],
    prompt: Sequence[Message],
    answer: str,
    principle: str | None,
    critique: str | None = None,
) -> list[Message]:
    """Return the conversation whose next turn is a critique or a revision.

    A system message stays first, followed by the examples. A later round starts from the newest answer; earlier ones
    are not shown.

    Args:
        config: Settings of the stage.
        examples: Finished rounds; those of the principle are shown, or all if it has none.
        prompt: Turns of the prompt.
        answer: The answer to criticise.
        principle: Principle of the round. None: no principle.
        critique: Critique of the answer, to request a revision. None: request the critique.
    """
    head = [m for m in prompt[:1] if m["role"] == "system"]
    out = list(head)
    for e in matching_examples(examples, principle):
        out.append({"role": "user", "content": e.prompt})
        out += _round(config, e.answer, e.principle if principle is not None else None, e.critique)
        out.append({"role": "assistant", "content": e.revision})
    out += prompt[len(head) :]
    return [*out, *_round(config, answer, principle, critique)]


def matching_examples(examples: Sequence[FinishedRound], principle: str | None) -> list[FinishedRound]:
    """Return the examples that a round shows: those of its principle, or all if it has none."""
    return [e for e in examples if e.principle == principle] or list(examples)


def _round(config: RefineConfig, answer: str, principle: str | None, critique: str | None) -> list[Message]:
    request = config.critique or (CRITIQUE_ALONE if principle is None else CRITIQUE)
    out: list[Message] = [
        {"role": "assistant", "content": answer},
        {"role": "user", "content": request.format(principle=principle)},
    ]
    if critique is not None:
        request = config.revision or (REVISION_ALONE if principle is None else REVISION)
        out.append({"role": "assistant", "content": critique})
        out.append({"role": "user", "content": request.format(principle=principle)})
    return out


def read_examples(path: str) -> list[FinishedRound]:
    """Read finished rounds, one a line.

    Raises:
        DataError: The file can't be read, or a line is no finished round.
    """
    try:
        lines = read_small_text(packaged_or_own(path)).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"examples {path!r} can't be read: {error}. Expected a JSON Lines file") from error
    out = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            out.append(_example(f"{path}:{number}", line))
    if not out:
        raise DataError(f"examples {path!r} is empty: expected one example a line")
    return out


def _example(place: str, line: str) -> FinishedRound:
    names = FinishedRound.__slots__
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: no JSON: {error}") from error
    fields = row if isinstance(row, dict) else {}
    missing = [n for n in names if not isinstance(fields.get(n), str) or not fields[n].strip()]
    if missing:
        raise DataError(f"{place}: {missing[0]!r} is missing or no text; expected an object with {', '.join(names)}")
    return FinishedRound(*(fields[n].strip() for n in names))
