"""Wordings of instructions: templates that ship with posttrain for each type of task, and those of a task itself."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, get_args

import yaml

from posttrain.data.readers import packaged_or_own

TaskType = Literal[
    "classification",
    "translation",
    "summarisation",
    "question_answering",
    "inference",
    "extraction",
    "paraphrase",
]
TASK_TYPES: tuple[str, ...] = get_args(TaskType)
SHIPPED = "packaged:instruction_wordings.yaml"
INPUT_FIELDS = {
    **dict.fromkeys(TASK_TYPES, ("input",)),
    "question_answering": ("question",),
    "inference": ("premise", "hypothesis"),
    "extraction": ("input", "what"),
}
"""Fields that a task of each type has, and that each of its wordings names."""
INVERTED_TARGET = {**dict.fromkeys(TASK_TYPES, "input"), "question_answering": "question", "inference": "hypothesis"}
"""Field that is the answer of an inverted task."""
LABELLED = ("classification", "inference")
"""Types whose answer is one of a few labels."""
MISSPELT = 0.85
"""Share of letters that a misspelt name has in common with the right one (difflib)."""
_LANGUAGE = re.compile(r"([a-z]{2,3})(?:[-_@]([A-Za-z0-9]+))?(?:[-_@][A-Za-z0-9]+)*")
_VARIANTS = {
    "pt_br": "Brazilian Portuguese",
    "zh_cn": "Simplified Chinese",
    "zh_hans": "Simplified Chinese",
    "zh_tw": "Traditional Chinese",
    "zh_hant": "Traditional Chinese",
    "sr_latn": "Serbian in Latin script",
    "sr_latin": "Serbian in Latin script",
    "en_gb": "British English",
    "en_au": "Australian English",
    "es_ar": "Argentinian Spanish",
    "es_mx": "Mexican Spanish",
}


class Template:
    """Hold a text with {field} places, read once.

    Attributes:
        text: The text as it was written.
        fields: Names of its fields, in their order.
    """

    __slots__ = ("_parts", "fields", "text")

    def __init__(self, text: str) -> None:
        """Read a template.

        Raises:
            ValueError: A brace has no partner, or a field is more than a name.
        """
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"{error}; write {{{{ and }}}} for braces that are meant as such") from error
        for _, name, spec, conversion in parts:
            if name is not None and (spec or conversion or not name):
                raise ValueError(f"a field is a name alone, {{{name or 'input'}}}, without !r or :.2f")
        self.text = text
        self._parts = [(literal, name) for literal, name, _, _ in parts]
        self.fields = tuple(dict.fromkeys(name for _, name in self._parts if name is not None))

    def fill(self, values: Mapping[str, str]) -> str:
        """Return the text with its fields filled; braces in values stay as they are."""
        return "".join(literal if name is None else literal + values[name] for literal, name in self._parts)


@dataclass(frozen=True, slots=True)
class Wording:
    """Hold one way to ask for a task.

    Attributes:
        number: Its number among the wordings of the task (or among the inverted ones).
        template: The text.
        has_context: True if it is for rows with a context.
    """

    number: int
    template: Template
    has_context: bool


@cache
def shipped_wordings() -> dict[str, Any]:
    """Return what ships with posttrain: by type `wordings` and `inverted`; `rationale`; `languages`."""
    loaded: dict[str, Any] = yaml.safe_load(packaged_or_own(SHIPPED).read_text(encoding="utf-8"))
    return loaded


def as_wordings(texts: Sequence[str]) -> list[Wording]:
    """Return templates as numbered wordings."""
    templates = [Template(text) for text in texts]
    return [Wording(i, t, "context" in t.fields) for i, t in enumerate(templates)]


def language_name(code: str) -> str:
    """Return the English name of a language by its ISO 639 code (with a region or script: pt-BR), or a name as it is.

    Raises:
        ValueError: It looks like a code, and is none that is known; or it is nearly the name of a known language.
    """
    found, names = _LANGUAGE.fullmatch(code.strip()), shipped_wordings()["languages"]
    if found is None:
        if not code.strip():
            raise ValueError("expected the code of a language (ISO 639) or its name, and it is empty")
        known = {name.casefold(): name for name in names.values()}
        if (said := code.strip().casefold()) in known:
            return str(known[said])
        if near := get_close_matches(said, known, 1, cutoff=MISSPELT):
            raise ValueError(f"{code!r} is no language that is known here: did you mean {known[near[0]]}?")
        return code.strip()
    variant = f"{found[1]}_{found[2]}".lower()
    name = _VARIANTS.get(variant) or names.get(found[1])
    if name is None:
        raise ValueError(f"{code!r} is no language code that is known here: write the language's name, such as Klingon")
    return str(name)
