"""YAML in and out: plain data with the line of every key.

PyYAML reads YAML 1.1, where ``1e-4`` is text and ``yes`` is true, so `_Loader` gets the scalars of YAML 1.2: numbers in
the short form are numbers, and yes, no, on, off are words. ruamel.yaml reads YAML 1.2, but would be a second parser
beside PyYAML (which transformers and the Hub's client need anyway) to save these twenty lines, and it loads slower.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from posttrain.config import Recipe
from posttrain.core.errors import RecipeError
from posttrain.recipe.schema import Key, dotted


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0) if text.lstrip("+-")[:2] in ("0x", "0o") else int(text)


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
        problems: Messages so far.
    """

    data: Any = None
    places: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, key: Key) -> str:
        """Return where `key` was written, else where the nearest key above or below it was."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.places:
                return self.places[key[:end]]
        below = (place for k, place in self.places.items() if key and k[: len(key)] == key)
        return next(below, "")

    def add_problem(self, key: Key, message: str) -> None:
        """Note what is wrong with a key, after its name and place."""
        place = self.place(key)
        self.problems.append(f"{dotted(key, self.data)}{f' ({place})' if place else ''}: {message}")


def parse_document(text: str, origin: str) -> Document:
    """Return YAML text as a Document; `origin` is the name of the file in messages.

    Raises:
        RecipeError: The text is not valid YAML, or an alias contains itself.
    """
    document = Document()
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        document.data = _build(loader, node, (), document, origin, ()) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{origin}{f':{mark.line + 1}' if mark else ''}: not valid YAML: {problem}") from error
    return document


def parse_value(text: str) -> Any:
    """Return a YAML value. Raises yaml.YAMLError."""
    loader = _Loader(text)
    node = loader.get_single_node()
    return loader.construct_document(node) if node is not None else None


def _build(loader: _Loader, node: yaml.Node, key: Key, doc: Document, origin: str, above: tuple[int, ...]) -> Any:
    if id(node) in above:
        raise RecipeError(
            f"{origin}:{node.start_mark.line + 1}: {dotted(key, doc.data)} contains itself through an alias"
        )
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            doc.places[(*key, i)] = f"{origin}:{item.start_mark.line + 1}"
        return [_build(loader, item, (*key, i), doc, origin, above) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    out: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for name_node, inner in node.value:
        name, line = str(name_node.value), f"{origin}:{name_node.start_mark.line + 1}"
        if name == "<<":
            for part in inner.value if isinstance(inner, yaml.SequenceNode) else [inner]:
                value = _build(loader, part, key, doc, origin, above)
                if not isinstance(value, dict):
                    raise RecipeError(f"{line}: << merges a mapping, and this is {value!r}")
                merged = {**value, **merged}
            continue
        if name in out:
            doc.problems.append(f"{dotted((*key, name), doc.data)} ({line}): this key is given twice; keep one")
        doc.places[(*key, name)] = line
        out[name] = _build(loader, inner, (*key, name), doc, origin, above)
    return {**merged, **out}


def dump_recipe(recipe: Recipe) -> str:
    """Return YAML text with every setting; `load_recipe` of it gives an equal Recipe."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
