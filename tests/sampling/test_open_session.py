"""Requests that join a batch that runs, against the sampler that gets each alone."""

from __future__ import annotations

import pytest
import torch

from posttrain.config import SamplingConfig
from posttrain.core.errors import DataError
from posttrain.models.tiny_model import tiny_model
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.open_session import JoiningPrompt, OpenSession
from posttrain.sampling.protocol import Request
from tests.sampling.test_engine import prompts, sampler, spread

WAYS = [
    SamplingConfig(max_tokens=9),
    SamplingConfig(temperature=0, max_tokens=14),
    SamplingConfig(temperature=1.6, top_k=40, max_tokens=5),
    SamplingConfig(temperature=0.8, top_p=0.7, max_tokens=30),
    SamplingConfig(min_p=0.3, max_tokens=12, stop=["e", "\x01"]),
]


def joining(s: LocalSampler, i: int, tokens: list[int], n: int, **more: object) -> JoiningPrompt:
    request, params = Request(tokens, n, seed=i), WAYS[i % len(WAYS)]
    return JoiningPrompt(i, request, s.limit(i, request, params), params=params, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("static", [False, True])
def test_who_joins_when_changes_nothing(static: bool) -> None:
    """Ten requests of one to three completions, drawn in five ways, join at each other turn where 7 run at most and 40
    KiB hold a few: each gets the tokens that it gets alone, as they are drawn, and memory holds. One that is cancelled
    gives back its slots."""
    s = sampler(static_shapes=static, max_running=7, memory_mb=0.04)
    asked = prompts(10, high=20)
    alone = [s.sample([Request(p, 1 + i % 3, seed=i)], WAYS[i % len(WAYS)])[0].rollouts for i, p in enumerate(asked)]
    with torch.inference_mode():
        session = OpenSession(s)
        told: dict[tuple[int, int], list[int]] = {}
        given = []
        for i, p in enumerate(asked):
            prompt = joining(s, i, p, 1 + i % 3, top_logprobs=3 if i % 4 == 0 else None)
            prompt.on_token = lambda j, token, i=i: told.setdefault((i, j), []).append(token)
            given.append(prompt)
        cancelled = joining(s, 3, asked[3], 2)
        left, most = [*given[:7], cancelled, *given[7:]], 0
        while left or session.busy:
            session.waiting += left[:1]
            del left[:1]
            session.turn()
            assert session.own.bytes() <= 0.04 * 2**20 and len(session.rows) <= 7
            most = max(most, len(session.rows))
            cancelled.cancelled |= any(r.prompt is cancelled for r in session.rows)
    assert most > 3 and cancelled.cancelled and not cancelled.done
    reference = spread(tiny_model("llama")).eval()
    for i, (prompt, expected) in enumerate(zip(given, alone, strict=True)):
        found = [prompt.done[j] for j in range(len(expected))]
        assert [(r.tokens, r.finish, r.text) for r in found] == [(r.tokens, r.finish, r.text) for r in expected]
        assert [told.get((i, j), []) for j in range(len(found))] == [list(r.tokens[:-1]) for r in found]
        for j, rollout in enumerate(found) if i % 4 == 0 else ():
            ids = torch.tensor([[*asked[i], *rollout.tokens]])
            own = reference(ids).logits[0, len(asked[i]) - 1 : -1].log_softmax(-1)
            top = own.topk(3)
            for at, (tops, token) in enumerate(zip(prompt.tops[j], rollout.tokens, strict=True)):
                assert tops.logprob == pytest.approx(own[at, token].item(), abs=1e-4)
                assert [t for t, _ in tops.top] == top.indices[at].tolist()
                assert [v for _, v in tops.top] == pytest.approx(top.values[at].tolist(), abs=1e-4)


@torch.inference_mode()
def test_requests_enter_together_or_after_four_turns() -> None:
    """With 16 completions running one that comes waits for another, and four turns at most."""
    with torch.no_grad(), torch.inference_mode(False):
        session = OpenSession(sampler())
    session.waiting += [JoiningPrompt(9, Request([5, 6], 16, seed=4), 40)]
    session.turn()
    later, entered = list[JoiningPrompt](), []
    for coming in (1, 0, 0, 0, 0, 3, 0):
        arrived = [JoiningPrompt(i, Request([5, 7 + i], 1), 40) for i in range(coming)]
        session.waiting += arrived
        later += arrived
        session.turn()
        assert len(session.rows) > 8
        entered.append(sum(p.started for p in later))
    assert entered == [0, 0, 0, 0, 1, 4, 4]


def test_what_could_never_run_is_refused() -> None:
    s = sampler(max_running=2, memory_mb=0.02)
    with torch.inference_mode():
        session = OpenSession(s)
    with pytest.raises(DataError, match="3 completions are asked for, and at most 2 run together"):
        session.check(joining(s, 0, [5, 6], 3))
    request = Request([7] * 10, 1)
    with pytest.raises(DataError, match="do not fit into the memory .*: lower max_tokens"):
        session.check(JoiningPrompt(0, request, 400))
    session.check(joining(s, 0, [5, 6], 2))
