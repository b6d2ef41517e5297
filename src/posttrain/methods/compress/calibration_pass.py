"""Run calibration rows through a model, layer after layer, so that each layer is compressed for the inputs it will get.

GPTQ (arXiv 2210.17323), AWQ (2306.00978), SparseGPT (2301.00774) and Wanda (2306.11695) compress a layer for the inputs
that the layers before it give once they are compressed. The hidden states of all rows are kept, and go through one layer
at a time: once with the weights as they are, to collect the statistics, and once with what the caller has made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.core.errors import ModelError
from posttrain.core.ragged import RaggedBatch, micro_batches
from posttrain.core.types import Sample
from posttrain.methods.compress.input_statistics import InputObserver, InputStatistics
from posttrain.models.language_model import LanguageModel
from posttrain.models.model_types import decoder_layers
from posttrain.models.weight_matrices import LayerMatrix, matrices_of

TOKENS_AT_ONCE = 2048
"""Tokens of one pass through a layer."""
CHECKED_TOKENS = 48
"""Tokens on which layer after layer is compared with the model's own pass."""
AFTER_LAYERS = "output head"


@dataclass(frozen=True)
class CalibratedLayer:
    """Hold one layer and what its matrices multiply.

    Attributes:
        number: Its place in the decoder; that of the output head is the number of layers.
        name: Its name in the model.
        module: The layer.
        matrices: Its matrices.
        statistics: By name of the matrix; a matrix that no token has reached is missing.
    """

    number: int
    name: str
    module: nn.Module
    matrices: tuple[LayerMatrix, ...]
    statistics: Mapping[str, InputStatistics]

    @property
    def unreached(self) -> list[str]:
        """Return the names of matrices that no calibration token has reached: experts that no row was routed to."""
        return [m.name for m in self.matrices if m.name not in self.statistics]


@dataclass
class _Pass:
    """Hold a batch between two layers.

    Attributes:
        batch: The batch.
        hidden: Hidden states after the newest layer.
        given: What each layer gets beside hidden states.
    """

    batch: RaggedBatch
    hidden: Tensor
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


def calibrate(
    policy: LanguageModel,
    samples: Sequence[Sample],
    statistics: Sequence[str],
    wanted: Callable[[str], bool] = lambda name: True,
    head: bool = False,
    tokens_at_once: int = TOKENS_AT_ONCE,
    relative: bool = False,
) -> Iterator[CalibratedLayer]:
    """Yield each layer with the statistics of its inputs; what the caller changes in it, later layers are given.

    Between two layers the hidden states of all samples are held, and of statistics those of one layer alone.

    Args:
        policy: The model, without adapters.
        samples: Calibration rows as tokens; their weights are not looked at.
        statistics: What is collected, of `input_statistics.STATISTICS`. Empty: nothing.
        wanted: Selects matrices by name.
        head: Yield the output head too, after the last layer.
        tokens_at_once: Tokens of one pass.
        relative: Count each token by 1 / the mean square of its hidden state after the layer (`error_weights`).

    Raises:
        ModelError: The model can't be computed layer after layer, or there are no samples.
    """
    if not samples:
        raise ModelError("calibration needs at least one row, and got none")
    layers = LayerByLayer(policy)
    with torch.no_grad():
        layers.check(samples[0])
        passes = layers.begin(samples, tokens_at_once)
        for number, layer in enumerate(layers.layers):
            own = tuple(m for m in layers.matrices[number] if wanted(m.name))
            observer = InputObserver(own, statistics, hold=relative)
            if statistics and own:
                with observer:
                    for one in passes:
                        observer.counts_N = layers.counts(one.batch)
                        after = layers.advance(number, one)
                        if relative:
                            observer.add_held(error_weights(after))
            yield CalibratedLayer(number, layers.names[number], layer, own, observer.found)
            if number + 1 < len(layers.layers) or head:
                for one in passes:
                    one.hidden = layers.advance(number, one)
                    one.given[number] = ((), {})
        if head:
            yield layers.head(passes, statistics)


class LayerByLayer:
    """Compute a model one decoder layer at a time.

    Attributes:
        layers: The decoder layers, in order.
        names: Their names in the model.
        matrices: The matrices of each.
    """

    def __init__(self, policy: LanguageModel) -> None:
        if policy.soft_prompt is not None:
            raise ModelError("a model with a soft prompt can't be compressed: start from the model without it")
        self.policy, base = policy, policy.base
        self.layers = outermost_layers(policy)
        if not self.layers:
            kind = base.config.get_text_config().model_type
            raise ModelError(f"{kind}: its decoder layers are not known (_no_split_modules is empty)")
        by_id = {id(m): name for name, m in base.named_modules()}
        self.names = [by_id[id(layer)] for layer in self.layers]
        self.matrices = [matrices_of(m, n) for n, m in zip(self.names, self.layers, strict=True)]
        # Experts are given some tokens of a batch, and which ones is not seen: each row's tokens are computed then.
        self.shared = policy.ragged and not any("expert" in name for name in by_id.values())
        self._tuples = [False] * len(self.layers)

    def counts(self, batch: RaggedBatch) -> Tensor:
        """Return (T,) how many rows each token is a part of."""
        counts = torch.zeros(batch.total, device=batch.tokens_T.device)
        for row in batch.rows:
            counts[row] += 1.0
        return counts

    def begin(self, samples: Sequence[Sample], tokens_at_once: int) -> list[_Pass]:
        """Return all samples in batches, before the first layer."""
        lengths = [len(s) for s in samples]
        split = micro_batches(lengths, tokens_at_once) if self.policy.ragged else [[i] for i in range(len(samples))]
        return [self._record(self.policy.pack([samples[i] for i in m], self.shared)) for m in split]

    def advance(self, number: int, one: _Pass) -> Tensor:
        """Return the hidden states of a batch after a layer, given those before it."""
        args, kwargs = one.given[number]
        out = self.layers[number](one.hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def head(self, passes: Sequence[_Pass], statistics: Sequence[str]) -> CalibratedLayer:
        """Return the output head with the statistics of its inputs, once all layers are done."""
        head = self.policy.base.get_output_embeddings()
        name = next(n for n, m in self.policy.base.named_modules() if m is head)
        found = InputStatistics(statistics)
        for one in passes:
            hidden = self.finish(one)
            found.add(hidden, self.counts(one.batch))
        return CalibratedLayer(len(self.layers), AFTER_LAYERS, head, (LayerMatrix(name, head),), {name: found})

    def check(self, sample: Sample) -> None:
        """Compare layer after layer with the model's own pass, on a few tokens.

        Raises:
            ModelError: They differ: the layers hand each other more than hidden states.
        """
        short = Sample(sample.tokens[:CHECKED_TOKENS], sample.weights[:CHECKED_TOKENS])
        batch = self.policy.pack([short], self.shared)
        with ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                stack.callback(layer.register_forward_hook(self._note_form(number)).remove)
            expected = self.decode(batch)
        one = self._record(batch)
        for number in range(len(self.layers)):
            one.hidden = self.advance(number, one)
        found = self.finish(one)
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            kind = self.policy.base.config.get_text_config().model_type
            raise ModelError(
                f"{kind}: its layers hand each other more than hidden states, so it can't be calibrated layer after "
                "layer (largest difference from its own pass "
                f"{float((found - expected).abs().max()):.3g})"
            )

    def _note_form(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            self._tuples[number] = isinstance(out, tuple)

        return hook

    def decode(self, batch: RaggedBatch) -> Tensor:
        """Return the decoder's hidden states; without padding, whose tokens would reach experts."""
        policy = self.policy
        alone: dict[str, Any] = {"input_ids": batch.tokens_T[None]}
        inputs = policy.ragged_inputs(batch) if policy.ragged else alone
        if policy.router_loss is not None:
            inputs["output_router_logits"] = False
        hidden: Tensor = policy.decoder(use_cache=False, **inputs).last_hidden_state[0]
        return hidden

    def _record(self, batch: RaggedBatch) -> _Pass:
        """Return a batch before the first layer, and what each layer is given beside hidden states."""
        one = _Pass(batch, torch.empty(0))

        def taking(number: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
                if number == 0:
                    one.hidden = hidden
                one.given.append((rest, kwargs))
                return (hidden,) if self._tuples[number] else hidden

            return forward

        with _forwards(self.layers, taking):
            self.decode(batch)
        return one

    def finish(self, one: _Pass) -> Tensor:
        """Return the decoder's output for hidden states after the last layer."""

        def giving(number: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                return (one.hidden,) if self._tuples[number] else one.hidden

            return forward

        with _forwards(self.layers, giving):
            return self.decode(one.batch)


def error_weights(hidden: Tensor) -> Tensor:
    """Return (T,) what an error of each token counts after a layer: 1 / the mean square of its hidden state.

    Whatever comes after the layer reads a token's hidden state through a norm, which divides it by its size: an error
    counts relative to that. Without this the first token, whose hidden state is a hundred to a thousand times as large
    in many models (massive activations, arXiv 2402.17762), would outweigh all others together.

    Args:
        hidden: Hidden states after the layer, (..., H).
    """
    return 1.0 / hidden.float().square().mean(-1).flatten().clamp(min=torch.finfo(torch.float32).tiny)


def outermost_layers(policy: LanguageModel) -> list[nn.Module]:
    """Return the repeated layers of the decoder; of types that name parts of layers too (Mamba), the whole layers."""
    layers = decoder_layers(policy.base)
    parts = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    return [layer for layer in layers if id(layer) not in parts]


@contextmanager
def _forwards(layers: Sequence[nn.Module], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Give each layer another forward, by its number, within the context."""
    before = [vars(layer).get("forward") for layer in layers]
    for number, layer in enumerate(layers):
        layer.forward = make(number)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward  # type: ignore[method-assign]
