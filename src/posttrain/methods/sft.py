"""Supervised fine-tuning: cross-entropy on the tokens asked for, over all loss tokens of the global batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.config import ModelConfig, SFTConfig
from posttrain.core.types import Metric, Sample
from posttrain.data.sft_rows import prepare
from posttrain.trainer.loop import BatchTrainer, OnStep, permutation_batches, train
from posttrain.trainer.stage import Ready, Setting, account, leave_model, open_policy
from posttrain.trainer.train_step import Learner

TITLES = {"sft": "Supervised fine-tuning"}
METRICS = (
    Metric("loss", "Loss", "nats/token", "Training", "lower"),
    Metric("token_accuracy", "Token accuracy", "share of loss tokens", "Training", "higher"),
)


def ready(config: SFTConfig, setting: Setting) -> Ready:
    """The stage with its rows read. Raises DataError where none can be used, or some can't and none may be left out."""
    prepared = prepare(config.data, setting.tokenizer, context=setting.context)
    return Ready(
        [(config.name, prepared)],
        lambda model, folder, seed, on_step: run_sft(
            config, model, prepared.samples, folder, seed=seed, on_step=on_step
        ),
    )


def run_sft(
    config: SFTConfig,
    model: ModelConfig,
    samples: Sequence[Sample],
    folder: Path,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Fine-tune `model` on `samples`; the result is `folder`/model, an ordinary Hugging Face folder.

    Goes on from the newest checkpoint in `folder` where there is one. Returns what the manifest says of the stage.
    """
    opened = open_policy(config, model, seed)
    batch_at, steps = permutation_batches(samples, config.batch_size, config.epochs, seed, config.max_steps)
    learner = Learner(opened.policy, config.optimizer, config.systems, steps)
    result = train(
        learner,
        BatchTrainer(learner, batch_at),
        folder,
        checkpoint_every=config.checkpoint_every,
        keep=config.keep_checkpoints,
        title=config.name,
        on_step=on_step,
        epoch_of=lambda step: step * config.batch_size / len(samples),
    )
    leave_model(opened, config, model, folder, seed, taught_end(samples))
    return account(result, opened)


def taught_end(samples: Sequence[Sample]) -> int | None:
    """The token that ends the taught completions, if nine in ten samples end in the same one."""
    last = Counter(
        next(t for t, w in zip(reversed(s.tokens), reversed(s.weights), strict=True) if w)
        for s in samples
        if any(s.weights)
    )
    token, count = last.most_common(1)[0] if last else (None, 0)
    return token if count >= 0.9 * last.total() else None
