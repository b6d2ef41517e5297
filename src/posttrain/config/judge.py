"""Settings of a judge: which model compares or scores answers, what it is asked, and where its answers are kept."""

from __future__ import annotations

import re
import string
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from posttrain.config.settings import Config, ModelConfig
from posttrain.core.secrets import has_credentials

KEY_NAMES = re.compile(r"^(authorization|password|secret|(api|access|auth|secret)[-_]?(key|token))$", re.IGNORECASE)
"""Names of fields that hold keys."""


class ServerConfig(Config):
    """Any server that speaks OpenAI's chat protocol (extra: openai)."""

    model: str = Field(description="Name of the model, as the server knows it.")
    base_url: str | None = Field(
        None, description="Address up to and with /v1. None: $OPENAI_BASE_URL, else OpenAI's own."
    )
    api_key_env: str | None = Field(
        None,
        description="Environment variable that holds the key. None: $OPENAI_API_KEY for OpenAI's own address, none for others.",
    )
    concurrency: int = Field(8, ge=1, description="Requests under way at the same time.")
    requests_per_minute: float = Field(
        0.0, ge=0, description="Requests are spread out to no more than this. 0: no limit."
    )
    tokens_per_minute: float = Field(0.0, ge=0, description="Tokens of questions and answers, likewise. 0: no limit.")
    timeout: float = Field(120.0, gt=0, description="Seconds that one request may take, from start to last byte.")
    retries: int = Field(
        6,
        ge=0,
        description="Times that a request is made again after 408, 409, 425, 429, 5xx, a time-out, a dropped connection or a broken answer. When they are used up the run stops; what was answered is kept.",
    )
    backoff: float = Field(
        1.0,
        gt=0,
        description="Seconds before the first retry; doubled each time up to 60, times a random factor from 0.5 to 1. The server's Retry-After goes before it.",
    )
    logprobs: bool = Field(
        True,
        description="Ask for the answer tokens' probabilities; false for a server that refuses requests with them.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Further fields of each request; null takes one away: {max_tokens: null, max_completion_tokens: 16}.",
    )

    @model_validator(mode="after")
    def _no_keys(self) -> ServerConfig:
        # Messages must not quote the address: it may hold a password.
        if self.base_url is not None:
            if has_credentials(self.base_url):
                raise ValueError(
                    "base_url holds a user name, password or key, and a recipe is copied into the run and its report. "
                    "Write the key into an environment variable and name it in api_key_env; an address with a password "
                    "can stand in the variable OPENAI_BASE_URL"
                )
            parts = urlsplit(self.base_url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("base_url must begin with http:// or https:// and a host, and end with /v1")
        keys = [name for name in self.options if KEY_NAMES.search(name)]
        if keys:
            raise ValueError(
                f"options.{keys[0]} would be copied into the run and its report: write the key into an environment "
                "variable and name it in api_key_env"
            )
        fixed = sorted({"model", "messages", "stream"} & self.options.keys())
        if fixed:
            raise ValueError(f"options.{fixed[0]} can't be changed: posttrain writes it")
        return self


class JudgeConfig(Config):
    """A judge: a model in this process, or one behind a server."""

    model: ModelConfig | None = Field(
        None, description="A model in this process; its labels are its own probabilities."
    )
    server: ServerConfig | None = Field(None, description="A model behind a server.")
    mode: Literal["pairwise", "score"] = Field(
        "pairwise",
        description="pairwise: which of two answers is better, asked in both orders; score: each answer alone on a scale, 1 to 10, by expectation.",
    )
    question: str = Field(
        "", description="What is asked of the answers. Empty: which is better (pairwise), how good it is (score)."
    )
    template: str | None = Field(
        None,
        description="The whole question, with the fields {prompt}, {first}, {second} (pairwise) or {answer} (score), {question}, {principles} and {mark}. <{mark}> before a text and </{mark}> after it show where it ends: no text can hold its own mark. None: the one in docs/feedback.md.",
    )
    principles: str | None = Field(
        None,
        description="File with principles, one a line (packaged:NAME: ships with posttrain); blank lines and lines with # first do not count. None: none.",
    )
    principles_per_question: int = Field(
        0, ge=0, description="How many are drawn for each question, by its content and the seed. 0: all of them."
    )
    rationale: int = Field(
        0, ge=0, description="Longest rationale in tokens, written before the verdict. 0: the verdict at once."
    )
    labels: tuple[str, str] = Field(("A", "B"), description="What the two answers are called (pairwise).")
    scale: dict[str, float] = Field(
        default_factory=lambda: {str(n): float(n) for n in range(1, 11)},
        description="What may be said of an answer, and what it is worth (score); words do better than numbers with small models: {negative: 0, positive: 1}.",
    )
    opening: str = Field(
        "", description="Text that begins the judge's reply, before the label (for a model in this process)."
    )
    combine: Literal["probabilities", "logits"] = Field(
        "probabilities",
        description="How the two orders become one label: mean of the probabilities, or of their logits, which takes a constant preference for a place out whole.",
    )
    answer_tokens: int = Field(16, ge=1, description="Longest verdict in tokens, where the server's text is read.")
    attempts: int = Field(
        3,
        ge=1,
        description="Times that a question is asked whose answer can't be read; then its row is left out and counted.",
    )
    seed: int = Field(0, ge=0, description="Draws principles, and answers after the first attempt.")
    store: str | None = Field(
        None,
        description="SQLite file in which every question and answer is kept. None: judge.sqlite3 in posttrain's cache folder, shared by all runs.",
    )

    @model_validator(mode="after")
    def _fits(self) -> JudgeConfig:
        if (self.model is None) == (self.server is None):
            raise ValueError("a judge is either a model (judge.model.source) or behind a server (judge.server.model)")
        if self.server is not None and self.opening:
            raise ValueError(
                "opening is for a model in this process; for a server, put the form of the reply into question or template"
            )
        unused = {"pairwise": ("scale",), "score": ("labels", "combine")}[self.mode]
        asked = {n for _, n, _, _ in string.Formatter().parse(self.template or "")}
        unused = () if asked & ({"scale"} if self.mode == "pairwise" else {"a", "b"}) else unused
        changed = [
            n for n in unused if getattr(self, n) != type(self).model_fields[n].get_default(call_default_factory=True)
        ]
        if changed:
            raise ValueError(
                f"{' and '.join(changed)} would do nothing: mode is {self.mode}. Leave out, or change mode"
            )
        if self.labels[0] == self.labels[1] or not all(label.strip() for label in self.labels):
            raise ValueError(f"labels must be two different names, got {self.labels}")
        if len(set(self.scale.values())) < 2 or not all(label.strip() for label in self.scale):
            raise ValueError(f"scale needs at least two names with different worths, got {self.scale}")
        if self.template is not None:
            wanted = ("first", "second") if self.mode == "pairwise" else ("answer",)
            allowed = {*wanted, "prompt", "question", "principles", "a", "b", "scale", "mark"}
            fields = {name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None}
            if not set(wanted) <= fields or not fields <= allowed:
                raise ValueError(
                    f"template ({self.mode}) needs the fields {wanted} and may have {sorted(allowed - set(wanted))}; "
                    f"it has {sorted(fields)}"
                )
            given = {
                "principles": self.principles,
                "question": self.question != type(self).model_fields["question"].default,
            }
            unasked = [name for name, value in given.items() if value and name not in fields]
            if unasked:
                raise ValueError(
                    f"{' and '.join(unasked)} would never be asked: template has no field "
                    f"{' or '.join('{' + name + '}' for name in unasked)}. Add it, or leave out {' and '.join(unasked)}"
                )
        if self.principles_per_question and self.principles is None:
            raise ValueError("principles_per_question needs principles (a file with one a line)")
        return self
