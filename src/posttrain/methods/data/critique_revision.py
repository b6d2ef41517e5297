"""Critique and revision: the model answers, criticises its answer by a principle, and rewrites it."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.config.judge import ServerConfig
from posttrain.config.problems import ProblemsConfig
from posttrain.config.rewards import RewardsConfig
from posttrain.config.settings import NAME, ModelConfig, SamplerConfig, StageBase
from posttrain.core.errors import DataError
from posttrain.trainer.stage import Stage

if TYPE_CHECKING:
    from pathlib import Path

    from posttrain.trainer.loop import OnStep


class RefineConfig(StageBase):
    """Critique and revision: a model's own answers, criticised and rewritten by itself, kept as rows to learn from."""

    makes: ClassVar[Literal["model", "data", "reward_model"]] = "data"

    method: Literal["refine"] = "refine"
    name: str = Field("refine", pattern=NAME, description="Name of the stage's folder in the run.")
    problems: ProblemsConfig = Field(description="What is asked; in chat, since critiques are turns of it.")
    model: ModelConfig | None = Field(None, description="A model that writes instead of the policy at hand.")
    server: ServerConfig | None = Field(None, description="A model behind a server that writes instead.")
    principles: str | None = Field(
        None,
        description="File with principles, one a line (packaged:NAME: ships with posttrain); one is drawn for each round. None: none, as in self-refine.",
    )
    revisions: int = Field(2, ge=1, description="Rounds of critique and revision.")
    critique: str | None = Field(
        None,
        description="What asks for a critique, with the field {principle}. None: the words in docs/constitutional.md.",
    )
    revision: str | None = Field(
        None,
        description="What asks for the revision, with the field {principle}. None: the words in docs/constitutional.md.",
    )
    examples: str | None = Field(
        None,
        description="JSON Lines file with finished rounds (prompt, answer, principle, critique, revision): those of the principle at hand, or all where it has none, come before each request. packaged:NAME: ships with posttrain. None: none.",
    )
    sampler: SamplerConfig = Field(SamplerConfig(), description="How answers, critiques and revisions are drawn.")
    critique_tokens: int = Field(128, ge=1, description="Longest critique in tokens.")
    satisfied: str | None = Field(
        None,
        min_length=1,
        description="Words of a critique (case does not count) that end its chain: its answer needs no change. None: every round is carried out.",
    )
    rewards: RewardsConfig | None = Field(
        None, description="Numbers for every answer of a chain, for the account and for stop_at. None: none."
    )
    stop_at: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Reward from which an answer that ended needs no (further) round. None: every round is carried out.",
    )
    keep: Literal["last", "all"] = Field(
        "last", description="Rows of each chain: its last answer, or every revision that could be used."
    )
    seed: int = Field(0, ge=0, description="Draws the principles, with what was asked.")
    prompts_at_once: int = Field(32, ge=1, description="Chains carried through between two writes to the disk.")

    @model_validator(mode="after")
    def _fits(self) -> RefineConfig:
        if self.model is not None and self.server is not None:
            raise ValueError(
                "either a model writes (model.source) or one behind a server (server.model): leave one out"
            )
        if self.stop_at is not None and self.rewards is None:
            raise ValueError("stop_at is a reward, and there is none: give rewards")
        if self.critique_tokens < self.sampler.min_tokens:
            raise ValueError(
                f"critique_tokens ({self.critique_tokens}) is below sampler.min_tokens ({self.sampler.min_tokens}): no "
                "critique could end"
            )
        named = False
        for name in ("critique", "revision"):
            template = getattr(self, name)
            try:
                fields = {f for _, f, _, _ in string.Formatter().parse(template or "") if f is not None}
            except ValueError as error:
                raise ValueError(f"{name}: {error}; write {{{{ and }}}} for braces that are meant as such") from error
            allowed = {"principle"} if self.principles else set()
            if fields - allowed:
                have = "{principle}" if allowed else "none without principles"
                raise ValueError(f"{name} has the field {sorted(fields - allowed)[0]!r}, and there may be: {have}")
            named = named or bool(fields) or template is None
        if self.principles and not named:
            raise ValueError("principles are drawn, and neither critique nor revision names {principle}")
        return self


class CritiqueRevision(Stage):
    """Carry chains of critique and revision through, and write their answers as rows."""

    Config = RefineConfig
    title = "Critique and revision"

    def prepare(self) -> list[tuple[str, Any]]:
        """Render the problems; read principles and examples."""
        from posttrain.data.prompts import load_prompts, uses_chat_template
        from posttrain.judge.principles import read_principles
        from posttrain.methods.data.revision_prompts import read_examples
        from posttrain.sampling.openai_sampler import OpenAISampler

        config = self.config
        principles = read_principles(config.principles) if config.principles is not None else []
        self.texts = principles, read_examples(config.examples) if config.examples is not None else []
        if config.server is not None:
            OpenAISampler(config.server)  # a key or a package that is missing is reported now
        if not uses_chat_template(config.problems, self.context.tokenizer):
            raise DataError(
                f"stage {config.name}: critiques are turns of a chat, and these problems are asked in plain text. Leave "
                "out problems.template and data.chat=false; for a model without a chat template give model.chat_template"
            )
        prompts = load_prompts(config.problems, self.context.tokenizer, context=self.context.context)
        self.prompts = prompts.items
        return [(config.name, prompts)]

    def run(self, model: ModelConfig, folder: Path, seed: int, on_step: OnStep | None = None) -> dict[str, Any]:
        from posttrain.methods.data.revision_rows import run_refine

        functions = self.context.functions
        return run_refine(self.config, model, self.prompts, folder, texts=self.texts, seed=seed, functions=functions)
