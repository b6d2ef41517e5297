"""Chains of critiques and revisions: the texts, which of them can be used, and the rows that they become.

Every round has one outcome: its revision is used, or is not for one reason. So does every chain: rows, or none for one
reason. The counts add up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from posttrain.core.errors import DataError
from posttrain.core.files import numbered, read_lines, write_lines
from posttrain.core.types import Message

TRUNCATED = "cut at the longest length"
NO_ROOM = "no room in the context"
BY_REWARD = "its reward was reached"
BY_VERDICT = "its critique asked for no change"


@dataclass(slots=True)
class Text:
    """Hold a text of the model.

    Attributes:
        text: The text; the reason if the finish is `error`.
        finish: Why it ended, as of a rollout.
        tokens: Number of tokens. 0: unknown (a server wrote it).
        reward: Reward of an answer. None: none.
        parts: The reward's terms by name.
        failures: Error message by the name of the reward that failed.
        notes: Reason by the name of the reward that gave one for its number.
    """

    text: str
    finish: str
    tokens: int = 0
    reward: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Round:
    """Hold one critique and one revision.

    Attributes:
        principle: Number of the principle. None: no principle.
        says: Text of the principle.
        critique: The critique.
        revision: The revision. None with an empty `why`: the critique requested no change.
        why: Reason why the revision can't be used; the answer then stays as it was.
    """

    principle: int | None
    says: str
    critique: Text | None = None
    revision: Text | None = None
    why: str = ""

    @property
    def usable(self) -> bool:
        """Return True if the revision is the chain's next answer."""
        return self.revision is not None and not self.why


@dataclass(slots=True)
class Chain:
    """Hold a prompt, its first answer, and the rounds.

    Attributes:
        problem: Number of the prompt.
        source: Place of the prompt's row.
        prompt: Turns of the prompt.
        initial: The first answer.
        rounds: The rounds.
        stopped: Why the chain ended before its last round. Empty: it did not.
    """

    problem: int
    source: str
    prompt: list[Message]
    initial: Text
    rounds: list[Round] = field(default_factory=list)
    stopped: str = ""

    @property
    def revisions(self) -> list[Text]:
        """Return the usable revisions, in order."""
        return [r.revision for r in self.rounds if r.revision is not None and r.usable]

    @property
    def answer(self) -> Text:
        """Return the newest usable answer, from which a further round starts."""
        return ([self.initial] + self.revisions)[-1]


def fault(text: Text, before: Sequence[tuple[str, str]] = ()) -> str:
    """Return why a text can't be used; empty if it can.

    A text is unusable if it was refused, had no room in the context, is empty or truncated, or equals one of the
    earlier texts, `before` (name, text), except for spaces.
    """
    if text.finish == "error":
        return NO_ROOM if text.text == NO_ROOM else "refused"
    if not text.text.strip():
        return "empty"
    if text.finish == "length":
        return TRUNCATED
    return next((f"the same as {name}" for name, other in before if text.text.split() == other.split()), "")


def no_answer(chain: Chain) -> str:
    """Return why there is nothing to criticise; empty for an answer. A truncated one counts: its revision can end."""
    why = fault(chain.initial)
    return "" if why in ("", TRUNCATED) else f"first answer: {why}"


def drop_reason(chain: Chain) -> str:
    """Return why a chain gives no row; empty if it gives one."""
    return no_answer(chain) or ("" if chain.revisions or chain.stopped else "no revision could be used")


def rows_of_chain(chain: Chain, keep: str) -> list[dict[str, Any]]:
    """Return rows for supervised fine-tuning: the prompt's turns, and an answer as the last.

    keep: "last", the chain's last answer (its first if no change was requested); "all", every usable revision, or
    the first answer without any.
    """
    if drop_reason(chain):
        return []
    chosen = (chain.revisions or [chain.initial]) if keep == "all" else [chain.answer]
    principles = {id(r.revision): r.says for r in chain.rounds}
    out = []
    for text in chosen:
        row: dict[str, Any] = {"messages": [*chain.prompt, {"role": "assistant", "content": text.text}]}
        row |= {"problem": chain.problem, "source": chain.source, "initial": chain.initial.text}
        row["revision"] = chain.revisions.index(text) + 1 if chain.revisions else 0
        if principles.get(id(text)):
            row["principle"] = principles[id(text)]
        if text.reward is not None:
            row |= {"reward": text.reward, "parts": text.parts}
        out.append(row)
    return out


def chain_stats(chains: Sequence[Chain], principles: Sequence[str], rows: int, stop_at: float | None) -> dict[str, Any]:
    """Return stats.json.

    Rounds: usable ones, unusable ones by reason, and those whose critique requested no change (stopped) sum to all.
    Chains: those with rows and those dropped by reason do.

    Args:
        chains: All chains of the stage.
        principles: The stage's principles.
        rows: Number of rows.
        stop_at: Reward from which an answer needs no round. None: not used.
    """
    rounds = [r for c in chains for r in c.rounds]
    texts = [t for c in chains for t in (c.initial, *(x for r in c.rounds for x in (r.critique, r.revision) if x))]
    dropped = Counter(why for c in chains if (why := drop_reason(c)))
    by_principle: list[dict[str, Any]] = [
        {"principle": p, "rounds": len(drawn), "usable": sum(r.usable for r in drawn)}
        for i, p in enumerate(principles)
        for drawn in [[r for r in rounds if r.principle == i]]
    ]
    return {
        "chains": len(chains),
        "rows": rows,
        "dropped": dict(dropped.most_common()),
        "first_answers_cut": sum(c.initial.finish == "length" for c in chains),
        "stopped": dict(Counter(c.stopped for c in chains if c.stopped).most_common()),
        "rounds": len(rounds),
        "usable": sum(r.usable for r in rounds),
        "unusable": dict(Counter(r.why for r in rounds if r.why).most_common()),
        "principles": by_principle,
        "rewards": _rewards(chains, stop_at),
        "tokens": sum(t.tokens for t in texts),
    }


def _rewards(chains: Sequence[Chain], stop_at: float | None) -> dict[str, Any]:
    """Return the mean rewards of first and last answers (of chains where both have one), and the changes at stop_at."""
    pairs = [
        (c.initial, c.answer)
        for c in chains
        if not no_answer(c) and c.initial.reward is not None and c.answer.reward is not None
    ]
    failed = sum(bool(t.failures) for c in chains for t in (c.initial, *(r.revision for r in c.rounds if r.revision)))
    if not pairs:
        return {"failed": failed} if failed else {}
    sides = {
        name: [math.fsum(float({**t.parts, "reward": t.reward}.get(name) or 0.0) for t in side) / len(pairs)
               for side in zip(*pairs, strict=True)]
        for name in ("reward", *pairs[0][0].parts)
    }  # fmt: skip
    out: dict[str, Any] = {"chains": len(pairs), "failed": failed, "first_and_last": sides}
    if stop_at is not None:
        first, last = ([(t.reward or 0.0) >= stop_at for t in side] for side in zip(*pairs, strict=True))
        gained, lost = (sum(x > y for x, y in zip(*sides, strict=True)) for sides in ((last, first), (first, last)))
        out["reached"] = {"first": sum(first), "last": sum(last), "gained": gained, "lost": lost}
    return out


def _path(folder: Path, chunk: int) -> Path:
    return folder / f"chunk-{chunk:06d}.jsonl"


def finished_chunks(folder: Path) -> list[int]:
    """Return the numbers of the finished chunks, ascending from 1."""
    return list(numbered(folder, "chunk-", ".jsonl"))


def write_chains(folder: Path, chunk: int, chains: Sequence[Chain]) -> None:
    """Write a chunk, whole or not at all.

    Args:
        folder: Folder of the chains.
        chunk: Number of the chunk, from 1.
        chains: Chains of the chunk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(_path(folder, chunk), [asdict(c) for c in chains])


def read_chains(folder: Path, chunk: int | None = None) -> list[Chain]:
    """Read the chains of a chunk (None: of all chunks).

    Raises:
        DataError: A file holds something else.
    """
    out = []
    for path in [_path(folder, c) for c in (finished_chunks(folder) if chunk is None else [chunk])]:
        try:
            out += [_chain(record) for record in read_lines(path)]
        except (TypeError, KeyError, ValueError) as error:
            raise DataError(f"{path} can't be read as chains: {error}") from error
    return out


def _chain(record: Mapping[str, Any]) -> Chain:
    rounds = [
        Round(**{**r, **{k: Text(**r[k]) if r[k] else None for k in ("critique", "revision")}})
        for r in record["rounds"]
    ]
    return Chain(**{**record, "initial": Text(**record["initial"]), "rounds": rounds})
