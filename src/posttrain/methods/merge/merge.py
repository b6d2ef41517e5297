"""Merging: one model from the weights of several, without training."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.methods.data.data_stage import refuse_torchrun
from posttrain.methods.merge.merge_settings import MergeConfig
from posttrain.trainer.stage import Stage

if TYPE_CHECKING:
    from posttrain.config.settings import ModelConfig
    from posttrain.methods.merge.search import Write
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
        from posttrain.trainer.policy import save_atomically

        began = time.perf_counter()
        refuse_torchrun(self.config.method)
        for left in folder.glob(f"{SCRATCH}*"):  # of a run that was interrupted
            shutil.rmtree(left, ignore_errors=True)
        entry: dict[str, Any] = {}
        with ExitStack() as stack:

            def scratch() -> Path:
                return Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH)))

            write = self._writer(model, seed, scratch)
            if self.config.search is None:
                save_atomically(folder / "model", lambda work: entry.update(write(self.config, work)))
            else:
                from posttrain.methods.merge.search import MergeSearch

                functions = dict(self.context.functions or {})
                evaluations = self.context.evaluations
                found = MergeSearch(self.config, model, evaluations, functions, folder, seed, write).run()
                entry.update(found.entry)

                def move(work: Path) -> None:
                    found.folder.rename(work)

                save_atomically(folder / "model", move)
        return {**entry, "trainable": 0, "seconds": round(time.perf_counter() - began, 2)}

    def _writer(self, model: ModelConfig, seed: int, scratch: Callable[[], Path]) -> Write:
        """Open the models that are merged, and return what writes a merge of them."""
        if self.config.ensemble is not None:
            from posttrain.methods.merge.ensemble_result import write_pooled

            return lambda config, work: write_pooled(config, model, work)
        from posttrain.core.progress import Track
        from posttrain.methods.merge.merge_models import open_sources, write_merged

        base, sources = open_sources(self.config, model, scratch)
        routers = None
        if self.config.experts is not None:
            from posttrain.methods.merge.expert_routers import expert_routers
            from posttrain.methods.merge.experts import mixture_of

            mixture_of(base)  # before it is opened for prompts
            routers = expert_routers(self.config, model, base.config.get_text_config().hidden_size, seed)

        def write(config: MergeConfig, work: Path) -> dict[str, Any]:
            with Track(config.name, 1) as track:

                def note(done: int, total: int) -> None:
                    track.set_total(total)
                    track.update(done)

                return write_merged(config, base, sources, work, seed, note, model.trust_remote_code, routers)

        return write
