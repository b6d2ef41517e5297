"""Quantisation: the model's linear layers in 4 or 8 bits, by rounding to nearest, GPTQ or AWQ."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.core.files import write_json
from posttrain.methods.compress.compress_stage import CompressStage
from posttrain.methods.compress.quantize_settings import QuantizeConfig

if TYPE_CHECKING:
    from posttrain.config.settings import ModelConfig
    from posttrain.models.language_model import LanguageModel
    from posttrain.trainer.loop import OnStep

LAYER_RECORD = "quantization.json"
"""File in the stage's folder that says how each layer was quantised, and what that did to its outputs."""
GGUF_FILE = "model.gguf"
"""File in the stage's folder for llama.cpp, with `format: gguf`."""
log = logging.getLogger("posttrain")


class Quantize(CompressStage):
    """Quantise the model; how is in quantization.json beside it, and the weights are saved as compressed-tensors."""

    Config = QuantizeConfig
    title = "Quantisation"
    source = ""

    def run(self, model: ModelConfig, folder: Path, seed: int, on_step: OnStep | None = None) -> dict[str, Any]:
        self.source = model.source
        return super().run(model, folder, seed, on_step)

    def compress(self, policy: LanguageModel, folder: Path, seed: int) -> dict[str, Any]:
        from posttrain.core.progress import Track
        from posttrain.methods.compress.quantize_layers import LayerQuantizer, chosen_settings

        file = folder / GGUF_FILE
        if self.config.format == "gguf":
            from posttrain.models.gguf_export import check_gguf

            check_gguf(policy.base)
            file.unlink(missing_ok=True)  # of a run that was interrupted
        chosen, notes = chosen_settings(self.config, Path(self.source))
        for note in notes:
            log.warning("%s: %s", self.config.name, note)
        quantizer = LayerQuantizer(policy, chosen)
        with Track(self.config.name, quantizer.steps) as track:
            quantizer.run(self.samples, lambda done: track.update(min(done, quantizer.steps)))
        if quantizer.unreached:
            log.warning(
                "no calibration row was routed to %d matrices of experts, which are rounded to nearest: %s%s. More rows "
                "would reach them",
                len(quantizer.unreached),
                ", ".join(quantizer.unreached[:3]),
                " and others" if len(quantizer.unreached) > 3 else "",
            )
        write_json(folder / LAYER_RECORD, {"settings": chosen.model_dump(), **quantizer.record()})
        entry = {**quantizer.summary(), **({"notes": notes} if notes else {})}
        if self.config.format == "gguf":
            from posttrain.models.gguf_export import export_gguf

            written = export_gguf(policy.base, self.context.tokenizer, file)
            entry["gguf"] = {"bytes": written.bytes, "types": written.types, "exact": written.exact}
        return {"quantized": entry}
