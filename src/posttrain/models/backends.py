"""Choose how a device computes: plain PyTorch everywhere, compiled kernels and fused modules on a CPU and on CUDA.

This is the only module that imports `posttrain.cpu` and `posttrain.cuda`, and it does so the first time that a model on
such a device is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.core.transfer import to_device
from posttrain.losses.linear_logprobs import Head, linear_cross_entropy, linear_logprobs
from posttrain.models.quantized_weight import QuantizedWeight, quantized_modules

if TYPE_CHECKING:
    from posttrain.models.attention import Plan

Product = Callable[[Tensor, Tensor], Tensor]
"""(x, weight) -> x weight^T."""


@dataclass(frozen=True)
class PackedAlone:
    """Hold a quantised weight for a module that does without the dense one.

    Attributes:
        placeholder: Takes the place of the module's weight; it has no memory.
        attach: Lets the module whose weight that is compute with the packed one.
    """

    placeholder: Tensor
    attach: Callable[[nn.Module], None]


class DeviceBackend:
    """Compute with plain PyTorch operations, on any device. Methods that return None leave the work to the caller."""

    tile = 1
    """A batch is computed in multiples of this many tokens."""
    fused = False
    """Norms and gated MLPs keep only their inputs for backward."""

    def tune(self) -> None:
        """Set up the process for models on this device."""

    def replace_forwards(self, model: nn.Module) -> None:
        """Give modules faster forwards of the same results, in place."""

    def fuse_layers(self, model: nn.Module, attend: Callable[..., Tensor], plan: Plan) -> None:
        """Give decoder layers faster forwards of the same results, in place.

        Args:
            model: A model whose attention takes ragged batches.
            attend: `posttrain.models.attention.attend_rows`.
            plan: A plan of a small batch, on which both forwards are compared.
        """

    def pack_weights(self, model: nn.Module) -> int:
        """Set up weights in few bits for decoding; return how many products will read them."""
        return 0

    def pack_alone(self, module: nn.Module, weight: QuantizedWeight) -> PackedAlone | None:
        """Return how a module can hold a quantised weight without the dense one; None: it needs the dense one.

        Args:
            module: A module like the one that will hold it; its own weight may be on the device "meta".
            weight: The weight.
        """
        return None

    def pack_experts(self, module: nn.Module, parameter: str, weights: list[QuantizedWeight]) -> PackedAlone | None:
        """Do what `pack_alone` does for a parameter that holds the matrices of all experts.

        Args:
            module: A module like the one that will hold them.
            parameter: Name of the parameter.
            weights: The weight of each expert.
        """
        return None

    def packed_bytes(self, weight: Tensor) -> int:
        """Return the bytes of a weight that is held packed only; 0 for any other."""
        return 0

    def whole(self, weight: Tensor) -> Tensor:
        """Return a weight as floats, also if it is held packed only."""
        return weight

    def lean(self) -> AbstractContextManager[None]:
        """Return a context for forward passes with gradients in which cheap activations are recomputed."""
        return nullcontext()

    def logprobs(
        self, hidden_N_H: Tensor, head: Head, targets_N: Tensor, temperature: float | Tensor, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """Compute `linear_logprobs`.

        Args:
            hidden_N_H: As there, and so the others.
            head: Likewise.
            targets_N: Likewise.
            temperature: Likewise.
            entropy: Likewise.
        """
        return linear_logprobs(hidden_N_H, head, targets_N, temperature, entropy)

    def cross_entropy(
        self, hidden_N_H: Tensor, head: Head, targets_N: Tensor, coefficients_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute `linear_cross_entropy`.

        Args:
            hidden_N_H: As there, and so the others.
            head: Likewise.
            targets_N: Likewise.
            coefficients_N: Likewise.
        """
        return linear_cross_entropy(hidden_N_H, head, targets_N, coefficients_N)

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Plan, window: int | None, scale: float
    ) -> Tensor | None:
        """Compute attention over a ragged batch: (1, heads, T, size) in, (1, T, heads, size) out.

        Args:
            query: Queries.
            key: Keys.
            value: Values.
            plan: The batch.
            window: Sliding window (None: none).
            scale: Multiplies the scores.
        """
        return None

    def linear(self, rows: int) -> Product:
        """Return the function for products of this many rows where no gradient is needed."""
        return F.linear

    def decode_attention(
        self, step: Any, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float
    ) -> Tensor | None:
        """Compute attention of one new token of each sequence.

        Args:
            step: A `posttrain.sampling.kv_cache.Step`.
            query: (1, heads, M, size).
            key: (1, key heads, M, size).
            value: (1, key heads, M, size).
            window: Sliding window (None: none).
            scale: Multiplies the scores.
        """
        return None

    def small_products(self) -> AbstractContextManager[None]:
        """Return a context for batches of small matrix products."""
        return nullcontext()

    def draw(self, logits_M_V: Tensor, uniforms_M: Tensor) -> tuple[Tensor, Tensor] | None:
        """Draw one token a row, by the inverse of the cumulative distribution; with its log-probability."""
        return None

    def describe(self) -> dict[str, str]:
        """Return what computes, for manifests and `posttrain doctor`."""
        return {"float32_products": "default", "decoding": "torch"}


class CPUBackend(DeviceBackend):
    """Compute on a CPU, with `posttrain.cpu`."""

    tile = 32

    def __init__(self) -> None:
        from posttrain.cpu import (
            decoder_layer,
            fused_modules,
            library,
            lm_head,
            matmul,
            packed_experts,
            quantized_matmul,
            recompute,
            tiled_attention,
        )

        self.decoder_layer, self.fused_modules, self.library = decoder_layer, fused_modules, library
        self.matmul, self.recompute, self.tiled_attention = matmul, recompute, tiled_attention
        self.quantized_matmul, self.packed_experts = quantized_matmul, packed_experts
        self.logprobs, self.cross_entropy = lm_head.head_logprobs, lm_head.head_cross_entropy  # type: ignore[method-assign]
        self.small_products = matmul.small_products  # type: ignore[method-assign]

    def tune(self) -> None:
        self.matmul.tune()

    def replace_forwards(self, model: nn.Module) -> None:
        self.fused_modules.fuse(model)
        self.decoder_layer.speed_up(model)

    def pack_weights(self, model: nn.Module) -> int:
        return self.quantized_matmul.pack_modules([(m, w) for _, m, w in quantized_modules(model)])

    def pack_alone(self, module: nn.Module, weight: QuantizedWeight) -> PackedAlone | None:
        packed = self.quantized_matmul.pack_alone(module, weight)
        if packed is None:
            return None

        def attach(module: nn.Module) -> None:
            self.quantized_matmul.hold_packed(module, packed)
            self.fused_modules.compute_packed(module)

        return PackedAlone(self.quantized_matmul.placeholder(*weight.shape), attach)

    def pack_experts(self, module: nn.Module, parameter: str, weights: list[QuantizedWeight]) -> PackedAlone | None:
        packed = self.packed_experts.pack_experts(module, parameter, weights)
        if packed is None:
            return None

        def attach(module: nn.Module) -> None:
            self.packed_experts.compute_packed_experts(module, parameter, packed)

        return PackedAlone(self.packed_experts.experts_placeholder(packed), attach)

    def packed_bytes(self, weight: Tensor) -> int:
        experts = getattr(weight, self.packed_experts.EXPERTS_HOME, None)
        return self.quantized_matmul.packed_bytes(weight) if experts is None else experts.nbytes

    def whole(self, weight: Tensor) -> Tensor:
        return self.quantized_matmul.whole(weight)

    def lean(self) -> AbstractContextManager[None]:
        return self.recompute.cheap_results()

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Plan, window: int | None, scale: float
    ) -> Tensor | None:
        if query.shape[-1] != value.shape[-1]:
            return None
        arguments = *(x[0].float() for x in (query, key, value)), plan, window, scale
        return self.tiled_attention.TreeAttention.apply(*arguments).transpose(0, 1)[None].to(query.dtype)  # type: ignore[no-any-return]

    def linear(self, rows: int) -> Product:
        # Without kernels the result is a transposed view, whose copy costs more than is gained where rows are many.
        few = self.matmul.FEW_ROWS if self.library.kernels() is not None else self.matmul.FEW_ROWS // 4
        return self.matmul.linear if rows <= few else self.matmul.linear_of_many

    def decode_attention(
        self, step: Any, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float
    ) -> Tensor | None:
        plain = query.dtype == torch.float32 and query.shape[-1] == value.shape[-1]
        kernels = self.library.kernels() if plain else None
        if kernels is None:
            return None
        q, k, v = (x[0] if x.stride(-1) == 1 else x[0].contiguous() for x in (query, key, value))
        own, shared, columns, prompts = step.places(k, v)
        return kernels.attend(q, k, v, own, shared, columns, prompts, window, scale)[None]

    def draw(self, logits_M_V: Tensor, uniforms_M: Tensor) -> tuple[Tensor, Tensor] | None:
        kernels = self.library.kernels() if logits_M_V.is_contiguous() else None
        return None if kernels is None else kernels.draw(logits_M_V, uniforms_M)

    def describe(self) -> dict[str, str]:
        return {"float32_products": self.matmul.matmul_route(), "decoding": self.library.why()}


class CUDABackend(DeviceBackend):
    """Compute on an NVIDIA GPU, with the Triton kernels of `posttrain.cuda`."""

    fused = True

    def __init__(self) -> None:
        from posttrain.cuda import decoding_kernels, fused_forwards, fused_layer, vocabulary_loss

        device = torch.device("cuda")
        fused_forwards.check_kernels(device)
        decoding_kernels.check_decoding(device)
        self.fused_forwards, self.fused_layer, self.decoding_kernels = fused_forwards, fused_layer, decoding_kernels
        self.logprobs, self.cross_entropy = vocabulary_loss.fused_logprobs, vocabulary_loss.fused_cross_entropy  # type: ignore[method-assign]

    def replace_forwards(self, model: nn.Module) -> None:
        self.fused_forwards.fuse_forwards(model)

    def fuse_layers(self, model: nn.Module, attend: Callable[..., Tensor], plan: Plan) -> None:
        self.fused_layer.fuse_layers(model, attend, plan, plan.batch.total)

    def decode_attention(
        self, step: Any, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float
    ) -> Tensor | None:
        columns = step.own_columns + step.prompt_columns
        stored = step.own.at(step.layer, key[0], value[0])[0]
        if not self.decoding_kernels.can_attend(query, key, value, stored, columns):
            return None
        own, shared, column, prompts = step.places(key[0], value[0])
        rows = column, step.position_M, *(prompts or ())
        regions = [(keys[0], values[0]) for keys, values in (own, *([shared] if shared else []))]
        return self.decoding_kernels.attend(query, key, value, regions, rows, window, scale)

    def draw(self, logits_M_V: Tensor, uniforms_M: Tensor) -> tuple[Tensor, Tensor] | None:
        if not logits_M_V.is_contiguous():
            return None
        return self.decoding_kernels.draw(logits_M_V, to_device(uniforms_M, logits_M_V.device))

    def describe(self) -> dict[str, str]:
        return {"float32_products": "default", "decoding": "Triton kernels"}


@lru_cache
def _backend(device_type: str) -> DeviceBackend:
    if device_type == "cuda" and torch.version.cuda is not None:
        try:
            return CUDABackend()
        except Exception as error:  # no Triton, no C compiler for it, a card that it does not know
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            warnings.warn(
                f"Triton kernels don't work here ({first[:200]}); plain PyTorch computes, which is right, slower, and "
                "needs more memory. Triton comes with PyTorch for CUDA on Linux and needs a C compiler (gcc)",
                stacklevel=3,
            )
    return CPUBackend() if device_type == "cpu" else DeviceBackend()


def backend_for(device: torch.device) -> DeviceBackend:
    """Return the backend of a device; one object for each kind of device."""
    return _backend(device.type)
