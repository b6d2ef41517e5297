"""Settings that all sources of prompts have, and the type of the field `problems`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from posttrain.config.names import PROMPT_SOURCES
from posttrain.config.open_kinds import open_kind
from posttrain.config.settings import Config


class PromptConfig(Config):
    """Settings of rendering prompts of any source."""

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
