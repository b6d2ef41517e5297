"""Supervised fine-tuning: cross-entropy on the tokens asked for, over all loss tokens of the global batch."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.config import ModelConfig, SFTConfig
from posttrain.distributed import ranks
from posttrain.models.adapters import attach, count_parameters
from posttrain.models.lm import LanguageModel, verify
from posttrain.models.load import load_model, pick_device, pick_dtype
from posttrain.models.save import save_trained
from posttrain.train.learner import Learner
from posttrain.train.loop import Batches, OnStep, permutation_batches, train
from posttrain.types import Sample


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
    device = pick_device(model.device)
    ranks.start(device)
    hf, tokenizer = load_model(model, pick_dtype(model.dtype, device))
    if config.adapter is not None:
        hf = attach(hf, config.adapter, seed)
    policy = LanguageModel(hf)
    verify(policy)
    total, trainable = count_parameters(policy)
    batch_at, steps = permutation_batches(samples, config.batch_size, config.epochs, seed, config.max_steps)
    learner = Learner(policy, config.optimizer, config.systems, steps)
    result = train(
        learner,
        Batches(learner, batch_at),
        folder,
        checkpoint_every=config.checkpoint_every,
        keep=config.keep_checkpoints,
        title=config.name,
        on_step=on_step,
        epoch_of=lambda step: step * config.batch_size / len(samples),
    )
    out = folder / "model"
    work = folder / ".model.writing"
    if ranks.is_main():
        shutil.rmtree(work, ignore_errors=True)
    save_trained(policy, tokenizer, model, work, config.adapter, config.merge, seed, taught_end(samples))
    if ranks.is_main():
        shutil.rmtree(out, ignore_errors=True)
        work.rename(out)
    ranks.barrier()
    return {
        "steps": result.steps,
        "skipped_steps": result.skipped,
        "seconds": round(result.seconds, 2),
        "tokens": result.tokens,
        "peak_memory_mb": round(result.peak_memory_mb, 1),
        "parameters": total,
        "trainable": trainable,
    }


def taught_end(samples: Sequence[Sample]) -> int | None:
    """The token that ends the taught completions, if nine in ten samples end in the same one."""
    last = Counter(
        next(t for t, w in zip(reversed(s.tokens), reversed(s.weights), strict=True) if w)
        for s in samples
        if any(s.weights)
    )
    token, count = last.most_common(1)[0] if last else (None, 0)
    return token if count >= 0.9 * last.total() else None
