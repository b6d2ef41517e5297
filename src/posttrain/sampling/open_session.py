"""A session of the local sampler that requests join while it computes, each with its own settings of drawing.

Requests enter in the order in which they came, once their completions have slots and memory, a few of them together:
computing a prompt alone takes twice the time that it takes among eight (SmolLM2-135M on a CPU). The memory for keys
and values is one rectangle, slots by columns; it gets another shape when those who run and those who join need one.
Every completion gets columns for its longest length when it enters, so none has to be interrupted later.

Requests may have adapters (`posttrain.models.row_adapters`). Completions of all of them take each step together;
prompts are computed adapter by adapter, so that prompts with a common beginning share it only within an adapter.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from posttrain.config import SamplingConfig
from posttrain.core.errors import DataError
from posttrain.core.types import Rollout
from posttrain.models.row_adapters import AdapterRows, RowAdapters
from posttrain.sampling.cuda_graphs import COLUMNS, StaticSteps, rounded
from posttrain.sampling.engine import PREFILL_TOKENS, LocalSampler, Session
from posttrain.sampling.kv_cache import Region, decode_step
from posttrain.sampling.served_adapters import ServedAdapter
from posttrain.sampling.session_rows import SessionPrompt, SessionRow
from posttrain.sampling.token_sampling import stream

FEWEST_SLOTS = 8
"""Slots of the smallest memory, if that many fit."""
NO_LIMIT = 1 << 62
TOGETHER = 8
"""Requests enter once there is one for so many completions that run, or after a few tokens of those."""
MOST_TURNS = 4
"""Turns that a request waits for others to enter with."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one token, of the model's own distribution: temperature 1, no cut-offs.

    Attributes:
        logprob: That of the token that was drawn.
        top: The likeliest tokens and theirs, the likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class JoiningPrompt(SessionPrompt):
    """A request to an open session.

    Attributes:
        params: How its tokens are drawn; min_tokens is not read.
        adapter: What its tokens are computed with; None: the model alone.
        top_logprobs: Likeliest tokens to report at each token; None: no log-probabilities.
        tops: Log-probabilities of each completion, by its number, if they are asked for.
        on_token: Called with (number, token) for each token after which the completion continues.
        on_done: Called with (number, rollout) as each completion ends.
        cancelled: Set from outside: its completions end without a word.
    """

    params: SamplingConfig = field(default_factory=SamplingConfig)
    adapter: ServedAdapter | None = None
    top_logprobs: int | None = None
    tops: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    on_token: Callable[[int, int], None] | None = None
    on_done: Callable[[int, Rollout], None] | None = None
    cancelled: bool = False


class OpenSession(Session):
    """Computes requests that join at any time; `turn` is called again and again, by one thread."""

    waiting: list[JoiningPrompt]  # type: ignore[assignment]

    def __init__(self, sampler: LocalSampler, adapters: RowAdapters | None = None) -> None:
        self.adapters = adapters or RowAdapters(sampler.model)
        self.adapters.use([])
        sampler.model.eval()
        sampler.model.backend.pack_weights(sampler.model)
        self.turns = 0  # since a request waits
        self.room = int(sampler.allowed_bytes() / sampler.bytes_per_token())
        super().__init__(sampler, [], SamplingConfig(), None)

    def _make_regions(self, prompts: list[SessionPrompt]) -> None:
        self.own, self.shared = Region(0, 0, self.sampler.int8), None
        self.free_slots, self.free_prompts = [], []

    def check(self, prompt: JoiningPrompt) -> None:
        """Raise DataError if a request could not run even alone."""
        n, columns = prompt.request.n, prompt.length + prompt.limit
        if n > self.sampler.max_running:
            raise DataError(f"{n} completions are asked for, and at most {self.sampler.max_running} run together")
        if n * columns > self.room:
            raise DataError(
                f"{n} completion{'s' * (n > 1)} of a prompt of {prompt.length} tokens and up to {prompt.limit} more "
                f"do not fit into the memory for keys and values, which holds {self.room} tokens: lower max_tokens"
            )

    @property
    def busy(self) -> bool:
        """Return True if a request waits or runs."""
        return bool(self.waiting or self.rows)

    def turn(self) -> None:
        """Let requests in that fit, and compute one more token of every completion."""
        self._drop_cancelled()
        if len(self.waiting) * TOGETHER >= len(self.rows) or self.turns >= MOST_TURNS:
            self.turns = 0
            while self._admit():  # again: a first token may have been the last
                pass
        self.turns += bool(self.waiting)
        if self.rows:
            self._step()

    def _drop_cancelled(self) -> None:
        self.waiting = [p for p in self.waiting if not p.cancelled]
        for row in [r for r in self.rows if _joined(r).cancelled]:
            self.rows.remove(row)
            heapq.heappush(self.free_slots, row.slot)

    def _admit(self) -> bool:
        """Start the completions of requests that fit, and draw their first tokens; False: none does."""
        budget, chosen, size = PREFILL_TOKENS.get(self.device.type, 4096), list[JoiningPrompt](), (0, 0)
        while self.waiting:  # nobody overtakes: a large request would never find room
            budget -= len(self.waiting[0].request.tokens)
            fitting = None if chosen and budget < 0 else self._size([*chosen, self.waiting[0]])
            if fitting is None:
                break
            chosen.append(self.waiting.pop(0))
            size = fitting
        if not chosen:
            return False
        if size != (self.own.slots, self.own.columns):
            self._resize(*size)
        starting, copies = [], []
        for p in chosen:
            slots = [heapq.heappop(self.free_slots) for _ in range(p.request.n)]
            p.slot, p.started, p.running = slots[0], p.request.n, p.request.n
            copies += [(p.slot, other, p.length) for other in slots[1:]]
            starting += [SessionRow(p, i, slot, stream(p.request.seed, i, p.limit)) for i, slot in enumerate(slots)]
        for adapter, places in _by_adapter([p.adapter for p in chosen]).items():
            self._use([] if adapter is None else [(adapter.matrices, None)])
            self._prefill([chosen[i] for i in places])
        self.open.clear()
        self.own.move(copies)
        logits = torch.stack([row.prompt.logits_V for row in starting])  # type: ignore[misc]
        for p in chosen:
            p.logits_V = None
        self.rows += starting
        self._draw(starting, logits)
        return True

    def _size(self, joining: list[JoiningPrompt]) -> tuple[int, int] | None:
        """Return (slots, columns) of a memory for all that run and those who join; None: there is no room."""
        slots = len(self.rows) + sum(p.request.n for p in joining)
        columns = max(p.length + p.limit for p in (*(r.prompt for r in self.rows), *joining))
        if slots > self.sampler.max_running:
            return None
        if slots <= self.own.slots and columns <= self.own.columns:
            return self.own.slots, self.own.columns
        wide = rounded(columns, NO_LIMIT, COLUMNS)
        many = rounded(slots, self.sampler.max_running, min(FEWEST_SLOTS, self.sampler.max_running))
        return next(
            (size for size in ((many, wide), (slots, wide), (slots, columns)) if size[0] * size[1] <= self.room), None
        )

    def _resize(self, slots: int, columns: int) -> None:
        self.close_gaps()
        self.own.resize(slots, columns)
        self.free_slots = list(range(len(self.rows), slots))
        if self.sampler.static_shapes:
            decode = partial(decode_step, self.sampler.model)
            self.static = StaticSteps(decode, self.own, None, 1, self.device, self.device.type == "cuda")

    def static_for(self, rows: Sequence[SessionRow]) -> StaticSteps | None:
        """Let each row take its step with its adapter; a recorded step has none."""
        parts = _by_adapter([_joined(row).adapter for row in rows])
        alone = len(parts) == 1
        self._use(
            [
                (adapter.matrices, None if alone else torch.tensor(places, device=self.device))
                for adapter, places in parts.items()
                if adapter is not None
            ]
        )
        return None if self.adapters.parts else self.static

    def _use(self, parts: Sequence[AdapterRows]) -> None:
        """Compute the coming passes with these adapters."""
        if self.adapters.use(parts):
            self.own.layers.clear()

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states, at temperature 1."""
        return self.head.logits(hidden, 1.0, self.sampler.model.backend.linear(len(hidden)))

    def _params(self, row: SessionRow) -> SamplingConfig:
        return _joined(row).params

    def _ends(self, row: SessionRow) -> frozenset[int]:
        adapter = _joined(row).adapter
        return self.sampler.ends if adapter is None else adapter.ends

    def _draw(self, rows: list[SessionRow], logits: Tensor) -> None:
        super()._draw(rows, logits)
        for row in rows:
            prompt = _joined(row)
            if row.number not in prompt.done and prompt.on_token is not None:
                prompt.on_token(row.number, row.tokens[-1])

    def _drawn(self, rows: list[SessionRow], logits: Tensor, params: SamplingConfig) -> tuple[list[int], list[float]]:
        """Draw for each row as its request says: rows that are drawn alike together."""
        asked = [i for i, row in enumerate(rows) if _joined(row).top_logprobs is not None]
        whole = logits[asked].log_softmax(-1) if asked else None  # before temperature and cut-offs overwrite them
        alike: dict[tuple[float, int, float, float], list[int]] = {}
        for i, row in enumerate(rows):
            p = _joined(row).params
            alike.setdefault((p.temperature, p.top_k, p.top_p, p.min_p), []).append(i)
        tokens, logprobs = [0] * len(rows), [0.0] * len(rows)
        for members in alike.values():
            p, z = _joined(rows[members[0]]).params, logits if len(alike) == 1 else logits[members]
            z = z.div_(p.temperature) if p.temperature else z
            drawn = super()._drawn([rows[i] for i in members], z, p)
            for i, token, logprob in zip(members, *drawn, strict=True):
                tokens[i], logprobs[i] = token, logprob
        if whole is not None:
            self._report(whole, [rows[i] for i in asked], [tokens[i] for i in asked])
        return tokens, logprobs

    def _report(self, whole: Tensor, rows: list[SessionRow], tokens: list[int]) -> None:
        """Keep the log-probabilities (rows, V) that requests ask for."""
        drawn = whole.gather(1, torch.tensor(tokens, device=whole.device)[:, None])[:, 0].tolist()
        if self.sampler.textless is not None:
            whole[:, self.sampler.textless] = -torch.inf
        count = min(max(_joined(row).top_logprobs or 0 for row in rows), whole.shape[1])
        top = whole.topk(count, dim=-1)
        for row, logprob, ids, values in zip(rows, drawn, top.indices.tolist(), top.values.tolist(), strict=True):
            pairs = tuple(zip(ids, values, strict=True))[: _joined(row).top_logprobs]
            _joined(row).tops.setdefault(row.number, []).append(TokenLogprobs(logprob, pairs))

    def _leave(self, row: SessionRow, finish: str, text: str | None) -> None:
        super()._leave(row, finish, text)
        prompt = _joined(row)
        if prompt.on_done is not None:
            prompt.on_done(row.number, prompt.done[row.number])


def _by_adapter(adapters: Sequence[ServedAdapter | None]) -> dict[ServedAdapter | None, list[int]]:
    """Return the places of each adapter."""
    out: dict[ServedAdapter | None, list[int]] = {}
    for i, adapter in enumerate(adapters):
        out.setdefault(adapter, []).append(i)
    return out


def _joined(row: SessionRow) -> JoiningPrompt:
    assert isinstance(row.prompt, JoiningPrompt)
    return row.prompt
