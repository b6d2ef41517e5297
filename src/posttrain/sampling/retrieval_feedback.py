"""A source of feedback that shows what given documents say about an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from posttrain.config.feedback_sources import FeedbackSourceConfig
from posttrain.data.passages import PassageIndex, read_passages
from posttrain.sampling.feedback_source import FeedbackFunctions, FeedbackNote, FeedbackSource


class RetrievalFeedback(FeedbackSource):
    """Show the passages of given documents that fit the question and the answer best."""

    class Config(FeedbackSourceConfig):
        """Passages of given documents that fit the answer best, by BM25."""

        kind: Literal["retrieval"] = "retrieval"
        documents: str = Field(
            description="A text file (its paragraphs are passages), a .jsonl file (its rows are), or a folder of these."
        )
        column: str = Field("text", description="Column of the text in rows.")
        passages: int = Field(3, ge=1, description="Passages that are shown.")
        query: Literal["answer", "prompt", "both"] = Field(
            "both", description="What the passages are looked up with: the answer, the prompt, or both."
        )

    config: Config

    def open(self, functions: FeedbackFunctions) -> None:
        """Read the documents, unless a stage has yet to make them. Raises DataError if they can't be read."""
        if not self.config.documents.startswith("stage:"):
            self.index = PassageIndex(read_passages(self.config.documents, self.config.column))

    def __call__(self, answer: str, example: Mapping[str, Any]) -> FeedbackNote | None:
        """Return the passages, or None if none has a word of the answer."""
        prompt = example.get("prompt", "")
        texts = {"answer": [answer], "prompt": [str(prompt)], "both": [str(prompt), answer]}[self.config.query]
        found = self.index.nearest("\n".join(texts), self.config.passages)
        if not found:
            return None
        return FeedbackNote("The documents say:\n" + "\n".join(f"- {passage}" for passage in found), informs=True)
