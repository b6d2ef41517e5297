"""Checkpoints, written whole or not at all, with checksums; a damaged one is noticed and the one before it used."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from posttrain.core import distributed
from posttrain.core.errors import CheckpointError
from posttrain.core.files import file_hash, numbered, os_error, sync_folder, write_json

log = logging.getLogger("posttrain")
BEST = "best-"
"""Beginning of the name of a folder with the weights of the best step so far."""


def name_of(step: int) -> str:
    """Return the name of a step's folder."""
    return f"step-{step:06d}"


def save(folder: Path, step: int, tensors: dict[str, Any], numbers: dict[str, Any], keep: int) -> Path:
    """Write a step's checkpoint under `folder` and delete all but the newest `keep`.

    Sharded tensors are written by the ranks that hold them (every rank must call). Weights of a best step that no
    kept checkpoint names as its `best_step` are deleted too.

    Args:
        folder: Folder of the checkpoints.
        step: Number of finished steps.
        tensors: Tensors by name.
        numbers: Plain values, as JSON.
        keep: How many checkpoints to keep.

    Raises:
        CheckpointError: The disk is full or can't be written; earlier checkpoints stay.
    """
    final = _write(folder, name_of(step), step, tensors, numbers)
    if distributed.is_main():
        for old in found(folder)[:-keep]:
            shutil.rmtree(folder / name_of(old), ignore_errors=True)
        named = {_numbers(folder / name_of(kept)).get("best_step") for kept in found(folder)}
        for number, path in numbered(folder, BEST).items():
            if number not in named:
                shutil.rmtree(path, ignore_errors=True)
    distributed.barrier()
    return final


def save_best(folder: Path, step: int, weights: dict[str, Any]) -> Path:
    """Write the weights of a step beside the checkpoints, where `keep` of `save` does not count (every rank must call).

    Args:
        folder: Folder of the checkpoints.
        step: Number of finished steps.
        weights: The trained weights by name.

    Raises:
        CheckpointError: The disk is full or can't be written.
    """
    return _write(folder, f"{BEST}{step:06d}", step, weights, {})


def load_best(folder: Path, step: int, weights: dict[str, Any]) -> str | None:
    """Load the weights that `save_best` wrote, in place (every rank must call).

    Args:
        folder: Folder of the checkpoints.
        step: Number of finished steps.
        weights: The tensors to overwrite, by name.

    Returns:
        What is wrong with the files; None: they were loaded.
    """
    path = folder / f"{BEST}{step:06d}"
    wrong: str | None = distributed.from_main(damage(path) if distributed.is_main() else None)
    if wrong is None:
        _load(path, weights)
    return wrong


def _write(folder: Path, name: str, step: int, tensors: dict[str, Any], numbers: dict[str, Any]) -> Path:
    """Write tensors and values as `folder`/`name`, whole or not at all.

    The files are written into a folder of another name, hashed, flushed to disk and only then renamed, so that a
    folder with this name is complete.
    """
    final, work = folder / name, folder / f".{name}.writing"
    if distributed.is_main():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    distributed.barrier()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed.*")  # one process: nothing to distribute
            dcp.save({"tensors": tensors}, storage_writer=FileSystemWriter(work, sync_files=True))
        distributed.barrier()
        if distributed.is_main():
            write_json(work / "numbers.json", {"step": step, **numbers})
            write_json(work / "checksums.json", {p.name: file_hash(p) for p in sorted(work.iterdir())})
            sync_folder(work)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(work, final)
            sync_folder(folder)
    except (Exception, dcp.api.CheckpointException) as error:  # the latter is a BaseException
        shutil.rmtree(work, ignore_errors=True)
        problem = _disk_problem(error, folder, step, tensors)
        if problem is None:
            raise
        raise problem from error
    distributed.barrier()
    return final


def _disk_problem(error: BaseException, folder: Path, step: int, tensors: dict[str, Any]) -> CheckpointError | None:
    """Return the error of a disk that is full or can't be written; None if `error` is about something else."""
    reason = os_error(error)
    # torch's archive writer hides the operating system's word; what did not fit tells as well.
    needed = sum(t.numel() * t.element_size() for t in tensors.values()) / distributed.world()
    if reason is None and isinstance(error, RuntimeError | dcp.api.CheckpointException):
        short = shutil.disk_usage(folder).free < 1.1 * needed
        reason = OSError(errno.ENOSPC, "No space left on device") if short else None
    if reason is None:
        return None
    full = reason.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "the disk is full" if full else str(reason)
    return CheckpointError(
        f"the checkpoint of step {step} could not be written to {folder}: {what}. Everything before it is intact; "
        f"{'free some space' if full else 'mend that'} and run the same command again to go on from "
        f"{'step ' + str(found(folder)[-1]) if found(folder) else 'the beginning of the stage'}"
    )


def found(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, ascending (complete by name; not yet verified)."""
    return [step for step, path in numbered(folder, "step-").items() if path.is_dir()]


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, or None: each must have the checksum it was written with."""
    try:
        sums = json.loads((path / "checksums.json").read_text())
        for name, expected in sums.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if file_hash(path / name) != expected:
                return f"{name} is not what was written (checksum differs)"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def load_newest(folder: Path, tensors: dict[str, Any]) -> dict[str, Any] | None:
    """Load the newest undamaged checkpoint into `tensors`, in place; return its numbers, or None if there is none.

    A damaged one is renamed, with a warning, and the one before it is used. A checkpoint of tensors with other names or
    shapes raises CheckpointError: it belongs to another recipe or model.
    """
    for step in reversed(found(folder)):
        path = folder / name_of(step)
        wrong = distributed.from_main(damage(path) if distributed.is_main() else None)
        if wrong is not None:
            log.warning("checkpoint %s is damaged (%s); using the one before it", path, wrong)
            if distributed.is_main():
                shutil.rmtree(path.with_name(f"damaged-{path.name}"), ignore_errors=True)
                os.rename(path, path.with_name(f"damaged-{path.name}"))
            distributed.barrier()
            continue
        _load(path, tensors)
        return _numbers(path)
    return None


def _load(path: Path, tensors: dict[str, Any]) -> None:
    _check(path, tensors)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed.*")
        dcp.load({"tensors": tensors}, storage_reader=FileSystemReader(path))


def _numbers(path: Path) -> dict[str, Any]:
    return json.loads((path / "numbers.json").read_text())  # type: ignore[no-any-return]


def _check(path: Path, tensors: dict[str, Any]) -> None:
    """Check that names and shapes are those of this model: distributed checkpoint would load a part silently."""
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    stored = {k.removeprefix("tensors."): tuple(getattr(v, "size", ())) for k, v in metadata.items()}
    wanted = {k: tuple(v.shape) for k, v in tensors.items()}
    if stored != wanted:
        odd = sorted(set(stored.items()) ^ set(wanted.items()))[:3]
        raise CheckpointError(
            f"{path} holds other tensors than this model trains (first differences: {odd}). It belongs to another "
            "model or recipe; take another run folder (name=...), or start this one over with --fresh"
        )
