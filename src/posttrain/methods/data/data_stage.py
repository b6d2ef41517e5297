"""The base class of stages that make rows, and what those share that sample them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.settings import ModelConfig, StageBase
from posttrain.core.errors import ModelError
from posttrain.core.files import write_json, write_lines
from posttrain.trainer.stage import Stage

if TYPE_CHECKING:
    from posttrain.data.prompts import RenderedPrompt
    from posttrain.trainer.loop import OnStep


class DataStageConfig(StageBase):
    """Settings of every stage that makes rows."""

    makes = "data"


class DataStage(Stage):
    """Make rows, `folder`/data/rows.jsonl, by `make`.

    Attributes:
        prompts: Prompts of a method that samples; set by `load_prompts`.
    """

    prompts: Sequence[RenderedPrompt]

    def load_prompts(self, config: Any) -> list[tuple[str, Any]]:
        """Load and render the prompts of a source (a recipe's `problems`); return them as `prepare` does."""
        from posttrain.data.prompts import load_prompts

        loaded = load_prompts(config, self.context.tokenizer, context=self.context.context)
        self.prompts = loaded.items
        return [(self.config.name, loaded)]

    def make(self, model: ModelConfig, folder: Path, seed: int) -> dict[str, Any]:
        """Make the rows, save them with `save_rows`, and return the stage's entry in the manifest.

        Args:
            model: The model that samples.
            folder: The stage's folder; an interrupted stage resumes after what it holds.
            seed: Seeds everything random in the stage.
        """
        raise TypeError(f"{type(self).__name__} must implement make()")

    def run(self, model: ModelConfig, folder: Path, seed: int, on_step: OnStep | None = None) -> dict[str, Any]:
        began = time.perf_counter()
        entry = self.make(model, folder, seed)
        return {**entry, "seconds": round(time.perf_counter() - began, 2)}


def refuse_torchrun(method: str) -> None:
    """Raise ModelError under torchrun."""
    from posttrain.core import distributed

    if distributed.world() > 1:
        raise ModelError(f"{method} runs in one process so far; start it without torchrun")


def chunked(count: int, size: int) -> dict[int, range]:
    """Return 0 to count - 1 in ranges of `size`, by number from 1: the same however often a stage is started."""
    return {n: range(s, min(s + size, count)) for n, s in enumerate(range(0, count, size), 1)}


def save_rows(
    folder: Path,
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None,
    stats: Mapping[str, Any] | None = None,
) -> None:
    """Save `folder`/data with NAME.jsonl of each table and stats.json, whole or not at all.

    Args:
        folder: The stage's folder.
        tables: Rows by name. None: on another rank than the one that makes them, wait for that.
        stats: Counts. None: no stats.json.
    """
    from posttrain.trainer.policy import save_atomically

    def write(work: Path) -> None:
        if tables is None:
            return
        work.mkdir()
        for name, rows in tables.items():
            write_lines(work / f"{name}.jsonl", rows)
        if stats is not None:
            write_json(work / "stats.json", stats)

    save_atomically(folder / "data", write)
