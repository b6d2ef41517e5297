"""The optimizer with float32 master weights, its schedule, and clipping."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from posttrain.config import OptimizerConfig
from posttrain.core.distributed import all_gather_object, full_tensor, local_part
from posttrain.trainer.kept_zeros import clear_marked
from posttrain.trainer.update_rules import RuleState, make_rules, refuse_kept_zeros


def lr_at(step: int, total: int, config: OptimizerConfig) -> float:
    """Compute the learning rate of a step.

    Warm-up: lr (step + 1) / (w + 1) while step < w. After it, with t = (step - w) / (total - w):
    constant: lr; linear: lr - (lr - min_lr) t; cosine: min_lr + (lr - min_lr) (1 + cos(pi t)) / 2.
    wsd (warmup-stable-decay, arXiv 2404.06395): lr, and in the last d steps
    min_lr + (lr - min_lr) (total - step) / (d + 1), so that each of them is below lr and none is min_lr yet.
    A total of 0 steps, or one all warm-up, never divides by zero.

    Args:
        step: 0 .. total - 1.
        total: Number of steps.
        config: Settings; `warmup` (and `decay`) below 1 is a fraction of `total`, of which a step is left even if it
            rounds to none.
    """
    warmup = _step_count(config.warmup, total)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    t = min(1.0, (step - warmup) / max(1, total - warmup))
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        decay = _step_count(config.decay, total)
        return config.min_lr + (config.lr - config.min_lr) * min(1.0, (total - step) / (decay + 1))
    if config.schedule == "linear":
        return config.lr - (config.lr - config.min_lr) * t
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * t))


def _step_count(setting: float, total: int) -> int:
    return max(1, round(setting * total)) if 0 < setting < 1 else int(setting)


class Optimizer:
    """Update float32 masters of the trainable parameters (the parameters themselves if they are float32).

    If parameters are 16-bit, each micro-batch's gradient is added into a float32 one as soon as backward has made
    it, so that neither accumulation nor update loses bits. With schedule-free AdamW the parameters are the average
    between steps, and from `begin` to `clear` the point at which its gradient is taken.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        config: OptimizerConfig,
        rates: Mapping[str, float] | None = None,
        matrices: Collection[str] = (),
    ) -> None:
        """Make the optimizer.

        Args:
            named: Parameters by name.
            config: Settings.
            rates: Factor of the learning rate of parameters whose name begins with a prefix.
            matrices: Names of the parameters inside of decoder layers, whose matrices muon takes.
        """
        self.config = config
        self.parameters = {name: p for name, p in named if p.requires_grad}
        if not self.parameters:
            raise ValueError("nothing to train: no parameter requires a gradient")
        self.masters: dict[str, Tensor] = {}
        places = _places([p for p in self.parameters.values() if p.dtype == torch.float32])
        self.places = [(p, places[id(p)]) for p in self.parameters.values() if id(p) in places]
        for name, p in self.parameters.items():
            if p.dtype == torch.float32:
                self.masters[name] = p
                if id(p) in places:
                    p.register_post_accumulate_grad_hook(_to(places[id(p)]))
                continue
            master = p.detach().float().requires_grad_()
            self.masters[name] = master
            p.register_post_accumulate_grad_hook(_into(master))
        factors = {"": 1.0, **(rates or {})}
        self.sets: dict[str, list[str]] = {prefix: [] for prefix in factors}
        for name in self.masters:
            self.sets[max((p for p in factors if name.startswith(p)), key=len)].append(name)
        groups = []
        for prefix, names in self.sets.items():
            for decays in (True, False):
                chosen = [self.masters[n] for n in names if (self.masters[n].ndim >= 2) == decays]
                decay = config.weight_decay if decays else 0.0
                if chosen:
                    groups.append({"params": chosen, "weight_decay": decay, "factor": factors[prefix]})
        refuse_kept_zeros(config, self.parameters.values())
        self.rules = make_rules(config, groups, self.masters, matrices)
        self.state = RuleState(self.rules, self.masters)

    def gradient_norms(self) -> dict[str, Tensor]:
        """Return the global norm of each set's gradients, on the device, by the set's prefix (every rank must call).

        Weights that keep a zero have no gradient from here on (`kept_zeros`).
        """
        for name, parameter in self.parameters.items():
            clear_marked(parameter, self.masters[name].grad)
        gradients = {prefix: self._gradients(prefix) for prefix in self.sets}
        return {p: full_tensor(torch.nn.utils.get_total_norm(g)) for p, g in gradients.items() if g}

    def clip(self, norms: Mapping[str, float]) -> float:
        """Scale the gradients of each set to the configured global norm, given the norms that they have.

        Returns:
            The main set's norm before clipping, or one that is not finite.
        """
        largest = self.config.max_grad_norm
        for prefix, norm in norms.items():
            if largest and largest < norm < math.inf:
                torch._foreach_mul_(self._gradients(prefix), largest / (norm + 1e-6))
        infinite = [norm for norm in norms.values() if not math.isfinite(norm)]
        return infinite[-1] if infinite else norms.get("", 0.0)

    def _gradients(self, prefix: str) -> list[Tensor]:
        return [g for n in self.sets[prefix] if (g := self.masters[n].grad) is not None]

    def step(self, lr: float) -> None:
        """Update once at this learning rate, and clear the gradients."""
        for rule in self.rules:
            for group in rule.param_groups:
                group["lr"] = lr * group["factor"]
            rule.step()
        if not self.averages:
            self._copy_masters()
        self.clear()

    @property
    def averages(self) -> bool:
        """Return True if the parameters are other ones between steps than while gradients are taken."""
        return self.config.kind == "schedule_free"

    def begin(self) -> None:
        """Put the parameters at the point where the next gradient is taken."""
        if self.averages:
            for rule in self.rules:
                rule.train()  # type: ignore[attr-defined]
            self._copy_masters()

    def _copy_masters(self) -> None:
        low = [(p, self.masters[n]) for n, p in self.parameters.items() if self.masters[n] is not p]
        if low:
            with torch.no_grad():
                torch._foreach_copy_([p for p, _ in low], [m for _, m in low])

    def clear(self) -> None:
        """Forget the gradients, and put the parameters back to where they are between steps."""
        if self.averages:
            for rule in self.rules:
                rule.eval()  # type: ignore[attr-defined]
            self._copy_masters()
        for name, p in self.parameters.items():
            p.grad = None
            self.masters[name].grad = None

    def not_finite(self) -> list[str]:
        """Return the names of the weights with an infinite or NaN value (every rank must call)."""
        weights = {name: local_part(p.detach()) for name, p in self.parameters.items()}
        weights = {name: w for name, w in weights.items() if w.numel()}  # a rank may hold nothing of a small weight
        broken: list[str] = []
        if not math.isfinite(float(torch.nn.utils.get_total_norm(weights.values(), math.inf))):
            broken = [name for name, w in weights.items() if not bool(w.isfinite().all())]
        return list(dict.fromkeys(name for names in all_gather_object(broken) for name in names))

    def state_dict(self) -> dict[str, Tensor]:
        """Return master weights and moments by name; the tensors themselves, so that they can be loaded in place."""
        return {f"weight.{name}": m.detach() for name, m in self.masters.items()} | self.state.state_dict()

    def update_parameters(self) -> None:
        """Copy the masters to the working weights, after `state_dict()`'s tensors were overwritten."""
        self.state.load_numbers()
        with torch.no_grad():
            for name, p in self.parameters.items():
                if self.masters[name] is not p:
                    p.copy_(self.masters[name])


def _places(parameters: Sequence[nn.Parameter]) -> dict[int, Tensor]:
    """Allocate each parameter's gradient on a CPU in one block of memory, once; by the parameter's id.

    Gradients live longer than the activations among which backward makes them. Left where they are made they cut the
    heap into pieces that the next pass's activations don't fit: a gigabyte for a model of half of one.
    """
    plain = [p for p in parameters if type(p.data) is Tensor and p.device.type == "cpu"]
    block = torch.empty(sum(p.numel() for p in plain))
    return {id(p): part.view(p.shape) for p, part in zip(plain, block.split([p.numel() for p in plain]), strict=True)}


def _to(place: Tensor):  # type: ignore[no-untyped-def]
    def hook(p: Tensor) -> None:
        if p.grad is not None and p.grad is not place:
            p.grad = place.copy_(p.grad)

    return hook


def _into(master: Tensor):  # type: ignore[no-untyped-def]
    def hook(p: Tensor) -> None:
        if p.grad is not None:
            master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
            p.grad = None

    return hook
