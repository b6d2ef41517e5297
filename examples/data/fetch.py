"""Fetch real data and convert it into tables with task files, for recipes with `method: instructions`.

    python examples/data/fetch.py FOLDER                      # everything: about 150 tables, two minutes
    python examples/data/fetch.py FOLDER --only wordnet gym   # some sources
    python examples/data/fetch.py --list                      # what there is, from where, under which licence

FOLDER then has a table (NAME.jsonl or NAME.tsv) and a task file (NAME.yaml) for each task; a recipe names them with
`tasks: [FOLDER/*.yaml]`. Only pip and apt-get are used, and nothing is installed. A source that is complete is not
fetched again (--fresh does), and one that can't be had does not stop the others.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from downloads import Downloads, FetchError

from posttrain.core.errors import PosttrainError
from posttrain.core.files import write_json

SOURCES = {
    "reviews": "reviews",
    "debian": "packages",
    "wordnet": "dictionary",
    "django": "translated_messages",
    "babel": "place_names",
    "countries": "countries",
    "gym": "puzzles",
}
"""Names of the sources, and the modules that convert them."""
TASK_FILES = Path(__file__).parent / "tasks"


def fetch(name: str, folder: Path) -> dict[str, Any]:
    """Write the tables and task files of a source, and return the record of what was done.

    Args:
        name: Name of the source.
        folder: Where to.

    Raises:
        FetchError: The data can't be had.
    """
    module = importlib.import_module(SOURCES[name])
    print(f"{name}: {module.ABOUT}. Licence: {module.LICENCE}.", flush=True)
    record: dict[str, Any] = {"source": module.ABOUT, "licence": module.LICENCE, "tables": {}}
    for table in module.make_tables(Downloads(folder / ".downloads")):
        if not table.rows:
            raise FetchError(f"{table.name}: no row is left; dropped: {dict(table.dropped)}")
        counts = table.write(folder, TASK_FILES)
        record["tables"][table.file] = counts
        show(table.file, counts)
    return record


def show(file: str, counts: dict[str, Any]) -> None:
    """Print how many rows a table has, and what was dropped."""
    dropped = "; ".join(f"{number} {cause}" for cause, number in sorted(counts["dropped"].items(), key=lambda c: -c[1]))
    print(f"  {file}: {counts['rows']} rows" + (f" (dropped: {dropped})" if dropped else ""), flush=True)


def is_done(record: Path, folder: Path) -> bool:
    """Return True if a source's record is there, and so are its tables and task files."""
    if not record.is_file():
        return False
    files = [folder / file for file in json.loads(record.read_text(encoding="utf-8"))["tables"]]
    return all(file.is_file() and file.with_suffix(".yaml").is_file() for file in files)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns 1 if a source could not be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where tables and task files are written")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=sorted(SOURCES), help=f"of {', '.join(SOURCES)}")
    parser.add_argument("--fresh", action="store_true", help="fetch again what is there")
    parser.add_argument("--list", action="store_true", help="name the sources and their licences, and stop")
    given = parser.parse_args(arguments)
    if given.list:
        for name, module in SOURCES.items():
            source = importlib.import_module(module)
            print(f"{name}: {source.ABOUT}. Licence: {source.LICENCE}.")
        return 0
    if given.folder is None:
        parser.error("name the FOLDER to write to (or --list)")
    if given.fresh:
        shutil.rmtree(given.folder / ".downloads", ignore_errors=True)
    failed = []
    for name in given.only or SOURCES:
        record = given.folder / ".done" / f"{name}.json"
        if given.fresh:
            record.unlink(missing_ok=True)
        if is_done(record, given.folder):
            print(f"{name}: complete (--fresh fetches it again)")
            continue
        try:
            made = fetch(name, given.folder)
        except (FetchError, PosttrainError, OSError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
            continue
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, made)  # last: it says that the rest is complete
    if failed:
        print(f"Not fetched: {', '.join(failed)}. The others are complete; run again for these.", file=sys.stderr)
    elif (given.folder / ".downloads").is_dir() and not given.only:
        shutil.rmtree(given.folder / ".downloads")  # what is converted is not needed any more
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
