"""Items of evaluations of behaviour: one row of a file gives several prompts. Importing this module loads no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.config.settings import DataConfig
from posttrain.core.errors import DataError
from posttrain.core.types import Message
from posttrain.data.bad_rows import BadRow
from posttrain.data.cells import is_empty, read_text, required_field
from posttrain.data.encoding import prompt_tokens
from posttrain.data.mixing import refuse_weights
from posttrain.data.parts import PlacedRow
from posttrain.data.readers import packaged_or_own
from posttrain.data.rows import PreparedItems, manifest_entry, open_rows
from posttrain.data.turns import make_message

Parse = Callable[[PlacedRow], tuple[Sequence[str], dict[str, Any]]]
"""Reads a row: the texts of its prompts, and what the measure needs besides. Raises BadRow."""


@dataclass(frozen=True, slots=True)
class BehaviourPrompt:
    """Hold one prompt of an item: its text, its turns, and its tokens with the generation prompt."""

    text: str
    messages: tuple[Message, ...]
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class BehaviourItem:
    """Hold an item.

    Attributes:
        source: Place of the row, `file:row`.
        about: What the measure needs besides the prompts.
        prompts: The prompts, in the order of the row's texts.
    """

    source: str
    about: Mapping[str, Any]
    prompts: Sequence[BehaviourPrompt]


class BehaviourItems(PreparedItems[BehaviourItem]):
    """Hold the items of an evaluation of behaviour, and the manifest's entry about them."""

    def content(self, number: int) -> Hashable:
        """Return the texts of an item's prompts."""
        return tuple(prompt.text for prompt in self.items[number].prompts)


def load_items(
    config: DataConfig, name: str, template: str, parse: Parse, tokenizer: Any, context: int | None
) -> BehaviourItems:
    """Read the rows of an evaluation, and render their prompts as the model reads them.

    Args:
        config: Settings of the data.
        name: Name of the evaluation, for messages.
        template: Text with {prompt} in it, around every prompt.
        parse: Reads a row.
        tokenizer: The model's tokenizer.
        context: The model's length in tokens; None: unknown.

    Raises:
        DataError: The rows can't be read, or (unless data.on_bad_row is skip) there are bad rows.
    """
    refuse_weights(config, f"evaluation {name}")
    if config.prompt is not None:
        raise DataError(
            f"evaluation {name}: data.prompt makes rows of a prompt and an answer, and this evaluation reads "
            "other columns: rename columns with data.columns, and set the text around prompts with template"
        )
    rows = open_rows(config, "behaviour")

    def item(row: PlacedRow) -> BehaviourItem:
        texts, about = parse(row)
        system = [make_message("system", row.config.system)] if row.config.system else []
        prompts = []
        for text in texts:
            turns = (*system, make_message("user", template.replace("{prompt}", text)))
            tokens = prompt_tokens({"messages": turns, "source": row.source}, tokenizer, row.config)
            if context is not None and len(tokens) >= context:
                raise BadRow(f"too long (a prompt has {len(tokens)} tokens, and the model's length is {context})")
            prompts.append(BehaviourPrompt(text, turns, tokens))
        return BehaviourItem(row.source, about, prompts)

    items = rows.read(item)
    rows.check(len(items))
    prompts = [prompt for one in items for prompt in one.prompts]
    stats = manifest_entry(
        [len(prompt.tokens) for prompt in prompts],
        rows.bad,
        config.name,
        sha256=rows.hashes,
        layout="behaviour",
        rows=len(rows.order),
        examples=[{"text": one.source, "pieces": [[one.prompts[0].text, 0.0]]} for one in items[:3]],
        **rows.by_source(),
        **rows.fields.entry(),
    )
    return BehaviourItems(items, {**stats, "used": len(items)})


def text_of(row: PlacedRow, name: str) -> str:
    """Return a column as text. Raises BadRow if it is missing or empty."""
    text = read_text(required_field(row.row, name), name)
    if not text.strip():
        raise BadRow(f"empty {name}")
    return text


def texts_of(row: PlacedRow, name: str, least: int) -> list[str]:
    """Return a column that holds a list of different texts (in a table of text: as JSON).

    Args:
        row: The row.
        name: Name of the column.
        least: Number of texts that it must have.

    Raises:
        BadRow: It is missing, no such list, or has fewer texts.
    """
    value = required_field(row.row, name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRow(f"{name} is text that is no JSON, expected a list of texts") from None
    if not isinstance(value, list | tuple) or len(value) < least or any(is_empty(text) for text in value):
        raise BadRow(f"{name} is {value!r}, expected a list of at least {least} texts")
    texts = [read_text(text, name) for text in value]
    if len(set(texts)) < len(texts):
        raise BadRow(f"{name} has a text twice")
    return texts


Terms = dict[str, dict[str, list[dict[str, str]]]]
"""Set of groups → group → terms, each a mapping from the field in a prompt to the text that fills it."""


def read_terms(terms: Mapping[str, Any] | str) -> Terms:
    """Return the terms of settings or of a JSON file; a term that is a text fills the field {term}.

    Args:
        terms: Set → group → terms, or the path of a JSON file that holds it (or packaged:NAME).

    Raises:
        DataError: The file can't be read, or is of another form; a set has fewer than two groups, or terms whose fields
            differ.
    """
    where = terms if isinstance(terms, str) else "terms"
    if isinstance(terms, str):
        try:
            terms = json.loads(packaged_or_own(terms).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"terms {where}: can't be read as JSON ({error})") from error
    form = 'expected {"set": {"group": ["term", …], "other group": […]}}, a term being a text or {"field": "text"}'
    if not isinstance(terms, Mapping) or not terms or not all(isinstance(g, Mapping) for g in terms.values()):
        raise DataError(f"{where}: {form}")
    out: Terms = {}
    for name, groups in terms.items():
        if len(groups) < 2 or not all(isinstance(listed, list) and listed for listed in groups.values()):
            raise DataError(f"{where}, set {name!r}: {form}, with at least two groups")
        out[name] = {
            group: [{"term": t} if isinstance(t, str) else t for t in listed] for group, listed in groups.items()
        }
        fields = {tuple(sorted(t)) if isinstance(t, Mapping) else () for of in out[name].values() for t in of}
        if len(fields) != 1 or () in fields:
            raise DataError(f"{where}, set {name!r}: every term needs the same fields, and there are {sorted(fields)}")
    return out


def fill_term(template: str, term: Mapping[str, str]) -> str:
    """Return a prompt with its fields filled: {they} by the term's text, {They} by the same with a capital letter.

    Raises:
        BadRow: The prompt has another field, or none.
    """
    fields = {**term, **{name.capitalize(): text[:1].upper() + text[1:] for name, text in term.items()}, **term}
    try:
        filled = template.format_map(fields)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise BadRow(f"the prompt has a field that no term fills ({error!r}); fields are {', '.join(term)}") from error
    if filled == template:
        raise BadRow(f"the prompt has no field for a term: write one of {{{'}, {'.join(term)}}} in it")
    return filled
