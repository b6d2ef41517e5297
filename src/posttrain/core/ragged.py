"""The ragged, prefix-shared batch: T tokens end to end in one dimension, no padding, and a table of segments.

A segment continues its parent; a token sees its own segment causally and all of its ancestors. Segments lie in
depth-first order, so the descendants of a segment are one contiguous run of tokens right behind it.

Virtual tokens (`VirtualTokens`) are positions without an id: trained vectors before or inside every sequence. Those
before all sequences are one segment that every sample continues.

Tokens of pictures (`core.image_tokens`) share segments too: those of one picture are equal to one another and to
no other's. So a picture that several samples begin with is one prefix, and each is encoded once a batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.core.image_tokens import ImageSpan, image_spans
from posttrain.core.transfer import all_to_device, to_device
from posttrain.core.types import Sample

MIN_SHARED = 16
"""Shortest prefix worth a segment of its own: a segment costs about as much as this many tokens."""
_VIRTUAL = 1 << 40
"""Stands for the first virtual token while samples are laid out; no vocabulary is that large."""


_PICTURE = 1 << 24
"""While samples are laid out, token k of picture n is -(1 + n * this + k): different pictures have no common prefix."""


@dataclass(frozen=True)
class VirtualTokens:
    """Say where trained vectors stand in every sequence.

    Attributes:
        front: How many stand before the first token.
        before_target: How many stand before the first token that carries loss; without one, after the last token.
        computed: They pass through the layers as tokens do. False: only their keys and values exist, in front.
    """

    front: int
    before_target: int = 0
    computed: bool = True

    @property
    def count(self) -> int:
        """Return the number of positions that they take in a sequence."""
        return self.front + self.before_target


@dataclass(frozen=True)
class BatchImages:
    """Say which tokens of a batch stand for pictures.

    Attributes:
        spans: One span of each picture, for what the vision tower takes.
        sizes: Number of tokens of each picture.
        image_T: T-indices of the tokens that get a picture's vector.
        vectors: For each of them the number of its vector; the vectors of all pictures lie end to end.
    """

    spans: tuple[ImageSpan, ...]
    sizes: tuple[int, ...]
    image_T: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class TokenSlice:
    """Say which tokens of a batch this process computes, of a group that computes it together (sequence parallel).

    Attributes:
        number: Number of this process in its group.
        count: Processes of the group.
        size: Tokens of each slice; the last ones also hold tokens after T, which no other sees.
    """

    number: int
    count: int
    size: int

    @property
    def first(self) -> int:
        """Return the T-index of the slice's first token."""
        return self.number * self.size

    def of(self, x_T: Tensor) -> Tensor:
        """Return the slice of a tensor whose last dimension is T, zeros after T."""
        whole = torch.nn.functional.pad(x_T, (0, self.count * self.size - x_T.shape[-1]))
        return whole[..., self.first : self.first + self.size]


@dataclass(frozen=True)
class RaggedBatch:
    """T tokens and the S segments they form.

    tokens_T: token ids. positions_T: place in its own sequence (a child goes on where its parent ends).
    weights_T: what each token counts in the loss, summed over the samples that share it.
    predictors_T: index of the token whose hidden state predicts this one; -1 for the first token of a sequence.
    starts, ends, parents: per segment, half-open range of T and the parent's number (-1: none).
    subtree_ends: per segment, where its last descendant ends.
    targets_N: T-indices of the tokens that carry loss (non-zero weight), ascending.
    rows: per sample, the T-indices of its tokens, in order.
    weighted_rows: per sample, the T-indices of its tokens of non-zero weight.
    samples: what was packed, in the order of `rows`: a loss finds in their `meta` what it needs to know of each.
    virtual: the virtual tokens; None: there are none. Rows are without them.
    virtual_T: T-indices of the virtual tokens that are computed (their token id is 0), virtual_ids: number of each.
    whole_rows: per sample, the T-indices of its tokens and its computed virtual tokens, in order.
    images: the pictures; None: the batch is text.
    part: the tokens that this process computes; None: all.
    """

    tokens_T: Tensor
    positions_T: Tensor
    weights_T: Tensor
    predictors_T: Tensor
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    parents: tuple[int, ...]
    subtree_ends: tuple[int, ...]
    targets_N: Tensor
    rows: tuple[Tensor, ...]
    weighted_rows: tuple[Tensor, ...]
    samples: tuple[Sample, ...] = ()
    virtual: VirtualTokens | None = None
    virtual_T: Tensor | None = None
    virtual_ids: Tensor | None = None
    whole_rows: tuple[Tensor, ...] = ()
    images: BatchImages | None = None
    part: TokenSlice | None = None

    @property
    def longest(self) -> int:
        """Return the number of positions of the longest sequence, virtual tokens included."""
        return max(len(row) for row in self.rows) + (0 if self.virtual is None else self.virtual.count)

    @property
    def total(self) -> int:
        """Return T, the number of tokens that are computed."""
        return int(self.tokens_T.numel())

    def chain(self, segment: int) -> list[int]:
        """Return the segment and its ancestors, root first."""
        chain = []
        while segment >= 0:
            chain.append(segment)
            segment = self.parents[segment]
        return chain[::-1]

    def kept_rows(self) -> list[Tensor]:
        """Return, per sample, the indices of all keys that the tokens after it see, as attention counts them."""
        if self.virtual is None or self.virtual.computed:
            return list(self.whole_rows)
        front = torch.arange(self.virtual.front, device=self.positions_T.device)
        return [torch.cat([front, row + self.virtual.front]) for row in self.rows]

    def behind_keys(self, count: int) -> RaggedBatch:
        """Return the segments as attention sees them behind this many keys that all sequences continue.

        Only what attention reads is set: the keys are segment 0, and T begins with them.
        """
        parents = tuple(parent + 1 if parent >= 0 else 0 for parent in self.parents)
        front = torch.arange(count, device=self.positions_T.device)
        return replace(
            self,
            tokens_T=torch.cat([torch.zeros_like(front), self.tokens_T]),
            positions_T=torch.cat([front, self.positions_T]),
            starts=(0, *(start + count for start in self.starts)),
            ends=(count, *(end + count for end in self.ends)),
            parents=(-1, *parents),
            subtree_ends=(count + self.total, *(end + count for end in self.subtree_ends)),
        )

    def to(self, device: torch.device | str) -> RaggedBatch:
        """Return the same batch with its tensors on another device."""
        device, count = torch.device(device), len(self.rows)
        names = ["tokens_T", "positions_T", "predictors_T", "targets_N"]
        names += [] if self.virtual_T is None else ["virtual_T", "virtual_ids"]
        indices = [*(getattr(self, name) for name in names), *self.rows, *self.weighted_rows]
        same = self.whole_rows is self.rows
        moved = all_to_device([*indices, *(() if same else self.whole_rows)], device)
        rows = moved[len(names) :]
        found: dict[str, Any] = dict(zip(names, moved, strict=False))
        weights = to_device(self.weights_T, device)
        plain, weighted = tuple(rows[:count]), tuple(rows[count : 2 * count])
        if self.images is not None:
            places, vectors = all_to_device([self.images.image_T, self.images.vectors], device)
            found["images"] = replace(self.images, image_T=places, vectors=vectors)
        whole = plain if same else tuple(rows[2 * count :])
        return replace(self, **found, weights_T=weights, rows=plain, weighted_rows=weighted, whole_rows=whole)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Return the length of the longest common prefix."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


class _Pictures:
    """Number the pictures of a batch."""

    def __init__(self) -> None:
        self.spans: dict[str, ImageSpan] = {}
        self.sizes: list[int] = []
        self.numbers: dict[str, int] = {}

    def mark(self, tokens: np.ndarray, spans: Sequence[ImageSpan]) -> np.ndarray:
        """Return a sample's token ids with numbers of its pictures' tokens in their places."""
        marked = tokens.copy()
        for span in spans:
            places = span.start + np.flatnonzero(tokens[span.start : span.stop] == span.token)
            number = self.numbers.setdefault(span.key, len(self.numbers))
            if number == len(self.sizes):
                self.spans[span.key] = span
                self.sizes.append(len(places))
            marked[places] = -1 - number * _PICTURE - np.arange(len(places))
        return marked

    def batch(self, tokens: np.ndarray) -> tuple[np.ndarray, BatchImages | None]:
        """Return the token ids of all that is laid out, and where the pictures are."""
        if not self.sizes:
            return tokens, None
        at = np.flatnonzero(tokens < 0)
        numbers, inside = np.divmod(-1 - tokens[at], _PICTURE)
        first = np.concatenate([[0], np.cumsum(self.sizes)])
        spans = tuple(self.spans.values())
        ids = tokens.copy()
        ids[at] = np.array([span.token for span in spans])[numbers]
        vectors = torch.from_numpy(first[numbers] + inside)
        return ids, BatchImages(spans, tuple(self.sizes), torch.from_numpy(at), vectors)


def _laid(sample: Sample, virtual: VirtualTokens | None, pictures: _Pictures) -> tuple[np.ndarray, np.ndarray]:
    """Return a sample's tokens and weights as arrays, with the virtual tokens that are computed in their places."""
    tokens, weights = np.asarray(sample.tokens, dtype=np.int64), np.asarray(sample.weights, dtype=np.float64)
    if spans := image_spans(sample.tokens):
        tokens = pictures.mark(tokens, spans)
    if virtual is None or not virtual.computed:
        return tokens, weights
    carrying = np.flatnonzero(weights)
    target = int(carrying[0]) if len(carrying) else len(tokens)
    places = [0] * virtual.front + [target] * virtual.before_target
    ids = _VIRTUAL + np.arange(virtual.count)
    return np.insert(tokens, places, ids), np.insert(weights, places, np.zeros(virtual.count))


class _Builder:
    """Lay samples out depth first, a shared prefix once."""

    def __init__(self, samples: Sequence[Sample], min_shared: int, virtual: VirtualTokens | None) -> None:
        self.pictures = _Pictures()
        laid = [_laid(s, virtual, self.pictures) for s in samples]
        self.tokens = [tokens for tokens, _ in laid]
        self.weights = [weights for _, weights in laid]
        self.min_shared = min_shared
        self.segments: list[tuple[int, int, int]] = []  # start, end, parent
        self.pieces: list[tuple[np.ndarray, np.ndarray, int, int]] = []  # tokens, weights, position, predictor
        self.rows: list[list[tuple[int, int]]] = [[] for _ in samples]
        self.subtree_ends: list[int] = []
        self.total = 0

    def emit(self, members: list[int], low: int, high: int, parent: int) -> int:
        """Lay one segment: tokens low..high of its members, which all agree there."""
        if high <= low:
            return parent
        start, end = self.total, self.total + high - low
        weights = sum(self.weights[m][low:high] for m in members)
        predictor = self.segments[parent][1] - 1 if parent >= 0 else -1
        self.pieces.append((self.tokens[members[0]][low:high], np.asarray(weights), low, predictor))
        self.segments.append((start, end, parent))
        self.subtree_ends.append(end)
        self.total = end
        for m in members:
            self.rows[m].append((start, end))
        return len(self.segments) - 1

    def lay(self, members: list[int], depth: int, parent: int) -> None:
        """Lay members, which are sorted by tokens and share their first `depth` tokens (laid already)."""
        i = 0
        while i < len(members):
            j, shared = i + 1, len(self.tokens[members[i]])
            while j < len(members):
                common = _common(self.tokens[members[j - 1]], self.tokens[members[j]])
                if common < depth + self.min_shared:
                    break
                shared, j = min(shared, common), j + 1
            cluster = members[i:j]
            segment = self.emit(cluster, depth, shared, parent)
            if len(cluster) > 1:
                rest = [m for m in cluster if len(self.tokens[m]) > shared]
                self.lay(rest, shared, segment)
                if segment >= 0:
                    self.subtree_ends[segment] = self.total
            i = j


def pack(
    samples: Sequence[Sample],
    share_prefixes: bool = True,
    min_shared: int = MIN_SHARED,
    virtual: VirtualTokens | None = None,
) -> RaggedBatch:
    """Lay samples end to end, computing a prefix that several of them share once.

    Weights of a shared token are summed, so that any loss that is a weighted sum over tokens is the same with and
    without sharing.

    Args:
        samples: At least one, none empty.
        share_prefixes: False gives every sample one segment.
        min_shared: Shortest prefix that is shared, in tokens.
        virtual: Virtual tokens of every sequence. None: none.

    Raises:
        ValueError: There are no samples, or one is empty.
    """
    if not samples:
        raise ValueError("pack() needs at least one sample, and got none")
    for sample in samples:
        if not len(sample):
            raise ValueError(f"{sample.source or 'a sample'} has no tokens; drop empty rows before packing")
    builder, everyone = _Builder(samples, min_shared, virtual), list(range(len(samples)))
    front = virtual.front if virtual is not None and virtual.computed else 0
    root = builder.emit(everyone, 0, front, -1)
    if share_prefixes and len(samples) > 1:
        order = sorted(everyone, key=lambda i: (tuple(builder.tokens[i].tolist()), i))
        builder.lay(order, front, root)
    else:
        for i in everyone:
            builder.emit([i], front, len(builder.tokens[i]), root)
    if root >= 0:
        builder.subtree_ends[root] = builder.total
    return _batch(builder, samples, virtual)


def _batch(builder: _Builder, samples: Sequence[Sample], virtual: VirtualTokens | None) -> RaggedBatch:
    """Make the batch of what the builder has laid out."""
    # Keys and values that are not computed take positions all the same.
    first = virtual.front if virtual is not None and not virtual.computed else 0
    positions = [np.arange(low, low + len(t)) + first for t, _, low, _ in builder.pieces]
    predictors = []
    for (start, end, _), (_, _, _, predictor) in zip(builder.segments, builder.pieces, strict=True):
        run = np.arange(start - 1, end - 1)
        run[0] = predictor
        predictors.append(run)
    starts, ends, parents = zip(*builder.segments, strict=True)
    weights = np.concatenate([w for _, w, _, _ in builder.pieces]).astype(np.float32)
    tokens = np.concatenate([t for t, _, _, _ in builder.pieces])
    whole = [np.concatenate([np.arange(a, b) for a, b in row]) for row in builder.rows]
    # What depends on values is found here, on the host: on a GPU `nonzero` would wait for the device.
    weighted = [row[own != 0] for row, own in zip(whole, builder.weights, strict=True)]
    at = np.flatnonzero(tokens >= _VIRTUAL)
    rows = [row[own < _VIRTUAL] for row, own in zip(whole, builder.tokens, strict=True)] if len(at) else whole
    as_tensors = tuple(map(torch.from_numpy, rows))
    ids, images = builder.pictures.batch(tokens)
    return RaggedBatch(
        torch.from_numpy(np.where(ids >= _VIRTUAL, 0, ids)),
        torch.from_numpy(np.concatenate(positions)),
        torch.from_numpy(weights),
        torch.from_numpy(np.concatenate(predictors)),
        starts,
        ends,
        parents,
        tuple(builder.subtree_ends),
        torch.from_numpy(np.flatnonzero(weights)),
        as_tensors,
        tuple(map(torch.from_numpy, weighted)),
        tuple(samples),
        virtual,
        torch.from_numpy(at) if len(at) else None,
        torch.from_numpy(tokens[at] - _VIRTUAL) if len(at) else None,
        tuple(map(torch.from_numpy, whole)) if len(at) else as_tensors,
        images,
    )


def micro_batches(lengths: Sequence[int], budget: int, groups: Sequence[int] | None = None) -> list[list[int]]:
    """Split items into as few balanced micro-batches as a token budget allows.

    Longest first into the lightest bin (LPT), with ceil(total / budget) bins or, if that can't hold them, more. An item
    longer than the budget gets a micro-batch alone (it can't be split).

    Args:
        lengths: Tokens of each item.
        budget: Most tokens of a micro-batch.
        groups: Items with the same number stay together (a prompt with its completions).

    Returns:
        Lists of indices; deterministic; no empty list.
    """
    if budget < 1:
        raise ValueError(f"the token budget must be at least 1, and is {budget}")
    members: dict[int, list[int]] = {}
    for i in range(len(lengths)):
        members.setdefault(i if groups is None else groups[i], []).append(i)
    sized = sorted(((sum(lengths[i] for i in m), m) for m in members.values()), key=lambda x: (-x[0], x[1]))
    if not sized:
        return []
    bins = max(1, -(-sum(size for size, _ in sized) // budget))
    while True:
        heap = [(0, b) for b in range(min(bins, len(sized)))]
        filled: list[list[int]] = [[] for _ in heap]
        over = False
        for size, m in sized:
            load, b = heapq.heappop(heap)
            over |= load > 0 and load + size > budget
            filled[b].extend(m)
            heapq.heappush(heap, (load + size, b))
        if not over or bins >= len(sized):
            return [sorted(f) for f in filled if f]
        bins += 1
