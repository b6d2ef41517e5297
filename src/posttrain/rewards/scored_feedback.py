"""Sources of feedback that put a reward's outcome into words: a verifier, unit tests, a reward model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.config.feedback_sources import FeedbackSourceConfig
from posttrain.config.rewards import RewardConfig, RewardTermConfig, read_reward
from posttrain.config.sandbox import SandboxConfig
from posttrain.core.errors import RewardError
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.rewards.outcome import RewardOutcome
from posttrain.rewards.stack import RewardStack, tokens_read
from posttrain.sampling.feedback_source import FeedbackFunctions, FeedbackNote, FeedbackSource

NOT_CHECKED = "The answer could not be checked: {why}."
CUT_OFF = {"timeout": "checking it took too long", "died": "checking it took too much memory"}


class RewardFeedback(FeedbackSource):
    """Base of the sources that call a reward; a subclass names its settings and puts its outcome into words."""

    @abstractmethod
    def reward_config(self) -> RewardTermConfig:
        """Return the settings of the reward."""

    @abstractmethod
    def words(self, value: float, reason: str) -> FeedbackNote:
        """Return the feedback for a number of the reward. reason: what the reward says about it, if anything."""

    def open(self, functions: FeedbackFunctions) -> None:
        """Keep the functions; the reward is made when it is first used, since it may load a model."""
        self.functions = functions
        self.stack: RewardStack | None = None

    def close(self) -> None:
        """End the reward's processes."""
        if self.stack is not None:
            self.stack.close()

    def __call__(self, answer: str, example: Mapping[str, Any]) -> FeedbackNote:
        """Return the feedback on one answer."""
        return self.many([answer], [example])[0]

    def many(self, answers: Sequence[str], examples: Sequence[Mapping[str, Any]]) -> list[FeedbackNote]:
        """Return the feedback on several answers.

        Raises:
            RewardError: The reward raised an error, which has another reason than the answer.
        """
        if self.stack is None:
            self.stack = RewardStack([self.reward_config()], self.functions)
        groups = [
            RolloutGroup((), example, [Rollout((), (), "end", answer)])
            for answer, example in zip(answers, examples, strict=True)
        ]
        (outcomes,) = self.stack.outcomes(groups).values()
        notes = [self._note(of_group[0], group) for of_group, group in zip(outcomes, groups, strict=True)]
        for of_groups in tokens_read(self.stack, groups).values():
            notes = [replace(note, tokens=tokens) for note, (tokens,) in zip(notes, of_groups, strict=True)]
        return notes

    def _note(self, outcome: RewardOutcome, group: RolloutGroup) -> FeedbackNote:
        if outcome.failure == "error":
            where = group.example.get("source", "an example")
            raise RewardError(f"its reward failed for {where}: {outcome.message}\n{outcome.trace}".rstrip())
        cut_off = outcome.cut_off or outcome.failure
        if cut_off is not None:
            return FeedbackNote(NOT_CHECKED.format(why=CUT_OFF[cut_off]), False if outcome.cut_off else None)
        assert outcome.value is not None  # none is for rewards that compare completions, which are refused
        return self.words(outcome.value, outcome.message)


class VerifierFeedback(RewardFeedback):
    """Say whether a reward takes the answer for right. With the row's right answer as the truth it is an oracle."""

    class Config(FeedbackSourceConfig):
        """Any reward in words: right or wrong. A reward that knows the right answer is an oracle: tell so."""

        kind: Literal["verifier"] = "verifier"
        reward: RewardConfig = Field(description="The reward, as in a list of rewards.")
        right_at: float = Field(1.0, description="Number of the reward from which the answer is right.")
        right: str = Field("The answer is right.", description="Feedback on a right answer.")
        wrong: str = Field("The answer is wrong.", min_length=1, description="Feedback on a wrong answer.")
        reasons: bool = Field(
            False, description="Add the reason that the reward gives, if it gives one; it may tell the right answer."
        )

        @model_validator(mode="after")
        def _judges_one(self) -> VerifierFeedback.Config:
            if self.reward.compares_completions or self.reward.form in ("group", "rollouts"):
                whole = self.reward.form == "rollouts"
                looks = "scores whole completions" if whole else "compares the completions of a prompt"
                raise ValueError(f"reward {self.reward.title} {looks}, and feedback is on one answer")
            return self

    config: Config

    def reward_config(self) -> RewardTermConfig:
        """Return the reward of the settings."""
        return self.config.reward

    def words(self, value: float, reason: str) -> FeedbackNote:
        """Return right or wrong, in words."""
        right = value >= self.config.right_at
        text = self.config.right if right else self.config.wrong
        return FeedbackNote(f"{text} {_sentence(reason)}".strip() if self.config.reasons else text, right)


class UnitTestsFeedback(RewardFeedback):
    """Run the row's unit tests on the answer's program, and say which one failed, with its assertion."""

    class Config(FeedbackSourceConfig):
        """Runs the row's unit tests in the sandbox; says which failed, with the assertion or the error."""

        reward_kind: ClassVar[str] = "unit_tests"
        kind: Literal["tests"] = "tests"
        tests: str = Field("test", description="Column with the tests, as of the reward unit_tests.")
        prefix: str | None = Field(None, description="Column with source that goes before the program.")
        entry_point: str = Field("entry_point", description="Column with the name that check() is called with, if any.")
        limits: SandboxConfig = Field(default_factory=SandboxConfig, description="What a program may use.")
        timeout: float = Field(5.0, gt=0, description="Seconds of processor time; four times that by the clock.")

        @model_validator(mode="after")
        def _fits(self) -> UnitTestsFeedback.Config:
            self.reward()
            return self

        def reward(self) -> RewardTermConfig:
            """Return the settings of the reward."""
            names = ("tests", "prefix", "entry_point", "limits", "timeout")
            return read_reward({"kind": self.reward_kind, **{n: getattr(self, n) for n in names}})

    config: Config

    def reward_config(self) -> RewardTermConfig:
        """Return unit_tests with these settings."""
        return self.config.reward()

    def words(self, value: float, reason: str) -> FeedbackNote:
        """Return which test failed."""
        if value >= 1:
            return FeedbackNote("The program passes all tests.", True)
        return FeedbackNote(f"The program fails the tests. {_sentence(reason)}".strip(), False)


class RewardModelFeedback(RewardFeedback):
    """Say which score a reward model gives the answer."""

    class Config(FeedbackSourceConfig):
        """The score of a reward model, in words."""

        kind: Literal["reward_model"] = "reward_model"
        source: str | list[str] = Field(description="The reward model, or several, as of the reward reward_model.")
        prompt: str = Field("messages", description="Column with the prompt: a list of turns, or the text of a user.")
        device: str = Field("auto", description="Where the model is: auto, cpu, cuda, cuda:1, mps.")
        text: str = Field(
            "A reward model gives the answer a score of {score}.",
            description="Feedback, with the field {score}.",
        )
        good_at: float | None = Field(
            None, description="Score from which nothing is wrong with the answer; it is told too. None: not known."
        )

        @model_validator(mode="after")
        def _shows_the_score(self) -> RewardModelFeedback.Config:
            if "{score}" not in self.text:
                raise ValueError(f"feedback.text needs {{score}} where the score goes, and is {self.text!r}")
            return self

    config: Config

    def reward_config(self) -> RewardTermConfig:
        """Return reward_model with these settings."""
        c = self.config
        return read_reward({"kind": "reward_model", "source": c.source, "prompt": c.prompt, "device": c.device})

    def words(self, value: float, reason: str) -> FeedbackNote:
        """Return the score, and the one that it should reach."""
        text = self.config.text.replace("{score}", f"{value:.2f}")
        if self.config.good_at is None:
            return FeedbackNote(text)
        return FeedbackNote(f"{text} Good answers get {self.config.good_at:g} or more.", value >= self.config.good_at)


def _sentence(text: str) -> str:
    text = text.strip()
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '!', '?')) else '.'}" if text else ""
