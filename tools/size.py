"""Print code, docstring, comment and test lines of each folder of the package (`make size`).

A code line holds a token outside of comments and docstrings, so blank lines count nowhere. A docstring is any string
that stands alone as a statement. A line with code and a comment counts as both.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}
KINDS = ("code", "docstring", "comment", "tests")


def count_lines(text: str) -> dict[str, int]:
    """Return the number of code, docstring and comment lines of one module."""
    docstrings = set[int]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    code, comments = set[int](), set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        lines = set(range(token.start[0], token.end[0] + 1))
        if token.type == tokenize.COMMENT:
            comments |= lines
        elif token.type not in LAYOUT:
            code |= lines - docstrings
    return {"code": len(code), "docstring": len(docstrings), "comment": len(comments)}


def modules(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (part, path) of every module below `folder`; the part is the first folder, or the file at the root."""
    for path in sorted(folder.rglob("*.py")):
        yield path.relative_to(folder).parts[0], path


def count_folders(root: Path) -> dict[str, dict[str, int]]:
    """Return the lines of each folder of src/posttrain, with those of the tests of the same name."""
    table: dict[str, dict[str, int]] = {}
    for folder, is_test in ((root / "src" / "posttrain", False), (root / "tests", True)):
        for part, path in modules(folder):
            row = table.setdefault(part, dict.fromkeys(KINDS, 0))
            counted = count_lines(path.read_text(encoding="utf-8"))
            for kind, lines in ({"tests": counted["code"]} if is_test else counted).items():
                row[kind] += lines
    return table


def main() -> None:
    """Print the table and its sums."""
    table = count_folders(ROOT)
    table["total"] = {kind: sum(row[kind] for row in table.values()) for kind in KINDS}
    width = max(map(len, table))
    print(f"{'':<{width}}" + "".join(f"{kind:>11}" for kind in KINDS))
    for part, row in table.items():
        print(f"{part:<{width}}" + "".join(f"{row[kind] or '':>11}" for kind in KINDS))


if __name__ == "__main__":
    main()
