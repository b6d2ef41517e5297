"""The soft prompt of a peft model, as the ragged batch takes it: once for all sequences of a micro-batch.

peft's own classes hold the parameters, so that what is saved is in peft's format; their forward passes are not used.

- PROMPT_TUNING (arXiv 2104.08691): one trained vector for each virtual token.
- P_TUNING (arXiv 2103.10385): these vectors come from a bidirectional LSTM and an MLP while they are trained.
- PREFIX_TUNING (arXiv 2101.00190, 2110.07602): keys and values of virtual tokens for every layer, from an MLP while
  they are trained, or trained themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.core.ragged import VirtualTokens
from posttrain.models.cache_names import cache_argument

KNOWN = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")


class SoftPrompt:
    """Compute the virtual tokens of a peft model.

    No module: the parameters stay where peft has them.

    Attributes:
        deep: There are keys and values for every layer. False: vectors that pass through the layers.
        start: The values that the training stage started from, (tokens, width): what the model without its adapter
            computes with. None: that model has no soft prompt.
    """

    def __init__(self, peft_model: Any) -> None:
        self.peft_model = peft_model
        self.config = peft_model.active_peft_config
        self.deep = self.config.peft_type.value == "PREFIX_TUNING"
        self.start: Tensor | None = getattr(peft_model, "soft_prompt_start", None)
        front, before_target = getattr(peft_model, "soft_prompt_places", (self.config.num_virtual_tokens, 0))
        self._virtual = VirtualTokens(front, before_target, computed=not self.deep)

    @classmethod
    def of(cls, hf: Any) -> SoftPrompt | None:
        """Return the soft prompt of a model; None if it has none, or one of another kind than `KNOWN`."""
        config = getattr(hf, "active_peft_config", None)
        if not getattr(config, "is_prompt_learning", False) or config.peft_type.value not in KNOWN:  # type: ignore[union-attr]
            return None
        return cls(hf)

    @property
    def encoder(self) -> Any:
        """Return peft's module that holds the parameters."""
        return self.peft_model.prompt_encoder[self.peft_model.active_adapter]

    @property
    def virtual(self) -> VirtualTokens | None:
        """Return where the virtual tokens stand; None while the adapter is switched off."""
        switched_off = self.peft_model._adapters_disabled and self.start is None
        return None if switched_off else self._virtual

    def train(self, mode: bool) -> None:
        """Set the mode of the encoder: cuDNN computes gradients of an LSTM in training mode alone (no dropout)."""
        self.encoder.train(mode)

    def vectors(self) -> Tensor:
        """Compute the virtual tokens' values, (tokens, width), in the dtype of the parameters."""
        if self.peft_model._adapters_disabled:
            assert self.start is not None
            return self.start
        encoder = self.encoder
        weight: Tensor = encoder.embedding.weight
        if self.config.inference_mode or self.config.peft_type.value == "PROMPT_TUNING":
            return weight
        numbers = torch.arange(weight.shape[0], device=weight.device)
        return encoder(numbers[None])[0]  # type: ignore[no-any-return]

    def keys_and_values(self) -> Tensor:
        """Compute a prefix, (2 layers, heads, tokens, size): keys of layer 0, its values, keys of layer 1, ..."""
        return split_layers(self.vectors(), self.config.num_layers, self.config.num_attention_heads)


def split_layers(values: Tensor, layers: int, heads: int) -> Tensor:
    """Return peft's flat prefix, (tokens, 2 layers heads size), as (2 layers, heads, tokens, size).

    Args:
        values: The prefix.
        layers: Number of layers.
        heads: Number of key heads of a layer.
    """
    return values.view(len(values), 2 * layers, heads, -1).permute(1, 2, 0, 3)


def soft_prompt_inputs(peft_model: Any, tokens: Tensor, target: int | None = None) -> dict[str, Any]:
    """Return the arguments by which transformers alone computes sequences behind a soft prompt.

    Args:
        peft_model: The peft model; the arguments are for its base, for a forward pass or `generate`.
        tokens: (batch, length) token ids, without padding.
        target: Index of the first token of the answer, for virtual tokens before it. None: none is there yet.

    Returns:
        inputs_embeds with the vectors in their places; or, for prefixes, their cache, and input_ids with one id
        before the tokens for each of its positions (`generate` expects the ids of what is in the cache; a forward pass
        takes the tokens alone).
    """
    from transformers import DynamicCache

    soft = SoftPrompt.of(peft_model)
    assert soft is not None
    base, rows = peft_model.get_base_model(), len(tokens)
    dtype, virtual = next(base.parameters()).dtype, soft.virtual
    if virtual is None:
        return {"input_ids": tokens}
    if soft.deep:
        parts = soft.keys_and_values().to(dtype)[:, None].expand(-1, rows, -1, -1, -1)
        cache = DynamicCache(config=base.config)
        for layer in range(len(parts) // 2):
            cache.update(parts[2 * layer].contiguous(), parts[2 * layer + 1].contiguous(), layer)
        ids = torch.cat([tokens.new_zeros(rows, virtual.front), tokens], 1)
        return {"input_ids": ids, cache_argument(base): cache}
    vectors, own = base.get_input_embeddings()(tokens), soft.vectors().to(dtype)
    own = own[None].expand(rows, -1, -1)
    target = tokens.shape[1] if target is None else target
    front, between = own[:, : virtual.front], own[:, virtual.front :]
    return {"inputs_embeds": torch.cat([front, vectors[:, :target], between, vectors[:, target:]], 1)}
