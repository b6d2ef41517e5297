"""Supervised fine-tuning: cross-entropy on the tokens asked for, divided by all loss tokens of the global batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from posttrain.config.settings import NAME, DataConfig, MeasuredConfig
from posttrain.core.types import Metric, Sample
from posttrain.trainer.stage import Stage, StageRun

if TYPE_CHECKING:
    from posttrain.data.sft_rows import Prepared
    from posttrain.trainer.loop import BatchTrainer
    from posttrain.trainer.policy import LoadedPolicy

EOS_ROWS = 10_000
"""Rows of which the token that ends answers is taken, spread evenly over all of them."""


class SFTConfig(MeasuredConfig):
    """Supervised fine-tuning: cross-entropy on the tokens asked for, divided by all loss tokens of the global batch."""

    before_target = True

    method: str = "sft"
    name: str = Field("sft", pattern=NAME, description="Name of the stage's folder in the run.")
    data: DataConfig
    held_out_answers: int = Field(
        5,
        ge=0,
        description="Held-out prompts that the model answers, greedily, at each measurement; the report shows the answers. 0: none.",
    )
    answer_tokens: int = Field(
        128,
        ge=1,
        description="Longest such answer in tokens; cut earlier, at 16 more than twice the longest expected answer.",
    )


class SFT(Stage):
    """Fine-tune on the loss tokens of every row."""

    Config = SFTConfig
    title = "Supervised fine-tuning"
    metrics = (
        Metric("loss", "Loss", "nats/token", "Training", "lower"),
        Metric("held_out/loss", "Held out", "nats/token", "Training", "lower", over="loss"),
        Metric("token_accuracy", "Token accuracy", "share of loss tokens", "Training", "higher"),
        Metric("held_out/accuracy", "Held out", "share of loss tokens", "Training", "higher", over="token_accuracy"),
    )
    progress = ("loss", "held_out/loss")
    held_out: Prepared | None = None

    def prepare(self) -> list[tuple[str, Any]]:
        from posttrain.data.sft_rows import prepare

        def load(data: DataConfig) -> Prepared:
            return prepare(data, self.context.tokenizer, context=self.context.context)

        trained, self.held_out = self.read_held_out(load, self.config.data, self.config.held_out)
        self.rows = trained.samples
        return self.data

    def trainer(self, policy: LoadedPolicy, run: StageRun) -> BatchTrainer:
        from posttrain.methods.sft_measurement import HeldOutMeasurement
        from posttrain.trainer.loop import BatchTrainer
        from posttrain.trainer.train_step import Learner

        config = self.config
        batch_at, steps = run.batches(self.rows, config)
        learner = Learner(policy.policy, config.optimizer, config.systems, steps)
        if self.held_out is None:
            return BatchTrainer(learner, batch_at)
        end, context = infer_trained_eos(self.rows), self.context.context
        measure = HeldOutMeasurement(config, policy, self.held_out, run.folder, context, [] if end is None else [end])
        return BatchTrainer(learner, batch_at, None, measure, settings=config, folder=run.folder)

    def end_token(self, policy: LoadedPolicy) -> int | None:
        return infer_trained_eos(self.rows)


def infer_trained_eos(samples: Sequence[Sample]) -> int | None:
    """Return the token that ends the trained completions, if nine in ten samples end in the same one."""
    rows = (samples[i] for i in range(0, len(samples), max(1, len(samples) // EOS_ROWS)))
    last = Counter(
        next(t for t, w in zip(reversed(s.tokens), reversed(s.weights), strict=True) if w)
        for s in rows
        if any(s.weights)
    )
    token, count = last.most_common(1)[0] if last else (None, 0)
    return token if count >= 0.9 * last.total() else None
