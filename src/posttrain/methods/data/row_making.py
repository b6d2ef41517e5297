"""What stages have in common that sample to make data: chunks that are done once, the sampler, what they leave."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.config import ModelConfig, SamplerConfig
from posttrain.core import distributed
from posttrain.core.errors import ModelError
from posttrain.core.files import write_json, write_text
from posttrain.models.language_model import LanguageModel, verify
from posttrain.models.loading import load_model, pick_device, pick_dtype
from posttrain.sampling.engine import LocalSampler
from posttrain.trainer.policy import save_atomically


def alone(method: str) -> None:
    """Raise ModelError under torchrun."""
    if distributed.world() > 1:
        raise ModelError(f"{method} runs in one process so far; start it without torchrun")


def chunked(count: int, size: int) -> list[range]:
    """0 to count - 1 in runs of `size`: the same however often a stage is started."""
    return [range(s, min(s + size, count)) for s in range(0, count, size)]


def open_sampler(model: ModelConfig, config: SamplerConfig) -> LocalSampler:
    """A model that samples and is not trained, checked against its own forward."""
    hf, tokenizer = load_model(model, pick_dtype(model.dtype, pick_device(model.device)))
    policy = LanguageModel(hf).eval()
    verify(policy)
    return LocalSampler(policy, tokenizer, **config.limits())


def leave_data(folder: Path, tables: Mapping[str, Sequence[Mapping[str, Any]]], stats: Mapping[str, Any]) -> None:
    """`folder`/data with NAME.jsonl of each table and stats.json, whole or not at all."""

    def write(work: Path) -> None:
        work.mkdir()
        for name, lines in tables.items():
            write_text(work / f"{name}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        write_json(work / "stats.json", stats)

    save_atomically(folder / "data", write)
