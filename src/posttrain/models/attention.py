"""Attention over a ragged batch, for every decoder model that transformers can load.

transformers calls the function registered under `posttrain` in its `AttentionInterface` with (1, heads, T, head size)
queries, keys and values, and hands on the extra keyword argument `ragged`, which carries the batch's plan.

Three ways to the same numbers:

- CPU: `posttrain.cpu.tiled_attention`; no copy of a prefix and no T by T matrix is ever made.
- CUDA: one call of the FlashAttention kernel, keys and values gathered per segment, those of its ancestors first.
- Anything else (soft caps, attention sinks, other devices): plain softmax, a segment at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from posttrain.core.ragged import RaggedBatch
from posttrain.core.transfer import to_device
from posttrain.models import sequence_parallel
from posttrain.models.backends import backend_for

IMPLEMENTATION_NAME = "posttrain"


class Decoding(Protocol):
    """Attention of one new token a sequence, over keys and values that a sampler keeps."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: int | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Compute attention: (1, heads, M, size) in, (1, M, heads, size) out; called once a layer, in their order.

        Args:
            query: Queries of the newest tokens.
            key: Their keys.
            value: Their values.
            window: How many of the last positions are visible (None: all).
            scale: Multiplies the scores.
            softcap: Scores become c tanh(score / c).
            sinks: One learned score a head, see `plain_attention`.
        """


class Plan:
    """Hold what attention needs to know of a batch; made once a batch, used by every layer.

    Args:
        batch: The batch.
        keep: Gets every layer's keys and values, (heads, T, size), positions applied: how a sampler fills its cache.
            With `prefix` T begins with it.
        prefix: Keys and values, (2 layers, heads, tokens, size), layer after layer, that all sequences continue.
            `batch` is then the batch behind them (`RaggedBatch.behind_keys`).
        pictures_see_all: The tokens of a picture see also those after them in the same picture.

    Attributes:
        cache: What the kernels of a device derive from the batch, by their own keys.
    """

    # No dataclass: FSDP looks through those for tensors, token by token, and gives every layer a copy, whose cache is
    # its own.
    def __init__(
        self,
        batch: RaggedBatch,
        keep: Callable[[Tensor, Tensor], None] | None = None,
        prefix: Tensor | None = None,
        pictures_see_all: bool = False,
    ) -> None:
        self.batch, self.keep, self.prefix, self.pictures_see_all = batch, keep, prefix, pictures_see_all
        self.cache: dict[Any, Any] = {}

    def pictures_T(self) -> Tensor | None:
        """Return for each token the number of its picture, -1 for text; None: all tokens are seen causally."""
        images = self.batch.images
        if not self.pictures_see_all or images is None:
            return None
        if "pictures" not in self.cache:
            sizes = torch.tensor(images.sizes, device=images.vectors.device)
            numbers = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)[images.vectors]
            text = torch.full_like(self.batch.tokens_T, -1)
            self.cache["pictures"] = text.index_copy(0, images.image_T, numbers)
        return self.cache["pictures"]  # type: ignore[no-any-return]

    def varlen(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Return (gather_K, cu_q, cu_k, longest q, longest k) for a varlen kernel aligned to the bottom right."""
        if "varlen" not in self.cache:
            self.cache["varlen"] = _varlen(self.batch)
        return self.cache["varlen"]  # type: ignore[no-any-return]


def _varlen(batch: RaggedBatch) -> tuple[Tensor, Tensor, Tensor, int, int]:
    device = batch.tokens_T.device
    gather: list[Tensor] = []
    cu_q, cu_k = [0], [0]
    for i in range(len(batch.starts)):
        chain = batch.chain(i)
        gather.extend(torch.arange(batch.starts[s], batch.ends[s]) for s in chain)
        cu_q.append(batch.ends[i])
        cu_k.append(cu_k[-1] + sum(batch.ends[s] - batch.starts[s] for s in chain))
    longest_q = max(b - a for a, b in zip(cu_q, cu_q[1:], strict=False))
    longest_k = max(b - a for a, b in zip(cu_k, cu_k[1:], strict=False))
    starts = (to_device(torch.tensor(cu, dtype=torch.int32), device) for cu in (cu_q, cu_k))
    return to_device(torch.cat(gather), device), *starts, longest_q, longest_k  # type: ignore[return-value]


def _can_varlen(query: Tensor, value: Tensor) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and query.shape[-1] == value.shape[-1] <= 256 and query.shape[-1] % 8 == 0


def _varlen_rows(q: Tensor, k: Tensor, v: Tensor, plan: Plan, window: int | None, scale: float) -> Tensor:
    """Compute attention in one kernel call; (T, heads, size) in and out."""
    gather, cu_q, cu_k, longest_q, longest_k = plan.varlen()
    total, count = plan.batch.total, len(q)
    q, k, v = (x[:total] for x in (q, k, v)) if count > total else (q, k, v)
    if any(p >= 0 for p in plan.batch.parents):
        # Gradients of a key that many see are added up in float32, and in the same order every time.
        k, v = (torch.nn.functional.embedding(gather, x.flatten(1)).view(-1, *x.shape[1:]) for x in (k, v))
    # What `torch.nn.attention.varlen` calls, which costs more time on the host than the kernel takes for a small batch.
    # The kernel counts the keys to the left of a query, transformers' window counts the query's own too.
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, longest_q, longest_k, 0.0, window is None, False, scale=scale,
        window_size_left=-1 if window is None else window - 1, window_size_right=0,
    )[0]  # fmt: skip
    # Of tokens after the last segment the kernel would leave memory as it finds it.
    return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, count - total)) if count > total else out


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    window: int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute softmax(scale q k^T) v a segment at a time, over the keys of its chain; any device, differentiable.

    Args:
        query: (1, heads, T, size).
        key: (1, key heads, T, size).
        value: (1, key heads, T, size).
        plan: The batch.
        window: Sliding window.
        scale: Multiplies the scores.
        softcap: Scores become c tanh(score / c).
        sinks: One learned score a head that takes part in the softmax and carries no value.

    Returns:
        (1, T, heads, size); zeros for tokens after the last segment.
    """
    batch, repeat = plan.batch, query.shape[1] // key.shape[1]
    pictures_T = plan.pictures_T()
    outs = []
    for i, (start, end) in enumerate(zip(batch.starts, batch.ends, strict=True)):
        index = torch.cat([torch.arange(batch.starts[s], batch.ends[s]) for s in batch.chain(i)])
        index = to_device(index, query.device)
        k, v = (x[:, :, index].repeat_interleave(repeat, dim=1) for x in (key, value))
        scores = torch.matmul(query[:, :, start:end], k.transpose(-1, -2)).float() * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = batch.positions_T[start:end, None] - batch.positions_T[index][None]
        hidden = distance < 0
        if pictures_T is not None:  # a picture is never split, so its tokens are all in this segment
            own = pictures_T[start:end, None]
            hidden &= (own < 0) | (own != pictures_T[index][None])
        if window is not None:
            hidden |= distance >= window
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            sink = sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            probabilities = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            probabilities = scores.softmax(-1)
        outs.append(torch.matmul(probabilities.to(v.dtype), v))
    out = torch.cat(outs, dim=2)
    return torch.nn.functional.pad(out, (0, 0, 0, query.shape[2] - out.shape[2])).transpose(1, 2)


@torch.compiler.disable  # the plan is Python; what lies between attention calls is what compiling helps
def ragged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    ragged: Plan | Decoding | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers, which calls this function; see the module's docstring.

    Args:
        module: The attention module; of a model with a prefix it knows the number of its layer.
        query: (1, heads, T, size).
        key: (1, key heads, T, size).
        value: (1, key heads, T, size).
        attention_mask: Must be None: the batch's segments are the mask.
        scaling: Multiplies the scores. None: 1 / sqrt(size).
        dropout: Must be 0.
        sliding_window: Sliding window.
        softcap: Soft cap of the scores.
        s_aux: Attention sinks.
        ragged: Plan of the batch, or a decoding step.

    Returns:
        ((1, T, heads, size), None).
    """
    if ragged is None:
        raise RuntimeError("posttrain attention was called without a ragged batch; use LanguageModel, not its .hf")
    if dropout:
        raise RuntimeError(
            f"attention dropout is {dropout}; posttrain switches dropout off, since with it the step "
            "would depend on how a batch is split"
        )
    if attention_mask is not None:
        raise RuntimeError("the model made an attention mask of its own, which the ragged batch can't honour")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if not isinstance(ragged, Plan):
        return ragged.attend(query, key, value, sliding_window, scale, softcap, s_aux), None
    if (part := ragged.batch.part) is not None:
        heads = query.shape[1]
        query, key, value, s_aux = sequence_parallel.all_tokens(part, query, key, value, s_aux)
        out = _planned_attention(query, key, value, ragged, sliding_window, scale, softcap, s_aux)
        return sequence_parallel.all_heads(part, out, heads), None
    first = 0
    if ragged.prefix is not None:
        first = ragged.prefix.shape[2]
        query, key, value = _behind_prefix(module, query, key, value, ragged.prefix)
    if ragged.keep is not None:
        ragged.keep(key[0], value[0])
    out = _planned_attention(query, key, value, ragged, sliding_window, scale, softcap, s_aux)
    return out[:, first:] if first else out, None


def attend_rows(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, ragged: Plan | Decoding
) -> Tensor:
    """Compute `ragged_attention` of causal attention for fused layers: (T, heads, size) in and out.

    Args:
        module: As there.
        query: (T, heads, size).
        key: (T, key heads, size).
        value: (T, key heads, size).
        scale: Multiplies the scores.
        ragged: As there.
    """
    if isinstance(ragged, Plan) and ragged.prefix is None and ragged.keep is None and not ragged.pictures_see_all:
        if ragged.batch.part is None and _can_varlen(query, value):
            return _varlen_rows(query, key, value, ragged, None, scale)
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return ragged_attention(module, q, k, v, None, scaling=scale, ragged=ragged)[0][0]  # type: ignore[no-any-return]


def _behind_prefix(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, prefix: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values with the layer's prefix before them; its own queries are zeros."""
    # Not a count of calls: in backward a checkpointed layer is computed again, the last layer first.
    layer = module.layer_idx
    assert isinstance(layer, int)
    before = prefix[2 * layer : 2 * layer + 2, None].to(key.dtype)
    query = torch.nn.functional.pad(query, (0, 0, prefix.shape[2], 0))
    return query, torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)


def _planned_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Compute attention by the fastest way that takes these tensors; see the module's docstring."""
    if softcap is not None or sinks is not None or plan.pictures_see_all:
        return plain_attention(query, key, value, plan, window, scale, softcap, sinks)
    if _can_varlen(query, value):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return _varlen_rows(q, k, v, plan, window, scale)[None]
    out = backend_for(query.device).attention(query, key, value, plan, window, scale)
    return plain_attention(query, key, value, plan, window, scale) if out is None else out


def register() -> None:
    """Register the function with transformers; without a mask function, so that no mask is made."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION_NAME, ragged_attention)
