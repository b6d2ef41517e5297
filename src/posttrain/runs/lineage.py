"""Trace a model back through the stages and runs that made it, and describe its origin without paths of a machine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.core.errors import ModelError
from posttrain.core.files import named_path
from posttrain.core.hub import cached_data_cards
from posttrain.models.gguf_metadata import gguf_text
from posttrain.recipe.model_sources import find_model

LONGEST = 50
"""Stages that a lineage has at most: files that name each other in a circle end there."""


DATA_LICENCES = {
    "packaged:": "Apache-2.0 (posttrain)",
    "lab:": "made by posttrain",
    "reasoning-gym:": "made by reasoning-gym",
}
"""Licences of what is no file of the user, by the beginning of its name."""


@dataclass(frozen=True)
class LineageStep:
    """Hold one stage on the way to a model.

    Attributes:
        run: Name of its run.
        record: Its entry in the run's manifest.
        data: The entries of its data there.
    """

    run: str
    record: Mapping[str, Any]
    data: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Origin:
    """Hold the model that a lineage begins with.

    Attributes:
        name: How it is called, without a path of this machine.
        hub: Its name on the Hub. None: it is not from there.
        revision: Its revision there.
        licence: As its card or its file says. None: unknown.
        file: Name of its GGUF file. None: it is none.
        package: Installed package that holds the file. None: none does.
    """

    name: str
    hub: str | None = None
    revision: str | None = None
    licence: str | None = None
    file: str | None = None
    package: str | None = None


def trace(run: Path, manifest: Mapping[str, Any], number: int) -> tuple[list[LineageStep], Origin]:
    """Return the stages that led to what stage `number` of a run made, oldest first, and the model they began with.

    Those of models that a stage has merged come before it.

    Args:
        run: Folder of the run.
        manifest: Content of its manifest.
        number: Number of the stage.
    """
    steps: list[LineageStep] = []
    revision = None
    while len(steps) < LONGEST:
        records = manifest.get("stages", [])
        record = records[number]
        name = re.sub(r"\.\d+$", "", str(record["name"]))
        titles = (name, record["name"], f"{name} held out")
        data = tuple(d for d in manifest.get("data", []) if d.get("stage") in titles)
        steps.insert(0, LineageStep(run.resolve().name, record, data))
        for model in reversed(record.get("merged", {}).get("models", [])):
            found = stage_that_made(str(model["source"]), run, records[:number])
            made_by = trace(found[0], _manifest_of(found[0], run, manifest), found[1])[0] if found else []
            steps[:0] = [step for step in made_by if (step.run, step.record) not in [(s.run, s.record) for s in steps]]
        source = str(record.get("from", ""))
        if source == manifest.get("model", {}).get("source"):
            revision = manifest["model"].get("revision")
        found = stage_that_made(source, run, records[:number])
        if found is None:
            break
        manifest = _manifest_of(found[0], run, manifest)
        run, number = found
        if number >= len(manifest.get("stages", [])):
            break
    return steps, origin_of(source, revision)


def _manifest_of(run: Path, known_run: Path, known: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the manifest of a run; that of `known_run` is known, and newer than its file."""
    if run != known_run and (file := run / "manifest.json").is_file():
        return json.loads(file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    return known


def stage_that_made(source: str, run: Path, earlier: Sequence[Mapping[str, Any]]) -> tuple[Path, int] | None:
    """Return the run and the number of the stage that made a source; None if no stage did.

    Args:
        source: Model source, as a stage's `from` in the manifest.
        run: The run whose manifest names it.
        earlier: The stages of that run which come before.
    """
    inside = re.search(r"stages/(\d+)-([^/]+)/(?:model|adapter)/?$", source)
    if inside and int(inside[1]) < len(earlier) and earlier[int(inside[1])]["name"] == inside[2]:
        elsewhere = Path(source).exists() and run.resolve() not in Path(source).resolve().parents
        if not elsewhere:  # this run's, which may have been moved since
            return run, int(inside[1])
    path = named_path(source)
    if not path.is_dir():
        return None
    root = next((p for p in (path.resolve(), *path.resolve().parents) if (p / "manifest.json").is_file()), None)
    if root is None or not (root / "recipe.yaml").is_file():
        return None
    if inside:
        return root, int(inside[1])
    stages = json.loads((root / "manifest.json").read_text(encoding="utf-8")).get("stages", [])
    models = [i for i, s in enumerate(stages) if s.get("makes") == "model" and s.get("status") == "done"]
    return (root, models[-1]) if models else None


def origin_of(source: str, revision: str | None = None) -> Origin:
    """Return what is known of a model source that no stage made."""
    if source.startswith(("tiny:", "lab:")):
        return Origin(source)
    try:
        found = find_model(source)
    except ModelError:  # it was there when the stage started
        return Origin(Path(source).name)
    path = Path(found.location)
    if found.kind == "gguf":
        package = source.removeprefix("package:") if source.startswith("package:") else None
        name = f"{package} ({path.name})" if package else path.name
        return Origin(name, licence=gguf_text(path, "general.license"), file=path.name, package=package)
    if found.kind == "hub":
        return Origin(source, source, revision, _licence(_cached_card(source, revision)))
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/([^/]+)/?$", path.as_posix())
    if cached:
        return Origin(f"{cached[1]}/{cached[2]}", f"{cached[1]}/{cached[2]}", cached[3], _licence(path / "README.md"))
    name, file = path.resolve().name, path / "adapter_config.json"
    if file.is_file():
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
        name += f" (an adapter on {Path(base).name if Path(str(base)).is_absolute() else base})"
    return Origin(name, licence=_licence(path / "README.md"))


def data_licence(source: str) -> str | None:
    """Return the licence of a data source, with whom it is from; None if nothing here says it.

    Args:
        source: As a recipe names it. Of a data set on the Hub, the card in the Hub's cache is read.
    """
    if source == "packaged:movie_reviews.tsv":
        return "MIT (Hutto and Gilbert 2014)"
    for prefix, licence in DATA_LICENCES.items():
        if source.startswith(prefix):
            return licence
    if source.count("/") == 1 and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not Path(source).exists():
        return next((found for card in cached_data_cards(source) if (found := _licence(card))), None)
    return None


def _cached_card(name: str, revision: str | None) -> Path | None:
    from transformers.utils.hub import cached_file

    quiet = {f"_raise_exceptions_for_{w}": False for w in ("gated_repo", "missing_entries", "connection_errors")}
    found = cached_file(name, "README.md", revision=revision, local_files_only=True, **quiet)
    return Path(found) if found else None


def _licence(card: Path | None) -> str | None:
    """Return the licence in a model card's front matter."""
    if card is None or not card.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = re.search(r"^license:\s*([\w.-]+)\s*$", front[1], re.MULTILINE) if front else None
    return found[1] if found else None
