"""YAML in and out: plain data with the line of every key.

PyYAML reads YAML 1.1, where ``1e-4`` is text and ``yes`` is true, so `_Loader` gets the scalars of YAML 1.2: numbers in
the short form are numbers, and yes, no, on, off are words. ruamel.yaml reads YAML 1.2, but would be a second parser
beside PyYAML (which transformers and the Hub's client need anyway) to save these twenty lines, and it loads slower.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import BaseModel

from posttrain.config import Recipe
from posttrain.core.errors import RecipeError
from posttrain.core.secrets import holds_secret
from posttrain.recipe.schema import Key, dotted

MAX_RECIPE = 500_000
"""Longest text of a recipe."""
MAX_VALUES = 5_000
"""Most keys and values of a recipe, counted again for each alias that stands for them."""
MAX_DEPTH = 40
"""Most mappings and lists inside of one another."""
MAX_PROBLEMS = 20
"""Most problems that one message lists."""
MAX_INTEGER = 2**63 - 1
"""Largest size of an integer: what files, torch and numpy hold."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2, and with limits, so that no text keeps it busy."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def __init__(self, text: str) -> None:
        self.count = self.depth = 0
        super().__init__(text)

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        # A bracket may begin a key, so the scanner reads far ahead of what is composed: it needs the limit as well.
        if self.flow_level > MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, f"more than {MAX_DEPTH} levels of nesting", self.get_mark())
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        mark = self.peek_event().start_mark
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, f"more than {MAX_DEPTH} levels of nesting", mark)
        self.count_value(mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def count_value(self, mark: yaml.Mark) -> None:
        """Count one value more. Raises MarkedYAMLError if there are too many."""
        self.count += 1
        if self.count > MAX_VALUES:
            raise yaml.MarkedYAMLError(None, None, f"more than {MAX_VALUES:,} values, aliases resolved", mark)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0) if text.lstrip("+-")[:2] in ("0x", "0o") else int(text)

    def scalar(self, node: yaml.ScalarNode) -> Any:
        """Return the value of a scalar. Raises MarkedYAMLError for one that is not what its tag says."""
        try:
            value = self.construct_object(node)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            problem = f"{node.value[:40]!r} of {len(node.value):,} characters is no {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(None, None, problem, node.start_mark) from error
        if isinstance(value, str):
            return _joined(value)
        if not isinstance(value, bool | int | float | None):
            problem = f"expected text, a number, true, false or null, got {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)
        return value


def _joined(text: str) -> str:
    """Return text with each pair of surrogates ("\\ud83d\\ude00", as JSON writes it) as the character that it is."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def refused_values(value: Any, key: Key = ()) -> Iterator[tuple[Key, str]]:
    """Yield the key of each value that no setting can have, whatever its type, and why."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from refused_values(inner, (*key, name))
    elif isinstance(value, float) and not math.isfinite(value):
        yield key, f"expected a finite number, got {value}"
    elif isinstance(value, int) and abs(value) > MAX_INTEGER:
        yield key, f"expected an integer of at most {MAX_INTEGER}, got one of {value.bit_length()} bits"
    elif isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        yield key, f"{value[:40]!r} holds half of a character (a lone surrogate), which no file can hold"
    elif isinstance(value, str) and holds_secret(value):
        yield key, "holds a key, and a recipe is copied into the run and its report: name the key's variable instead"


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or `_Loader` would read as something else than text; writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_SCALARS = [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
]
for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
_Dumper.add_representer(
    str, lambda d, s: d.represent_scalar("tag:yaml.org,2002:str", s, style="|" if "\n" in s.strip("\n") else None)
)


@dataclass
class Document:
    """A recipe before it is checked.

    Attributes:
        data: Plain mappings, lists and scalars.
        places: Where each key was written: "FILE:LINE" or "override KEY=VALUE".
        problems: Messages so far, at most MAX_PROBLEMS.
        more: Problems beyond them.
        refused: Keys whose value has a message already.
        root: Settings class that checks it.
        name: What messages about the whole call it; empty: the recipe.
    """

    data: Any = None
    places: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    more: int = 0
    refused: set[Key] = field(default_factory=set)
    root: type[BaseModel] = Recipe
    name: str = ""

    def place(self, key: Key) -> str:
        """Return where `key` was written, else where the nearest key above or below it was."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.places:
                return self.places[key[:end]]
        below = (place for k, place in self.places.items() if key and k[: len(key)] == key)
        return next(below, "")

    @property
    def full(self) -> bool:
        """Return True if further problems are only counted: to find the right key for each takes time."""
        return len(self.problems) >= MAX_PROBLEMS

    def note(self, message: str) -> None:
        """Add a message to the problems, or count it if there are many."""
        if self.full:
            self.more += 1
        else:
            self.problems.append(message if len(message) <= 2000 else f"{message[:2000]}…")

    def add_problem(self, key: Key, message: str) -> None:
        """Note what is wrong with a key, after its name and place."""
        place = "" if self.full else self.place(key)
        named = self.name if self.name and not key else "" if self.full else dotted(key, self.data, self.root)
        self.note("" if self.full else f"{named}{f' ({place})' if place else ''}: {message}")


def parse_document(text: str, origin: str) -> Document:
    """Return YAML text as a Document; `origin` is the name of the file in messages.

    Raises:
        RecipeError: The text is not valid YAML, is too large, holds a value that no setting can have, or an alias
            contains itself.
    """
    document = Document()
    if len(text) > MAX_RECIPE:
        raise RecipeError(f"{origin}: a recipe has at most {MAX_RECIPE:,} characters, and this has {len(text):,}")
    try:
        document.data = _load(text, document, origin)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{origin}{f':{mark.line + 1}' if mark else ''}: not valid YAML: {problem[:300]}") from error
    return document


def parse_value(text: str) -> Any:
    """Return a YAML value. Raises yaml.YAMLError."""
    if len(text) > MAX_RECIPE:
        raise yaml.YAMLError(f"more than {MAX_RECIPE:,} characters")
    return _load(text, Document(), "value")


def _load(text: str, document: Document, origin: str) -> Any:
    loader = _Loader(text)
    node = loader.get_single_node()
    loader.count = 0
    return _build(loader, node, (), document, origin, ()) if node is not None else None


def _build(loader: _Loader, node: yaml.Node, key: Key, doc: Document, origin: str, above: tuple[int, ...]) -> Any:
    loader.count_value(node.start_mark)
    if id(node) in above:
        raise RecipeError(
            f"{origin}:{node.start_mark.line + 1}: {dotted(key, doc.data)} contains itself through an alias"
        )
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            doc.places[(*key, i)] = f"{origin}:{item.start_mark.line + 1}"
        return [_build(loader, item, (*key, i), doc, origin, above) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return loader.scalar(node)
    assert isinstance(node, yaml.MappingNode)
    out: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for name_node, inner in node.value:
        if not isinstance(name_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(
                None, None, "expected text as a key, got a list or mapping", name_node.start_mark
            )
        name, line = str(name_node.value), f"{origin}:{name_node.start_mark.line + 1}"
        if name == "<<":
            for part in inner.value if isinstance(inner, yaml.SequenceNode) else [inner]:
                value = _build(loader, part, key, doc, origin, above)
                if not isinstance(value, dict):
                    raise RecipeError(f"{line}: << merges a mapping, and this is {value!r}")
                merged = {**value, **merged}
            continue
        if name in out:
            doc.note(f"{dotted((*key, name), doc.data)} ({line}): this key is given twice; keep one")
        doc.places[(*key, name)] = line
        out[name] = _build(loader, inner, (*key, name), doc, origin, above)
    return {**merged, **out}


def dump_recipe(recipe: Recipe) -> str:
    """Return YAML text with every setting; `load_recipe` of it gives an equal Recipe."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
