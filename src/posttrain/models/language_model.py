"""A language model as posttrain uses it: a ragged batch in, log-probabilities of the tokens asked for out."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posttrain.core.errors import ModelError
from posttrain.core.ragged import RaggedBatch, pack
from posttrain.core.types import Sample
from posttrain.losses.argument_checks import require_all
from posttrain.losses.linear_logprobs import Head
from posttrain.models import attention
from posttrain.models.backends import DeviceBackend, backend_for
from posttrain.models.max_length import check_length
from posttrain.models.output_head import head_parameters, output_head

STATEFUL = ("linear_attention", "mamba", "conv", "recurrent", "rwkv", "chunked_attention")
"""Layer types whose state runs through a sequence: segments can't share a prefix or lie end to end."""


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
        self.ragged = _supports_ragged(_base(hf))
        if self.ragged:
            _base(hf).set_attn_implementation(attention.IMPLEMENTATION_NAME)
        check_trainable(hf)
        no_dropout(hf)
        self.backend.replace_forwards(hf)
        self.value: nn.Linear | None = None
        self.token_budget: int | None = None  # see `trainer.token_budget`

    @property
    def base(self) -> Any:
        """Return the transformers model."""
        return _base(self.hf)

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.hf.parameters()).device

    @property
    def backend(self) -> DeviceBackend:
        """Return how the device computes."""
        return backend_for(self.device)

    def head(self) -> Head:
        """Return the output head, adapters included, with the transforms that the model type applies to its logits."""
        return output_head(self.base)

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
        """Compute final hidden states of every token of the batch, as the output head takes them.

        Raises ModelError for a sequence so long that it would change those beside it (`max_length`).
        """
        check_length(self.base.config, max(len(row) for row in batch.rows))
        decoder = self.base.get_decoder()
        if self.ragged:
            extra = -batch.total % self.backend.tile  # tokens that no other sees
            tokens, positions = (
                torch.nn.functional.pad(x, (0, extra))[None] for x in (batch.tokens_T, batch.positions_T)
            )
            with self._lean():
                out = decoder(input_ids=tokens, position_ids=positions, use_cache=False, ragged=attention.Plan(batch))
            return out.last_hidden_state[0, : batch.total]  # type: ignore[no-any-return]
        # One sequence at a time: right for any model, whatever state runs through it.
        hidden: Tensor | None = None
        for row in batch.rows:
            h = decoder(input_ids=batch.tokens_T[row][None], use_cache=False).last_hidden_state[0]
            hidden = h.new_zeros(batch.total, h.shape[-1]) if hidden is None else hidden
            hidden = hidden.index_copy(0, row, h)
        assert hidden is not None
        return hidden

    def _lean(self) -> AbstractContextManager[None]:
        """Return the context of a forward pass: without activations that are cheap to recompute, if it trains."""
        # Checkpointing has hooks of its own; its name has changed in transformers.
        names = [n for n in ("is_activation_checkpointing", "is_gradient_checkpointing") if hasattr(self.base, n)]
        recomputed = bool(names) and bool(getattr(self.base, names[0]))
        return self.backend.lean() if torch.is_grad_enabled() and not recomputed else nullcontext()

    def forward(
        self,
        batch: RaggedBatch,
        want: Literal["cross_entropy", "logprobs", "values", "scores", "hidden"] = "logprobs",
        targets_N: Tensor | None = None,
        coefficients_N: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        entropy: bool = False,
        probe: bool = True,
    ) -> Any:
        """Compute what `want` names, at `targets_N`.

        Args:
            batch: A ragged batch.
            want: cross_entropy: (loss, nll_N, hits_N) of `linear_cross_entropy` with `coefficients_N`. logprobs:
                (logprobs_N, entropies_N) of `linear_logprobs`. values: these and values_N, what the critic expects
                before each token is there. scores: float32 numbers of the head of a model for classification, (N,
                labels), once each token has been read. hidden: hidden_T_H.
            targets_N: T-indices of tokens. None: those that carry loss.
            coefficients_N: Of cross_entropy. None: the weights.
            temperature: Divides the logits.
            entropy: Compute entropies too.
            probe: The critic's gradient stays out of the model.

        Raises:
            ValueError: A first token of a sequence is among the targets: nothing predicts it (scores: it may be).
        """
        hidden = self.hidden_T_H(batch)
        if want == "hidden":
            return hidden
        targets = batch.targets_N if targets_N is None else targets_N
        if want == "scores":
            head = self.scorer()
            bias = None if head.bias is None else head.bias.float()
            return torch.nn.functional.linear(hidden[targets].float(), head.weight.float(), bias)
        predictors = batch.predictors_T[targets]
        require_all(predictors >= 0, lambda: "the first token of a sequence was asked for; no hidden state predicts it")
        hidden_N_H, tokens_N = hidden[predictors], batch.tokens_T[targets]
        if want == "cross_entropy":
            if coefficients_N is None:
                coefficients_N = batch.weights_T[targets]
            return self.backend.cross_entropy(hidden_N_H, self.head(), tokens_N, coefficients_N)
        logprobs = self.backend.logprobs(hidden_N_H, self.head(), tokens_N, temperature, entropy)
        if want == "logprobs":
            return logprobs
        if self.value is None:
            raise ValueError("this model has no critic: call add_value_head() first")
        seen = (hidden_N_H.detach() if probe else hidden_N_H).float() * hidden_N_H.shape[-1] ** -0.5
        return *logprobs, self.value(seen).squeeze(-1)

    def pack(self, samples: list[Sample], share_prefixes: bool = True) -> RaggedBatch:
        """Pack samples on the model's device, with shared prefixes if the model type allows them."""
        return pack(samples, share_prefixes and self.ragged).to(self.device)


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
    ignored = [name for name, p in hf.named_parameters() if p.requires_grad and id(p) not in used]
    peft_config = getattr(hf, "active_peft_config", None)
    if ignored or getattr(peft_config, "is_prompt_learning", False):
        kind = getattr(getattr(peft_config, "peft_type", None), "value", "this model")
        raise ModelError(
            f"{kind}: {', '.join(ignored[:3]) or 'its virtual tokens'} would get no gradient: posttrain runs the "
            "decoder and its output head's weight, and nothing around them. Use adapters inside the decoder's layers "
            "(lora, dora, rslora, or another of peft's kinds for linear layers); the output head takes lora and rslora"
        )


def no_dropout(model: nn.Module) -> None:
    """Switch every dropout off: with it a step would depend on how its batch is split, and resume on random states."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _supports_ragged(base: Any) -> bool:
    """Return True if attention goes through transformers' interface and no other state runs along the sequence."""
    config = base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    stateful = sorted(k for k in kinds if any(s in k for s in STATEFUL)) or getattr(base, "_is_stateful", False)
    if getattr(base, "_supports_attention_backend", False) and not stateful:
        return True
    warnings.warn(
        f"{config.model_type}: its attention can't be shared ({stateful or 'no attention interface'}); "
        "sequences are computed one at a time, which is right but slow",
        stacklevel=3,
    )
    return False


@torch.no_grad()
def verify(model: LanguageModel, tolerance: float | None = None) -> float:
    """Compare ragged log-probabilities with the model's own logits on a few tokens; return the largest difference.

    Guards against a model type whose head or attention does something that we do not know of. Raises ModelError.
    """
    base, vocabulary = model.base, model.base.get_output_embeddings().weight.shape[0]
    tokens = torch.arange(1, 13) * 7919 % vocabulary
    sample = Sample(tokens.tolist(), [0.0] + [1.0] * 11)
    twin = Sample([*sample.tokens[:8], *sample.tokens[2:6]], [0.0] + [1.0] * 11)
    batch = pack([sample, twin], model.ragged, min_shared=4).to(model.device)
    targets = batch.rows[0][1:]
    ours = model(batch, targets_N=targets)[0]
    if model.ragged:
        base.set_attn_implementation("eager")
    try:
        logits = base(input_ids=tokens[None].to(model.device), use_cache=False).logits[0, :-1].float()
    finally:
        if model.ragged:
            base.set_attn_implementation(attention.IMPLEMENTATION_NAME)
    theirs = logits.log_softmax(-1).gather(1, tokens[1:, None].to(model.device)).squeeze(1)
    difference = float((ours - theirs).abs().max())
    if tolerance is None:
        tolerance = 1e-3 if ours.dtype == next(base.parameters()).dtype else 0.3
    if not difference <= tolerance:
        raise ModelError(
            f"{base.config.model_type}: log-probabilities of the ragged forward differ from the model's own by "
            f"{difference:.2g} (tolerance {tolerance:g}). Its attention or output head does something unknown to "
            "posttrain; please report the model type"
        )
    return difference
