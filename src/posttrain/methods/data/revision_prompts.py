"""What is asked for a critique and for a revision, word for word, and which principle a round goes by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.core.errors import DataError
from posttrain.core.types import Message
from posttrain.data.readers import packaged_or_own
from posttrain.judge.principles import by_content
from posttrain.methods.data.critique_revision import RefineConfig

CRITIQUE = "Name the specific ways in which your last answer goes against this principle: {principle}"
REVISION = "Write your answer again so that it keeps to this principle: {principle} Reply with the new answer alone."
CRITIQUE_ALONE = "Name the specific ways in which your last answer could be better."
REVISION_ALONE = "Write your answer again, better by what you said of it. Reply with the new answer alone."


@dataclass(frozen=True, slots=True)
class Example:
    """A finished round, shown before the one that is asked for."""

    prompt: str
    answer: str
    principle: str
    critique: str
    revision: str


def draw(count: int, messages: Sequence[Message], rounds: int, seed: int) -> list[int]:
    """Numbers of the principles of a prompt's rounds: by its content and the seed, whatever else is asked.

    Each comes once before any comes again: the rounds go through a shuffled list of all. No principles: none.
    """
    if not count:
        return []
    order = by_content(seed, [[m["role"], m["content"]] for m in messages]).permutation(count)
    return [int(order[i % count]) for i in range(rounds)]


def critique_request(config: RefineConfig, principle: str | None) -> str:
    """What the user's turn behind an answer says to have it criticised."""
    template = config.critique or (CRITIQUE_ALONE if principle is None else CRITIQUE)
    return template.format(principle=principle)


def revision_request(config: RefineConfig, principle: str | None) -> str:
    """What the user's turn behind a critique says to have the answer rewritten."""
    template = config.revision or (REVISION_ALONE if principle is None else REVISION)
    return template.format(principle=principle)


def turns(
    config: RefineConfig,
    examples: Sequence[Example],
    asked: Sequence[Message],
    answer: str,
    principle: str | None,
    critique: str | None = None,
) -> list[Message]:
    """The conversation whose next turn is a critique (critique: None) or, where that is there, a revision.

    A system message stays first, behind it come the examples of this principle, or all where it has none. A later
    round begins from the newest answer: what came before that is not shown.
    """
    head = [m for m in asked[:1] if m["role"] == "system"]
    out = list(head)
    for e in fitting(examples, principle):
        out.append({"role": "user", "content": e.prompt})
        out += _round(config, e.answer, e.principle if principle is not None else None, e.critique)
        out.append({"role": "assistant", "content": e.revision})
    out += asked[len(head) :]
    return [*out, *_round(config, answer, principle, critique)]


def fitting(examples: Sequence[Example], principle: str | None) -> list[Example]:
    """The examples that a round is shown: those of its principle, or all where it has none."""
    return [e for e in examples if e.principle == principle] or list(examples)


def _round(config: RefineConfig, answer: str, principle: str | None, critique: str | None) -> list[Message]:
    out: list[Message] = [
        {"role": "assistant", "content": answer},
        {"role": "user", "content": critique_request(config, principle)},
    ]
    if critique is not None:
        out.append({"role": "assistant", "content": critique})
        out.append({"role": "user", "content": revision_request(config, principle)})
    return out


def read_examples(path: str) -> list[Example]:
    """One a line. Raises DataError where the file can't be read or a line is no finished round."""
    try:
        lines = packaged_or_own(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"examples {path!r} can't be read: {error}. Expected a JSON Lines file") from error
    out = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            out.append(_example(f"{path}:{number}", line))
    if not out:
        raise DataError(f"examples {path!r} holds none: expected one a line")
    return out


def _example(place: str, line: str) -> Example:
    names = Example.__slots__
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: no JSON: {error}") from error
    have = row if isinstance(row, dict) else {}
    missing = [n for n in names if not isinstance(have.get(n), str) or not have[n].strip()]
    if missing:
        raise DataError(f"{place}: {missing[0]!r} is missing or no text; expected an object with {', '.join(names)}")
    return Example(*(have[n].strip() for n in names))
