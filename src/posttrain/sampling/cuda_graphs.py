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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.sampling.kv_cache import DecodingStep, Region

COLUMNS = 128
"""The fewest columns that attention looks at."""
MOST_GRAPHS = 64
"""Graphs kept for one pair of regions; each takes a few MiB of the GPU's memory. The least recently used go first."""

ROW_FIELDS = 7
"""Numbers of a row: token, column, position, prompt's slot, rank and length, and how many more tokens it must have."""
AHEAD = 32
"""Steps that draw, for which random numbers are loaded at once."""

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


@dataclass(frozen=True, eq=False)
class Drawing:
    """Draw tokens in a recorded step.

    Attributes:
        key: Equal for drawings that are the same.
        draw: (hidden states (M, H), random numbers (M), rows that are shorter than min_tokens (M)) -> (tokens (M),
            log-probabilities (M)). It must not wait for the device.
    """

    key: tuple[Any, ...]
    draw: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class StaticSteps:
    """Decoding steps over one pair of regions. Row i lies in slot i of `own`.

    ranks: the most completions that a prompt has. graphs: record and replay (CUDA); without, the same shapes are
    computed one kernel after the other, anywhere. Row buffers are filled in one copy a step.

    Steps that draw (`load`, then `advance`) leave what the next step takes in these buffers, so that it needs nothing
    from the host.
    """

    def __init__(
        self, decode: DecodeFunction, own: Region, shared: Region | None, ranks: int, device: torch.device, graphs: bool
    ) -> None:
        self.decode, self.own, self.shared, self.ranks, self.graphs = decode, own, shared, ranks, graphs
        self.host = torch.zeros(ROW_FIELDS, own.slots, dtype=torch.long, pin_memory=device.type == "cuda")
        self.inputs = self.host.to(device)
        self.slots = torch.arange(own.slots, device=device)
        self.seen: set[Any] = set()
        self.recorded: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor, Drawing | None]] = {}  # which holds what it reads
        self.pool: Any = None
        # Of steps that draw: random numbers of the coming ones, whose turn it is, what the newest has drawn.
        self.host_uniforms = torch.zeros(AHEAD, own.slots, dtype=torch.float64, pin_memory=device.type == "cuda")
        self.uniforms = self.host_uniforms.to(device)
        self.turn = torch.zeros(1, dtype=torch.long, device=device)
        self.drawn = torch.zeros(2, own.slots, dtype=torch.float64, device=device)

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
        shape = self._fill([tokens, columns, positions, prompts, ranks, lengths])
        return self._run(shape, None)[: len(tokens)]

    def load(self, fields: Sequence[Sequence[int]], short: Sequence[int], uniforms: Sequence[Any]) -> Shape:
        """Set the rows of the coming steps; returns the shape of the first.

        No step may be running: the buffers on the host are free then.

        Args:
            fields: What a call takes.
            short: How many more tokens each row must have.
            uniforms: Random numbers of each row's next tokens, `AHEAD` or fewer.
        """
        count = len(short)
        self.host[6, :count] = torch.tensor(short)
        shape = self._fill(fields)
        table = self.host_uniforms
        for i, numbers in enumerate(uniforms):
            table[: len(numbers), i] = torch.from_numpy(numbers)
        self.uniforms.copy_(table, non_blocking=True)
        self.turn.zero_()
        return shape

    def advance(self, shape: Shape, drawing: Drawing) -> Tensor:
        """Start one more step; returns the tokens that it draws and their log-probabilities, (2, M) float64.

        Args:
            shape: Holds the rows that were loaded, and the column after those before.
            drawing: How tokens are drawn.
        """
        return self._run(shape, drawing)

    def grown(self, shape: Shape, columns: int) -> Shape:
        """Return a shape with room for so many own columns."""
        return replace(shape, own_columns=rounded(columns, self.own.columns, COLUMNS))

    def _fill(self, fields: Sequence[Sequence[int]]) -> Shape:
        own, count = self.own, len(fields[0])
        shape = Shape(rounded(count, own.slots), rounded(max(fields[1]) + 1, own.columns, COLUMNS))
        fields = fields[:3] if self.shared is None else fields
        if self.shared is not None:
            at_once = rounded(max(fields[3]) + 1, self.shared.slots)
            width = rounded(max(fields[5]), self.shared.columns, COLUMNS)
            shape = Shape(shape.rows, shape.own_columns, at_once, width)
        self.host[:6, : shape.rows] = 0
        self.host[4, : shape.rows] = self.ranks  # rows of nobody share a place of their own
        self.host[: len(fields), :count] = torch.tensor(fields)
        self.inputs.copy_(self.host, non_blocking=True)  # whoever draws waits for the step: the buffer is free then
        return shape

    def _run(self, shape: Shape, drawing: Drawing | None) -> Tensor:
        key = (shape, None if drawing is None else drawing.key)
        if self.graphs and key in self.seen and key not in self.recorded:
            self._record(key, drawing)
        if key in self.recorded:
            graph, out, _ = self.recorded[key] = self.recorded.pop(key)  # the newest is last
            graph.replay()
            return out
        self.seen.add(key)
        return self._compute(shape, drawing)

    def _compute(self, shape: Shape, drawing: Drawing | None) -> Tensor:
        tokens, column, position, prompt, rank, length, short = self.inputs[:, : shape.rows]
        step = DecodingStep(self.own, self.slots[: shape.rows], column, position, own_columns=shape.own_columns)
        if self.shared is not None:
            step.shared, step.prompt_M, step.rank_M, step.prompt_length_M = self.shared, prompt, rank, length
            step.prompt_slots, step.prompt_columns, step.ranks = shape.prompts, shape.prompt_columns, self.ranks + 1
        hidden = self.decode(tokens, position, step)
        if drawing is None:
            return hidden
        uniforms = self.uniforms.index_select(0, self.turn)[0, : shape.rows]
        drawn, logprobs = drawing.draw(hidden, uniforms, short > 0)
        out = self.drawn[:, : shape.rows]
        out[0], out[1] = drawn, logprobs
        # What has ended stays where its last column is.
        tokens.copy_(drawn)
        last = column >= self.own.columns - 1
        position.add_(~last)
        column.add_(~last)
        short.sub_(1)
        self.turn.add_(1)
        return out

    def _record(self, key: tuple[Shape, Any], drawing: Drawing | None) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # One pool for all: they never run at once, and nothing is handed from one to the next but the buffers.
            with torch.cuda.graph(graph, pool=self.pool):
                out = self._compute(key[0], drawing)
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
        self.recorded[key] = (graph, out, drawing)
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
