"""Settings of rewards: what every reward has, and the list of rewards of a stage.

The settings class of a reward is the nested class `Config` of the reward itself; a recipe names the reward by `kind`,
one of `REWARDS` or the import path of a class or function from outside the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.config.names import REWARDS
from posttrain.config.open_kinds import OpenKind
from posttrain.config.settings import Config

Extract = Literal["auto", "tag", "boxed", "hashes", "last_line", "whole"]
Form = Literal["completion", "group", "batch", "rollouts"]
EXTRACT = (
    "Where the answer is: tag <answer>…</answer>, boxed \\boxed{…}, hashes (after ####), last_line, whole (the entire "
    "text), auto (the first of tag, boxed, hashes that is found, else the last line). The last of its kind counts."
)


class RewardTermConfig(Config):
    """Settings that every reward has.

    Attributes:
        is_correctness: True if 1 means a right answer, so that held-out answers before and after can be compared by it.
        needs_several: True if a completion without others of its prompt gets no score.
        needs_environment: Kind of the environment whose completions it scores. Empty: any, or none.
        cut_off_is_wrong: True if only the answer can make a call too long or too large: it then gets 0, and is counted.
    """

    is_correctness: ClassVar[bool] = True
    needs_several: ClassVar[bool] = False
    needs_environment: ClassVar[str] = ""
    cut_off_is_wrong: ClassVar[bool] = False

    kind: str = Field(description="Name of the reward, or package.module:name of your own class or function.")
    name: str = Field(
        "",
        pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.-]{0,99})?$",
        description="Name in metrics and rollouts. Empty: the kind.",
    )
    weight: float = Field(1.0, ge=-1e9, le=1e9, description="Factor in the sum; 0: logged, but not trained on.")
    timeout: float = Field(
        5.0,
        gt=0,
        description="Seconds of processor time that a call may take in a worker process; four times that by the clock.",
    )

    @property
    def title(self) -> str:
        """Return the name in metrics and rollouts."""
        return self.name or self.kind.rpartition(":")[2]

    @property
    def form(self) -> Form:
        """Return what one call scores: one completion, all completions of a prompt, or pairs of prompt and completion.

        Or `rollouts`: the records of many completions, with their tokens, and their examples.

        A subclass sets it, and those below, as a class variable or as a property that depends on the settings.
        """
        return "completion"

    @property
    def compares_completions(self) -> bool:
        """Return True if a completion's score depends on the others of its prompt."""
        return False

    @property
    def in_worker(self) -> bool:
        """Return True if a call may hang or crash, and therefore runs in a worker process."""
        return False

    @property
    def scores_steps(self) -> bool:
        """Return True if the reward returns scores of steps instead of a number."""
        return False


class CustomRewardConfig(RewardTermConfig):
    """Settings that every reward from outside the package has, besides its own."""

    group: bool = Field(False, description="It takes all completions of a prompt, and returns a number for each.")
    isolated: bool = Field(
        True, description="Run it in a worker process, under the time limit; false: in this process, without a limit."
    )

    @property
    def form(self) -> Form:
        """Return what one call scores."""
        return "group" if self.group else "completion"

    @property
    def compares_completions(self) -> bool:
        """Return True if it takes all completions of a prompt."""
        return self.group

    @property
    def in_worker(self) -> bool:
        """Return True unless `isolated` is false."""
        return self.isolated


OPEN_REWARD = OpenKind(REWARDS, "reward", base=CustomRewardConfig, from_signature=True)
RewardConfig = Annotated[RewardTermConfig, OPEN_REWARD]


def read_reward(settings: Mapping[str, Any]) -> RewardTermConfig:
    """Return the checked settings of one reward.

    Raises:
        pydantic.ValidationError: A setting is unknown or has a wrong value.
    """
    return OPEN_REWARD.validate(settings)  # type: ignore[no-any-return]


class RewardsConfig(Config):
    """A list of rewards, whose weighted sum is trained on, and what happens if one of them fails.

    In a recipe a plain list stands for `terms`.
    """

    list_field: ClassVar[str] = "terms"

    terms: list[RewardConfig] = Field(min_length=1, description="The rewards.")
    on_error: Literal["stop", "exclude"] = Field(
        "stop",
        description="If a reward raises or returns no number: stop after max_errors of them, or continue. "
        "The rollout is left out of its group, counted and shown.",
    )
    max_errors: int = Field(
        3,
        ge=1,
        description="Errors of one reward, over the run, before it stops (on_error: stop). With several processes: in one of them.",
    )
    on_timeout: Literal["stop", "exclude"] = Field(
        "exclude",
        description="The same for calls cut off by time or memory, which the text of a model can cause without "
        "any fault in the reward.",
    )
    workers: int = Field(2, ge=1, description="Processes that run mathematics and your own functions.")

    @model_validator(mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return {"terms": list(value)}
        if isinstance(value, Mapping) and "parts" in value:
            raise ValueError(
                "`parts:` is gone: write rewards: [...], or `terms:` in its place if there are other settings beside it"
            )
        return value

    @model_validator(mode="after")
    def _names(self) -> RewardsConfig:
        names = [term.title for term in self.terms]
        double = sorted({n for n in names if names.count(n) > 1})
        if double:
            raise ValueError(f"two rewards are named {double[0]!r}; set `name` of one of them")
        return self
