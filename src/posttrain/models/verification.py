"""Compare, before anything is trained, what posttrain computes with what the model itself computes.

The decoder runs on a ragged batch, its head in chunks and its layers through kernels of our own, for every model type
of transformers. A type whose attention, head or training mode does something else than these assume is noticed here, on
a few tokens: it is computed one sequence at a time if that is right, and refused otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.core.errors import ModelError
from posttrain.core.ragged import RaggedBatch
from posttrain.core.types import Sample
from posttrain.models import attention
from posttrain.models.language_model import LanguageModel
from posttrain.models.model_types import remember_one_at_a_time, set_attention, warn_one_at_a_time
from posttrain.models.router_loss import add_up
from posttrain.models.soft_prompt import soft_prompt_inputs

TOKENS = 12
"""Length of the sequences that are compared, where no sliding window is longer."""
LONGEST_WINDOW = 128
"""Up to this size of a sliding window, sequences are longer than the window."""
SINGLE_TOLERANCE = 2e-4
"""Largest error of log-probabilities in float32: its root mean square over the vocabulary, of their spread there."""
HALF_TOLERANCE = 0.1
"""The same in 16 bit, for the median of all positions: rounding may send a single token to another expert."""
HALF_HEAD_TOLERANCE = 0.02
"""The same in 16 bit for the output head alone, on the model's own hidden states."""
TRAINING_TOLERANCE = 1e-3
"""Largest difference in nats, in float32, between the forward pass of training and that of sampling."""
ROUNDING_FACTOR = 8
"""Where the model itself magnifies rounding: largest error, as a multiple of what rounding the embeddings changes."""
ROUNDING_LIMIT = 20
"""Times a tolerance that rounding excuses at most: above, a wrong forward pass could not be told from a right one."""
ROUTER_TOLERANCE = 1e-3
"""Largest relative difference of the router loss from transformers' number (in 16 bit: 0.05)."""


def verify(model: LanguageModel) -> float:
    """Compare log-probabilities with the model's own on a few tokens, and two passes with each other.

    A type whose ragged batches give other numbers is computed one sequence at a time from then on, with a warning.

    Returns:
        The largest difference of a target's log-probability, in nats.

    Raises:
        ModelError: The model's numbers are not understood, or two passes over the same tokens differ.
    """
    kind = model.base.config.get_text_config().model_type
    difference, problem = _tried(model)
    if problem is not None and model.ragged:
        model.compute_one_at_a_time()
        single, remaining = _tried(model)
        if remaining is not None:
            raise ModelError(f"{kind}: {problem}")
        remember_one_at_a_time(model.base)
        warn_one_at_a_time(model.base, "it computes other numbers on a ragged batch")
        return single
    if problem is not None:
        raise ModelError(f"{kind}: {problem}")
    return difference


def _tried(model: LanguageModel) -> tuple[float, str | None]:
    """Return what `_compared` does; an exception on the way is a problem too."""
    training = model.training
    try:
        return _compared(model)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return float("nan"), (
            f"posttrain can't compute log-probabilities with this model type ({type(error).__name__}: {first}). It "
            "trains decoder-only language models; please report the type if it is one"
        )
    finally:
        model.train(training)


def _compared(model: LanguageModel) -> tuple[float, str | None]:
    """Return the largest difference of a target's log-probability, and a sentence on what is not understood."""
    samples = _samples(model)
    batch = model.pack(samples, min_shared=4)
    single = next(model.base.parameters()).dtype not in (torch.bfloat16, torch.float16)
    trained, ours, noisy = _own_passes(model, batch)
    if bool(ours.isnan().any()):
        return float("nan"), "its logits are no numbers (NaN): its weights are damaged, or too large for its dtype"
    if noisy:
        return float("nan"), (
            "two forward passes over the same tokens differ: it draws random numbers in evaluation mode too. A step "
            "would depend on how its batch is split; models with noise that can't be switched off are not supported"
        )
    theirs, heads = _their_pass(model, samples)
    shared = next(i for i, (a, b) in enumerate(zip(*(s.tokens for s in samples[:2]), strict=True)) if a != b)
    leak = (theirs[0, :shared] - theirs[1, :shared]).square().mean(-1).sqrt() / theirs[0, :shared].std(-1)
    if bool(leak.isnan().any()):  # they have no spread
        return float(
            "nan"
        ), "its logits are the same for all tokens: its weights are damaged, or too large for its dtype"
    if not float(leak.median()) <= (SINGLE_TOLERANCE if single else HALF_TOLERANCE):
        return float("nan"), "its predictions depend on later tokens: it is no decoder-only language model"
    spread = theirs.std(-1).clamp_min(1e-6)
    error = (ours - theirs).square().mean(-1).sqrt() / spread
    at = [torch.tensor(s.tokens[1:], device=theirs.device)[:, None] for s in samples]
    of_targets = [torch.stack([x[i, :-1].gather(1, t)[:, 0] for i, t in enumerate(at)]) for x in (ours, theirs)]
    difference = float((of_targets[0] - of_targets[1]).abs().max())
    if heads is not None:
        head_error = (heads - theirs).square().mean(-1).sqrt() / spread
        if not float(head_error.max()) <= (SINGLE_TOLERANCE if single else HALF_HEAD_TOLERANCE):
            return difference, (
                f"the logits of posttrain's output head differ from the model's own by {head_error.max():.2g} of their "
                "spread: the type does something unknown to them. Please report it"
            )
    worst, tolerance = (error.max(), SINGLE_TOLERANCE) if single else (error.median(), HALF_TOLERANCE)
    apart = float((trained - of_targets[0]).abs().max()) if single else 0.0
    excused, apart_excused = 0.0, 0.0
    if single and max(float(worst) / tolerance, apart / TRAINING_TOLERANCE) > 1 and float(error.median()) <= tolerance:
        changed = _rounded_pass(model, samples)
        moved = torch.stack([changed[i, :-1].gather(1, t)[:, 0] for i, t in enumerate(at)]) - of_targets[1]
        excused = ROUNDING_FACTOR * float(((changed - theirs).square().mean(-1).sqrt() / spread).max())
        apart_excused = ROUNDING_FACTOR * float(moved.abs().max())
    if not float(worst) <= max(tolerance, min(excused, ROUNDING_LIMIT * tolerance)):
        return difference, (
            f"log-probabilities of posttrain's forward pass differ from the model's own by {difference:.2g} nats, "
            f"{error.max():.2g} of their spread. It is no decoder-only language model, or its attention does something "
            "unknown to posttrain; please report the model type"
        )
    if not apart <= max(TRAINING_TOLERANCE, min(apart_excused, ROUNDING_LIMIT * TRAINING_TOLERANCE)):
        return difference, (
            f"the forward pass of training differs from that of sampling by {apart:.2g} nats: it does something in "
            "training that posttrain can't switch off"
        )
    return difference, _router_problem(model, samples[0], ROUTER_TOLERANCE if single else 0.05)


def _samples(model: LanguageModel) -> list[Sample]:
    """Make three sequences of one length: the second continues a prefix of the first, the third shares nothing."""
    config = model.base.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    length = window + 8 if isinstance(window, int) and TOKENS <= window + 8 <= LONGEST_WINDOW + 8 else TOKENS
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    vocabulary = min(m.weight.shape[0] for m in (model.base.get_input_embeddings(), model.base.get_output_embeddings()))
    named = {**model.base.config.to_dict(), **config.to_dict()}
    special = {v for k, v in named.items() if k.endswith("_token_id") and isinstance(v, int)}
    ordinary = [t for t in (i * 7919 % vocabulary for i in range(1, 4 * length)) if t not in special] or [0]
    a, c = ((ordinary * length)[start : start + length] for start in (0, length))
    shared = length * 2 // 3
    b = a[:shared] + c[: length - shared]
    return [Sample(tokens, [0.0] + [1.0] * (length - 1)) for tokens in (a, b, c)]


def _own_passes(model: LanguageModel, batch: RaggedBatch) -> tuple[Tensor, Tensor, bool]:
    """Compute log-probabilities as training does, of the targets, and as sampling does, of the whole vocabulary.

    Returns:
        (of targets (samples, length - 1), of all (samples, length, V), whether they are random).
    """
    before = _random_states(model.device)
    targets = torch.cat([row[1:] for row in batch.rows])
    with torch.enable_grad():
        trained = model.train()(batch, targets_N=targets)[0].detach()
    with torch.no_grad():
        hidden = model.eval()(batch, "hidden")
        noisy = before != _random_states(model.device) and not torch.equal(hidden, model(batch, "hidden"))
        head = model.logits_head()
        predicting = [torch.cat([batch.predictors_T[row[1:]], row[-1:]]) for row in batch.rows]
        ours = torch.stack([head.logits(hidden[at]).log_softmax(-1) for at in predicting])
    return trained.view(len(batch.rows), -1), ours, noisy


@torch.no_grad()
def _their_pass(model: LanguageModel, samples: list[Sample]) -> tuple[Tensor, Tensor | None]:
    """Compute the model's own log-probabilities, and those of our head on its own hidden states if they are seen."""
    hidden: list[Any] = []
    tokens = torch.tensor([s.tokens for s in samples], device=model.device)
    inputs, places = {"input_ids": tokens}, list(range(tokens.shape[1]))
    virtual = model.virtual
    if virtual is not None:
        inputs = soft_prompt_inputs(model.hf, tokens, target=1)  # the first token that carries loss
        if virtual.computed:  # where the next token is predicted: before the target by the last virtual token
            places = [virtual.count + i for i in places]
        else:
            inputs["input_ids"] = tokens  # those before them stand for what is in the cache
    hook = model.decoder.register_forward_hook(lambda module, inputs, out: hidden.append(out))
    try:
        with own_attention(model):
            logits = model.base(use_cache=not (virtual is None or virtual.computed), **inputs).logits.float()
    finally:
        hook.remove()
    found = getattr(hidden[0], "last_hidden_state", None) if len(hidden) == 1 else None
    if found is None:
        return logits[:, places].log_softmax(-1), None
    heads = model.logits_head().logits(found.flatten(0, 1)).view(*logits.shape[:-1], -1)
    return logits[:, places].log_softmax(-1), heads[:, places].log_softmax(-1)


def _rounded_pass(model: LanguageModel, samples: list[Sample]) -> Tensor:
    """Compute the model's own log-probabilities with its embeddings rounded otherwise.

    A prefix of random keys can take from the first token the attention that others pay it, and layers then magnify the
    last bit of a number a thousandfold, in any implementation.
    """
    noise = torch.Generator().manual_seed(0)

    def rounded(module: Any, inputs: Any, out: Tensor) -> Tensor:
        return out * (1 + (torch.rand(out.shape, generator=noise) - 0.5).to(out.device) * 2**-22)

    hook = model.base.get_input_embeddings().register_forward_hook(rounded)
    try:
        return _their_pass(model, samples)[0]
    finally:
        hook.remove()


@contextmanager
def own_attention(model: LanguageModel) -> Iterator[None]:
    """Let the model compute by attention of its own within the context."""
    if model.ragged:
        set_attention(model.base, "eager")
    try:
        yield
    finally:
        if model.ragged:
            set_attention(model.base, attention.IMPLEMENTATION_NAME)


@torch.no_grad()
def _router_problem(model: LanguageModel, sample: Sample, tolerance: float) -> str | None:
    """Compare the router loss of one sequence with transformers'; return a sentence if they differ."""
    if model.router_loss is None:
        return None
    with model.routings() as found:
        model(model.pack([sample]), "hidden")
    whole = add_up(found)
    ours = float(model.router_loss.share(whole, whole))
    with own_attention(model):
        tokens = torch.tensor([sample.tokens], device=model.device)
        out = model.base(input_ids=tokens, use_cache=False, output_router_logits=True)
    theirs = float(out.aux_loss)
    if abs(ours - theirs) <= tolerance * abs(theirs):
        return None
    return (
        f"its configuration asks for a router loss (output_router_logits), whose form posttrain does not know: "
        f"{ours:.5g} where transformers computes {theirs:.5g}. Set output_router_logits to false in its config.json to "
        "train without it"
    )


def _random_states(device: torch.device) -> tuple[Any, ...]:
    """Return the states of all generators that a forward pass may draw from."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return random.getstate(), str(np.random.get_state(legacy=False)), *(bytes(s.numpy()) for s in states)
