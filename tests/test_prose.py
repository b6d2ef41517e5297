"""The rules for names and docstrings that a program can check.

To see what a folder still violates: ``python tests/test_prose.py methods report docs``.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "posttrain"
MODULES = sorted(SOURCE.rglob("*.py"))
DOCS = sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md"), *ROOT.glob("*.md")])

NOT_A_VERB = set(
    "what whether how where who when which why the a an this that these those it its one two all every each some any "
    "no none true false for of in on at as if with without by to from also only same".split()
)
DOC_WIDTH = 100
AVOIDED = re.compile(
    r"\b(go(es)? on|gone on|of (its|their|one's) own|at hand|as many as|by itself|where there (is|are) none|mend(s|ed)?"
    r"|learns? from|learnt|is said)\b"
)
"""Words for which section 6 of the plan of the package has plainer ones."""
COMMON_NAMES = {"main", "log"}
"""Names that a module may share with others: its entry point and its logger."""


def folder_of(path: Path) -> str:
    if path == ROOT / "README.md":
        return path.name
    return path.relative_to(SOURCE).parts[0] if SOURCE in path.parents else "docs"


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def is_public(name: str) -> bool:
    return not name.startswith("_")


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the public functions of a module and the public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and is_public(node.name):
            yield node
        if isinstance(node, ast.ClassDef) and is_public(node.name):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and is_public(inner.name):
                    yield inner


def is_command(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return True for a command of the command line: its docstring is its help text, its parameters have `help=`."""
    return "typer." in "".join(ast.dump(p) for p in node.args.args) or "'typer'" in ast.dump(node.args)


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    found = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [p.arg for p in found if p.arg not in ("self", "cls")]


def begins_with_a_verb(docstring: str) -> bool:
    first = docstring.strip().split(maxsplit=1)[0].rstrip(",") if docstring.strip() else ""
    third_person = first.endswith("s") and not first.endswith(("ss", "us", "is"))
    return bool(re.fullmatch(r"[A-Z][a-z]+(-[a-z]+)?", first)) and first.lower() not in NOT_A_VERB and not third_person


def problems_of_docstrings(path: Path, tree: ast.Module) -> Iterator[str]:
    for node in public_functions(tree):
        text = ast.get_docstring(node)
        if text is None:
            continue
        if not begins_with_a_verb(text):
            yield f"{place(path, node)} {node.name}: begin with a verb, not {text.splitlines()[0][:60]!r}"
        count = len(parameters(node))
        if count >= 3 and not is_command(node) and not re.search(r"^Args:$", text, re.M):
            yield f"{place(path, node)} {node.name}: {count} parameters, and no 'Args:' in its docstring"


def problems_of_imports(path: Path, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("posttrain"):
            for alias in node.names:
                if alias.name.startswith("_") and not alias.name.startswith("__"):
                    yield f"{place(path, node)} imports the private name {alias.name} of {node.module}"


def problems_of_docs(path: Path) -> Iterator[str]:
    fenced = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        if fenced or line.startswith("    "):  # code, and formulas
            continue
        excepted = line.lstrip().startswith("|") or "](" in line or "http" in line
        if len(line) > DOC_WIDTH and not excepted:
            yield f"{path.relative_to(ROOT)}:{number} has {len(line)} columns; wrap at {DOC_WIDTH}"
        if avoided := AVOIDED.search(re.sub(r"`[^`]*`", "", line)):
            yield f"{path.relative_to(ROOT)}:{number}: {avoided[0]!r}; use a plainer word"


def problems_in(path: Path) -> list[str]:
    if path.suffix == ".md":
        return list(problems_of_docs(path))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [*problems_of_docstrings(path, tree), *problems_of_imports(path, tree)]


def public_names(tree: ast.Module) -> Iterator[str]:
    """Yield what a module defines at its top level."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        yield from (t.id for t in targets if isinstance(t, ast.Name))


def shared(names: dict[str, list[Path]]) -> dict[str, list[Path]]:
    return {name: paths for name, paths in sorted(names.items()) if len(paths) > 1}


def names_in_two_modules() -> dict[str, list[Path]]:
    """Return the public names that several modules define, and the names that several files have."""
    homes = defaultdict[str, list[Path]](list)
    for path in MODULES:
        for name in dict.fromkeys(public_names(ast.parse(path.read_text(encoding="utf-8")))):
            if is_public(name) and name not in COMMON_NAMES:
                homes[name].append(path)
        if path.name != "__init__.py":
            homes[path.name].append(path)
    return shared(homes)


def test_docstrings_imports_and_docs() -> None:
    found = [problem for path in [*MODULES, *DOCS] for problem in problems_in(path)]
    assert not found, "\n".join(found)


def test_no_public_name_and_no_file_name_twice() -> None:
    assert not names_in_two_modules()


def test_the_checks_find_what_they_are_for() -> None:
    path = ROOT / "src" / "posttrain" / "made_up.py"
    tree = ast.parse(
        'def good(a, b):\n    """Return a + b."""\n'
        'def bad(a, b, c):\n    """What is left."""\n'
        'class Kept:\n    """A record."""\n    def gives(self, x):\n        """Gives x."""\n'
        "from posttrain.core.files import _hidden\n"
        'def command(a: Annotated[str, typer.Option()], b, c):\n    """Run it."""\n'
    )
    found = [*problems_of_docstrings(path, tree), *problems_of_imports(path, tree)]
    assert len(found) == 4
    assert "begin with a verb" in found[0] and "'Args:'" in found[1] and "gives" in found[2] and "_hidden" in found[3]
    assert list(public_names(tree)) == ["good", "bad", "Kept", "command"]


if __name__ == "__main__":
    wanted = set(sys.argv[1:]) or {folder_of(p) for p in [*MODULES, *DOCS]}
    for one in [*MODULES, *DOCS]:
        if folder_of(one) in wanted:
            print(*problems_in(one), sep="\n", end="\n" if problems_in(one) else "")
    for twice, homes in names_in_two_modules().items():
        if {folder_of(p) for p in homes} & wanted:
            print(f"{twice} is defined in {', '.join(str(p.relative_to(ROOT)) for p in homes)}")
