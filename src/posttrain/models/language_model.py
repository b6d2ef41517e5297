"""A language model as posttrain uses it: a ragged batch in, log-probabilities of the tokens asked for out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from posttrain.core.distributed import Sealed
from posttrain.core.errors import ModelError
from posttrain.core.ragged import MIN_SHARED, RaggedBatch, VirtualTokens, pack
from posttrain.core.types import Sample
from posttrain.losses.argument_checks import require_all
from posttrain.losses.ensemble_logprobs import EnsembleHead
from posttrain.losses.linear_logprobs import Head
from posttrain.models import attention
from posttrain.models.backends import DeviceBackend, backend_for
from posttrain.models.ensemble import Ensemble
from posttrain.models.max_length import check_length, context
from posttrain.models.model_types import decoder_of, set_attention, still, warn_one_at_a_time, why_not_ragged
from posttrain.models.output_head import head_parameters, output_head
from posttrain.models.router_loss import RouterLoss, Routing, multiplicity, routing_of
from posttrain.models.sequence_parallel import OwnTargets
from posttrain.models.soft_prompt import SoftPrompt
from posttrain.models.vision import (
    ROTARY_GRID,
    SEE_EACH_OTHER,
    check_pictures,
    image_token,
    image_vectors,
    rotary_positions,
)

OfStates = Callable[[Tensor, Head, Tensor], Any]
"""(hidden_N_H, head, tokens_N) -> any tensors: a loss that needs the head, inside the forward pass."""


def _base(hf: Any) -> Any:
    """Return transformers' model inside a peft wrapper, or the model itself."""
    return hf.get_base_model() if hasattr(hf, "get_base_model") else hf


class LanguageModel(nn.Module):
    """Run a decoder-only model of transformers, with or without peft adapters in it, on ragged batches.

    `forward` is the only entry while training, so that FSDP's hooks on the root see every pass. The output head is
    never run by transformers: hidden states of the requested positions go through it in chunks.
    """

    def __init__(self, hf: Any) -> None:
        super().__init__()
        attention.register()
        self.hf = hf
        self.ragged = True
        self.value: nn.Linear | None = None
        self.token_budget: int | None = None  # see `trainer.token_budget`
        self.router_loss = RouterLoss.of(_base(hf))
        self._routings: list[Routing] | None = None
        self._checkpointed = False
        self._own_attention: str | None = None
        self.soft_prompt = SoftPrompt.of(hf)
        self.image_token = image_token(_base(hf))
        self.train(self.training)
        self._choose_attention()
        self._check_soft_prompt()
        check_trainable(hf)
        self.backend.replace_forwards(hf)
        if self.ragged and self.soft_prompt is None:
            plan = attention.Plan(self.pack([Sample([0] * n, [0.0] * n) for n in (5, 3)], share_prefixes=False))
            self.backend.fuse_layers(self.base, attention.attend_rows, plan)

    def _choose_attention(self) -> None:
        """Let attention take ragged batches if the model type can; else compute one sequence at a time, and warn."""
        reason = why_not_ragged(self.base)
        if reason is None:
            self._own_attention = self.base.config.get_text_config()._attn_implementation
            set_attention(self.base, attention.IMPLEMENTATION_NAME)
            samples = [Sample([0, 1, 2], [0.0, 0.0, 1.0]), Sample([0, 1, 1], [0.0, 0.0, 1.0])]
            try:
                with torch.no_grad():
                    self.hidden_T_H(self.pack(samples))
                return
            except Exception as error:  # whatever the model type does with a batch that it can't take
                first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                reason = f"on a ragged batch: {first}"
        self.compute_one_at_a_time()
        warn_one_at_a_time(self.base, reason)

    def compute_one_at_a_time(self) -> None:
        """Compute every sequence by the model's own attention, in a pass of its own, from now on."""
        if self.ragged and self._own_attention is not None:
            set_attention(self.base, self._own_attention)
        self.ragged = False

    def _check_soft_prompt(self) -> None:
        """Raise ModelError for a model type that a soft prompt can't be computed with."""
        if self.soft_prompt is None:
            return
        kind = self.base.config.get_text_config().model_type
        if not self.ragged:
            raise ModelError(
                f"{kind}: a soft prompt needs attention that goes through transformers' interface, and this type's "
                "does not. Train low-rank adapters (lora, rslora, dora)"
            )
        if self.router_loss is not None:
            raise ModelError(
                f"{kind}: its configuration asks for a router loss (output_router_logits), in which virtual tokens "
                "have no part here. Set output_router_logits to false in its config.json to train a soft prompt"
            )

    def train(self, mode: bool = True) -> LanguageModel:
        """Set the mode of the critic and of what is added around the model; the model itself stays `still`."""
        super().train(mode)
        still(self.hf)
        if self.soft_prompt is not None:
            self.soft_prompt.train(mode)
        return self

    @property
    def base(self) -> Any:
        """Return the transformers model."""
        return _base(self.hf)

    @property
    def decoder(self) -> Any:
        """Return the part of the transformers model that computes hidden states."""
        return decoder_of(self.base)

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.hf.parameters()).device

    @property
    def backend(self) -> DeviceBackend:
        """Return how the device computes."""
        return backend_for(self.device)

    def head(self, packed: bool = False) -> Head:
        """Return the output head, adapters included, with the transforms that the model type applies to its logits.

        packed: Leave a weight that is held packed only as it is.

        Raises ModelError for an ensemble, which has several.
        """
        head = self.logits_head(packed)
        if isinstance(head, EnsembleHead):
            raise ModelError(
                "an ensemble gives log-probabilities of its pooled distribution; it has no output head, which training "
                "and distillation need: name one of its members"
            )
        return head

    def logits_head(self, packed: bool = False) -> Head | EnsembleHead:
        """Return what turns hidden states into logits: the output head, or those of an ensemble's members."""
        return self.base.pooled_head(packed) if isinstance(self.base, Ensemble) else output_head(self.base, packed)

    def add_value_head(self) -> None:
        """Add a critic: V = w h / sqrt(H) + b of a hidden state, float32, zero at first. Not saved with the model."""
        head = self.base.get_output_embeddings().weight
        self.value = nn.Linear(head.shape[1], 1, device=head.device)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def scorer(self) -> nn.Linear:
        """Return the head of a model for classification (named score or classifier), the trained copy first."""
        head = getattr(self.base, "score", None) or getattr(self.base, "classifier", None)
        copies = getattr(head, "modules_to_save", None)  # peft keeps what is trained beside what was there
        head = copies["default"] if copies is not None else head
        if not isinstance(head, nn.Linear):
            raise ModelError(f"{type(self.base).__name__} has no linear head named score or classifier")
        return head

    def hidden_T_H(self, batch: RaggedBatch) -> Tensor:
        """Compute final hidden states of every token of the batch (of a slice, its own), as the output head takes them.

        Raises ModelError for a sequence so long that it would change those beside it (`max_length`).
        """
        check_length(self.base.config, batch.longest)
        longest = None if batch.virtual is None else context(self.base.config)
        if longest is not None and batch.longest > longest:
            raise ModelError(
                f"a sequence has {batch.longest} positions with the soft prompt, and the model's context is {longest}: "
                "shorten the row, or leave it out (data.max_tokens)"
            )
        if self.ragged:
            extra = -batch.total % self.backend.tile if batch.part is None else 0
            with self._lean():
                return self._decode(batch, None, **self.ragged_inputs(batch, extra))
        # One sequence at a time: right for any model, whatever state runs through it.
        hidden: Tensor | None = None
        if batch.images is not None:
            raise ModelError(f"{self.base.config.model_type}: images need attention that takes ragged batches")
        for row in batch.rows:
            h = self._decode(batch, row, input_ids=batch.tokens_T[row][None])
            hidden = h.new_zeros(batch.total, h.shape[-1]) if hidden is None else hidden
            hidden = hidden.index_copy(0, row, h)
        assert hidden is not None
        return hidden

    def ragged_inputs(
        self, batch: RaggedBatch, extra: int = 0, keep: Callable[[Tensor, Tensor], None] | None = None
    ) -> dict[str, Any]:
        """Return the decoder's arguments for a ragged batch, with the soft prompt's vectors or keys in it.

        Args:
            batch: The batch.
            extra: Tokens to add at the end, which no other sees.
            keep: See `attention.Plan`.
        """
        tokens, positions = (torch.nn.functional.pad(x, (0, extra)) for x in (batch.tokens_T, batch.positions_T))
        if batch.part is not None:
            tokens, positions = batch.part.of(tokens), batch.part.of(positions)
        inputs: dict[str, Any] = {"position_ids": positions[None]}
        vectors = None if batch.images is None else self._with_pictures(tokens, batch)
        if batch.images is not None and self.base.config.model_type in ROTARY_GRID:
            inputs["position_ids"] = torch.nn.functional.pad(rotary_positions(self.base, batch), (0, extra))[:, None]
        if batch.virtual is None or self.soft_prompt is None:
            together = batch.images is not None and self.base.config.model_type in SEE_EACH_OTHER
            inputs["ragged"] = attention.Plan(batch, keep, pictures_see_all=together)
        elif not batch.virtual.computed:
            behind = batch.behind_keys(batch.virtual.front)
            inputs["ragged"] = attention.Plan(behind, keep, self.soft_prompt.keys_and_values())
        else:
            assert batch.virtual_T is not None
            vectors = self.base.get_input_embeddings()(tokens)
            own = self.soft_prompt.vectors()[batch.virtual_ids].to(vectors.dtype)
            vectors = vectors.index_copy(0, batch.virtual_T, own)
            inputs["ragged"] = attention.Plan(batch, keep)
        return inputs | ({"input_ids": tokens[None]} if vectors is None else {"inputs_embeds": vectors[None]})

    def _with_pictures(self, tokens: Tensor, batch: RaggedBatch) -> Tensor:
        """Return the embeddings of tokens, with the vectors of the batch's pictures in their places."""
        assert batch.images is not None
        if self.soft_prompt is not None:
            raise ModelError(
                "images can't be computed with a soft prompt: train low-rank adapters (lora, rslora, dora)"
            )
        vectors = self.base.get_input_embeddings()(tokens)
        own = image_vectors(self.base, batch.images)[batch.images.vectors]
        return vectors.index_copy(0, batch.images.image_T, own.to(vectors.dtype))  # type: ignore[no-any-return]

    def _decode(self, batch: RaggedBatch, row: Tensor | None, **inputs: Any) -> Tensor:
        """Run the decoder on all tokens of a batch or on those of `row`; (tokens, H)."""
        wanted = self.router_loss is not None and self._routings is not None
        if self.router_loss is not None:  # the configuration asks for them in every pass
            inputs["output_router_logits"] = wanted
        out = self.decoder(use_cache=False, **inputs)
        if wanted and self.router_loss is not None and self._routings is not None:
            weights = multiplicity(batch) if row is None else multiplicity(batch)[row]
            weights = weights if batch.part is None else batch.part.of(weights)
            self._routings.append(routing_of(out.router_logits, weights, self.router_loss.per_token))
        hidden: Tensor = out.last_hidden_state[0]
        return hidden[: batch.total] if row is None and batch.part is None else hidden

    @contextmanager
    def routings(self) -> Iterator[list[Routing]]:
        """Collect, within the context, the routing of every forward pass; of models with a `router_loss` alone."""
        before, self._routings = self._routings, []
        try:
            yield self._routings
        finally:
            self._routings = before

    def checkpoint_layers(self, layers: Sequence[nn.Module]) -> None:
        """Keep, of these layers, only their inputs for backward, and recompute the rest.

        transformers' own way of it works in training mode alone, in which the model is not (`still`).
        """
        self._checkpointed = True
        for layer in layers:
            layer.forward = partial(_recomputed, layer.forward)  # type: ignore[method-assign]

    def _lean(self) -> AbstractContextManager[None]:
        """Return the context of a forward pass: without activations that are cheap to recompute, if it trains."""
        # Checkpointed layers have hooks of their own.
        lean = torch.is_grad_enabled() and not self._checkpointed
        return self.backend.lean() if lean else nullcontext()

    def __call__(self, batch: RaggedBatch, *args: Any, **kwargs: Any) -> Any:
        """Compute what `forward` returns for a batch."""
        return super().__call__(Sealed(batch), *args, **kwargs)

    def forward(
        self,
        sealed: Sealed[RaggedBatch],
        want: Literal["cross_entropy", "logprobs", "values", "scores", "hidden"] | OfStates = "logprobs",
        targets_N: Tensor | None = None,
        coefficients_N: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        entropy: bool = False,
        probe: bool = True,
    ) -> Any:
        """Compute what `want` names, at `targets_N`.

        Args:
            sealed: A ragged batch.
            want: cross_entropy: (loss, nll_N, hits_N) of `linear_cross_entropy` with `coefficients_N`. logprobs:
                (logprobs_N, entropies_N) of `linear_logprobs`. values: these and values_N, what the critic expects
                before each token is there. scores: float32 numbers of the head of a model for classification, (N,
                labels), once each token has been read. hidden: hidden_T_H. A function: what it returns, given the
                hidden states that predict the targets, the head and the targets' token ids.
            targets_N: T-indices of tokens. None: those that carry loss.
            coefficients_N: Of cross_entropy. None: the weights.
            temperature: Divides the logits.
            entropy: Compute entropies too.
            probe: The critic's gradient stays out of the model.

        Raises:
            ValueError: A first token of a sequence is among the targets: nothing predicts it (scores: it may be).
        """
        batch = sealed.value
        hidden = self.hidden_T_H(batch)
        if want == "hidden":
            return hidden
        targets = batch.targets_N if targets_N is None else targets_N
        if want == "cross_entropy" and coefficients_N is None:
            coefficients_N = batch.weights_T[targets]
        places = targets
        if want != "scores":
            places = batch.predictors_T[targets]
            require_all(places >= 0, lambda: "the first token of a sequence was asked for; no hidden state predicts it")
        if batch.part is None:
            return self._outputs(
                want, hidden[places], batch.tokens_T[targets], coefficients_N, temperature, entropy, probe
            )
        if callable(want):
            raise ModelError(
                "this loss needs the output head and all hidden states (distillation does), and sequence_parallel "
                "leaves each process those of its tokens: set systems.sequence_parallel to 1"
            )
        own = OwnTargets(batch.part, places)
        states = hidden[own.of(places) - batch.part.first], own.of(batch.tokens_T[targets]), own.of(coefficients_N)
        return own.joined(self._outputs(want, *states, own.of(temperature), entropy, probe))

    def _outputs(
        self,
        want: str | OfStates,
        hidden_N_H: Tensor,
        tokens_N: Tensor,
        coefficients_N: Tensor | None,
        temperature: float | Tensor,
        entropy: bool,
        probe: bool,
    ) -> Any:
        """Compute what `forward` returns of the hidden states that belong to the targets."""
        if want == "scores":
            head = self.scorer()
            bias = None if head.bias is None else head.bias.float()
            return torch.nn.functional.linear(hidden_N_H.float(), head.weight.float(), bias)
        pooled = self.logits_head() if isinstance(self.base, Ensemble) and want == "logprobs" else None
        if isinstance(pooled, EnsembleHead):
            return pooled.logprobs(hidden_N_H, tokens_N, temperature, entropy)
        if callable(want):
            return want(hidden_N_H, self.head(), tokens_N)
        if want == "cross_entropy":
            assert coefficients_N is not None
            return self.backend.cross_entropy(hidden_N_H, self.head(packed=True), tokens_N, coefficients_N)
        logprobs = self.backend.logprobs(hidden_N_H, self.head(packed=True), tokens_N, temperature, entropy)
        if want == "logprobs":
            return logprobs
        if self.value is None:
            raise ValueError("this model has no critic: call add_value_head() first")
        seen = (hidden_N_H.detach() if probe else hidden_N_H).float() * hidden_N_H.shape[-1] ** -0.5
        return *logprobs, self.value(seen).squeeze(-1)

    def pack(self, samples: list[Sample], share_prefixes: bool = True, min_shared: int = MIN_SHARED) -> RaggedBatch:
        """Pack samples on the model's device, with its soft prompt.

        Args:
            samples: The samples.
            share_prefixes: Compute a prefix that several share once, if the model type allows it.
            min_shared: Shortest such prefix, in tokens.
        """
        batch = pack(samples, share_prefixes and self.ragged, min_shared, self.virtual)
        if self.image_token is not None:
            check_pictures(batch, self.image_token)
        elif batch.images is not None:
            raise ModelError(f"{self.base.config.model_type}: a text model was given rows with images")
        return batch.to(self.device)

    @property
    def virtual(self) -> VirtualTokens | None:
        """Return the virtual tokens of every sequence; None: there is no soft prompt, or it is switched off."""
        return None if self.soft_prompt is None else self.soft_prompt.virtual

    @property
    def inserted(self) -> int:
        """Return the number of virtual tokens that are computed for each sequence anew."""
        return 0 if self.virtual is None else self.virtual.before_target


def check_trainable(hf: Any) -> None:
    """Check that every trainable parameter takes part in the forward pass of `LanguageModel`.

    It runs the decoder, and multiplies by the output head's weight: what peft adds around the model (virtual tokens of
    prompt learning), or on top of the head's weight in another way than `output_head` knows, would get no gradient.

    Raises:
        ModelError: A trainable parameter would be ignored.
    """
    base = _base(hf)
    head = getattr(base, "get_output_embeddings", lambda: None)()
    used = {id(p) for p in base.parameters()}
    if head is not None:
        used -= {id(p) for p in head.parameters()} - head_parameters(base)
    peft_config = getattr(hf, "active_peft_config", None)
    is_prompt = getattr(peft_config, "is_prompt_learning", False)
    known = SoftPrompt.of(hf) is not None
    used |= {id(p) for p in hf.prompt_encoder.parameters()} if known else set()
    ignored = [name for name, p in hf.named_parameters() if p.requires_grad and id(p) not in used]
    if ignored or (is_prompt and not known):
        kind = getattr(getattr(peft_config, "peft_type", None), "value", "this model")
        raise ModelError(
            f"{kind}: {', '.join(ignored[:3]) or 'its virtual tokens'} would get no gradient: posttrain runs the "
            "decoder and its output head's weight, and nothing around them but the soft prompts that it knows (prompt, "
            "prefix, p_tuning, p_tuning_v2). Use one of those, or adapters inside the decoder's layers (lora, dora, "
            "rslora, or another of peft's kinds for linear layers); the output head takes lora and rslora"
        )


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # No random number is drawn in a layer (`still`): the generators' states need not be kept.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
