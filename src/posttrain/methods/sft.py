"""Supervised fine-tuning: cross-entropy on the tokens asked for, divided by all loss tokens of the global batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from posttrain.config.settings import NAME, DataConfig, EpochsConfig
from posttrain.core.types import Metric, Sample
from posttrain.trainer.stage import Stage, StageRun

if TYPE_CHECKING:
    from posttrain.trainer.loop import BatchTrainer
    from posttrain.trainer.policy import LoadedPolicy


class SFTConfig(EpochsConfig):
    """Supervised fine-tuning: cross-entropy on the tokens asked for, divided by all loss tokens of the global batch."""

    method: str = "sft"
    name: str = Field("sft", pattern=NAME, description="Name of the stage's folder in the run.")
    data: DataConfig


class SFT(Stage):
    """Fine-tune on the loss tokens of every row."""

    Config = SFTConfig
    title = "Supervised fine-tuning"
    metrics = (
        Metric("loss", "Loss", "nats/token", "Training", "lower"),
        Metric("token_accuracy", "Token accuracy", "share of loss tokens", "Training", "higher"),
    )

    def prepare(self) -> list[tuple[str, Any]]:
        from posttrain.data.sft_rows import prepare

        prepared = prepare(self.config.data, self.context.tokenizer, context=self.context.context)
        self.rows = prepared.samples
        return [(self.config.name, prepared)]

    def trainer(self, policy: LoadedPolicy, run: StageRun) -> BatchTrainer:
        from posttrain.trainer.loop import BatchTrainer, permutation_batches
        from posttrain.trainer.train_step import Learner

        config = self.config
        batch_at, steps = permutation_batches(self.rows, config.batch_size, config.epochs, run.seed, config.max_steps)
        return BatchTrainer(Learner(policy.policy, config.optimizer, config.systems, steps), batch_at)

    def end_token(self, policy: LoadedPolicy) -> int | None:
        return infer_trained_eos(self.rows)


def infer_trained_eos(samples: Sequence[Sample]) -> int | None:
    """Return the token that ends the trained completions, if nine in ten samples end in the same one."""
    last = Counter(
        next(t for t, w in zip(reversed(s.tokens), reversed(s.weights), strict=True) if w)
        for s in samples
        if any(s.weights)
    )
    token, count = last.most_common(1)[0] if last else (None, 0)
    return token if count >= 0.9 * last.total() else None
