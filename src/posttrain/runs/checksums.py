"""Checksums of what a run has finished, compared before something later uses it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from posttrain.core.errors import CheckpointError
from posttrain.core.files import file_hash
from posttrain.rewards.reward_log import LOG
from posttrain.trainer.loggers import FOLDERS

NOT_SUMMED = ("checkpoints", *FOLDERS, "README.md", LOG)
"""Parts that are no result: checkpoints have other checksums, model cards are written at the end, logs may grow."""


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file below a folder by its path in it, without hidden ones and checkpoints."""
    return {name: file_hash(folder / name) for name in _files(folder)}


def _files(folder: Path) -> list[str]:
    files = (p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file())
    shown = (p for p in files if not set(NOT_SUMMED) & {*p.parts} and not any(x.startswith(".") for x in p.parts))
    return [p.as_posix() for p in shown]


def changed_files(folder: Path, noted: Mapping[str, str]) -> list[str]:
    """Return the paths of the files of `folder` that are missing or not what was noted."""
    return [name for name, sha in noted.items() if not (folder / name).is_file() or file_hash(folder / name) != sha]


def check_result(folder: Path, noted: Mapping[str, str], parts: Iterable[str]) -> list[str]:
    """Check what a stage left, before it is used.

    Args:
        folder: The stage's folder.
        noted: Its checksums.
        parts: Files and folders in it that are used.

    Returns:
        Other files of the stage that were changed: they are not used, so the run goes through.

    Raises:
        CheckpointError: A file that is used is missing or changed, or lies there and is not from the stage.
    """
    used = tuple(parts)

    def is_used(name: str) -> bool:
        return any(name == part or name.startswith(f"{part}/") for part in used)

    changed = changed_files(folder, noted)
    bad = [name for name in changed if is_used(name)]
    strange = [name for name in _files(folder) if name not in noted and is_used(name)]
    if bad or strange:
        written = "is not what the stage wrote (its checksum differs, or it is missing)"
        what = f"{folder / (bad or strange)[0]} {written if bad else 'was not written by the stage'}"
        raise CheckpointError(
            f"{what}. Put {'it back from a copy' if bad else 'it elsewhere'}, or remove {folder / used[0]}: the stage "
            "then makes it again from its last checkpoint"
        )
    return [name for name in changed if not is_used(name)]
