"""What memory a process may take: limits of control groups, and ranks that share a machine."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from posttrain.sampling.memory import group_limit, memory_bytes, part


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(("physical", "limit", "ranks", "each"), [(8e9, math.inf, 1, 8e9), (8e9, 2e9, 4, 5e8)])
def test_the_less_of_both_shared(physical: float, limit: float, ranks: int, each: float) -> None:
    assert part(physical, limit, ranks) == each


def test_no_limit(tmp_path: Path) -> None:
    assert group_limit(tmp_path / "none", tmp_path / "none") == math.inf
    write(tmp_path / "memory.max", "max\n")
    assert group_limit(tmp_path, tmp_path / "none") == math.inf


def test_version_two(tmp_path: Path) -> None:
    """The least on the way from the process's own group to the top."""
    write(tmp_path / "self", "0::/job/step\n")
    write(tmp_path / "groups/job/step/memory.max", "max\n")
    write(tmp_path / "groups/job/memory.max", "3000000000\n")
    write(tmp_path / "groups/memory.max", "5000000000\n")
    write(tmp_path / "groups/other/memory.max", "1000\n")
    write(tmp_path / "memory.max", "10\n")  # above where groups are mounted: not a limit
    assert group_limit(tmp_path / "groups", tmp_path / "self") == 3e9


def test_version_one(tmp_path: Path) -> None:
    write(tmp_path / "self", "9:name=systemd:/\n4:cpu,memory:/job:1\n0::/\n")
    write(tmp_path / "groups/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert group_limit(tmp_path / "groups", tmp_path / "self") == 9223372036854771712
    write(tmp_path / "groups/memory/job:1/memory.limit_in_bytes", "2000000000\n")
    assert group_limit(tmp_path / "groups", tmp_path / "self") == 2e9


def test_a_container_sees_its_own_group_at_the_top(tmp_path: Path) -> None:
    """Its path there is the host's, and not to be found."""
    write(tmp_path / "self", "4:memory:/docker/abc\n0::/docker/abc\n")
    write(tmp_path / "groups/memory.max", "7000\n")
    assert group_limit(tmp_path / "groups", tmp_path / "self") == 7000
    write(tmp_path / "groups/memory/memory.limit_in_bytes", "6000\n")
    assert group_limit(tmp_path / "groups", tmp_path / "self") == 6000


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert 0 < memory_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
