"""vLLM as the sampler: the model's distribution, our stop rules, versions, losses, adapters, and a run that is killed.

POSTTRAIN_VLLM_PYTHON=vllm-env/bin/python pytest -m long tests/sampling/test_vllm_worker.py
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import posttrain
from posttrain.config import AdapterConfig, SamplingConfig
from posttrain.config.rollout_sampler import RolloutSamplerConfig
from posttrain.core.errors import MissingExtraError
from posttrain.core.files import read_lines
from posttrain.core.types import RolloutGroup
from posttrain.methods.rl.policy_sampler import weights_of
from posttrain.models.adapters import attach
from posttrain.models.language_model import LanguageModel
from posttrain.models.published_weights import published_weights, write_published
from posttrain.models.saving import restore_attention
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.models.vocabulary import textless_ids
from posttrain.sampling import sampler_server
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.open_workers import WorkerSource, check_backend
from posttrain.sampling.protocol import Request
from posttrain.sampling.stop_strings import before_stop
from posttrain.sampling.weight_folder import WeightFolder
from posttrain.sampling.worker_sampler import WorkerSampler
from tests.sampling.test_engine import prompts, spread
from tests.warm import CONTEXT

PYTHON = os.environ.get("POSTTRAIN_VLLM_PYTHON", "")
ROWS, TOKENS = 270, 259
"""Of the embedding, and of the tokenizer: 11 ids are no token's."""
TOKENIZER = tiny_tokenizer()
PARAMS = SamplingConfig(temperature=1.3, max_tokens=16, min_tokens=3)
REQUESTS = [Request(p, n=16, seed=i, example={"row": i}) for i, p in enumerate(prompts(8))]
METRICS = Path("stages") / "0-rl" / "metrics.jsonl"
needs_vllm = pytest.mark.skipif(not PYTHON, reason="POSTTRAIN_VLLM_PYTHON names no Python that has vLLM")


def model() -> torch.nn.Module:
    """A model with heads of a size that vLLM's attention has on a CPU."""
    return spread(tiny_model("llama", ROWS, head_dim=32, tie_word_embeddings=True)).eval()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def policy() -> LanguageModel:
    return LanguageModel(model())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Start a sampler server as a user does: its address, and its process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(sampler_server.TOKEN, "a secret of the test")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        process = subprocess.Popen([PYTHON, sampler_server.__file__, address], cwd=tmp_path_factory.mktemp("server"))
        yield address, process.pid
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def sampler(
    policy: LanguageModel, server: tuple[str, int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WorkerSampler]:
    """vLLM behind an address; `test_grpo_in_the_laboratory_killed_and_resumed` starts it as a run does."""
    folder = tmp_path_factory.mktemp("vllm")
    write_published(policy, TOKENIZER, folder / "model", untied=True)
    weights = WeightFolder()
    config = RolloutSamplerConfig(backend="vllm", address=server[0], cache_mb=256)
    opened = WorkerSampler(WorkerSource(config, policy, TOKENIZER, folder / "model", folder, weights).open)
    yield opened
    opened.close()
    weights.close()


@torch.no_grad()
def check_distribution(
    groups: list[RolloutGroup], reference: Any, params: SamplingConfig, tokenizer: Any, within: float = 1e-3
) -> None:
    """Log-probabilities are the model's, and what was drawn looks drawn from it (as in benchmarks/sampling.py)."""
    surprise, expected, variance = 0.0, 0.0, 0.0
    for group in groups:
        for r in group.rollouts:
            rows = torch.tensor([[*group.prompt, *r.tokens]])
            z = reference(rows, use_cache=False).logits[0, len(group.prompt) - 1 : -1] / params.temperature
            z[:, textless_ids(tokenizer, z.shape[-1])] = -torch.inf
            z[: params.min_tokens, tokenizer.eos_token_id] = -torch.inf
            logs = z.log_softmax(-1)
            own = logs.gather(1, torch.tensor(r.tokens)[:, None])[:, 0]
            assert torch.tensor(r.logprobs).sub(own).abs().max() < within
            p, finite = logs.exp().double(), logs.double().masked_fill(logs == -torch.inf, 0.0)
            mean = (p * finite).sum(-1)
            surprise += float(own.double().sum())
            expected += float(mean.sum())
            variance += float(((p * finite.square()).sum(-1) - mean.square()).sum())
    assert abs(surprise - expected) < 4.5 * math.sqrt(variance)


def same_model(policy: LanguageModel) -> torch.nn.Module:
    """Return a model with the policy's weights that nothing of posttrain computes."""
    reference = model()
    reference.load_state_dict(published_weights(policy, every=True, stored=True))
    return reference


def tokens_of(groups: list[RolloutGroup]) -> list[list[tuple[int, ...]]]:
    return [[tuple(r.tokens) for r in g.rollouts] for g in groups]


@needs_vllm
@pytest.mark.long
def test_completions_are_the_model_s_own(sampler: WorkerSampler, policy: LanguageModel) -> None:
    assert sampler.context == LocalSampler(policy, TOKENIZER).context
    drawn = sampler.sample(REQUESTS, PARAMS)
    check_distribution(drawn, same_model(policy), PARAMS, TOKENIZER)
    assert len({r for g in tokens_of(drawn) for r in g}) > 0.9 * 8 * 16
    assert max(t for g in tokens_of(drawn) for r in g for t in r) < TOKENS
    again = sampler.sample([REQUESTS[5]], PARAMS)  # a completion depends on its seed alone
    assert tokens_of(again)[0] == tokens_of(drawn)[5] and again[0].example == {"row": 5}
    greedy = PARAMS.model_copy(update={"temperature": 0.0})
    asked = [Request(r.tokens, max_tokens=9) for r in REQUESTS]
    here, there = LocalSampler(policy, TOKENIZER).sample(asked, greedy), sampler.sample(asked, greedy)
    assert tokens_of(there) == tokens_of(here)
    for a, b in zip(here, there, strict=True):
        assert (a.rollouts[0].finish, a.rollouts[0].text) == (b.rollouts[0].finish, b.rollouts[0].text)


@needs_vllm
@pytest.mark.long
def test_stop_rules_are_ours(sampler: WorkerSampler) -> None:
    """Every completion ends where the first end counts: not before it, and not after it."""
    stops, stop_token = ["e", "7", "xy"], 100
    params = PARAMS.model_copy(update={"stop": stops, "stop_tokens": [stop_token]})
    found = [r for g in sampler.sample(REQUESTS, params) for r in g.rollouts]

    def decode(tokens: object, plain: bool) -> str:
        return str(TOKENIZER.decode(list(tokens), skip_special_tokens=plain))  # type: ignore[call-overload]

    def ending(tokens: tuple[int, ...]) -> str:
        if tokens[-1] == TOKENIZER.eos_token_id:
            return "end"
        text = before_stop(tokens, stops, decode) if len(tokens) >= params.min_tokens else None
        return "stop" if text is not None or tokens[-1] == stop_token else ""

    for r in found:
        tokens = tuple(r.tokens)
        assert [ending(tokens[:n]) for n in range(1, len(tokens))] == [""] * (len(tokens) - 1)
        assert r.finish == (ending(tokens) or "length")
    ended_by_string = [r for r in found if r.finish == "stop" and r.tokens[-1] != stop_token]
    assert ended_by_string and all(r.text == before_stop(r.tokens, stops, decode) for r in ended_by_string)


@needs_vllm
@pytest.mark.long
def test_weights_are_replaced_and_so_is_a_killed_worker(
    sampler: WorkerSampler, server: tuple[str, int], policy: LanguageModel
) -> None:
    """All kinds of weights change, norms and embeddings that are one included."""
    before = sampler.sample(REQUESTS[:2], PARAMS)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1 + 0.2 * torch.randn(p.shape, generator=noise))
    sampler.update(7, published_weights(policy, every=True, stored=True))
    after = sampler.sample(REQUESTS, PARAMS)
    check_distribution(after, same_model(policy), PARAMS, TOKENIZER)
    assert tokens_of(after)[:2] != tokens_of(before)
    assert {p.step for g in after for r in g.rollouts for p in r.pieces} == {7}
    worker = sampler.workers[0]
    (child,) = Path(f"/proc/{server[1]}/task/{server[1]}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    again = sampler.sample(REQUESTS, PARAMS)
    assert sampler.workers[0] is not worker and tokens_of(again) == tokens_of(after)


def set_factors(policy: LanguageModel, seed: int) -> None:
    """Give both factors of every layer values that differ from 0."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.copy_(0.1 * torch.randn(p.shape, generator=noise))


@needs_vllm
@pytest.mark.long
@pytest.mark.parametrize("separate", [False, True])
def test_adapters_are_pushed(separate: bool, tmp_path: Path) -> None:
    """Merged into the weights, or alone: vLLM computes what peft does with the factors, from the first version on."""
    hf = attach(model(), AdapterConfig(kind="rslora", r=4), 0, "CAUSAL_LM")
    policy, folder = LanguageModel(hf), WeightFolder()
    set_factors(policy, 0)
    write_published(policy, TOKENIZER, tmp_path / "model", untied=True, separate=separate)
    config = RolloutSamplerConfig(backend="vllm", python=PYTHON, cache_mb=256, separate_adapter=separate)
    sampler = WorkerSampler(WorkerSource(config, policy, TOKENIZER, tmp_path / "model", tmp_path, folder).open)
    weights = weights_of(config)(policy)
    assert all("lora_" in name for name in weights) == separate
    drawn = [sampler.sample(REQUESTS, PARAMS)]
    check_distribution(drawn[0], same_model(policy), PARAMS, TOKENIZER, within=1e-4)
    for version in (3, 4):
        set_factors(policy, version)
        sampler.update(version, weights_of(config)(policy))
        drawn.append(sampler.sample(REQUESTS, PARAMS))
        check_distribution(drawn[-1], same_model(policy), PARAMS, TOKENIZER, within=1e-4)
        assert tokens_of(drawn[-1])[:2] != tokens_of(drawn[-2])[:2]
    restore_attention(hf)
    check_distribution(drawn[-1], hf, PARAMS, TOKENIZER, within=1e-4)
    sampler.close()
    folder.close()


def _run(folder: Path, *changes: str) -> list[dict[str, Any]]:
    """Train for four steps in the laboratory and return the metrics."""
    torch.set_num_threads(1)
    changes = (
        "model.source=lab:", "stages.rl.steps=4", "stages.rl.checkpoint_every=1", "stages.rl.held_out.every=4",
        "stages.rl.held_out.problems.size=64", *changes,
    )  # fmt: skip
    return read_lines(posttrain.run(posttrain.load_recipe("lab", list(changes)), folder).folder / METRICS)


@needs_vllm
@pytest.mark.long
@pytest.mark.timeout(1500)
def test_grpo_in_the_laboratory_killed_and_resumed(tmp_path: Path) -> None:
    """With vLLM it begins as with a worker of our own; killed after two steps, it makes the same steps again."""
    vllm = (
        "stages.rl.sampler.backend=vllm", f"stages.rl.sampler.python={PYTHON}", "stages.rl.sampler.cache_mb=256",
        "stages.rl.importance_sampling_cap=2", "stages.rl.max_mismatch_kl=1e-5",
    )  # fmt: skip
    ours = _run(tmp_path / "ours", "stages.rl.sampler.workers=1")
    whole = _run(tmp_path / "whole", *vllm)
    assert whole[0]["held_out"] == pytest.approx(ours[0]["held_out"], abs=0.02)  # greedy, before the first step
    p = (whole[1]["reward"] + ours[1]["reward"]) / 2
    assert abs(whole[1]["reward"] - ours[1]["reward"]) < 4.5 * math.sqrt(p * (1 - p) * 2 / 16)  # of 16 prompts each
    assert all(0 < m["mismatch"] < 1e-4 for m in whole if "mismatch" in m) and "mismatch" in whole[1]
    process = CONTEXT.Process(target=_run, args=(tmp_path / "broken", *vllm))
    process.start()
    metrics = tmp_path / "broken" / METRICS
    while process.is_alive() and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.2)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    resumed = _run(tmp_path / "broken", *vllm)
    assert [m["step"] for m in resumed] == [m["step"] for m in whole] == [0, 1, 2, 3, 4]
    for a, b in zip(resumed, whole, strict=True):
        for name in ("reward", "held_out"):
            assert a.get(name) == pytest.approx(b.get(name), abs=0.02)
    assert not (tmp_path / "whole" / METRICS).with_name("sampler-model").exists()


def test_a_python_without_vllm_is_refused_before_anything_trains() -> None:
    """In a second, of this environment; what to install is said."""
    for python, said in ((None, "has no package vllm"), ("no/such/python", "there is no such program")):
        with pytest.raises(MissingExtraError, match=f"{said}.*pip install vllm"):
            check_backend(RolloutSamplerConfig(backend="vllm", python=python))
