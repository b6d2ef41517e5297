"""Settings that follow a measurement: the temperature or the entropy bonus, and the coefficient of the KL penalty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from posttrain.config import RLConfig
from posttrain.losses.controllers import adaptive_kl, toward_entropy
from posttrain.methods.rl.collect_rollouts import PromptGroup
from posttrain.methods.rl.hooks import Hook


class Steering(Hook):
    """Adjust one number for the entropy target and one for the KL target after each step.

    Attributes:
        temperature: Temperature of sampling, and of the log-probabilities that are trained on.
        bonus: Coefficient of the entropy bonus.
        beta: Coefficient of the KL penalty.
    """

    def __init__(self, config: RLConfig) -> None:
        self.config, self.entropy = config, config.exploration.entropy_target
        self.temperature, self.bonus, self.beta = config.sampler.temperature, config.entropy_coef, config.kl.coefficient
        if self.entropy is not None and self.entropy.control == "bonus":
            low, high = self.entropy.bounds(config.sampler.temperature)
            self.bonus = max(low, min(high, self.bonus))

    def before_step(self, step: int, settings: RLConfig) -> RLConfig:
        sampler = settings.sampler.model_copy(update={"temperature": self.temperature})
        kl = settings.kl.model_copy(update={"coefficient": self.beta})
        return settings.model_copy(update={"sampler": sampler, "kl": kl, "entropy_coef": self.bonus})

    def metrics(self, step: int, groups: Sequence[PromptGroup]) -> dict[str, float]:
        out = {}
        if self.entropy is not None:
            by_temperature = self.entropy.control == "temperature"
            name, value = ("temperature", self.temperature) if by_temperature else ("entropy_coefficient", self.bonus)
            out[name] = value
        if self.config.kl.target is not None:
            out["kl_coefficient"] = self.beta
        return out

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Adjust the numbers by the metrics `entropy` and `kl`; a number without its metric stays."""
        entropy, kl = self.entropy, self.config.kl
        if entropy is not None and "entropy" in metrics:
            bounds = entropy.bounds(self.config.sampler.temperature)
            arguments = (metrics["entropy"], entropy.target, entropy.gain, *bounds)
            if entropy.control == "temperature":
                self.temperature = toward_entropy(self.temperature, *arguments)
            else:
                self.bonus = toward_entropy(self.bonus, *arguments)
        if kl.target is not None and "kl" in metrics:
            self.beta = adaptive_kl(self.beta, metrics["kl"], kl.target, kl.gain)

    def state_dict(self) -> dict[str, float]:
        return {"temperature": self.temperature, "bonus": self.bonus, "beta": self.beta}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.temperature, self.bonus, self.beta = state["temperature"], state["bonus"], state["beta"]
