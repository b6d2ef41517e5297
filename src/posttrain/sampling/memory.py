"""Memory that this process may use: the machine's, or what its control groups leave of it, shared by ranks."""

from __future__ import annotations

import math
import os
from pathlib import Path

GROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def memory_bytes() -> float:
    """Return the share of main memory of this rank; free memory has no part in it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return part(physical, group_limit(), int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def part(physical: float, limit: float, ranks: int) -> float:
    """Return min(physical, limit) / ranks.

    Args:
        physical: Memory of the machine in bytes.
        limit: Limit of the control groups in bytes.
        ranks: Processes on this machine (torchrun sets it).
    """
    return min(physical, limit) / max(1, ranks)


def group_limit(groups: Path = GROUPS, membership: Path = MEMBERSHIP) -> float:
    """Return the smallest memory limit of this process's control groups and those above, in bytes; inf: no limit.

    Args:
        groups: Where control groups are mounted (version 2: memory.max; version 1: memory/…/memory.limit_in_bytes).
        membership: The process's groups, a line each: number:controllers:path. In a container the path may be the
            host's, and is missing; the container's group is then at the top.
    """
    limits = [math.inf]
    lines = membership.read_text().splitlines() if membership.is_file() else []
    for line in ["0::/", "0:memory:/", *lines]:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (groups / "memory", "memory.limit_in_bytes") if controllers else (groups, "memory.max")
        own = top / path.lstrip("/")
        limits += [_read(group / name) for group in (own, *own.parents) if group.is_relative_to(top)]
    return min(limits)


def _read(file: Path) -> float:
    """Return the content of a limit's file: `max`, or bytes; inf if it is missing or may not be read."""
    try:
        text = file.read_text().strip()
    except OSError:
        return math.inf
    return float(text) if text.isdigit() else math.inf
