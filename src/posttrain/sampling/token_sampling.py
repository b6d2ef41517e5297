"""Drawing tokens: cut-offs, and the inverse of the cumulative distribution at one random number a token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from posttrain.config import SamplingConfig
from posttrain.core.transfer import to_device
from posttrain.models.backends import backend_for

BLOCK = 256
"""Tokens summed at a time: first the block is found, then the token in it."""
CANDIDATES = 1024
"""Likeliest tokens looked at for top-p before the whole vocabulary is sorted."""


def stream(seed: int, completion: int, count: int) -> np.ndarray:
    """Return random numbers in [0, 1) for the tokens of one completion (Philox, keyed by seed and completion).

    Args:
        seed: Seed of the request.
        completion: Number of the completion.
        count: How many numbers.
    """
    key = np.array([seed % 2**64, completion], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def cut(z_M_V: Tensor, params: SamplingConfig) -> Tensor:
    """Set the logits that top_k, top_p and min_p leave out to -inf, in place. The likeliest token always stays.

    top_p keeps the fewest likeliest tokens whose probabilities sum to at least top_p (arXiv 1904.09751); min_p those at
    least min_p times as likely as the likeliest (arXiv 2407.01082). Of equally likely tokens at top_k's edge those stay
    that torch.topk returns.
    """
    vocabulary = z_M_V.shape[-1]
    if 0 < params.top_k < vocabulary:
        kept = z_M_V.topk(params.top_k, dim=-1)
        z_M_V.fill_(-torch.inf).scatter_(-1, kept.indices, kept.values)
    if params.top_p < 1:
        probabilities = z_M_V.softmax(-1)
        for count in (min(CANDIDATES, vocabulary), vocabulary):
            top, index = probabilities.topk(count, dim=-1)
            before = top.double().cumsum(-1).sub_(top)
            if count == vocabulary or bool((before[:, -1] >= params.top_p).all()):
                break
        # Whatever did not make the candidates stays out too: those before it sum to top_p already.
        values = z_M_V.gather(-1, index).masked_fill_(before >= params.top_p, -torch.inf)
        z_M_V.fill_(-torch.inf).scatter_(-1, index, values)
    if params.min_p > 0:
        top_M_1 = z_M_V.amax(-1, keepdim=True)
        z_M_V.masked_fill_(z_M_V < top_M_1 + float(np.log(params.min_p)), -torch.inf)
    return z_M_V


def draw_from_vocabulary(
    z_M_V: Tensor,
    uniforms_M: Tensor,
    params: SamplingConfig,
    textless: Tensor | slice | None,
    banned: Sequence[int] = (),
    short_M: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what `draw_tokens` does, without ever drawing ids that no token of the tokenizer has.

    Log-probabilities stay those of the model's whole distribution, as a learner computes them, unless cut-offs apply:
    with m the probability of such ids, a token is drawn with its probability over 1 - m.

    Args:
        z_M_V: As there, and so the others.
        uniforms_M: Likewise.
        params: Likewise.
        textless: Ids that no token has. None: there are none.
        banned: Likewise.
        short_M: Likewise.
    """
    if textless is None:
        return draw_tokens(z_M_V, uniforms_M, params, banned, short_M)
    without_M = z_M_V[:, textless].logsumexp(-1)
    z_M_V[:, textless] = -torch.inf
    tokens, logprobs_M = draw_tokens(z_M_V, uniforms_M, params, banned, short_M)
    if params.top_k or params.top_p < 1 or params.min_p > 0:
        return tokens, logprobs_M
    drawn_from_M = z_M_V.gather(-1, tokens[:, None]).squeeze(-1) - logprobs_M
    return tokens, logprobs_M - torch.nn.functional.softplus(without_M - drawn_from_M)


def draw_tokens(
    z_M_V: Tensor, uniforms_M: Tensor, params: SamplingConfig, banned: Sequence[int] = (), short_M: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token a row, with its log-probability under the distribution it was drawn from.

    The token is the first whose cumulative probability exceeds the random number. Temperature 0 takes the likeliest
    (the first of equals); its log-probability is that at temperature 1.

    Args:
        z_M_V: Logits, temperature applied (not for temperature 0), float32; overwritten.
        uniforms_M: One number in [0, 1) a row, float64, on the host or the device.
        params: How tokens are drawn.
        banned: Tokens that rows marked in `short_M` can't have.
        short_M: True for rows that are shorter than min_tokens; on the host.
    """
    device = z_M_V.device
    if short_M is not None and len(banned):
        rows, columns = to_device(short_M.nonzero(), device), to_device(torch.as_tensor(list(banned)), device)
        z_M_V[rows, columns] = -torch.inf
    if params.temperature == 0:
        lse, tokens = z_M_V.logsumexp(-1), z_M_V.argmax(-1)
        return tokens, z_M_V.gather(-1, tokens[:, None]).squeeze(-1) - lse
    cut(z_M_V, params)
    drawn = backend_for(device).draw(z_M_V, uniforms_M)
    if drawn is not None:
        return drawn
    lse = z_M_V.logsumexp(-1, keepdim=True)
    p = (z_M_V - lse).exp_()
    count, vocabulary = p.shape
    if vocabulary % BLOCK:
        p = torch.nn.functional.pad(p, (0, BLOCK - vocabulary % BLOCK))
    p = p.view(count, -1, BLOCK)
    blocks = p.sum(-1, dtype=torch.float64).cumsum(-1)
    target = to_device(uniforms_M, device)[:, None] * blocks[:, -1:]
    block = _pick(blocks, target)
    before = torch.where(block > 0, blocks.gather(-1, (block - 1).clamp_min(0)), 0.0)
    inner = p[torch.arange(count, device=p.device), block[:, 0]].double().cumsum(-1)
    tokens = (block * BLOCK + _pick(inner, target - before)).squeeze(-1)
    return tokens, (z_M_V.gather(-1, tokens[:, None]) - lse).squeeze(-1)


def _pick(cumulative: Tensor, target: Tensor) -> Tensor:
    """First place whose cumulative sum exceeds the target; where rounding leaves none, the last with any mass."""
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), last)
