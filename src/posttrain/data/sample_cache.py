"""Keep tokenised rows on the disk, so that data larger than memory can be trained on and a second run starts at once.

An entry is a folder whose name is a hash of all that its tokens depend on: the content of the files, the settings of
the data, the chat template with its arguments, the tokenizer, and the code that renders. It is written under another
name and renamed, so that it is whole or not there. Ranks and other runs that need the same entry wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.core.files import cache_folder, file_hash, is_full, sync_folder, write_json
from posttrain.data.image_reader import processor_identity
from posttrain.data.passages import document_files
from posttrain.data.readers import Source
from posttrain.data.sample_store import RUNS, TOKENS, SampleStore, open_store
from posttrain.data.stored_images import IMAGE_BYTES, IMAGE_INDEX
from posttrain.data.template_source import template_identity

CACHED_FROM = 2**23
"""Bytes of the sources from which tokenised rows are kept on the disk; smaller ones are tokenised in every run."""
DEFAULT_LIMIT = 100
"""GB that all entries together may take, unless POSTTRAIN_DATA_CACHE_GB says otherwise."""
FORMAT = 1
ENTRY_HEADER = "header.json"

log = logging.getLogger("posttrain")


def is_cached(sources: Sequence[Source]) -> bool:
    """Return True if the sources are large enough for the cache."""
    return sum(source.size for source in sources) >= CACHED_FROM


def cache_key(
    config: DataConfig, sources: Sequence[Source], tokenizer: Any, context: int | None, kind: str = "sft"
) -> str:
    """Return the name of the entry for these rows.

    Args:
        config: Settings of the data.
        sources: Its sources.
        tokenizer: The tokenizer, with the chat template.
        context: The model's length in tokens.
        kind: Kind of the items that are made of the rows.
    """
    described = {
        "format": FORMAT,
        "code": [_code_hash(), sys.version_info[:2]],
        "packages": {name: version(name) for name in ("transformers", "tokenizers", "jinja2", "numpy")},
        "data": config.model_dump(mode="json", exclude={"source"}),
        "sources": [
            [source.name, source.identity, source.entry.model_dump(mode="json", exclude={"source"})]
            for source in sources
        ],
        "passages": [
            file_hash(file)
            for source in sources
            if source.config.passages is not None
            for file in document_files(source.config.passages.documents)
            if file.is_file()
        ],
        "template": template_identity(tokenizer),
        "tokenizer": tokenizer_identity(tokenizer),
        "processor": processor_identity(tokenizer),
        "context": context,
        "kind": kind,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def _code_hash() -> str:
    """Return a hash of the code that turns rows into tokens: all of this package, which changes seldom."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)} {file_hash(path)}\n".encode())
    return digest.hexdigest()


def tokenizer_identity(tokenizer: Any) -> str:
    """Return a hash of what decides the tokens of a text: vocabulary, merges, added tokens, normalisation."""
    tokenizer(["a"], add_special_tokens=False)  # the first call resets padding and truncation, which are described too
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [type(tokenizer).__name__, tokenizer.get_vocab() if backend is None else backend.to_str()]
    parts += [tokenizer.special_tokens_map, tokenizer.all_special_tokens]
    parts += [{i: str(token.__dict__) for i, token in tokenizer.added_tokens_decoder.items()} if backend is None else 0]
    if backend is None:
        parts.append({name: value for name, value in tokenizer.init_kwargs.items() if "file" not in name})
        files = [Path(str(path)) for name, path in tokenizer.init_kwargs.items() if name.endswith("file") and path]
        parts.append([file_hash(path) for path in files if path.is_file()])
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def cached_store(
    key: str, make: Callable[[Path], tuple[SampleStore, dict[str, Any]]]
) -> tuple[SampleStore, dict[str, Any]]:
    """Return the store of an entry and what is kept with it, and make it first if it is missing or damaged.

    Args:
        key: Name of the entry.
        make: Writes the store into an empty folder; returns it, and plain values to keep with it.

    Raises:
        DataError: The cache can't be written.
    """
    root = cache_folder() / "data"
    entry, work = root / key, root / f".{key}.writing"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{key}.lock"):
            found = _open(entry)
            if found is not None:
                os.utime(entry / ENTRY_HEADER)  # for _make_room: when it was used last
                return found
            for folder in (entry, work):
                shutil.rmtree(folder, ignore_errors=True)
            work.mkdir()
            try:
                _finish(work, *make(work))
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                raise
            work.rename(entry)
            sync_folder(root)
            _make_room(root, entry)
            made = _open(entry)
    except OSError as error:
        reason = "the disk is full" if is_full(error) else str(error)
        raise DataError(
            f"tokenised rows are kept in {root}, which can't be written: {reason}. Delete old entries there, or set "
            "POSTTRAIN_CACHE to a folder with more room"
        ) from error
    if made is None:
        raise DataError(f"{entry} can't be read after it was written. Is something else changing files there?")
    return made


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time make an entry. The lock ends with the process, however it ends."""
    with path.open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("waiting for the process that tokenises the same rows")
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _finish(folder: Path, store: SampleStore, kept: dict[str, Any]) -> None:
    """Write the header, which describes every other file."""
    files = [
        folder / name for name in (TOKENS, RUNS, IMAGE_BYTES, IMAGE_INDEX)
    ]  # the last two only if there are pictures
    header = {
        "format": FORMAT,
        "names": store.names,
        "dtype": store.dtype.str,
        "sizes": {path.name: path.stat().st_size for path in files if path.is_file()},
        "hashes": {path.name: file_hash(path) for path in sorted(folder.glob("*.npy"))},
        "kept": kept,
    }
    body = json.dumps(header, sort_keys=True)
    write_json(folder / ENTRY_HEADER, {"sha256": hashlib.sha256(body.encode()).hexdigest(), "header": header})
    sync_folder(folder)


def _open(entry: Path) -> tuple[SampleStore, dict[str, Any]] | None:
    """Return what an entry holds; None if it is missing or damaged. Each sample is checked when it is read."""
    try:
        written = json.loads((entry / ENTRY_HEADER).read_text(encoding="utf-8"))
        header = written["header"]
        if hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest() != written["sha256"]:
            return None
        if any((entry / name).stat().st_size != size for name, size in header["sizes"].items()):
            return None
        if any(file_hash(entry / name) != digest for name, digest in header["hashes"].items()):
            return None
        return open_store(entry, header["names"], header["dtype"]), header["kept"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _make_room(root: Path, current: Path) -> None:
    """Delete the entries that were used the longest time ago until the others are within the limit."""
    limit = float(os.environ.get("POSTTRAIN_DATA_CACHE_GB", DEFAULT_LIMIT)) * 1e9
    entries = []
    for header in root.glob(f"*/{ENTRY_HEADER}"):
        with contextlib.suppress(OSError):  # another process may be deleting it
            size = sum(path.stat().st_size for path in header.parent.iterdir())
            entries.append((header.stat().st_mtime, size, header.parent))
    total = sum(size for _, size, _ in entries)
    for _, size, folder in sorted(entries):
        if total > limit and folder != current:
            # A process that has opened it keeps its files until it closes them.
            shutil.rmtree(folder, ignore_errors=True)
            total -= size
