"""Write the topics of Python's reference manual, which the standard library holds, as a folder of text files.

    python examples/data/python_reference.py [FOLDER]

The text is of the Python Software Foundation (PSF licence): see help("LICENSE") in Python.
"""

from __future__ import annotations

import sys
from pathlib import Path
from pydoc_data import topics


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in topics.topics.items():
        (folder / f"{name}.txt").write_text(text.strip() + "\n", encoding="utf-8")
    print(f"{len(topics.topics)} documents of {sum(map(len, topics.topics.values())):,} characters in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "python_reference"))
