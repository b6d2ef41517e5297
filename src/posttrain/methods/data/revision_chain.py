"""A chain of critiques and revisions: what was written, what of it could be used, and what comes of it.

Every round ends in one outcome: its revision could be used, or it could not for one reason. So does every chain: rows,
or none for one reason. The account adds up.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from posttrain.core.errors import DataError
from posttrain.core.files import read_lines, write_text
from posttrain.core.types import Message

CUT = "cut at the longest length"
NO_ROOM = "no room in the context"
BY_REWARD = "its reward was reached"
BY_VERDICT = "its critique asked for no change"


@dataclass(slots=True)
class Text:
    """Something that was written. finish: why it ended, as a rollout's; `error` with the reason as its text.

    tokens: how many (0: a server's, not known). reward: of an answer, None where there is none; parts, failures: its
    parts, and what went wrong with one, by name.
    """

    text: str
    finish: str
    tokens: int = 0
    reward: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Round:
    """One critique and one revision. principle: its number, and says: its words. why: the reason why its revision can't
    be used, as none of a round that failed is: the answer stays as it was. No revision and no reason: the critique was
    content with the answer."""

    principle: int | None
    says: str
    critique: Text | None = None
    revision: Text | None = None
    why: str = ""

    @property
    def usable(self) -> bool:
        """Whether its revision is the chain's next answer."""
        return self.revision is not None and not self.why


@dataclass(slots=True)
class Chain:
    """A prompt, its first answer, and the rounds. stopped: why it ended before its last round; empty: it did not."""

    problem: int
    source: str
    prompt: list[Message]
    initial: Text
    rounds: list[Round] = field(default_factory=list)
    stopped: str = ""

    @property
    def revisions(self) -> list[Text]:
        """Revisions that could be used, in order."""
        return [r.revision for r in self.rounds if r.revision is not None and r.usable]

    @property
    def answer(self) -> Text:
        """The newest that can be used: what a further round begins from."""
        return ([self.initial] + self.revisions)[-1]


def fault(text: Text, before: Sequence[tuple[str, str]] = ()) -> str:
    """Why a text can't be used: refused, no room for it, empty, cut, or a text that is there already, but for spaces.

    before: (name, text) of those. Empty: it can be used.
    """
    if text.finish == "error":
        return NO_ROOM if text.text == NO_ROOM else "refused"
    if not text.text.strip():
        return "empty"
    if text.finish == "length":
        return CUT
    return next((f"the same as {name}" for name, other in before if text.text.split() == other.split()), "")


def without_answer(chain: Chain) -> str:
    """Why there is nothing to criticise. A first answer that was cut is criticised too: its revision has an end."""
    why = fault(chain.initial)
    return "" if why in ("", CUT) else f"first answer: {why}"


def outcome(chain: Chain) -> str:
    """Why a chain gives no row; empty where it gives one."""
    why = without_answer(chain)
    if why:
        return why
    return "" if chain.revisions or chain.stopped else "no revision could be used"


def rows_of(chain: Chain, keep: str) -> list[dict[str, Any]]:
    """What supervised fine-tuning reads: the turns as they were asked, and an answer as the last.

    keep: last, the chain's last answer (its first where no change was called for); all, every revision that could be
    used, or that answer where there was none.
    """
    if outcome(chain):
        return []
    chosen = (chain.revisions or [chain.initial]) if keep == "all" else [chain.answer]
    said = {id(r.revision): r.says for r in chain.rounds}
    out = []
    for text in chosen:
        about: dict[str, Any] = {"problem": chain.problem, "source": chain.source, "initial": chain.initial.text}
        about["revision"] = chain.revisions.index(text) + 1 if chain.revisions else 0
        if said.get(id(text)):
            about["principle"] = said[id(text)]
        if text.reward is not None:
            about |= {"reward": text.reward, "parts": text.parts}
        out.append({"messages": [*chain.prompt, {"role": "assistant", "content": text.text}], **about})
    return out


def stats_of(chains: Sequence[Chain], principles: Sequence[str], rows: int, stop_at: float | None) -> dict[str, Any]:
    """The account. Rounds: usable ones, unusable ones by reason, and those whose critique asked for no change (stopped)
    sum to all. Chains: those with rows and those dropped by reason do."""
    rounds = [r for c in chains for r in c.rounds]
    texts = [t for c in chains for t in (c.initial, *(x for r in c.rounds for x in (r.critique, r.revision) if x))]
    dropped = Counter(why for c in chains if (why := outcome(c)))
    by_principle: list[dict[str, Any]] = [
        {"principle": p, "rounds": len(of), "usable": sum(r.usable for r in of)}
        for i, p in enumerate(principles)
        for of in [[r for r in rounds if r.principle == i]]
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
    """Of chains whose first and last answers both have a reward: the means, and at stop_at how many changed sides."""
    pairs = [
        (c.initial, c.answer)
        for c in chains
        if not without_answer(c) and c.initial.reward is not None and c.answer.reward is not None
    ]
    failed = sum(bool(t.failures) for c in chains for t in (c.initial, *(r.revision for r in c.rounds if r.revision)))
    if not pairs:
        return {"failed": failed} if failed else {}
    names = ["reward", *pairs[0][0].parts]
    sides = {
        name: [
            math.fsum(float((t.reward or 0.0) if name == "reward" else t.parts.get(name, 0.0)) for t in side)
            / len(pairs)
            for side in zip(*pairs, strict=True)
        ]
        for name in names
    }
    out: dict[str, Any] = {"chains": len(pairs), "failed": failed, "first_and_last": sides}
    if stop_at is not None:
        was, now = ([(t.reward or 0.0) >= stop_at for t in side] for side in zip(*pairs, strict=True))
        out["reached"] = {"first": sum(was), "last": sum(now)}
        out["reached"]["gained"] = sum(b and not a for a, b in zip(was, now, strict=True))
        out["reached"]["lost"] = sum(a and not b for a, b in zip(was, now, strict=True))
    return out


def path_of(folder: Path, chunk: int) -> Path:
    """Where a chunk's chains lie; the first has number 1."""
    return folder / f"chunk-{chunk:06d}.jsonl"


def chunks_there(folder: Path) -> list[int]:
    """Numbers of the chunks that are finished, ascending."""
    return sorted(int(p.stem[6:]) for p in folder.glob("chunk-*.jsonl") if p.stem[6:].isdigit())


def write_chains(folder: Path, chunk: int, chains: Sequence[Chain]) -> None:
    """Write a chunk, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(asdict(c), ensure_ascii=False) + "\n" for c in chains)
    write_text(path_of(folder, chunk), lines)


def read_chains(folder: Path, chunk: int | None = None) -> list[Chain]:
    """The chains of a chunk, or of all. Raises DataError where a file does not hold any."""
    paths = [path_of(folder, c) for c in (chunks_there(folder) if chunk is None else [chunk])]
    out = []
    for path in paths:
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
