"""Settings that every method shares: models, data, adapters, optimizer, sampling, evaluation; and SFT's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)

from posttrain.config.adapter_settings import NOT_MERGED, AdapterConfig
from posttrain.config.base import Config
from posttrain.config.optimizer_settings import OptimizerConfig
from posttrain.config.passage_settings import PassagesConfig
from posttrain.config.quantization_settings import QuantizedTrainingConfig

NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$"
"""What stages, tasks and runs may be called: they name files, so none is hidden, an option, or a folder above."""


class QuantizationConfig(Config):
    """Weights in 4 bit, made by bitsandbytes while a model is read; adapters are trained on them (QLoRA)."""

    kind: Literal["nf4", "fp4"] = Field(
        "nf4", description="Values of the 4 bits: quantiles of a normal distribution (nf4), or floating point (fp4)."
    )
    double: bool = Field(True, description="Quantise the scales of blocks too: 0.4 bit a weight less.")
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype of products; auto: the model's."
    )


class NewToken(Config):
    """A token that is added to the tokenizer."""

    token: str = Field(min_length=1, description="Text of the token.")
    special: bool = Field(
        False,
        description="A mark of structure like <|im_end|>: left out of decoded text, and never read from a text. False: a part of texts like <think>.",
    )


class ModelConfig(Config):
    """Which model to start from, and how to hold it in memory."""

    source: str = Field(
        description="Hub name, folder, path of a .gguf file, package:NAME (a GGUF inside an installed Python package), lab:, lab:SEED or lab:KIND:SEED (what posttrain lab makes), or tiny:TYPE (a tiny random model, for tests)."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Compute dtype; auto is bfloat16 on a GPU (with float32 master weights while training) and float32 on a CPU.",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps.")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")
    chat_template: str | None = Field(
        None,
        description="Jinja chat template (text or path of a file) that replaces the tokenizer's; needed for base models without one.",
    )
    chat_template_args: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of the chat template, such as {enable_thinking: false}, for training, evaluation, sampling and judging alike. A row's column chat_template_kwargs goes over them.",
    )
    add_tokens: list[Annotated[str, Field(min_length=1)] | NewToken] = Field(
        default_factory=list,
        description='Tokens to add to the tokenizer: texts such as "<think>", or {token: "<|end|>", special: true}. The embedding gets a row for each, which starts at the mean of the others and is trained, with LoRA too.',
    )
    trust_remote_code: bool = Field(False, description="Run Python code that ships with the model.")
    quantization: QuantizationConfig | None = Field(
        None,
        description="Quantise the weights while they are read: nf4, fp4, or a block {kind: nf4, double: true}. Stages then train adapters. None: as they are stored.",
    )

    @field_validator("quantization", mode="before")
    @classmethod
    def _kind_alone(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _each_once(self) -> ModelConfig:
        tokens = [t if isinstance(t, str) else t.token for t in self.add_tokens]
        if twice := sorted({t for t in tokens if tokens.count(t) > 1}):
            raise ValueError(f"add_tokens has {twice[0]!r} twice")
        return self


class ClassesConfig(Config):
    """Turns a numeric column into class names: value < cuts[0] is names[0], and so on."""

    column: str = Field(description="The numeric column.")
    cuts: list[float] = Field(description="Ascending cut points.")
    names: list[str] = Field(
        description="Class names, one more than cuts, lowest first. The row gets the field 'label'."
    )
    margin: float = Field(
        0.0, ge=0, description="Rows closer than this to a cut are left out (counted as 'filtered'). 0: none."
    )

    @model_validator(mode="after")
    def _counts(self) -> ClassesConfig:
        if len(self.names) != len(self.cuts) + 1:
            raise ValueError(
                f"{len(self.cuts)} cuts make {len(self.cuts) + 1} classes, but {len(self.names)} names were given"
            )
        if sorted(self.cuts) != self.cuts:
            raise ValueError("cuts must ascend")
        return self


class RowSettings(Config):
    """Define how rows are read and become samples: settings of a `data` block, and of one of its sources."""

    source: Any = None
    split: str = Field("train", description="Split of a Hub data set.")
    subset: str | None = Field(None, description="Configuration name of a Hub data set.")
    layout: Literal[
        "auto",
        "messages",
        "prompt_completion",
        "text",
        "preference",
        "rated",
        "verifiable",
        "alpaca",
        "sharegpt",
        "hh_rlhf",
        "ultrafeedback",
        "openassistant",
        "gsm8k",
        "flan",
    ] = Field("auto", description="How a row is laid out; auto recognises it from the columns and reports its choice.")
    separator: str | None = Field(
        None,
        description='Text files (.txt, .md): a line of it ends a document, such as "%" in files of fortunes; "": an empty line. None: a file is one document.',
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Renames before the layout is applied: {ours: theirs}, for example {prompt: question}.",
    )
    ignore: list[str] = Field(
        default_factory=list,
        description="Columns, fields of turns and types of content parts that are left out (and counted), for example [images]; needed for those that would change the meaning of a row.",
    )
    image_folder: str | None = Field(
        None,
        description="Folder that relative paths of images start from. None: the folder of the rows' file.",
    )
    classes: ClassesConfig | None = Field(None, description="Makes the field 'label' from a numeric column.")
    passages: PassagesConfig | None = Field(None, description="Passages that fit the row, as {passages} in templates.")
    system: str | None = Field(
        None, description="System message put first in every conversation, in place of the row's."
    )
    prompt: str | None = Field(
        None,
        description="Template with {column} fields that makes the prompt (with completion: turns any table into instructions).",
    )
    completion: str | None = Field(None, description="Template with {column} fields that makes the completion.")
    loss_on: Literal["completion", "assistant", "all"] = Field(
        "completion",
        description="Tokens that get a loss: the last assistant turn, every assistant turn, or all tokens.",
    )
    chat: bool = Field(
        True,
        description="Render through the model's chat template; false joins prompt and completion as plain text and ends with the end-of-text token.",
    )
    special_tokens: Literal["text", "allow"] = Field(
        "text",
        description="What special tokens spelt inside texts, such as <|im_end|> in an answer, become: text: ordinary text (counted and shown); allow: special tokens. A text that is rendered already (without a template, it begins or ends with one) keeps its own.",
    )
    max_tokens: int | None = Field(
        None,
        ge=2,
        description="Longest sample in tokens; None: the model's context length. A longer row is a bad row, or is truncated (on_long).",
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        "stop",
        description="stop: name the first ten bad rows and stop; skip: leave them out and count them in the manifest.",
    )
    on_long: Literal["bad_row", "truncate"] = Field(
        "bad_row", description="What a row longer than max_tokens is: a bad row, or cut at the end (counted and shown)."
    )
    rows: tuple[int, int] | None = Field(
        None,
        description="Half-open range of row numbers of the shuffled file: [0, 2000) trains and [2000, 2500) holds out. None: all.",
    )
    shuffle_seed: int | None = Field(
        None, description="Seed of the shuffle done before rows are taken. None: file order."
    )

    @model_validator(mode="after")
    def _ignores_no_text(self) -> RowSettings:
        if needed := {"role", "from", "content", "value"}.intersection(self.ignore):
            raise ValueError(f"ignore: every turn needs {' and '.join(sorted(needed))}")
        return self


class SourceConfig(RowSettings):
    """One of several sources. What it sets holds for its rows in place of what the `data` block sets."""

    source: str = Field(description="A path, a name on the Hub, or what else data.source may be.")
    weight: float = Field(
        1.0,
        gt=0,
        le=100,
        description="How often a row is trained on in an epoch, on average. 2: twice. 0.5: half of the rows, and the others in the next epoch.",
    )
    max_rows: int | None = Field(
        None, ge=1, description="Most rows that are taken: the first ones after shuffling by shuffle_seed. None: all."
    )

    @model_serializer(mode="wrap")
    def _only_what_is_set(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out defaults: a value that is written down would override the block's when it is read again."""
        return {name: value for name, value in dump(self).items() if name in self.model_fields_set}


class DataConfig(RowSettings):
    """Rows from files or the Hub, and how they become samples."""

    source: str | list[str | SourceConfig] = Field(
        description="Path of a .tsv .csv .json .jsonl .parquet file, of a text file (.txt, .md: documents) or a folder of them, a Hub data set's name, packaged:NAME (ships with posttrain), lab:KIND (made here for the laboratory's model: calculator; chains of thought careful, words, program; sums, others, others_held_out without; word problems with worked answers legs, legs_held_out, legs_reworded, legs_longer, wheels, prices), reasoning-gym:NAME (made by reasoning-gym; with ?size=2000&seed=1&OPTION=VALUE), or stage:NAME (what an earlier stage made). A list of these takes all rows of all; an entry may be settings: {source: ..., weight: 2, max_rows: 1000, system: ...}."
    )

    @property
    def name(self) -> str:
        """Return the sources, for messages and the manifest."""
        return ", ".join(entry.source for entry in self.sources())

    def sources(self) -> list[SourceConfig]:
        """Return the sources, as settings."""
        entries = [self.source] if isinstance(self.source, str) else self.source
        return [SourceConfig(source=entry) if isinstance(entry, str) else entry for entry in entries]

    def of_source(self, entry: SourceConfig) -> DataConfig:
        """Return the settings for the rows of one source. `rows` is the source's: the block's counts all rows."""
        own = {name: getattr(entry, name) for name in entry.model_fields_set & set(RowSettings.model_fields)}
        return self.model_copy(update={"rows": None, **own, "source": entry.source})


class SystemsConfig(Config):
    """Settings of computing a step. Nothing here changes what the step computes."""

    tokens_per_micro_batch: int | None = Field(
        None,
        ge=1,
        description="Token budget of one forward and backward pass; lower it when memory runs out. The result is the same for any value. None: 768 on a CPU, which more tokens make no faster (or 16 for each virtual token of a soft prompt, if that is more); on a GPU a power of two from 4096 to 65536, by the memory that is free once the model is loaded.",
    )
    activation_checkpointing: bool = Field(
        False,
        description="Keep only layer boundaries and recompute the rest in backward: less memory, about a third more time.",
    )
    share_prefixes: bool = Field(True, description="Compute a prefix that several samples of a micro-batch share once.")
    compile: bool = Field(False, description="torch.compile the model's layers (needs a C++ compiler on a CPU).")

    @model_validator(mode="after")
    def _one(self) -> SystemsConfig:
        if self.compile and self.activation_checkpointing:
            raise ValueError(
                "compile and activation_checkpointing together compile nothing: torch leaves recomputed layers that "
                "call uncompiled attention as they are. Switch one of them off"
            )
        return self


class StageBase(Config):
    """Settings of every stage. A value ``stage:NAME`` stands for what the stage of that name made."""

    makes: ClassVar[Literal["model", "data", "reward_model"]] = "model"
    """What the stage leaves in its folder: only a model is handed on to the next stage; others are named to be used."""

    method: str
    name: str = Field("stage", pattern=NAME, description="Name of the stage's folder in the run.")

    start: str | None = Field(
        None,
        description="Model to start from instead of what the stage before left: stage:NAME, or any model source. base: the recipe's own model.",
    )

    def check_evaluations(self, evaluations: Sequence[Any]) -> None:
        """Check what the stage needs of the recipe's evaluations; raises ValueError."""


class TrainConfig(StageBase):
    """Settings of every stage that trains a model."""

    one_process: ClassVar[tuple[str, ...]] = ("keep_zeros",)
    before_target: ClassVar[bool] = False
    """The first token that carries loss begins the answer, in every forward pass: virtual tokens may stand there."""
    adapter: AdapterConfig | None = Field(None, description="Train adapters on a frozen model. None: every weight.")
    train: list[str] | None = Field(
        None,
        min_length=1,
        description='Patterns of the parameters that are trained, by their names or their modules\' (* stands for any text): ["*.mlp.gate"] trains the routers of a mixture alone. None: every weight, or the adapter.',
    )
    merge: bool = Field(
        True,
        description="Merge adapters into the final model's weights (the adapter is saved as well). Soft prompts are never merged: the model is saved as an adapter.",
    )
    keep_zeros: bool = Field(
        False,
        description="Weights that are zero when the stage begins stay zero (matrices, not embeddings): a pruned model is trained and stays pruned. For stages that train every weight.",
    )
    qat: QuantizedTrainingConfig | None = Field(
        None,
        description="Quantisation-aware training: train with weights rounded as a later stage `quantize` rounds them, for example {bits: 4, group: 32}. What is saved is the weights in full. None: train in full.",
    )
    systems: SystemsConfig = SystemsConfig()
    checkpoint_every: int = Field(25, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(
        2, ge=2, description="Number of checkpoints to keep; at least two, in case one is damaged."
    )

    @property
    def whole_distributions(self) -> bool:
        """Return True if the loss needs distributions over the vocabulary, not the tokens' log-probabilities alone."""
        return False

    @model_validator(mode="after")
    def _merge_what_can_be(self) -> TrainConfig:
        if self.keep_zeros and self.adapter is not None:
            raise ValueError(
                "keep_zeros is for training every weight: an adapter adds to zeros too once it is merged. Leave one of "
                "them out"
            )
        if self.train is not None and self.adapter is not None:
            raise ValueError(
                "train selects weights of the model, and an adapter trains its own on frozen ones (adapter.target selects "
                "layers): leave one of them out"
            )
        if self.adapter is None or not self.adapter.is_soft_prompt:
            return self
        if self.adapter.virtual_tokens()[1] and not self.before_target:
            raise ValueError(
                f"adapter.template {self.adapter.template!r}: virtual tokens before the target are for sft. With this "
                "method put them in front: {v:6}{context}{target}"
            )
        if self.merge and "merge" in self.model_fields_set:
            raise ValueError(
                f"merge is true, and adapter.kind is {self.adapter.kind}: leave merge out. {NOT_MERGED[0].upper()}{NOT_MERGED[1:]}"
            )
        object.__setattr__(self, "merge", False)  # settings are frozen once they are checked
        return self


class EpochsConfig(TrainConfig):
    """Settings of every stage that trains on rows in epochs."""

    batch_size: int = Field(16, ge=1, description="Rows a step, over all ranks.")
    epochs: float = Field(1.0, gt=0, description="Passes over the data.")
    max_steps: int | None = Field(
        None,
        ge=1,
        description="Number of steps, in place of epochs: the data repeats, or part of it is used. None: the number that epochs need.",
    )
    optimizer: OptimizerConfig = OptimizerConfig()


class EarlyStoppingConfig(Config):
    """When a stage ends before its last step: once the held-out loss no longer falls."""

    patience: int = Field(
        3, ge=1, description="Measurements in a row without a lower held-out loss after which the stage ends."
    )
    min_delta: float = Field(0.0, ge=0, description="The loss must fall by more than this to count as lower.")


HeldOutRows = Annotated[
    Annotated[float, Tag("fraction")] | Annotated[DataConfig, Tag("settings")],
    Discriminator(lambda value: "fraction" if isinstance(value, float | int) else "settings"),
]
"""A fraction of a stage's own rows, or settings of other rows."""


class MeasuredConfig(EpochsConfig):
    """Settings of stages that measure rows held out while they train, and keep their best weights."""

    held_out: HeldOutRows | None = Field(
        None,
        description="Rows that are measured and never trained on: a fraction of the stage's own rows (0.05), or settings of other rows. None: nothing is measured.",
    )
    max_held_out: int = Field(500, ge=1, description="Most rows that a fraction holds out.")
    evaluate_every: int | None = Field(
        None,
        ge=0,
        description="Steps between measurements of the held-out rows, which are also measured before the first step and after the last. 0: only then. None: a tenth of all steps.",
    )
    keep_best: bool = Field(
        True, description="With held_out: the stage's model has the weights of the step with the lowest held-out loss."
    )
    early_stopping: EarlyStoppingConfig | None = Field(
        None, description="With held_out: stop once the held-out loss no longer falls. None: take all steps."
    )

    @model_validator(mode="before")
    @classmethod
    def _earlier_form(cls, values: Any) -> Any:
        """Read `held_out: {data: {...}, every: 50}`, as it was written before, as two settings; check a fraction."""
        held_out = values.get("held_out") if isinstance(values, dict) else None
        if held_out is None or isinstance(held_out, DataConfig):
            return values
        if not isinstance(held_out, dict):
            if isinstance(held_out, bool | str | list) or not 0 < held_out < 1:
                raise ValueError(
                    f"held_out is {held_out!r}: expected a fraction of the rows between 0 and 1, such as 0.05, or "
                    "settings of other rows, as in held_out: {source: other.jsonl}"
                )
            return values
        if "data" not in held_out or held_out.keys() - {"data", "every"}:
            return values
        every = {"evaluate_every": held_out["every"]} if "every" in held_out else {}
        return {**every, **values, "held_out": held_out["data"]}

    @model_validator(mode="after")
    def _measured(self) -> MeasuredConfig:
        if self.held_out is None and self.early_stopping is not None:
            raise ValueError("early_stopping needs a held-out loss: set held_out, for example to 0.05")
        return self


class SamplingConfig(Config):
    """Settings of drawing completions. Cut-offs apply in this order: temperature, top_k, top_p, min_p."""

    temperature: float = Field(1.0, ge=0, description="Divides the logits; 0 takes the likeliest token every time.")
    top_k: int = Field(0, ge=0, description="Keep the k likeliest tokens; 0: all.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Keep the likeliest tokens whose probabilities sum to at least this."
    )
    min_p: float = Field(
        0.0, ge=0, lt=1, description="Keep tokens at least this likely, relative to the likeliest one."
    )
    max_tokens: int = Field(256, ge=1, description="Longest completion in tokens.")
    min_tokens: int = Field(0, ge=0, description="End and stop tokens can't be drawn before this many tokens.")
    stop: list[str] = Field(default_factory=list, description="Strings that end a completion; not part of its text.")
    stop_tokens: list[int] = Field(
        default_factory=list, description="Token ids that end a completion, besides the model's own."
    )

    @model_validator(mode="after")
    def _lengths(self) -> SamplingConfig:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}")
        if any(not s for s in self.stop):
            raise ValueError("stop holds an empty string, which would end every completion at once")
        return self


class SamplerConfig(SamplingConfig):
    """Settings of a stage's sampler: how completions are drawn, and how many at a time."""

    max_running: int | None = Field(
        None, ge=1, description="Completions sampled at the same time. None: what suits the device (128 on a CPU)."
    )
    cache_mb: float | None = Field(
        None, gt=0, description="MiB that keys and values may take while sampling. None: a fifth of the memory."
    )

    kv_cache: Literal["int8"] | None = Field(
        None,
        description="int8: keep keys and values in 8 bits, with a scale for each token and head. None: in the model's dtype.",
    )

    def options(self) -> dict[str, Any]:
        """Return the arguments of a local sampler: how many completions run, in how much memory, cached in what."""
        return {"max_running": self.max_running, "memory_mb": self.cache_mb, "kv_cache": self.kv_cache}
