"""The estimate of memory: parts by hand, and the whole against what a process then takes."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import posttrain
from posttrain.config import AdapterConfig, ModelConfig, PlacementConfig
from posttrain.core import process_memory
from posttrain.core.types import Sample
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_model
from posttrain.models.model_shape import model_shape, shape_of_model
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.runs.memory_plan import plan_memory
from posttrain.trainer.memory_model import (
    FORMATS,
    activation_bytes,
    cache_bytes,
    served_as,
    state_bytes,
    unused_pages,
    weight_bytes,
)
from posttrain.trainer.workload import Completions, Workload, together

TYPES = ("llama", "qwen3", "qwen2", "gpt2", "qwen3_moe", "gemma3_text")


@pytest.mark.parametrize("kind", TYPES)
def test_the_shape_is_that_of_the_model(kind: str) -> None:
    """Of weights on the meta device, which have no memory, as of real ones."""
    hf = tiny_model(kind)
    with torch.device("meta"):
        empty = type(hf)(hf.config)
    shape = shape_of_model(empty)
    assert shape == shape_of_model(hf)
    assert shape.parameters == sum(p.numel() for p in hf.parameters())
    assert shape.layers == hf.config.num_hidden_layers and shape.vocabulary == len(hf.get_output_embeddings().weight)
    assert 0 < shape.linear < shape.parameters and shape.inner > 0


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "c_attn"]])
def test_adapters_have_as_many_parameters_as_are_attached(kind: str, target: Any) -> None:
    from posttrain.models.adapters import attach

    hf = tiny_model(kind)
    config, shape = AdapterConfig(r=3, target=target), shape_of_model(hf)
    adapted = attach(hf, config, 0)
    assert shape.adapter_parameters(config) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["prompt", "p_tuning_v2"])
def test_soft_prompts_have_as_many_parameters_as_are_trained(kind: str) -> None:
    from posttrain.models.adapters import attach

    hf = tiny_model("llama")
    config = AdapterConfig(kind=kind, tokens=5, init="random")
    shape = shape_of_model(hf)
    adapted = attach(hf, config, 0)
    assert shape.adapter_parameters(config) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize(("kind", "rank"), [("llama", 0), ("llama", 4), ("qwen3", 0), ("qwen2", 0), ("gpt2", 0)])
def test_activations_are_what_autograd_keeps(kind: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that a forward pass leaves for backward, against the formula without its last parts."""
    from posttrain.models.adapters import attach

    hf = tiny_model(kind, hidden_size=64, intermediate_size=160, num_hidden_layers=4)
    shape = shape_of_model(hf)
    model = LanguageModel(attach(hf, AdapterConfig(r=rank), 0) if rank else hf).train()
    batch = model.pack([Sample(list(range(3, 99)), [0.0] + [1.0] * 95)])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Any) -> Any:
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():  # else a way to make it again
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks
    monkeypatch.setattr(
        torch.autograd.graph, "saved_tensors_hooks", lambda pack, unpack: hooks(lambda t: count(pack(t)), unpack)
    )
    hidden = model.hidden_T_H(batch)
    tokens = batch.total
    names = tuple(shape.targets) if rank else ()
    backward = (4 * shape.hidden + shape.query + 2 * shape.key_value + 3 * shape.inner) * 4 * tokens
    expected = activation_bytes(shape, tokens, 4, rank, names) - backward
    assert hidden.requires_grad
    assert sum(kept.values()) == pytest.approx(expected, rel=0.1)


def test_parts_by_hand() -> None:
    shape = SimpleNamespace(parameters=1000, linear=640, experts=0, layers=3, key_value=8, key_value_heads=2)
    assert weight_bytes(shape, FORMATS["float32"]) == 4000  # type: ignore[arg-type]
    # 640 / 2 bytes, ten scales of a byte with their own scales of 4 / 256 bytes, and 360 numbers of two bytes.
    assert weight_bytes(shape, FORMATS["nf4"]) == round(320 + 10 * (1 + 4 / 256) + 720)  # type: ignore[arg-type]
    assert weight_bytes(shape, FORMATS["int8"]) == 640 + 720  # type: ignore[arg-type]
    assert weight_bytes(shape, FORMATS["int4"]) == 320 + 20 * 2 + 720  # type: ignore[arg-type]
    here = served_as(FORMATS["int4"], "cpu")  # scales, and the 360 numbers in full, are float32
    assert weight_bytes(shape, here) == 320 + 20 * 4 + 360 * 4  # type: ignore[arg-type]
    assert served_as(FORMATS["int4"], "cuda") == FORMATS["int4"] and served_as(FORMATS["nf4"], "cpu") == FORMATS["nf4"]
    assert unused_pages(shape, here, 999) == 320 + 20 * 4  # type: ignore[arg-type]
    mixture = SimpleNamespace(**{**vars(shape), "experts": 320})  # in full beside nf4
    assert weight_bytes(mixture, FORMATS["nf4"]) == round(160 + 5 * (1 + 4 / 256) + 320 * 2 + 720)  # type: ignore[arg-type]
    assert weight_bytes(mixture, here) == weight_bytes(shape, here)  # type: ignore[arg-type]
    for name, stored, unused in (
        ("float32", 4100, 0),
        ("bfloat16", 4100, 4100),
        ("bfloat16", None, 0),
        ("nf4", 2000, 2000),
    ):
        assert unused_pages(shape, FORMATS[name], stored) == unused  # type: ignore[arg-type]
    assert cache_bytes(shape, 5, 4) == 2 * 3 * 8 * 5 * 4  # type: ignore[arg-type]
    assert cache_bytes(shape, 5, 2, int8=True) == 2 * 3 * 5 * (8 + 2 * 4)  # type: ignore[arg-type]
    assert state_bytes(100, 4) == {"gradients": 400, "optimizer": 800}
    assert state_bytes(100, 2) == {"gradients": 400, "optimizer": 1200}  # float32 masters too
    assert state_bytes(100, 4, "muon", matrices=60)["optimizer"] == 4 * 60 + 8 * 40
    assert state_bytes(6400, 4, "adafactor", width=64)["optimizer"] == 800  # 64 by 100: 164 numbers, at most 200
    assert state_bytes(25600, 2, "adamw8bit")["optimizer"] == 6 * 25600 + 800  # two scales for every 256


def rows_of(lengths: list[int], loss: int) -> list[list[Sample]]:
    return [[Sample(list(range(i, i + n)), [0.0] * (n - loss) + [1.0] * loss)] for i, n in enumerate(lengths)]


def test_the_largest_micro_batch() -> None:
    work = Workload(rows_of([100] * 7 + [900], 10), per_step=8)
    assert work.micro_batch(768, None) == (900, 10)  # a row that is longer than the budget is alone
    assert Workload(rows_of([100] * 8, 10), per_step=8).micro_batch(768, None) == (400, 40)  # two passes of four
    assert Workload(rows_of([100] * 8, 10), per_step=4).micro_batch(768, None) == (400, 40)
    assert Workload().micro_batch(768, 512) == (512, 512)  # rows are not known: the longest sequence, or the budget


def test_shared_prompts_are_counted_once() -> None:
    start = list(range(500, 540))
    rows = [[Sample([*start, i, i + 1], [0.0] * 41 + [1.0])] for i in range(4)]
    assert Workload(rows, per_step=4).micro_batch(768, None) == (40 + 4 * 2, 4)
    chosen, rejected = (Sample([*start, i, i + 1], [0.0] * 40 + [1.0] * 2) for i in (1, 2))
    pair = SimpleNamespace(chosen=chosen, rejected=rejected, prompt=40)
    (unit,) = together([pair])
    assert Workload([unit], sums=True).micro_batch(768, None) == (44, 4)
    assert together([SimpleNamespace(sample=chosen)]) == [[chosen]]


def test_keys_and_values_have_the_places_of_the_sampler() -> None:
    from posttrain.config import SamplingConfig
    from posttrain.sampling import engine
    from posttrain.sampling.protocol import Request

    hf, tokenizer = load_model(ModelConfig(source="tiny:llama"))
    for prompts, each, running in ((5, 1, 128), (3, 4, 128), (6, 4, 8)):
        sampler = engine.LocalSampler(LanguageModel(hf).eval(), tokenizer, max_running=running)
        requests = [engine.SessionPrompt(i, Request([3] * 7, each, 0), 9) for i in range(prompts)]
        session = engine.Session(sampler, requests, SamplingConfig(max_tokens=9), None)
        held = session.own.slots * session.own.columns
        held += session.shared.slots * session.shared.columns if session.shared is not None else 0
        assert Completions(prompts, each, 7, 9, running).positions == held
    shape = shape_of_model(hf)
    for kv_cache in (None, "int8"):  # what the table says of a token is what the sampler keeps
        sampler = engine.LocalSampler(LanguageModel(hf).eval(), tokenizer, kv_cache=kv_cache)
        assert cache_bytes(shape, 1, 4, kv_cache == "int8") == sampler.bytes_per_token()


def small_model(folder: Path) -> Path:
    """Write a model that is large enough to be seen beside Python: 16 bytes of each of its 24 million parameters."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}
    tiny_model("llama", 259, num_hidden_layers=8, **sizes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def taken_by(recipe: posttrain.Recipe, folder: Path) -> int:
    """Run a recipe in a child process; return the most memory that it took, over what this process has."""
    result = folder / "peak.json"
    child = os.fork()  # packages are there already
    if child == 0:
        code = 1
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what tests before this one gave back is not there to be used
            process_memory.reset_peak()
            before = process_memory.resident_bytes()
            posttrain.run(recipe, folder / "run")
            result.write_text(json.dumps(process_memory.peak_bytes() - before))
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return int(json.loads(result.read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_plan_is_what_a_run_takes(tmp_path: Path) -> None:
    """Within 15%: all weights of a small model, trained for one step."""
    rows = tmp_path / "rows.jsonl"
    texts = [chr(97 + i) * 150 for i in range(4)]
    rows.write_text("".join(json.dumps({"prompt": text, "completion": "z" * 30}) + "\n" for text in texts))
    stage = {"method": "sft", "name": "sft", "data": {"source": str(rows), "chat": False}, "batch_size": 4}
    recipe = posttrain.Recipe.model_validate(
        {"name": "small", "model": {"source": str(small_model(tmp_path / "m"))}, "stages": [stage | {"max_steps": 1}]}
    )
    plan = plan_memory(recipe)
    assert plan.training[0].trained == plan.shape.parameters == model_shape(recipe.model).parameters
    divided = plan_memory(recipe.model_copy(update={"systems": PlacementConfig(sequence_parallel=2)})).training[0]
    assert divided.tokens == -(-plan.training[0].tokens // 2)
    assert divided.parts["activations"] == pytest.approx(plan.training[0].parts["activations"] / 2, rel=0.01)
    assert plan.training[0].peak == pytest.approx(taken_by(recipe, tmp_path), rel=0.15)
