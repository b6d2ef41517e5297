"""All rows of a source as they are read, and all problems, for tests of readers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from posttrain.config import DataConfig
from posttrain.data.prompts import load_prompts
from posttrain.data.rows import open_rows
from posttrain.models.tiny_model import tiny_tokenizer


@dataclass
class Table:
    """Rows, the file and number of each, the hash of each file, and the rows that can't be read."""

    rows: list[dict[str, Any]]
    places: list[tuple[str, int]]
    hashes: dict[str, str]
    bad: list[dict[str, Any]]


def read_table(config: DataConfig) -> Table:
    rows = open_rows(config, "any")
    placed = rows.read(lambda row: row, refused=frozenset())
    places = [row.source.rpartition(":") for row in placed]
    return Table([dict(r.row) for r in placed], [(f, int(n)) for f, _, n in places], rows.hashes, rows.bad.rows)


def load_prompt_rows(config: Any) -> list[dict[str, Any]]:
    """Return the rows of a source of prompts, in order."""
    return [prompt.problem for prompt in load_prompts(config, tiny_tokenizer(), context=None).items]
