"""The evaluations: their settings, what each reads, and what it asks a model. Importing this module loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.config.evaluation import EvaluationBase
from posttrain.config.names import EVALUATIONS
from posttrain.config.problems import ProblemsConfig
from posttrain.config.rewards import Extract, RewardConfig, read_reward
from posttrain.config.settings import DataConfig, ModelConfig, SamplerConfig
from posttrain.core.errors import RecipeError
from posttrain.core.imports import load_object
from posttrain.core.progress import Track
from posttrain.rewards.reward import RewardFunctions

if TYPE_CHECKING:
    from posttrain.models.language_model import LanguageModel

EvaluationItems = list[dict[str, Any]]
Chunk = tuple[int, Callable[[Track], EvaluationItems]]
"""A number of items, and the function that makes them: what is done again after a crash."""


@dataclass(frozen=True)
class EvaluationRun:
    """Inputs of an evaluation.

    Attributes:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        data: What `Evaluation.read` returned.
        seed: Seeds everything random.
        functions: Rewards given from Python, by name.
        until: Closes what the evaluation opened, such as worker processes, when it is done.
        log: File that gets what rewards print.
        settings: Those that the model was opened with. None: it was made in another way.
    """

    model: LanguageModel
    tokenizer: Any
    data: Any
    seed: int
    functions: RewardFunctions
    until: ExitStack
    log: Path | None = None
    settings: ModelConfig | None = None


class EvaluationTask:
    """Base of evaluations: a subclass has a nested class `Config`, and the methods `read` and `chunks`."""

    Config: ClassVar[type[EvaluationBase]] = EvaluationBase

    def __init__(self, config: Any) -> None:
        self.config = config

    def read(self, tokenizer: Any, context: int | None) -> Any:
        """Read the data. Its attribute `stats`, if it has one, goes to the manifest.

        Args:
            tokenizer: The model's tokenizer.
            context: The model's length in tokens; None: unknown.

        Raises:
            DataError: It can't be read.
        """
        raise NotImplementedError

    def chunks(self, run: EvaluationRun) -> Iterable[Chunk]:
        """Return the chunks of items, the same ones whenever an evaluation is started again."""
        raise NotImplementedError

    def summary(self, items: EvaluationItems, seed: int) -> dict[str, Any]:
        """Return what the summary has besides the metric."""
        return {}

    def examples(self, run: EvaluationRun, items: EvaluationItems) -> EvaluationItems:
        """Return the answers for the report: prompt, expected and output of each, and its pictures if it has any."""
        shown = [{"prompt": "", "expected": "", "output": "", **i} for i in items[: self.config.show]]
        return [{n: i[n] for n in ("prompt", "expected", "output", "images") if n in i} for i in shown]


def make_evaluation(config: EvaluationBase) -> EvaluationTask:
    """Return the evaluation of settings.

    Raises:
        RecipeError: It can't be imported, or is no evaluation.
    """
    made = load_object(EVALUATIONS.get(config.kind, config.kind))(config)
    if not isinstance(made, EvaluationTask):
        raise RecipeError(
            f"evaluation {config.kind!r} must be a subclass of posttrain.eval.evaluation_tasks.EvaluationTask"
        )
    return made


class RowsConfig(EvaluationBase):
    """Settings of evaluations that read rows with a prompt and the expected completion."""

    data: DataConfig


class RowsEvaluation(EvaluationTask):
    """Base of the evaluations that read rows."""

    def read(self, tokenizer: Any, context: int | None) -> Any:
        """Read and tokenize the rows."""
        from posttrain.data.mixing import refuse_weights
        from posttrain.data.sft_rows import prepare

        refuse_weights(self.config.data, f"evaluation {self.config.name}")
        return prepare(self.config.data, tokenizer, context=context)

    def examples(self, run: EvaluationRun, items: EvaluationItems) -> EvaluationItems:
        """Return greedy answers to the first items."""
        from posttrain.eval.likelihood_tasks import greedy_answers

        return greedy_answers(run, self.config)


class ChoiceTask(RowsEvaluation):
    """Accuracy of the likeliest choice."""

    class Config(RowsConfig):
        """Compare the likelihoods of the choices."""

        measures: ClassVar[Literal["choice"]] = "choice"
        kind: Literal["choice"] = "choice"
        choices: list[str] | None = Field(
            None, description="The choices, the same for every row. None: the row's own column 'choices'."
        )
        normalize: Literal["sum", "mean"] = Field(
            "sum", description="Compare choices by the sum or by the mean per token of log-likelihood."
        )
        max_new_tokens: int = Field(64, ge=1, description="Longest generated answer in the report.")

    config: Config

    def read(self, tokenizer: Any, context: int | None) -> Any:
        """Read and tokenize the rows, whose column `choices` has an effect if the settings give no choices."""
        data = super().read(tokenizer, context)
        if self.config.choices is None and "unused" in data.stats:
            data.stats["unused"].pop("choices", None)
        return data

    def chunks(self, run: EvaluationRun) -> Iterable[Chunk]:
        """Score every choice of every row."""
        from posttrain.eval.likelihood_tasks import choice_chunks

        return choice_chunks(run, self.config)


class GenerateTask(RowsEvaluation):
    """Accuracy of greedy answers that match the expected one."""

    class Config(RowsConfig):
        """Match the greedy answer against the expected one."""

        measures: ClassVar[Literal["generate"]] = "generate"
        kind: Literal["generate"] = "generate"
        match: Literal["exact", "contains", "first_word", "numeric"] = Field(
            "exact", description="How an answer is matched; case and surrounding space do not count."
        )
        max_new_tokens: int = Field(64, ge=1, description="Longest generated answer.")

    config: Config

    def chunks(self, run: EvaluationRun) -> Iterable[Chunk]:
        """Answer every row."""
        from posttrain.eval.likelihood_tasks import generate_chunks

        return generate_chunks(run, self.config)


class PerplexityTask(RowsEvaluation):
    """The exponential of the mean negative log-likelihood of the loss tokens."""

    class Config(RowsConfig):
        """Perplexity of the loss tokens."""

        measures: ClassVar[Literal["perplexity"]] = "perplexity"
        kind: Literal["perplexity"] = "perplexity"

    config: Config

    def chunks(self, run: EvaluationRun) -> Iterable[Chunk]:
        """Score every row."""
        from posttrain.eval.likelihood_tasks import perplexity_chunks

        return perplexity_chunks(run)

    def examples(self, run: EvaluationRun, items: EvaluationItems) -> EvaluationItems:
        """Return none: nothing is generated."""
        return []


class ProblemsEvaluationConfig(EvaluationBase):
    """Settings of evaluations that sample answers to problems."""

    problems: ProblemsConfig
    sampler: SamplerConfig = SamplerConfig()

    @property
    def source(self) -> Any:
        """Return the settings of the problems."""
        return self.problems


class ProblemsEvaluation(EvaluationTask):
    """Base of the evaluations that sample answers.

    Attributes:
        images: Problems may have pictures.
    """

    images: ClassVar[bool] = False

    def read(self, tokenizer: Any, context: int | None) -> Any:
        """Read and render the problems."""
        from posttrain.data.prompts import load_prompts

        return load_prompts(self.config.problems, tokenizer, context=context, images=self.images)


class SampledAnswersConfig(ProblemsEvaluationConfig):
    """Settings of evaluations that sample many completions of a problem, judge them, and let them vote or be ranked."""

    measures: ClassVar[Literal["sample"]] = "sample"
    n: int = Field(16, ge=1, le=512, description="Completions of each problem, besides the likeliest one.")
    k: list[int] = Field(
        default_factory=list,
        description="Numbers of completions at which the curves have points. Empty: 1, 2, 4 … n.",
    )
    judge: RewardConfig = Field(
        default_factory=lambda: read_reward({"kind": "numeric"}),
        description="Decides what is right; its weight is not used.",
    )
    right_at: float = Field(1.0, description="The judge's number from which a completion is right.")
    vote: Extract | Literal["program"] | None = Field(
        "auto",
        description="Where the answer is that votes count (program: the output of the completion's program, in "
        "the sandbox); equal numbers, or else equal texts, are one answer. None: no votes.",
    )
    rank_by: list[RewardConfig] = Field(
        default_factory=list,
        description="Scores that select completions: each gives a best-of-k and (with votes) a weighted vote. "
        "Their weights are not used.",
    )
    weights: Literal["score", "sigmoid"] = Field(
        "score",
        description="What a weighted vote adds up: scores, or their sigmoid (for scores that may be negative).",
    )

    @model_validator(mode="after")
    def _judged_one_by_one(self) -> SampledAnswersConfig:
        bad = [k for k in self.k if not 1 <= k <= self.n]
        if bad:
            raise ValueError(f"k holds {bad[0]}, and there are {self.n} completions (n): expected 1 to {self.n}")
        if self.sampler.temperature == 0 and self.n > 1:
            raise ValueError("sampler.temperature is 0: all n completions would be the same. Raise it, or set n to 1")
        names = [r.title for r in self.rank_by]
        if len(set(names)) != len(names) or "judge" in names:
            raise ValueError(f"rank_by needs different names, none of them judge, and has {names}: set `name` of each")
        comparing = [r.title for r in (self.judge, *self.rank_by) if r.compares_completions]
        if comparing:
            raise ValueError(f"{comparing[0]} compares all n completions, not subsets of k: `vote` measures agreement")
        return self

    @property
    def sizes(self) -> list[int]:
        """Return the k of the curves in ascending order, with 1 and n."""
        powers = [2**i for i in range(self.n.bit_length())]
        return sorted({1, *(self.k or powers), self.n})


class SampleTask(ProblemsEvaluation):
    """Accuracy of many completions of each problem, by pass@k, votes and choices, against the tokens they take."""

    images = True

    class Config(SampledAnswersConfig):
        """An evaluation of many completions of a problem: accuracy by pass@k, votes and choices, against tokens."""

        kind: Literal["sample"] = "sample"
        headline: Literal["mean", "greedy", "vote", "best"] = Field(
            "mean",
            description="What tables compare: mean accuracy of a sample, the likeliest answer, the vote of all n, or "
            "the best of n by the first of rank_by.",
        )

        @model_validator(mode="after")
        def _has_the_headline(self) -> SampleTask.Config:
            if self.headline == "vote" and self.vote is None:
                raise ValueError("headline is vote, and there is none: set vote to where the answer is (vote: auto)")
            if self.headline == "best" and not self.rank_by:
                raise ValueError("headline is best, but no score ranks: give rank_by a list of rewards")
            return self

    config: Config

    def chunks(self, run: EvaluationRun) -> Iterable[Chunk]:
        """Draw completions of each problem, judge them, and compute votes and choices."""
        from posttrain.eval.sampled_tasks import sample_chunks

        return sample_chunks(run, self.config)

    def summary(self, items: EvaluationItems, seed: int) -> dict[str, Any]:
        """Return the curves, tokens, greedy accuracy and failures."""
        from posttrain.eval.sampled_tasks import summary_of

        return summary_of(self.config, items, seed)


class ScoreTask(ProblemsEvaluation):
    """Mean score of sampled answers, and how often the trained model's answer scores above the first model's."""

    images = True

    class Config(ProblemsEvaluationConfig):
        """An evaluation by a scorer, a judge or a reward model: mean score of sampled answers, and wins."""

        measures: ClassVar[Literal["score"]] = "score"
        kind: Literal["score"] = "score"
        scorer: RewardConfig = Field(description="Scores every answer; its weight is not used.")
        n: int = Field(1, ge=1, le=64, description="Answers sampled to each prompt.")

        @model_validator(mode="after")
        def _fits(self) -> ScoreTask.Config:
            if self.sampler.temperature == 0 and self.n > 1:
                raise ValueError("sampler.temperature is 0: all n answers would be the same. Raise it, or set n to 1")
            if self.scorer.compares_completions:
                raise ValueError(f"{self.scorer.title} compares the answers of a prompt: a score is of one answer")
            return self

    config: Config

    def chunks(self, run: EvaluationRun) -> Iterable[Chunk]:
        """Sample and score answers, prompt by prompt."""
        from posttrain.eval.scored_tasks import score_chunks

        return score_chunks(run, self.config)

    def summary(self, items: EvaluationItems, seed: int) -> dict[str, Any]:
        """Return counts, failures and lengths of the answers."""
        from posttrain.eval.scored_tasks import answer_statistics

        return answer_statistics(items)
