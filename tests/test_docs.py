"""The settings in the documentation's YAML are valid, and the modules and files that it names exist."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.core.errors import RecipeError
from posttrain.recipe.parsing import load_recipe

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "posttrain"
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CHANGELOG.md"]
PROBLEMS = {"problems": {"kind": "lab"}, "rewards": [{"kind": "exact"}]}
PAIRS = {"kind": "pairs", "data": {"source": "pairs.jsonl"}}
STAGES: dict[str, dict[str, Any]] = {
    "labels": {"method": "process_reward"},
    "judge": {"method": "feedback", "labels": "judge", "answers": PAIRS},
    "data": {"method": "sft"},
}
"""By its first setting, the stage that a fragment belongs to; any other is of a policy-gradient method."""


MAKERS: dict[str, dict[str, Any]] = {
    **{
        name: {"method": "reward_model", "name": name, "data": {"source": "pairs.jsonl"}}
        for name in ("gold", "proxy", "reward_model")
    },
    "sft": {"method": "sft", "data": {"source": "data.jsonl"}},
    "process_reward": {"method": "process_reward", "labels": {"kind": "rows", "data": {"source": "steps.jsonl"}}},
}
"""Stages that make what a fragment refers to by stage:NAME."""


def recipe_of(fragment: Any) -> Any:
    """Return a whole recipe around a fragment: stages, evaluations, settings of a stage, or a task of instructions."""
    recipe: dict[str, Any] = {"name": "page", "model": {"source": "tiny:llama"}}
    if isinstance(fragment, list):
        fragment = {"stages": fragment}
    if "extends" in fragment:  # a whole recipe
        return fragment
    if {"fields", "output"} <= set(fragment):  # a task's file
        fragment = {"method": "instructions", "tasks": [fragment]}
    if not {"stages", "evaluate"} & set(fragment):
        fragment = {"stages": [STAGES.get(next(iter(fragment)), {"method": "grpo"}) | fragment]}
    stages = fragment.get("stages", [])
    for stage in stages:
        if stage["method"] in ("grpo", "ppo", "rloo"):
            stage.update({k: v for k, v in PROBLEMS.items() if k not in stage})
    named = {s.get("name", s["method"]) for s in stages}
    earlier = [MAKERS[name] for name in sorted(set(re.findall(r"stage:(\w+)", str(fragment))) - named)]
    return recipe | fragment | {"stages": [*earlier, *stages]}


def fragments(page: Path) -> list[Any]:
    """Return the YAML blocks of a page; a block of alternatives on a line each gives several."""
    out = []
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        lines = block.splitlines()
        alternatives = len(lines) > 1 and len({line.partition(":")[0] for line in lines}) == 1
        out += [yaml.safe_load(text) for text in (lines if alternatives else [block])]
    return out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_yaml_is_valid(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        if module := re.match(r"# (\w+\.py)\b", block):  # a module that the page's YAML names
            (tmp_path / module[1]).write_text(block, encoding="utf-8")
            sys.modules.pop(module[1].removesuffix(".py"), None)
    for number, fragment in enumerate(fragments(page)):
        path = tmp_path / "page.yaml"
        path.write_text(yaml.safe_dump(recipe_of(fragment), sort_keys=False), encoding="utf-8")
        try:
            load_recipe(str(path))
        except RecipeError as e:
            pytest.fail(f"YAML block {number} of {page.name}: {e}")


@cache
def exists(name: str) -> bool:
    """Return True if a dotted name, perhaps with ``:name``, can be imported."""
    parts = name.replace(":", ".").split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute, None)
        return found is not None
    return False


def missing(page: Path) -> Iterator[str]:
    """Files and names of the package that a page mentions, and that do not exist."""
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"`([\w./-]+/[\w-]+\.(?:py|c|md|yaml))`", text)):
        if not any((folder / name).is_file() for folder in (ROOT, ROOT / "src", SOURCE, SOURCE / "cpu")):
            yield f"{page.relative_to(ROOT)}: {name}"
    names = set(re.findall(r"\bposttrain(?:\.\w+)+(?::\w+)?", text))
    for module, imported in re.findall(r"^from (posttrain[\w.]*) import ([\w, ]+)$", text, re.MULTILINE):
        names |= {f"{module}.{name}" for name in imported.split(", ")}
    yield from (f"{page.relative_to(ROOT)}: {name}" for name in sorted(names) if not exists(name))


def test_files_and_modules_exist() -> None:
    assert [name for page in PAGES for name in missing(page)] == []


def test_pages_made_from_the_code_are_those_of_the_code() -> None:
    """Rewrite them with `python tools/reference_pages.py`; a recipe's figures are those of the page that has them."""
    reference = imported_from(ROOT / "tools", "reference_pages")
    for name, text in (("settings.md", reference.settings_page()), ("recipes.md", reference.recipes_page())):
        same = (ROOT / "docs" / name).read_text(encoding="utf-8").rstrip() == text.rstrip()
        assert same, f"docs/{name} is out of date: run python tools/reference_pages.py"
    for name, (page, words) in reference.RESULTS.items():
        measured = (ROOT / "docs" / page).read_text(encoding="utf-8")
        missing = [n for n in re.findall(r"[−-]?\d[\d,]*\.?\d*%?", words) if n.strip("%−-.") not in measured]
        assert not missing, f"{name}: {missing} are not on {page}"


def test_the_site_has_every_page_and_each_once() -> None:
    """In `nav` of mkdocs.yml; tests/test_site.py builds it."""
    listed = re.findall(r"^ +- ([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md"))


def imported_from(folder: Path, name: str) -> Any:
    """Return a module of a folder that is not on Python's path."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def test_pages_of_claims_say_what_the_figures_say() -> None:
    """Rewrite them with `python benchmarks/claims/page.py PAGE`."""
    page = imported_from(ROOT / "benchmarks" / "claims", "page")
    pages = [path for path in PAGES if "<!-- figures: " in path.read_text()]
    assert pages
    for path in pages:
        assert len(page.BLOCK.findall(path.read_text())) == path.read_text().count("<!-- figures: "), path.name
        assert page.page_with_figures(path) == path.read_text(), path.name
