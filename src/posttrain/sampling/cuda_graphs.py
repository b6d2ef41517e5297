"""Decoding steps of few shapes, recorded once as CUDA graphs and replayed.

A decoding step on a GPU is some hundred small kernels, and starting them from Python takes longer than they take. A
CUDA graph starts them all at once, but its shapes and addresses are fixed. So rows, columns and prompts are rounded up
to a few sizes; what is between the real number and the rounded one is computed and thrown away; inputs lie in buffers
that stay where they are. A shape runs as it is when it comes for the first time (which is a graph's warm-up too) and is
recorded the second time.

Regions and graphs are kept from one call of the sampler to the next (`KeptSteps`): training writes weights in place, so
a graph that reads them stays valid for as long as they lie at the same addresses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.sampling.kv_cache import DecodingStep, Region

COLUMNS = 128
"""The fewest columns that attention looks at."""
MOST_GRAPHS = 64
"""Graphs kept for one pair of regions; each takes a few MiB of the GPU's memory. The least recently used go first."""

DecodeFunction = Callable[[Tensor, Tensor, DecodingStep], Tensor]
"""(tokens_M, position_M, step) -> hidden states (M, H)."""


def rounded(n: int, most: int, least: int = 1) -> int:
    """Round n up to a power of two or three quarters of one.

    Args:
        n: A number, at most `most`.
        most: Upper limit of the result.
        least: Lower limit of the result.
    """
    size = 1 << (max(n, least) - 1).bit_length()
    return min(3 * size // 4 if 3 * size // 4 >= max(n, least) else size, most)


@dataclass(frozen=True)
class Shape:
    """Shape that a graph is recorded for."""

    rows: int
    own_columns: int
    prompts: int = 0
    prompt_columns: int = 0


class StaticSteps:
    """Decoding steps over one pair of regions. Row i lies in slot i of `own`.

    ranks: the most completions that a prompt has. graphs: record and replay (CUDA); without, the same shapes are
    computed one kernel after the other, anywhere. Row buffers are filled in one copy a step.
    """

    def __init__(
        self, decode: DecodeFunction, own: Region, shared: Region | None, ranks: int, device: torch.device, graphs: bool
    ) -> None:
        self.decode, self.own, self.shared, self.ranks, self.graphs = decode, own, shared, ranks, graphs
        self.host = torch.zeros(6, own.slots, dtype=torch.long, pin_memory=device.type == "cuda")
        self.inputs = self.host.to(device)
        self.slots = torch.arange(own.slots, device=device)
        self.seen: set[Shape] = set()
        self.recorded: dict[Shape, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool: Any = None

    def __call__(
        self,
        tokens: Sequence[int],
        columns: Sequence[int],
        positions: Sequence[int],
        prompts: Sequence[int] = (),
        ranks: Sequence[int] = (),
        lengths: Sequence[int] = (),
    ) -> Tensor:
        """Hidden states that predict one more token for rows 0 to M - 1, (M, H); overwritten by the next call.

        prompts, ranks, lengths: a row's slot in `shared`, its number among that prompt's rows, the prompt's length.
        """
        own, count = self.own, len(tokens)
        shape = Shape(rounded(count, own.slots), rounded(max(columns) + 1, own.columns, COLUMNS))
        fields = [tokens, columns, positions]
        if self.shared is not None:
            at_once = rounded(max(prompts) + 1, self.shared.slots)
            width = rounded(max(lengths), self.shared.columns, COLUMNS)
            shape = Shape(shape.rows, shape.own_columns, at_once, width)
            fields += [prompts, ranks, lengths]
        self.host[:, : shape.rows] = 0
        self.host[4, : shape.rows] = self.ranks  # rows of nobody share a place of their own
        self.host[: len(fields), :count] = torch.tensor(fields)
        self.inputs.copy_(self.host, non_blocking=True)  # whoever draws waits for the step: the buffer is free then
        return self._run(shape)[:count]

    def _run(self, shape: Shape) -> Tensor:
        if self.graphs and shape in self.seen and shape not in self.recorded:
            self._record(shape)
        if shape in self.recorded:
            graph, hidden = self.recorded[shape] = self.recorded.pop(shape)  # the newest is last
            graph.replay()
            return hidden
        self.seen.add(shape)
        return self._compute(shape)

    def _compute(self, shape: Shape) -> Tensor:
        tokens, column, position, prompt, rank, length = self.inputs[:, : shape.rows]
        step = DecodingStep(self.own, self.slots[: shape.rows], column, position, own_columns=shape.own_columns)
        if self.shared is not None:
            step.shared, step.prompt_M, step.rank_M, step.prompt_length_M = self.shared, prompt, rank, length
            step.prompt_slots, step.prompt_columns, step.ranks = shape.prompts, shape.prompt_columns, self.ranks + 1
        return self.decode(tokens, position, step)

    def _record(self, shape: Shape) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # One pool for all: they never run at once, and nothing is handed from one to the next but the regions.
            with torch.cuda.graph(graph, pool=self.pool):
                hidden = self._compute(shape)
        except RuntimeError as e:
            self.graphs = False
            warnings.warn(
                f"this model's decoding step can't be recorded as a CUDA graph ({str(e).splitlines()[0]}); it runs one "
                "kernel after the other, which is right but slower",
                stacklevel=2,
            )
            torch.cuda.synchronize()
            return
        self.pool = graph.pool()
        self.recorded[shape] = (graph, hidden)
        if len(self.recorded) > MOST_GRAPHS:
            del self.recorded[next(iter(self.recorded))]

    def bytes(self) -> int:
        """Return the memory of the regions."""
        return self.own.bytes() + (self.shared.bytes() if self.shared is not None else 0)


@dataclass(frozen=True)
class RegionSizes:
    """Sizes of a pair of regions, and the most completions of a prompt. They depend on nothing but the call."""

    slots: int
    columns: int
    prompts: int
    prompt_columns: int
    ranks: int

    @property
    def tokens(self) -> int:
        """Return how many tokens the regions hold."""
        return self.slots * self.columns + self.prompts * self.prompt_columns


class KeptSteps:
    """Steps of earlier calls of a sampler, with their regions and graphs, to be used again.

    int8: keys and values are stored so.
    """

    def __init__(self, int8: bool = False) -> None:
        self.int8 = int8
        self.known: dict[RegionSizes, StaticSteps] = {}
        self.weights: tuple[Any, ...] = ()

    def take(
        self,
        layout: RegionSizes,
        model: nn.Module,
        decode: DecodeFunction,
        device: torch.device,
        token_bytes: int,
        allowed: float,
    ) -> StaticSteps:
        """Return steps for a call: those kept for the layout, emptied, or new ones.

        Args:
            layout: Sizes of the regions.
            model: The model; if its weights are no longer where they were, nothing that is kept is valid.
            decode: The model's decoding step.
            device: Where it computes.
            token_bytes: Bytes of a token's keys and values.
            allowed: Bytes that all regions together may take; kept ones are dropped, oldest first, to make room.
        """
        weights = state_of(model)
        if weights != self.weights:
            self.clear()
            self.weights = weights
        steps = self.known.pop(layout, None)
        self._shrink(allowed - layout.tokens * token_bytes)
        if steps is None:
            shared = Region(layout.prompts, layout.prompt_columns, self.int8) if layout.prompts else None
            own = Region(layout.slots, layout.columns, self.int8)
            return StaticSteps(decode, own, shared, layout.ranks, device, device.type == "cuda")
        for region in (steps.own, steps.shared):
            if region is not None:
                region.reset()
        return steps

    def keep(self, layout: RegionSizes, steps: StaticSteps, most: float) -> None:
        """Keep steps for a later call, if all that is kept takes no more than `most` bytes.

        Args:
            layout: Sizes of the regions.
            steps: The steps.
            most: Limit in bytes; kept steps are dropped, the least recently used first.
        """
        self.known[layout] = steps
        self._shrink(most)

    def clear(self) -> None:
        """Release regions and graphs."""
        self.known.clear()

    def _shrink(self, most: float) -> None:
        while self.known and sum(steps.bytes() for steps in self.known.values()) > most:
            del self.known[next(iter(self.known))]


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """Return what a recorded step holds on to: addresses of weights, and which adapters take part."""
    modules: list[Any] = [m for m in model.modules() if hasattr(type(m), "disable_adapters")]
    adapters = [(m.disable_adapters, str(m.active_adapters), getattr(m, "merged", False)) for m in modules]
    places = [x.data_ptr() for x in (*model.parameters(), *model.buffers())]
    return (*places, *adapters)
