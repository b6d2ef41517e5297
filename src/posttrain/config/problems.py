"""Settings that all sources of prompts have, and the type of the field `problems`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.names import PROMPT_SOURCES
from posttrain.config.open_kinds import open_kind
from posttrain.config.settings import Config


class DemonstrationsConfig(Config):
    """Worked examples before each question."""

    source: str = Field(
        description="bbh:NAME or mmlu:NAME: chains of thought in lm-eval's wheel (extra: lm-eval); or a JSON Lines file with prompt and completion."
    )
    count: int | None = Field(None, ge=1, description="How many, the first ones. None: all.")
    style: Literal["text", "turns"] = Field(
        "text", description="text: before the question, in its turn; turns: each as a turn of the user and an answer."
    )
    layout: str | None = Field(
        None, description="A question and its answer as text, with {question} and {answer}. None: that of the source."
    )

    @model_validator(mode="after")
    def _has_both(self) -> DemonstrationsConfig:
        if self.layout is not None and not 0 <= self.layout.find("{question}") < self.layout.find("{answer}"):
            raise ValueError(f"demonstrations.layout needs {{question}} and, after it, {{answer}}: {self.layout!r}")
        return self


class PromptConfig(Config):
    """Settings of rendering prompts of any source."""

    demonstrations: DemonstrationsConfig | None = Field(
        None, description="Worked examples before each question. None: none."
    )

    template: str | None = Field(
        None,
        description="Plain text with {question} in it, in place of the chat template: for a base model. None: the chat template if there is one.",
    )

    @property
    def in_chat(self) -> bool | None:
        """Return True to render prompts through the chat template, None to do so if the tokenizer has one."""
        return None

    @model_validator(mode="after")
    def _has_the_question(self) -> PromptConfig:
        if self.template is not None and "{question}" not in self.template:
            raise ValueError(f"problems.template needs {{question}} where the question goes, and is {self.template!r}")
        return self


PROMPTS = open_kind(PROMPT_SOURCES, "source of prompts", base=PromptConfig)
ProblemsConfig = Annotated[Any, PROMPTS]
