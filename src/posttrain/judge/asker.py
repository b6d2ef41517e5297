"""Questions to a judge and what came back: looked up first, asked where they are new, kept as soon as answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from posttrain.core.errors import CheckpointError
from posttrain.core.types import Message
from posttrain.judge.answer_store import Store, key_of

READING = 1
"""Part of every key: raised when how answers become probabilities changes, so that old ones are not taken for new."""


@dataclass(frozen=True, slots=True)
class JudgeRequest:
    """One question. labels: what the verdict may be; empty: free text is wanted (a rationale).

    max_tokens: longest answer. attempt: 0, then 1, 2, ... where the answer could not be read; it seeds what is drawn.
    """

    messages: tuple[Message, ...]
    labels: tuple[str, ...] = ()
    max_tokens: int = 16
    attempt: int = 0
    opening: str = ""
    seed: int = 0

    def content(self) -> dict[str, Any]:
        """Return all that the answer may depend on, from which the key is made."""
        content = {k: v for k, v in asdict(self).items() if v or k in ("messages", "max_tokens", "attempt")}
        if not self.attempt:
            content.pop("seed", None)  # a first attempt draws nothing
        return content


@dataclass(frozen=True, slots=True)
class JudgeAnswer:
    """A judge's answer. probabilities: of each label, as the judge's own tokens give them, not scaled to sum to 1; None
    where there are none, and the text has to be read. refused: why the judge would not take the question."""

    text: str = ""
    probabilities: Mapping[str, float] | None = None
    finish: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    refused: str = ""


OnAnswer = Callable[[Sequence[tuple[int, JudgeAnswer]]], None]
"""Called with (number of the question, answer) of those that have just been answered."""


class JudgeBackend(Protocol):
    """Answers the questions: a model in this process, or a server."""

    def identity(self) -> dict[str, Any]:
        """Return the settings that distinguish this judge's answers from another's."""

    def answer(self, asks: Sequence[JudgeRequest], on_answer: OnAnswer) -> None:
        """Answer all, in any order. If it raises, the answers that on_answer got are kept."""

    def account(self) -> dict[str, Any]:
        """Return counts of requests, retries and the like since it was made."""


class Asker:
    """A backend with its store."""

    def __init__(self, backend: JudgeBackend, store: Store) -> None:
        self.backend, self.store = backend, store
        self.judge = {**backend.identity(), "reading": READING}
        self.counts: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.seconds = 0.0
        self.seen: set[str] = set()

    def __call__(self, asks: Sequence[JudgeRequest], on_done: Callable[[int], None] | None = None) -> list[JudgeAnswer]:
        """The answer of each, in order. Questions that are the same are asked once. on_done: how many have come."""
        keys = [key_of(self.judge, a.content()) for a in asks]
        known = self.store.get(list(dict.fromkeys(keys)))
        fresh = {k: a for k, a in zip(keys, asks, strict=True) if k not in known}
        self.counts["asked"] += len(set(keys) - self.seen)
        self.counts["from the store"] += len(set(known) - self.seen)
        wanted = list(fresh)
        refused: dict[str, dict[str, Any]] = {}
        done = len(known)
        if on_done is not None:
            on_done(done)

        def keep(answered: Sequence[tuple[int, JudgeAnswer]]) -> None:
            nonlocal done
            # A refusal is no answer: it may be lifted, and costs nothing to get again.
            refused.update({wanted[i]: asdict(a) for i, a in answered if a.refused})
            records = [
                (wanted[i], self.judge, fresh[wanted[i]].content(), asdict(a)) for i, a in answered if not a.refused
            ]
            self.store.put(records)
            done += len(answered)
            self.tokens["new prompt"] += sum(a.prompt_tokens for _, a in answered)
            self.tokens["new completion"] += sum(a.completion_tokens for _, a in answered)
            if on_done is not None:
                on_done(done)

        if wanted:
            self.backend.answer([fresh[k] for k in wanted], keep)
            known |= self.store.get(wanted) | refused
        try:
            answers = {k: JudgeAnswer(**known[k]) for k in set(keys)}
        except TypeError as error:
            raise CheckpointError(
                f"{self.store.path} holds an answer of another version: {error}. Move it away"
            ) from error
        for k in set(keys) - self.seen:
            self.tokens["prompt"] += answers[k].prompt_tokens
            self.tokens["completion"] += answers[k].completion_tokens
            self.seconds += answers[k].seconds
        self.seen |= set(keys)
        return [answers[k] for k in keys]

    def cost(self) -> dict[str, Any]:
        """Return counts of questions and tokens for the labels, and of those that are new; and the backend's counts.

        answer_seconds adds up the time of each answer, in whichever run it was given. For a server that answers several
        questions at once it is more than the elapsed time.
        """
        return {
            "questions": self.counts["asked"],
            "from_store": self.counts["from the store"],
            "prompt_tokens": self.tokens["prompt"],
            "completion_tokens": self.tokens["completion"],
            "new_prompt_tokens": self.tokens["new prompt"],
            "new_completion_tokens": self.tokens["new completion"],
            "answer_seconds": round(self.seconds, 2),
            **self.backend.account(),
        }
