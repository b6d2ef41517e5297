"""Settings of merging models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from posttrain.config.base import Config
from posttrain.config.names import MERGE_ALGORITHMS
from posttrain.config.open_functions import open_function
from posttrain.config.pooling import check_pool
from posttrain.config.settings import NAME, DataConfig, StageBase
from posttrain.methods.merge.search_settings import SearchConfig, number_place, replace_numbers

BASE_SOURCE = "base"
"""The model that the stage starts from, where a source is named."""
UNION = "union"
"""The tokens of all models, where a tokenizer is named."""

Values = float | list[float] | dict[str, float | list[float]]
"""A number for every tensor; or numbers from the first layer to the last, between which each layer interpolates; or one of
both by pattern of the tensor's (or its module's) name, the first that fits."""


def numbers_of(values: Values) -> list[float]:
    """Return all numbers of a setting that may differ by tensor."""
    if isinstance(values, Mapping):
        return [number for inner in values.values() for number in numbers_of(inner)]
    return list(values) if isinstance(values, list) else [values]


def within(low: float | None = None, high: float | None = None) -> AfterValidator:
    """Return the check that all numbers of `Values` lie between two bounds, and that no list is empty."""

    def check(values: Values) -> Values:
        lists = values.values() if isinstance(values, Mapping) else [values]
        if not all(numbers_of(inner) for inner in lists) or not lists:
            raise ValueError("expected a number, a list of numbers, or these by pattern of names; this is empty")
        for number in numbers_of(values):
            if (low is not None and number < low) or (high is not None and number > high):
                bounds = " and ".join(f"at {w} {b:g}" for w, b in (("least", low), ("most", high)) if b is not None)
                raise ValueError(f"expected numbers {bounds}, got {number:g}")
        return values

    return AfterValidator(check)


AlgorithmConfig = Annotated[Any, open_function(MERGE_ALGORITHMS, "merge algorithm")]


class MergeSource(Config):
    """One of the models that are merged."""

    own_sources: ClassVar[tuple[str, ...]] = (BASE_SOURCE,)

    source: str = Field(
        description="Any model source, an adapter too (merged into its base), stage:NAME, or base (the model that the stage starts from)."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")
    weight: Annotated[Values, within()] = Field(
        1.0,
        description="Weight of this model; a list goes from the first layer to the last; {pattern: number or list} by name.",
    )
    density: Annotated[Values, within(0, 1)] | None = Field(
        None, description="Share of this model's changes that stay, in place of the algorithm's density."
    )
    prompts: list[str] | DataConfig | None = Field(
        None,
        description="With experts and router prompts: texts, or rows (settings of data), that are this model's to continue.",
    )


class SliceConfig(Config):
    """Layers of one model, in a model that is stacked from several."""

    own_sources: ClassVar[tuple[str, ...]] = (BASE_SOURCE,)

    source: str = Field(description="As in models.")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")
    layers: tuple[int, int] = Field(description="Half-open range of its layers: [0, 16] takes the first sixteen.")
    scale: Annotated[Values, within()] = Field(
        1.0,
        description='Factor of the tensors of these layers; {"*.o_proj": 0, "*.down_proj": 0} makes repeated layers pass their input on.',
    )

    @model_validator(mode="after")
    def _range(self) -> SliceConfig:
        if not 0 <= self.layers[0] < self.layers[1]:
            raise ValueError(f"layers is {list(self.layers)}: expected [first, end] with 0 <= first < end")
        return self


class AdapterResultConfig(Config):
    """The result as a LoRA adapter on the base, in place of whole weights."""

    rank: int | None = Field(
        None,
        ge=1,
        description="Rank of the matrices: the nearest of this rank to the merged change (SVD). None: the ranks of the adapters that are merged together, which is exact; for linear and task_arithmetic of LoRA adapters on the base.",
    )
    others: Literal["save", "drop"] = Field(
        "save",
        description="Changed tensors that are no matrices of linear layers (norms, embeddings). save: whole, beside the adapter. drop: as the base has them (counted).",
    )


class EnsembleConfig(Config):
    """An ensemble: the models' distributions of the next token are pooled, and no weight is changed."""

    pool: Literal["arithmetic", "geometric"] = Field(
        "arithmetic",
        description="arithmetic: the weighted mean of the probabilities. geometric: the product of their powers by the weights, normalised.",
    )
    confidence: Literal["entropy", "max_probability"] | None = Field(
        None,
        description="Multiplies the weights at every token. entropy: by exp(-entropy) of the model's distribution. max_probability: by its largest probability. None: the weights alone.",
    )


class ExpertsConfig(Config):
    """A mixture: the models' feed-forward parts become experts of each layer, and the rest is averaged."""

    router: Literal["prompts", "random", "zeros"] = Field(
        "prompts",
        description="Weights of the routers to begin with. prompts: of each model's `prompts`. random. zeros: all experts alike.",
    )
    top_k: int = Field(2, ge=1, description="Experts that compute each token; their weights sum to 1.")
    balance: float = Field(
        0.01,
        ge=0,
        description="Coefficient of the load-balancing loss that later training stages add. 0: none.",
    )


class MergeConfig(StageBase):
    """Merging: the weights of several models become one model, without training."""

    one_process = ("method",)
    method: Literal["merge"] = "merge"
    name: str = Field("merge", pattern=NAME, description="Name of the stage's folder in the run.")
    start: str | None = Field(
        "base",
        description="The base: task vectors are differences from it, and the result takes its configuration. base: the recipe's own model; stage:NAME or any model source; null: what the stage before left.",
    )
    algorithm: AlgorithmConfig | None = Field(
        None,
        description="linear, slerp, multi_slerp, karcher, model_stock, task_arithmetic, ties, dare_linear, dare_ties, della, della_linear, breadcrumbs, breadcrumbs_ties, or package.module:function; with settings as {name: ties, density: 0.5}.",
    )
    models: list[MergeSource] = Field(default_factory=list, description="The models that are merged.")
    slices: list[SliceConfig] = Field(
        default_factory=list,
        description="In place of models: layers of several models that are stacked (passthrough). Embeddings, last norm and head are the base's.",
    )
    ensemble: EnsembleConfig | None = Field(
        None,
        description="In place of algorithm: pool the models' output distributions: {pool: arithmetic}. Each keeps its weights.",
    )
    experts: ExpertsConfig | None = Field(
        None,
        description="In place of algorithm: make a mixture with each model as an expert: {router: prompts, top_k: 2}.",
    )
    search: SearchConfig | None = Field(
        None, description="Search numbers of this stage by the recipe's evaluations. None: the numbers are as they are."
    )
    tokenizer: str | None = Field(
        None,
        description="Tokenizer of the result: base, a source as it is written in models (source@revision if there are several of it), or union (the base's with the tokens that only others have). None: the base's, and an error if the vocabularies differ.",
    )
    missing_rows: Literal["owner", "subtokens"] = Field(
        "owner",
        description="If vocabularies differ, what the embedding and the head of a model get for a token that it lacks. owner: the row of the models that have it. subtokens: the mean of the rows that it has for the tokens that the text is made of.",
    )
    chat_template: str | None = Field(
        None,
        description="Chat template of the result: base, a source as in tokenizer, or a template (text or path of a file). None: the base's, and an error if they differ.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype of the result's weights; auto: of each as the base has it. Computed in float32."
    )
    adapter: AdapterResultConfig | None = Field(
        None, description="Save the result as a LoRA adapter on the base: {rank: 16}. None: as a whole model."
    )
    max_shard_gb: float = Field(5.0, gt=0, description="Largest file of weights, in 10^9 bytes.")

    @model_validator(mode="before")
    @classmethod
    def _names_alone(cls, values: Any) -> Any:
        """Read a source alone as a model with weight 1."""
        if isinstance(values, dict) and isinstance(values.get("models"), list):
            models = [{"source": m} if isinstance(m, str) else m for m in values["models"]]
            return {**values, "models": models}
        return values

    @model_validator(mode="after")
    def _fits(self) -> MergeConfig:
        if bool(self.models) == bool(self.slices):
            raise ValueError("set either models (which an algorithm merges) or slices (layers that are stacked)")
        ways = [name for name in ("algorithm", "ensemble", "experts") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise ValueError(f"set one of {' and '.join(ways)}: each makes a model in another way")
        if bool(self.models) != bool(ways):
            raise ValueError(
                "models need an algorithm, for example linear or ties (or ensemble, or experts)"
                if self.models
                else f"slices take no {ways[0]}"
            )
        if self.ensemble is not None:
            self._check_ensemble(self.ensemble)
        self._check_experts(self.experts)
        if self.adapter is not None and self.slices:
            raise ValueError("an adapter has the layers of its base, and slices stack others: leave adapter out")
        if self.algorithm is not None:
            self._check_models(self.algorithm.name, set(type(self.algorithm).model_fields))
        if self.search is not None:
            self._check_search(self.search)
        return self

    def _check_experts(self, experts: ExpertsConfig | None) -> None:
        from_prompts = experts is not None and experts.router == "prompts"
        for number, model in enumerate(self.models):
            if (model.prompts is not None) != from_prompts:
                raise ValueError(
                    f"models.{number}: router prompts needs prompts of every model, texts or settings of rows"
                    if from_prompts
                    else f"models.{number}: prompts are for experts with router: prompts: leave them out"
                )
            if experts is not None and model.density is not None:
                raise ValueError(f"models.{number}: experts have no density: leave it out")
        if experts is None:
            return
        if not experts.top_k <= len(self.models) or len(self.models) < 2:
            raise ValueError(
                f"experts.top_k is {experts.top_k}, and there are {len(self.models)} models: expected at least two models, "
                "and as many as top_k"
            )
        if self.adapter is not None:
            raise ValueError("a mixture of experts is no change of the base's weights: leave adapter out")

    def searchable(self) -> dict[str, Any]:
        """Return the settings whose numbers a search may change, as plain data."""
        dumped = self.model_dump(mode="json", include={"models": True, "algorithm": True, "slices": True})
        for piece in dumped["slices"]:
            del piece["layers"]
        for model in dumped["models"]:
            del model["prompts"]  # routers are made once, and from rows
        return dumped

    def with_numbers(self, numbers: Mapping[str, float]) -> MergeConfig:
        """Return these settings without the search, with other numbers at places such as algorithm.density.

        Raises:
            ValueError: Such settings are not allowed.
        """
        plain = self.model_dump(mode="json", exclude={"search"})
        places = {number_place(self.searchable(), name): number for name, number in numbers.items()}
        return type(self).model_validate(replace_numbers(plain, places))

    def _check_search(self, search: SearchConfig) -> None:
        for name, choice in search.coefficients.items():
            for number in choice if isinstance(choice, list) else (choice.low, choice.high):
                try:
                    self.with_numbers({name: number})
                except ValidationError as error:
                    reason = error.errors()[0]["msg"].removeprefix("Value error, ")
                    raise ValueError(f"search.coefficients.{name}: {number:g} can't be set: {reason}") from error

    def check_evaluations(self, evaluations: Sequence[Any]) -> None:
        """Check that there are evaluations that a search can be scored by; raises ValueError."""
        if self.search is not None:
            self.search_evaluations(evaluations)

    def search_evaluations(self, evaluations: Sequence[Any]) -> list[Any]:
        """Return the evaluations that the search is scored by.

        Raises:
            ValueError: There is none, or one that is named has no items for validation.
        """
        assert self.search is not None
        named = self.search.evaluations
        tasks = [task for task in evaluations if task.name in named or (not named and task.validation)]
        if unknown := sorted(named.keys() - {task.name for task in tasks}):
            raise ValueError(f"stage {self.name!r}: search.evaluations names {unknown[0]!r}, which is no evaluation")
        without = [task.name for task in tasks if not task.validation]
        if not tasks or without:
            raise ValueError(
                f"stage {self.name!r}: a search needs items that it is scored by and that are not reported: set validation "
                f"of {f'evaluation {without[0]!r}' if without else 'an evaluation'} to a share of its items, such as 0.5"
            )
        if waiting := [t.name for t in tasks if "stage:" in t.model_dump_json()]:
            raise ValueError(
                f"stage {self.name!r}: evaluation {waiting[0]!r} uses what a stage makes, so no search can be scored by it"
            )
        return tasks

    def _check_ensemble(self, ensemble: EnsembleConfig) -> None:
        of_weights = ("tokenizer", "missing_rows", "dtype", "adapter", "max_shard_gb")
        if given := [name for name in of_weights if getattr(self, name) != type(self).model_fields[name].default]:
            raise ValueError(f"an ensemble writes no weights and shares one vocabulary: leave {given[0]} out")
        for number, model in enumerate(self.models):
            if model.density is not None or not isinstance(model.weight, float):
                raise ValueError(
                    f"models.{number}: an ensemble has one weight for each model, and no density: expected a number"
                )
        check_pool([numbers_of(m.weight)[0] for m in self.models], ensemble.pool, ensemble.confidence)

    def _check_models(self, algorithm: str, settings: set[str]) -> None:
        if any(m.density is not None for m in self.models) and "density" not in settings:
            raise ValueError(f"a model has a density, and {algorithm} has none: leave it out")
        needed, exact = {"slerp": (2, True), "model_stock": (2, False)}.get(algorithm, (1, False))
        if len(self.models) < needed or (exact and len(self.models) != needed):
            raise ValueError(
                f"{algorithm} takes {'' if exact else 'at least '}{needed} models, and there are {len(self.models)}"
            )
        if algorithm in ("slerp", "model_stock") and any(numbers_of(m.weight) != [1.0] for m in self.models):
            place = "t says where between the two" if algorithm == "slerp" else "it finds its own"
            raise ValueError(f"{algorithm} takes no weights: {place}")

    def named_sources(self) -> list[tuple[str, str | None]]:
        """Return (source, revision) of every model that is opened beside the base, each once."""
        return list(dict.fromkeys((e.source, e.revision) for e in self.entries if e.source != BASE_SOURCE))

    @property
    def entries(self) -> list[MergeSource | SliceConfig]:
        """Return the models or slices."""
        return [*self.models, *self.slices]
