"""Imports run one way, and what must stay light imports nothing heavy. Held by reading the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import posttrain
from posttrain.config.names import METHODS

ROOT = Path(posttrain.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# From the ground up. A module may import from its own part and from rows before its own, never upwards or sideways.
LAYERS = [
    {"core"},
    {"config", "losses"},
    {"cpu", "cuda"},
    {"sandbox", "data", "recipe"},
    {"models"},
    {"sampling"},
    {"serving"},
    {"rewards"},
    {"judge"},
    {"eval"},
    {"trainer"},
    {"methods"},
    {"report"},
    {"lab", "runs"},
    {"ui"},
    {"cli"},
    {"__main__"},
]
PLACE = {part: i for i, row in enumerate(LAYERS) for part in row}

LIGHT = {f"core.{m}" for m in ("errors", "files", "hub", "imports", "progress", "types")}
LIGHT |= {"config", "cli.main", "__init__"} | {
    f"recipe.{m}" for m in ("machine_checks", "documents", "messages", "model_sources", "parsing", "schema")
}
LIGHT |= {path.split(":")[0].removeprefix("posttrain.") for path in METHODS.values()}
"""Modules that load without torch and its like; cli.main and the package itself without pydantic and yaml too.

Those of every method are among them: a recipe is checked without torch.
"""
HEAVY = {"torch", "transformers", "datasets", "peft", "safetensors", "pandas", "pyarrow", "trl", "gguf"}


def name_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports(node: ast.AST, *, inside_functions: bool, package: str) -> Iterator[str]:
    """Absolute names of everything imported below `node`; what only type checkers see is left out."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import: write the full name"
            assert child.module is not None
            yield from ([f"posttrain.{a.name}" for a in child.names] if child.module == "posttrain" else [child.module])
        elif inside_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(child, inside_functions=inside_functions, package=package)


class Source(NamedTuple):
    """What tests ask about a file: parsed once for all of them."""

    imported: dict[bool, set[str]]  # False: at module level; True: inside of functions too
    modules: set[tuple[str, str]]
    lines: int
    functions: list[tuple[str, int]]


@cache
def source(path: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    return Source(
        {inside: set(imports(tree, inside_functions=inside, package=name_of(path))) for inside in (False, True)},
        set(modules_imported(tree)),
        text.count("\n"),
        [
            (node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ],
    )


def modules_imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(package, name) of what is imported below `node`, inside functions too; not what type checkers see alone."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if isinstance(child, ast.ImportFrom) and child.module and child.module.startswith("posttrain"):
            package = child.module.removeprefix("posttrain").lstrip(".")
            yield from ((package, alias.name) for alias in child.names)
        yield from modules_imported(child)


def imported(path: Path, inside_functions: bool) -> set[str]:
    return source(path).imported[inside_functions]


def upward(path: Path) -> Iterator[str]:
    """What a file imports from parts that its own must not know."""
    part = name_of(path).split(".")[0]
    if part == "__init__":
        return  # the public face hands out names of every layer, lazily
    for name in imported(path, inside_functions=True):
        package, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if package != "posttrain" or not rest or other in (part, "__version__"):
            continue
        if other not in PLACE or PLACE[other] >= PLACE[part]:
            yield f"{name_of(path)} imports {name}: {part} must not know {other}"


def test_imports_run_one_way() -> None:
    parts = {name_of(path).split(".")[0] for path in MODULES} - {"__init__"}
    assert parts == set(PLACE), "give each part a place in LAYERS"
    found = [problem for path in MODULES for problem in upward(path)]
    assert not found, "\n".join(found)


def test_the_cpu_wing_has_one_door() -> None:
    """On a GPU nothing of `posttrain.cpu` may run: only `models.backends` imports it, inside of a function."""
    doors = set()
    for path in MODULES:
        if name_of(path).split(".")[0] != "cpu":
            if any(n.startswith("posttrain.cpu") for n in imported(path, inside_functions=True)):
                doors.add(name_of(path))
            outside = imported(path, inside_functions=False)
            assert not any(n.startswith("posttrain.cpu") for n in outside), f"{name_of(path)} imports {outside}"
    assert doors == {"models.backends"}


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_light_modules_import_nothing_heavy(name: str) -> None:
    """At module level, and through what they import at module level."""
    seen: set[str] = set()
    todo = [f"posttrain.{name}"]
    heavy = HEAVY | ({"pydantic", "yaml", "numpy"} if name in ("cli.main", "__init__") else set())
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        assert module.split(".")[0] not in heavy, f"{name} reaches {module}"
        if module.startswith("posttrain."):
            path = ROOT / Path(*module.split(".")[1:])
            file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
            if file.exists():  # else a name of the package's, such as __version__
                todo.extend(imported(file, inside_functions=False))


def test_the_functional_core_imports_torch_alone() -> None:
    paths = sorted((ROOT / "losses").rglob("*.py"))
    assert paths
    for path in paths:
        for name in imported(path, inside_functions=True):
            top = name.split(".")[0]
            own = name.startswith("posttrain.losses") or name == "posttrain.core.types"
            assert top == "torch" or own or top in sys.stdlib_module_names, f"{name_of(path)} imports {name}"


def test_the_reader_of_imports_sees_what_it_should() -> None:
    tree = ast.parse(
        "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import hidden\n"
        "if x:\n    import e\nclass K:\n    import f\ndef g():\n    from posttrain import h\n"
    )
    assert set(imports(tree, inside_functions=False, package="")) == {"a.b", "c", "e", "f"}
    assert set(imports(tree, inside_functions=True, package="")) == {"a.b", "c", "e", "f", "posttrain.h"}


def test_files_and_functions_stay_short() -> None:
    """Under 500 lines a file, under 80 a function: what is longer hides two things."""
    for path in MODULES:
        _, _, lines, functions = source(path)
        assert lines < 500, f"{name_of(path)} has {lines} lines"
        for name, length in functions:
            assert length < 80, f"{name_of(path)}.{name} has {length} lines"


def test_no_circle_of_modules() -> None:
    names = {name_of(p): p for p in MODULES if name_of(p) != "__init__"}  # the public face loads names lazily
    edges = {name: set[str]() for name in names}
    for module, path in names.items():
        for package, name in source(path).modules:
            inner = f"{package}.{name}".lstrip(".")
            edges[module].add(inner if inner in names else package)
        edges[module] &= set(names) - {module}
    while edges:  # remove what imports nothing that is left, until only circles are left
        leaves = {name for name, others in edges.items() if not others & set(edges)}
        assert leaves, f"modules import each other in a circle, or are imported by one: {sorted(edges)}"
        edges = {name: others for name, others in edges.items() if name not in leaves}
