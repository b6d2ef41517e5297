"""Log-probabilities of whole answers under a fixed model, computed once and kept.

A preference method compares the policy with the model that it starts from. That model is open before the first step,
and the answers are known: so its numbers are made then, a chunk at a time, and no second model is held. Chunks lie in
the user's cache under a hash of the weights and of the tokens; each is whole or not there, so that a run that was
killed here goes on with the next one, and another run on the same model and rows computes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from posttrain.config import ModelConfig, SystemsConfig
from posttrain.core import distributed
from posttrain.core.files import cache_folder, sync_folder
from posttrain.core.progress import Track
from posttrain.core.ragged import RaggedBatch, micro_batches
from posttrain.core.types import Sample
from posttrain.losses.aggregation import sequence_index, sequence_sum
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_model, pick_dtype
from posttrain.trainer.token_budget import token_budget

UNITS_PER_CHUNK = 256
"""Units (a pair, an answer) that are computed and written together."""
LAYOUT = "3"
"""Part of the hash: raised when what is kept changes."""

Unit = Sequence[Sample]
"""Samples that share a prompt: a pair, or one answer. Their meta says how long it is (`shared`); weights are 1 or 0."""


def answer_sums(model: LanguageModel, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
    """Compute (log-probability, tokens) of every sample's answer: the tokens of it that carry weight; in nats.

    Sums are float64 (except on MPS, which has none): ratios are small differences of them, and of a thousand nats
    float32 keeps 1e-4. A sample without any such token keeps ranks in step; its sum is 0 and has no gradient.
    """
    rows = batch.weighted_rows
    lengths = torch.tensor([len(row) for row in rows], device=batch.tokens_T.device)
    logprobs = model(batch, "logprobs", torch.cat(rows))[0]
    logprobs = logprobs if logprobs.device.type == "mps" else logprobs.double()
    return sequence_sum(logprobs, sequence_index(lengths, len(logprobs)), len(rows)), lengths


@torch.no_grad()
def sums_of(model: LanguageModel, units: Sequence[Unit], systems: SystemsConfig) -> list[list[float]]:
    """Compute the log-probability of every sample of every unit; those of a unit together, their prompt once.

    Args:
        model: The model.
        units: The units.
        systems: Settings of micro-batches.
    """
    sizes = [len(unit[0]) + sum(len(s) - int(s.meta["shared"]) for s in unit[1:]) for unit in units]
    out: list[list[float]] = [[] for _ in units]
    for chosen in micro_batches(sizes, token_budget(systems, model)):
        flat = [s for i in chosen for s in units[i]]
        sums, _ = answer_sums(model, model.pack(flat, systems.share_prefixes))
        left = iter(sums.tolist())
        for i in chosen:
            out[i] = [next(left) for _ in units[i]]
    return out


class Reference:
    """Compute log-probabilities under the model that a stage starts from: the policy itself, without its adapters.

    It must be created, and used, before anything is trained.
    """

    def __init__(self, policy: LanguageModel, systems: SystemsConfig) -> None:
        self.policy, self.systems = policy, systems
        self.model_hash = fingerprint(policy)
        self.folder = cache_folder() / "reference" / self.model_hash[:32]

    def sums(self, units: Sequence[Unit], title: str) -> list[list[float]]:
        """Return the log-probability of every sample of every unit, from the cache if it is there."""
        # One chunk of units at a time is made: all of them may not fit in memory.
        chunks = [slice(i, i + UNITS_PER_CHUNK) for i in range(0, len(units), UNITS_PER_CHUNK)]
        paths = [self.folder / f"{_hash_units(units[chunk])}.npy" for chunk in chunks]
        missing = [i for i, path in enumerate(paths) if _read(path) is None]
        mine = missing[distributed.rank() :: distributed.world()]
        if mine:
            self._fill(units, chunks, paths, mine, title)
        distributed.barrier()
        out: list[list[float]] = []
        for chunk, path in zip((units[c] for c in chunks), paths, strict=True):
            kept = _read(path)
            if kept is None or len(kept) != sum(map(len, chunk)):  # another machine's cache, or one that was cleared
                with without_adapters(self.policy):
                    out += sums_of(self.policy, chunk, self.systems)
                continue
            left = iter(kept)
            out += [[next(left) for _ in unit] for unit in chunk]
        return out

    def _fill(
        self, units: Sequence[Unit], chunks: Sequence[slice], paths: Sequence[Path], which: Sequence[int], title: str
    ) -> None:
        with Track(title, len(which), shown=distributed.is_main()) as track, without_adapters(self.policy):
            for done, i in enumerate(which, 1):
                made = sums_of(self.policy, units[chunks[i]], self.systems)
                _write(paths[i], [x for unit in made for x in unit])
                track.update(done)


def frozen_beside(policy: LanguageModel, model: ModelConfig, adapted: bool) -> LanguageModel:
    """Return the model that a stage starts from, for completions that aren't known in advance.

    Args:
        policy: The policy.
        model: Source of the model.
        adapted: The policy has adapters: it is returned itself, to be used `without_adapters`; else a second, frozen
            model.
    """
    if adapted:
        return policy
    hf, _ = load_model(model, pick_dtype(model.dtype, policy.device))
    return LanguageModel(hf).eval().requires_grad_(False)


@contextmanager
def without_adapters(policy: LanguageModel) -> Iterator[None]:
    """Switch adapters off within the context; a model that has none is used as it is."""
    if hasattr(policy.hf, "disable_adapter"):
        with policy.hf.disable_adapter():
            yield
    else:
        yield


def fingerprint(model: LanguageModel) -> str:
    """Compute a hash of what decides a model's numbers: weights without adapters, configuration, dtype, device type."""
    config = model.base.config.to_dict()
    for beside in ("_name_or_path", "transformers_version"):
        config.pop(beside, None)
    digest = hashlib.sha256(json.dumps([LAYOUT, config, model.device.type], sort_keys=True, default=str).encode())
    soft = model.soft_prompt
    if soft is not None and soft.start is not None:
        digest.update(soft.start.cpu().contiguous().numpy().tobytes())
    whole = model.hf if soft is None else model.base
    prefix = getattr(getattr(model.hf, "base_model", None), "prefix", "lora_")  # peft's tuners name theirs so
    trained = (f".{prefix}", ".modules_to_save.", ".trainable_tokens_delta.")
    weights = {
        name.removeprefix("base_model.model.")
        .replace(".token_adapter.", ".")
        .replace(".base_layer.", ".")
        .replace(".original_module.", "."): p
        for name, p in whole.named_parameters()
        if not any(part in name for part in trained)
    }
    for name, module in whole.named_modules():  # the scales of quantised weights, which are no parameters
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        for part, tensor in {} if state is None else state.as_dict(packed=True).items():
            weights[f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.{part}"] = tensor
    for name in sorted(weights):
        tensor = weights[name].detach().contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _hash_units(units: Sequence[Unit]) -> str:
    digest = hashlib.sha256()
    for unit in units:
        for sample in unit:
            digest.update(np.asarray([len(unit), len(sample), *sample.tokens], dtype=np.int64).tobytes())
            digest.update(np.asarray([w != 0 for w in sample.weights]).tobytes())
    return digest.hexdigest()


def _read(path: Path) -> list[float] | None:
    try:
        return [float(x) for x in np.load(path)]
    except (OSError, ValueError, EOFError):  # not there, or not whole, whatever cut it
        return None


def _write(path: Path, values: Sequence[float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}.writing")
    with work.open("wb") as f:
        np.save(f, np.asarray(values, dtype=np.float64))
        f.flush()
        os.fsync(f.fileno())
    os.replace(work, path)
    sync_folder(path.parent)
