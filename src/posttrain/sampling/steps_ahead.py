"""Decoding steps that start before the tokens of the step before them have reached the host.

A step needs the newest tokens, which lie on the device already; the host needs them only to see which completions end.
So a step leaves on the device what the next one takes (`StaticSteps.advance`), which is started at once, and the host
reads and judges the tokens meanwhile. What it learns comes a step late: a completion that has ended takes part in one
step more, and in further ones until an eighth of the rows are such; then rows are moved together. What is computed for
it is thrown away. Tokens are the same, since a row's depend on its own keys and random numbers alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from posttrain.config import SamplingConfig
from posttrain.sampling.cuda_graphs import AHEAD, Drawing, Shape, StaticSteps
from posttrain.sampling.kv_cache import Region
from posttrain.sampling.session_rows import SessionRow, step_inputs
from posttrain.sampling.token_sampling import draw_from_vocabulary

GONE = 8
"""Rows are moved together once one of so many has ended."""


class SteppedSession(Protocol):
    """A session of the local sampler, as far as its steps need it (`posttrain.sampling.engine.Session`)."""

    sampler: Any
    params: SamplingConfig
    head: Any
    device: torch.device
    banned: list[int]
    rows: list[SessionRow]
    shared: Region | None

    def close_gaps(self) -> None:
        """Move rows into the first slots."""

    def take(self, rows: list[SessionRow], tokens: list[int], logprobs: list[float]) -> None:
        """Give each row a token; let those that ended go.

        Args:
            rows: The rows.
            tokens: Their tokens.
            logprobs: The tokens' log-probabilities.
        """


@dataclass
class Started:
    """A step that may still be running.

    Attributes:
        rows: Whom it draws a token for.
        result: Tokens and log-probabilities (2, rows), float64, on the host once `done` is reached.
        done: Reached when `result` is complete; None: it is.
        shape: Of the step.
        column: The last column that it has filled in any row.
        left: Steps for which random numbers are loaded after it.
    """

    rows: list[SessionRow]
    result: Tensor
    done: torch.cuda.Event | None
    shape: Shape
    column: int
    left: int

    def read(self) -> tuple[list[int], list[float]]:
        """Wait for the step; return its tokens and log-probabilities."""
        if self.done is not None:
            self.done.synchronize()
        return self.result[0].long().tolist(), self.result[1].tolist()


def can_draw_ahead(params: SamplingConfig) -> bool:
    """Return True if drawing needs nothing from the host: no cut-offs."""
    return not params.top_k and params.top_p >= 1 and params.min_p <= 0


def _drawing(session: SteppedSession) -> Drawing:
    """Return how a session draws. It does not hold on to the session, since recorded steps are kept."""
    params, textless, head, backend = (
        session.params, session.sampler.textless, session.head, session.sampler.model.backend
    )  # fmt: skip
    shortest = bool(params.min_tokens)
    banned = torch.tensor(session.banned if shortest else [], dtype=torch.long, device=session.device)

    def draw(hidden: Tensor, uniforms: Tensor, short: Tensor) -> tuple[Tensor, Tensor]:
        z = head.logits(hidden, params.temperature or 1.0, backend.linear(len(hidden)))
        if shortest:
            z[:, banned] = z[:, banned].masked_fill(short[:, None], -torch.inf)
        return draw_from_vocabulary(z, uniforms, params, textless)

    return Drawing((params.temperature, tuple(session.banned) if shortest else ()), draw)


class StepsAhead:
    """Take a session's steps, each started before the one before it is read."""

    def __init__(self, session: SteppedSession, static: StaticSteps) -> None:
        self.session, self.static = session, static
        self.drawing = _drawing(session)
        self.started: Started | None = None
        room, pinned = (2, static.own.slots), session.device.type == "cuda"
        self.rooms = [torch.zeros(room, dtype=torch.float64, pin_memory=pinned) for _ in range(2)]

    def step(self) -> None:
        """Give every row one more token, and start the step after it if its rows are known."""
        session = self.session
        now = self._begin() if self.started is None else self.started
        self.started = self._next(now) if self._continues(now) else None
        tokens, logprobs = now.read()
        alive = [i for i, row in enumerate(now.rows) if not row.gone]
        session.take([now.rows[i] for i in alive], [tokens[i] for i in alive], [logprobs[i] for i in alive])

    def wait(self) -> None:
        """Wait for a step that nobody needs any more: its buffers are free then."""
        if self.started is not None:
            self.started.read()
            self.started = None

    def _begin(self) -> Started:
        """Start a step of all rows that the session has now."""
        session = self.session
        session.close_gaps()
        rows = list(session.rows)
        drawn = [len(r.tokens) for r in rows]
        fields = step_inputs(rows, drawn, session.shared is not None)
        short = [session.params.min_tokens - n for n in drawn]
        uniforms = [r.uniforms[n : n + AHEAD] for r, n in zip(rows, drawn, strict=True)]
        shape = self.static.load(fields, short, uniforms)
        return self._start(rows, shape, max(fields[1]), AHEAD - 1)

    def _next(self, now: Started) -> Started:
        """Start the step after one that has not been read yet."""
        column = min(now.column + 1, self.static.own.columns - 1)
        return self._start(now.rows, self.static.grown(now.shape, column + 1), column, now.left - 1)

    def _start(self, rows: list[SessionRow], shape: Shape, column: int, left: int) -> Started:
        drawn = self.static.advance(shape, self.drawing)[:, : len(rows)]
        self.rooms.reverse()  # the other is being read
        result = self.rooms[0][:, : len(rows)]
        result.copy_(drawn, non_blocking=True)
        done = None
        if drawn.is_cuda:
            done = torch.cuda.Event()
            done.record()
        return Started(rows, result, done, shape, column, left)

    def _continues(self, now: Started) -> bool:
        """Return True if the next step has the same rows, of which only a few have ended or are about to."""
        alive = sum(not row.gone for row in now.rows)
        if not now.left or alive != len(self.session.rows):  # others have joined
            return False
        last = sum(not row.gone and len(row.tokens) + 1 >= row.prompt.limit for row in now.rows)
        gone = len(now.rows) - alive + last
        return gone < len(now.rows) and gone * GONE <= len(now.rows)
