"""Folders that hold an ensemble: `ensemble.json` names its members, which lie in the folder or on the Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config import ModelConfig
from posttrain.config.pooling import check_pool
from posttrain.core.errors import ModelError
from posttrain.core.files import link_or_copy, write_json
from posttrain.models.adapter_source import find_adapter
from posttrain.recipe.model_sources import ENSEMBLE_FILE

NOT_TRAINED = (
    "an ensemble: several models whose output distributions are pooled. It is sampled from and evaluated; it is not "
    "trained, merged or exported: do that with its members"
)


@dataclass(frozen=True)
class EnsembleMember:
    """Name a member of an ensemble.

    Attributes:
        source: A model source; a path relative to the ensemble's folder for one that lies in it.
        revision: Branch, tag or commit on the Hub.
        weight: Its weight.
    """

    source: str
    revision: str | None
    weight: float


@dataclass(frozen=True)
class EnsembleSource:
    """Hold what an ensemble's folder says.

    Attributes:
        folder: The folder.
        members: The members.
        pool: See `posttrain.losses.ensemble_logprobs`.
        confidence: Likewise.
    """

    folder: Path
    members: tuple[EnsembleMember, ...]
    pool: str
    confidence: str | None

    @property
    def weights(self) -> list[float]:
        """Return the members' weights."""
        return [member.weight for member in self.members]

    def member_settings(self, config: ModelConfig) -> list[ModelConfig]:
        """Return the settings by which the members are opened, from those of the ensemble."""
        out = []
        for member in self.members:
            inside = self.folder / member.source
            source = str(inside) if inside.is_dir() else member.source
            own: dict[str, Any] = {"chat_template": None, "chat_template_args": {}, "add_tokens": []}
            out.append(config.model_copy(update={"source": source, "revision": member.revision, **own}))
        return out


def find_ensemble(folder: Path) -> EnsembleSource | None:
    """Return the ensemble of a folder; None if it holds none.

    Raises:
        ModelError: Its ensemble.json can't be understood.
    """
    file = folder / ENSEMBLE_FILE
    if not file.is_file():
        return None
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        members = tuple(
            EnsembleMember(str(m["source"]), m.get("revision"), float(m.get("weight", 1.0))) for m in read["members"]
        )
        pool, confidence = read.get("pool", "arithmetic"), read.get("confidence")
        check_pool([m.weight for m in members], pool, confidence)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f'{file} can\'t be understood ({error}): expected {{"pool": "arithmetic", "confidence": null, "members": '
            '[{"source": ..., "weight": 1}]}'
        ) from error
    return EnsembleSource(folder, members, pool, confidence)


def write_ensemble(
    folder: Path, members: Sequence[tuple[EnsembleMember, Path | None]], pool: str, confidence: str | None
) -> None:
    """Write an ensemble's members and its ensemble.json; what is on this disk is linked or copied into the folder.

    Args:
        folder: An existing folder.
        members: The members, each with the folder that holds it, or None for one that stays where it is.
        pool: See `posttrain.losses.ensemble_logprobs`.
        confidence: Likewise.
    """
    entries = []
    for number, (member, where) in enumerate(members):
        source = member.source
        if where is not None:
            source = f"members/{number}"
            shutil.copytree(where, folder / source, copy_function=link_or_copy, ignore=_without(folder))
            _keep_base(where, folder / source)
        entries.append({"source": source, "revision": member.revision, "weight": member.weight})
    write_json(folder / ENSEMBLE_FILE, {"pool": pool, "confidence": confidence, "members": entries})


def _without(folder: Path) -> Callable[[str, list[str]], list[str]]:
    """Leave the ensemble's own folder out of what is copied: it may lie in a member's."""
    return lambda place, names: [folder.name] if Path(place).resolve() == folder.resolve().parent else []


def _keep_base(adapter: Path, copy: Path) -> None:
    """Let the copy of an adapter name its base by the whole path, if the path in it leads elsewhere from there."""
    before, after = (find_adapter(str(folder.resolve()), "folder") for folder in (adapter, copy))
    if before is None or after is None or not Path(before.base).exists():
        return
    base = Path(before.base).resolve()
    if not Path(after.base).is_absolute() or Path(after.base).resolve() != base:
        write_json(copy / "adapter_config.json", {**before.settings, "base_model_name_or_path": str(base)})
