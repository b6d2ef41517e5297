"""Programs and their tests, read from files that hold them as they are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProgramCase:
    """A program, the source before it, its tests, and the name that these call."""

    program: str
    tests: str = ""
    head: str = ""
    entry_point: str = ""


def read_cases(path: Path) -> dict[str, ProgramCase]:
    """Return the cases of a file by name: ``### name``, head and ``--- head``, program, ``--- tests of NAME``, tests.

    All but the name and the program may be missing.
    """
    out = {}
    for part in re.split(r"^### ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        name, _, rest = part.partition("\n")
        program, mark, tests = rest.partition("\n--- tests")
        entry_point, _, tests = tests.partition("\n") if mark else ("", "", "")
        head, mark, after = program.partition("--- head\n")
        out[name] = ProgramCase(after if mark else program, tests, head if mark else "", entry_point[len(" of ") :])
    return out
