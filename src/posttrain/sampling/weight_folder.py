"""Weights that are handed to sampler workers on this machine: safetensors files in shared memory, one for a version."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "posttrain-weights-"
LOCK = "lock"


class WeightFolder:
    """A folder of weights that all workers of a run read: a version is written once, by whoever needs it first.

    It is in shared memory where that exists, and removed by `close`. A killed process leaves it behind: the next one
    that makes a folder removes those that no process holds the lock of.
    """

    def __init__(self, root: Path | None = None) -> None:
        root = root or (SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir()))
        _remove_abandoned(root)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
        self._lock = _locked(self.path / f"{LOCK}.new")
        (self.path / f"{LOCK}.new").rename(self.path / LOCK)  # under this name it is never seen unlocked
        self._guard = threading.Lock()
        self._users: dict[int, int] = {}

    @contextmanager
    def version(self, version: int, weights: Mapping[str, Tensor]) -> Iterator[Path]:
        """Write weights as `model.safetensors`, unless this version is there; yield the folder that holds the file.

        The newest version stays after the context, for workers that are started later.

        Args:
            version: Number of the weights.
            weights: By name; not read if the version is there.
        """
        folder = self.path / str(version)
        with self._guard:
            if not folder.is_dir():
                self._write(folder, weights)
            self._users[version] = self._users.get(version, 0) + 1
            self._remove_unused()
        try:
            yield folder
        finally:
            with self._guard:
                self._users[version] -= 1
                self._remove_unused()

    def _write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        work = folder.with_name(f"{folder.name}.writing")
        work.mkdir(exist_ok=True)
        tensors = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
        save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
        work.rename(folder)

    def _remove_unused(self) -> None:
        newest = max(self._users)
        for version in [v for v, users in self._users.items() if not users and v != newest]:
            shutil.rmtree(self.path / str(version), ignore_errors=True)
            del self._users[version]

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self._lock)


def _locked(file: Path) -> int:
    """Return a descriptor of a file that this process has locked until it ends."""
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_abandoned(root: Path) -> None:
    for lock in root.glob(f"{PREFIX}*/{LOCK}"):
        try:
            descriptor = _locked(lock)
        except OSError:  # in use, or another user's
            continue
        shutil.rmtree(lock.parent, ignore_errors=True)
        os.close(descriptor)
