"""The class of rewards, and how a reward is made from its settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from posttrain.config.environment import EnvironmentBase
from posttrain.config.names import REWARDS
from posttrain.config.open_functions import OwnFunctionConfig
from posttrain.config.open_kinds import own_settings
from posttrain.config.rewards import CustomRewardConfig, RewardTermConfig
from posttrain.core.errors import RewardError
from posttrain.core.imports import load_object

RewardFunctions = Mapping[str, Callable[..., Any]]
"""Callables given from Python, by name."""
SIGNATURES = {
    "completion": "a reward gets (text, example): the text of one completion, and its row as a dict",
    "group": "a reward of a group gets (texts, example): the texts of a prompt's completions, and their row as a dict",
    "batch": "a scorer gets (prompts, completions), two lists of the same length",
    "rollouts": "a reward of rollouts gets (rollouts, examples), two lists of the same length",
}


@dataclass(frozen=True, slots=True)
class RewardContext:
    """Hold what a stack of rewards knows of the completions that it scores.

    Attributes:
        tokenizer: The tokenizer. None: unknown.
        environment: Settings of the environment that answered within the completions. None: there is none.
        log: File that gets what rewards print. None: it is shown only.
        workers: Worker processes of the stack.
    """

    tokenizer: Any = None
    environment: EnvironmentBase | None = None
    log: Path | None = None
    workers: int = 2


class Reward:
    """Base of the package's rewards, made from settings and called for a number.

    A subclass has a nested class `Config` and a method `__call__`, which gets (text, example), or what else the `form`
    of its settings says: (texts, example) for a group, (prompts, texts) for a batch. One of the form `rollouts` gets
    (rollouts, examples), and returns a `RewardOutcome` for each.
    """

    Config: ClassVar[type[RewardTermConfig]] = RewardTermConfig

    def __init__(self, config: Any, functions: RewardFunctions | None = None) -> None:
        self.config = config
        self.open(functions or {})

    def open(self, functions: RewardFunctions) -> None:
        """Import or load what the reward needs; `functions` are given from Python, by name.

        Raises:
            RewardError: Something it needs is missing.
        """

    def bind(self, context: RewardContext) -> None:
        """Take what is known of the completions; called before the first call.

        Raises:
            RewardError: The reward can't score such completions.
        """

    def close(self) -> None:
        """Release what the reward holds; called at the end."""


class FunctionReward(Reward):
    """Return what a function of yours returns: (text, example, **options) -> number."""

    class Config(CustomRewardConfig, OwnFunctionConfig):
        """Any function of yours: (text, example, **options) → number, or of a whole group."""

        kind: Literal["function"] = "function"

    config: Config

    def open(self, functions: RewardFunctions) -> None:
        """Import the function and check that it can be called."""
        self.function = self.config.bound(functions, self._check)

    def _check(self, function: Any, options: Mapping[str, Any], name: str) -> None:
        check_signature(function, options, self.config.form, name)

    def __call__(self, text: Any, example: Any) -> Any:
        """Call the function."""
        return self.function(text, example)


@dataclass(frozen=True, slots=True)
class RewardTerm:
    """One reward of a stack.

    Attributes:
        config: Its settings.
        function: The reward, ready to be called. None: it runs in a worker process, and is made there.
    """

    config: RewardTermConfig
    function: Callable[..., Any] | None

    @property
    def name(self) -> str:
        """Return the name in metrics and rollouts."""
        return self.config.title


def reward_term(config: RewardTermConfig, functions: RewardFunctions) -> RewardTerm:
    """Return a reward ready to be called; a reward that runs in a worker process is made there.

    Raises:
        RewardError: The reward can't be made.
    """
    isolated = config.in_worker and getattr(config, "function", "") not in functions
    return RewardTerm(config, None if isolated else build_reward(config, functions))


def build_reward(config: RewardTermConfig, functions: RewardFunctions) -> Callable[..., Any]:
    """Return the reward of settings, with what it needs imported.

    Raises:
        RewardError: It can't be imported or made, or can't be called as a reward is.
        MissingExtraError: An optional dependency is missing.
    """
    reward = load_object(REWARDS.get(config.kind, config.kind), None, RewardError)
    if not isinstance(reward, type):
        options = own_settings(config, CustomRewardConfig)
        check_signature(reward, options, config.form, config.kind)
        return partial(reward, **options)
    if issubclass(reward, Reward):
        return reward(config, functions)  # type: ignore[return-value]
    make: Any = reward
    made: Any = make(config) if hasattr(reward, "Config") else make(**own_settings(config, CustomRewardConfig))
    check_signature(made, {}, config.form, config.kind)
    return made  # type: ignore[no-any-return]


def check_signature(function: Any, options: Mapping[str, Any], form: str, name: str) -> None:
    """Check that a reward can be called with the arguments that it will get.

    Args:
        function: The reward.
        options: Its keyword arguments.
        form: What one call scores.
        name: Its name in messages.

    Raises:
        RewardError: It can't be called so, or has the signature of TRL's reward functions.
    """
    if not callable(function):
        raise RewardError(f"reward {name!r} makes a {type(function).__name__}, not a function: {SIGNATURES[form]}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a built-in function may have none
        return
    try:
        signature.bind(None, None, **options)
    except TypeError as error:
        raise RewardError(f"reward {name!r} takes {signature}: {error}. Expected: {SIGNATURES[form]}") from error
    if form != "batch" and {"completions", "prompts"} & set(signature.parameters):
        raise RewardError(f"reward {name!r} takes {signature}, as TRL's rewards do. Here {SIGNATURES[form]}")
