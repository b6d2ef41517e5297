"""The base class of stages that make a model smaller without training it, and the calibration rows that they share."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from posttrain.config.settings import DataConfig, ModelConfig, StageBase
from posttrain.core.errors import ModelError
from posttrain.core.types import Sample
from posttrain.methods.data.data_stage import refuse_torchrun
from posttrain.trainer.stage import Stage

if TYPE_CHECKING:
    from posttrain.models.language_model import LanguageModel
    from posttrain.trainer.loop import OnStep


class CompressConfig(StageBase):
    """Settings of every stage that makes a model smaller without training it."""

    one_process = ("method",)
    calibration: DataConfig | None = Field(
        None,
        description="Rows that run through the model to see what its layers multiply: any data source, rendered as for training. Use text like that which the model will be given.",
    )
    rows: int = Field(128, ge=1, description="Most calibration rows: the first ones, after shuffling by shuffle_seed.")
    row_tokens: int = Field(
        512, ge=2, description="Longest calibration row in tokens; of a longer one the beginning is used."
    )


class CompressStage(Stage):
    """Open the model, change its weights by `compress`, and save it as `folder`/model.

    Attributes:
        samples: The calibration rows as tokens; empty without `config.calibration`.
    """

    samples: Sequence[Sample] = ()

    def prepare(self) -> list[tuple[str, Any]]:
        from posttrain.data.sft_rows import prepare

        config = self.config
        if config.calibration is None:
            return []
        length = min(config.row_tokens, self.context.context or config.row_tokens)
        cut = {"max_tokens": length, "on_long": "truncate"} if config.calibration.max_tokens is None else {}
        data = config.calibration.model_copy(update=cut)
        read = prepare(data, self.context.tokenizer, context=self.context.context)
        self.samples = [read.samples[i] for i in range(min(config.rows, len(read.samples)))]
        return [(config.name, read.take(range(len(self.samples))))]

    def compress(self, policy: LanguageModel, folder: Path, seed: int) -> dict[str, Any]:
        """Change the model in place, and return entries for the manifest.

        Args:
            policy: The model, computed as it is trained and sampled.
            folder: The stage's folder, for files beside the model.
            seed: Seeds everything random in the stage.
        """
        raise TypeError(f"{type(self).__name__} must implement compress()")

    def run(self, model: ModelConfig, folder: Path, seed: int, on_step: OnStep | None = None) -> dict[str, Any]:
        from posttrain.models.language_model import LanguageModel
        from posttrain.models.loading import open_model
        from posttrain.models.quantization import is_quantized
        from posttrain.models.quantized_weight import quantized_matrices
        from posttrain.models.saving import save_trained
        from posttrain.models.verification import verify
        from posttrain.trainer.policy import save_atomically

        config, began = self.config, time.perf_counter()
        refuse_torchrun(config.method)
        opened = open_model(model)
        if is_quantized(opened.hf) or any(True for _ in quantized_matrices(opened.hf)):
            raise ModelError(
                f"model source {model.source!r} has quantised weights, which {config.method} can't change: start from "
                "the model in 16 or 32 bit"
            )
        policy = LanguageModel(opened.hf)
        if policy.soft_prompt is not None:
            raise ModelError(
                f"model source {model.source!r} has a soft prompt, and {config.method} changes whole models: start "
                "from the model without it"
            )
        verify(policy)
        entry = self.compress(policy, folder, seed)
        parameters = sum(p.numel() for p in policy.parameters())

        def write(work: Path) -> None:
            entry.update(save_trained(policy, opened.tokenizer, model, work, None, True, seed, None))

        save_atomically(folder / "model", write)
        read = {"calibration_rows": len(self.samples), "calibration_tokens": sum(map(len, self.samples))}
        sizes = {"parameters": parameters, "trainable": 0}
        return {**sizes, **read, **opened.notes, **entry, "seconds": round(time.perf_counter() - began, 2)}
