"""Models to talk to, two at a time, and the votes for their answers as rows that preference methods train on."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from posttrain.core.errors import DataError
from posttrain.core.hub import check_hub
from posttrain.recipe.model_sources import find_model

if TYPE_CHECKING:
    from posttrain.serving.model_api import ModelApi

MODELS_OPEN = 2
"""Models that are kept open."""
CACHE_MB = 512.0
"""Memory for keys and values of each, in MiB."""


class ChatRequest(BaseModel):
    """Hold what the page asks of a model."""

    model_config = ConfigDict(extra="forbid")
    model: str = Field(min_length=1, max_length=2000)
    messages: list[dict[str, Any]] = Field(min_length=1)
    temperature: float = Field(0.7, ge=0, le=100)
    max_tokens: int = Field(256, ge=1)
    seed: int | None = None


class VoteRequest(BaseModel):
    """Hold a vote. messages: the conversation up to the answers. models: what wrote them."""

    model_config = ConfigDict(extra="forbid")
    messages: list[dict[str, str]] = Field(min_length=1)
    chosen: str = Field(min_length=1)
    rejected: str = Field(min_length=1)
    chosen_model: str = ""
    rejected_model: str = ""


def read_request(kind: type[BaseModel], body: dict[str, Any]) -> Any:
    """Return the body of a request as what it should be. Raises DataError."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise DataError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


class ChatModels:
    """The models that are open; one more closes the one that was used least recently."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[str, ModelApi] = OrderedDict()

    def _model(self, source: str) -> ModelApi:
        from posttrain.config import ModelConfig
        from posttrain.serving.open_model import open_model_api

        with self._lock:  # a second request for a model waits until the first one has opened it
            if source not in self._open:
                if find_model(source).kind == "hub":
                    check_hub([source])
                while len(self._open) >= MODELS_OPEN:
                    self._open.popitem(last=False)[1].batcher.close(0)
                self._open[source] = open_model_api(ModelConfig(source=source), source, cache_mb=CACHE_MB)
            self._open.move_to_end(source)
            return self._open[source]

    def answer(self, asked: ChatRequest, gone: Callable[[], bool]) -> Iterator[dict[str, str]]:
        """Return the pieces of an answer as they are written; a model without a chat template continues the text.

        Args:
            asked: The conversation and the model.
            gone: Tells if whoever asked is no longer there.

        Raises:
            ModelError: The model can't be opened.
            ApiError: The conversation can't be answered.
        """
        from posttrain.serving.api_requests import ChatBody, CompletionsBody

        api = self._model(asked.model)
        same: dict[str, Any] = {
            "temperature": asked.temperature, "max_tokens": asked.max_tokens, "seed": asked.seed, "stream": True
        }  # fmt: skip
        if api.tokenizer.chat_template is None:
            text = "\n".join(str(m.get("content", "")) for m in asked.messages)
            chunks = api.complete(CompletionsBody(prompt=text, **same), gone)
        else:
            chunks = api.chat(ChatBody(messages=asked.messages, **same), gone)
        assert not isinstance(chunks, dict)
        return _pieces(chunks)

    def close(self) -> None:
        """Close all models."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].batcher.close(0)


def _pieces(chunks: Iterator[dict[str, Any]]) -> Iterator[dict[str, str]]:
    try:
        for chunk in chunks:
            for choice in chunk["choices"]:
                piece = choice.get("text") or (choice.get("delta") or {}).get("content")
                if piece:
                    yield {"text": piece}
    finally:
        chunks.close()  # type: ignore[attr-defined]


def read_votes(path: Path) -> int:
    """Return the number of votes in a file."""
    try:
        with path.open("rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


def append_vote(path: Path, vote: VoteRequest) -> int:
    """Append a vote as a preference row, flushed to the disk; return the number of votes in the file.

    Raises:
        DataError: The answers are equal, which is no preference, or the file can't be written.
    """
    if vote.chosen.strip() == vote.rejected.strip():
        raise DataError("both answers are the same: there is nothing to prefer")
    row = {"prompt": vote.messages, "chosen": vote.chosen, "rejected": vote.rejected}
    row |= {"chosen_model": vote.chosen_model, "rejected_model": vote.rejected_model}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # two pages may share the file
            file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            return sum(1 for _ in file)
    except OSError as error:
        raise DataError(f"the vote can't be written to {path}: {error.strerror}. Start with another --votes") from error
