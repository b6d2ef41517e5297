"""Settings of the rewards: a list of parts, each with a name, a weight and its own options."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.config.judge import JudgeConfig
from posttrain.config.sandbox import SandboxConfig
from posttrain.config.settings import Config

Extract = Literal["auto", "tag", "boxed", "hashes", "last_line", "whole"]
_EXTRACT = (
    "Where the answer stands: tag <answer>…</answer>, boxed \\boxed{…}, hashes (after ####), last_line, whole (all of "
    "the text), auto (the first of tag, boxed, hashes that is there, else the last line). The last of its kind counts."
)


class Part(Config):
    """What every reward has."""

    judges: ClassVar[bool] = True  # 1 says right: held-out answers before and after may be compared by it

    name: str = Field("", pattern=r"^[A-Za-z0-9_.-]*$", description="Name in metrics and rollouts. Empty: the kind.")
    weight: float = Field(1.0, allow_inf_nan=False, description="Factor in the sum; 0: logged, not learnt from.")
    timeout: float = Field(
        5.0,
        gt=0,
        description="Seconds of processor time that a call may take in a worker process; four times that by the clock.",
    )

    @property
    def title(self) -> str:
        return self.name or str(getattr(self, "kind", ""))


class Labelled(Part):
    """Compares an answer with a label."""

    extract: Extract = Field("auto", description=_EXTRACT)
    label: str = Field("answer", description="Column of the example that holds the right answer, or a list of them.")


class MathConfig(Labelled):
    """1 where math-verify finds the answer mathematically equal to the label, else 0."""

    kind: Literal["math"] = "math"


class ExactConfig(Labelled):
    """1 where the answer is the label, else 0; spaces, quotes and a final full stop do not count."""

    kind: Literal["exact"] = "exact"
    ignore_case: bool = Field(True, description="Upper and lower case are the same.")


class NumericConfig(Labelled):
    """1 where the answer's number is the label's, else 0."""

    kind: Literal["numeric"] = "numeric"
    tolerance: float = Field(0.0, ge=0, description="Largest absolute difference that counts as right.")
    relative: float = Field(0.0, ge=0, description="Largest difference as a share of the label; added to tolerance.")
    partial: float = Field(0.0, description="For an answer that is a number, and not the right one (ReFT: 0.1).")


class ChoiceConfig(Labelled):
    """1 where the answer names the right option, by its letter or its text, else 0."""

    kind: Literal["choice"] = "choice"
    options: str = Field("choices", description="Column with the options' texts, where the examples have one.")
    letters: int = Field(26, ge=2, le=26, description="Number of options where the example lists none.")


class ReasoningGymRewardConfig(Part):
    """The item's own score, by reasoning-gym (examples from a reasoning-gym task)."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    extract: Extract = Field("auto", description=_EXTRACT)
    full_only: bool = Field(
        False,
        description="Count a score below 1 as 0: many tasks give part of the credit to any text that holds the answer.",
    )


class SelfConsistencyConfig(Part):
    """Agreement with the other completions of the same prompt; needs no label."""

    kind: Literal["self_consistency"] = "self_consistency"
    extract: Extract = Field("auto", description=_EXTRACT)
    compare: Literal["auto", "math"] = Field(
        "auto", description="auto: as numbers where both hold one, else as text; math: by math-verify."
    )
    mode: Literal["share", "majority"] = Field(
        "share", description="share: of the others with the same answer; majority: 1 for the most frequent answer."
    )


class PreferenceConfig(Part):
    """A scorer's number: a reward model, a judge, any function of prompts and completions."""

    kind: Literal["preference"] = "preference"
    scorer: str = Field(
        description="module:function, or the name of one given from Python: (prompts, completions) → numbers."
    )
    prompt: str = Field("prompt", description="Column of the example that holds the prompt.")
    batch_size: int = Field(64, ge=1, description="Pairs a call.")


class StepwisePart(Part):
    """Judges the steps of a completion, each credited to the tokens that led to it (docs/rewards.md)."""


class RuledSteps(StepwisePart):
    """Steps that are told apart by a separator."""

    separator: str = Field("\n", min_length=1, description="What stands between two steps.")


class ValidStepsConfig(RuledSteps):
    """1 for a step whose equations between numbers are true; steps without one are not judged."""

    kind: Literal["valid_steps"] = "valid_steps"
    wrong: float = Field(0.0, description="For a step with an equation that is false.")


class AgreementConfig(RuledSteps):
    """For a step that comes to a number: whether that is among the label's, or how many completions come to it too."""

    kind: Literal["agreement"] = "agreement"
    label: str | None = Field(
        None,
        description="Column with the right intermediate results: a list of numbers, or a worked solution. None: agreement with the other completions of the prompt.",
    )


class ProcessConfig(StepwisePart):
    """A process reward model's scores, or any function's."""

    kind: Literal["process"] = "process"
    scorer: str = Field(
        description="module:function, or the name of one given from Python: (prompt, completion) → [(first character, one past the last, score)]."
    )
    prompt: str = Field("prompt", description="Column of the example that holds the prompt.")


class JudgeRewardConfig(Part):
    """The judge's score of the completion, by expectation over its scale: reinforcement learning from AI feedback, directly."""

    kind: Literal["judge"] = "judge"
    judge: JudgeConfig = Field(description="The judge; its mode is score.")
    prompt: str = Field("prompt", description="Column of the example that holds the prompt.")
    batch_size: int = Field(64, ge=1, description="Completions handed to the judge together.")

    @model_validator(mode="after")
    def _scores(self) -> JudgeRewardConfig:
        if self.judge.mode != "score":
            raise ValueError("a judge as reward scores each completion: set judge.mode to score")
        return self


class FormatConfig(Part):
    """1 where the completion has the layout asked for, else 0."""

    kind: Literal["format"] = "format"
    tags: list[str] = Field(
        default_factory=list,
        description="<tag>…</tag> each once, in this order, none empty, nothing but spaces around them.",
    )
    opened: bool = Field(False, description="The prompt ends with the first opening tag; the completion lacks it.")
    pattern: str | None = Field(
        None, description="Regular expression that the whole text must match (a dot matches line ends too)."
    )

    @model_validator(mode="after")
    def _one(self) -> FormatConfig:
        if bool(self.tags) == (self.pattern is not None):
            raise ValueError("format takes either tags (a list of names) or pattern (a regular expression)")
        if self.pattern is not None:
            if self.opened:
                raise ValueError("opened goes with tags, not with pattern")
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"format.pattern is no regular expression: {error}") from error
        bad = [t for t in self.tags if not re.fullmatch(r"[A-Za-z][\w-]*", t)]
        if bad or len(set(self.tags)) != len(self.tags):
            raise ValueError(f"format.tags: expected different names such as think and answer, got {self.tags}")
        return self


class LengthConfig(Part):
    """0 where the length suits, falling linearly to -1."""

    kind: Literal["length"] = "length"
    judges: ClassVar[bool] = False  # 0 is its best
    unit: Literal["tokens", "characters"] = Field("tokens", description="What is counted; tokens include the end.")
    max: int | None = Field(None, ge=1, description="From here on (longer than this) the reward is -1.")
    min: int | None = Field(None, ge=1, description="Below this the reward is -1.")
    cache: int = Field(0, ge=0, description="Units before max (after min) over which the penalty grows. 0: a step.")
    target: int | None = Field(None, ge=0, description="The best length, instead of limits.")
    width: int = Field(0, ge=0, description="Distance from target at which the reward is -1.")

    @model_validator(mode="after")
    def _limits(self) -> LengthConfig:
        limits = self.max is not None or self.min is not None
        if limits == (self.target is not None):
            raise ValueError("length takes either target and width, or max and/or min (with cache)")
        if (self.target is not None) != (self.width > 0):
            raise ValueError("length: target and width go together (width: where the reward has fallen to -1)")
        if self.target is not None and self.cache:
            raise ValueError("length: cache goes with max and min; target has width")
        low = 0 if self.min is None else self.min + self.cache
        if self.max is not None and self.max - self.cache < low:
            raise ValueError(
                f"length: no length is free of penalty: it grows from max - cache = {self.max - self.cache} up "
                f"and from {low} down"
            )
        return self


class EndedConfig(Part):
    """0 where the completion came to an end of its own, -1 where a limit cut it off."""

    kind: Literal["ended"] = "ended"
    judges: ClassVar[bool] = False  # 0 is its best


class Running(Part):
    """Runs what the model wrote, in the sandbox; refuses where there is none (docs/sandbox.md)."""

    limits: SandboxConfig = Field(default_factory=SandboxConfig, description="What a program may use.")

    @model_validator(mode="after")
    def _time(self) -> Running:
        if self.limits.seconds > 4 * self.timeout:
            raise ValueError(
                f"limits.seconds is {self.limits.seconds:g}, and a call is cut off after 4 * timeout = "
                f"{4 * self.timeout:g} s by the clock: raise timeout, or lower limits.seconds"
            )
        return self


class ProgramConfig(Running):
    """1 where the completion's program prints the right answer, else 0."""

    kind: Literal["program"] = "program"
    label: str = Field("answer", description="Column of the example that holds the right answer, or a list of them.")
    tolerance: float = Field(1e-6, ge=0, description="Largest absolute difference that counts as right.")
    partial: float = Field(0.0, description="For a program that prints a number, and not the right one (ReFT: 0.1).")


class UnitTestsConfig(Running):
    """1 where the completion's program passes the example's tests, else 0."""

    kind: Literal["unit_tests"] = "unit_tests"
    tests: str = Field("test", description="Column with the tests: source, or a list of lines (assert …).")
    prefix: str | None = Field(
        None, description="Column with source that goes before the program (its signature, say)."
    )
    entry_point: str = Field("entry_point", description="Column with the name that check() is called with, if any.")


class FunctionConfig(Part):
    """Any function of yours: (text, example, **options) → number, or of a whole group."""

    kind: Literal["function"] = "function"
    function: str = Field(description="module:function, or the name of one given from Python.")
    options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of every call.")
    group: bool = Field(False, description="The function takes all texts of a group, and returns a number for each.")
    isolated: bool = Field(
        True, description="Run in a worker process, under the time limit; false: here, without a limit."
    )


class Model(Part):
    """What the rewards have that are models: they stay in this process and score many completions a call."""

    judges: ClassVar[bool] = False  # a number has no right or wrong

    prompt: str = Field("messages", description="Column with the prompt: a list of turns, or a user's text.")
    batch_size: int = Field(64, ge=1, description="Completions a call.")
    device: str = Field("auto", description="Where the model lies: auto, cpu, cuda, cuda:1, mps.")


class RewardModelPart(Model):
    """The number of a reward model, or of several together (docs/reward-models.md)."""

    kind: Literal["reward_model"] = "reward_model"
    source: str | list[str] = Field(
        description="stage:NAME, a folder, or a Hub name of a model for sequence classification; a list: an ensemble."
    )
    combine: Literal["mean", "min", "conservative"] = Field(
        "mean", description="How an ensemble's numbers become one; conservative: mean - spread * standard deviation."
    )
    spread: float = Field(1.0, ge=0, description="Standard deviations taken off (combine: conservative).")
    normalise: bool = Field(
        False, description="Subtract the mean and divide by the standard deviation of held-out rewards, kept with it."
    )

    @model_validator(mode="after")
    def _used(self) -> RewardModelPart:
        if self.spread != type(self).model_fields["spread"].default and self.combine != "conservative":
            raise ValueError(f"spread would do nothing: combine is {self.combine}, and only conservative takes it off")
        return self


class ProcessRewardPart(Model):
    """What a process reward model's scores of the steps come to (docs/reward-models.md)."""

    kind: Literal["process_reward"] = "process_reward"
    source: str = Field(description="stage:NAME, a folder, or a Hub name of a model for token classification.")
    combine: Literal["min", "product", "last", "mean", "steps"] = Field(
        "min",
        description="How the steps' scores become one; steps: they don't, each is credited to the tokens that led to it.",
    )
    separator: str | None = Field(None, description="Text that ends a step. None: the model's own, or a line's end.")


RewardConfig = Annotated[
    MathConfig
    | ExactConfig
    | NumericConfig
    | ChoiceConfig
    | ReasoningGymRewardConfig
    | SelfConsistencyConfig
    | PreferenceConfig
    | ValidStepsConfig
    | AgreementConfig
    | ProcessConfig
    | JudgeRewardConfig
    | RewardModelPart
    | ProcessRewardPart
    | ProgramConfig
    | UnitTestsConfig
    | FormatConfig
    | LengthConfig
    | EndedConfig
    | FunctionConfig,
    Field(discriminator="kind"),
]


def judges_steps(part: Any) -> bool:
    """Whether a reward returns steps in place of a number."""
    return isinstance(part, StepwisePart) or (isinstance(part, ProcessRewardPart) and part.combine == "steps")


class RewardsConfig(Config):
    """A stack of rewards: their weighted sum is what is learnt, and each is logged."""

    parts: list[RewardConfig] = Field(min_length=1, description="The rewards.")
    on_error: Literal["stop", "exclude"] = Field(
        "stop",
        description="A reward that raises or returns no number: stop after max_errors of them, or go on without end. "
        "While it goes on, the rollout is left out of its group, counted and shown.",
    )
    max_errors: int = Field(
        3,
        ge=1,
        description="Errors of one reward, over the run, before it stops (on_error: stop). With several processes: in one of them.",
    )
    on_timeout: Literal["stop", "exclude"] = Field(
        "exclude",
        description="The same for calls cut off by time or memory: what a model writes may bring these about without "
        "any fault in the reward.",
    )
    workers: int = Field(2, ge=1, description="Processes that run mathematics and your own functions.")

    @model_validator(mode="after")
    def _names(self) -> RewardsConfig:
        names = [p.title for p in self.parts]
        double = sorted({n for n in names if names.count(n) > 1})
        if double:
            raise ValueError(f"two rewards are named {double[0]!r}; give each a name of its own")
        return self
