"""A judge behind `transformers serve`, straight and through a proxy with faults: no label is lost, none is doubled."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import JudgeConfig, ModelConfig, SamplingConfig, ServerConfig
from posttrain.config.settings import SamplerConfig
from posttrain.core.errors import DataError, ModelError, ServerError
from posttrain.data.prompts import RenderedPrompt
from posttrain.judge.labels import Judge, JudgedPair
from posttrain.methods.data.critique_revision import CritiqueRevision, RefineConfig
from posttrain.methods.data.revision_chain import read_chains
from posttrain.sampling.openai_client import Server, _Limits, retry_after
from posttrain.sampling.openai_sampler import OpenAISampler
from posttrain.sampling.protocol import Request
from posttrain.trainer.stage import StageContext
from tests import warm
from tests.judge.serving import PAIRS, Fault, Proxy


@contextmanager
def proxied(server: str, fault: Fault = lambda n, q: "", delay: float = 0.0) -> Iterator[Proxy]:
    proxy = Proxy(server, fault, delay)
    try:
        yield proxy
    finally:
        proxy.close()


def config(url: str, model: Path, store: Path, **changes: Any) -> JudgeConfig:
    fast = {"backoff": 0.02, "timeout": 20.0, "concurrency": 4}
    behind = ServerConfig(model=str(model), base_url=url, **{**fast, **changes.pop("server", {})})
    return JudgeConfig(server=behind, store=str(store), answer_tokens=1, **changes)


def compare(settings: JudgeConfig) -> tuple[list[JudgedPair], dict[str, Any]]:
    with Judge.open(settings) as judge:
        return judge.compare(PAIRS), judge.asker.cost()


@pytest.fixture(scope="module")
def local(judge_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[bool]:
    """What the same model says when it is held here, by the likelihood of its labels: whether a, in both orders."""
    store = tmp_path_factory.mktemp("local") / "judge.sqlite3"
    with Judge.open(JudgeConfig(model=ModelConfig(source=str(judge_folder)), store=str(store))) as judge:
        judged = judge.compare(PAIRS)
    said = [x > 0.5 for j in judged for x in (j.orders or ())]
    assert 4 < sum(said) < 20  # both letters come up
    return said


def said(judged: list[JudgedPair]) -> list[bool]:
    assert all(j.orders is not None and set(j.orders) <= {0.0, 1.0} for j in judged)  # read from text: hard labels
    return [x == 1.0 for j in judged for x in (j.orders or ())]


def test_the_served_judge_says_what_the_same_model_says_here(
    server: str, judge_folder: Path, local: list[bool], tmp_path: Path
) -> None:
    """Two implementations, one model: text by transformers' server, likelihoods by ours. A second run asks nothing."""
    with proxied(server) as proxy:
        settings = config(proxy.url, judge_folder, tmp_path / "judge.sqlite3")
        judged, cost = compare(settings)
        assert said(judged) == local
        assert cost["questions"] == cost["requests"] == len(proxy.passed) == 24 and cost["retries"] == {}
        assert cost["new_completion_tokens"] == 24 and cost["new_prompt_tokens"] == cost["prompt_tokens"] > 24 * 50
        again, cost = compare(settings)
        assert again == judged and len(proxy.asked) == 24
        assert cost["from_store"] == 24 and cost["requests"] == cost["new_prompt_tokens"] == 0
        assert cost["completion_tokens"] == 24


FAULTS = ["429", "500", "drop", "drop after", "truncated", "wrong", "html", "no text", "503"]


def test_faults_lose_no_label_and_double_none(
    server: str, judge_folder: Path, local: list[bool], tmp_path: Path
) -> None:
    """Every third request meets a fault, each kind twice and more; one is slow beyond the time-out."""

    def fault(n: int, question: str) -> str:
        return "slow" if n == 4 else FAULTS[n // 3 % len(FAULTS)] if n % 3 == 1 else ""

    with proxied(server, fault) as proxy:
        settings = config(proxy.url, judge_folder, tmp_path / "judge.sqlite3", server={"timeout": 3.0})
        judged, cost = compare(settings)
        assert said(judged) == local
        with Judge.open(settings) as judge:
            assert len(judge.asker.store) == 24
        faults = sum(bool(fault(n, "")) for n in range(len(proxy.asked)))
        assert len(proxy.asked) == cost["requests"] == 24 + faults and faults >= 9
        assert sum(cost["retries"].values()) == faults
        assert {"429", "500", "503", "timed out", "connection", "broken answer"} == set(cost["retries"])
        # What never reached the server is not counted there; what was lost on its way back is asked once more.
        lost = {"drop after", "truncated", "wrong", "html", "no text", "slow"}
        assert len(proxy.passed) == 24 + sum(fault(n, "") in lost for n in range(len(proxy.asked)))
        assert set(proxy.passed) == set(proxy.asked) and len(set(proxy.asked)) == 24


def test_retry_after_is_kept_by_all(server: str, judge_folder: Path, tmp_path: Path) -> None:
    with proxied(server, lambda n, q: "429" if n == 0 else "") as proxy:
        compare(config(proxy.url, judge_folder, tmp_path / "judge.sqlite3", server={"concurrency": 1}))
        assert 0.3 <= proxy.times[1] - proxy.times[0] < 10
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:02:00 GMT"}, now=100.0) == 20.0
    assert retry_after({"retry-after": "soon"}) is None and retry_after({}) is None


def test_requests_are_spread_out(
    server: str, judge_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,200 requests a minute: 50 ms apart at least, however many may be under way.

    Told by when each may go: the first of them arrives late, when its connection is there, and so nearer to the others.
    """
    times, wait = list[float](), _Limits.wait

    async def watched(self: _Limits, body: Mapping[str, Any]) -> int:
        counted = await wait(self, body)
        times.append(time.monotonic())
        return counted

    monkeypatch.setattr(_Limits, "wait", watched)
    with proxied(server) as proxy:
        limits = {"requests_per_minute": 1200, "concurrency": 8}
        compare(config(proxy.url, judge_folder, tmp_path / "judge.sqlite3", server=limits))
        assert len(times) == len(proxy.times) == 24
        assert max(times) - min(times) >= 23 * 0.05 - 0.05
        times.clear()
        limits = {"tokens_per_minute": 60 * 2000, "concurrency": 8}  # 2,000 a second
        _, cost = compare(config(proxy.url, judge_folder, tmp_path / "other.sqlite3", server=limits))
        spent = cost["prompt_tokens"] + cost["completion_tokens"]
        assert len(times) == 24 and max(times) - min(times) >= 0.7 * spent / 2000


def test_limits_go_on_from_call_to_call(server: str, judge_folder: Path, tmp_path: Path) -> None:
    """300 a minute: one every 200 ms, though each is a call of its own."""
    with proxied(server) as proxy:
        behind = config(proxy.url, judge_folder, tmp_path / "s.sqlite3", server={"requests_per_minute": 300}).server
        assert behind is not None
        asked = Server(behind)
        began = time.monotonic()
        for i in range(4):
            asked.ask([{"messages": [{"role": "user", "content": str(i)}], "max_tokens": 1}], lambda n, reply: None)
        assert time.monotonic() - began >= 0.6 and len(proxy.passed) == 4


def test_no_more_are_under_way_than_asked_for_and_waits_double(
    server: str, judge_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th retry waits backoff 2^n seconds, times a random 0.5 to 1, so that many who failed at once come apart."""
    with proxied(server, delay=0.1) as proxy:
        compare(config(proxy.url, judge_folder, tmp_path / "a.sqlite3", server={"concurrency": 3}))
        assert proxy.most == 3
    waits: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr("posttrain.sampling.openai_client.asyncio.sleep", noted)
    with proxied(server, lambda n, q: "500" if n < 6 else "") as proxy:
        compare(config(proxy.url, judge_folder, tmp_path / "b.sqlite3", server={"concurrency": 1, "backoff": 0.5}))
    assert len(waits) == 6 and all(0.25 * 2**n <= w <= 0.5 * 2**n for n, w in enumerate(waits))
    assert len({w / 2**n for n, w in enumerate(waits)}) == 6


def test_a_server_that_keeps_failing_ends_the_run_and_what_it_said_stays(
    server: str, judge_folder: Path, local: list[bool], tmp_path: Path
) -> None:
    store = tmp_path / "judge.sqlite3"
    with proxied(server, lambda n, q: "500" if n >= 10 else "") as proxy:
        settings = config(proxy.url, judge_folder, store, server={"retries": 2})
        with pytest.raises(ServerError, match=r"failed 3 times in a row.*500: no.*run again to resume"):
            compare(settings)
        assert len(proxy.passed) == 10
        proxy.fault = lambda n, q: ""
        judged, cost = compare(settings)
        assert said(judged) == local and cost["from_store"] == 10 and cost["requests"] == 14
        assert Counter(proxy.passed) == Counter(set(proxy.passed))
        proxy.fault = lambda n, q: "401"
        with pytest.raises(ServerError, match="401: no .*is the key right"):
            compare(settings.model_copy(update={"question": "Which?"}))


def test_what_can_not_be_read_at_first_is_asked_again_and_a_rationale_comes_first(
    server: str, judge_folder: Path, tmp_path: Path
) -> None:
    """The first reply to each question names no label: its second does, and is drawn at temperature 1, from a seed."""
    bodies: list[dict[str, Any]] = []
    with proxied(server) as proxy:
        passed = proxy.send

        def unread(h: Any, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            if len(bodies) <= 24:
                body = body.replace(b'"content":"A"', b'"content":"so"').replace(b'"content":"B"', b'"content":"so"')
            passed(h, status, body, headers)

        proxy.send = unread  # type: ignore[method-assign]
        proxy.seen = bodies.append  # type: ignore[method-assign]
        judged, cost = compare(config(proxy.url, judge_folder, tmp_path / "a.sqlite3", server={"concurrency": 1}))
    assert len(bodies) == 48 and all(j.p_a is not None for j in judged) and cost["questions"] == 48
    assert [b["temperature"] for b in bodies] == [0.0] * 24 + [1.0] * 24
    assert not any("seed" in b for b in bodies[:24]) and all(b["seed"] == 1 for b in bodies[24:])
    bodies.clear()
    with proxied(server) as proxy:
        proxy.seen = bodies.append  # type: ignore[method-assign]
        judged, _ = compare(config(proxy.url, judge_folder, tmp_path / "b.sqlite3", rationale=3))
    first, then = ([b for b in bodies if len(b["messages"]) == n] for n in (1, 3))
    assert len(first) == len(then) == 24 and {b["max_tokens"] for b in first} == {3}
    said = {b["messages"][0]["content"]: b["messages"][1]["content"] for b in then}
    assert set(said) == {b["messages"][0]["content"] for b in first}
    assert all(r in said.values() for j in judged for r in j.rationales) and any(j.rationales for j in judged)


def test_what_the_server_refuses_or_nobody_can_read_is_left_out_and_counted(
    server: str, judge_folder: Path, tmp_path: Path
) -> None:
    """A refusal concerns its own question. A and B are not what was asked for: each question is asked three times."""
    with proxied(server, lambda n, q: "400" if "near 3." in q else "") as proxy:
        settings = config(proxy.url, judge_folder, tmp_path / "judge.sqlite3")
        for total in (24, 26):  # a refusal may be lifted, so it is asked for again
            judged, _ = compare(settings)
            assert [j.p_a is None for j in judged] == [i == 3 for i in range(12)]
            assert judged[3].why == "refused: 400: no" and len(proxy.asked) == total
    with proxied(server) as proxy:
        settings = config(proxy.url, judge_folder, tmp_path / "judge.sqlite3", labels=("C", "D"))
        for total in (72, 72):  # the second time all of it comes from the store
            judged, cost = compare(settings)
            assert all(j.p_a is None and "no verdict in 3 answers" in j.why for j in judged)
            assert len(proxy.asked) == total and cost["questions"] == 72


def ask(url: str, model: Path, store: Path) -> None:
    compare(config(url, model, store, server={"concurrency": 3}))


@pytest.mark.slow
def test_a_run_killed_in_the_middle_goes_on(server: str, judge_folder: Path, local: list[bool], tmp_path: Path) -> None:
    """SIGKILL once nine requests are under way or done: what was answered is not asked again."""
    store = tmp_path / "judge.sqlite3"
    with proxied(server, delay=0.15) as proxy:
        process = warm.CONTEXT.Process(target=ask, args=(proxy.url, judge_folder, store))
        process.start()
        while len(proxy.passed) < 9:
            assert process.is_alive()
            time.sleep(0.01)
        process.kill()
        process.join()
        time.sleep(0.5)
        before = len(proxy.passed)
        proxy.delay = 0.0
        judged, cost = compare(config(proxy.url, judge_folder, store, server={"concurrency": 3}))
        assert said(judged) == local
        kept = cost["from_store"]
        assert 24 - cost["requests"] == kept >= before - 3 > 0  # at most those under way were asked for nothing
        assert max(Counter(proxy.passed).values()) <= 2 and len(proxy.passed) == before + 24 - kept


def test_the_sampler_behind_a_server(server: str, judge_folder: Path) -> None:
    """n completions of a prompt are n requests; a refusal is a rollout with its reason; on_done hears of each."""
    with proxied(server, lambda n, q: "400" if q == "refuse" else "500" if n == 0 else "") as proxy:
        behind = ServerConfig(model=str(judge_folder), base_url=proxy.url, backoff=0.02, concurrency=1)
        sampler, heard = OpenAISampler(behind), []
        requests = [
            Request([1, 2], 3, 7, {"messages": [{"role": "user", "content": "one"}]}),
            Request([3], 1, 0, {"prompt": "refuse"}),
        ]
        groups = sampler.sample(requests, SamplingConfig(max_tokens=1), lambda i, j, r: heard.append((i, j)))
        assert [r.text for r in groups[0].rollouts] in ([["A"] * 3, ["B"] * 3])
        assert {r.finish for r in groups[0].rollouts} == {"length"} and list(groups[0].prompt) == [1, 2]
        assert (groups[1].rollouts[0].finish, groups[1].rollouts[0].text) == ("error", "400: no")
        assert sorted(heard) == [(0, 0), (0, 1), (0, 2), (1, 0)] and proxy.asked == ["one"] * 4 + ["refuse"]
        with pytest.raises(ModelError, match=r"sampler.top_k is not in OpenAI's protocol"):
            sampler.sample(requests, SamplingConfig(top_k=5))
        with pytest.raises(ModelError, match=r"sampler.kv_cache is not in OpenAI's protocol"):
            sampler.sample(requests, SamplerConfig(kv_cache="int8"))


def test_a_server_writes_answers_and_critiques(server: str, judge_folder: Path, tmp_path: Path) -> None:
    """This one never ends a text, so that all are cut; one request an answer and a critique, turns in their order."""
    with proxied(server, lambda n, q: "400" if q == "refuse" else "") as proxy:
        behind = {"model": str(judge_folder), "base_url": proxy.url, "backoff": 0.02}
        settings = {
            "problems": {"kind": "lab"},
            "server": behind,
            "revisions": 1,
            "critique": "Well?",
            "revision": "Again.",
        }
        config = RefineConfig.model_validate({**settings, "sampler": {"max_tokens": 2}, "critique_tokens": 3})
        asked = [RenderedPrompt([1], q, {"messages": [{"role": "user", "content": q}]}) for q in ("one", "refuse")]
        stage = CritiqueRevision(config, StageContext(None, None))
        stage.prompts, stage.principles, stage.examples = asked, [], []
        with pytest.raises(DataError, match="made no row of 2 chains"):
            stage.run(ModelConfig(source="tiny:llama"), tmp_path, 0)
        one, refused = read_chains(tmp_path / "chains")
        assert set(one.initial.text) <= {"A", "B"} and (len(one.initial.text), one.initial.finish) == (2, "length")
        assert one.rounds[0].critique is not None and len(one.rounds[0].critique.text) == 3
        assert one.rounds[0].why == "critique: cut at the longest length"
        assert (refused.initial.finish, refused.initial.text, refused.rounds) == ("error", "400: no", [])
        assert sorted(proxy.asked) == ["Well?", "one", "refuse"]


def test_a_key_is_taken_from_the_variable_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "mine")
    with pytest.raises(ServerError, match="JUDGE_KEY holds no key"):
        OpenAISampler(ServerConfig(model="m", api_key_env="JUDGE_KEY"))
    # Somebody else's server does not get OpenAI's key.
    assert OpenAISampler(ServerConfig(model="m", base_url="http://127.0.0.1:9/v1")).server.key == "none"
    assert OpenAISampler(ServerConfig(model="m")).server.key == "mine"
    assert json.dumps(ServerConfig(model="m").model_dump()).count("mine") == 0
