"""Find the runs below some folders and tell their status; what has not changed since is not read again."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.core.errors import CheckpointError
from posttrain.report.formatting import format_number
from posttrain.report.load import JsonDict, numbered_folders
from posttrain.runs.run_folder import is_worked_on

DEEPEST = 4
"""Levels below a folder at which runs are found; sweeps keep theirs on the second."""
OF_RUNS = ("stages", "evaluations", "model", "checkpoints")
RUN_LOG = "run.log"
"""What a run that the page started has printed; in its folder."""
STATUSES = ("running", "done", "failed", "interrupted", "not started")


@dataclass(frozen=True)
class RunEntry:
    """Hold a line of the list of runs.

    Attributes:
        key: The folder as it is shown and named in addresses.
        status: One of `STATUSES`.
        stages: Name, method and status of each stage that has begun.
        step: Steps of the last stage; None if it has made none.
        results: (task, value before, value after) as text.
        modified: When the manifest was written, in seconds.
    """

    key: str
    folder: Path
    status: str
    created: str
    model: str
    stages: tuple[tuple[str, str, str], ...]
    step: int | None
    results: tuple[tuple[str, str, str], ...]
    error: str
    modified: float

    @property
    def name(self) -> str:
        """Return the name of the folder."""
        return self.folder.resolve().name

    @property
    def methods(self) -> str:
        """Return the methods of its stages."""
        return ", ".join(dict.fromkeys(method for _, method, _ in self.stages))


def run_folders(root: Path, levels: int = DEEPEST) -> Iterator[Path]:
    """Yield the folders of runs in a folder, which may be one itself; not what lies inside of runs."""
    try:
        found = {entry.name: entry for entry in os.scandir(root)}
    except OSError:
        return
    if "recipe.yaml" in found and found["recipe.yaml"].is_file() and {"manifest.json", ".lock", RUN_LOG} & found.keys():
        yield root
    elif RUN_LOG in found:  # started from the page, and refused before a run began
        yield root
    elif levels:
        for name, entry in sorted(found.items()):
            if not name.startswith(".") and name not in OF_RUNS and entry.is_dir(follow_symlinks=False):
                yield from run_folders(root / name, levels - 1)


class RunIndex:
    """The runs below some folders, by key.

    Attributes:
        roots: The folders; those that are missing have no runs (yet).
        is_alive: Tells if the process of a run is known to be there, before the run has locked its folder.
    """

    def __init__(self, roots: Sequence[Path], is_alive: Callable[[Path], bool] = lambda _: False) -> None:
        self.roots, self.is_alive = list(roots), is_alive
        self._lock = threading.Lock()
        self._read: dict[Path, tuple[Any, RunEntry]] = {}

    def entries(self) -> list[RunEntry]:
        """Return all runs, those that changed last first."""
        with self._lock:
            found = {path: self._entry(path) for root in self.roots for path in run_folders(root)}
            self._read = {path: self._read[path] for path in found}
        return sorted(found.values(), key=lambda e: (-e.modified, e.key))

    def entry(self, key: str) -> RunEntry:
        """Return one run.

        Raises:
            CheckpointError: There is no such run below the folders.
        """
        path = Path(key)
        known = any(root == path or root in path.parents for root in self.roots) and ".." not in path.parts
        if not known or not path.is_dir() or next(run_folders(path, 0), None) is None:
            raise CheckpointError(f"there is no run {key} below {', '.join(map(str, self.roots))}")
        with self._lock:
            return self._entry(path)

    def _entry(self, path: Path) -> RunEntry:
        state = tuple(_state(path / name) for name in ("manifest.json", "evaluations/comparison.json"))
        read, entry = self._read.get(path, (None, None))
        # A run that was killed stays so until its manifest changes: its lock is not asked for again.
        live = entry is None or entry.status in ("running", "not started") or self.is_alive(path)
        if entry is None or read != state or live:
            entry = _read_entry(path, self.is_alive(path), entry if read == state else None)
            self._read[path] = (state, entry)
        return entry


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _read_entry(path: Path, alive: bool, known: RunEntry | None) -> RunEntry:
    manifest = read_manifest(path)
    stages = [s for s in manifest.get("stages") or [] if isinstance(s, dict)]
    status = str(manifest.get("status", ""))
    if status in ("running", ""):
        ended = "interrupted" if status else "failed" if (path / RUN_LOG).exists() else "not started"
        status = "running" if alive or is_worked_on(path) else ended
    elif alive and status != "done":  # it is being resumed
        status = "running"
    modified = (_state(path / "manifest.json") or _state(path) or (0, 0))[0] / 1e9
    return RunEntry(
        key=str(path),
        folder=path,
        status={"stopped": "interrupted"}.get(status, status),
        created=str(manifest.get("created") or "")[:16].replace("T", " "),
        model=str((manifest.get("model") or {}).get("source") or ""),
        stages=tuple((str(s.get("name")), str(s.get("method")), str(s.get("status", ""))) for s in stages),
        step=_last_step(path)
        if status == "running"
        else next((s["steps"] for s in stages[::-1] if "steps" in s), None),
        results=known.results if known is not None else _results(path),
        error=str(manifest.get("error") or ""),
        modified=modified,
    )


def read_manifest(path: Path) -> JsonDict:
    """Return the manifest of a run; empty if it is missing, damaged or being written."""
    try:
        found = json.loads((path / "manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_step(path: Path) -> int | None:
    """Return the step on the last line of the newest stage's metrics."""
    for stage in reversed(numbered_folders(path / "stages")):
        try:
            with (stage / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
                lines = file.read().split(b"\n")
        except OSError:
            continue
        for line in reversed(lines[:-1]):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, TypeError, LookupError):
                continue
    return None


def _results(path: Path) -> tuple[tuple[str, str, str], ...]:
    try:
        found = json.loads((path / "evaluations" / "comparison.json").read_bytes())
        return tuple(
            (str(c["task"]), *(format_number(c[side]["value"]) for side in ("before", "after")))  # type: ignore[misc]
            for c in found
        )
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return ()
