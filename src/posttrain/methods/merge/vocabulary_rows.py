"""Arrange the rows of embeddings and output heads by the ids of another tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from posttrain.methods.merge.stored_model import StoredModel

MissingRows = Literal["owner", "subtokens"]


@dataclass(frozen=True)
class RowPlan:
    """Hold where each row of an arranged table comes from.

    Attributes:
        index_R: Row of the model's own table; -1: it has none.
        owners: (Model, rows of the result, rows there, share): of tokens that only others have.
        parts: (Row of the result, rows of the model's own table): mean of the tokens that a text is made of.
    """

    index_R: Tensor
    owners: tuple[tuple[StoredModel, Tensor, Tensor, Tensor], ...]
    parts: tuple[tuple[int, Tensor], ...]

    def arrange(self, name: str, table: Tensor) -> Tensor:
        """Return a table of the model with the rows of the result.

        Args:
            name: Name of the table, under which the owners are asked for theirs.
            table: The model's own, (rows, width) or (rows,).
        """
        out = table[self.index_R.clamp_min(0)]
        out[self.index_R < 0] = 0
        for model, rows, theirs, share in self.owners:
            values = model.read(name)[theirs]
            out[rows] += values * share.view(-1, *[1] * (values.ndim - 1))
        for row, own in self.parts:
            out[row] = table[own].mean(0)
        return out


def arrange_rows(
    models: Sequence[StoredModel], tokenizer: Any, rows: int, padded: StoredModel | None, missing: MissingRows
) -> tuple[list[StoredModel], dict[str, int]]:
    """Return models whose tables have a row for each token of a tokenizer, in its order.

    A token that a model lacks gets the mean of the rows of those models that have it (owner), or the mean of the model's
    own rows of the tokens that its text is made of (subtokens; owner for special tokens and pieces of characters).

    Args:
        models: All models, the base first.
        tokenizer: Tokenizer of the result.
        rows: Number of rows of the result.
        padded: The model whose tokenizer it is. Its rows without a token stay in place, as do those of the others with
            its vocabulary. None: a union.
        missing: What rows get that a model does not have.

    Returns:
        The models, and the number of tokens for which each source lacked a row.
    """
    vocabulary = tokenizer.get_vocab()
    tokens = {number: token for token, number in vocabulary.items()}
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    # Models with the result's vocabulary differ at most in padding, of which each keeps its own rows.
    keeps = [model is padded or model.tokenizer.get_vocab() == vocabulary for model in models]
    indices = [_index(model, tokens, rows, keep) for model, keep in zip(models, keeps, strict=True)]
    out, lacked = [], {}
    for model, index in zip(models, indices, strict=True):
        gone = torch.nonzero(index < 0).flatten().tolist()
        parts = []
        if missing == "subtokens":
            for row in gone:
                own = _parts(model, tokenizer, tokens.get(row), special)
                if own:
                    parts.append((row, torch.tensor(own)))
        left = torch.tensor(sorted({*gone} - {row for row, _ in parts}), dtype=torch.long)
        if count := sum(row in tokens for row in gone):
            lacked[model.source] = count
        same = not gone and torch.equal(index, torch.arange(_rows(model)))
        out.append(
            model if same else _with_rows(model, RowPlan(index, _owners(models, indices, left), tuple(parts)), rows)
        )
    return out, lacked


def _rows(model: StoredModel) -> int:
    return model.entry(model.layout.vocabulary[0]).shape[0]


def _index(model: StoredModel, tokens: dict[int, str], rows: int, keeps_padding: bool) -> Tensor:
    """Return the model's own row of each row of the result; -1: it has none."""
    known, have = model.tokenizer.get_vocab(), _rows(model)
    out = torch.full((rows,), -1, dtype=torch.long)
    for row in range(rows):
        token = tokens.get(row)
        own = known.get(token, -1) if token is not None else row if keeps_padding else -1
        out[row] = own if own < have else -1
    return out


def _owners(
    models: Sequence[StoredModel], indices: Sequence[Tensor], left: Tensor
) -> tuple[tuple[StoredModel, Tensor, Tensor, Tensor], ...]:
    """Return which models have the rows that are left, each with its share of the mean."""
    if not len(left):
        return ()
    count = torch.stack([index[left] >= 0 for index in indices]).sum(0)
    out = []
    for model, index in zip(models, indices, strict=True):
        has = index[left] >= 0
        if bool(has.any()):
            out.append((model, left[has], index[left][has], 1 / count[has].float()))
    return tuple(out)


def _parts(model: StoredModel, tokenizer: Any, token: str | None, special: set[str]) -> list[int]:
    """Return the model's tokens that the text of a token is made of; none if it has no text of its own."""
    if token is None or token in special:
        return []
    text = tokenizer.convert_tokens_to_string([token])
    if not text or "\ufffd" in text:  # bytes of a part of a character
        return []
    return [number for number in model.tokenizer.encode(text, add_special_tokens=False) if number < _rows(model)]


def _with_rows(model: StoredModel, plan: RowPlan, rows: int) -> StoredModel:
    tables = {model.stored_name(name) for name in model.layout.vocabulary if model.has(name)}
    shapes = {n: replace(e, shape=(rows, *e.shape[1:])) if n in tables else e for n, e in model.tensors.items()}
    return replace(model, tensors=shapes, rows=plan)
