"""What training a reward model and a process reward model have in common: opening, measuring now and then, leaving."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from posttrain.config import ModelConfig, SystemsConfig
from posttrain.core import distributed
from posttrain.core.files import write_json
from posttrain.core.progress import Track
from posttrain.methods.reward_model.pairwise import ScorerConfig
from posttrain.models.adapters import attach, count_parameters
from posttrain.models.classification_head import Layout, open_head, save_head, verify_scores
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import pick_device, pick_dtype
from posttrain.rewards.reward_model_scorer import INDEX
from posttrain.trainer.loop import BatchAt
from posttrain.trainer.policy import LoadedPolicy, save_atomically
from posttrain.trainer.token_budget import token_budget
from posttrain.trainer.train_step import Learner, LossFunction, StepResult

Measure = Callable[[int, Track], dict[str, float]]
"""(steps done, progress) -> numbers for metrics.jsonl."""


class Measured:
    """Trainer of a stage: optimizer steps on batches of rows, and measurements between."""

    def __init__(
        self, learner: Learner, batch_at: BatchAt, loss: LossFunction, measure: Measure | None, every: int
    ) -> None:
        self.learner, self.batch_at, self.loss = learner, batch_at, loss
        self.measure, self.every = measure, every
        self.steps = learner.total_steps

    def step(self, step: int, track: Track) -> StepResult:
        result = self.learner.step(self.batch_at(step), self.loss)
        last = step + 1 == self.steps
        if self.measure is not None and (last or (self.every and (step + 1) % self.every == 0)):
            result.metrics.update(self.measure(step + 1, track))
        return result

    def initial_record(self, track: Track) -> dict[str, Any] | None:
        return self.measure(0, track) if self.measure is not None else None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, numbers: dict[str, Any]) -> None:
        pass


def open_scorer(config: ScorerConfig, model: ModelConfig, layout: Layout, seed: int) -> LoadedPolicy:
    """The model that a stage starts from under a head that scores, checked against transformers' own forward."""
    device = pick_device(model.device)
    distributed.start(device)
    hf, tokenizer = open_head(model, layout, seed, pick_dtype(model.dtype, device))
    if config.adapter is not None:
        hf = attach(hf, config.adapter, seed, "SEQ_CLS")
    policy = LanguageModel(hf)
    verify_scores(policy, layout)
    return LoadedPolicy(policy, tokenizer, *count_parameters(policy))


def leave_scorer(
    opened: LoadedPolicy, config: ScorerConfig, model: ModelConfig, layout: Layout, out: Path, seed: int, index: Any
) -> None:
    """The trained model in `out`, with what is needed to score as it was trained (`index`), whole or not at all."""

    def write(work: Path) -> None:
        save_head(opened.policy, opened.tokenizer, model, layout, work, config.adapter, seed)
        if distributed.is_main():
            write_json(work / INDEX, index)

    save_atomically(out, write)


def whole(systems: SystemsConfig, model: LanguageModel, sizes: Sequence[int]) -> SystemsConfig:
    """The same settings with room in a micro-batch for each of these: what is compared can't be cut in two."""
    return systems.model_copy(update={"tokens_per_micro_batch": max(token_budget(systems, model), *sizes, 1)})
