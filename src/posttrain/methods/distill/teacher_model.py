"""A teacher in this process: its numbers for a micro-batch, and those of fixed rows, computed once and kept by content.

What is kept of a position are hidden states (H numbers, from which the teacher's head makes the whole distribution
again) or the k likeliest tokens. They lie in the user's cache under a hash of the teacher's weights and of the tokens,
in files of some rows that are whole or not there: a run that was killed continues with the next file, and another run
with the same teacher and rows computes nothing. When all are there, only the teacher's head stays in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.config import ModelConfig, SystemsConfig
from posttrain.core import distributed
from posttrain.core.errors import DataError, ModelError
from posttrain.core.files import cache_folder, sync_folder
from posttrain.core.progress import Track
from posttrain.core.ragged import RaggedBatch, micro_batches
from posttrain.core.types import Sample
from posttrain.losses.distillation_loss import Teacher, TeacherHidden, TeacherTop, top_logprobs
from posttrain.losses.linear_logprobs import Head
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_model, pick_device, pick_dtype
from posttrain.models.verification import verify
from posttrain.trainer.reference_model import fingerprint
from posttrain.trainer.token_budget import token_budget

ROWS_PER_FILE = 64
NUMBERS_LAYOUT = "1"
"""Part of the hash: raised when what is kept changes."""
ROW = "row"
"""Key of a sample's meta: its number among the fixed rows."""


def open_teacher(config: ModelConfig) -> tuple[LanguageModel, Any]:
    """Open a model that is not trained, checked against its own forward pass; and its tokenizer."""
    hf, tokenizer = load_model(config, pick_dtype(config.dtype, pick_device(config.device)))
    model = LanguageModel(hf).eval().requires_grad_(False)
    verify(model)
    return model, tokenizer


def check_same_tokens(student: Any, teacher: Any, source: str) -> None:
    """Raise ModelError unless every id that both tokenizers have is the same token, and they share most of them.

    Args:
        student: The student's tokenizer.
        teacher: The teacher's tokenizer.
        source: The teacher's source, for the message.
    """
    theirs = {i: token for token, i in teacher.get_vocab().items()}
    ours = {i: token for token, i in student.get_vocab().items()}
    different = sorted(i for i, token in ours.items() if i in theirs and theirs[i] != token)
    common = len(ours.keys() & theirs.keys())
    if not different and 2 * common >= len(ours):
        return
    shown = (
        f"token {different[0]} is {theirs[different[0]]!r} there and {ours[different[0]]!r} here"
        if different
        else f"it has {len(theirs):,} tokens, and the student {len(ours):,}"
    )
    raise ModelError(
        f"teacher {source!r} has another tokenizer than the student ({shown}): their distributions are over different "
        "tokens and can't be compared. Train on the teacher's text (teacher_text: true, divergence: null), which works "
        "across tokenizers, or choose a teacher with the student's tokenizer"
    )


class LocalTeacher:
    """Compute what a teacher says at the places of a batch that carry loss.

    Attributes:
        head: The teacher's output head; None: `top_k` numbers are taken.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Any, top_k: int | None, temperature: float, systems: SystemsConfig
    ) -> None:
        """Make a teacher.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            top_k: Number of likeliest tokens that are taken. None: all.
            temperature: Divides the logits.
            systems: Settings of micro-batches.

        Raises:
            ModelError: There are not more tokens than `top_k`.
        """
        self.model: LanguageModel | None = model
        self.top_k, self.temperature, self.systems = top_k, temperature, systems
        self.whole_head = model.head()
        vocabulary, self.width = self.whole_head.weight_V_H.shape
        if top_k is not None and top_k >= vocabulary:
            raise ModelError(f"top_k is {top_k}, and the teacher has {vocabulary:,} tokens: leave it out to take all")
        self.dtype = next(model.parameters()).dtype
        self.known = np.zeros(vocabulary, dtype=bool)
        ids = [i for i in tokenizer.get_vocab().values() if i < vocabulary]
        self.known[ids] = True
        settings = NUMBERS_LAYOUT, fingerprint(model), top_k, temperature if top_k else None
        self.key = hashlib.sha256(repr(settings).encode()).hexdigest()

    @property
    def bytes_per_token(self) -> int:
        """Return how many bytes are kept of a position."""
        return self.width * self.dtype.itemsize if self.top_k is None else 8 * self.top_k + 4

    def check(self, samples: Sequence[Sample]) -> None:
        """Raise DataError for a sample with a token that the teacher does not have."""
        for sample in samples:
            tokens = np.asarray(sample.tokens, dtype=np.int64)
            strange = (tokens >= len(self.known)) | ~self.known[np.minimum(tokens, len(self.known) - 1)]
            if strange.any():
                raise DataError(
                    f"{sample.source or 'a row'}: token {int(tokens[strange][0])} is not one of the teacher's. Leave "
                    "such rows out, or choose a teacher that knows the tokens that were added to the student"
                )

    @torch.no_grad()
    def numbers(self, batch: RaggedBatch, share_prefixes: bool = True) -> Teacher:
        """Return what the teacher says before each token of `batch.weighted_rows`, sample after sample."""
        model = self.model
        assert model is not None
        if batch.virtual is not None or not model.ragged or batch.tokens_T.device != model.device:
            batch = model.pack(list(batch.samples), share_prefixes)
        hidden = model(batch, "hidden")[batch.predictors_T[torch.cat(batch.weighted_rows)]]
        return self.finished(hidden)

    def finished(self, hidden_N_H: Tensor) -> Teacher:
        """Return the teacher's distributions of hidden states."""
        if self.top_k is None:
            return TeacherHidden(hidden_N_H, self.whole_head)
        return top_logprobs(hidden_N_H, self.whole_head, self.top_k, self.temperature)

    def close(self) -> None:
        """Let the model go; of it the head stays, if whole distributions are made again."""
        self.model = None
        if self.top_k is not None:
            self.whole_head = Head(torch.zeros(0, 0))
        else:  # a copy: weights may lie in a mapped file, all of whose pages would stay for the sake of the head's
            head = self.whole_head
            bias = None if head.bias_V is None else head.bias_V.clone()
            self.whole_head = replace(head, weight_V_H=head.weight_V_H.clone(), bias_V=bias)


class KeptNumbers:
    """The teacher's numbers of fixed rows, in files."""

    def __init__(self, teacher: LocalTeacher, samples: Sequence[Sample], names: Sequence[int]) -> None:
        """Name the files.

        Args:
            teacher: The teacher.
            samples: The rows that are trained on or measured.
            names: Number of each, as `with_row_number` gives it to samples.
        """
        self.teacher, self.samples = teacher, samples
        self.at = {name: i for i, name in enumerate(names)}
        count = len(samples)
        self.chunks = [range(i, min(i + ROWS_PER_FILE, count)) for i in range(0, count, ROWS_PER_FILE)]
        self.folder = cache_folder() / "teacher" / teacher.key[:32]
        self.paths: list[Path] = []
        self.places: dict[int, tuple[int, int, int]] = {}
        for c, chunk in enumerate(self.chunks):
            digest, at = hashlib.sha256(), 0
            for i in chunk:
                sample = samples[i]
                carries = np.asarray(sample.weights) != 0
                digest.update(np.asarray([len(sample), *sample.tokens], dtype=np.int64).tobytes() + carries.tobytes())
                self.places[i] = c, at, at + int(carries.sum())
                at = self.places[i][2]
            self.paths.append(self.folder / f"{digest.hexdigest()}.npy")
        self._open: dict[int, np.ndarray] = {}

    @property
    def megabytes(self) -> float:
        """Return how much all of them take, in MiB."""
        return sum(end - begin for _, begin, end in self.places.values()) * self.teacher.bytes_per_token / 2**20

    def fill(self, title: str) -> None:
        """Compute what is missing; each rank computes a part."""
        missing = [c for c in range(len(self.chunks)) if self._read(c) is None]
        mine = missing[distributed.rank() :: distributed.world()]
        with Track(title, len(mine), shown=distributed.is_main() and bool(mine)) as track:
            for done, c in enumerate(mine, 1):
                _write(self.paths[c], self._computed(c))
                track.update(done)
        distributed.barrier()

    def _computed(self, c: int) -> np.ndarray:
        model = self.teacher.model
        assert model is not None
        samples = [self.samples[i] for i in self.chunks[c]]
        self.teacher.check(samples)
        parts: dict[int, np.ndarray] = {}
        for chosen in micro_batches([len(s) for s in samples], token_budget(self.teacher.systems, model)):
            batch = model.pack([samples[i] for i in chosen], self.teacher.systems.share_prefixes)
            found = _bytes(self.teacher.numbers(batch))
            ends = np.cumsum([0, *(len(row) for row in batch.weighted_rows)])
            parts |= {i: found[a:b] for i, a, b in zip(chosen, ends, ends[1:], strict=False)}
        return np.concatenate([parts[i] for i in range(len(samples))])

    def _read(self, c: int) -> np.ndarray | None:
        if c not in self._open:
            rows = sum(end - begin for i in self.chunks[c] for _, begin, end in [self.places[i]])
            try:
                found = np.load(self.paths[c], mmap_mode="r")
            except (OSError, ValueError, EOFError):  # not there, or not whole
                return None
            if found.shape != (rows, self.teacher.bytes_per_token) or found.dtype != np.uint8:
                return None
            self._open[c] = found
        return self._open[c]

    def numbers(self, rows: Sequence[int], device: torch.device) -> Teacher:
        """Return the teacher's numbers of some rows, one after the other.

        Raises:
            DataError: A file was deleted after it was made.
        """
        parts = []
        for name in rows:
            c, begin, end = self.places[self.at[name]]
            found = self._read(c)
            if found is None:
                raise DataError(f"{self.paths[c]} is gone: it was deleted while the run needed it. Run again to resume")
            parts.append(found[begin:end])
        width = self.teacher.bytes_per_token
        joined = torch.from_numpy(np.concatenate([np.zeros((0, width), np.uint8), *parts]))
        if self.teacher.top_k is None:
            hidden = joined.view(self.teacher.dtype) if len(joined) else torch.zeros(0, self.teacher.width)
            return TeacherHidden(hidden.to(device), self.teacher.whole_head)
        k = self.teacher.top_k
        words = joined.view(torch.int32).to(device) if len(joined) else torch.zeros(0, 2 * k + 1, dtype=torch.int32)
        logprobs = words[:, k:].contiguous().view(torch.float32)
        return TeacherTop(words[:, :k].long(), logprobs[:, :k], logprobs[:, k])


def _bytes(numbers: Teacher) -> np.ndarray:
    """Return the numbers of each position as bytes."""
    if isinstance(numbers, TeacherHidden):
        rows = numbers.hidden_N_H.cpu().contiguous()
    else:
        parts = torch.cat([numbers.logprobs_N_K, numbers.tail_N[:, None]], 1).contiguous().view(torch.int32)
        rows = torch.cat([numbers.ids_N_K.int(), parts], 1).cpu().contiguous()
    return np.array(rows.view(torch.uint8).numpy())


def _write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}.writing")
    with work.open("wb") as f:
        np.save(f, values)
        f.flush()
        os.fsync(f.fileno())
    os.replace(work, path)
    sync_folder(path.parent)


def with_row_number(sample: Sample, number: int) -> Sample:
    """Return a fixed row with its number, by which its numbers are found."""
    return replace(sample, meta={**sample.meta, ROW: number})


TeacherNumbers = Callable[[RaggedBatch], Teacher]
"""Gives what the teacher says before each token of `weighted_rows` of a micro-batch."""
