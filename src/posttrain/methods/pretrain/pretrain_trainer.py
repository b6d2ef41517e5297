"""Train on documents with general text between them, and measure both kinds of text before, during and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.core import distributed
from posttrain.core.files import write_json
from posttrain.core.types import Sample
from posttrain.data.text_documents import Documents, piece_bytes
from posttrain.methods.pretrain.new_vocabulary import parameters_besides_rows
from posttrain.methods.pretrain.retention import GENERAL, RETENTION_FILE, bits_per_byte, compare_texts, document_rows
from posttrain.methods.sft_measurement import FOLDER, keep_measurement, score_rows
from posttrain.trainer.best_step import measured_every
from posttrain.trainer.loop import BatchTrainer
from posttrain.trainer.train_step import Learner, StepResult

if TYPE_CHECKING:
    from posttrain.core.progress import Track
    from posttrain.methods.pretrain.pretrain_stage import Pretrain


class PretrainTrainer(BatchTrainer):
    """Take the steps of continued pretraining; the plan of the batches follows from the seed."""

    def __init__(self, learner: Learner, stage: Pretrain, batches: Sequence[np.ndarray], folder: Path) -> None:
        """Make a trainer.

        Args:
            learner: Model and optimizer.
            stage: The stage, with its text.
            batches: Numbers of the pieces of each step; of general text, -1 - number.
            folder: The stage's folder.
        """
        self.stage, self.batches, self.folder = stage, batches, folder
        self.domain, self.general = stage.trained.samples, None if stage.replay is None else stage.replay.samples
        measured = stage.held_out is not None or stage.general is not None
        settings = stage.config if stage.held_out is not None else None  # else there is no loss to choose a step by
        every = measured_every(stage.config, learner.total_steps)
        super().__init__(
            learner, self._batch, None, self._measure if measured else None, every, settings=settings, folder=folder
        )
        vocabulary = stage.config.vocabulary
        self.train_first = 0 if vocabulary is None else vocabulary.train_first
        self._rest = parameters_besides_rows(learner.model) if self.train_first else []
        self._bytes = {"domain": piece_bytes(self.domain)}
        if self.general is not None:
            self._bytes["general"] = piece_bytes(self.general)

    def _batch(self, step: int) -> list[Sample]:
        return [self.domain[n] if n >= 0 else self.general[-1 - n] for n in self.batches[step].tolist()]  # type: ignore[index]

    def update(self, step: int) -> StepResult:
        """Take one step; add the bits per byte of its tokens, and the share of general text."""
        frozen = self._rest if step < self.train_first else []
        for p in frozen:
            p.requires_grad_(False)
        result, numbers = super().update(step), self.batches[step]
        for p in frozen:  # measurements keep the weights that require a gradient
            p.requires_grad_(True)
        own, other = numbers[numbers >= 0], -1 - numbers[numbers < 0]
        size, tokens = float(self._bytes["domain"][own].sum()), result.metrics["loss_tokens"]
        if self.general is not None:
            size += float(self._bytes["general"][other].sum())
            result.metrics["replay_share"] = float(self.general.columns["loss"][other].sum()) / tokens
        result.metrics["bits_per_byte"] = bits_per_byte(result.metrics["loss"] * tokens, size)
        return result

    def _measure(self, step: int, track: Track) -> dict[str, float]:
        found: dict[str, float] = {}
        for prefix, text in ((FOLDER, self.stage.held_out), (GENERAL, self.stage.general)):
            if text is not None:
                track.phase("held-out text" if prefix == FOLDER else "general text")
                found |= self._measure_text(step, prefix, text)
        return found

    def _measure_text(self, step: int, prefix: str, text: Documents) -> dict[str, float]:
        scores = score_rows(self.learner.model, text.samples, self.stage.config.systems)
        rows = document_rows(text, scores)
        nll, tokens, size = (math.fsum(row[name] for row in rows) for name in ("nll", "tokens", "bytes"))
        loss, accuracy = nll / tokens, math.fsum(s.hits for s in scores) / tokens
        bits = bits_per_byte(nll, size)
        if distributed.is_main():
            value = {"step": step, "loss": loss, "accuracy": accuracy, "bits_per_byte": bits}
            keep_measurement(self.folder / prefix, step, {**value, "answers": [], "no_answers": "", "rows": rows})
        accuracies = {"held_out/accuracy": accuracy} if prefix == FOLDER else {}
        return {f"{prefix}/loss": loss, f"{prefix}/bits_per_byte": bits, **accuracies}

    def finish(self, done: int) -> dict[str, Any]:
        """Compare the texts before the first step and at the step of the model, and warn of what was forgotten."""
        out = super().finish(done)
        config = self.stage.config
        share = None if config.replay is None else config.replay.share
        distributed.barrier()
        found = compare_texts(self.folder, out.get("model_step", done), self.stage.general_name, share)
        distributed.barrier()
        if found:
            out["retention"] = found
            if distributed.is_main():
                write_json(self.folder / RETENTION_FILE, found)
        return out
