"""From a request's parameters to its answer: prompts are made here, computed in the batch, and read as they end."""

from __future__ import annotations

import copy
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from posttrain.core.errors import DataError, PosttrainError
from posttrain.core.types import Rollout
from posttrain.data.bad_rows import BadRow
from posttrain.data.chat_template import NO_PICTURES, render_prompt
from posttrain.data.tokenizing import tokenize
from posttrain.data.tool_calls import read_tools
from posttrain.data.turns import read_turns
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.open_session import JoiningPrompt, TokenLogprobs
from posttrain.sampling.protocol import Request
from posttrain.sampling.served_adapters import ServedAdapter
from posttrain.serving.api_answers import AnswerFormat, Json
from posttrain.serving.api_requests import ApiError, ChatBody, CompletionsBody
from posttrain.serving.batcher import Batcher, BatchJob, Closing, QueueFull
from posttrain.serving.bounded_server import ClientGone
from posttrain.serving.text_pieces import TextPieces

PROMPTS_AT_ONCE = 128
"""Prompts of one request."""
LOOK = 1.0
"""Seconds between two looks whether a client that waits is still there."""


class ModelApi:
    """Answers requests with one model, or with an adapter on it.

    Attributes:
        name: Its name in requests and answers.
        batcher: Computes, for all names of the model.
        default_tokens: Longest completion if a request names no length.
        adapter: The adapter; None: the model alone.
        tokenizer: A copy for the threads of clients, used by one at a time: tokenizers may not be shared.
    """

    def __init__(self, name: str, batcher: Batcher, default_tokens: int, adapter: ServedAdapter | None = None) -> None:
        self.name, self.batcher, self.default_tokens, self.adapter = name, batcher, default_tokens, adapter
        self.sampler: LocalSampler = batcher.sampler
        self.tokenizer = copy.deepcopy(self.sampler.tokenizer if adapter is None else adapter.tokenizer)
        self._lock = threading.Lock()

    def chat(self, body: ChatBody, gone: Callable[[], bool]) -> Json | Iterator[Json]:
        """Answer a conversation: the body of the answer, or the chunks of a stream.

        Args:
            body: The request.
            gone: Tells if the client is no longer there.

        Raises:
            ApiError: The request can't be answered.
            ClientGone: The client left.
        """
        body = body.checked()
        tools, tokens = self._rendered(body)
        names = [tool["function"]["name"] for tool in tools]
        return self._answer(body, [tokens], self._format(body, chat=True, tools=names), gone)

    def complete(self, body: CompletionsBody, gone: Callable[[], bool]) -> Json | Iterator[Json]:
        """Continue texts or tokens.

        Args:
            body: As for `chat`, and so the other.
            gone: Likewise.

        Raises:
            ApiError: As there.
            ClientGone: Likewise.
        """
        given: Any = body.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not 0 < len(given) <= PROMPTS_AT_ONCE:
            raise ApiError(400, f"prompt: expected 1 to {PROMPTS_AT_ONCE} prompts, got {len(given)}", "prompt")
        with self._lock:
            texts = [self.tokenizer(p)["input_ids"] if isinstance(p, str) else p for p in given]
        size = len(self.tokenizer)
        for tokens in texts:
            if outside := [t for t in tokens if not 0 <= t < size]:
                raise ApiError(400, f"prompt: {outside[0]} is no token of this model, which has {size}", "prompt")
        return self._answer(body, texts, self._format(body, chat=False), gone)

    def _format(self, body: ChatBody | CompletionsBody, chat: bool, tools: Sequence[str] = ()) -> AnswerFormat:
        return AnswerFormat(
            chat, self.name, self._decode, tools, body.tops is not None, body.stream_options.include_usage
        )

    def _decode(self, tokens: Sequence[int], plain: bool) -> str:
        with self._lock:
            return str(self.tokenizer.decode(list(tokens), skip_special_tokens=plain))

    def _rendered(self, body: ChatBody) -> tuple[Sequence[Json], list[int]]:
        """Return the tools and the tokens of a conversation as the chat template writes it."""
        if self.tokenizer.chat_template is None:
            raise ApiError(400, "this model has no chat template: ask /v1/completions", "messages")
        param = "messages"
        try:
            messages = read_turns([_with_known_role(m) for m in body.messages])
            param, tools = "tools", read_tools(body.tools, "tools")
            param, arguments = "messages", body.chat_template_kwargs
            with self._lock:
                text, pictures = render_prompt(self.tokenizer, messages, tools, arguments)
                if pictures:
                    raise BadRow(NO_PICTURES)
                return tools, tokenize(self.tokenizer, [text])[0]
        except BadRow as error:
            raise ApiError(400, str(error), param) from error
        except RecursionError as error:
            raise ApiError(400, "the conversation is nested too deeply", param) from error
        except PosttrainError as error:  # the template takes too long
            raise ApiError(400, str(error), param) from error

    def _answer(
        self, body: ChatBody | CompletionsBody, texts: Sequence[Sequence[int]], form: AnswerFormat,
        gone: Callable[[], bool],
    ) -> Json | Iterator[Json]:  # fmt: skip
        params, events = body.sampling(self.default_tokens), SimpleQueue[tuple[Any, ...]]()
        prompts, seed = [], body.seed if body.seed is not None else secrets.randbits(63)
        for i, tokens in enumerate(texts):
            try:
                request = Request(tokens, body.n, seed + i)
                limit = self.sampler.limit(i, request, params)
            except DataError as error:
                raise ApiError(400, str(error), None, "context_length_exceeded" if tokens else None) from error
            prompt = JoiningPrompt(
                i, request, limit, virtual=self.sampler.virtual, params=params, adapter=self.adapter,
                top_logprobs=body.tops,
            )  # fmt: skip
            prompt.on_done = partial(_put, events, "done", i * body.n)
            if body.stream:
                prompt.on_token = partial(_put, events, "token", i * body.n)
            prompts.append(prompt)
        job = BatchJob(prompts, partial(events.put, ("failed",)))
        try:
            self.batcher.submit(job)
        except DataError as error:
            raise ApiError(400, str(error)) from error
        except QueueFull:
            raise ApiError(429, "too many requests wait: ask again later", None, "queue_full") from None
        except Closing:
            raise ApiError(503, "the server is stopping") from None
        answer = _Answer(job, events, form, body.n, gone)
        return answer.stream(params.stop) if body.stream else answer.whole()


def _put(events: SimpleQueue[tuple[Any, ...]], kind: str, first: int, number: int, value: Any) -> None:
    events.put((kind, first + number, value))


def _with_known_role(message: Json) -> Json:
    """Return a turn as the package reads it: OpenAI's name of system turns, and fields without a value left out."""
    out = {k: v for k, v in message.items() if v is not None}
    return {**out, "role": "system"} if out.get("role") == "developer" else out


class _Answer:
    """The completions of one request as they come."""

    def __init__(
        self, job: BatchJob, events: SimpleQueue[tuple[Any, ...]], form: AnswerFormat, n: int, gone: Callable[[], bool]
    ) -> None:
        self.job, self.events, self.form, self.n, self.gone = job, events, form, n, gone
        self.prompt_tokens = sum(p.length for p in job.prompts)
        self.count = n * len(job.prompts)

    def _next(self) -> tuple[Any, ...]:
        """Return the next event. Raises ClientGone, or ApiError if computing failed."""
        while True:
            try:
                event = self.events.get(timeout=LOOK)
            except Empty:
                if self.gone():
                    raise ClientGone from None
                continue
            if event[0] == "failed":
                raise ApiError(500, "the server could not compute this, or is stopping: ask again later")
            return event

    def _tops(self, index: int) -> list[TokenLogprobs]:
        return self.job.prompts[index // self.n].tops.get(index % self.n, [])

    def whole(self) -> Json:
        """Wait for all completions and return the body."""
        ended: dict[int, Rollout] = {}
        try:
            while len(ended) < self.count:
                _, index, rollout = self._next()
                ended[index] = rollout
        finally:
            self.job.cancel()  # nothing, unless the client left
        return self.form.whole([(ended[i], self._tops(i)) for i in range(self.count)], self.prompt_tokens)

    def stream(self, stops: Sequence[str]) -> Iterator[Json]:
        """Yield chunks as tokens come. Closing the iterator stops the completions."""
        form, lengths = self.form, dict[int, int]()
        plain, tools = partial(_plain, form), bool(form.tools)
        pieces = [TextPieces(plain, stops, tools) for _ in range(self.count)]
        tokens: list[list[int]] = [[] for _ in pieces]
        told = [0] * self.count
        try:
            for index in range(self.count):
                yield from form.first_chunk(index)
            while len(lengths) < self.count:
                kind, index, value = self._next()
                text, before = pieces[index], len(pieces[index].sent)
                if kind == "token":
                    tokens[index].append(value)
                    piece, calls = text.add(value), list[Json]()
                    until = told[index] if text.held else len(tokens[index])
                else:
                    content, calls = form.calls(value.text)
                    piece, tokens[index] = text.finish(content), list(form.spoken(value))
                    until = max(told[index], len(tokens[index]))
                    lengths[index] = len(value.tokens)
                if piece or (form.logprobs and until > told[index]):
                    new = slice(told[index], until)
                    told[index] = until
                    yield form.chunk(index, piece, tokens[index][new], self._tops(index)[new], before)
                if kind == "done":
                    yield from form.last_chunks(index, value, calls)
            if form.usage:
                yield form.usage_chunk(self.prompt_tokens, sum(lengths.values()))
        finally:
            self.job.cancel()


def _plain(form: AnswerFormat, tokens: Sequence[int]) -> str:
    return form.decode(tokens, True)
