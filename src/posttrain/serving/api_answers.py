"""Answers in OpenAI's protocol: bodies of whole answers, and the chunks of streams."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.core.types import Rollout
from posttrain.data.tool_calls import calls_in_text
from posttrain.sampling.open_session import TokenLogprobs

FINISH_REASONS = {"end": "stop", "stop": "stop", "length": "length"}

Json = dict[str, Any]


@dataclass
class AnswerFormat:
    """Writes the answers to one request.

    Attributes:
        chat: The endpoint is /v1/chat/completions.
        model: Name of the model.
        decode: (tokens, leave out special tokens) -> text.
        tools: Names of the tools that may be called.
        logprobs: Log-probabilities are asked for.
        usage: A stream ends with the numbers of tokens.
    """

    chat: bool
    model: str
    decode: Callable[[Sequence[int], bool], str]
    tools: Sequence[str] = ()
    logprobs: bool = False
    usage: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def _around(self, choices: list[Json], chunk: bool = False) -> Json:
        prefix, kind = ("chatcmpl", "chat.completion") if self.chat else ("cmpl", "text_completion")
        kind += ".chunk" if chunk and self.chat else ""
        head = {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices}

    def whole(self, ended: Sequence[tuple[Rollout, Sequence[TokenLogprobs]]], prompt_tokens: int) -> Json:
        """Return the body of an answer that is not streamed.

        Args:
            ended: Completions in order, with their log-probabilities.
            prompt_tokens: Tokens of the prompts.
        """
        choices = [self._choice(i, *one) for i, one in enumerate(ended)]
        return {**self._around(choices), "usage": usage(prompt_tokens, sum(len(r.tokens) for r, _ in ended))}

    def _choice(self, index: int, rollout: Rollout, tops: Sequence[TokenLogprobs]) -> Json:
        tokens = self.spoken(rollout)
        logprobs = self.logprobs_of(tokens, tops[: len(tokens)]) if self.logprobs else None
        finish = FINISH_REASONS[rollout.finish]
        if not self.chat:
            return {"index": index, "text": rollout.text, "logprobs": logprobs, "finish_reason": finish}
        content, calls = self.calls(rollout.text)
        message: Json = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"], finish = calls, "tool_calls"
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def calls(self, text: str) -> tuple[str, list[Json]]:
        """Return the text beside the calls of tools, and the calls."""
        if not self.tools:
            return text, []
        content, calls = calls_in_text(text, self.tools)
        return content, [
            {
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {
                    "name": call["function"]["name"],
                    "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                },
            }
            for call in calls
        ]

    def first_chunk(self, index: int) -> list[Json]:
        """Return the chunks with which a completion begins."""
        return [self._delta(index, {"role": "assistant", "content": ""})] if self.chat else []

    def chunk(self, index: int, piece: str, tokens: Sequence[int], tops: Sequence[TokenLogprobs], before: int) -> Json:
        """Return a chunk of text.

        Args:
            index: Number of the completion.
            piece: The text.
            tokens: Tokens whose log-probabilities come with it.
            tops: Their log-probabilities.
            before: Characters that were sent before it.
        """
        logprobs = self.logprobs_of(tokens, tops, before) if self.logprobs else None
        if self.chat:
            return self._delta(index, {"content": piece}, logprobs)
        choice = {"index": index, "text": piece, "logprobs": logprobs, "finish_reason": None}
        return self._around([choice], chunk=True)

    def last_chunks(self, index: int, rollout: Rollout, calls: Sequence[Json]) -> list[Json]:
        """Return the chunks with which a completion ends.

        Args:
            index: Number of the completion.
            rollout: The completion.
            calls: Its calls of tools.
        """
        out = [
            self._delta(index, {"tool_calls": [{"index": i, **call}]})  # whole: its arguments were held back
            for i, call in enumerate(calls)
        ]
        finish = "tool_calls" if calls else FINISH_REASONS[rollout.finish]
        if self.chat:
            return [*out, self._delta(index, {}, None, finish)]
        choice = {"index": index, "text": "", "logprobs": None, "finish_reason": finish}
        return [self._around([choice], chunk=True)]

    def usage_chunk(self, prompt_tokens: int, completion_tokens: int) -> Json:
        """Return the chunk that ends a stream with the numbers of tokens."""
        return {**self._around([], chunk=True), "usage": usage(prompt_tokens, completion_tokens)}

    def _delta(self, index: int, delta: Json, logprobs: Json | None = None, finish: str | None = None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._around([choice], chunk=True)

    def spoken(self, rollout: Rollout) -> Sequence[int]:
        """Return the tokens that make up the text, without an end token or those of a stop string."""
        tokens = rollout.tokens[:-1] if rollout.finish == "end" else rollout.tokens
        if rollout.finish == "stop":
            while tokens and len(self.decode(tokens[:-1], True)) >= len(rollout.text):
                tokens = tokens[:-1]
        return tokens

    def logprobs_of(self, tokens: Sequence[int], tops: Sequence[TokenLogprobs], offset: int = 0) -> Json:
        """Return log-probabilities in the form of the endpoint.

        Args:
            tokens: The tokens.
            tops: Their log-probabilities.
            offset: Characters before them.
        """
        if self.chat:
            content = [
                {**self._token(t, own.logprob), "top_logprobs": [self._token(*pair) for pair in own.top]}
                for t, own in zip(tokens, tops, strict=True)
            ]
            return {"content": content, "refusal": None}
        texts = [self._text(t) for t in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [own.logprob for own in tops],
            "top_logprobs": [{self._text(t): value for t, value in own.top} for own in tops],
            "text_offset": [offset + sum(map(len, texts[:i])) for i in range(len(texts))],
        }

    def _text(self, token: int) -> str:
        return self.decode([token], False)

    def _token(self, token: int, logprob: float) -> Json:
        text = self._text(token)
        known = None if "\ufffd" in text else list(text.encode())  # else part of a character: its bytes are not known
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": known}


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """Return the numbers of tokens as answers have them."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
