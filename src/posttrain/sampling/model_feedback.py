"""Another model as a source of feedback, for instance a critic that was trained (RL4F, arXiv 2305.08844)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from posttrain.config.feedback_sources import FeedbackSourceConfig
from posttrain.config.judge import ServerConfig
from posttrain.config.settings import ModelConfig, SamplerConfig
from posttrain.core.errors import PosttrainError
from posttrain.core.types import Message, Rollout
from posttrain.sampling.feedback_source import FeedbackFunctions, FeedbackNote, FeedbackSource
from posttrain.sampling.frozen_sampler import open_sampler
from posttrain.sampling.refine_prompts import NO_CHANGE, fields_of, fill_template, gives_verdict, said

CRITIC_REQUEST = (
    "Question:\n{prompt}\n\nAnswer:\n{answer}\n\nName the mistakes in this answer and say why they are mistakes. "
    "Do not give a new answer."
)
VERDICT_REQUEST = " If there are none, reply with these words alone: {verdict}"
FEEDBACK_CUT = " [cut]"


class ModelFeedback(FeedbackSource):
    """Have another model write the feedback."""

    class Config(FeedbackSourceConfig):
        """Feedback written by another model: a trained critic, a larger model, a model behind a server."""

        kind: Literal["model"] = "model"
        model: ModelConfig | None = Field(
            None, description="The model: {source: ...}; `source:` beside `kind` means the same."
        )
        server: ServerConfig | None = Field(None, description="A model behind a server instead.")
        template: str | None = Field(
            None,
            description="What it is asked, with the fields {prompt}, {answer} and {verdict}. None: the words in "
            "docs/self-refine.md.",
        )
        verdict: str | None = Field(
            NO_CHANGE,
            min_length=1,
            description="Words of its feedback that say that nothing is wrong. None: it never says so.",
        )
        sampler: SamplerConfig = Field(
            SamplerConfig(temperature=0.0, max_tokens=128), description="How the feedback is drawn."
        )

        @model_validator(mode="before")
        @classmethod
        def _source_alone(cls, value: Any) -> Any:
            if isinstance(value, Mapping) and "source" in value and "model" not in value:
                return {**{k: v for k, v in value.items() if k != "source"}, "model": {"source": value["source"]}}
            return value

        @model_validator(mode="after")
        def _fits(self) -> ModelFeedback.Config:
            if (self.model is None) == (self.server is None):
                raise ValueError("feedback of kind model needs either a model (source) or a server (server.model)")
            if self.template is not None:
                try:
                    fields = fields_of(self.template)
                except ValueError as error:
                    raise ValueError(f"template: {error}") from error
                if "answer" not in fields or "feedback" in fields:
                    raise ValueError("template needs {answer}, and may have {prompt} and {verdict} besides")
                if "verdict" in fields and self.verdict is None:
                    raise ValueError("template has {verdict}, and verdict is null")
            return self

        def request(self, prompt: str, answer: str) -> str:
            """Return what the model is asked.

            Args:
                prompt: The text of the prompt.
                answer: The answer to give feedback on.
            """
            template = self.template
            if template is None:
                template = CRITIC_REQUEST + (VERDICT_REQUEST if self.verdict is not None else "")
            values = {"prompt": prompt, "answer": answer, "verdict": self.verdict or ""}
            return "".join(text for text, _ in fill_template(template, values))

    config: Config

    def open(self, functions: FeedbackFunctions) -> None:
        """Do nothing yet: the model is loaded when it is first used."""
        self.sampler: Any = None

    def __call__(self, answer: str, example: Mapping[str, Any]) -> FeedbackNote:
        """Return the feedback on one answer."""
        return self.many([answer], [example])[0]

    def many(self, answers: Sequence[str], examples: Sequence[Mapping[str, Any]]) -> list[FeedbackNote]:
        """Return the feedback on several answers, sampled together.

        Raises:
            PosttrainError: The model can't be loaded, or the server refused a request.
        """
        from posttrain.sampling.openai_sampler import OpenAISampler
        from posttrain.sampling.protocol import Request

        config = self.config
        if self.sampler is None:
            if config.server is not None:
                self.sampler = OpenAISampler(config.server)
            else:
                assert config.model is not None
                self.sampler = open_sampler(config.model, config.sampler)
        asked = [config.request(_text(e.get("prompt")), a) for a, e in zip(answers, examples, strict=True)]
        turns: list[list[Message]] = [[{"role": "user", "content": text}] for text in asked]
        tokens = self._tokens(turns)
        limit = getattr(self.sampler, "context", 2**62)
        fits = [i for i, t in enumerate(tokens) if len(t) < limit]
        requests = [Request(tokens[i], 1, _seed(asked[i]), {"messages": turns[i]}) for i in fits]
        groups = self.sampler.sample(requests, config.sampler) if requests else []
        written = {i: group.rollouts[0] for i, group in zip(fits, groups, strict=True)}
        if config.server is not None:  # rollouts of a server have no tokens, but it counts them
            spent = [of_request[0] for of_request in self.sampler.spent]
        else:
            spent = [len(t) + len(written[i].tokens) if i in written else 0 for i, t in enumerate(tokens)]
        return [self._note(written.get(i), count) for i, count in enumerate(spent)]

    def _tokens(self, turns: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Return the prompts as the model reads them: by its chat template, else as plain text."""
        from posttrain.data.chat_template import render_chat
        from posttrain.data.plain_text import plain_prompts
        from posttrain.data.tokenizing import tokenize

        tokenizer = getattr(self.sampler, "tokenizer", None)
        if tokenizer is None:  # a server takes text
            return [[] for _ in turns]
        if getattr(tokenizer, "chat_template", None):
            return tokenize(tokenizer, [render_chat(tokenizer, t, generation=True) for t in turns])
        return plain_prompts([t[0]["content"] for t in turns], tokenizer)

    def _note(self, rollout: Rollout | None, tokens: int) -> FeedbackNote:
        if rollout is None:
            return FeedbackNote("The answer is too long for the model that gives feedback.")
        if rollout.finish == "error":
            raise PosttrainError(f"the model that gives feedback refused: {rollout.text}")
        text, verdict, cut = said(rollout.text), self.config.verdict, rollout.finish == "length"
        if cut and not text:  # it was still thinking
            return FeedbackNote("", None, tokens)
        right = None if verdict is None else gives_verdict(rollout.text, verdict)
        return FeedbackNote(text + (FEEDBACK_CUT if cut else ""), right, tokens)


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else ""


def _seed(text: str) -> int:
    """Return the seed of a request: by its content, whatever else is asked."""
    return int.from_bytes(hashlib.sha256(json.dumps(text).encode()).digest()[:8], "big")
