"""Find what a model source names, and whether it has to come from the Hub, without importing torch."""

from __future__ import annotations

import difflib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from posttrain.core.errors import ModelError
from posttrain.core.files import named_path, near, similar
from posttrain.core.hub import DEMO_INSTALL, DEMO_MODEL

ENSEMBLE_FILE = "ensemble.json"
"""Names the members of an ensemble, in the folder that is one."""


@dataclass(frozen=True)
class ModelSource:
    """Kind and location of a model source.

    Attributes:
        kind: tiny, lab, gguf, folder or hub.
        location: Model type, "KIND:SEED" of a laboratory, path, or name on the Hub.
    """

    kind: str
    location: str


def find_model(source: str) -> ModelSource:
    """Return what a model source names. The folder of a run stands for the model that it made.

    Raises:
        ModelError: There is nothing of that name, with what was looked for and similar names.
    """
    for prefix, find in (("tiny:", _tiny), ("lab:", _lab), ("package:", _package)):
        if source.startswith(prefix):
            return find(source, source.removeprefix(prefix))
    path = named_path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model source {source!r}: there is no such file.{similar(path)}")
        return ModelSource("gguf", str(path))
    if path.is_dir():
        return _folder(source, path)
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    parent = path.parent
    beside_runs = parent != Path() and bool(_runs_in(parent)) or parent == Path("runs")  # where runs go by default
    if is_path or beside_runs or any(map(_is_run, near(path))):  # a misspelt run: the Hub need not be asked
        thing = "folder" if is_path else "run"
        raise ModelError(f"model source {source!r}: there is no such {thing}.{similar(path) or _runs_in(parent)}")
    return ModelSource("hub", source)


def _tiny(source: str, model_type: str) -> ModelSource:
    spec = importlib.util.find_spec("transformers")  # its tables are read as text: importing them takes seconds
    folder = Path(spec.origin).parent / "models" / "auto" if spec and spec.origin else Path()
    files = [folder / name for name in ("auto_mappings.py", "configuration_auto.py")]
    text = "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    known = {a or b for a, b in re.findall(r'\("([\w.-]+)", "\w+Config"\)|"([\w.-]+)": "\w+Config"', text)}
    if known and model_type not in known:
        near = [f"tiny:{n}" for n in difflib.get_close_matches(model_type, known, 3)]
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ModelError(f"model source {source!r}: transformers has no model type {model_type!r}.{hint}")
    return ModelSource("tiny", model_type)


def _lab(source: str, rest: str) -> ModelSource:
    found = re.fullmatch(r"(?:(reviews|refine|programs)(?::|$))?([0-9]{0,9})", rest)
    if found is None:
        raise ModelError(
            f"model source {source!r}: expected lab:, lab:SEED, lab:KIND or lab:KIND:SEED (KIND: reviews, refine, "
            "programs)"
        )
    return ModelSource("lab", f"{found[1] or 'sums'}:{int(found[2] or 0)}")


def _package(source: str, name: str) -> ModelSource:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        remedy = DEMO_INSTALL if source == DEMO_MODEL else "install it with pip"
        raise ModelError(f"model source {source}: no such package is installed ({remedy})")
    files = sorted(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"model source {source}: expected one .gguf file in the package, found {len(files)}")
    return ModelSource("gguf", str(files[0]))


def _folder(source: str, path: Path) -> ModelSource:
    if (path / "manifest.json").exists() and (path / "model").is_dir():
        path = path / "model"
    if _is_run(path):
        raise ModelError(
            f"model source {source!r}: this run has not made its model yet. Resume it first: posttrain run {source}"
        )
    if not any((path / name).exists() for name in ("config.json", "adapter_config.json", ENSEMBLE_FILE)):
        raise ModelError(
            f"model source {source!r}: the folder holds neither config.json nor adapter_config.json nor {ENSEMBLE_FILE}"
        )
    return ModelSource("folder", str(path))


def _is_run(path: Path) -> bool:
    return (path / "recipe.yaml").is_file() and (path / "manifest.json").is_file()


def _runs_in(folder: Path) -> str:
    runs = [p for p in folder.iterdir() if _is_run(p)] if folder.is_dir() else []
    newest = sorted(runs, key=lambda p: p.stat().st_mtime, reverse=True)[:10]
    return f" Runs there: {', '.join(map(str, newest))}" if runs else ""
