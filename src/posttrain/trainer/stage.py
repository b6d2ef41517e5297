"""What every stage is to its run, and what training stages have in common: opening the model, leaving the result."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config import ModelConfig, TrainConfig
from posttrain.core import distributed
from posttrain.models.adapters import attach, count_parameters
from posttrain.models.language_model import LanguageModel, verify
from posttrain.models.loading import load_model, pick_device, pick_dtype
from posttrain.models.saving import save_trained
from posttrain.trainer.loop import LoopResult, OnStep

Functions = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class Setting:
    """What a stage may need to get ready. functions: rewards that the recipe names and that live in this program (None:
    not known, since nothing is to be run; what names one is not checked then).

    context: the model's length in tokens (None: it names none).
    """

    tokenizer: Any
    context: int | None
    functions: Functions | None = None


@dataclass(frozen=True)
class Ready:
    """A stage with its data read, so that what is wrong with any is said before the first one trains.

    data: (title, what was read), as `posttrain inspect` shows it; each has the manifest's entry in `.stats`.
    run: (model, the stage's folder, seed, on_step) -> what the manifest says of the stage. It leaves
    `folder`/(the settings' `makes`), by a rename, as the last thing.
    """

    data: list[tuple[str, Any]]
    run: Callable[[ModelConfig, Path, int, OnStep | None], dict[str, Any]]

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [{"stage": title, **data.stats} for title, data in self.data]


@dataclass(frozen=True)
class Opened:
    """A policy to be trained, checked against the model's own forward, adapters attached."""

    policy: LanguageModel
    tokenizer: Any
    parameters: int
    trainable: int


def open_policy(config: TrainConfig, model: ModelConfig, seed: int) -> Opened:
    """The model that a stage starts from, as its settings want it trained."""
    device = pick_device(model.device)
    distributed.start(device)
    hf, tokenizer = load_model(model, pick_dtype(model.dtype, device))
    if config.adapter is not None:
        hf = attach(hf, config.adapter, seed)
    policy = LanguageModel(hf)
    verify(policy)
    return Opened(policy, tokenizer, *count_parameters(policy))


def leave_model(
    opened: Opened, config: TrainConfig, model: ModelConfig, folder: Path, seed: int, end_token: int | None
) -> None:
    """The trained policy in `folder`/model, an ordinary Hugging Face folder, whole or not at all."""

    def write(work: Path) -> None:
        arguments = (opened.policy, opened.tokenizer, model, work, config.adapter, config.merge, seed, end_token)
        save_trained(*arguments)

    leave(folder / "model", write)


def leave(out: Path, write: Callable[[Path], None]) -> None:
    """`write` makes a folder under another name, on every rank; it takes its place when it is whole."""
    work = out.with_name(f".{out.name}.writing")
    if distributed.is_main():
        shutil.rmtree(work, ignore_errors=True)
    distributed.barrier()
    write(work)
    if distributed.is_main():
        shutil.rmtree(out, ignore_errors=True)
        work.rename(out)
    distributed.barrier()


def account(result: LoopResult, opened: Opened) -> dict[str, Any]:
    """What the manifest says of a stage that trained."""
    return {
        "steps": result.steps,
        "skipped_steps": result.skipped,
        "seconds": round(result.seconds, 2),
        "tokens": result.tokens,
        "peak_memory_mb": round(result.peak_memory_mb, 1),
        "parameters": opened.parameters,
        "trainable": opened.trainable,
    }
