"""Update rules of the optimizer by name, from torch and from libraries, with their state made before the first step.

A checkpoint is loaded in place, so all tensors of the state must be there when a run is resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.config import OptimizerConfig
from posttrain.core import distributed
from posttrain.core.errors import RecipeError
from posttrain.trainer.kept_zeros import ZERO_MARK

Group = dict[str, Any]
"""Parameters with their `weight_decay` and the `factor` of their learning rate."""
OF_GROUP = ("k", "weight_sum", "lr_max")
"""Numbers of schedule-free AdamW that are kept for a group, not for a parameter."""


def make_rules(
    config: OptimizerConfig, groups: Sequence[Group], masters: Mapping[str, Tensor], matrices: Collection[str]
) -> list[torch.optim.Optimizer]:
    """Return the optimizers that update the groups: one, but for muon, whose other parameters AdamW updates.

    Args:
        config: Settings.
        groups: The parameters.
        masters: All parameters by name.
        matrices: Names of the parameters inside of decoder layers; muon takes those with two dimensions above 1.

    Raises:
        RecipeError: Several processes train, and the kind is not AdamW: its update needs whole tensors.
    """
    if config.kind != "adamw" and distributed.world() > 1:
        raise RecipeError(
            f"optimizer.kind: {config.kind} works in one process, and this run has {distributed.world()}, which hold "
            "parts of each tensor: use kind: adamw, or start without torchrun"
        )
    if config.kind != "muon":
        return [RULES[config.kind](config, groups)]
    inside = {id(masters[name]) for name in matrices if name in masters}
    hidden, rest = _divided(groups, lambda p: id(p) in inside and p.ndim == 2 and min(p.shape) > 1)
    return [*([_muon(config, hidden)] if hidden else []), *([_adamw(config, rest)] if rest else [])]


def refuse_kept_zeros(config: OptimizerConfig, parameters: Collection[Tensor]) -> None:
    """Raise RecipeError for muon with weights that must stay zero: its update of a matrix has none."""
    if config.kind == "muon" and any(hasattr(p, ZERO_MARK) for p in parameters):
        raise RecipeError("optimizer.kind: muon changes every weight of a matrix: with keep_zeros, use another kind")


def _divided(groups: Sequence[Group], first: Callable[[Tensor], bool]) -> tuple[list[Group], list[Group]]:
    """Return the groups' parameters for which `first` holds, and the others; empty groups are left out."""
    sides = [[{**g, "params": [p for p in g["params"] if first(p) == side]} for g in groups] for side in (True, False)]
    hidden, rest = ([g for g in side if g["params"]] for side in sides)
    return hidden, rest


def _parameters(rule: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in rule.param_groups for p in group["params"]]


def _adamw(config: OptimizerConfig, groups: Sequence[Group]) -> torch.optim.Optimizer:
    everywhere = [p for g in groups for p in g["params"]]
    fused = all(p.device.type in ("cpu", "cuda") for p in everywhere)
    rule = torch.optim.AdamW(list(groups), lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
    for m in everywhere:
        device = m.device if fused else torch.device("cpu")
        rule.state[m] = {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(m, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(m, requires_grad=False),
        }
    return rule


def _muon(config: OptimizerConfig, groups: Sequence[Group]) -> torch.optim.Optimizer:
    # Updates with the root mean square of AdamW's, so that one rate serves for both (arXiv 2502.16982).
    rule = torch.optim.Muon(
        list(groups), lr=config.lr, momentum=config.momentum, adjust_lr_fn="match_rms_adamw", weight_decay=0.0
    )
    for m in _parameters(rule):
        rule.state[m] = {"momentum_buffer": torch.zeros_like(m, requires_grad=False)}
    return rule


def _adafactor(config: OptimizerConfig, groups: Sequence[Group]) -> torch.optim.Optimizer:
    rule = torch.optim.Adafactor(list(groups), lr=config.lr)
    for m in _parameters(rule):
        rule.state[m] = {"step": torch.zeros((), dtype=torch.float32)}
        if m.ndim > 1:
            rule.state[m]["row_var"] = m.detach().new_zeros([*m.shape[:-1], 1])
            rule.state[m]["col_var"] = m.detach().new_zeros([*m.shape[:-2], 1, m.shape[-1]])
        else:
            rule.state[m]["variance"] = torch.zeros_like(m, requires_grad=False)
    return rule


def _adamw8bit(config: OptimizerConfig, groups: Sequence[Group]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    rule: Any = AdamW8bit(list(groups), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0)
    for number, group in enumerate(rule.param_groups):
        for place, m in enumerate(group["params"]):
            rule.init_state(group, m, number, place)
    return rule  # type: ignore[no-any-return]


def _schedule_free(config: OptimizerConfig, groups: Sequence[Group]) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    # foreach would hold a copy of all gradients while it updates.
    rule: Any = AdamWScheduleFree(list(groups), lr=config.lr, betas=config.betas, eps=config.eps, foreach=False)
    for m in _parameters(rule):
        rule.state[m] = {"z": m.detach().clone(), "exp_avg_sq": torch.zeros_like(m, requires_grad=False)}
    return rule  # type: ignore[no-any-return]


RULES: dict[str, Callable[[OptimizerConfig, Sequence[Group]], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "adamw8bit": _adamw8bit,
    "schedule_free": _schedule_free,
}


class RuleState:
    """Read and write the state of the rules as tensors by name; numbers go as tensors of one value."""

    def __init__(self, rules: Sequence[torch.optim.Optimizer], masters: Mapping[str, Tensor]) -> None:
        self.rules, self.masters = rules, masters
        self.numbers: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors themselves, and copies of the numbers, which `load_numbers` reads again."""
        out: dict[str, Tensor] = {}
        self.numbers = {}
        for name, m in self.masters.items():
            for rule in self.rules:
                for key, value in rule.state.get(m, {}).items():
                    if isinstance(value, Tensor):
                        out[f"{key}.{name}"] = value
                    else:
                        self.numbers[f"{key}.{name}"] = torch.tensor(float(value), dtype=torch.float64)
        for key, group, name in self._group_numbers():
            self.numbers[key] = torch.tensor(float(group[name]), dtype=torch.float64)
        return out | self.numbers

    def load_numbers(self) -> None:
        """Take over the numbers, after the tensors of `state_dict()` were overwritten."""
        for name, m in self.masters.items():
            for rule in self.rules:
                for key, value in rule.state.get(m, {}).items():
                    if not isinstance(value, Tensor):
                        rule.state[m][key] = type(value)(self.numbers[f"{key}.{name}"].item())
        for key, group, name in self._group_numbers():
            group[name] = type(group[name])(self.numbers[key].item())

    def _group_numbers(self) -> list[tuple[str, Group, str]]:
        return [
            (f"group.{r}.{g}.{name}", group, name)
            for r, rule in enumerate(self.rules)
            for g, group in enumerate(rule.param_groups)
            for name in OF_GROUP
            if name in group
        ]
