"""Models with a head that scores instead of one that predicts tokens: reward models and process reward models.

They are transformers' own models for classification, so that every other tool loads them. ``sequence``:
AutoModelForSequenceClassification with one label, read at the last token that is not the padding token. ``token``:
AutoModelForTokenClassification, read at the ends of steps: one label (log odds of right) or two (wrong, right).

A critic (`LanguageModel.add_value_head`) shares the policy's trunk and is thrown away; these are models of their own.
What the two have in common is a linear layer on hidden states, and that is all there is to share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posttrain.config import AdapterConfig, ModelConfig
from posttrain.core.errors import ModelError
from posttrain.core.types import Sample
from posttrain.models.adapter_export import write_adapter
from posttrain.models.adapters import attach_to, merge
from posttrain.models.backends import backend_for
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import (
    OpenedModel,
    base_settings,
    load_settings,
    merge_start,
    open_model,
    pick_device,
    pick_dtype,
    quiet,
    read_weights,
    resolve,
    source_adapter,
    tokenizer_and_new_ids,
    with_rows,
)
from posttrain.models.model_types import remember_one_at_a_time, warn_one_at_a_time
from posttrain.models.portable_files import NEEDS_NEW, finish_folder
from posttrain.models.saving import gathered, restore_attention
from posttrain.models.soft_prompt import SoftPrompt, soft_prompt_inputs
from posttrain.models.verification import own_attention

Layout = Literal["sequence", "token"]
SUFFIX = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification"}
LABELS = {"sequence": (1,), "token": (1, 2)}
ADAPTER_TASKS = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS"}
"""peft's task types of adapters on such models."""


def _auto(layout: Layout) -> Any:
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    return AutoModelForSequenceClassification if layout == "sequence" else AutoModelForTokenClassification


def open_head(config: ModelConfig, layout: Layout, seed: int = 0, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Open a transformers model for classification, and its tokenizer: see `open_scorer`.

    Args:
        config: Source of the model.
        layout: sequence or token.
        seed: Seed of a new head.
        dtype: Overrides the configured one.
    """
    opened = open_scorer(config, layout, seed, dtype)
    return opened.hf, opened.tokenizer


def open_scorer(config: ModelConfig, layout: Layout, seed: int = 0, dtype: torch.dtype | None = None) -> OpenedModel:
    """Open a transformers model for classification, and its tokenizer, on its device.

    A source that is such a model already is opened as it is; a causal language model gives its trunk and gets a new
    head of one label, drawn from N(0, 1 / (H + 1)) with `seed` (arXiv 2009.01325, appendix B).

    Args:
        config: Source of the model.
        layout: sequence or token.
        seed: Seed of a new head.
        dtype: Overrides the configured one.

    Raises:
        ModelError: The source can't be opened, transformers has no such model of its type, or it has another number of
            labels.
    """
    adapter = source_adapter(config)
    if not has_head(config, layout):
        opened = open_model(config, dtype)
        if SoftPrompt.of(opened.hf) is not None:
            raise ModelError(
                f"model source {config.source!r} has a soft prompt, on which no head that scores is trained: start "
                "from its base model"
            )
        return replace(opened, hf=_with_head(opened.hf, opened.tokenizer, layout, seed))
    if adapter is None:
        hf, tokenizer, new = _opened(config, layout, dtype)
        return with_rows(OpenedModel(hf, tokenizer, {}), new, config)
    return merge_start(open_scorer(base_settings(config, adapter), layout, seed, dtype), adapter, config)


def has_head(config: ModelConfig, layout: Layout) -> bool:
    """Return True for a source that is a model for classification. Raises ModelError if it has the other layout."""
    adapter = source_adapter(config)
    if adapter is not None and adapter.settings.get("task_type") != "CAUSAL_LM":
        task = adapter.settings.get("task_type")
        there = next((name for name, known in ADAPTER_TASKS.items() if known == task), None)
    else:
        settings = load_settings(config)
        names = list(getattr(settings, "architectures", None) or ())
        there = next((name for name, end in SUFFIX.items() if any(n.endswith(end) for n in names)), None)
    if there not in (None, layout):
        what = {"sequence": "a reward model (sequence classification)", "token": "a process reward model (of tokens)"}
        raise ModelError(f"model source {config.source!r} is {what[there]}, where {what[layout]} is needed")
    return there == layout


def _opened(config: ModelConfig, layout: Layout, dtype: torch.dtype | None) -> tuple[Any, Any, list[int]]:
    quiet()
    device = pick_device(config.device)
    backend_for(device).tune()
    dtype = dtype or pick_dtype(config.dtype, device)
    hf, _ = read_weights(_auto(layout), resolve(config.source).location, config, device, dtype)
    if hf.config.num_labels not in LABELS[layout]:
        wanted = "one" if layout == "sequence" else "one or two"
        raise ModelError(f"model source {config.source!r} gives {hf.config.num_labels} numbers, and {wanted} is needed")
    return hf, *tokenizer_and_new_ids(config)


def _with_head(causal: Any, tokenizer: Any, layout: Layout, seed: int) -> Any:
    """Put the causal model's trunk under a new head."""
    settings = causal.config
    settings.num_labels = 1
    if layout == "token":
        settings.id2label, settings.label2id = {0: "right"}, {"right": 0}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    settings.pad_token_id = settings.get_text_config().pad_token_id = pad
    try:
        with torch.device("meta"):
            hf = _auto(layout).from_config(settings)
    except ValueError as error:
        raise ModelError(
            f"{settings.model_type}: transformers has no model of this type for the classification of {layout}s"
        ) from error
    if hf.base_model_prefix != causal.base_model_prefix:
        raise ModelError(f"{settings.model_type}: its models for classification are built otherwise than causal ones")
    setattr(hf, hf.base_model_prefix, causal.base_model)
    hf.config = settings  # the very object that the trunk's layers read
    name = "score" if hasattr(hf, "score") else "classifier"
    old = getattr(hf, name, None)
    if not isinstance(old, nn.Linear) or any(p.is_meta for n, p in hf.named_parameters() if not n.startswith(name)):
        raise ModelError(f"{settings.model_type}: its head for the classification of {layout}s is not one linear layer")
    weight = next(causal.parameters())
    draws = torch.randn(1, old.in_features, generator=torch.Generator().manual_seed(seed))
    head = nn.Linear(old.in_features, 1, bias=old.bias is not None)
    with torch.no_grad():
        head.weight.copy_(draws * (old.in_features + 1) ** -0.5)
        if head.bias is not None:
            head.bias.zero_()
    setattr(hf, name, head.to(device=weight.device, dtype=weight.dtype))
    return hf


def score_index(tokens: Sequence[int], padding: int | None) -> int:
    """Find where transformers' models for sequence classification read: the last token that is not the padding token.

    A tokenizer whose padding is its end token makes that the token before the end, there as here. Nothing but padding:
    the first.
    """
    return next((i for i in range(len(tokens) - 1, -1, -1) if tokens[i] != padding), 0)


def padding(model: LanguageModel) -> int | None:
    """Return the padding token in the model's settings."""
    return getattr(model.base.config.get_text_config(), "pad_token_id", None)


@torch.no_grad()
def scores_at(
    model: LanguageModel, sequences: Sequence[Sequence[int]], places: Sequence[Sequence[int]], budget: int = 4096
) -> list[Tensor]:
    """Compute the head's numbers at the given places of each sequence, (places, labels) float32 on the CPU, in order.

    Sequences with a common beginning share a pass, which computes the beginning once.

    Args:
        model: A model for classification.
        sequences: Token ids, none empty.
        places: Places in each sequence.
        budget: Tokens that a pass computes.
    """
    out: list[Tensor] = [torch.zeros(0)] * len(sequences)
    for mine in _alike(sequences, budget if model.ragged else 1):
        batch = model.pack([Sample(sequences[i], [0.0] * len(sequences[i])) for i in mine])
        where = [batch.rows[j][torch.tensor(list(places[i]), dtype=torch.long)] for j, i in enumerate(mine)]
        found = model(batch, "scores", torch.cat(where)).cpu()
        for i, part in zip(mine, found.split([len(w) for w in where]), strict=True):
            out[i] = part
    return out


def _alike(sequences: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Group indices into passes of at most `budget` tokens to compute (or one sequence), in the order of tokens."""
    passes: list[list[int]] = []
    total, before = 0, tuple[int, ...]()
    for i in sorted(range(len(sequences)), key=lambda i: (tuple(sequences[i]), i)):
        tokens = tuple(sequences[i])
        shared = next((k for k, (a, b) in enumerate(zip(tokens, before, strict=False)) if a != b), None)
        shared = min(len(tokens), len(before)) if shared is None else shared
        if not passes or total + len(tokens) - shared > budget:
            passes.append([])
            total, shared = 0, 0
        passes[-1].append(i)
        total, before = total + len(tokens) - shared, tokens
    return passes


def verify_scores(model: LanguageModel, layout: Layout) -> float:
    """Compare our scores with the model's own on a few tokens, and two passes; return the largest difference.

    A type whose ragged batches give other scores is computed one sequence at a time from then on, with a warning.

    Raises:
        ModelError: The scores are not understood, or two passes over the same tokens differ.
    """
    kind = model.base.config.model_type
    allowed = 1e-3 if next(model.base.parameters()).dtype == torch.float32 else 0.3
    difference = _score_difference(model, layout)
    if not difference <= allowed and model.ragged:
        model.compute_one_at_a_time()
        single = _score_difference(model, layout)
        if single <= allowed:
            remember_one_at_a_time(model.base)
            warn_one_at_a_time(model.base, "it computes other scores on a ragged batch")
            return single
    if not difference <= allowed:
        raise ModelError(
            f"{kind}: posttrain's scores differ from the model's own by {difference:.2g}. Its attention or head does "
            "something unknown to posttrain, or it draws random numbers in evaluation mode; please report the type"
        )
    return difference


def check_soft_start(source: ModelConfig, adapter: AdapterConfig | None) -> None:
    """Raise ModelError for a soft prompt and a head to be trained on a source that is an adapter itself.

    Both are saved as one adapter on the base, which then has to be a whole model.
    """
    if adapter is not None and adapter.is_soft_prompt and source_adapter(source) is not None:
        raise ModelError(
            f"model source {source.source!r} is an adapter, on which no reward model with a soft prompt is trained: "
            "start from a whole model (merge: true of the stage that made it)"
        )


@torch.no_grad()
def _score_difference(model: LanguageModel, layout: Layout) -> float:
    """Return the largest difference of our scores from the model's own, or between two passes of ours."""
    vocabulary, pad = model.base.get_input_embeddings().weight.shape[0], padding(model)
    tokens = [t for t in (torch.arange(1, 16) * 7919 % vocabulary).tolist() if t != pad][:12]
    places = [len(tokens) - 1] if layout == "sequence" else list(range(len(tokens)))
    ours, again = (scores_at(model, [tokens, tokens[:6]], [places, [0]])[0] for _ in range(2))
    with own_attention(model):
        ids = torch.tensor([tokens], device=model.device)
        inputs, prefix = {"input_ids": ids}, model.virtual is not None and not model.virtual.computed
        if model.virtual is not None:
            inputs = soft_prompt_inputs(model.hf, ids)
            inputs |= {"input_ids": ids} if prefix else {}
        found = model.base(use_cache=prefix, **inputs).logits.float().cpu()[0]
        theirs = found.reshape(-1, ours.shape[-1])[-len(ours) :]
    return float(torch.stack([ours - theirs, again - theirs]).abs().max())


def save_head(
    model: LanguageModel,
    tokenizer: Any,
    source: ModelConfig,
    layout: Layout,
    folder: Path,
    adapter: AdapterConfig | None,
    seed: int,
) -> dict[str, Any]:
    """Write the model to `folder` in transformers' layout, adapters merged; one with a soft prompt as an adapter.

    Every rank must call; rank 0 writes.

    Args:
        model: The model; it can't be used afterwards.
        tokenizer: Its tokenizer.
        source: The source that was trained.
        layout: sequence or token.
        folder: Where to write.
        adapter: Settings of its adapters, if any.
        seed: Seed of the stage.

    Returns:
        Notes for the manifest: how far merging moved the scores.
    """

    def again() -> Any:
        opened = open_scorer(source.model_copy(update={"device": "cpu"}), layout, seed, torch.float32)
        return opened.hf if adapter is None else attach_to(opened, adapter, seed, "SEQ_CLS")

    hf = gathered(model, again)
    if hf is None:
        return {}
    restore_attention(hf)
    notes: dict[str, Any] = {}
    if SoftPrompt.of(hf) is not None:
        write_adapter(hf, folder, source, None)
        tokenizer.save_pretrained(folder)
        finish_folder(folder)
        return {"adapter": "alone"}
    if adapter is not None:
        hf, notes["merge_difference"] = merge(hf)
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return notes if finish_folder(folder) else notes | {"transformers": NEEDS_NEW}
