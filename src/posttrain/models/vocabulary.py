"""Tokens without a trained row: those that a recipe adds, and those of a tokenizer larger than its model's embedding.

Their rows of the embedding, and of the output head if it has its own, are set to the mean of the other tokens' rows.
The opposite, rows without a token, is common (vocabularies are padded): such ids have no text and are never sampled.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.config import NewToken
from posttrain.core.errors import ModelError
from posttrain.data.sample_store import vocabulary_size

EXAMPLE_TOKENS = 3
log = logging.getLogger("posttrain")


def add_tokens(tokenizer: Any, tokens: Sequence[str | NewToken]) -> list[int]:
    """Add tokens to a tokenizer; return the ids of those that it did not have."""
    from transformers import AddedToken

    known, new = tokenizer.get_vocab(), list[int]()
    for entry in tokens:
        token, special = (entry, False) if isinstance(entry, str) else (entry.token, entry.special)
        if token in known:
            log.info("model.add_tokens: %r is a token already", token)
            continue
        made = AddedToken(token, special=special, normalized=False, lstrip=False, rstrip=False, single_word=False)
        tokenizer.add_tokens([made], special_tokens=special)
        new.append(int(tokenizer.convert_tokens_to_ids(token)))
    return new


def textless_ids(tokenizer: Any, rows: int) -> list[int]:
    """Return the ids below `rows` that no token has."""
    known = set(tokenizer.get_vocab().values())
    return [i for i in range(rows) if i not in known]


def fit_embedding(hf: Any, tokenizer: Any, new: Sequence[int] = (), source: str = "the model") -> list[int]:
    """Give every token of the tokenizer a row of the embedding, in place.

    Args:
        hf: A transformers model.
        tokenizer: Its tokenizer.
        new: Ids of tokens that were added to it: their rows are set too if they exist, since nothing has used them.
        source: Name of the model, for messages.

    Returns:
        The ids of the tokens whose rows were set, ascending.

    Raises:
        ModelError: The model's embedding can't be resized.
    """
    rows, size = embedding_rows(hf), vocabulary_size(tokenizer)
    fresh = sorted({*new, *range(rows, size)})
    if not fresh:
        return []
    if size > rows:
        resize_embedding(hf, size, source)
    without = {*fresh, *textless_ids(tokenizer, rows)}
    set_mean_rows(hf, fresh, torch.tensor([i for i in range(rows) if i not in without]))
    log.info(
        "%s: %d tokens have no trained row in the embedding (%d rows): theirs are set to the mean of the others",
        source, len(fresh), rows,
    )  # fmt: skip
    return fresh


def embedding_rows(hf: Any) -> int:
    """Return the number of rows of a model's embedding."""
    return int(hf.get_input_embeddings().weight.shape[0])


def vocabulary_difference(theirs: Any, ours: Any) -> str:
    """Return how the tokens of a tokenizer differ from another's in words; empty if they do not."""
    theirs, ours = theirs.get_vocab(), ours.get_vocab()
    if theirs == ours:
        return ""
    more, less = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    moved = sum(theirs[token] != ours[token] for token in theirs.keys() & ours.keys())
    parts = [(f"{len(more):,} tokens more", more), (f"{len(less):,} fewer", less)]
    words = [f"{what} ({', '.join(map(repr, tokens[:EXAMPLE_TOKENS]))})" for what, tokens in parts if tokens]
    return ", ".join(words + ([f"{moved:,} with another id"] if moved else []))


def check_same_vocabulary(name: str, theirs: Any, ours: Any) -> None:
    """Check that a model can be a member of an ensemble: a distribution is over the tokens of one vocabulary.

    Args:
        name: Source of the model.
        theirs: Its tokenizer.
        ours: The ensemble's tokenizer.

    Raises:
        ModelError: Tokens differ.
    """
    if difference := vocabulary_difference(theirs, ours):
        raise ModelError(
            f"the vocabulary of {name} differs from the ensemble's: {difference}. Members share one: "
            "leave this model out, or merge weights with tokenizer: union"
        )


def output_rows(hf: Any) -> int:
    """Return the number of a model's logits."""
    head = hf.get_output_embeddings()
    return embedding_rows(hf) if head is None else int(head.weight.shape[0])


def resize_embedding(hf: Any, rows: int, source: str) -> None:
    """Give a model's embedding and output head this number of rows, in place.

    Args:
        hf: A transformers model.
        rows: The number of rows.
        source: Name of the model, for messages.

    Raises:
        ModelError: The model's embedding can't be resized.
    """
    try:
        with torch.random.fork_rng():
            hf.resize_token_embeddings(rows, mean_resizing=False)
    except (NotImplementedError, AttributeError, ValueError, TypeError) as error:
        raise ModelError(
            f"{source}: the tokenizer has more tokens than the embedding has rows ({embedding_rows(hf)}), and this "
            f"model type's embedding can't be resized ({error}). Use a tokenizer of the model's size"
        ) from error


def token_tables(hf: Any) -> list[Tensor]:
    """Return the tensors with a row (or a number) for each token: embedding, output head and its bias."""
    embedding, head = hf.get_input_embeddings(), hf.get_output_embeddings()
    tables = [embedding.weight]
    if head is not None and getattr(head, "weight", None) is not None and head.weight is not embedding.weight:
        tables.append(head.weight)
    if head is not None and getattr(head, "bias", None) is not None:
        tables.append(head.bias)
    return tables


@torch.no_grad()
def set_mean_rows(hf: Any, fresh: Sequence[int], known: Tensor) -> None:
    """Set rows of a model's embedding and output head to the mean of others, in place.

    Args:
        hf: A transformers model.
        fresh: Ids whose rows are set.
        known: Ids whose rows are averaged.
    """
    for table in token_tables(hf):
        mean = table[known.to(table.device)].float().mean(0)
        table[torch.tensor(list(fresh), dtype=torch.long, device=table.device)] = mean.to(table.dtype)


def trainable_rows(hf: Any, new: Sequence[int], targets: Sequence[str]) -> dict[str, list[int]]:
    """Return which rows of which modules adapters have to train for new tokens, as peft's trainable_token_indices.

    Args:
        hf: A transformers model.
        new: Ids of the tokens.
        targets: Names of modules that low-rank adapters change: those train their rows themselves.
    """
    if not new:
        return {}
    embedding, head = hf.get_input_embeddings(), hf.get_output_embeddings()
    modules = [embedding]
    if head is not None and head.weight is not embedding.weight:
        modules.append(head)
    names = [name for module in modules for name, m in hf.named_modules() if m is module]
    heads = [name for name, m in hf.named_modules() if m is head and m is not None]
    adapted = {n for n in (*names, *heads) if any(n == t or n.endswith(f".{t}") for t in targets)}
    if adapted and len(modules) == 1:
        return {}  # peft has no rows for weights that are shared by a layer with an adapter
    return {name: list(new) for name in names if name not in adapted}
