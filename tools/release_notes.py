"""Print the notes of a release: its section of CHANGELOG.md, with links that work outside of the repository.

python tools/release_notes.py [VERSION]      (default: the version of the package)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def release_notes(changelog: str, version: str, address: str = "") -> str:
    """Return the section of a version.

    Args:
        changelog: Text of CHANGELOG.md.
        version: Version, as in its heading `## 0.1.0 (date)`.
        address: Beginning of the addresses that relative links get. Empty: links become their text.

    Raises:
        ValueError: No section, or an empty one, has this version.
    """
    sections = re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]
    found = [s for s in sections if s.split("\n", 1)[0].split(" ")[0] == version]
    if not found or not found[0].partition("\n")[2].strip():
        have = ", ".join(s.split("\n", 1)[0].split(" ")[0] for s in sections)
        raise ValueError(f"CHANGELOG.md has no notes of {version}; it has: {have}")
    title, _, body = found[0].partition("\n")
    relative = re.compile(r"\[([^\]]+)\]\((?!https?://|#)([^)]+)\)")
    body = relative.sub(rf"[\1]({address.rstrip('/')}/\2)" if address else r"\1", body)
    return f"# posttrain {title}\n\n{body.strip()}\n"


def main() -> None:
    """Print the notes, or say which versions there are."""
    own = re.search(r'__version__ = "(.+)"', (ROOT / "src/posttrain/__init__.py").read_text(encoding="utf-8"))
    assert own is not None
    version = sys.argv[1] if len(sys.argv) > 1 else own[1]
    try:
        print(release_notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version, *sys.argv[2:3]), end="")
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
