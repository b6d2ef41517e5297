"""Several models as one that gives the pooled distribution of their outputs (`posttrain.losses.ensemble_logprobs`).

The decoders run one after the other on the same batch, and their hidden states lie side by side: so a sampler keeps the
keys and values of all members in one cache, as if their layers were those of one model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.config.pooling import check_pool
from posttrain.core.errors import ModelError
from posttrain.losses.ensemble_logprobs import EnsembleHead, pool_logprobs
from posttrain.models.cache_names import cache_argument, cache_of
from posttrain.models.max_length import context
from posttrain.models.model_types import decoder_of, set_attention
from posttrain.models.output_head import output_head
from posttrain.models.soft_prompt import SoftPrompt


class _Decoders(nn.Module):
    """Run the members' decoders on the same tokens."""

    def __init__(self, members: Sequence[Any]) -> None:
        super().__init__()
        self.decoders = [decoder_of(member) for member in members]  # a list: the members own the parameters

    def get_input_embeddings(self) -> Any:
        """Return the first member's table."""
        return self.decoders[0].get_input_embeddings()

    def forward(self, **inputs: Any) -> Any:
        """Return the final hidden states of all members, side by side."""
        states = [decoder(**inputs).last_hidden_state for decoder in self.decoders]
        return SimpleNamespace(last_hidden_state=torch.cat(states, -1))


class Ensemble(nn.Module):
    """Give the pooled next-token distribution of causal language models that share a vocabulary; for inference.

    It takes the place of a transformers model in `posttrain.models.language_model.LanguageModel`, and so in
    samplers and evaluations. Positions are those of the member with the shortest context.
    """

    def __init__(
        self,
        members: Sequence[Any],
        weights: Sequence[float] | None = None,
        pool: str = "arithmetic",
        confidence: str | None = None,
    ) -> None:
        """Take models of transformers, on one device, of any types and sizes.

        Args:
            members: The models. Their parameters no longer get gradients.
            weights: A weight for each. None: 1 each.
            pool: arithmetic or geometric.
            confidence: entropy, max_probability, or None: see `posttrain.losses.ensemble_logprobs`.

        Raises:
            ValueError: The models can't be pooled in this way.
        """
        super().__init__()
        self.weights = tuple(1.0 for _ in members) if weights is None else tuple(map(float, weights))
        if not members or len(self.weights) != len(members):
            raise ValueError(f"{len(members)} models and {len(self.weights)} weights: expected one for each")
        check_pool(self.weights, pool, confidence)
        if any(SoftPrompt.of(member) is not None for member in members):
            raise ModelError("a model with a soft prompt can't be a member of an ensemble: its positions are others")
        plain = [m.get_base_model() if hasattr(m, "get_base_model") else m for m in members]
        if len(dtypes := {str(m.dtype).removeprefix("torch.") for m in plain}) > 1:
            raise ModelError(f"members of {' and '.join(sorted(dtypes))}: an ensemble is computed in one dtype")
        self.members: Any = nn.ModuleList(plain)
        self.pool, self.confidence = pool, confidence
        self.decoder = _Decoders(plain)
        self.smallest = min(plain, key=lambda member: _rows(member))
        shortest = min(plain, key=lambda member: context(member.config) or 2**31)
        self.config = copy.deepcopy(shortest.config)
        text = self.config.get_text_config()
        self._own_attention = [member.config.get_text_config()._attn_implementation for member in plain]
        self._attention = text._attn_implementation
        text.output_router_logits = False  # nothing is trained
        text.vocab_size = _rows(self.smallest)
        self.generation_config = copy.deepcopy(plain[0].generation_config)
        self.generation_config.eos_token_id = _ends(plain)
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.parameters()).device

    def get_decoder(self) -> Any:
        """Return what computes hidden states."""
        return self.decoder

    def get_input_embeddings(self) -> Any:
        """Return the table of the member with the fewest tokens."""
        return self.smallest.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """Return the head of the member with the fewest tokens, whose rows are those of the ensemble."""
        return self.smallest.get_output_embeddings()

    def set_attn_implementation(self, name: str) -> None:
        """Choose how all members compute attention; by the name that the ensemble began with, each as it did itself."""
        for member, own in zip(self.members, self._own_attention, strict=True):
            set_attention(member, own if name == self._attention else name)
        self.config._attn_implementation = name

    def pooled_head(self, packed: bool = False) -> EnsembleHead:
        """Return what turns the members' hidden states into log-probabilities of the ensemble."""
        heads = tuple(output_head(member, packed) for member in self.members)
        widths = tuple(head.weight_V_H.shape[1] for head in heads)
        return EnsembleHead(heads, widths, _rows(self.smallest), self.weights, self.pool, self.confidence)

    def forward(
        self, input_ids: Tensor, use_cache: bool = False, caches: list[Any] | None = None, **inputs: Any
    ) -> Any:
        """Return the ensemble's log-probabilities as `logits`, by the members' own forward passes.

        Args:
            input_ids: Tokens, (B, T).
            use_cache: Let members make caches of keys and values.
            caches: Those of the tokens before, one for each member; replaced by those with these tokens.
            inputs: Passed to every member.
        """
        before = caches or [None] * len(self.members)
        outputs = [
            member(input_ids=input_ids, use_cache=use_cache, **{cache_argument(member): cache}, **inputs)
            for member, cache in zip(self.members, before, strict=True)
        ]
        logits = torch.stack([out.logits[..., : _rows(self.smallest)].float() for out in outputs]).log_softmax(-1)
        pooled = pool_logprobs(logits.flatten(1, -2), self.weights, self.pool, self.confidence)
        if caches is not None:
            caches[:] = [cache_of(out) for out in outputs]
        return SimpleNamespace(logits=pooled.view(logits.shape[1:]))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float | None = None,
        eos_token_id: Sequence[int] | None = None,
        pad_token_id: int = 0,
        suppress_tokens: Sequence[int] | None = None,
        streamer: Any = None,
        stopping_criteria: Callable[[Tensor, Tensor], Tensor] | None = None,
        **unused: None,
    ) -> Tensor:
        """Continue each row as transformers' `generate` does, one row after the other.

        Args:
            input_ids: Prompts, padded on the left, (B, T).
            attention_mask: 0 where they are padded.
            max_new_tokens: Longest continuation.
            do_sample: Draw tokens; otherwise take the likeliest.
            temperature: Of drawing.
            eos_token_id: Tokens that end a row.
            pad_token_id: Fills rows that end earlier.
            suppress_tokens: Tokens that are never chosen.
            streamer: Gets each token.
            stopping_criteria: Ends a row where it is true.
            unused: Settings of `generate` that are None.
        """
        rows = []
        for tokens, mask in zip(input_ids, attention_mask, strict=True):
            row, caches = tokens[mask.bool()][None], [None] * len(self.members)
            first, feed = row.shape[1], row
            if streamer is not None:
                streamer.put(row.cpu())
            while row.shape[1] < first + max_new_tokens:
                z = self(feed, use_cache=True, caches=caches).logits[:, -1]
                if suppress_tokens is not None:
                    z[:, list(suppress_tokens)] = -torch.inf
                drawn = do_sample and temperature
                feed = torch.multinomial((z / temperature).softmax(-1), 1) if drawn else z.argmax(-1, keepdim=True)
                row = torch.cat([row, feed], 1)
                if streamer is not None:
                    streamer.put(feed[0].cpu())
                stopped = stopping_criteria is not None and bool(stopping_criteria(row, z).any())
                if stopped or int(feed) in (eos_token_id or ()):
                    break
            rows.append(row[0, first:])
        if streamer is not None:
            streamer.end()
        new = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
        return torch.cat([input_ids, new], 1)


def _rows(member: Any) -> int:
    """Return the number of a member's logits."""
    head = output_head(member, packed=True)
    return int(head.weight_V_H.shape[0])


def _ends(members: Sequence[Any]) -> int | list[int] | None:
    """Return the tokens that end a turn in any of the models."""
    given = [member.generation_config.eos_token_id for member in members]
    ends = list(dict.fromkeys(i for ids in given if ids is not None for i in ([ids] if isinstance(ids, int) else ids)))
    return ends if len(ends) > 1 else ends[0] if ends else None
