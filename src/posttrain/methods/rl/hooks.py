"""Optional features of a step: each is a hook in a file of its own, and the main path does not know which are on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.config import RLConfig
    from posttrain.methods.rl.collect_rollouts import PromptGroup
    from posttrain.methods.rl.compute_advantages import Advantages
    from posttrain.methods.rl.sequence_logprobs import TrainingSequence


class Hook:
    """Take part in every step at named points. A subclass overrides those that it needs; the others do nothing.

    A step calls them in this order: `before_step`; for each attempt of dynamic sampling `choose_prompts`,
    `before_sampling`, then in rounds `after_sampling` and `more_completions`, then `after_rewards`; `metrics`;
    `after_advantages`; `after_step`. `attempt` counts from 0, steps from 0.
    """

    def before_step(self, step: int, settings: RLConfig) -> RLConfig:
        """Return the settings of this step."""
        return settings

    def choose_prompts(self, step: int, attempt: int, prompts: list[int]) -> list[int]:
        """Return the numbers of the prompts to sample.

        Args:
            step: Number of the step.
            attempt: 0, or the round of dynamic sampling.
            prompts: Numbers chosen so far; as many are returned.
        """
        return prompts

    def before_sampling(self, step: int, attempt: int, prompts: Sequence[int]) -> list[PromptGroup]:
        """Return groups of earlier steps that are continued.

        Args:
            step: Number of the step.
            attempt: 0, or the round of dynamic sampling.
            prompts: Numbers of the prompts that are sampled.
        """
        return []

    def first_completions(self, group_size: int) -> int:
        """Return the number of completions of a new prompt in the first round."""
        return group_size

    def after_sampling(self, step: int, groups: Sequence[PromptGroup]) -> list[PromptGroup]:
        """Return the groups that are scored."""
        return list(groups)

    def more_completions(self, step: int, groups: Sequence[PromptGroup]) -> list[int] | None:
        """Return the number of completions that each group gets in another round. None: no other round."""
        return None

    def after_rewards(self, step: int, groups: Sequence[PromptGroup]) -> list[PromptGroup]:
        """Return the groups that are trained on in this step."""
        return list(groups)

    def after_advantages(self, sequences: Sequence[TrainingSequence], advantages: Advantages) -> Advantages:
        """Return the advantages that are trained on."""
        return advantages

    def metrics(self, step: int, groups: Sequence[PromptGroup]) -> dict[str, float]:
        """Return what the feature did in the step."""
        return {}

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of the step's rollouts into account."""

    def state_dict(self) -> Any:
        """Return the state that the next step depends on, as plain values for the checkpoint."""
        return None

    def load_state_dict(self, state: Any) -> None:
        """Restore what `state_dict` returned."""
