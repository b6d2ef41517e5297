"""Open the policy that a stage trains, and save what it becomes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.config.settings import ModelConfig, TrainConfig
from posttrain.core import distributed
from posttrain.core.errors import ModelError
from posttrain.models.adapters import NOT_ON_A_SOFT_PROMPT, attach_to, count_parameters
from posttrain.models.fake_quantization import experts_in_full, note_grid, round_while_training, train_in_full
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import OpenedModel, open_model, pick_device, pick_dtype
from posttrain.models.quantization import check_training
from posttrain.models.quantized_weight import forget_quantized
from posttrain.models.saving import save_trained
from posttrain.models.soft_prompt import SoftPrompt
from posttrain.models.verification import verify
from posttrain.trainer.kept_zeros import mark_zeros
from posttrain.trainer.loop import LoopResult
from posttrain.trainer.trained_part import train_only


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy to be trained, checked against the model's own forward pass, adapters attached.

    Attributes:
        policy: The model.
        tokenizer: Its tokenizer.
        parameters: Number of parameters.
        trainable: Number of parameters that are trained.
        notes: What opening and saving changed, for the manifest: adapters that were merged, and how far that moved the
            logits.
        new_tokens: Ids of tokens that got a row of the embedding on opening.
    """

    policy: LanguageModel
    tokenizer: Any
    parameters: int
    trainable: int
    notes: dict[str, Any] = field(default_factory=dict)
    new_tokens: tuple[int, ...] = ()


def open_policy(
    config: TrainConfig, model: ModelConfig, seed: int, change: Callable[[OpenedModel], OpenedModel] | None = None
) -> LoadedPolicy:
    """Open `model` for training with the adapter that `config` asks for.

    Args:
        config: Settings of the stage.
        model: Source of the model.
        seed: Seed of the adapter's weights.
        change: Changes the model before adapters are attached. None: nothing is changed.
    """
    device = pick_device(model.device)
    distributed.start(device)
    opened = open_model(model, pick_dtype(model.dtype, device))
    forget_quantized(opened.hf)  # they are trained as the dense weights that their integers stand for
    opened = opened if change is None else change(opened)
    if config.adapter is None and SoftPrompt.of(opened.hf) is not None:
        raise ModelError(NOT_ON_A_SOFT_PROMPT.format(what="every weight"))
    train_only(opened.hf, config.train)
    hf = opened.hf if config.adapter is None else attach_to(opened, config.adapter, seed)
    check_training(hf, config.merge, distributed.world())
    round_while_training(hf, config.qat)
    policy = LanguageModel(hf)
    verify(policy)
    notes = dict(opened.notes) | ({"kept_zeros": round(mark_zeros(policy), 6)} if config.keep_zeros else {})
    return LoadedPolicy(policy, opened.tokenizer, *count_parameters(policy), notes, opened.new_tokens)


def save_policy(
    loaded: LoadedPolicy, config: TrainConfig, model: ModelConfig, folder: Path, seed: int, end_token: int | None
) -> None:
    """Save the trained policy as `folder`/model, an ordinary Hugging Face folder, written whole or not at all.

    Args:
        loaded: The policy.
        config: The stage's settings (adapter, merge).
        model: The model that the stage started from.
        folder: The stage's folder.
        seed: The stage's seed.
        end_token: Token that ends a turn, for the generation settings; None: as the model has it.
    """

    def write(work: Path) -> None:
        train_in_full(loaded.policy.hf)
        full = experts_in_full(loaded.policy.hf)
        settings = config.adapter, config.merge, seed, end_token, loaded.new_tokens
        loaded.notes.update(save_trained(loaded.policy, loaded.tokenizer, model, work, *settings))
        if distributed.is_main():
            note_grid(work, config.qat, full)

    save_atomically(folder / "model", write)


def save_atomically(out: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a folder under another name, on every rank, and rename it to `out` when it is whole."""
    work = out.with_name(f".{out.name}.writing")
    if distributed.is_main():
        shutil.rmtree(work, ignore_errors=True)
    distributed.barrier()
    write(work)
    if distributed.is_main():
        shutil.rmtree(out, ignore_errors=True)
        work.rename(out)
    distributed.barrier()


def summary(result: LoopResult, loaded: LoadedPolicy) -> dict[str, Any]:
    """Return the manifest's entry of a stage that trained."""
    return {
        "steps": result.steps,
        "skipped_steps": result.skipped,
        "seconds": round(result.seconds, 2),
        "tokens": result.tokens,
        "tokens_per_second": round(result.tokens / result.seconds, 1) if result.seconds else 0.0,
        "peak_memory_mb": round(result.peak_memory_mb, 1),
        **result.more,
        "parameters": loaded.parameters,
        "trainable": loaded.trainable,
        **loaded.notes,
    }
