"""Leave out what a recipe says about its own table if it is given another one (imports no torch).

`stages.kto.data.source=thumbs.jsonl` replaces the film reviews of the recipe kto. Its templates, classes and range of
rows describe these reviews and would be wrong for any other table, even if they happened to fit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from posttrain.recipe.documents import Document
from posttrain.recipe.messages import short
from posttrain.recipe.schema import Key, dotted

log = logging.getLogger("posttrain")
OF_THE_TABLE = (
    "layout",
    "columns",
    "ignore",
    "classes",
    "prompt",
    "completion",
    "rows",
    "split",
    "subset",
    "separator",
)
"""Settings of a data block that describe its table."""


def data_sources(value: Any, key: Key = ()) -> dict[Key, Any]:
    """Return the source of every data block of a recipe, by the key of the block."""
    if isinstance(value, dict) and key[-1:] in (("data",), ("held_out",)) and "source" in value:
        return {key: value["source"]}
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {k: source for name, item in inner for k, source in data_sources(item, (*key, name)).items()}


def leave_out_descriptions(document: Document, before: dict[Key, Any], given: Callable[[Key], bool]) -> None:
    """Remove settings that describe tables which were replaced, and held-out rows of these tables; log what is removed.

    Args:
        document: The recipe, with its sources replaced.
        before: Its sources before (`data_sources`).
        given: Returns True for a key that was written together with the new source, which stays.
    """
    for key, source in data_sources(document.data).items():
        old = before.get(key)
        if old is None or _names(old) == _names(source):
            continue
        block = _at(document.data, key)
        gone = [n for n in OF_THE_TABLE if block.get(n) is not None and (*key, n) in document.places]
        gone = [n for n in gone if not given((*key, n))]
        for name in gone:
            del block[name]
        name = dotted(key, document.data)
        if gone:
            log.warning(
                "%s: %s described %s and %s left out, since the source is %s. To keep one, write it too: %s.%s=...",
                *(name, ", ".join(gone), short(old), "is" if len(gone) == 1 else "are", short(source), name, gone[-1]),
            )
        for held in _held_out(document, key, old, given):
            log.warning(
                "%s is left out: it held out rows of %s, and %s is %s. For other held-out rows: %s=...",
                *(
                    dotted(held, document.data),
                    short(old),
                    f"{name}.source",
                    short(source),
                    dotted(held, document.data),
                ),
            )
            _at(document.data, held[:-1])[held[-1]] = None


def _names(source: Any) -> list[Any]:
    """Return the names of the sources: other settings of an entry are no other table."""
    entries = source if isinstance(source, list) else [source]
    return [entry.get("source") if isinstance(entry, dict) else entry for entry in entries]


def _held_out(document: Document, key: Key, old: Any, given: Callable[[Key], bool]) -> Iterator[Key]:
    """Yield the key of the stage's held_out block if it reads the replaced table still."""
    held = (*key[:2], "held_out")
    if key[:1] != ("stages",) or "held_out" in key or given(held):
        return
    if old in data_sources(_at(document.data, key[:2]).get("held_out"), ("held_out",)).values():
        yield held


def _at(value: Any, key: Key) -> Any:
    for part in key:
        value = value[part]
    return value
