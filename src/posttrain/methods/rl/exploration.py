"""Adaptive exploration: settings that follow what is measured, and completions dealt out by measured success."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from posttrain.config import RLConfig
from posttrain.losses.controllers import adaptive_kl, toward_entropy


@dataclass
class Controls:
    """The numbers that are steered while a stage trains: all the state that steering has.

    temperature: of sampling, and of the log-probabilities that are learnt from. bonus: the entropy bonus's coefficient.
    beta: that of the KL penalty. Those that are not steered stay as the settings have them.
    """

    temperature: float
    bonus: float
    beta: float

    @classmethod
    def of(cls, config: RLConfig) -> Controls:
        """As a stage begins."""
        bonus = config.entropy
        if config.steer is not None and config.steer.by == "bonus":
            low, high = config.steer.bounds(config.sampler.temperature)
            bonus = max(low, min(high, bonus))
        return cls(config.sampler.temperature, bonus, config.kl.coefficient)

    def applied(self, config: RLConfig) -> RLConfig:
        """The settings of a step, with these numbers in their places."""
        if config.steer is None and config.kl.target is None:
            return config
        sampling = config.sampler.model_copy(update={"temperature": self.temperature})
        kl = config.kl.model_copy(update={"coefficient": self.beta})
        return config.model_copy(update={"sampler": sampling, "kl": kl, "entropy": self.bonus})

    def metrics(self, config: RLConfig) -> dict[str, float]:
        """Those that are steered, as they served in a step."""
        out = {}
        if config.steer is not None:
            temperature = config.steer.by == "temperature"
            name, value = ("temperature", self.temperature) if temperature else ("entropy_coefficient", self.bonus)
            out[name] = value
        if config.kl.target is not None:
            out["kl_coefficient"] = self.beta
        return out

    def follow(self, config: RLConfig, measured: Mapping[str, float]) -> None:
        """After a step: `entropy` and `kl` as it measured them. Where it has none, nothing moves."""
        steer = config.steer
        if steer is not None and "entropy" in measured:
            bounds = steer.bounds(config.sampler.temperature)
            arguments = (measured["entropy"], steer.target, steer.gain, *bounds)
            if steer.by == "temperature":
                self.temperature = toward_entropy(self.temperature, *arguments)
            else:
                self.bonus = toward_entropy(self.bonus, *arguments)
        if config.kl.target is not None and "kl" in measured:
            self.beta = adaptive_kl(self.beta, measured["kl"], config.kl.target, config.kl.gain)

    def state_dict(self) -> dict[str, float]:
        return asdict(self)


def allot(successes: Sequence[int], counts: Sequence[int], left: int, first: int, most: int) -> list[int]:
    """How many more completions each prompt gets, of `left` in all, by what its completions so far came to.

    successes, counts: of each prompt. While some prompt has no success and fewer than `most` completions, such prompts
    get up to `first` more each, in their order. Where there is none, everything is dealt out one by one, always to the
    prompt with the lowest (successes + 1) / (completions + 2), the first of equals, up to `most`. What comes back sums
    to `left`, or to less where more can't be given: after a round for the hard ones, call again.
    """
    more = [0] * len(counts)
    hard = [i for i, (s, n) in enumerate(zip(successes, counts, strict=True)) if not s and n < most]
    for i in hard:
        more[i] = min(first, most - counts[i], left - sum(more))
    if hard:
        return more
    for _ in range(left):
        open_ = [i for i, n in enumerate(counts) if n + more[i] < most]
        if not open_:
            break
        # What is dealt in this call has no outcome yet: it counts as answered at the prompt's rate so far.
        lowest = min(open_, key=lambda i: ((successes[i] + 1) / (counts[i] + 2), more[i], i))
        more[lowest] += 1
    return more
