"""Measure on calibration rows what each unit, head, channel and layer of a decoder contributes.

Sources: Minitron, arXiv 2407.14679, section 3 (activations of heads, MLP units and norms); ShortGPT, arXiv 2403.03853
(block influence: 1 - cosine of a layer's input and output).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posttrain.core.errors import ModelError
from posttrain.core.ragged import micro_batches
from posttrain.core.types import Sample
from posttrain.methods.compress.calibration_pass import TOKENS_AT_ONCE, LayerByLayer

INSIDE = {"self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"}, "mlp": {"gate_proj", "up_proj", "down_proj"}}
"""Linear modules of a layer whose units and heads can be removed (Llama, Mistral, Qwen 2 and 3, Gemma and their like)."""


@dataclass(frozen=True)
class Importance:
    """Hold importances by layer; higher is more important.

    Attributes:
        mlp: Of each MLP unit, (I,) for each layer; empty where layers are of another build than `INSIDE`.
        heads: Of each attention head, (heads,) for each layer; likewise.
        hidden_H: Of each channel.
        layers: Of each layer.
    """

    mlp: list[Tensor]
    heads: list[Tensor]
    hidden_H: Tensor
    layers: list[float]


def is_standard(layer: nn.Module) -> bool:
    """Return True if a layer has the linear modules of `INSIDE`, and no others."""
    linears = {name for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
    return linears == {f"{part}.{name}" for part, names in INSIDE.items() for name in names}


def channel_norms(base: Any) -> dict[str, Any]:
    """Return the norms over the channels between layers, by name: modules whose one weight has as many numbers."""
    hidden, found = base.get_input_embeddings().weight.shape[1], {}
    for name, module in base.named_modules():
        weights = dict(module.named_parameters(recurse=False))
        of_heads = name.endswith(("q_norm", "k_norm"))
        if list(weights) == ["weight"] and weights["weight"].shape == (hidden,) and not of_heads:
            found[name] = module
    return found


class TokenSums:
    """Add up, over the tokens of calibration rows, what hooks see."""

    def __init__(self) -> None:
        self.counts_N = torch.empty(0)
        self.totals: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}

    def add(self, key: str, values: Tensor) -> None:
        """Add values of each token, (N,) or (N, channels), each as often as rows have the token."""
        sums = self.counts_N.double() @ values.double()
        self.totals[key] = self.totals[key].add_(sums) if key in self.totals else sums

    def over(self, passes: LayerByLayer, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Run all samples through the model, and return the means of what was added."""
        policy, tokens = passes.policy, 0.0
        split = micro_batches([len(s) for s in samples], TOKENS_AT_ONCE)
        with torch.no_grad():
            for chosen in split if policy.ragged else [[i] for i in range(len(samples))]:
                batch = policy.pack([samples[i] for i in chosen])
                self.counts_N = passes.counts(batch)
                tokens += float(self.counts_N.sum())
                passes.decode(batch)
        return {key: total / tokens for key, total in self.totals.items()}


def measure_importance(
    policy: Any, samples: Sequence[Sample], kind: Literal["contribution", "activation"]
) -> Importance:
    """Measure all importances in one pass over the rows, of the model as it is.

    Args:
        policy: The LanguageModel.
        samples: Calibration rows.
        kind: contribution: of an MLP unit, mean of x^2 times the squared norm of its column of down_proj; of a head,
            mean squared norm of what it adds to the hidden state through o_proj. activation: mean of |x| of the unit's
            activation, and mean norm of the head's output.

    Raises:
        ModelError: No rows, or values that are not finite.
    """
    if not samples:
        raise ModelError("calibration needs at least one row, and got none")
    passes, sums = LayerByLayer(policy), TokenSums()
    norms = channel_norms(policy.base)
    with ExitStack() as stack:
        for number, layer in enumerate(passes.layers):
            for handle in _hooks(number, layer, sums, kind):
                stack.callback(handle.remove)
        for name, module in norms.items():
            stack.callback(module.register_forward_hook(_norm_hook(name, sums)).remove)
        means = sums.over(passes, samples)
    if broken := [key for key, mean in means.items() if not bool(mean.isfinite().all())]:
        raise ModelError(f"the model computes values that are not finite on the calibration rows ({broken[0]})")
    count = range(len(passes.layers))
    whole = all(map(is_standard, passes.layers))
    return Importance(
        [means[f"mlp.{n}"] for n in count] if whole else [],
        [means[f"heads.{n}"] for n in count] if whole else [],
        torch.stack([means[f"out.{name}"] for name in norms]).sum(0) if norms else torch.empty(0),
        [float(means[f"layer.{n}"]) for n in count],
    )


def _hooks(number: int, layer: Any, sums: TokenSums, kind: str) -> list[Any]:
    """Watch a layer's input and output, and the inputs of o_proj and down_proj if it has them."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sums.kept["layer"] = (args[0] if args else kwargs["hidden_states"])[0].float()

    def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        new = (out[0] if isinstance(out, tuple) else out)[0].float()
        sums.add(f"layer.{number}", 1 - torch.cosine_similarity(sums.kept["layer"], new, dim=-1))

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    if not is_standard(layer):
        return handles
    size = layer.self_attn.head_dim

    def mlp(module: nn.Linear, args: tuple[Any, ...]) -> None:
        x = args[0].flatten(0, -2).float()
        if kind == "activation":
            sums.add(f"mlp.{number}", x.abs())
        else:
            sums.add(f"mlp.{number}", x.square() * module.weight.float().square().sum(0))

    def heads(module: nn.Linear, args: tuple[Any, ...]) -> None:
        x = args[0].flatten(0, -2).float().unflatten(1, (-1, size))
        if kind == "activation":
            sums.add(f"heads.{number}", x.norm(dim=-1))
        else:
            weight = module.weight.float().unflatten(1, (-1, size))
            gram = torch.einsum("ohi,ohj->hij", weight, weight)
            sums.add(f"heads.{number}", torch.einsum("nhi,hij,nhj->nh", x, gram, x))

    handles.append(layer.mlp.down_proj.register_forward_pre_hook(mlp))
    handles.append(layer.self_attn.o_proj.register_forward_pre_hook(heads))
    return handles


def measure_norm_scales(policy: Any, samples: Sequence[Sample], kept_H: Tensor) -> dict[str, float]:
    """Return, for each norm, how much larger the root mean square of its input is on some channels than on all.

    It is the mean over tokens of the ratio. What a norm gives on these channels alone is larger by its inverse.

    Args:
        policy: The LanguageModel.
        samples: Calibration rows.
        kept_H: Numbers of the channels.
    """
    sums, norms = TokenSums(), channel_norms(policy.base)

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            squares = args[0].flatten(0, -2).double().square()
            sums.add(name, (squares[:, kept_H].mean(-1) / squares.mean(-1).clamp_min(1e-30)).sqrt())

        return hook

    with ExitStack() as stack:
        for name, module in norms.items():
            stack.callback(module.register_forward_pre_hook(hook_of(name)).remove)
        means = sums.over(LayerByLayer(policy), samples)
    return {name: float(mean) for name, mean in means.items()}


def _norm_hook(name: str, sums: TokenSums) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        sums.add(f"out.{name}", out.flatten(0, -2).float().abs())

    return hook
