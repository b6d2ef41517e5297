"""Merging: one model from the weights of several, without training."""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.methods.data.data_stage import refuse_torchrun
from posttrain.methods.merge.merge_settings import MergeConfig
from posttrain.trainer.stage import Stage

if TYPE_CHECKING:
    from posttrain.config.settings import ModelConfig
    from posttrain.trainer.loop import OnStep

SCRATCH = ".source-"
"""Beginning of the names of folders for sources that are written as files first."""


class Merge(Stage):
    """Merge models, and save the result as `folder`/model."""

    Config = MergeConfig
    title = "Merging"

    def prepare(self) -> list[tuple[str, Any]]:
        return []

    def run(self, model: ModelConfig, folder: Path, seed: int, on_step: OnStep | None = None) -> dict[str, Any]:
        from posttrain.core.progress import Track
        from posttrain.methods.merge.merge_models import open_sources, write_merged
        from posttrain.trainer.policy import save_atomically

        began = time.perf_counter()
        refuse_torchrun(self.config.method)
        for left in folder.glob(f"{SCRATCH}*"):  # of a run that was interrupted
            shutil.rmtree(left, ignore_errors=True)
        entry: dict[str, Any] = {}
        if self.config.ensemble is not None:
            from posttrain.methods.merge.ensemble_result import write_pooled

            save_atomically(folder / "model", lambda work: entry.update(write_pooled(self.config, model, work)))
            return {**entry, "trainable": 0, "seconds": round(time.perf_counter() - began, 2)}
        with ExitStack() as stack:

            def scratch() -> Path:
                return Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH)))

            base, sources = open_sources(self.config, model, scratch)

            def write(work: Path) -> None:
                with Track(self.config.name, 1) as track:

                    def note(done: int, total: int) -> None:
                        track.set_total(total)
                        track.update(done)

                    entry.update(write_merged(self.config, base, sources, work, seed, note, model.trust_remote_code))

            save_atomically(folder / "model", write)
        return {**entry, "trainable": 0, "seconds": round(time.perf_counter() - began, 2)}
