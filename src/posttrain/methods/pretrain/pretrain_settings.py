"""Settings of continued pretraining (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from posttrain.config.base import Config
from posttrain.config.settings import NAME, DataConfig, HeldOutRows, MeasuredConfig

GENERAL_SOURCE = "packaged:movie_reviews.tsv"
"""General text that is measured if a recipe names none."""

Retention = Annotated[
    Annotated[bool, Tag("switch")] | Annotated[DataConfig, Tag("settings")],
    Discriminator(lambda value: "switch" if isinstance(value, bool) else "settings"),
]


class TextReplayConfig(Config):
    """General text that is trained on between the text of the domain, so that less is forgotten (arXiv 2403.08763)."""

    data: DataConfig
    share: float = Field(0.05, gt=0, lt=1, description="Share of general text among the tokens that are trained on.")


class VocabularyConfig(Config):
    """New tokens for a domain: the tokenizer's byte-pair merges are continued on its text."""

    new_tokens: int = Field(500, ge=1, description="Number of new tokens; fewer if no pair of tokens occurs twice.")
    initialize: Literal["subtokens", "mean"] = Field(
        "subtokens",
        description="Rows of the embedding and of the output head of a new token: the mean of the rows of the tokens that it replaces, or of all rows.",
    )
    train_first: int = Field(
        0,
        ge=0,
        description="Steps in which only the embedding and the output head are trained, before all weights are.",
    )


class PretrainConfig(MeasuredConfig):
    """Continued pretraining: next-token prediction on documents, with a share of general text between them."""

    one_process = ("keep_zeros", "vocabulary")
    method: str = "pretrain"
    name: str = Field("pretrain", pattern=NAME, description="Name of the stage's folder in the run.")
    data: DataConfig
    replay: TextReplayConfig | None = Field(
        None, description="General text mixed in: {data: {source: ...}, share: 0.05}. None: the domain's text alone."
    )
    vocabulary: VocabularyConfig | None = Field(
        None,
        description="Extend the vocabulary first: {new_tokens: 500, initialize: subtokens, train_first: 0}. None: the model's own.",
    )
    sequence_length: int = Field(
        512,
        ge=2,
        description="Most tokens of a sequence; a longer document is cut into pieces, without loss of a token.",
    )
    overlap: int = Field(
        1,
        ge=1,
        description="Tokens before a later piece of a document that are read again as context, without loss. 1 loses no token; more give the piece's beginning more context.",
    )
    batch_size: int = Field(
        16,
        ge=1,
        description="Sequences of sequence_length tokens in a step, over all ranks; short documents are packed.",
    )
    epochs: float = Field(1.0, gt=0, description="Passes over the domain's text.")
    held_out: HeldOutRows | None = Field(
        0.05,
        description="Text of the domain that is measured and never trained on: a fraction of the documents (0.05), or settings of other text. None: none is measured.",
    )
    max_held_out: int = Field(200, ge=1, description="Most pieces of documents that a fraction holds out.")
    retention: Retention = Field(
        True,
        description="General text that is measured before, during and after: settings of it. true: text held out of the replay data, or without replay 200 packaged film reviews. false: none.",
    )

    @model_validator(mode="after")
    def _lengths(self) -> PretrainConfig:
        if self.overlap >= self.sequence_length:
            raise ValueError(
                f"overlap is {self.overlap}, and sequence_length {self.sequence_length}: a piece would have no room "
                "for new tokens. Lower overlap"
            )
        return self

    @model_validator(mode="after")
    def _new_rows(self) -> PretrainConfig:
        soft = self.adapter is not None and self.adapter.is_soft_prompt
        if self.vocabulary is not None and (soft or not self.merge):
            raise ValueError(
                "vocabulary makes a model with more rows, and "
                + ("a soft prompt is saved without its model" if soft else "merge: false saves an adapter alone")
                + ": train every weight, or an adapter that is merged"
            )
        return self

    @model_validator(mode="after")
    def _all_tokens(self) -> PretrainConfig:
        for name, data in self.text_blocks():
            if data.loss_on == "assistant":
                raise ValueError(f"{name}.loss_on is assistant, and pretrain trains on all tokens: leave it out")
        return self

    def text_blocks(self) -> list[tuple[str, Any]]:
        """Return (key, settings) of each block of text."""
        blocks: list[tuple[str, Any]] = [
            ("data", self.data),
            ("held_out", self.held_out),
            ("retention", self.retention),
        ]
        blocks += [] if self.replay is None else [("replay.data", self.replay.data)]
        return [(name, block) for name, block in blocks if isinstance(block, DataConfig)]
