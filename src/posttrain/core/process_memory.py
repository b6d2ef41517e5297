"""Main memory of this process: what it holds now, and the most that it has held."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path

from posttrain.core.files import bytes_of_weights

LARGE = 64 << 20
"""Bytes for whose sake it is worth looking through all objects, which takes some tenths of a second."""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Return the bytes that this process holds in main memory now; where the system does not tell, the most so far."""
    return _status("VmRSS") or _most()


def peak_bytes() -> int:
    """Return the most bytes that this process has held in main memory, since `reset_peak` if that worked.

    `getrusage` alone would not do: on Linux a process that was started by a large one begins with that one's peak.
    """
    return _status("VmHWM") or _most()


def reset_peak() -> bool:
    """Let `peak_bytes` start again from what is held now; False if the system can't do that."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def free_cycles(folder: Path) -> None:
    """Free what only cycles of references hold, such as a model whose modules have other forwards bound to them.

    Python looks for cycles when there are many new objects, however large they are: without this the models of several
    stages are in memory at the same time.

    Args:
        folder: Folder of the model that is about to be read. Nothing is done if it is smaller than `LARGE`.
    """
    size = bytes_of_weights(folder)
    if size is None or size >= LARGE:
        gc.collect()


def _status(name: str) -> int:
    try:
        text = STATUS.read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name}:")), 0)


def _most() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
