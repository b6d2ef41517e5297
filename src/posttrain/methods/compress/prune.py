"""Pruning: single weights become zero (magnitude, Wanda, SparseGPT), or whole units, heads and layers are removed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.methods.compress.compress_stage import CompressStage
from posttrain.methods.compress.prune_settings import PruneConfig

if TYPE_CHECKING:
    from posttrain.models.language_model import LanguageModel

RECORD = "pruning.json"
"""File in the stage's folder that says what became of each matrix, or of the sizes."""


class Prune(CompressStage):
    """Prune the model; what was done is in pruning.json beside it."""

    Config = PruneConfig
    title = "Pruning"

    def compress(self, policy: LanguageModel, folder: Path, seed: int) -> dict[str, Any]:
        from posttrain.core.files import write_json

        config, before = self.config, sum(p.numel() for p in policy.parameters())
        if config.weights is not None:
            made, record = self._sparse(policy)
        else:
            made, record = self._smaller(policy)
        write_json(folder / RECORD, record)
        return {"made": {"parameters before": before, **made}}

    def _sparse(self, policy: LanguageModel) -> tuple[dict[str, Any], dict[str, Any]]:
        import logging

        from posttrain.core.progress import Track
        from posttrain.methods.compress.calibration_pass import LayerByLayer
        from posttrain.methods.compress.sparse_pruning import prune_weights, zeros_in

        config = self.config.weights
        with Track(self.config.name, len(LayerByLayer(policy).layers)) as track:
            records = prune_weights(policy, self.samples, config, lambda done: track.update(min(done, track.total)))
        fallen = [r["matrix"] for r in records if r["algorithm"] != config.algorithm]
        if fallen:
            logging.getLogger("posttrain").warning(
                "no calibration row was routed to %d matrices of experts, which are pruned by magnitude: %s%s. More "
                "rows would reach them",
                len(fallen),
                ", ".join(fallen[:3]),
                " and others" if len(fallen) > 3 else "",
            )
        made = {"zeros": sum(r["zeros"] for r in records), "share of zeros": round(zeros_in(records), 6)}
        made |= {"matrices pruned": len(records)} | ({"matrices pruned by magnitude": len(fallen)} if fallen else {})
        return made, {"weights": config.model_dump(), "unreached": fallen, "matrices": records}

    def _smaller(self, policy: LanguageModel) -> tuple[dict[str, Any], dict[str, Any]]:
        from posttrain.methods.compress.structured import prune_structure

        record = prune_structure(policy, self.samples, self.config.structure)
        changed = {n: v for n, v in record["after"].items() if v != record["before"][n]}
        made = {f"{name} (of {record['before'][name]:,})": value for name, value in changed.items()}
        return made, {"structure": self.config.structure.model_dump(), **record}
