"""Choose the token budget of a micro-batch: a constant on a CPU, what the memory holds on a GPU."""

from __future__ import annotations

import torch

from posttrain.config import SystemsConfig
from posttrain.core import distributed
from posttrain.losses.linear_logprobs import CHUNK_BYTES
from posttrain.models.language_model import LanguageModel
from posttrain.models.model_shape import ModelShape

CPU_TOKENS = 768
FRONT_SHARE = 16
"""On a CPU a pass has at least this many times the virtual tokens in front, which every pass computes anew."""
LEAST, MOST = 4096, 65536
"""Bounds of the default on a GPU."""
TRAINED_SHARE = 0.4
"""Part of a GPU's free memory for activations; the rest is for what the estimate leaves out, and for the sampler."""
FROZEN_SHARE = 0.05
"""Part of a GPU's whole memory for a pass of a model that is not trained."""


def token_budget(systems: SystemsConfig, model: LanguageModel) -> int:
    """Return the token budget of one forward and backward pass of `model`.

    On a GPU the default is chosen at the first call and kept with the model, so that every pass of a run uses the same.
    Under torchrun every rank must make that first call; the smallest number is used.
    """
    if systems.tokens_per_micro_batch:
        return systems.tokens_per_micro_batch
    if model.device.type == "cpu":
        return cpu_tokens(model.virtual.front if model.virtual is not None and model.virtual.computed else 0)
    if model.device.type != "cuda":
        return LEAST
    if model.token_budget is None:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        free, total = torch.cuda.mem_get_info(model.device)
        # What torch has reserved and does not use is free too.
        free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        own = suited_budget(model, systems, free, total, trained)
        # A frozen model's number must not depend on how much is free: a resumed run would round otherwise.
        model.token_budget = min(distributed.all_gather_object(own)) if trained else own
    return model.token_budget


def cpu_tokens(front: int) -> int:
    """Return the default budget on a CPU, given the number of virtual tokens in front that each pass computes."""
    return max(CPU_TOKENS, FRONT_SHARE * front)


def suited_budget(model: LanguageModel, systems: SystemsConfig, free: int, total: int, trained: int) -> int:
    """Estimate how many tokens the memory holds, rounded down to 1 or 1.5 times a power of two, from `LEAST`
    to `MOST`.

    Args:
        model: The model.
        systems: Whether activations are checkpointed.
        free: Bytes that are free once the model is loaded.
        total: Bytes of the whole GPU.
        trained: Number of parameters that are trained; 0 for a frozen model.
    """
    per_token = bytes_per_token(model, systems.activation_checkpointing or not trained)
    if per_token is None:
        return LEAST
    vocabulary, hidden = model.base.get_input_embeddings().weight.shape
    return budget_for(per_token, vocabulary, hidden, free, total, trained)


def budget_for(per_token: int, vocabulary: int, hidden: int, free: int, total: int, trained: int) -> int:
    """Return the budget of `suited_budget`, given the bytes that a token's activations take.

    Args:
        per_token: Those bytes.
        vocabulary: Rows of the output head.
        hidden: Its width.
        free: Bytes that are free once the model is loaded.
        total: Bytes of the whole GPU.
        trained: Number of parameters that are trained; 0 for a frozen model.
    """
    room = free * TRAINED_SHARE if trained else total * FROZEN_SHARE
    if trained:
        # Gradients, float32 master weights and two moments; three chunks of logits, and the gradient of the head.
        state = 16 * trained / distributed.shards()
        room = (free - state - 3 * CHUNK_BYTES["cuda"] - 4 * vocabulary * hidden) * TRAINED_SHARE
    tokens = int(max(room, 0) / per_token)
    power = 1 << max(tokens.bit_length() - 1, 0)
    return min(max(power + power // 2 if tokens >= power + power // 2 else power, LEAST), MOST)


def bytes_per_token(model: LanguageModel, boundaries: bool) -> int | None:
    """Estimate what a token's activations take until the backward pass; measured within 40% for seven model types.

    Args:
        model: The model.
        boundaries: Only the inputs of layers are kept (activation checkpointing, or no gradient at all).

    Returns:
        The estimate, or None if attention needs memory that grows with the square of a sequence's length.
    """
    config, dtype = model.base.config.get_text_config(), next(model.base.parameters()).dtype
    quadratic = getattr(config, "attn_logit_softcapping", None) or any(
        "sinks" in n for n, _ in model.named_parameters()
    )
    if dtype == torch.float32 or quadratic or not model.ragged:
        return None
    heads = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    # A mixture of experts computes a few of its experts for a token.
    routed = (getattr(config, "num_experts_per_tok", 0) or 0) * (getattr(config, "moe_intermediate_size", 0) or 0)
    inner = max(getattr(config, "intermediate_size", 0) or 0, routed)
    widths = config.hidden_size, config.num_hidden_layers, heads, inner
    # Experts are computed by transformers, which keeps all of their activations.
    return bytes_by_widths(dtype.itemsize, *widths, boundaries, model.backend.fused and not routed)


def bytes_of_token(shape: ModelShape, itemsize: int, boundaries: bool) -> int:
    """Return the estimate of `bytes_per_token` for a model of which only the sizes are known.

    Args:
        shape: Those sizes.
        itemsize: Bytes of a number.
        boundaries: Only the inputs of layers are kept.
    """
    return bytes_by_widths(itemsize, shape.hidden, shape.layers, shape.query, shape.inner, boundaries, fused=True)


def bytes_by_widths(e: int, hidden: int, layers: int, heads: int, inner: int, boundaries: bool, fused: bool) -> int:
    """Return what a token's activations take until backward on a GPU.

    For each layer with hidden size H, heads of together Q, MLP of I, and e bytes per number: two norms (their input in
    float32 and two results, 4 H + 2 e H each), query, key, value and output of attention (4 e Q), gate, up,
    activation and product of the MLP (4 e I). With fused kernels: of a norm its input and its result (2 e H), of the
    MLP gate and up (2 e I).

    Args:
        e: Bytes of a number.
        hidden: Width of the model.
        layers: Its layers.
        heads: Width of all query heads.
        inner: Width of the MLP.
        boundaries: Only the inputs of layers are kept.
        fused: Norms and MLPs are computed by `posttrain.cuda`.
    """
    layer = 2 * (4 + 2 * e) * hidden + 4 * e * heads + 4 * e * inner
    if fused:
        layer = 4 * e * hidden + 4 * e * heads + 2 * e * inner
    ends = 8 * e * hidden  # embeddings, final norm, and the hidden states that the head takes, with their gradients
    return ends + (layers * e * hidden + 2 * layer if boundaries else (layers + 1) * layer)
