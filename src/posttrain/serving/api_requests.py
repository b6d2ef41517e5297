"""Bodies of requests in OpenAI's protocol: what is read, what may stand there without effect, what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from posttrain.config import SamplingConfig
from posttrain.data.bad_rows import SURROGATE

MOST_LOGPROBS = 20
MOST_STOPS = 16
LONGEST_STOP = 256
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "store": (False,),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "functions": ([],),
}
"""Parameters that are not supported, with the values that ask for nothing."""
WITHOUT_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier")
"""Parameters that concern an account, of which there is none here."""


class ApiError(Exception):
    """Report an answer that is an error, in OpenAI's shape.

    Attributes:
        status: HTTP status.
        param: Name of the parameter at fault; None: none.
        code: A word for programs; None: none.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """Return the body of the answer."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against observers of a network: there is none


class RequestBody(BaseModel):
    """Hold what the bodies of both endpoints have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str | None = None
    n: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, lt=1)
    max_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] = Field(default_factory=list)
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)

    def stops(self) -> list[str]:
        """Return the stop strings. Raises ApiError if they are too many, too long or empty."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if len(stops) > MOST_STOPS or any(not 0 < len(s) <= LONGEST_STOP for s in stops):
            raise ApiError(
                400, f"stop: expected at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters each", "stop"
            )
        return stops

    def sampling(self, default_tokens: int) -> SamplingConfig:
        """Return how tokens are drawn.

        default_tokens: The longest completion where the request names no length.
        """
        return SamplingConfig(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            max_tokens=self.max_tokens or default_tokens,
            stop=self.stops(),
        )


class CompletionsBody(RequestBody):
    """Body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @property
    def tops(self) -> int | None:
        """Return how many likeliest tokens are reported at each token; None: no log-probabilities."""
        return self.logprobs


class ChatBody(RequestBody):
    """Body of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @property
    def tops(self) -> int | None:
        """Return how many likeliest tokens are reported at each token; None: no log-probabilities."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def checked(self) -> ChatBody:
        """Return it with one limit of tokens and the tools that may be called. Raises ApiError."""
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens differ: give one of them", "max_tokens")
        if self.tool_choice not in ("auto", "none"):
            raise ApiError(
                400,
                "tool_choice can be 'auto' or 'none': a model can't be forced to call a tool here",
                "tool_choice",
            )
        tools = [] if self.tool_choice == "none" else self.tools
        return self.model_copy(update={"max_tokens": self.max_completion_tokens or self.max_tokens, "tools": tools})


Body = TypeVar("Body", CompletionsBody, ChatBody)


def _refuse_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def read_json_body(raw: bytes) -> dict[str, Any]:
    """Return the object that a body holds. Raises ApiError."""
    try:
        body = json.loads(raw, parse_constant=_refuse_number)
        if b"\\u" in raw and SURROGATE.search(json.dumps(body, ensure_ascii=False)):
            raise ValueError("a text holds half of a character (a lone surrogate)")
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a {type(body).__name__}, expected an object")
    return body


def read_body(body: Mapping[str, Any], kind: type[Body]) -> Body:
    """Return a request's parameters.

    Args:
        body: The body.
        kind: What is asked for: `ChatBody` or `CompletionsBody`.

    Raises:
        ApiError: A parameter is missing, unknown, not supported, or has a value that it can't have.
    """
    given = {k: v for k, v in body.items() if v is not None and k not in WITHOUT_EFFECT}
    if "best_of" in given and given["best_of"] == given.get("n", 1):
        del given["best_of"]
    for name, values in NEUTRAL.items():
        if name in given and given[name] in values:
            del given[name]
    if unknown := sorted(given.keys() - kind.model_fields.keys()):
        known = unknown[0] in NEUTRAL or unknown[0] in ("best_of", "function_call", "audio", "logit_bias")
        reason = "is not supported by this server" if known else "is no parameter of this endpoint"
        raise ApiError(400, f"{unknown[0][:100]!r} {reason}: leave it out", unknown[0][:100], "unsupported_parameter")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ApiError(400, f"{place}: {first['msg']}", str(first["loc"][0]) if first["loc"] else None) from error
