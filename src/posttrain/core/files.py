"""Files that survive: written whole or not at all, and flushed to the disk before anything relies on them."""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from posttrain.core.errors import CheckpointError

MAX_TEXT = 16 << 20
"""Bytes of a text that a recipe names."""


LONGEST_NAME = 255
"""Bytes of a file's name, on every system that matters; asking about a longer one raises OSError."""


def named_path(text: str | Path) -> Path:
    """Return the path that a text from outside names, with ~ replaced; asking whether it exists raises nothing.

    A name that no file can have, since it is too long, becomes its beginning and `...`, which is as missing.
    """
    parts = Path(os.path.expanduser(text)).parts  # Path.expanduser raises for the home of nobody
    # surrogatepass: half of a character that YAML can write and no file name has
    sizes = [len(p.encode(errors="surrogatepass")) for p in parts]
    short = [
        p if size <= LONGEST_NAME else f"{p[:40]}...{Path(p).suffix[:10]}" for p, size in zip(parts, sizes, strict=True)
    ]
    return Path(*short)


def near(path: Path) -> list[Path]:
    """Return the file or folder beside `path` whose name is most like its own, if any is."""
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return [path.with_name(name) for name in difflib.get_close_matches(path.name, names, 1)]


def similar(path: Path) -> str:
    """Return " Did you mean PATH?" for a file or folder beside `path` with a similar name, or ""."""
    return "".join(f" Did you mean {found}?" for found in near(path))


def file_hash(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def input_hash(path: Path) -> str:
    """Compute the SHA-256 of a file that is read and not written here, once for each state of the file."""
    stat = path.stat()
    return _hash_once(path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@lru_cache(maxsize=4096)
def _hash_once(path: Path, *_: int) -> str:
    return file_hash(path)


def changed_artifacts(run: Path, below: str = "", weights: bool = True) -> list[str]:
    """Return the files of a finished run that are missing or not what its manifest says; none if it says nothing.

    Args:
        run: Folder of the run.
        below: Beginning of the paths of the files to check.
        weights: Check weights too; they are large.
    """
    try:
        noted = read_object(run / "manifest.json")["artifacts"]
        checked = {n: sha for n, sha in noted.items() if n.startswith(below) and (weights or not is_weights(n))}
    except (OSError, CheckpointError, LookupError, TypeError, AttributeError):  # no run, or not a finished one
        return []
    return [n for n, sha in checked.items() if not (run / n).is_file() or input_hash(run / n) != sha]


def is_weights(name: str) -> bool:
    """Return True for the name of a file of weights."""
    return name.endswith((".safetensors", ".bin", ".pt"))


def bytes_of_weights(folder: Path) -> int | None:
    """Return the bytes of the weight files in a folder; None if it is not on this machine."""
    return sum(p.stat().st_size for p in folder.iterdir() if is_weights(p.name)) if folder.is_dir() else None


def os_error(error: BaseException | None) -> OSError | None:
    """Return the operating system's error behind an exception, however it was wrapped; None if there is none."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, OSError):
            return error
        seen.append(error)
        for inner in (getattr(error, "failures", None) or {}).values():  # distributed checkpoint's, by rank
            found = os_error(inner[0] if isinstance(inner, tuple) else inner)
            if found is not None:
                return found
        error = error.__cause__ or error.__context__
    return None


def is_full(error: BaseException) -> bool:
    """Return True if an exception comes from a full disk (or quota); safetensors has only the system's words."""
    reason = os_error(error)
    if reason is not None:
        return reason.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left on device" in str(error)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (renames, new files) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Link a file to another name, or copy it if the file system has no links. For `shutil.copytree`."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content in one go: a reader, or a crash, sees the old text or the new one."""
    work = path.with_name(f".{path.name}.writing")
    with work.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(work, path)


def numbered(folder: Path, prefix: str, suffix: str = "") -> dict[int, Path]:
    """Return what lies in a folder under names with a number in them, by number, ascending.

    Args:
        folder: The folder.
        prefix: What their names have before the number.
        suffix: What follows it.
    """
    found = ((p.name[len(prefix) : len(p.name) - len(suffix)], p) for p in folder.glob(f"{prefix}*{suffix}"))
    return dict(sorted((int(n), p) for n, p in found if n.isascii() and n.isdigit()))


def read_small_text(path: Path) -> str:
    """Return a text file that a recipe names.

    Raises:
        OSError: There is none, it is something else (a pipe, a device), which might never end, or it is too large.
        UnicodeDecodeError: It is not UTF-8.
    """
    if not path.is_file():
        raise OSError(errno.ENOENT, "there is no such file", str(path))
    if path.stat().st_size > MAX_TEXT:
        raise OSError(errno.EFBIG, f"it is larger than {MAX_TEXT >> 20} MiB", str(path))
    return path.read_text(encoding="utf-8")


def as_json(value: Any) -> str:
    """Return a value as the text of a JSON file, indented, in the order of its keys."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON with `write_text`."""
    write_text(path, as_json(value))


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON Lines file, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def stream_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON Lines file row by row, into a folder that is renamed when it is whole: rows are not kept."""
    with path.open("w", encoding="utf-8", newline="\n") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
        f.flush()
        os.fsync(f.fileno())


def read_object(path: Path, kind: type = dict) -> Any:
    """Return the object (or what else `kind` says) in a JSON file that posttrain wrote.

    Raises:
        CheckpointError: The file is damaged.
    """
    _require_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one
        raise CheckpointError(f"{path} is damaged, it holds no JSON ({error}). Put it back from a copy") from error
    if not isinstance(value, kind):
        raise CheckpointError(f"{path} is damaged: expected {kind.__name__} in JSON, found {type(value).__name__}")
    return value


def _require_file(path: Path) -> None:
    if path.exists() and not path.is_file():  # a folder or a pipe, for which a reader would wait
        raise CheckpointError(f"{path} is damaged: it is no file. Put it back from a copy")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON Lines file, without a last line that a crash cut off. No file: no records.

    Raises:
        CheckpointError: Another line is damaged.
    """
    if not path.exists():
        return []
    _require_file(path)
    records = []
    *lines, last = path.read_bytes().split(b"\n")  # text may hold other ends of lines, which JSON leaves
    for number, line in enumerate(lines, 1):
        record = _record(line) if line else {}
        if record is None:
            raise CheckpointError(f"{path}:{number} is damaged: expected a JSON object, found {line[:60]!r}")
        records += [record] if line else []
    cut = _record(last)
    return records if cut is None else [*records, cut]


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the object on a line; None for anything else."""
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


class Lines:
    """Append to a JSON Lines file after a given number of records; what a crash left after them is cut off.

    Attributes:
        sha256: Hash of the records so far; a checkpoint that counts on them keeps its value (`digest`).
    """

    def __init__(self, path: Path, keep: int, digest: str | None = None) -> None:
        """Open the file.

        Args:
            path: The file.
            keep: Number of records to keep.
            digest: Hash of these records. None: unknown.

        Raises:
            CheckpointError: The file holds fewer records, or others.
        """
        self.path, self.sha256 = path, hashlib.sha256()
        path.parent.mkdir(parents=True, exist_ok=True)
        found = path.read_bytes().split(b"\n") if path.exists() else []
        whole = [line for line in found[:keep] if _record(line) is not None]
        if len(whole) < keep:
            raise CheckpointError(f"{path} should hold {keep} records and holds {len(whole)}")
        kept = b"".join(line + b"\n" for line in whole)
        self.sha256.update(kept)
        if digest not in (None, self.digest):
            raise CheckpointError(f"{path} holds other records than were written (checksum differs)")
        self.file = path.open("ab")
        if self.file.tell() < len(kept):  # a crash cut off the end of the last line alone
            self.file.write(b"\n")
        self.file.truncate(len(kept))

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the records so far, in hexadecimal."""
        return self.sha256.hexdigest()

    def add(self, record: dict[str, Any]) -> None:
        """Append one record; it has left the process when this returns."""
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        self.sha256.update(line)
        self.file.write(line)
        self.file.flush()

    def sync(self) -> str:
        """Flush to the disk (before a checkpoint that counts on these records), and return their hash."""
        os.fsync(self.file.fileno())
        return self.digest

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def cache_folder() -> Path:
    """Return $POSTTRAIN_CACHE, or the user's cache folder."""
    if os.environ.get("POSTTRAIN_CACHE"):
        return Path(os.environ["POSTTRAIN_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posttrain"
