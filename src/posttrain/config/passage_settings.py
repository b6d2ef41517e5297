"""Settings of passages that are looked up for each row (imports no torch)."""

from __future__ import annotations

from pydantic import Field

from posttrain.config.base import Config


class PassagesConfig(Config):
    """Look up passages of documents for each row by BM25; they become the field `passages` of its templates."""

    documents: str = Field(
        min_length=1,
        description="A text file (its paragraphs are passages), a .jsonl file (its rows are), or a folder of these.",
    )
    query: str = Field(
        min_length=1, description='Template of what is looked up, with {column} fields of the row: "{question}".'
    )
    most: int = Field(1, ge=1, description="Passages of a row at most, the best first; none that shares no word.")
    column: str = Field("text", description="Column of the text in rows of documents.")
