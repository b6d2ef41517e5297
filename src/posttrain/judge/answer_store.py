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
CHECK = "check"
"""Field of a stored answer with the hash of the others."""
WAIT = 60.0
"""Seconds to wait for another process that writes into the same file."""


def key_of(judge: Mapping[str, Any], question: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a question and its judge, with all settings that its answer depends on."""
    text = json.dumps([judge, question], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _checked(key: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer with the hash of its key and content, by which damage of the file is noticed."""
    text = json.dumps([key, dict(answer)], sort_keys=True)
    return {**answer, CHECK: hashlib.sha256(text.encode()).hexdigest()[:32]}


def _text(value: Mapping[str, Any]) -> str:
    """Return JSON that a database takes: as it is read best, or escaped where it holds halves of characters."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if not any("\ud800" <= c <= "\udfff" for c in text) else json.dumps(value, sort_keys=True)


class Store:
    """The file. An answer is on the disk when `put` returns; a process killed in the middle leaves whole rows only.

    Write-ahead log, one connection: several processes may share a file, and each waits for the other's write. What is
    there already is never written over. Raises CheckpointError where the file is no such store, or can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.database = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
            self.database.execute("PRAGMA journal_mode=WAL")
            self.database.execute("PRAGMA synchronous=FULL")
            self.database.execute(SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise CheckpointError(
                f"{path} can't be used as a judge's store: {error}. Name another file (judge.store) or another cache "
                "folder (the variable POSTTRAIN_CACHE), or move the file away"
            ) from error

    def get(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the stored answers by key.

        Raises:
            CheckpointError: The file is damaged.
        """
        out = {}
        try:
            for start in range(0, len(keys), 500):
                part = keys[start : start + 500]
                marks = ",".join("?" * len(part))
                found = self.database.execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", part)
                for key, text in found.fetchall():
                    answer = json.loads(text)
                    if CHECK in answer and answer != _checked(key, {k: v for k, v in answer.items() if k != CHECK}):
                        raise ValueError(f"the answer {key[:12]} is not the one that was written")
                    answer.pop(CHECK, None)  # answers of earlier versions have none
                    out[key] = answer
        except (sqlite3.Error, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(error) from error
        return out

    def _damaged(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is damaged as a judge's store ({error}). Put it back from a copy, or move it away: the "
            "questions are then asked again"
        )

    def put(self, records: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]]) -> None:
        """Keep (key, judge, question, answer) of each, all or none; a key that is there keeps its first answer."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        rows = [(k, _text(judge), _text(asked), _text(_checked(k, answer)), now) for k, judge, asked, answer in records]
        try:
            self.database.execute("BEGIN IMMEDIATE")
            self.database.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)", rows)
            self.database.execute("COMMIT")
        except BaseException as error:  # an interruption too: the next answer needs a transaction that is closed
            if self.database.in_transaction:
                self.database.execute("ROLLBACK")
            if not isinstance(error, sqlite3.Error):
                raise
            raise CheckpointError(f"{self.path}: an answer can't be written: {error}") from error

    def __len__(self) -> int:
        try:
            return int(self.database.execute("SELECT COUNT(*) FROM answers").fetchone()[0])
        except sqlite3.Error as error:
            raise self._damaged(error) from error

    def close(self) -> None:
        """Close the file; the write-ahead log is put into it."""
        self.database.close()
