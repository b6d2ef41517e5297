"""Settings of distillation (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from posttrain.config.judge import ServerConfig
from posttrain.config.names import DIVERGENCES
from posttrain.config.open_functions import open_function
from posttrain.config.problems import ProblemsConfig
from posttrain.config.settings import NAME, DataConfig, MeasuredConfig, ModelConfig, SamplerConfig

DivergenceConfig = Annotated[Any, open_function(DIVERGENCES, "divergence")]
MOST_FROM_SERVER = 20
"""Alternatives of each token that OpenAI's protocol gives at most."""


class TeacherConfig(ModelConfig):
    """A teacher: a model in this process, or one behind a server."""

    own_sources: ClassVar[tuple[str, ...]] = ("start",)
    """Values of `source` that name no model by themselves."""

    source: str | None = Field(  # type: ignore[assignment]
        None,
        description="The teacher: any model source, stage:NAME (what an earlier stage made), or start (the model that this stage starts from, as it is before).",
    )
    server: ServerConfig | None = Field(
        None,
        description="A teacher behind an OpenAI-compatible server, in place of source: it writes answers, with up to 20 likeliest tokens of each place.",
    )

    @model_validator(mode="after")
    def _one(self) -> TeacherConfig:
        if (self.source is None) == (self.server is None):
            raise ValueError("a teacher is either a model (teacher.source) or behind a server (teacher.server.model)")
        return self

    def model(self, start: ModelConfig) -> ModelConfig:
        """Return the settings of the teacher's model, given the model that the stage starts from."""
        if self.source == "start":
            return start
        return ModelConfig.model_validate(self.model_dump(exclude={"server"}))


class DistillConfig(MeasuredConfig):
    """Distillation: a student is trained on a teacher's distributions or texts, on rows or on its own answers."""

    method: str = "distill"
    name: str = Field("distill", pattern=NAME, description="Name of the stage's folder in the run.")
    teacher: TeacherConfig
    data: DataConfig | None = Field(None, description="Rows: prompts, with the answers that the student is taught on.")
    problems: ProblemsConfig | None = Field(
        None, description="Prompts without answers, in place of data: the teacher or the student writes the answers."
    )
    teacher_text: bool = Field(
        False, description="The teacher writes the answers to train on, in place of those of the rows."
    )
    answers: int = Field(1, ge=1, description="With teacher_text: answers that the teacher writes to each prompt.")
    teacher_sampler: SamplerConfig = Field(SamplerConfig(), description="How the teacher's answers are drawn.")
    on_policy: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the rows of a step (lambda of GKD) whose answer the student itself writes, in that step; the teacher judges it token by token.",
    )
    group_size: int = Field(1, ge=1, description="With on_policy: answers that the student writes to each prompt.")
    sampler: SamplerConfig = Field(SamplerConfig(), description="How the student's answers are drawn.")
    divergence: DivergenceConfig | None = Field(
        "forward_kl",
        validate_default=True,
        description="Distance of the student's distributions from the teacher's: forward_kl, reverse_kl, jsd (beta), skew (alpha), skew_reverse (alpha), or module:function. None: no distributions; the student is trained on the teacher's text alone, which works across tokenizers (teacher_text).",
    )
    temperature: float = Field(1.0, gt=0, description="Divides the logits of both in the divergence.")
    top_k: int | None = Field(
        None,
        ge=1,
        description="Take the teacher's k likeliest tokens, and all others as one (their mass is kept). None: the whole vocabulary.",
    )
    cross_entropy: float = Field(
        0.0,
        ge=0,
        description="Weight of the cross-entropy on the answers of rows, added to the divergence. 0: the divergence alone.",
    )
    teacher_cache_mb: float = Field(
        4096.0,
        ge=0,
        description="MiB of the teacher's numbers on fixed rows that are kept on the disk (the cache folder), made before the first step; the teacher then leaves the memory. What takes more is computed in every step.",
    )
    held_out_answers: int = Field(
        5,
        ge=0,
        description="Held-out prompts that the student answers, greedily, at each measurement; the report shows the answers. 0: none.",
    )
    answer_tokens: int = Field(128, ge=1, description="Longest such answer in tokens.")

    @property
    def whole_distributions(self) -> bool:
        return self.divergence is not None

    @model_validator(mode="before")
    @classmethod
    def _source_alone(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("teacher"), str):
            return {**values, "teacher": {"source": values["teacher"]}}
        return values

    @model_validator(mode="after")
    def _rows(self) -> DistillConfig:
        if (self.data is None) == (self.problems is None):
            raise ValueError("give data (rows with prompts and answers) or problems (prompts alone), one of them")
        if self.problems is not None and not self.teacher_text and self.on_policy < 1:
            raise ValueError(
                "problems have no answers to train on: set teacher_text: true (the teacher writes them) or on_policy: "
                "1 (the student writes them), or give rows with answers as data"
            )
        if self.problems is not None and self.held_out is not None:
            raise ValueError("held_out measures answers of rows, and problems have none: give data, or use evaluate")
        if self.teacher_text and self.on_policy == 1:
            raise ValueError("on_policy is 1: no answer of the teacher would be trained on. Leave teacher_text out")
        unused = {"answers": 1, "teacher_sampler": SamplerConfig()} if not self.teacher_text else {}
        unused |= {"group_size": 1, "sampler": SamplerConfig()} if not self.on_policy else {}
        for name, default in unused.items():
            if getattr(self, name) != default:
                needed = "teacher_text: true" if name in ("answers", "teacher_sampler") else "on_policy"
                raise ValueError(f"{name} would do nothing: it is for {needed}, which is not set")
        if self.answers > 1 and self.teacher_sampler.temperature == 0:
            raise ValueError("teacher_sampler.temperature is 0: all answers to a prompt would be the same. Raise it")
        return self

    @model_validator(mode="after")
    def _divergence(self) -> DistillConfig:
        if self.divergence is None:
            if not self.teacher_text:
                raise ValueError(
                    "divergence is null, and teacher_text false: nothing of the teacher would be trained on. Choose a "
                    "divergence, set teacher_text, or use method: sft"
                )
            if self.on_policy:
                raise ValueError("on_policy needs a divergence: the student's own answers have no other loss")
            for name in ("temperature", "top_k", "cross_entropy"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is for a divergence, which is null: leave it out")
            return self
        if self.teacher.server is None:
            return self
        if self.on_policy or not self.teacher_text:
            raise ValueError(
                "a server tells probabilities of what it writes itself, not of other texts: set teacher_text: true and "
                "on_policy: 0, or open the teacher here (teacher.source)"
            )
        if self.top_k is None or self.top_k > MOST_FROM_SERVER:
            raise ValueError(
                f"a server tells the {MOST_FROM_SERVER} likeliest tokens at most: set top_k to {MOST_FROM_SERVER} or "
                "less, or divergence: null to train on its text alone"
            )
        if self.teacher_sampler.temperature == 0 or self.temperature != 1:
            raise ValueError(
                "a server's log-probabilities are those at temperature 1: leave temperature at 1, and give "
                "teacher_sampler a temperature above 0"
            )
        return self
