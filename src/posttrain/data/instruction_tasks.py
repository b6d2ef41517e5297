"""Describe tasks of which instructions are made: the table, the fields, the wordings, the labels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from pydantic import Field, field_validator, model_validator

from posttrain.config.base import Config
from posttrain.config.settings import NAME, DataConfig
from posttrain.data.instruction_wordings import (
    INPUT_FIELDS,
    INVERTED_TARGET,
    LABELLED,
    TaskType,
    Template,
    Wording,
    as_wordings,
    language_name,
    shipped_wordings,
)

READING_SETTINGS = frozenset(
    ("source", "split", "subset", "columns", "classes", "rows", "shuffle_seed", "on_bad_row", "ignore", "max_rows")
)
"""Settings of `data` that say which rows are read; the others say how rows become samples, which is the task's part."""
NAMED_ANYWHERE = ("language", "description")
"""Fields that every wording can name."""


class InstructionTask(Config):
    """A task: a table, and how its rows become instructions."""

    name: str = Field(pattern=NAME, description="Name of the task; no other task has it.")
    type: TaskType = Field(description="Kind of task; it decides which fields there are and which wordings ship.")
    cluster: str = Field(
        "", description="Group of similar tasks, which is held out as a whole. Empty: the name of the type."
    )
    language: str = Field("en", description="Language of the input: an ISO 639 code, or its name.")
    output_language: str | None = Field(None, description="Language of the output, for translation.")
    domain: str = Field("", description="What the texts are about, for the report.")
    description: str | None = Field(
        None, description="What is to be done, put before the wordings that ship; {description} in a task's wordings."
    )
    data: DataConfig = Field(description="Where the rows are: a path (relative to this file), or a block with source.")
    fields: dict[str, str] = Field(
        description="Templates with {column} places: input; question and context; premise and hypothesis; input and what."
    )
    output: str = Field(min_length=1, description="Template of the right answer.")
    labels: dict[str, list[str]] | None = Field(
        None,
        description="Words for each value of the output. A wording uses one of them for each. None: the values themselves.",
    )
    rationale: str | None = Field(None, description="Template of the reasoning that leads to the answer.")
    wordings: list[str] = Field(default_factory=list, description="More wordings: templates over the fields.")
    shipped_wordings: bool = Field(True, description="Use the wordings that ship for the type as well.")
    inverted: list[str] = Field(
        default_factory=list, description="More wordings of the inverted task, which name {output} and not the input."
    )
    demonstrations: list[dict[str, str]] = Field(
        default_factory=list,
        description="Examples to show: the fields, output and, if rows have one, rationale. Empty: drawn from the rows.",
    )
    group: str | None = Field(
        None, description="Column; rows with the same value in it are paraphrases, and never shown to one another."
    )
    group_terms: dict[str, list[str]] | None = Field(
        None,
        description="Words of groups of people, for the table of labels by group. None: a list for English and German.",
    )
    max_rows: int | None = Field(None, ge=1, description="Most examples that are taken of this task. None: all.")
    weight: float = Field(1.0, gt=0, le=1000, description="Factor of the task's share in the mixture.")

    @field_validator("data", mode="before")
    @classmethod
    def _source_alone(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @field_validator("data")
    @classmethod
    def _only_reading(cls, value: DataConfig) -> DataConfig:
        for entry in (value, *value.sources()):
            fields = type(entry).model_fields  # defaults that are written out, as in a dumped recipe, change nothing
            default = {name: fields[name].get_default(call_default_factory=True) for name in entry.model_fields_set}
            given = {name for name, value in default.items() if getattr(entry, name) != value}
            if more := sorted(given - READING_SETTINGS - {"weight"}):
                raise ValueError(
                    f"{more[0]} is not for the rows of a task, whose texts come from fields and output. "
                    f"There are: {', '.join(sorted(READING_SETTINGS - {'max_rows'}))}"
                )
            if getattr(entry, "weight", 1.0) != 1:
                raise ValueError("a source of a task has no weight: the task has one (weight, beside data)")
        return value

    @field_validator("labels", "group_terms", mode="before")
    @classmethod
    def _lists_of_text(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        lists = {
            str(cell_of_yaml(name)): words if isinstance(words, list) else [words] for name, words in value.items()
        }
        return {name: [cell_of_yaml(word) for word in words] for name, words in lists.items()}

    @field_validator("fields", mode="before")
    @classmethod
    def _constants(cls, value: Any) -> Any:
        return {n: cell_of_yaml(v) for n, v in value.items()} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _fits(self) -> InstructionTask:
        self._check_fields()
        self._check_languages()
        self._check_labels()
        self._check_wordings()
        self._check_demonstrations()
        return self

    def _check_fields(self) -> None:
        needed = INPUT_FIELDS[self.type]
        if missing := [name for name in needed if not self.fields.get(name, "").strip()]:
            raise ValueError(f"fields.{missing[0]} is missing: a task of type {self.type} has {' and '.join(needed)}")
        if reserved := sorted({"output", "labels", "options", "output_language", *NAMED_ANYWHERE} & self.fields.keys()):
            raise ValueError(f"fields.{reserved[0]}: the name is taken; call the field something else")
        for name, text in {**{f"fields.{n}": t for n, t in self.fields.items()}, **self._templates()}.items():
            _template(name, text)
        for name in self.fields:
            if not name.isidentifier():
                raise ValueError(f"fields: {name!r} is no name: expected letters, digits and _")
        if not any(Template(text).fields for text in self.fields.values()):
            raise ValueError("fields name no column, such as {text}: all rows would have the same input")

    def _templates(self) -> dict[str, str]:
        return {"output": self.output, **({} if self.rationale is None else {"rationale": self.rationale})}

    def _check_languages(self) -> None:
        language_name(self.language)
        if self.type == "translation":
            if self.output_language is None:
                raise ValueError("output_language is missing: a translation has a language that it is written in")
            if language_name(self.output_language) == language_name(self.language):
                raise ValueError(f"language and output_language are both {self.language!r}")
        elif self.output_language is not None:
            raise ValueError(f"output_language is for translation, and the task is of type {self.type}")

    def _check_labels(self) -> None:
        if self.labels is None:
            return
        if self.type not in LABELLED:
            raise ValueError(f"labels are for {' and '.join(LABELLED)}, and the task is of type {self.type}")
        if len(self.labels) < 2:
            raise ValueError(f"labels has {len(self.labels)} value, and a choice has at least two")
        for value, words in self.labels.items():
            if not words or not all(word.strip() for word in words):
                raise ValueError(f"labels.{value}: expected one or more words")
        for chosen in self.label_sets(sorted(self.labels)):
            said = list(chosen.values())
            if twice := sorted({word for word in said if said.count(word) > 1}):
                both = [value for value, word in chosen.items() if word == twice[0]]
                raise ValueError(f"labels: {both[0]!r} and {both[1]!r} would both be called {twice[0]!r} in a wording")

    def _check_wordings(self) -> None:
        known = {*self.fields, *NAMED_ANYWHERE}
        known |= {"labels", "options"} if self.type in LABELLED else set()
        known |= {"output_language"} if self.type == "translation" else set()
        needed, target = INPUT_FIELDS[self.type], INVERTED_TARGET[self.type]
        filled = [name for name in needed if Template(self.fields[name]).fields]
        for kind, texts, names in (
            ("wordings", self.wordings, filled),
            ("inverted", self.inverted, ["output", *(name for name in filled if name != target)]),
        ):
            for i, text in enumerate(texts):
                named = _template(f"{kind}.{i}", text).fields
                allowed = known - {target} | {"output"} if kind == "inverted" else known
                if kind == "inverted" and target in named:
                    raise ValueError(f"inverted.{i} names {{{target}}}, which is the answer of the inverted task")
                if unknown := [n for n in named if n not in allowed]:
                    raise ValueError(f"{kind}.{i} names {{{unknown[0]}}}, and there are: {', '.join(sorted(allowed))}")
                if missing := [n for n in names if n not in named]:
                    raise ValueError(f"{kind}.{i} does not name {{{missing[0]}}}: the row's text would be missing")
        if not self.shipped_wordings and not self.wordings:
            raise ValueError("shipped_wordings is false and wordings is empty: there is no way to ask for the task")

    def _check_demonstrations(self) -> None:
        needed = {*INPUT_FIELDS[self.type], "output"}
        for i, shown in enumerate(self.demonstrations):
            if missing := sorted(needed - {n for n, text in shown.items() if text.strip()}):
                raise ValueError(f"demonstrations.{i}.{missing[0]} is missing or empty")
            if unknown := sorted(shown.keys() - {*self.fields, "output", "rationale"}):
                raise ValueError(f"demonstrations.{i}.{unknown[0]}: no such field")
            if self.labels is not None and shown["output"] not in self.labels:
                raise ValueError(
                    f"demonstrations.{i}.output is {shown['output']!r}, and labels has {list(self.labels)}"
                )

    @property
    def cluster_name(self) -> str:
        """Return the cluster."""
        return self.cluster or self.type

    def label_sets(self, values: list[str]) -> list[dict[str, str]]:
        """Return the ways to name the labels: value -> word; a wording uses one of them.

        Args:
            values: Values of the output, in the order in which labels are listed; those of `labels` if it is set.
        """
        if self.labels is None:
            return [{value: value for value in values}]
        count = max(len(words) for words in self.labels.values())
        return [{value: words[i % len(words)] for value, words in self.labels.items()} for i in range(count)]

    @cached_property
    def all_wordings(self) -> list[Wording]:
        """Return the wordings of the task: those that ship first, then its own."""
        return as_wordings([*self._shipped("wordings"), *self.wordings])

    @cached_property
    def all_inverted(self) -> list[Wording]:
        """Return the wordings of the inverted task; none if its answer would be the same in all rows."""
        if not Template(self.fields[INVERTED_TARGET[self.type]]).fields:
            return []
        return as_wordings([*self._shipped("inverted"), *self.inverted])

    def _shipped(self, kind: str) -> list[str]:
        if not self.shipped_wordings:
            return []
        before = "" if self.description is None else self.description.replace("{", "{{").replace("}", "}}") + "\n\n"
        if kind == "inverted":
            before = ""  # it describes the task, not the inverted one
        return [f"{before}{text}" for text in shipped_wordings()[self.type][kind]]


def cell_of_yaml(value: Any) -> Any:
    """Return a number, true or false of YAML as the text that a cell would hold; other values unchanged."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))  # as a cell that holds it is read
    return str(value) if isinstance(value, int | float) else value


def _template(name: str, text: str) -> Template:
    try:
        return Template(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
