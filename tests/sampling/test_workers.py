"""Sampler workers in processes: the same completions as in this process, versions of weights, and losses."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from posttrain.config import AdapterConfig, SamplingConfig
from posttrain.config.rollout_sampler import RolloutSamplerConfig
from posttrain.core.errors import DataError, ModelError
from posttrain.core.types import RolloutGroup
from posttrain.models.adapters import attach, merge
from posttrain.models.language_model import LanguageModel
from posttrain.models.published_weights import (
    adapter_settings,
    check_publishable,
    published_adapter,
    published_weights,
    write_published,
)
from posttrain.models.saving import restore_attention
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.sampling import remote_worker, sampler_server
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.local_worker import serve_local
from posttrain.sampling.open_workers import WorkerSource
from posttrain.sampling.process_worker import ChildProgram, StartChild
from posttrain.sampling.protocol import Request
from posttrain.sampling.weight_folder import PREFIX, WeightFolder
from posttrain.sampling.worker_protocol import WorkerError, WorkerLost
from posttrain.sampling.worker_sampler import WorkerSampler, split_by_work
from posttrain.sampling.worker_wire import Wire
from tests.sampling.test_engine import prompts, spread
from tests.warm import CONTEXT

TOKENIZER = tiny_tokenizer()
PARAMS = SamplingConfig(max_tokens=12, stop=["~", "!"], min_tokens=2)
REQUESTS = [Request(p, n=3, seed=i, example={"row": i}) for i, p in enumerate(prompts(5))]


class WarmChild:
    """A process of the fork server. See `posttrain.sampling.process_worker.Child`."""

    def __init__(self, connection: socket.socket) -> None:
        self.process, self.lock = CONTEXT.Process(target=_serve, args=(connection,)), threading.Lock()
        self.process.start()

    def wait(self) -> int:
        with self.lock:
            self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()


def _serve(connection: socket.socket) -> None:
    torch.set_num_threads(1)
    serve_local(Wire(connection))


class WarmSource(WorkerSource):
    @property
    def launch(self) -> StartChild:
        return lambda connection, log: WarmChild(connection)


@pytest.fixture(scope="module")
def policy() -> LanguageModel:
    return LanguageModel(spread(tiny_model("llama", tie_word_embeddings=True)))


@pytest.fixture(scope="module")
def source(policy: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerSource]:
    folder = tmp_path_factory.mktemp("workers")
    write_published(policy, TOKENIZER, folder / "model")
    weights = WeightFolder(folder)
    yield WarmSource(RolloutSamplerConfig(workers=2), policy, TOKENIZER, folder / "model", folder, weights)
    weights.close()
    assert not list(folder.glob(f"{PREFIX}*"))


@pytest.fixture(scope="module")
def two(source: WorkerSource) -> Iterator[WorkerSampler]:
    sampler = WorkerSampler(source.open, 2)
    yield sampler
    sampler.close()


def same(found: list[RolloutGroup], expected: list[RolloutGroup]) -> None:
    assert [(g.prompt, g.example) for g in found] == [(g.prompt, g.example) for g in expected]
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a.rollouts, b.rollouts, strict=True):
            assert (tuple(x.tokens), x.finish, x.text) == (tuple(y.tokens), y.finish, y.text)
            assert x.logprobs == pytest.approx(y.logprobs, abs=1e-5)


def test_workers_sample_what_this_process_samples(two: WorkerSampler, policy: LanguageModel) -> None:
    """Spread over two, each with another batch; text and stop strings included."""
    here = LocalSampler(policy, TOKENIZER)
    assert two.context == here.context
    seen: list[tuple[int, int]] = []
    found = two.sample(REQUESTS, PARAMS, lambda i, j, rollout: seen.append((i, j)))
    expected = here.sample(REQUESTS, PARAMS)
    same(found, expected)
    assert {r.finish for g in expected for r in g.rollouts} >= {"stop", "length"}
    assert sorted(seen) == [(i, j) for i in range(5) for j in range(3)]
    assert {p.step for g in found for r in g.rollouts for p in r.pieces} == {0}
    assert two.sample([], PARAMS) == []


def test_a_killed_worker_is_replaced_and_its_requests_are_asked_again(
    two: WorkerSampler, policy: LanguageModel
) -> None:
    """Give the new worker the newest weights too; what is submitted is answered in order."""
    with torch.no_grad():
        policy.base.get_output_embeddings().weight.mul_(1.5)
    two.update(4, published_weights(policy))
    with torch.no_grad():
        expected = LocalSampler(policy, TOKENIZER).sample(REQUESTS, PARAMS)
        policy.base.get_output_embeddings().weight.div_(1.5)  # what the workers have does not change with it
    worker = two.workers[1]
    long: Future[list[RolloutGroup]] = worker.submit(REQUESTS * 40, PARAMS.model_copy(update={"max_tokens": 400}))
    os.kill(worker.child.process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    with pytest.raises(WorkerLost, match="signal 9"):
        long.result(60)
    found = two.sample(REQUESTS, PARAMS)
    same(found, expected)
    assert two.workers[1] is not worker and two.workers[1].version == 4
    assert {p.step for g in found for r in g.rollouts for p in r.pieces} == {4}
    before, after = two.workers[0].submit(REQUESTS, PARAMS), REQUESTS[:1]
    two.update(5, published_weights(policy))  # waits for what was submitted before it
    same(before.result(60), expected)
    same(two.sample(after, PARAMS), LocalSampler(policy, TOKENIZER).sample(after, PARAMS))


def test_a_worker_behind_an_address(
    source: WorkerSource, policy: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model and weights go through the connection; a worker that is lost is opened again; the token is needed."""
    monkeypatch.setenv(sampler_server.TOKEN, "a secret of the test")
    started: list[WarmChild] = []

    def start(connection: socket.socket, log: Path) -> WarmChild:
        log.write_text("printed by the worker")
        started.append(WarmChild(connection))
        return started[-1]

    listener = socket.create_server(("127.0.0.1", 0))
    secret = sampler_server.token()
    server = threading.Thread(target=sampler_server.serve, args=(listener, secret, "local", start, tmp_path))
    server.start()
    config = RolloutSamplerConfig(address=f"127.0.0.1:{listener.getsockname()[1]}")
    far = WorkerSource(config, policy, TOKENIZER, source.model, tmp_path, source.weights)
    sampler = WorkerSampler(far.open, far.count)
    here = LocalSampler(policy, TOKENIZER)
    same(sampler.sample(REQUESTS, PARAMS), here.sample(REQUESTS, PARAMS))
    with torch.no_grad():
        policy.base.get_output_embeddings().weight.mul_(1.5)
    sampler.update(7, published_weights(policy))
    expected = here.sample(REQUESTS, PARAMS)
    same(sampler.sample(REQUESTS, PARAMS), expected)
    started[0].kill()
    same(sampler.sample(REQUESTS, PARAMS), expected)
    assert len(started) == 2 and "printed by the worker" in (tmp_path / "sampler-1.log").read_text()
    sampler.close()
    with torch.no_grad():
        policy.base.get_output_embeddings().weight.div_(1.5)
    for name, value, said in (
        (sampler_server.TOKEN, "another secret of the test", "has another token"),
        (sampler_server.TOKEN, "short", "at least 16 characters"),
    ):
        monkeypatch.setenv(name, value)
        with pytest.raises(WorkerError, match=said):
            far.open(0)
    monkeypatch.setenv(sampler_server.TOKEN, secret)
    with pytest.raises(WorkerError, match="runs local: start it with --engine vllm"):
        remote_worker.connect(config.addresses[0], "vllm")
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    server.join()
    monkeypatch.setattr(remote_worker, "CONNECT_SECONDS", 0)
    with pytest.raises(WorkerError, match="there is no sampler server at 127.0.0.1"):
        far.open(0)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_what_a_worker_refuses_is_raised_and_it_lives_on(two: WorkerSampler) -> None:
    with pytest.raises(DataError, match="prompt 0 has 5000 tokens"):
        two.sample([Request([5] * 5000)], PARAMS)
    with pytest.raises(DataError, match="prompt 0 has no tokens"):
        two.sample([Request([])], PARAMS)
    with pytest.raises(WorkerError, match="no weights named \\['unknown'\\]"):
        two.update(9, {"unknown": torch.zeros(1)})
    with pytest.raises(WorkerError, match="versions must rise"):
        two.workers[0].update(2, {})
    assert len(two.sample(REQUESTS[:1], PARAMS)) == 1


def test_a_worker_that_can_not_start_says_what_it_printed(source: WorkerSource) -> None:
    """Real programs: one that fails at once, and one that leaves a process behind which holds the connection."""
    orphan = ["sh", "-c", "sleep 60 & echo of the orphan; exit 3"]
    for command, printed in (
        (["python3", "-c", "1 / 0"], "ZeroDivision"),
        (orphan, "of the orphan"),
    ):

        class Source(WorkerSource):
            @property
            def launch(self, command: list[str] = command) -> StartChild:
                return lambda connection, log: ChildProgram(command, connection, log)

        broken = Source(*(getattr(source, f.name) for f in dataclasses.fields(source)))
        sampler = WorkerSampler(broken.open, tries=1)
        with pytest.raises(WorkerError, match=printed):
            sampler.sample(REQUESTS, PARAMS)
        sampler.close()


class Waiting:
    """A worker that answers nothing, until it is closed."""

    version = 0

    def __init__(self, starts: bool) -> None:
        self.starts, self.futures = starts, list[Future[Any]]()

    @property
    def context(self) -> int:
        if not self.starts:
            raise WorkerLost("lost as it started")
        return 9

    def submit(self, requests: Any, params: Any) -> Future[Any]:
        self.futures.append(Future())
        return self.futures[-1]

    def close(self) -> None:
        for future in self.futures:
            if not future.done():
                future.set_exception(WorkerLost("it was closed"))


def test_closing_ends_what_threads_wait_for_and_opens_nothing() -> None:
    """And a worker that is lost as it starts is replaced."""
    starts, opened = iter([False, True, True]), list[Waiting]()

    def open_worker(number: int) -> Any:
        opened.append(Waiting(next(starts)))
        return opened[-1]

    sampler = WorkerSampler(open_worker, 2)
    assert sampler.context == 9 and len(opened) == 3
    ended: list[BaseException] = []

    def sample() -> None:
        try:
            sampler.sample([Request([1], 1, 0)], PARAMS)
        except WorkerLost as error:
            ended.append(error)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    while not any(w.futures for w in opened):
        time.sleep(0.01)
    sampler.close()
    thread.join(10)
    assert "it was closed" in str(ended) and len(opened) == 3


def test_abandoned_weights_are_removed_and_those_in_use_stay(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}dead").mkdir()
    (tmp_path / f"{PREFIX}dead" / "lock").touch()
    first = WeightFolder(tmp_path)
    second = WeightFolder(tmp_path)
    assert {first.path, second.path} == set(tmp_path.glob(f"{PREFIX}*"))
    with first.version(1, {"w": torch.ones(2)}) as one, first.version(1, {}) as again:
        assert one == again and (one / "model.safetensors").is_file()
        with first.version(2, {"w": torch.ones(2)}):
            assert one.is_dir()  # a slower worker still reads it
    assert sorted(p.name for p in first.path.iterdir() if p.is_dir()) == ["2"]
    first.close()
    second.close()
    assert not list(tmp_path.iterdir())


def test_requests_are_split_by_their_work() -> None:
    params = SamplingConfig(max_tokens=10)
    requests = [Request([1], n=4), Request([1], n=1), Request([1], n=2, max_tokens=5), Request([1], n=3)]
    assert split_by_work(requests, params, 2) == [[0, 2], [1, 3]]  # work 41, 11, 11, 31
    assert split_by_work(requests[:1], params, 3) == [[0], [], []]


@pytest.mark.parametrize("kind", [None, "lora", "dora"])
def test_published_weights_are_those_of_the_merged_model(kind: str | None) -> None:
    """New tokens' rows too; the policy keeps its weights to the bit and its storages."""
    hf = tiny_model("llama")
    if kind is not None:
        hf = attach(hf, AdapterConfig(kind=kind, r=4), 0, "CAUSAL_LM", [5, 6])
    with torch.no_grad():
        for p in hf.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    policy = LanguageModel(hf)
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in hf.named_parameters()}
    every, trained = published_weights(policy, every=True), published_weights(policy)
    stored = published_weights(policy, every=True, stored=True)
    assert all(p.data_ptr() == before[n][0] and torch.equal(p, before[n][1]) for n, p in hf.named_parameters())
    restore_attention(hf)
    merged: dict[str, Any] = (merge(hf)[0] if kind else hf).state_dict()
    assert every.keys() == stored.keys() == merged.keys()
    assert all(torch.equal(w, merged[n]) for n, w in every.items())
    assert not any("norm" in n for n in trained) if kind else trained.keys() == every.keys()


@pytest.mark.parametrize("kind", [None, "lora", "rslora", "dora"])
def test_an_adapter_s_factors_are_sent_as_peft_s_files_have_them(kind: str | None, tmp_path: Path) -> None:
    """Opened by peft beside the weights that are written, they are the policy; what is more than factors is refused."""
    hf = tiny_model("llama")
    if kind is not None:
        hf = attach(hf, AdapterConfig(kind=kind, r=4), 0, "CAUSAL_LM")
    policy = LanguageModel(hf)
    if kind in (None, "dora"):
        with pytest.raises(ModelError, match="separate_adapter sends the factors of lora or rslora"):
            adapter_settings(policy)
        return
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    write_published(policy, TOKENIZER, tmp_path, untied=True, separate=True)
    adapter = tmp_path / "adapter"
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(adapter_settings(policy)))
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path), adapter)
    restore_attention(hf)
    rows = torch.arange(3, 23)[None]
    torch.testing.assert_close(opened(rows).logits, hf(rows).logits)
    names = {n.replace(".default.", ".") for n in get_peft_model_state_dict(hf)}
    assert published_adapter(policy).keys() == names
    with_tokens = attach(tiny_model("llama"), AdapterConfig(kind=kind, r=4), 0, "CAUSAL_LM", [5])
    with pytest.raises(ModelError, match="new tokens"):
        adapter_settings(LanguageModel(with_tokens))


def test_published_weights_of_experts_have_the_names_of_files() -> None:
    policy = LanguageModel(tiny_model("qwen3_moe"))
    stored = published_weights(policy, every=True, stored=True)
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in stored
    with pytest.raises(ModelError, match="a soft prompt is no change"):
        tuned = attach(tiny_model("llama"), AdapterConfig(kind="prompt", tokens=2), 0, "CAUSAL_LM", tokenizer=TOKENIZER)
        check_publishable(LanguageModel(tuned))
