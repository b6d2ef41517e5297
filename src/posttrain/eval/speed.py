"""Measure a model's size, memory and speed: what it costs to keep, to read a prompt, and to write an answer.

The sampler computes, as in every evaluation. Prompts are random tokens and answers have a fixed length, so that models
are compared on the same work whatever they would say.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.config import ModelConfig, SamplingConfig
from posttrain.core.errors import DataError, ModelError
from posttrain.core.files import bytes_of_weights
from posttrain.core.process_memory import peak_bytes, reset_peak, resident_bytes
from posttrain.core.progress import Track
from posttrain.models.loading import load_model, resolve, source_ensemble
from posttrain.models.quantized_weight import quantized_matrices
from posttrain.models.vocabulary import output_rows
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request

if TYPE_CHECKING:
    from posttrain.eval.evaluation_tasks import Chunk, EvaluationItems, EvaluationRun
    from posttrain.eval.speed_evaluation import SpeedTask
    from posttrain.models.language_model import LanguageModel

SPEED_RATES = {
    "prefill": "tokens/s of prompts",
    "decode": "tokens/s of one answer",
    "batch": "tokens/s of a batch of answers",
    "decode_int8": "tokens/s of one answer, keys and values in int8",
    "batch_int8": "tokens/s of a batch of answers, keys and values in int8",
}
"""Rates of an item, and what they are; the last two with `kv_cache: int8`."""


def speed_chunks(run: EvaluationRun, config: SpeedTask.Config) -> Iterator[Chunk]:
    """Yield a chunk for each measurement; the first one also has the sizes, and warms up what compiles or allocates.

    Raises:
        DataError: The prompt and the answer are longer than the model's context.
    """
    sampler = LocalSampler(run.model, run.tokenizer)
    small = LocalSampler(run.model, run.tokenizer, kv_cache=config.kv_cache) if config.kv_cache else None
    needed = config.prompt_tokens + config.answer_tokens + 1
    if needed > sampler.context:
        raise DataError(
            f"evaluation {config.name}: {config.prompt_tokens} tokens of prompt and {config.answer_tokens} of answer "
            f"are more than the model's context of {sampler.context}: lower prompt_tokens or answer_tokens"
        )
    prompts = _prompts(run, config)

    def compute(number: int, _: Track) -> EvaluationItems:
        sizes: dict[str, Any] = {}
        if number == 0:
            sizes = sizes_of(run.model, run.settings)
            if config.memory and run.settings is not None:
                sizes["peak_memory"] = memory_of_serving(run.settings, prompts[0], config.answer_tokens)
            for one in (sampler, small):
                if one is not None:
                    _seconds(one, prompts, 2)
        found = rates(sampler, prompts, config.answer_tokens)
        if small is not None:
            again = rates(small, prompts, config.answer_tokens)
            found |= {f"{name}_{config.kv_cache}": again[name] for name in ("decode", "batch")}
        return [{"id": number, **found, **sizes}]

    for number in range(config.repeats):
        yield 1, partial(compute, number)


def rates(sampler: LocalSampler, prompts: Sequence[Sequence[int]], new: int) -> dict[str, float]:
    """Measure tokens a second, once: of reading a prompt, of one answer, and of an answer to each of the prompts.

    The time of decoding is the time of prompt and answer less that of the prompt and a first token. If another program
    made the latter take longer, it is the whole time of prompt and answer, so that the rate is a lower bound.

    Args:
        sampler: The sampler.
        prompts: Token ids.
        new: Tokens of each answer behind the first.
    """
    first = _seconds(sampler, prompts[:1], 1)
    whole = _seconds(sampler, prompts[:1], 1 + new)
    first_of_all = _seconds(sampler, prompts, 1)
    whole_of_all = _seconds(sampler, prompts, 1 + new)
    decode = new / (whole - first if whole > first else whole)
    batch = new * len(prompts) / (whole_of_all - first_of_all if whole_of_all > first_of_all else whole_of_all)
    return {"value": decode, "prefill": len(prompts[0]) / first, "decode": decode, "batch": batch}


def _seconds(sampler: LocalSampler, prompts: Sequence[Sequence[int]], tokens: int) -> float:
    """Return the time of answering the prompts with this number of tokens each, whatever the model would rather end."""
    params = SamplingConfig(temperature=0.0, max_tokens=tokens, min_tokens=tokens)
    began = time.perf_counter()
    sampler.sample([Request(list(p)) for p in prompts], params)
    return time.perf_counter() - began


def _prompts(run: EvaluationRun, config: SpeedTask.Config) -> list[list[int]]:
    rng = np.random.default_rng(run.seed)
    rows = min(output_rows(run.model.base), len(run.tokenizer))
    return [rng.integers(0, rows, config.prompt_tokens).tolist() for _ in range(config.batch)]


def sizes_of(model: LanguageModel, settings: ModelConfig | None) -> dict[str, int]:
    """Return the parameters of a model, and bytes of its weights on disk, in memory, and in packed form.

    Weights in memory are the tensors that the model holds, each once. On a CPU a model that is opened for inference
    holds quantised layers and experts packed only, elsewhere dense; where a layer's inputs are rounded, its integers
    are in memory too. `packed_bytes` counts all quantised layers and experts packed, as they are stored, and all others
    as they are. Without any it is left out.
    """
    tensors = {t.untyped_storage().data_ptr(): t for t in [*model.hf.parameters(), *model.hf.buffers()]}
    alone = sum(model.backend.packed_bytes(t) for t in tensors.values())
    held = alone + sum(t.untyped_storage().nbytes() for t in tensors.values())
    packed = [(matrix.weight_O_I, weight) for matrix, weight in quantized_matrices(model.hf)]
    tensors_of = [t for _, q in packed for t in (q.values_O_I, q.scale_O_G, q.zero_O_G, q.order_I)]
    beside = [t for t in tensors_of if t is not None and not t.is_meta]
    out = {
        "parameters": sum(_numbers(p) for p in model.hf.parameters()),
        "memory_bytes": held + sum(map(_bytes, beside)),
    }
    if packed or alone:
        dense = sum(_bytes(w) for w, _ in packed)
        out["packed_bytes"] = held - dense + sum(q.nbytes for _, q in packed)
    if settings is not None and resolve(settings.source).kind == "folder":
        ensemble = source_ensemble(settings)
        sources = [settings] if ensemble is None else ensemble.member_settings(settings)
        folders = [Path(resolve(source.source).location) for source in sources]
        out["disk_bytes"] = sum(bytes_of_weights(folder) or 0 for folder in folders)
    return out


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def _numbers(parameter: Any) -> int:
    """Return the numbers of a parameter; bitsandbytes packs two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def memory_of_serving(settings: ModelConfig, prompt: Sequence[int], new: int) -> int:
    """Measure the peak memory of opening a model and answering a prompt, in a process of its own.

    In this process memory that earlier stages took and gave back would count.

    Args:
        settings: The model.
        prompt: Token ids.
        new: Tokens of the answer.

    Returns:
        Bytes, over what Python and its packages take; on a GPU, those of the GPU.

    Raises:
        ModelError: The process failed.
    """
    given = {"model": settings.model_dump(mode="json"), "prompt": list(prompt), "new": new}
    command = [sys.executable, "-m", "posttrain.eval.serving_memory"]
    done = subprocess.run(command, input=json.dumps(given), text=True, capture_output=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise ModelError(f"the process that measures the memory of {settings.source!r} failed: {reason}")
    return int(json.loads(done.stdout.strip().splitlines()[-1])["bytes"])


def measure_serving(given: dict[str, Any]) -> int:
    """Open the model, answer the prompt, and return the peak memory of that: the work of the process."""
    import torch

    from posttrain.models.language_model import LanguageModel

    def serve(settings: ModelConfig, prompt: Sequence[int]) -> LanguageModel:
        hf, tokenizer = load_model(settings, inference=True)
        model = LanguageModel(hf).eval()
        _seconds(LocalSampler(model, tokenizer), [prompt], 1 + given["new"])
        return model

    settings = ModelConfig.model_validate(given["model"])
    # What packages and compiled kernels take at their first use is not the model's: a tiny one is served first.
    # Its prompt is token 0: the prompt's own tokens may be beyond its vocabulary.
    serve(ModelConfig(source="tiny:llama", device=settings.device), [0])
    reset_peak()
    before = resident_bytes()
    model = serve(settings, given["prompt"])
    if model.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(model.device))
    return peak_bytes() - before


def summary_of_speed(items: EvaluationItems) -> dict[str, Any]:
    """Return {"rates": {name: {"value", "low", "high"}}} of the repeats, and the sizes."""
    spread = {}
    for name in [name for name in SPEED_RATES if name in items[0]]:
        values = [float(item[name]) for item in items]
        spread[name] = {"value": median(values), "low": min(values), "high": max(values)}
    sizes = {k: v for k, v in items[0].items() if k not in ("id", "value", *SPEED_RATES)}
    return {"rates": spread, **sizes}
