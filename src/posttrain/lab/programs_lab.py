"""The laboratory of small programs, whose model can run a program on a test better than it can write one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.core.types import Message
from posttrain.data.synthetic import program_talks as talks
from posttrain.data.synthetic import small_programs as language
from posttrain.lab.talk_lab import TalkLab

KEPT_APART = r"(?:\[|, )?\d+|[<>]"
"""Numbers of a list with what is before them, so that a list has few tokens; `<` and `>`, by which turns begin."""


class ProgramsLab(TalkLab):
    """Hold what is specific to the laboratory of small programs."""

    steps = 800
    batch_size = 48
    longest = 64
    answers_alone = True
    talks_read, vocabulary, apart = 6000, 768, KEPT_APART  # a token for every number and nearly every line
    problems_name = "programs"
    talk_at = staticmethod(talks.program_talk_at)
    rows = staticmethod(language.program_rows)

    @staticmethod
    def is_right(text: str, row: Mapping[str, Any]) -> bool:
        """Return True if a program of the language passes the tests that the question does not show.

        The language's programs are run without the sandbox, which is not on every machine that makes a laboratory.
        """
        return language.passes(text, row["test"])

    def measure_more(
        self,
        asked: Sequence[list[Message]],
        first: Sequence[str],
        written: Callable[[Sequence[Sequence[Message]]], list[str]],
        right_of: Callable[[Sequence[str]], list[bool]],
    ) -> dict[str, Any]:
        """Return `tested`: right programs after another one where a shown test failed, with the words of `tests`.

        Args:
            asked: The held-out problems as conversations.
            first: The likeliest first programs.
            written: Returns the likeliest next turn of conversations.
            right_of: Returns which programs are right.
        """
        rows = self.rows(self.settings.seed, self.settings.measured, True)
        told: dict[int, list[Message]] = {}
        for i, (text, row) in enumerate(zip(first, rows, strict=True)):
            lines = language.read_program(text)
            if lines is not None and not language.passes(text, row["visible"]):
                said = talks.tests_text(language.read_tests(row["visible"]), lines)
                turns: list[Message] = [{"role": "assistant", "content": text}]
                told[i] = [*asked[i], *turns, {"role": "user", "content": f"{said}\n{talks.AGAIN}"}]
        revised = dict(zip(told, written(list(told.values())), strict=True)) if told else {}
        right = right_of([revised.get(i, text) for i, text in enumerate(first)])
        return {"tested": round(sum(right) / len(right), 4)}

    @classmethod
    def describe(cls, result: Mapping[str, Any]) -> str:
        """Return a sentence about the measurement."""
        told = f" After one round of feedback by the shown tests: {result['tested']:.1%}."
        return super().describe(result) + told
