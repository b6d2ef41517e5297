"""Write what a merge changed in the base as a LoRA adapter in peft's format."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from posttrain.core.errors import ModelError
from posttrain.core.files import write_json
from posttrain.methods.merge.low_rank import nearest_of_rank, nearest_of_sum, sum_of_products
from posttrain.methods.merge.merge_settings import AdapterResultConfig
from posttrain.methods.merge.merge_weights import WeightMerge
from posttrain.methods.merge.stored_model import StoredModel
from posttrain.models.adapter_export import WEIGHTS_FILE, base_name

log = logging.getLogger("posttrain")
UNCHANGED = 1e-6
"""Largest part of a tensor's size by which rounding alone changes it."""


@dataclass
class AdapterResult:
    """Hold an adapter while its matrices are found.

    Attributes:
        factors: (B, A) by module.
        whole: Tensors that are saved whole, by name.
        dropped: Names of changed tensors that are left as the base has them.
        missed: Squared distance of each module's product to the change, and the squared size of the change.
    """

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    missed: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Return the number of parameters of the adapter."""
        return sum(t.numel() for pair in self.factors.values() for t in pair) + sum(
            t.numel() for t in self.whole.values()
        )

    @property
    def made(self) -> dict[str, Any]:
        """Return numbers for the report."""
        ranks = [a.shape[0] for _, a in self.factors.values()]
        total = sum(size for _, size in self.missed.values())
        error = (sum(missed for missed, _ in self.missed.values()) / total) ** 0.5 if total else 0.0
        out = {"matrices": len(ranks), "largest rank": max(ranks), "relative error of the change": round(error, 6)}
        out |= {"tensors saved whole": len(self.whole)} if self.whole else {}
        return out | ({"changed tensors left out": len(self.dropped)} if self.dropped else {})

    @property
    def record(self) -> dict[str, Any]:
        """Return notes for the manifest."""
        errors = {name: (missed / size) ** 0.5 if size else 0.0 for name, (missed, size) in self.missed.items()}
        worst = max(errors, key=lambda name: errors[name])
        return {"worst matrix": worst, "its relative error": round(errors[worst], 6), "left out": self.dropped[:20]}


def write_difference(
    config: AdapterResultConfig,
    base: StoredModel,
    plan: WeightMerge,
    folder: Path,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> AdapterResult:
    """Write the adapter that makes the merged model of the base.

    Args:
        config: Rank, and what happens to other tensors.
        base: The base.
        plan: The merge.
        folder: Where to write.
        on_tensor: Called with the numbers of tensors that are done and of all.

    Raises:
        ModelError: The base is an adapter itself, nothing changed, or ranks can't be added up.
    """
    if base.deltas:
        raise ModelError(f"the base {base.source} is an adapter: a result that is one too needs a whole model below it")
    if config.rank is None and plan.low_rank is None:
        raise ModelError(
            "adapter.rank is needed: ranks can be added up for linear (normalised) and task_arithmetic of plain LoRA "
            "adapters that are all on the base and have its vocabulary, and this is another merge"
        )
    result = AdapterResult()
    for done, tensor in enumerate(plan.tensors, 1):
        _add(result, tensor.name, config, base, plan)
        on_tensor(done, len(plan.tensors))
    if not result.factors:
        raise ModelError("the merge changes no matrix of the base, so there is no adapter to write")
    if result.dropped:
        log.warning(
            "%d changed tensors are not in the adapter: %s", len(result.dropped), ", ".join(result.dropped[:3])
        )  # fmt: skip
    _save(result, base, folder)
    return result


def _add(result: AdapterResult, name: str, config: AdapterResultConfig, base: StoredModel, plan: WeightMerge) -> None:
    """Find the factors of one tensor's change."""
    layout, module = base.layout, name.removesuffix(".weight")
    linear = name in layout.linear and name in base.tensors
    terms = None if plan.low_rank is None else plan.low_rank(name)
    if terms == []:  # no adapter has a part for it: it stays as it is, to the bit
        return
    if linear and terms is not None:
        b, a = sum_of_products(terms)
        size = float(((b.T @ b).double() * (a @ a.T).double()).sum())  # |B A|^2, without the product
        missed = 0.0
        if config.rank is not None and config.rank < a.shape[0]:
            b, a, missed = nearest_of_sum(terms, config.rank)
        result.factors[module], result.missed[module] = (b, a), (missed, size)
        return
    before = base.read(name) if base.has(name) else None
    after = plan.compute(name)
    if before is None or not before.is_floating_point():
        return
    change = after - before
    if float(change.abs().max()) <= UNCHANGED * float(before.abs().max()):
        return
    if linear and config.rank is not None:
        matrix = change.T if name in layout.transposed else change
        b, a, missed = nearest_of_rank(matrix, config.rank)
        result.factors[module] = b.contiguous(), a.contiguous()
        result.missed[module] = missed, float(change.double().square().sum())
    elif config.others == "save" and _can_be_saved(name, base):
        result.whole[name] = after.to(base.entry(name).dtype)
    elif config.others == "save":
        raise ModelError(
            f"{name} is changed by the merge, and an adapter in peft's format has no place for it: save the whole model "
            "(leave adapter out), or leave such changes out (adapter.others: drop)"
        )
    else:
        result.dropped.append(name)


def _can_be_saved(name: str, base: StoredModel) -> bool:
    """Return True for a tensor of a module that peft saves whole: none of a linear layer's, none of experts."""
    module, _, parameter = name.rpartition(".")
    return f"{module}.weight" not in base.layout.linear - set(base.layout.tied) and parameter in ("weight", "bias")


def _save(result: AdapterResult, base: StoredModel, folder: Path) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    weights = {}
    for module, (b, a) in result.factors.items():
        weights[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        weights[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    weights |= {f"base_model.model.{name}": value.contiguous() for name, value in result.whole.items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    ranks = {module: a.shape[0] for module, (_, a) in result.factors.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    other = {module: r for module, r in ranks.items() if r != rank}
    ends = {module.rpartition(".")[2] for module in ranks}
    linear = {name.removesuffix(".weight") for name in base.layout.linear}
    whole = {name for name in linear if name.rpartition(".")[2] in ends} == ranks.keys()
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=other,
        alpha_pattern=other,
        target_modules=sorted(ends if whole else ranks),
        modules_to_save=sorted({name.rpartition(".")[0] for name in result.whole}) or None,
        fan_in_fan_out=any(f"{module}.weight" in base.layout.transposed for module in ranks),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    revision = getattr(base.config, "_commit_hash", None)
    settings |= base_name(base.source, revision, folder, base.config)
    write_json(folder / "adapter_config.json", settings)
