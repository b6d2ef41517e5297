"""Limit the time and the size of a chat template's work: jinja's sandbox keeps it from files and code, not from either.

A template comes with a model's folder and is a program: loops, recursion, texts that double. transformers compiles
every template in an environment that it makes for it; `limit_templates` puts `LimitedEnvironment` in its place, so that
whatever renders is limited. Three things are limited:

- time: each turn of a loop, call and filter counts, and every few of them read the clock of the thread;
- size: texts that an operator, a method or a filter would make are measured before where they may be much larger than
  what they are made of, and after where not;
- nesting: lists and dicts are measured with all that they hold, each time that it is held, when they are made. `[x, x]`
  in a loop is as large as its text would be, and comparing or printing it would take as long.
"""

from __future__ import annotations

import functools
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jinja2 import Undefined, nodes, pass_context
from jinja2.environment import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from posttrain.core.errors import ModelError

SECONDS = 10.0
"""Processor time of one rendering."""
CHARACTERS = 64_000_000
"""Longest text, and characters of all texts that a list holds."""
ALL_CHARACTERS = 40 * CHARACTERS
"""Characters of all texts that one rendering makes: what it can hold at once."""
VALUES = 1_000_000
"""Values that a list or dict holds, and those in it."""
SOURCE = 1_000_000
"""Longest template, characters; the longest of published ones has 25,000."""
READINGS = 64
"""Steps between two looks at the clock."""
SMALL = 4096
"""Texts up to this length are not counted: a rendering can't make enough of them to matter."""
SUMMED = 10_000
"""Lists that `sum` may join: it takes time by the square of their length."""
SHORT = 1000
"""Sums of lists that are shorter are not measured: turns are often collected one by one."""
PASSING = frozenset(
    "length count first last list select selectattr reject rejectattr map sort unique items default d".split()
)
"""Filters that make no text of a list: it needn't be measured."""
REMOVED = frozenset("urlize striptags wordwrap xmlattr".split())
"""Filters for web pages whose time grows with the square of a text's length."""


BOUNDED = frozenset(
    "strip lstrip rstrip lower upper title capitalize startswith endswith removeprefix removesuffix find rfind index "
    "count isdigit isspace isalpha".split()
)
"""Methods of texts whose result is no longer than the text, within a small factor."""


class TemplateLimitError(ModelError):
    """Say that a chat template takes too long, or makes something too large."""


class _Spent(threading.local):
    """When the time of this thread's rendering is over, and the characters of the texts that it made."""

    until = float("inf")
    made = 0


_spent = _Spent()
_PLAIN = frozenset({bool, float, type(None), Undefined})
_steps = itertools.count()


def limit_templates() -> None:
    """Let transformers compile chat templates in a `LimitedEnvironment`."""
    from transformers.utils import chat_template_utils

    if not hasattr(chat_template_utils, "ImmutableSandboxedEnvironment"):
        raise ModelError("this version of transformers compiles chat templates in an unknown way: install a tested one")
    chat_template_utils.ImmutableSandboxedEnvironment = LimitedEnvironment  # type: ignore[misc]


def _step() -> None:
    if not next(_steps) % READINGS:
        _look()


def _look() -> None:
    if time.thread_time() > _spent.until:
        raise TemplateLimitError(f"the chat template takes more than {SECONDS:g} s for one conversation")


def _too_large(what: str) -> TemplateLimitError:
    most = f"{CHARACTERS:,} characters or {VALUES:,} values"
    return TemplateLimitError(f"the chat template makes a {what} of more than {most}")


def _check_size(value: Any, times: int = 1) -> None:
    """Check the characters and values that a value holds, counted wherever they are held, and `times` as many."""
    characters, values, todo = CHARACTERS // max(1, times), VALUES // max(1, times), [value]
    while todo:
        one = todo.pop()
        values -= 1
        if isinstance(one, str):
            characters -= len(one)
        elif isinstance(one, int):
            characters -= one.bit_length() // 3
        elif isinstance(one, Namespace):
            todo.append(one._Namespace__attrs)  # type: ignore[attr-defined]
        elif isinstance(one, Mapping):
            values -= len(one)
            todo += [*one, *one.values()] if values >= 0 else []
        elif isinstance(one, (list, tuple)):
            todo += one if len(one) <= values else []
            values -= 0 if len(one) <= values else len(one)
        if characters < 0 or values < 0:
            raise _too_large("text" if isinstance(value, str) else "value")
    if VALUES // max(1, times) - values > SHORT:
        _look()


def _shown(value: Any) -> Any:
    return value if value.__class__ is str else _measured(value)


def _measured(value: Any) -> Any:
    if value.__class__ in _PLAIN or (value.__class__ is str and len(value) <= SMALL):
        return value
    if isinstance(value, str):
        _spent.made += len(value)
        if len(value) > CHARACTERS or _spent.made > ALL_CHARACTERS:
            raise _too_large("text")
    elif isinstance(value, (int, list, tuple, Mapping, Namespace)):
        _check_size(value)
    return value


def _counted(items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        _step()
        yield _measured(item)


def _with_length(value: Any) -> Any:
    return list(value) if isinstance(value, Iterator) else value


def _check_product(left: Any, right: Any) -> None:
    """Check `left * right`."""
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > CHARACTERS:
            raise _too_large("number")
    else:
        many, value = (left, right) if isinstance(left, int) else (right, left)
        if isinstance(many, int) and isinstance(value, (str, list, tuple)) and many > 0:
            _check_size(value, many)


def _check_format(text: Any, values: tuple[Any, ...]) -> None:
    """Check a text with places (`%` or `format`) and its values: their widths are numbers in the text, or values."""
    for value in values:
        _measured(value)
    wide = [int(n) for n in re.findall(r"\d{5,18}", text)] if isinstance(text, str) else []
    if "*" in str(text) or "{:" in str(text):
        wide += [v for v in _flat(values) if isinstance(v, int)]
    if re.search(r"\d{19,}", str(text)) or sum(map(abs, wide)) > CHARACTERS:
        raise _too_large("text")


def _flat(values: Any) -> Iterator[Any]:
    for value in values.values() if isinstance(values, Mapping) else values:
        yield from _flat(value) if isinstance(value, (tuple, list, Mapping)) else (value,)


def _check_method(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check a call of a text's own method, before it makes the text."""
    text = method.__self__  # type: ignore[attr-defined]
    name, values = method.__name__, (*args, *kwargs.values())
    if name == "replace" and len(args) > 1:
        _check_replace(text, *args)
    elif name == "join":
        _check_joined(args[0] if args else (), text)
    elif name == "expandtabs":
        _check_size(text, 1 + max([8, *(v for v in values if isinstance(v, int))]))
    elif any(isinstance(v, int) and v > CHARACTERS for v in values):
        raise _too_large("text")


def _check_replace(text: Any, old: Any, new: Any, *_: Any) -> None:
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        if len(text) + text.count(old) * (len(new) - len(old)) > CHARACTERS:
            raise _too_large("text")


def _check_joined(parts: Any, between: str) -> None:
    """Check a text made of parts."""
    _check_size(parts)
    if hasattr(parts, "__len__") and len(parts) * len(between) > CHARACTERS:
        raise _too_large("text")


def _check_filter(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check the arguments of a filter, the value first, before it makes its result."""
    value, *given = args or (None,)
    given += kwargs.values()
    if name not in PASSING:
        _measured(value)
    if name == "replace":
        _check_replace(*(str(a) for a in (value, *given)[:3]))
    elif name == "format":
        _check_format(value, tuple(given))
    elif name == "join":
        _check_joined(value, next((g for g in given if isinstance(g, str)), ""))
    elif name == "sum" and any(isinstance(g, (list, tuple)) for g in given):
        if len(value) > SUMMED:
            raise TemplateLimitError(f"the chat template joins more than {SUMMED:,} lists by sum")
    else:
        numbers = [g for g in given if isinstance(g, int)] + [len(g) for g in given if isinstance(g, str)]
        if name in ("indent", "tojson"):
            _check_size(value, 1 + max([4, *numbers]))
        elif any(n > CHARACTERS for n in numbers):
            raise _too_large("text")


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that is counted, and whose arguments and result are measured."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context, or the environment
    bounded = name in ("trim", "lower", "upper", "string", "length", "escape", "e", "safe", "capitalize", "title")

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        _step()
        if bounded and args[-1].__class__ is str and not kwargs:
            return _measured(function(*args))
        if name in ("join", "sum"):  # their time and size depend on the number of parts
            args = (*args[:skipped], *map(_with_length, args[skipped:]))
        _check_filter(name, args[skipped:], kwargs)
        result = function(*args, **kwargs)
        return _counted(result) if hasattr(result, "__next__") else _measured(result)

    return limited


class _Filters(dict[str, Any]):
    """Filters by name; those that are added later are limited too."""

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        super().__setitem__(name, _limited(name, function))


@pass_context
def _tick(_context: Any, value: Any) -> Any:
    _step()
    return value


@pass_context
def _weigh(_context: Any, value: Any) -> Any:
    return _measured(value)


class _Counting(NodeTransformer):
    """Rewrite a template so that bodies that may run again are counted, and lists that it makes are measured."""

    def _with_tick(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(True), "posttrain_tick")))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _with_tick

    def visit_For(self, node: nodes.For) -> Any:
        self._with_tick(node)
        if node.test is not None:
            node.test = nodes.And(_filtered(nodes.Const(True), "posttrain_tick"), node.test)
        return node

    def visit_Concat(self, node: nodes.Concat) -> Any:
        self.generic_visit(node)
        node.nodes = [n if isinstance(n, nodes.Const) else _filtered(n, "posttrain_weigh") for n in node.nodes]
        return node

    def _made(self, node: Any) -> Any:
        self.generic_visit(node)
        parts = list(node.iter_child_nodes())
        constant = all(isinstance(n, (nodes.Const, nodes.Pair)) for n in parts) and not isinstance(node, nodes.Dict)
        stored = getattr(node, "ctx", "load") != "load"
        return node if stored or constant else _filtered(node, "posttrain_weigh")

    visit_List = visit_Tuple = visit_Dict = _made


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


class LimitedTemplate(Template):
    """A template each of whose renderings has the time of one."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        """Return the text. Raises TemplateLimitError if it takes too long or becomes too large."""
        before = _spent.until
        _spent.until, _spent.made = min(before, time.thread_time() + SECONDS), 0
        try:
            return super().render(*args, **kwargs)
        finally:
            _spent.until = before


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox of jinja whose templates have a limit of time and size."""

    template_class = LimitedTemplate
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"finalize": _shown, **kwargs})
        filters = {n: f for n, f in self.filters.items() if n not in REMOVED}
        self.filters = _Filters()
        for name, function in filters.items():
            self.filters[name] = function
        dict.update(self.filters, {"posttrain_tick": _tick, "posttrain_weigh": _weigh})
        self.globals.pop("lipsum", None)

    @staticmethod
    def concat(parts: Any) -> str:  # type: ignore[override]
        """Join the parts of a text."""
        out, size = [], 0
        for part in parts:
            size += len(part)
            if size > CHARACTERS:
                raise _too_large("text")
            out.append(part)
        return "".join(out)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > SOURCE:
            raise TemplateLimitError(f"the chat template has {len(source):,} characters, more than {SOURCE:,}")
        return super()._parse(source, name, filename)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        counted = _Counting().visit(source)
        counted.set_environment(self).set_lineno(1)
        return super()._generate(counted, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a sum, a product, a power or a formatted text.

        Args:
            context: The template's variables.
            operator: One of `intercepted_binops`.
            left: Value on its left.
            right: Value on its right.
        """
        if operator == "+" and left.__class__ is right.__class__ is str:
            return _measured(left + right)
        if operator == "*":
            _check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * max(0, right) > CHARACTERS:
                raise _too_large("number")
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str) or (isinstance(result, (list, tuple)) and len(result) > SHORT):
            _measured(result)
        return result

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or a method of a value.

        Args:
            __context: The template's variables.
            __obj: The function or method.
            args: Its arguments.
            kwargs: Its arguments by name.
        """
        _step()
        owner = getattr(__obj, "__self__", None)
        if owner.__class__ is str and __obj.__name__ in BOUNDED:  # safe to call as it is
            given = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
            return _measured(__obj(*args, **given))  # without what compiled templates add for functions of a context
        if isinstance(owner, str):
            args = tuple(map(_with_length, args))
            _check_method(__obj, args, kwargs)
        return _measured(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return a method that formats a text, if `value` is one."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text, method = value.__self__, wrapped

        def formatted(*args: Any, **kwargs: Any) -> str:
            _check_format(text, (*args, *kwargs.values()))
            return method(*args, **kwargs)

        return formatted
