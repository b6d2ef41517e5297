"""What is built and installed holds everything that it needs to run."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import posttrain

ROOT = Path(__file__).parent.parent
DATA = {".yaml", ".html", ".css", ".js", ".tsv", ".txt", ".jsonl", ".typed", ".jinja"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="building needs hatchling (extra: dev)")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(p.relative_to(ROOT / "src"))
        for p in (ROOT / "src").rglob("*")
        if p.is_file() and (p.suffix in DATA | {".py"} or p.name.startswith("LICENSE")) and "egg-info" not in str(p)
    }
    assert wanted and wanted <= names
    assert {"posttrain/recipes/quickstart.yaml", "posttrain/py.typed"} <= names
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)
    assert not [n for n in names if not n.startswith(("posttrain/", "posttrain-"))]
    assert not [n for n in names if "__pycache__" in n]


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(name))
    assert (metadata["Name"], metadata["Version"]) == ("posttrain", posttrain.__version__)
    assert metadata["Requires-Python"] == ">=3.11" and metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra") or []) == {
        "bench",
        "code",
        "dev",
        "docs",
        "gguf",
        "instructions",
        "lm-eval",
        "mlflow",
        "notebook",
        "openai",
        "optimizers",
        "quantized",
        "ray",
        "reasoning",
        "search",
        "vision",
        "track",
    }


def test_the_wheel_runs_from_somewhere_else(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import posttrain, sys; from posttrain.recipe.parsing import load_recipe, shipped\n"
        "print(posttrain.__file__, *shipped(), load_recipe('quickstart').name)"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    recipes = sorted(p.stem for p in (ROOT / "src/posttrain/recipes").glob("*.yaml"))
    assert len(recipes) >= 5
    assert done.stdout.split() == [str(tmp_path / "site/posttrain/__init__.py"), *recipes, "quickstart"]


def test_constraints_pin_versions_that_the_project_allows() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [Requirement(r) for r in [*project["dependencies"], *(r for e in extras.values() for r in e)]]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {}
    for line in lines:
        name, _, version = line.partition("==")
        assert version and "+" not in version, f"{line}: pin a plain version, which every machine can install"
        pins[name.lower()] = version
    for requirement in asked:
        pin = pins.get(requirement.name.lower())
        assert pin is None or requirement.specifier.contains(pin), f"{requirement} does not allow {pin}"
    core = {Requirement(r).name.lower() for r in project["dependencies"]}
    assert core <= set(pins), f"not pinned: {core - set(pins)}"


def test_make_names_its_targets() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(f"make {target}" in done.stdout for target in ("demo", "test", "lint", "clean", "help"))


def test_make_says_so_when_python_is_too_old(tmp_path: Path) -> None:
    """With a Python that calls itself 3.9, and no environment made yet."""
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(["make", "demo", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()
