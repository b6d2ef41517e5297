"""Apply a tokenizer's chat template with its arguments and a fixed date.

Everything that renders a conversation ends in `apply_template`. Arguments of a recipe (`model.chat_template_args`) are
kept on the tokenizer, so that training, evaluation, sampling, judges and chat render alike. Templates that insert the
date (Llama 3.2, gpt-oss, Granite) get one date for a whole run.
"""

from __future__ import annotations

import datetime
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from posttrain.core.errors import ModelError
from posttrain.data.bad_rows import BadRow

ARGUMENTS = "posttrain_template_args"
"""Setting of a tokenizer that holds the recipe's arguments of its template; it is saved with the tokenizer."""
_fixed: list[datetime.date] = []
"""Dates set by `fixed_date`, the innermost last. A module's variable, so that threads of a run see it too."""

# A template calls strftime_now(format). transformers' own reads the clock, and arguments of a template can't be
# functions; a macro of the same name that fills the format from a table of the fixed date replaces it.
_DATE_MACRO = (
    "{% macro strftime_now(format) %}{% set posttrain_ns = namespace(out=format) %}"
    "{% for code, value in posttrain_date.items() %}{% set posttrain_ns.out = posttrain_ns.out.replace(code, value) %}"
    "{% endfor %}{{ posttrain_ns.out }}{% endmacro %}\n"
)
_CODES = (
    "%-d %-m %-H %-I %-M %-S %-j %-y %a %A %w %u %d %e %b %B %h %m %y %Y %H %I %p %M %S %f %z %Z %j %U %W %V %G "
    "%c %x %X %D %F %R %T"
)
_GIVEN = ("messages", "tools", "add_generation_prompt", "documents", "strftime_now", "raise_exception", "namespace")


@contextmanager
def fixed_date(date: str) -> Iterator[None]:
    """Let chat templates insert this date (`YYYY-MM-DD`) inside the `with` block, instead of today's."""
    _fixed.append(datetime.date.fromisoformat(date))
    try:
        yield
    finally:
        _fixed.pop()


def template_date() -> str:
    """Return the date that chat templates insert now, as `YYYY-MM-DD`."""
    return (_fixed[-1] if _fixed else datetime.date.today()).isoformat()


@lru_cache(maxsize=8)
def _date_table(date: str) -> dict[str, str]:
    moment = datetime.datetime.combine(datetime.date.fromisoformat(date), datetime.time(), datetime.UTC)
    return {code: moment.strftime(code) for code in _CODES.split()}


def bake_date(source: str) -> str:
    """Return a template that inserts the date that is inserted now, wherever and whenever it is rendered."""
    if "strftime_now" not in source:
        return source
    table = json.dumps(_date_table(template_date()), ensure_ascii=False)
    return f"{{% set posttrain_date = {table} %}}{_DATE_MACRO}{source}"


def template_of(tokenizer: Any, tools: Sequence[Any] | None = None) -> str:
    """Return the source of the tokenizer's chat template; of several, the one that `tools` selects."""
    return str(tokenizer.get_chat_template(None, tools))


@lru_cache(maxsize=64)
def _names_read(source: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names that a template may read from outside, and those of them that it does not assign itself."""
    from jinja2 import Environment, meta, nodes

    plain = re.sub(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}", "", source)
    tree = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False).parse(plain)
    read = {n for n in meta.find_undeclared_variables(tree) if n not in _GIVEN and not n.endswith("_token")}
    assigned = {node.name for node in tree.find_all(nodes.Name) if node.ctx != "load"}
    asked = {
        node.node.name
        for node in (*tree.find_all(nodes.Test), *tree.find_all(nodes.Filter))
        if node.name in ("defined", "undefined", "default") and isinstance(node.node, nodes.Name)
    }
    return frozenset(read), frozenset(read - (assigned - asked))


def template_variables(source: str) -> frozenset[str]:
    """Return the names of a template's own arguments, without those that every template is given."""
    return _names_read(source)[1]


def check_template_args(source: str, names: Sequence[str]) -> None:
    """Check that a chat template reads arguments of these names. Raises BadRow with the names that it reads."""
    for name in names:
        if name not in _names_read(source)[0] or name in _reserved():
            reads = ", ".join(sorted(template_variables(source))) or "none"
            raise BadRow(f"the chat template has no argument {name!r}", f"Arguments of the chat template: {reads}")


@lru_cache(maxsize=1)
def _reserved() -> frozenset[str]:
    from transformers import PreTrainedTokenizerBase

    return frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


def set_template_args(tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    """Keep arguments of the chat template on the tokenizer, for everything that is rendered with it.

    They are saved with the tokenizer: what opens the trained model later renders with them too.

    Raises:
        ModelError: There is no template, or it does not read one of them.
    """
    if arguments:
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError("model.chat_template_args are given, and the tokenizer has no chat template")
        try:
            check_template_args(template_of(tokenizer), tuple(arguments))
        except BadRow as error:
            raise ModelError(f"model.chat_template_args: {error}. {error.hint}") from error
        tokenizer.init_kwargs[ARGUMENTS] = {**tokenizer.init_kwargs.get(ARGUMENTS, {}), **arguments}


def template_args(tokenizer: Any, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the arguments of the recipe with a row's own arguments over them."""
    return {**getattr(tokenizer, "init_kwargs", {}).get(ARGUMENTS, {}), **(own or {})}


def template_identity(tokenizer: Any) -> str:
    """Return a text that differs if the same conversation may be rendered differently, for keys of caches."""
    source = getattr(tokenizer, "chat_template", None)
    dated = template_date() if source and "strftime_now" in str(source) else None
    return json.dumps([source, template_args(tokenizer), dated], sort_keys=True, default=str)


def apply_template(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    generation: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """Return the template's text of a conversation, with the arguments as given.

    Args:
        tokenizer: Tokenizer with the template.
        messages: Turns in the form that the template reads.
        generation: Add the generation prompt.
        tools: Tools in the form that the template reads.
        arguments: Arguments of the template.

    Raises:
        BadRow: The template refuses the conversation, with its own message.
        ModelError: It takes too long or makes too much (`template_limits`).
    """
    from posttrain.data.template_limits import TemplateLimitError, limit_templates

    limit_templates()
    given = dict(arguments or {})
    try:
        source = template_of(tokenizer, tools)
        if "strftime_now" in source:
            source = _DATE_MACRO + source
            given["posttrain_date"] = _date_table(template_date())
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            chat_template=source,
            tokenize=False,
            add_generation_prompt=generation,
            **given,
        )
    except TemplateLimitError:  # of no use for any row
        raise
    except Exception as error:  # a template may raise anything it likes
        raise BadRow(f"the chat template refuses it: {error}") from error
    return str(text)
