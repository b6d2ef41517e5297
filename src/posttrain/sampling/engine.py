"""The local sampler: continuous batching over the learner's own weights.

A prompt is computed once, whatever number of completions it has. A completion that ends leaves at once, and the next of
a prompt that has been computed enters its slot before the next step. A waiting prompt enters only once an eighth of the
slots is free (rounded down, one at least) and there is a place for its keys: computing a prompt for each single slot
that gets free costs more than it brings. So up to an eighth of the slots is idle while prompts wait; more only where
few of the prompts that hold places have many completions still running (`PLACES`).

Every completion draws from a random stream of its own, so its tokens depend on nothing else in the batch (but for the
last bits of rounding, which change with the number of rows in a product).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from posttrain.config import SamplingConfig
from posttrain.core.errors import DataError, ModelError
from posttrain.core.image_tokens import image_spans
from posttrain.core.types import Rollout, RolloutGroup, Sample
from posttrain.models.language_model import LanguageModel
from posttrain.models.max_length import alike_up_to, context, why_short
from posttrain.models.vision import ROTARY_GRID
from posttrain.models.vocabulary import output_rows, textless_ids
from posttrain.sampling.cuda_graphs import KeptSteps, RegionSizes, StaticSteps, rounded
from posttrain.sampling.kv_cache import DecodingStep, Filling, Region, decode_step, token_bytes
from posttrain.sampling.memory import memory_bytes
from posttrain.sampling.protocol import OnDone, Request, stop_tokens
from posttrain.sampling.session_rows import SessionPrompt, SessionRow, step_inputs
from posttrain.sampling.steps_ahead import StepsAhead, can_draw_ahead
from posttrain.sampling.stop_strings import before_stop
from posttrain.sampling.token_sampling import draw_from_vocabulary, stream

MAX_RUNNING = {"cpu": 128, "cuda": 512}
PREFILL_TOKENS = {"cpu": 4096, "cuda": 16384}
MEMORY_SHARE = {"cpu": 0.2, "cuda": 0.3}
"""Of the memory that there is for this process, for keys and values."""
KEPT_SHARE = 0.5
"""Of what keys and values may take, what may stay between two calls, with the steps that were recorded over it."""
WAITING_FOR = 8
"""Prompts enter once one slot in so many is free."""
PLACES = 3
"""Places for prompts' keys, as a multiple of the prompts that fill the slots with all of their completions. A prompt
keeps its place until its last completion has ended, when the others have long left their slots: with no more places
than fill the slots, 36% (lengths uniform) to 57% (exponential) of 128 slots would be idle with 8 completions a prompt;
with three times as many, 5%. Where memory is short there are fewer places first, then fewer slots.
"""


class LocalSampler:
    """Samples with a `LanguageModel` in this process. See `posttrain.sampling.protocol.Sampler`.

    max_running: completions computed together. memory_mb: what keys and values may take, in MiB (None: a share of the
    GPU's memory, or of the main memory that falls to this process, see `posttrain.sampling.memory`); where it does not
    hold all that could run, the rest waits. kv_cache: "int8" stores keys and values so (see `int8_cache`); None: in the
    model's dtype. static_shapes: steps of few sizes, recorded as CUDA graphs (None: on a GPU; see
    `posttrain.sampling.cuda_graphs`).

    With a minimum length (min_tokens) end tokens and stop tokens can't be drawn before so many tokens are there. A stop
    string may be written earlier, and then is text like any other: what counts is an occurrence that is complete only
    with token number min_tokens or a later one. The first that counts ends the completion, whose text is what stands
    before it, without special tokens. Tokens and log-probabilities are kept as drawn, the stop string's included.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Any,
        *,
        max_running: int | None = None,
        memory_mb: float | None = None,
        kv_cache: str | None = None,
        static_shapes: bool | None = None,
    ) -> None:
        if kv_cache not in (None, "int8"):
            raise ModelError(f"kv_cache is {kv_cache!r}, and can be 'int8' or None (the model's dtype)")
        if not model.ragged:
            raise ModelError(
                f"{model.base.config.model_type}: the local sampler needs attention that goes through transformers' "
                "interface, and this type's does not"
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_running = max_running or MAX_RUNNING.get(model.device.type, 128)
        self.memory_mb = memory_mb
        self.static_shapes = model.device.type == "cuda" if static_shapes is None else static_shapes
        self.ahead = model.device.type == "cuda"
        self.ends = frozenset(stop_tokens(model.base, tokenizer))
        self.context = context(model.base.config) or 2**31
        self.int8 = kv_cache == "int8"
        self.kept = KeptSteps(self.int8)
        self.textless = _textless(tokenizer, output_rows(model.base), model.device, model.image_token)
        self._token_bytes = 0

    @torch.inference_mode()
    def sample(
        self, requests: Sequence[Request], params: SamplingConfig, on_done: OnDone | None = None
    ) -> list[RolloutGroup]:
        """Complete every request; order is kept, and so is the model's training mode.

        Args:
            requests: The prompts. None: no groups.
            params: How tokens are drawn.
            on_done: Called as each completion ends.

        Raises:
            DataError: A prompt is empty or leaves no room in the model's context, or its n is below 1. Nothing was
                computed.
            ModelError: The memory can't hold a single completion.
        """
        prompts = [SessionPrompt(i, r, self.limit(i, r, params), virtual=self.virtual) for i, r in enumerate(requests)]
        if not prompts:
            return []
        training = self.model.training
        self.model.eval()
        self.model.backend.pack_weights(self.model)
        try:
            session = Session(self, prompts, params, on_done)
            session.work()
            if session.static is not None:
                self.kept.keep(session.layout, session.static, self.allowed_bytes() * KEPT_SHARE)
        finally:
            self.model.train(training)
        return [
            RolloutGroup(p.request.tokens, p.request.example, [p.done[j] for j in range(p.request.n)]) for p in prompts
        ]

    @property
    def virtual(self) -> int:
        """Return the number of positions that the model's soft prompt takes in every sequence."""
        return 0 if self.model.virtual is None else self.model.virtual.count

    def limit(self, i: int, request: Request, params: SamplingConfig) -> int:
        """Return how many tokens a completion of a prompt may have.

        Args:
            i: Number of the prompt, for messages.
            request: The prompt.
            params: How tokens are drawn.

        Raises:
            DataError: The prompt is empty or leaves no room in the model's context, or asks for fewer than one.
        """
        length = len(request.tokens)
        if not length:
            raise DataError(f"prompt {i} has no tokens; give at least one (the beginning-of-text token, say)")
        if request.n < 1:
            raise DataError(f"prompt {i}: n is {request.n}, and at least one completion must be asked for")
        length += self.virtual
        if length >= self.context:
            settings = self.model.base.config
            why = f". {why_short(settings)}" if alike_up_to(settings) == self.context else ""
            raise DataError(
                f"prompt {i} has {length} tokens, and the model's context of {self.context} leaves no room for an "
                f"answer: shorten the prompt, or leave it out{why}"
            )
        if request.max_tokens is not None and request.max_tokens < 1:
            raise DataError(f"prompt {i}: max_tokens is {request.max_tokens}, and must be 1 or more")
        return min(params.max_tokens, self.context - length, request.max_tokens or params.max_tokens)

    def bytes_per_token(self) -> int:
        """Return the bytes of a token's keys and values, measured by computing one."""
        if self._token_bytes:
            return self._token_bytes
        sizes: list[int] = []

        def keep(key: Tensor, value: Tensor) -> None:
            sizes.append(token_bytes(key, value, self.int8))

        self.prefill([[0]], keep)
        self._token_bytes = sum(sizes)
        return self._token_bytes

    def release(self) -> None:
        """Give up the memory that is kept for the next call."""
        self.kept.clear()

    def prefill(self, prompts: Sequence[Sequence[int]], keep: Any) -> tuple[list[Tensor], Tensor]:
        """Compute prompts: (rows of the ragged batch, hidden states that predict each prompt's first new token)."""
        batch = self.model.pack([Sample(t, [0.0] * len(t)) for t in prompts])
        if isinstance(keep, Filling):
            keep.rows = batch.kept_rows()
        inputs = self.model.ragged_inputs(batch, keep=keep)
        if isinstance(keep, Filling) and inputs["position_ids"].ndim == 3:
            keep.shifts = [int(inputs["position_ids"][0, 0, row].max()) + 1 - len(row) for row in batch.rows]
        out = self.model.decoder(use_cache=False, **inputs)
        return list(batch.rows), out.last_hidden_state[0][torch.stack([row[-1] for row in batch.whole_rows])]

    def allowed_bytes(self) -> float:
        """Return the bytes for keys and values, which do not depend on free memory: completions must not."""
        if self.memory_mb is not None:
            return self.memory_mb * 2**20
        if self.model.device.type == "cuda":
            total = torch.cuda.mem_get_info(self.model.device)[1]
            return total * MEMORY_SHARE["cuda"]
        return memory_bytes() * MEMORY_SHARE["cpu"]

    def decode(self, tokens: Sequence[int], plain: bool) -> str:
        """Text of tokens; plain: special tokens are left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=plain))


def _textless(tokenizer: Any, rows: int, device: torch.device, image_token: int | None) -> Tensor | slice | None:
    """Return the rows of the vocabulary that no completion has: no token's, and that of image tokens; None: none.

    Args:
        tokenizer: The tokenizer.
        rows: Rows of the vocabulary.
        device: Device of the result.
        image_token: Id of the image tokens; None for a text model.
    """
    ids = sorted({*textless_ids(tokenizer, rows), *([] if image_token is None else [image_token])})
    if not ids:
        return None
    if ids == list(range(ids[0], rows)):
        return slice(ids[0], rows)  # padding at the end, as most have it
    return torch.tensor(ids, device=device)


def _roomy(n: int) -> int:
    """Return the size of a region that is kept: n rounded up, 0 for 0."""
    return rounded(n, 1 << 62) if n else 0


class Session:
    """One call of `sample`: the slots, who is in them, and who waits. See `open_session` for one that others join."""

    def __init__(
        self, sampler: LocalSampler, prompts: list[SessionPrompt], params: SamplingConfig, on_done: OnDone | None
    ) -> None:
        self.sampler, self.params, self.on_done = sampler, params, on_done
        self.head = sampler.model.logits_head(packed=True)
        self.device = sampler.model.device
        # Longest prompts first: what comes later fits where they were, and the longest work does not start last.
        self.waiting = sorted(prompts, key=lambda p: (len(p.request.tokens), -p.index))
        self.open: list[SessionPrompt] = []
        self.rows: list[SessionRow] = []
        self.banned = sorted({*sampler.ends, *params.stop_tokens})
        self.static: StaticSteps | None = None
        self._make_regions(prompts)
        self.steps: StepsAhead | None = None
        if self.static is not None and sampler.ahead and can_draw_ahead(params):
            self.steps = StepsAhead(self, self.static)

    def _make_regions(self, prompts: list[SessionPrompt]) -> None:
        """Make the memory for keys and values; all slots of it are free."""
        sampler = self.sampler
        shared = any(p.request.n > 1 for p in prompts)
        longest = max(p.length for p in prompts)
        columns = max(p.limit + (0 if shared else p.length) for p in prompts)
        slots, at_once, self.layout = self._sizes(prompts, longest if shared else 0, columns)
        in_grid = sampler.model.base.config.model_type in ROTARY_GRID  # recorded steps have one position a token
        moved = in_grid and any(image_spans(p.request.tokens) for p in prompts)
        if sampler.static_shapes and not moved:
            room = sampler.allowed_bytes()
            # Not a method of the sampler: what is kept must not keep the sampler alive.
            decode, each = partial(decode_step, sampler.model), sampler.bytes_per_token()
            self.static = sampler.kept.take(self.layout, sampler.model, decode, self.device, each, room)
            self.own, self.shared = self.static.own, self.static.shared
        else:
            self.own = Region(slots, columns, sampler.int8)
            self.shared = Region(at_once, longest, sampler.int8) if shared else None
        self.free_slots = list(range(slots))
        self.free_prompts = list(range(at_once)) if shared else []

    def _sizes(self, prompts: list[SessionPrompt], prompt_columns: int, columns: int) -> tuple[int, int, RegionSizes]:
        """(completions, prompts) that the memory holds at once, and the sizes of the regions.

        Regions that are kept have a few sizes, by rounding up what this call needs, whatever earlier calls needed.
        """
        room = self.sampler.allowed_bytes() / self.sampler.bytes_per_token()
        total = sum(p.request.n for p in prompts)
        mean, most = total / len(prompts), max(p.request.n for p in prompts)
        for size in (_roomy, int) if self.sampler.static_shapes else (int,):
            for slots in range(min(self.sampler.max_running, total), 0, -1):
                for places in range(PLACES, 0, -1):
                    # No more than slots: a prompt that has all of its completions started holds one at least.
                    at_once = min(len(prompts), slots, 1 + int(places * slots / mean))
                    held = size(at_once) if prompt_columns else 0
                    layout = RegionSizes(size(slots), size(columns), held, size(prompt_columns), min(most, slots))
                    if layout.tokens <= room:
                        return slots, at_once, layout
        needed = (columns + prompt_columns) * self.sampler.bytes_per_token() / 2**20
        raise ModelError(
            f"the longest completion with its prompt takes {needed:.3g} MiB of keys and values, and "
            f"{self.sampler.allowed_bytes() / 2**20:.3g} are allowed: raise memory_mb (in a recipe: cache_mb), "
            + ("" if self.sampler.int8 else "set kv_cache: int8, ")
            + "or lower max_tokens"
        )

    def work(self) -> None:
        """Until nobody waits and nobody runs."""
        while self.waiting or self.open or self.rows:
            while self._admit():  # again: not all fit into one prefill, and a first token may have been the last
                pass
            if self.rows:
                self._step()
        if self.steps is not None:
            self.steps.wait()

    def _admit(self) -> bool:
        """Let waiting prompts in where there is room for a few, and start completions in free slots; False: neither."""
        few = max(1, (len(self.free_slots) + len(self.rows)) // WAITING_FOR)
        if self.free_slots and self.waiting and (not self.rows or len(self.free_slots) >= few):
            budget = PREFILL_TOKENS.get(self.device.type, 4096)
            room = len(self.free_slots) - sum(p.request.n - p.started for p in self.open)
            chosen: list[SessionPrompt] = []
            while self.waiting and room > 0 and (self.shared is None or self.free_prompts):
                budget -= len(self.waiting[-1].request.tokens)
                if chosen and budget < 0:
                    break
                chosen.append(self.waiting.pop())
                room -= chosen[-1].request.n
                region = self.free_slots if self.shared is None else self.free_prompts
                chosen[-1].slot = heapq.heappop(region)
            if chosen:
                self._prefill(chosen)
        starting: list[SessionRow] = []
        for p in self.open:
            while p.started < p.request.n and (self.shared is None or self.free_slots):
                slot = p.slot if self.shared is None else heapq.heappop(self.free_slots)
                starting.append(SessionRow(p, p.started, slot, stream(p.request.seed, p.started, p.limit)))
                p.started += 1
                p.running += 1
        self.open = [p for p in self.open if p.started < p.request.n]
        if starting:
            logits = torch.stack([row.prompt.logits_V for row in starting])  # type: ignore[misc]
            for row in starting:
                if row.prompt.started == row.prompt.request.n:
                    row.prompt.logits_V = None
            self.rows += starting
            self._draw(starting, logits)
        return bool(starting)

    def _prefill(self, prompts: list[SessionPrompt]) -> None:
        region = self.own if self.shared is None else self.shared
        keep = Filling(region, [], [p.slot for p in prompts])
        _, hidden = self.sampler.prefill([p.request.tokens for p in prompts], keep)
        for p, shift in zip(prompts, keep.shifts, strict=False):
            p.shift = shift
        logits = self.logits(hidden)
        for p, row in zip(prompts, logits, strict=True):
            p.logits_V = row
        self.open += prompts

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states, temperature applied."""
        product = self.sampler.model.backend.linear(len(hidden))
        return self.head.logits(hidden, self.params.temperature or 1.0, product)

    def _step(self) -> None:
        """One more token for every row."""
        if self.steps is not None:
            self.steps.step()
            return
        self.close_gaps()
        rows = self.rows
        inputs = step_inputs(rows, [len(r.tokens) for r in rows], self.shared is not None)
        static = self.static_for(rows)
        if static is not None:
            self._draw(list(rows), self.logits(static(*inputs)))
            return
        tokens, columns, positions, *of_prompt = (torch.tensor(x, device=self.device) for x in inputs)
        slots = torch.arange(len(rows), device=self.device)
        step = DecodingStep(self.own, slots, columns, positions, own_columns=max(inputs[1]) + 1)
        if self.shared is not None:
            step.shared = self.shared
            step.prompt_M, step.rank_M, step.prompt_length_M = of_prompt
            step.prompt_slots, step.ranks, step.prompt_columns = max(inputs[3]) + 1, max(inputs[4]) + 1, max(inputs[5])
        shifts = [r.prompt.shift for r in rows]
        rotary_M = step.position_M + torch.tensor(shifts, device=self.device) if any(shifts) else step.position_M
        self._draw(list(rows), self.logits(decode_step(self.sampler.model, tokens, rotary_M, step)))

    def static_for(self, rows: Sequence[SessionRow]) -> StaticSteps | None:
        """Return the recorded steps that the next step of these rows, in order, may use; None: it is computed anew."""
        return self.static

    def close_gaps(self) -> None:
        """Move the last rows to where others left, so that M rows lie in slots 0 to M - 1 and nothing else is read."""
        rows = self.rows
        rows.sort(key=lambda r: r.slot)
        moves = []
        for row in reversed(rows):
            if row.slot < len(rows):
                break
            computed = len(row.tokens) - 1 + (row.prompt.length if self.shared is None else 0)
            free = heapq.heappop(self.free_slots)
            moves.append((row.slot, free, computed))
            heapq.heappush(self.free_slots, row.slot)
            row.slot = free
            if self.shared is None:
                row.prompt.slot = free
        self.own.move(moves)
        rows.sort(key=lambda r: r.slot)

    def _draw(self, rows: list[SessionRow], logits: Tensor) -> None:
        """Give each row its next token."""
        self.take(rows, *self._drawn(rows, logits, self.params))

    def take(self, rows: list[SessionRow], tokens: list[int], logprobs: list[float]) -> None:
        """Give each row a token; let those that ended go.

        Args:
            rows: The rows.
            tokens: Their tokens.
            logprobs: The tokens' log-probabilities.
        """
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            row.tokens.append(token)
            row.logprobs.append(logprob)
            finish, text = self._finish(row)
            if finish:
                self._leave(row, finish, text)

    def _drawn(self, rows: list[SessionRow], logits: Tensor, params: SamplingConfig) -> tuple[list[int], list[float]]:
        """Draw a token for each row, with its log-probability."""
        at = [len(r.tokens) for r in rows]
        uniforms = torch.tensor([r.uniforms[t] for r, t in zip(rows, at, strict=True)], dtype=torch.float64)
        short = torch.tensor([t < params.min_tokens for t in at])
        banned = self.banned if params.min_tokens and bool(short.any()) else ()
        drawn = draw_from_vocabulary(logits, uniforms, params, self.sampler.textless, banned, short if banned else None)
        if self.device.type == "cuda":
            # The only place where a step waits for the GPU. float64 holds tokens and log-probabilities exactly.
            drawn = tuple(torch.stack([x.double() for x in drawn]).cpu())  # type: ignore[assignment]
        return drawn[0].long().tolist(), drawn[1].tolist()

    def _params(self, row: SessionRow) -> SamplingConfig:
        """Return how a row's tokens are drawn."""
        return self.params

    def _ends(self, row: SessionRow) -> frozenset[int]:
        """Return the tokens that end a row."""
        return self.sampler.ends

    def _finish(self, row: SessionRow) -> tuple[str, str | None]:
        """Return why a row ends with its newest token ("": it continues), and its text if that was needed."""
        token, params = row.tokens[-1], self._params(row)
        if token in self._ends(row):
            return "end", None
        if token in params.stop_tokens:
            return "stop", None
        if params.stop and len(row.tokens) >= params.min_tokens:
            text = before_stop(row.tokens, params.stop, self.sampler.decode)
            if text is not None:
                return "stop", text
        return ("length", None) if len(row.tokens) >= row.prompt.limit else ("", None)

    def _leave(self, row: SessionRow, finish: str, text: str | None) -> None:
        row.gone = True
        self.rows = [r for r in self.rows if r is not row]
        prompt = row.prompt
        prompt.running -= 1
        heapq.heappush(self.free_slots, row.slot)
        if self.shared is not None and not prompt.running and prompt.started == prompt.request.n:
            heapq.heappush(self.free_prompts, prompt.slot)
        if text is None:
            kept = row.tokens[:-1] if finish in ("end", "stop") else row.tokens
            text = self.sampler.decode(kept, True)
        rollout = Rollout(tuple(row.tokens), tuple(row.logprobs), finish, text)
        prompt.done[row.number] = rollout
        if self.on_done is not None:
            self.on_done(prompt.index, row.number, rollout)
