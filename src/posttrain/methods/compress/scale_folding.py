"""Find where the scales of AWQ go: layers whose outputs can be divided by what later columns are multiplied by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.core.types import Sample
from posttrain.models.language_model import LanguageModel
from posttrain.models.weight_matrices import LayerMatrix, matrices_of

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
FOLDS_OF_EXPERTS = (("gate_up_proj", "down_proj"), ("up_proj", "down_proj"))
"""The same within an expert, by parameters that hold all experts of a layer: the last rows of the first are divided."""
PROBED_TOKENS = 12
FOLD_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Fold:
    """Hold a place for scales in one decoder layer.

    Attributes:
        source: The norm whose output is divided, or the matrix, of whose output the last columns are.
        targets: The matrices whose columns are multiplied, by name in the decoder layer.
        shift: What is added to the source's weight when it runs: 1 for norms of Gemma.
        repeats: Heads of the targets' columns that one head of the source gives.
        size: Columns of a head.
    """

    source: nn.Module | LayerMatrix
    targets: dict[str, LayerMatrix]
    shift: float = 0.0
    repeats: int = 1
    size: int = 1

    @property
    def width(self) -> int:
        """Return the number of columns that are multiplied."""
        return next(iter(self.targets.values())).weight_O_I.shape[1]

    @torch.no_grad()
    def apply(self, scales_I: Tensor) -> None:
        """Multiply the targets' columns by scales, and divide the source's outputs by them."""
        for target in self.targets.values():
            target.weight_O_I.mul_(scales_I.to(target.weight_O_I))
        own = scales_I
        if self.repeats > 1:
            own = own.view(-1, self.repeats, self.size)[:, 0].reshape(-1)
        if isinstance(self.source, LayerMatrix):
            rows = self.source.weight_O_I[-len(own) :]
            rows.div_(own.to(rows)[:, None])
            bias = None if self.source.expert is not None else self.source.module.bias
        else:
            weight, bias = self.source.weight, getattr(self.source, "bias", None)
            assert isinstance(weight, Tensor)
            weight.add_(self.shift).div_(own.to(weight)).sub_(self.shift)
        if isinstance(bias, Tensor):
            bias.div_(own.to(bias))


def find_folds(policy: LanguageModel, layers: Sequence[nn.Module]) -> list[list[Fold]]:
    """Return the places for scales in each decoder layer that leave the model's outputs as they are.

    Each kind is tried with random scales in all layers at once, and kept if the outputs stay the same.

    Args:
        policy: The model.
        layers: Its decoder layers.
    """
    found: list[list[Fold]] = [[] for _ in layers]
    for source, targets in FOLD_SOURCES:
        for shift in (0.0, 1.0):
            folds = [_fold(layer, source, targets, shift) for layer in layers]
            norms = [f for f in folds if f is not None and not isinstance(f.source, LayerMatrix)]
            if _take(policy, found, [[] if f is None else [f] for f in folds]) or not norms:
                break
    for i, layer in enumerate(layers):  # one at a time: what a trial changes is copied, and experts are most of a model
        _take(policy, [found[i]], [_folds_of_experts(layer)])
    return found


def _take(policy: LanguageModel, found: list[list[Fold]], tried: Sequence[Sequence[Fold]]) -> bool:
    """Add the places in each layer that change nothing and whose targets have no place yet; return True if any."""
    taken = [{name for fold in own for name in fold.targets} for own in found]
    free = [[f for f in own if not set(f.targets) & names] for own, names in zip(tried, taken, strict=True)]
    together = [f for own in free for f in own]
    if not together or not _is_kept(policy, together):
        return False
    for own, more in zip(found, free, strict=True):
        own.extend(more)
    return True


def _fold(layer: nn.Module, source: str, targets: Sequence[str], shift: float) -> Fold | None:
    """Return a place by names, if the layer has them and the sizes fit."""
    modules = dict(layer.named_modules())
    linears = {n: LayerMatrix(n, m) for n in targets if type(m := modules.get(n)) is nn.Linear}
    first, weight = modules.get(source), getattr(modules.get(source), "weight", None)
    if first is None or len(linears) != len(targets) or not isinstance(weight, Tensor):
        return None
    widths = {m.weight_O_I.shape[1] for m in linears.values()}
    if len(widths) != 1:
        return None
    width, rows = widths.pop(), len(weight)
    place = first if weight.ndim == 1 else LayerMatrix(source, first)
    if width == rows:
        return Fold(place, linears, shift)
    size: Any = getattr(modules.get("self_attn"), "head_dim", None)
    if weight.ndim == 2 and isinstance(size, int) and width % rows == 0 and rows % size == 0:
        return Fold(place, linears, shift, width // rows, size)
    return None


def _folds_of_experts(layer: nn.Module) -> list[Fold]:
    """Return the places within the experts of a layer, where the parameter before has as many rows, or twice as many.

    An expert with a gate computes down(act(gate) * up), which is linear in up: the last rows of "gate_up_proj".
    """
    matrices = {m.name: m for m in matrices_of(layer) if m.expert is not None}
    found = []
    for name, target in matrices.items():
        owner, own = name.removesuffix(f".{target.parameter}.{target.expert}"), target.parameter
        for before in (before for before, after in FOLDS_OF_EXPERTS if after == own):
            source = matrices.get(f"{owner}.{before}.{target.expert}")
            if source is None or hasattr(target.module, f"{before}_bias"):
                continue
            if source.weight_O_I.shape[0] in (target.weight_O_I.shape[1], 2 * target.weight_O_I.shape[1]):
                found.append(Fold(source, {name: target}))
    return found


@torch.no_grad()
def _is_kept(policy: LanguageModel, folds: Sequence[Fold]) -> bool:
    """Return True if scales at these places leave the model's outputs as they are; its weights are put back."""
    before = [(m, {n: p.detach().clone() for n, p in m.named_parameters(recurse=False)}) for m in _touched(folds)]
    expected = _outputs(policy)
    generator = torch.Generator().manual_seed(0)
    for fold in folds:
        scales = torch.rand(fold.width, generator=generator) * 1.5 + 0.5
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
    places = [place for fold in folds for place in (fold.source, *fold.targets.values())]
    modules = [place.module if isinstance(place, LayerMatrix) else place for place in places]
    return list({id(module): module for module in modules}.values())


def _outputs(policy: LanguageModel) -> Tensor:
    """Return the final hidden states of a few tokens from the whole vocabulary."""
    rows = policy.base.get_input_embeddings().weight.shape[0]
    tokens = torch.linspace(1, rows - 1, PROBED_TOKENS).long().tolist()
    return policy.hidden_T_H(policy.pack([Sample(tokens, [0.0] * (PROBED_TOKENS - 1) + [1.0])]))[:PROBED_TOKENS]
