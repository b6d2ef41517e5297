"""Requests to an OpenAI-compatible server: some at a time, within its limits, again where they fail, none lost."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from posttrain.config import ServerConfig
from posttrain.core.errors import MissingExtraError, ServerError
from posttrain.core.secrets import add_secret, hide_secrets, hide_values
from posttrain.sampling.bounded_body import Broken, Redirected, limit_answer

AGAIN = {408, 409, 425, 429}
"""Statuses that may go away; so may every 5xx."""
REFUSED = {400, 413, 422}
"""Statuses that are this question's own fault."""
LONGEST_WAIT = 60.0
"""Seconds between two attempts at most, unless the server names more."""
PATIENCE = 900.0
"""Longest wait in seconds that a server may request; a longer one ends the run, which can be resumed later."""
LONGEST_TEXT = 500
"""Characters of a server's own words in a message."""
MOST_TOKENS = 10**9
"""Largest count of tokens that is believed."""
NOT_IN_PROTOCOL: dict[str, Any] = {"top_k": 0, "min_p": 0.0, "min_tokens": 0, "stop_tokens": [], "kv_cache": None}
"""Settings of a sampler that a server can't be given, with their values that ask for nothing."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's answer.

    Attributes:
        tops: For each token the likeliest ones there, text → log-probability; None without them.
        prompt_tokens: As the server counts them, or estimated; completion_tokens: likewise.
        refused: Why the server would not answer this request (then nothing else is set).
    """

    text: str = ""
    finish: str = ""
    tops: Sequence[tuple[str, Mapping[str, float]]] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    refused: str = ""


class Server:
    """A client of one server. counts: requests made, retries by reason, seconds waited for its limits.

    Raises MissingExtraError without the openai package, ServerError where the key's variable is not set.
    """

    def __init__(self, config: ServerConfig) -> None:
        try:
            import openai
        except ImportError as error:
            raise MissingExtraError(
                "a server is asked through the package openai: pip install 'posttrain[openai]'"
            ) from error
        self.openai, self.config = openai, config
        self.base_url = config.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        name = config.api_key_env or ("OPENAI_API_KEY" if config.base_url is None else None)
        if name is not None and not os.environ.get(name):
            raise ServerError(
                f"the environment variable {name} holds no key for {self.base_url}: set it, or name another "
                "(server.api_key_env)"
            )
        self.key = os.environ[name] if name is not None else "none"
        add_secret(self.key)
        self.address = hide_secrets(self.base_url)
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0
        self._random = random.Random()
        self._limits = _Limits(config)  # shared by all calls

    def ask(self, requests: Sequence[Mapping[str, Any]], on_reply: Callable[[int, Reply], None]) -> None:
        """Make all requests (bodies without the model); on_reply(number, reply) as each is answered, one at a time.

        Where a request fails for good, no new one begins, those under way are waited for and handed on, and ServerError
        says what happened.
        """
        began = time.perf_counter()
        try:
            _run(self._all(requests, on_reply))
        finally:
            self.seconds += time.perf_counter() - began

    async def _all(self, requests: Sequence[Mapping[str, Any]], on_reply: Callable[[int, Reply], None]) -> None:
        waiting = iter(enumerate(requests))
        failed: list[BaseException] = []
        # Our own retries count against the limits, and know of broken answers; so the client's are switched off. A
        # redirect would hand the questions to another host, and its answers would become labels.
        transport = self.openai.DefaultAsyncHttpxClient(
            follow_redirects=False, headers={"Accept-Encoding": "gzip"}, event_hooks={"response": [limit_answer]}
        )
        async with self.openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=self.key,
            max_retries=0,
            timeout=self.config.timeout,
            http_client=transport,
        ) as client:

            async def work() -> None:
                for number, body in waiting:
                    if failed:
                        return
                    try:
                        on_reply(number, await self._one(client, body, failed))
                    except Exception as error:
                        failed.append(error)
                        return

            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.config.concurrency, len(requests))):
                    group.create_task(work())
        if failed:
            raise failed[0]

    async def _one(self, client: Any, body: Mapping[str, Any], failed: Sequence[BaseException]) -> Reply:
        """One request, as often as it takes."""
        reason, limits, arguments = "", self._limits, self._arguments(body)
        for attempt in range(self.config.retries + 1):
            if failed:
                raise ServerError(f"given up, since another request failed: {reason or failed[0]}")
            cost = await limits.wait(body)
            self.counts["requests"] += 1
            began = time.perf_counter()
            try:
                async with asyncio.timeout(self.config.timeout):
                    raw = await client.chat.completions.with_raw_response.create(**arguments)
                reply = read_reply(raw.http_response.content, time.perf_counter() - began)
                limits.settle(cost, reply.prompt_tokens + reply.completion_tokens)
                return with_token_counts(reply, body)
            except self.openai.APIStatusError as error:
                kind, reason, wait = self._status(error)
                if kind == "refused":
                    self.counts["refused"] += 1
                    return Reply(refused=reason, seconds=time.perf_counter() - began)
            except Exception as error:
                kind, reason, wait = self._failure(error)
            self.counts[f"retries: {kind}"] += attempt < self.config.retries
            if attempt < self.config.retries:
                step = min(LONGEST_WAIT, self.config.backoff * 2**attempt) * self._random.uniform(0.5, 1)
                if wait is not None:
                    limits.hold(wait)
                    step = wait + self.config.backoff * self._random.random() / 2
                self.counts["waited ms"] += round(1000 * step)
                await asyncio.sleep(step)
        raise ServerError(
            f"{self.address} failed {self.config.retries + 1} times in a row on one request, the last time with: "
            f"{reason}. "
            "The answers so far are kept; run again to resume, or raise server.retries"
        )

    def _arguments(self, body: Mapping[str, Any]) -> dict[str, Any]:
        merged = {"model": self.config.model, **body, **self.config.options}
        merged = {k: whole_text(v) for k, v in merged.items() if v is not None}
        named = {k: merged.pop(k) for k in ("model", "messages")}
        return {**named, "extra_body": merged}

    def _failure(self, error: Exception) -> tuple[str, str, None]:
        """(what kind, in words, no time to wait) of an error without a status. Raises ServerError for a redirect."""
        if isinstance(error, TimeoutError | self.openai.APITimeoutError):
            return "timed out", f"no answer within {self.config.timeout:g} s", None
        connection = isinstance(error, self.openai.APIConnectionError)
        cause = error.__cause__ or error if connection else error
        if isinstance(cause, Redirected):
            to = hide_secrets(cause.location)[:LONGEST_TEXT]
            raise ServerError(
                f"{self.address} answered {cause.status}, a redirect to {to}. It is not followed: it would give the "
                "questions to another address. If that is the right one, write it as server.base_url"
            ) from error
        told = hide_secrets(f"{cause}" if isinstance(cause, Broken) else f"{type(cause).__name__}: {cause}")
        broken = isinstance(cause, Broken) or not connection  # whatever an answer can make the client's library raise
        reason = told if isinstance(cause, Broken) else f"{'not readable' if broken else 'connection failed'}: {told}"
        return "broken answer" if broken else "connection", reason[:LONGEST_TEXT], None

    def _status(self, error: Any) -> tuple[str, str, float | None]:
        """(what kind, in words, seconds to wait as the server says). Raises ServerError for what no retry mends."""
        status, code = error.status_code, str(getattr(error, "code", "") or "")
        body = error.body if isinstance(error.body, dict) else {}
        told = hide_secrets(str(body.get("message") or body.get("detail") or error.message))[:LONGEST_TEXT]
        if status in REFUSED:
            return "refused", f"{status}: {told}", None
        if code == "insufficient_quota" or (status not in AGAIN and status < 500):
            hints = {
                401: "is the key right?",
                403: "may this key use the model?",
                404: "are server.base_url (with /v1) and server.model right?",
            }
            hint = hints.get(status, "is there credit left?" if code else "")
            raise ServerError(f"{self.address} answered {status}: {told} ({hint})".replace(" ()", ""))
        wait = retry_after(error.response.headers)
        if wait is not None and wait > PATIENCE:
            raise ServerError(
                f"{self.address} answered {status} and asks to wait {wait:,.0f} s. "
                "The answers so far are kept; run again then"
            )
        return str(status), f"{status}: {told}", wait


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Return the seconds to wait, of retry-after-ms or Retry-After (seconds or a date); None if there are none."""
    try:
        if headers.get("retry-after-ms"):
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after")
        if not value:
            return None
        try:
            return max(0.0, float(value))
        except ValueError:
            return max(0.0, parsedate_to_datetime(value).timestamp() - (time.time() if now is None else now))
    except (ValueError, TypeError, OverflowError):
        return None


class _Limits:
    """Requests and tokens spread out evenly over time, and a halt for all when the server says so."""

    def __init__(self, config: ServerConfig) -> None:
        self.request = 60 / config.requests_per_minute if config.requests_per_minute else 0.0
        self.token = 60 / config.tokens_per_minute if config.tokens_per_minute else 0.0
        self.next = self.next_by_tokens = self.held = 0.0

    async def wait(self, body: Mapping[str, Any]) -> int:
        """Until this request may begin. Returns the tokens that it was counted for."""
        # Four characters a token is the usual rule; the true count corrects it when it comes.
        cost = len(json.dumps(body.get("messages"), ensure_ascii=False)) // 4 + int(body.get("max_tokens") or 0)
        begin = max(time.monotonic(), self.next, self.next_by_tokens)
        self.next = begin + self.request
        self.next_by_tokens = max(self.next_by_tokens, begin) + cost * self.token if self.token else 0.0
        while (left := max(begin, self.held) - time.monotonic()) > 0:
            await asyncio.sleep(left)
        return cost

    def settle(self, counted: int, used: int) -> None:
        """The true number of tokens is known."""
        if self.token and used:
            self.next_by_tokens += (used - counted) * self.token

    def hold(self, seconds: float) -> None:
        """Nobody begins before so many seconds have passed."""
        self.held = max(self.held, time.monotonic() + seconds)


def read_reply(content: bytes, seconds: float) -> Reply:
    """Return the reply in a body of the protocol.

    Raises:
        Broken: The body is something else: no JSON, JSON of another form, or numbers that can't be.
    """
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        text = choice["message"]["content"]
        finish = choice.get("finish_reason")
        usage = body.get("usage") or {}
        prompt, completion = (_count(usage.get(k)) for k in ("prompt_tokens", "completion_tokens"))
        tops = _tops((choice.get("logprobs") or {}).get("content"))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
        shown = hide_secrets(content[:2000].decode(errors="replace"))[:120]
        raise Broken(f"not a chat completion ({type(error).__name__}: {str(error)[:200]}): {shown!r}") from error
    finish = finish if isinstance(finish, str) else ""
    if text is None and finish in ("content_filter", "length"):
        text = ""
    if not isinstance(text, str):
        raise Broken(f"expected text in the answer, got {type(text).__name__}")
    return Reply(hide_values(whole_text(text)), finish[:40], tops, prompt, completion, seconds)


def with_token_counts(reply: Reply, body: Mapping[str, Any]) -> Reply:
    """Return a reply with its numbers of tokens: the server's own, or four bytes a token where it does not count.

    Args:
        reply: The reply.
        body: What was asked.
    """
    asked = "".join(str(m.get("content") or "") for m in body.get("messages") or ())
    return replace(
        reply,
        prompt_tokens=reply.prompt_tokens or -(-len(asked.encode("utf-8", "replace")) // 4),
        completion_tokens=reply.completion_tokens or -(-len(reply.text.encode("utf-8", "replace")) // 4),
    )


def whole_text(value: Any) -> Any:
    """Return a value of JSON in which U+FFFD stands for each half of a character, which no file can hold."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if not value.isascii() else value
    if isinstance(value, Mapping):
        return {whole_text(k): whole_text(v) for k, v in value.items()}
    return [whole_text(v) for v in value] if isinstance(value, list | tuple) else value


def _count(value: Any) -> int:
    number = 0 if value is None else int(value)
    if not 0 <= number <= MOST_TOKENS:
        raise ValueError(f"a count of {str(value)[:40]} tokens")
    return number


def _logprob(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value <= 0.01:  # NaN is not
        raise ValueError(f"{str(value)[:40]} is no log-probability")
    return min(0.0, float(value))


def _tops(content: Any) -> list[tuple[str, dict[str, float]]] | None:
    if not content:
        return None
    return [
        (str(t["token"]), {str(o["token"]): _logprob(o["logprob"]) for o in [*(t.get("top_logprobs") or []), t]})
        for t in content
    ]


def _run(work: Coroutine[Any, Any, T]) -> T:
    """To its end, also from where an event loop runs already (a notebook): then in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
