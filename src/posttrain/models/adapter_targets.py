"""The weights that low-rank adapters change by default, the same rule for every model type.

`all-linear` is every linear layer of the decoder (attention, MLPs, shared experts, state-space layers) and the matrices
of all experts, without the output head and without the routers that choose experts. peft's own rule depends on how a
type was written: in some types it leaves experts or shared experts out, in others it adapts the router.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from posttrain.models.model_types import decoder_of

ROUTERS = {"gate", "router", "gating", "wg", "router_gate", "shared_expert_gate", "router_mlp", "gate_logits"}
"""Names of routers, and of gates that weight a shared expert, next to the experts."""
MAMBA_OF_PEFT = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Types whose output projection after a state space peft refuses."""
HEADS = ("score", "classifier", "lm_head")


def default_targets(hf: Any) -> tuple[str | list[str], list[str]]:
    """Return what `all-linear` stands for as peft's (target_modules, target_parameters).

    A model without experts keeps peft's own word. What peft takes for the experts' layers of an older transformers, by
    its name, is targeted by its parameter.

    Args:
        hf: A transformers model.
    """
    experts = [name for name, parameter in hf.named_parameters() if is_experts_weight(hf, name, parameter)]
    linears = {name for name, module in hf.named_modules() if is_linear(module)}
    routers, head, decoder = router_names(hf), hf.get_output_embeddings(), decoder_of(hf)
    inside = {id(m) for m in decoder.modules()} - {id(head)}
    left_out = {n for n in linears if any(n == r or n.startswith(f"{r}.") for r in routers)}
    left_out |= {n for n in linears if id(hf.get_submodule(n)) not in inside}
    left_out |= {n for n in linears if _read_directly(hf, n)}
    own = {n for n, m in hf.named_modules() if m is head or n in HEADS}
    if not experts and not left_out - own:
        return "all-linear", []
    linears -= left_out | own
    taken = {n for n in linears if n.rsplit(".", 1)[-1] in _renamed_by_peft(hf)}
    parameters = [*experts, *(f"{n}.weight" for n in taken)]
    modules = [n for n, _ in hf.named_modules()]
    return (
        _short(linears - taken, modules, lambda full, end: full == end or full.endswith(f".{end}")),
        _short(parameters, [n for n, _ in hf.named_parameters()], lambda full, end: full.endswith(f".{end}")),
    )


def is_linear(module: nn.Module) -> bool:
    """Return True for a linear layer that an adapter can sit on, quantised ones included."""
    name = type(module).__name__
    return isinstance(module, nn.Linear) or name == "Conv1D" or (hasattr(module, "in_features") and "Linear" in name)


def is_experts_weight(hf: Any, name: str, parameter: torch.Tensor) -> bool:
    """Return True for the matrices of all experts of a layer, which are one parameter of three dimensions.

    Args:
        hf: A transformers model.
        name: Name of the parameter in it.
        parameter: The parameter.
    """
    owner, _, last = name.rpartition(".")
    module = hf.get_submodule(owner)
    named = "Expert" in type(module).__name__ or owner.endswith("experts")
    return named and parameter.ndim == 3 and parameter.is_floating_point() and "bias" not in last


def router_names(hf: Any) -> set[str]:
    """Return the names of the modules that choose or weight experts."""
    found = set()
    for name, module in hf.named_modules():
        parent, _, last = name.rpartition(".")
        named = last in ROUTERS or "Router" in type(module).__name__ or "Gating" in type(module).__name__
        if named and any("Expert" in type(m).__name__ or n.endswith("experts") for n, m in _inside(hf, parent)):
            found.add(name)
    return found


def _read_directly(hf: Any, name: str) -> bool:
    """Return True for a linear layer whose weight the model reads without running it, or that peft refuses to adapt."""
    parent, _, last = name.rpartition(".")
    mixer = "Mamba" in type(hf.get_submodule(parent)).__name__ or "Mixer" in type(hf.get_submodule(parent)).__name__
    return mixer and (last == "dt_proj" or (last == "out_proj" and hf.config.model_type in MAMBA_OF_PEFT))


def _inside(hf: Any, name: str) -> Iterable[tuple[str, nn.Module]]:
    return hf.get_submodule(name).named_modules() if name else hf.named_modules()


def _renamed_by_peft(hf: Any) -> set[str]:
    """Return names of layers that peft turns into parameters of the experts, for this model type."""
    from peft import LoraConfig
    from peft.utils import transformers_weight_conversion as conversion

    names = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate"}
    left = LoraConfig(target_modules=set(names))
    conversion.convert_peft_config_for_transformers(left, hf, conversion.get_model_conversion_mapping(hf))
    return names - set(left.target_modules or ())


def _short(wanted: Iterable[str], known: list[str], matches: Callable[[str, str], bool]) -> list[str]:
    """Return the shortest ends of names that select these of the known names and no others."""
    wanted, ends = set(wanted), set()
    for name in wanted:
        parts = name.split(".")
        for k in range(1, len(parts) + 1):
            end = ".".join(parts[-k:])
            if all(full in wanted for full in known if matches(full, end)) and any(matches(f, end) for f in known):
                ends.add(end)
                break
    return sorted(ends)
