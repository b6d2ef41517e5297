"""Every question and answer in an SQLite file, by the hash of what was asked: nothing is asked twice, nothing lost."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from posttrain.core.errors import CheckpointError

SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, judge TEXT NOT NULL, question TEXT NOT NULL, answer TEXT NOT NULL, created TEXT NOT NULL
) WITHOUT ROWID
"""
WAIT = 60.0
"""Seconds to wait for another process that writes into the same file."""


def key_of(judge: Mapping[str, Any], question: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a question and its judge, with all settings that its answer depends on."""
    text = json.dumps([judge, question], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """The file. An answer is on the disk when `put` returns; a process killed in the middle leaves whole rows only.

    Write-ahead log, one connection: several processes may share a file, and each waits for the other's write. What is
    there already is never written over. Raises CheckpointError where the file is no such store, or can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.database = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
            self.database.execute("PRAGMA journal_mode=WAL")
            self.database.execute("PRAGMA synchronous=FULL")
            self.database.execute(SCHEMA)
        except sqlite3.Error as error:
            raise CheckpointError(
                f"{path} can't be used as a judge's store: {error}. Name another file (judge.store), or move it away"
            ) from error

    def get(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the stored answers by key."""
        out = {}
        for start in range(0, len(keys), 500):
            part = keys[start : start + 500]
            marks = ",".join("?" * len(part))
            for key, answer in self.database.execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", part):
                out[key] = json.loads(answer)
        return out

    def put(self, records: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]]) -> None:
        """Keep (key, judge, question, answer) of each, all or none; a key that is there keeps its first answer."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        rows = [(k, *(json.dumps(x, ensure_ascii=False, sort_keys=True) for x in rest), now) for k, *rest in records]
        try:
            self.database.execute("BEGIN IMMEDIATE")
            self.database.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)", rows)
            self.database.execute("COMMIT")
        except sqlite3.Error as error:
            if self.database.in_transaction:
                self.database.execute("ROLLBACK")
            raise CheckpointError(f"{self.path}: an answer can't be written: {error}") from error

    def __len__(self) -> int:
        return int(self.database.execute("SELECT COUNT(*) FROM answers").fetchone()[0])

    def close(self) -> None:
        """Close the file; the write-ahead log is put into it."""
        self.database.close()
