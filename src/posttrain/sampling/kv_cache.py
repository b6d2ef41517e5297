"""Keys and values of running completions, and attention of one new token each over them.

Two regions. A prompt's keys and values lie in the *shared* region once, whatever number of completions it has; what a
completion has drawn lies in its slot of the *own* region. A row's scores over both make one softmax. All rows of a
prompt are one product with its keys: read once, not once a completion. Where no prompt has more than one completion,
prompts lie in the own region too, and there is one product less.

Both regions hold the model's dtype, or int8 (`int8_cache`). A prompt's own forward pass reads the keys and values that
it computes; every later token reads what is stored, its own key and value included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from posttrain.core.transfer import to_device
from posttrain.models.backends import backend_for
from posttrain.sampling.int8_cache import SCALE_BYTES, dequantize_rows, quantize_rows

Stored = tuple[Tensor, ...]
"""Keys or values of a layer, (slots, heads, columns, size): as they were computed, or int8 and (slots, heads, columns)
scales."""


class Region:
    """Per layer, keys and values (slots, heads, columns, size); made at the first write, when their sizes are known.

    int8: they are stored so. layers: what `posttrain.cpu.decoder_layer` found out about each, while this lives: no
    weight changes meanwhile.
    """

    def __init__(self, slots: int, columns: int, int8: bool = False) -> None:
        self.slots, self.columns, self.int8 = slots, columns, int8
        self.stored: list[tuple[Stored, Stored]] = []
        self.layers: dict[int, Any] = {}

    def at(self, layer: int, key: Tensor, value: Tensor) -> tuple[Stored, Stored]:
        """Return the keys and values of a layer.

        Args:
            layer: Number of the layer.
            key: Keys of any tokens, (heads, any, size), which show shape and dtype.
            value: Values likewise.
        """
        while len(self.stored) <= layer:
            self.stored.append((self._made(key), self._made(value)))
        return self.stored[layer]

    def _made(self, like: Tensor) -> Stored:
        # Zeros: what is masked out is multiplied by zero, and must be a number.
        places = (self.slots, like.shape[0], self.columns)
        if not self.int8:
            return (like.new_zeros(*places, like.shape[-1]),)
        integers = like.new_zeros(*places, like.shape[-1], dtype=torch.int8)
        return integers, like.new_zeros(places, dtype=torch.float32)

    def _tensors(self) -> list[Tensor]:
        return [x for pair in self.stored for stored in pair for x in stored]

    def move(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """Copy the first columns of slots to other slots: (source, target, columns); no target is a source."""
        tensors = self._tensors()
        if not moves or not tensors:
            return
        if _in_one(tensors[0]):
            sources, targets = (to_device(torch.tensor([m[i] for m in moves]), tensors[0].device) for i in (0, 1))
            columns = max(m[2] for m in moves)
            for x in tensors:
                x[targets, :, :columns] = x[sources, :, :columns]
            return
        for x in tensors:
            for source, target, columns in moves:
                x[target, :, :columns] = x[source, :, :columns]

    def resize(self, slots: int, columns: int) -> None:
        """Change the number of slots and columns; what lies in the places that both sizes have is kept."""
        places = slice(min(slots, self.slots)), slice(None), slice(min(columns, self.columns))
        self.slots, self.columns = slots, columns
        for layer, (key, value) in enumerate(self.stored):  # in place of the old ones: no more than a layer twice
            self.stored[layer] = (
                tuple(_resized(x, slots, columns, places) for x in key),
                tuple(_resized(x, slots, columns, places) for x in value),
            )
        self.layers.clear()

    def reset(self) -> None:
        """Make the region as good as new; its memory stays where it is."""
        for x in self._tensors():
            x.zero_()
        self.layers.clear()

    def bytes(self) -> int:
        """Return the memory that keys and values take."""
        return sum(x.nbytes for x in self._tensors())


def _resized(x: Tensor, slots: int, columns: int, places: tuple[slice, slice, slice]) -> Tensor:
    out = x.new_zeros(slots, x.shape[1], columns, *x.shape[3:])
    out[places] = x[places]
    return out


def token_bytes(key: Tensor, value: Tensor, int8: bool) -> int:
    """Return the bytes of a token in a layer of a region.

    Args:
        key: Keys of any tokens, (heads, any, size).
        value: Values likewise.
        int8: The region stores them so.
    """
    widths = [x.shape[-1] + SCALE_BYTES if int8 else x.shape[-1] * x.element_size() for x in (key, value)]
    return key.shape[0] * widths[0] + value.shape[0] * widths[1]


def _write(stored: Stored, places: Any, x: Tensor) -> None:
    """Put rows (..., size) where an index of slots, heads and columns says."""
    for tensor, part in zip(stored, quantize_rows(x) if len(stored) == 2 else (x,), strict=True):
        tensor[places] = part


def _read(stored: Stored, slots: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the first columns of the first slots, (slots * heads, columns, size)."""
    parts = [x[:slots, :, :columns] for x in stored]
    x = parts[0] if len(parts) == 1 else dequantize_rows(parts[0], parts[1], dtype)
    return x.flatten(0, 1)


def _in_one(x: Tensor) -> bool:
    """Return whether slots are written in one operation: on a GPU its launch takes longer than the copy."""
    return x.device.type != "cpu"


class Filling:
    """Takes a prefill's keys and values, layer after layer, to the slots of its prompts.

    shifts: of each prompt, what its last rotary position is less than its length; empty: nothing.
    """

    def __init__(self, region: Region, rows: list[Tensor], slots: list[int]) -> None:
        self.region, self.rows, self.slots, self.layer = region, rows, slots, 0
        self.shifts: list[int] = []
        self.places: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, key: Tensor, value: Tensor) -> None:
        keys, values = self.region.at(self.layer, key, value)
        self.layer += 1
        if _in_one(key):
            slot_K, column_K, row_K = self._places(key.device)
            for stored, x in ((keys, key), (values, value)):
                _write(stored, (slot_K, slice(None), column_K), x[:, row_K].transpose(0, 1))
            return
        for row, slot in zip(self.rows, self.slots, strict=True):
            for stored, x in ((keys, key), (values, value)):
                _write(stored, (slot, slice(None), slice(len(row))), x[:, row])

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return slot, column and T-index of every token of every prompt."""
        if self.places is None:
            lengths = [len(row) for row in self.rows]
            slots = torch.tensor(self.slots).repeat_interleave(torch.tensor(lengths))
            columns = torch.cat([torch.arange(n) for n in lengths])
            self.places = to_device(slots, device), to_device(columns, device), torch.cat(self.rows)
        return self.places


@dataclass
class DecodingStep:
    """Attention of one decoding step: M rows, each a completion's newest token, row i in slot i of the own region.

    slot_M: 0 to M - 1. column_M: where a row's key and value go in its slot; it sees columns 0 to column_M.
    prompt_M, rank_M: its slot of the shared region and its number among that prompt's rows; prompt_length_M: how many
    columns of that slot it sees. position_M: absolute position. own_columns, prompt_columns, prompt_slots, ranks: sizes
    that hold all of these; what is larger than needed is masked.
    """

    own: Region
    slot_M: Tensor
    column_M: Tensor
    position_M: Tensor
    own_columns: int
    shared: Region | None = None
    prompt_M: Tensor | None = None
    rank_M: Tensor | None = None
    prompt_length_M: Tensor | None = None
    prompt_slots: int = 0
    prompt_columns: int = 0
    ranks: int = 0
    layer: int = 0
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: int | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Compute attention of new tokens over the prompt's and their own keys: `posttrain.models.attention.Decoding`.

        Args:
            query: (1, M, heads, size) of the new tokens.
            key: Their keys, which are stored.
            value: Their values, which are stored.
            window: Columns that a token sees back; None: all.
            scale: Factor of the scores.
            softcap: Bound of the scores by tanh; None: none.
            sinks: Score of an extra key of each head; None: none.
        """
        backend = backend_for(query.device)
        if softcap is None and sinks is None:
            out = backend.decode_attention(self, query, key, value, window, scale)
            if out is not None:
                return out
        with backend.small_products():
            return self._attend(query, key, value, window, scale, softcap, sinks)

    @property
    def known(self) -> dict[int, Any]:
        """See `posttrain.cpu.decoder_layer.Places`."""
        return self.own.layers

    def places(
        self, key: Tensor, value: Tensor
    ) -> tuple[tuple[Stored, Stored], tuple[Stored, Stored] | None, Tensor, tuple[Tensor, Tensor] | None]:
        """See `posttrain.cpu.decoder_layer.Places`; `key` and `value` as `Region.at` takes them."""
        layer, self.layer = self.layer, self.layer + 1
        own = self.own.at(layer, key, value)
        if self.shared is None:
            return own, None, self.column_M, None
        assert self.prompt_M is not None and self.prompt_length_M is not None
        return own, self.shared.at(layer, key, value), self.column_M, (self.prompt_M, self.prompt_length_M)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: int | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        layer, self.layer = self.layer, self.layer + 1
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        rows, heads, size = q.shape
        own_k, own_v = self.own.at(layer, key[0], value[0])
        newest = (self.slot_M, slice(None), self.column_M)
        _write(own_k, newest, k)
        _write(own_v, newest, v)
        kv = k.shape[1]
        q = (q * scale).reshape(rows, kv, heads // kv, size)
        scores = torch.bmm(q.flatten(0, 1), self._columns(own_k, k.dtype).transpose(1, 2)).unflatten(0, (-1, kv))
        shared_v = None
        if self.shared is not None:
            shared_k, shared_v = self.shared.at(layer, key[0], value[0])
            s = torch.bmm(self._to_prompts(q), self._prompt_columns(shared_k, k.dtype).transpose(1, 2))
            scores = torch.cat([self._from_prompts(s, kv), scores], -1)
        scores = scores.float()
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + self.mask(window)
        if sinks is not None:
            sink = sinks.float().reshape(1, kv, -1, 1).expand(rows, -1, -1, 1)
            p = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            p = scores.softmax(-1)
        p = p.to(v.dtype)
        split = self.prompt_columns if self.shared is not None else 0
        out = torch.bmm(p[..., split:].flatten(0, 1), self._columns(own_v, v.dtype)).unflatten(0, (-1, kv))
        if shared_v is not None:
            o = torch.bmm(self._to_prompts(p[..., :split]), self._prompt_columns(shared_v, v.dtype))
            out = out + self._from_prompts(o, kv)
        return out.reshape(1, rows, heads, -1)

    def mask(self, window: int | None) -> Tensor:
        """Return (M, 1, 1, columns): 0 if a row sees a key, else -inf."""
        if window not in self.masks:
            device = self.column_M.device
            at = torch.arange(self.own_columns, device=device)[None]
            # A key's position: own column c of a row whose newest token, at column_M, has position_M.
            distance = self.column_M[:, None] - at
            hidden = distance < 0
            if window is not None:
                hidden |= distance >= window
            if self.shared is not None:
                assert self.prompt_length_M is not None
                at = torch.arange(self.prompt_columns, device=device)[None]
                outside = at >= self.prompt_length_M[:, None]
                if window is not None:
                    outside |= self.position_M[:, None] - at >= window
                hidden = torch.cat([outside, hidden], 1)
            mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)
            self.masks[window] = mask[:, None, None]
        return self.masks[window]

    def _columns(self, x: Stored, dtype: torch.dtype) -> Tensor:
        return _read(x, len(self.slot_M), self.own_columns, dtype)

    def _prompt_columns(self, x: Stored, dtype: torch.dtype) -> Tensor:
        return _read(x, self.prompt_slots, self.prompt_columns, dtype)

    def _to_prompts(self, x: Tensor) -> Tensor:
        """(M, kv, group, w) rows -> (prompts * kv, ranks * group, w)."""
        assert self.prompt_M is not None and self.rank_M is not None
        rows, kv, group, width = x.shape
        grid = x.new_zeros(self.prompt_slots, kv, self.ranks, group, width)
        grid[self.prompt_M, :, self.rank_M] = x
        return grid.view(self.prompt_slots * kv, self.ranks * group, width)

    def _from_prompts(self, x: Tensor, kv: int) -> Tensor:
        assert self.prompt_M is not None and self.rank_M is not None
        x = x.view(self.prompt_slots, kv, self.ranks, -1, x.shape[-1])
        return x[self.prompt_M, :, self.rank_M]


def decode_step(model: Any, tokens: Tensor, positions: Tensor, step: DecodingStep) -> Tensor:
    """Compute one more token of every row: hidden states (M, H) that predict the next.

    Args:
        model: The `LanguageModel`.
        tokens: Newest token of each row, (M,).
        positions: Their rotary positions, (M,) or (3, M).
        step: Where keys and values lie.
    """
    out = model.decoder(input_ids=tokens[None], position_ids=positions[None], use_cache=False, ragged=step)
    return out.last_hidden_state[0]  # type: ignore[no-any-return]
