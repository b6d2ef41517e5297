"""Find where the scales of AWQ go: layers whose outputs can be divided by what later columns are multiplied by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.core.types import Sample
from posttrain.models.language_model import LanguageModel

FOLD_SOURCES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("input_layernorm", ("self_attn.qkv_proj",)),
    ("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("post_attention_layernorm", ("mlp.gate_up_proj",)),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("mlp.up_proj", ("mlp.down_proj",)),
)
"""What may be divided -> the linear layers that multiply its output. Each is tried on the model before it is used."""
PROBED_TOKENS = 12
FOLD_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Fold:
    """Hold a place for scales in one decoder layer.

    Attributes:
        source: The norm or linear layer whose output is divided.
        targets: The linear layers whose columns are multiplied, by name in the decoder layer.
        shift: What is added to the source's weight when it runs: 1 for norms of Gemma.
        repeats: Heads of the targets' columns that one head of the source gives.
        size: Columns of a head.
    """

    source: nn.Module
    targets: dict[str, nn.Linear]
    shift: float = 0.0
    repeats: int = 1
    size: int = 1

    @torch.no_grad()
    def apply(self, scales_I: Tensor) -> None:
        """Multiply the targets' columns by scales, and divide the source's outputs by them."""
        for target in self.targets.values():
            target.weight.mul_(scales_I.to(target.weight))
        weight, bias = self.source.weight, getattr(self.source, "bias", None)
        assert isinstance(weight, Tensor)
        own = scales_I.to(weight)
        if self.repeats > 1:
            own = own.view(-1, self.repeats, self.size)[:, 0].reshape(-1)
        if weight.ndim == 1:
            weight.add_(self.shift).div_(own).sub_(self.shift)
        else:
            weight.div_(own[:, None])
        if isinstance(bias, Tensor):
            bias.div_(own)


def find_folds(policy: LanguageModel, layers: Sequence[nn.Module]) -> list[list[Fold]]:
    """Return the places for scales in each decoder layer that leave the model's outputs as they are.

    Each kind is tried with random scales in all layers at once, and kept if the outputs stay the same.

    Args:
        policy: The model.
        layers: Its decoder layers.
    """
    found: list[list[Fold]] = [[] for _ in layers]
    taken: list[set[str]] = [set() for _ in layers]
    for source, targets in FOLD_SOURCES:
        for shift in (0.0, 1.0):
            folds = [_fold(layer, source, targets, shift) for layer in layers]
            free = [f if f is not None and not set(f.targets) & t else None for f, t in zip(folds, taken, strict=True)]
            if any(free) and _is_kept(policy, [f for f in free if f is not None]):
                for mine, names, fold in zip(found, taken, free, strict=True):
                    if fold is not None:
                        mine.append(fold)
                        names.update(fold.targets)
                break
            if not any(free) or isinstance(next(f for f in free if f is not None).source, nn.Linear):
                break
    return found


def _fold(layer: nn.Module, source: str, targets: Sequence[str], shift: float) -> Fold | None:
    """Return a place by names, if the layer has them and the sizes fit."""
    modules = dict(layer.named_modules())
    first, linears = modules.get(source), {n: m for n in targets if type(m := modules.get(n)) is nn.Linear}
    weight = getattr(first, "weight", None)
    if first is None or len(linears) != len(targets) or not isinstance(weight, Tensor):
        return None
    widths = {m.in_features for m in linears.values()}
    if len(widths) != 1:
        return None
    width, rows = widths.pop(), len(weight)
    if width == rows:
        return Fold(first, linears, shift)
    size: Any = getattr(modules.get("self_attn"), "head_dim", None)
    if weight.ndim == 2 and isinstance(size, int) and width % rows == 0 and rows % size == 0:
        return Fold(first, linears, shift, width // rows, size)
    return None


@torch.no_grad()
def _is_kept(policy: LanguageModel, folds: Sequence[Fold]) -> bool:
    """Return True if scales at these places leave the model's outputs as they are; its weights are put back."""
    before = [(m, {n: p.detach().clone() for n, p in m.named_parameters(recurse=False)}) for m in _touched(folds)]
    expected = _outputs(policy)
    generator = torch.Generator().manual_seed(0)
    for fold in folds:
        width = next(iter(fold.targets.values())).in_features
        scales = torch.rand(width, generator=generator) * 1.5 + 0.5
        if fold.repeats > 1:
            scales = scales.view(-1, fold.repeats, fold.size)[:, :1].expand(-1, fold.repeats, -1).reshape(-1)
        fold.apply(scales)
    found = _outputs(policy)
    for module, weights in before:
        for name, weight in weights.items():
            getattr(module, name).copy_(weight)
    limit = FOLD_TOLERANCE if expected.dtype == torch.float32 else 30 * FOLD_TOLERANCE
    return bool(torch.isfinite(found).all()) and float((found - expected).abs().max()) <= limit * float(
        expected.abs().max()
    )


def _touched(folds: Sequence[Fold]) -> list[nn.Module]:
    return list({id(m): m for f in folds for m in (f.source, *f.targets.values())}.values())


def _outputs(policy: LanguageModel) -> Tensor:
    """Return the final hidden states of a few tokens from the whole vocabulary."""
    rows = policy.base.get_input_embeddings().weight.shape[0]
    tokens = torch.linspace(1, rows - 1, PROBED_TOKENS).long().tolist()
    return policy.hidden_T_H(policy.pack([Sample(tokens, [0.0] * (PROBED_TOKENS - 1) + [1.0])]))[:PROBED_TOKENS]
