"""Asserts of tests that say which values they compared; this runs next to the tests, without the rest of the package.

assert add(1, 2) == 3      fails with the message      add(1, 2) is -1
"""

from __future__ import annotations

import ast
from typing import Any

SHOWN_VALUES = "__shown_values__"
"""Name by which asserts call `shown_values`."""
LONGEST_SHOWN = 120
"""Characters of a value, or of the source of one side."""
MOST_PARTS = 2000
"""Values in a container that is shown."""
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class _Comparisons(ast.NodeTransformer):
    """Give asserts of one comparison a message. Values are computed in the same order, once."""

    def __init__(self, source: str) -> None:
        self.source = source

    def visit_Assert(self, node: ast.Assert) -> ast.Assert:  # a name that ast gives
        """Return the assert, with a message if it has none."""
        test = node.test
        if node.msg is not None or not isinstance(test, ast.Compare) or len(test.ops) != 1:
            return node
        sides, shown = [test.left, test.comparators[0]], list[ast.expr]()
        for i, side in enumerate(sides):
            if _is_literal(side):
                continue
            name = f"_compared_{i}"
            sides[i] = ast.NamedExpr(ast.Name(name, ast.Store()), side)
            text = " ".join((ast.get_source_segment(self.source, side) or "").split())
            shown += [ast.Constant(text), ast.Name(name, ast.Load())]
        if shown:
            node.test = ast.Compare(sides[0], test.ops, [sides[1]])
            node.msg = ast.Call(ast.Name(SHOWN_VALUES, ast.Load()), shown, [])
            ast.copy_location(node.test, test)
            ast.copy_location(node.msg, test)
        return ast.fix_missing_locations(node)


def with_messages(tests: ast.Module, source: str) -> ast.Module:
    """Return tests whose asserts of one comparison have a message; the given tree is changed.

    Args:
        tests: The tests.
        source: Their source.
    """
    return _Comparisons(source).visit(tests)  # type: ignore[no-any-return]


def shown_values(*pairs: Any) -> str:
    """Return the message of an assert: `source is value, ...`, without values that are objects of the program.

    Args:
        pairs: Source and value, and so on.
    """
    out = [
        f"{_cut(text)} is {_cut(repr(value))}"
        for text, value in zip(pairs[::2], pairs[1::2], strict=True)
        if text and _parts(value, MOST_PARTS) >= 0
    ]
    return ", ".join(out)


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def _parts(value: Any, left: int) -> int:
    """Return how many of `left` values are left after those of a plain value; below 0: too many, or not plain.

    The text of a program's object is never asked for: that would call the program.
    """
    if type(value) in _PLAIN:
        return left - 1
    if type(value) is dict:
        value = [*value, *value.values()]
    elif type(value) not in (list, tuple, set, frozenset):
        return -1
    left -= 1
    for part in value:
        if left < 0:
            break
        left = _parts(part, left)
    return left


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."
