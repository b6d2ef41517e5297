"""The sampler on this device: CUDA graphs against plain steps, and what it says of its tokens against the learner."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpu.base import DRY, SMALL, Account, Where, build, byte_tokenizer
from posttrain.config import SamplingConfig
from posttrain.core.types import Rollout, Sample
from posttrain.models.language_model import LanguageModel
from posttrain.sampling import engine
from posttrain.sampling.cuda_graphs import StaticSteps
from posttrain.sampling.engine import LocalSampler, Session
from posttrain.sampling.protocol import Request


@dataclass
class Graphs:
    """What became of shapes while graphs were watched."""

    recorded: int = 0
    replayed: int = 0
    refused: list[str] = field(default_factory=list)


@contextmanager
def watched(record: bool = True) -> Iterator[Graphs]:
    """Counts graphs that are recorded and replayed; record=False: none is, the same shapes run a kernel at a time."""
    found, kept = Graphs(), (StaticSteps._record, StaticSteps._run)

    def _record(self: Any, key: Any, drawing: Any) -> None:
        if record:
            kept[0](self, key, drawing)
            found.recorded += key in self.recorded

    def _run(self: Any, shape: Any, drawing: Any) -> Any:
        out = kept[1](self, shape, drawing)
        found.replayed += (shape, None if drawing is None else drawing.key) in self.recorded
        return out

    StaticSteps._record, StaticSteps._run = _record, _run  # type: ignore[method-assign]
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield found
        found.refused = [str(w.message) for w in said if "CUDA graph" in str(w.message)]
    finally:
        StaticSteps._record, StaticSteps._run = kept  # type: ignore[method-assign]


def asked(where: Where, n: int, vocabulary: int) -> list[Request]:
    """Prompts of different lengths, each with `n` completions."""
    generator = torch.Generator().manual_seed(1)
    requests = []
    for i in range(where.pick(12, 3)):
        length = int(torch.randint(3, where.pick(100, 20), (1,), generator=generator))
        prompt = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        requests.append(Request(prompt, n, i, max_tokens=None if i % 2 else where.pick(90, 6)))
    return requests


def drawn(sampler: LocalSampler, requests: Sequence[Request], temperature: float, longest: int) -> list[Rollout]:
    params = SamplingConfig(temperature=temperature, max_tokens=longest)
    return [r for g in sampler.sample(requests, params) for r in g.rollouts]


def same(a: Sequence[Rollout], b: Sequence[Rollout]) -> float:
    """Share of completions with the same tokens."""
    return sum(x.tokens == y.tokens for x, y in zip(a, b, strict=True)) / len(a)


def logprob_difference(a: Sequence[Rollout], b: Sequence[Rollout]) -> float:
    """Largest difference of log-probabilities, up to where tokens part."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        for t, u, p, q in zip(x.tokens, y.tokens, x.logprobs, y.logprobs, strict=False):
            if t != u:  # these are log-probabilities of different tokens
                break
            worst = max(worst, abs(p - q))
    return worst


@contextmanager
def forced(answers: Sequence[Rollout], requests: Sequence[Request]) -> Iterator[None]:
    """Let samplers draw the tokens of these answers, and keep the log-probabilities that they give to them."""
    numbers = [(i, j) for i, request in enumerate(requests) for j in range(request.n)]
    tokens = {number: answer.tokens for number, answer in zip(numbers, answers, strict=True)}
    kept = Session._draw, engine.draw_from_vocabulary

    def _draw(self: Any, rows: Any, logits: Tensor) -> None:
        given = torch.tensor([tokens[r.prompt.index, r.number][len(r.tokens)] for r in rows], device=logits.device)

        def draw(z: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
            return given, z.log_softmax(-1).gather(1, given[:, None]).squeeze(1)

        engine.draw_from_vocabulary = draw  # type: ignore[assignment]
        kept[0](self, rows, logits)

    Session._draw = _draw  # type: ignore[method-assign]
    try:
        yield
    finally:
        Session._draw, engine.draw_from_vocabulary = kept  # type: ignore[method-assign]


def learner_difference(
    model: LanguageModel, requests: Sequence[Request], rollouts: Sequence[Rollout]
) -> tuple[float, float]:
    """(largest, mean) difference of the sampler's log-probabilities from the learner's of the same tokens."""
    prompts = [r.tokens for r in requests for _ in range(r.n)]
    samples = [
        Sample([*p, *r.tokens], [0.0] * len(p) + [1.0] * len(r.tokens)) for p, r in zip(prompts, rollouts, strict=True)
    ]
    batch = model.pack(samples)
    targets = torch.cat([row[len(p) :] for row, p in zip(batch.rows, prompts, strict=True)])
    with torch.no_grad():
        mine = model(batch, targets_N=targets)[0].float().cpu()
    difference = (mine - torch.tensor([x for r in rollouts for x in r.logprobs])).abs()
    return float(difference.max()), float(difference.mean())


def check(where: Where) -> Account:
    """Llama with many completions a prompt and with one; windows and soft caps (Gemma 2); float32 and bfloat16."""
    account = Account()
    cases = [("llama", 8, torch.float32), ("llama", 8, torch.bfloat16), ("llama", 1, torch.float32),
             ("gemma2", 4, torch.float32), ("gemma2", 4, torch.bfloat16), ("qwen3", 8, torch.bfloat16)]  # fmt: skip
    for kind, n, dtype in [c for c in cases if c[2] == torch.float32 and c[0] == "llama"] if where.dry else cases:
        name = f"{kind}, {n} a prompt, {str(dtype).removeprefix('torch.')}"
        try:
            one(name, kind, n, dtype, where, account)
        except Exception as error:
            account.attempt(name, error)
    for key in ("graphs recorded", "graphs replayed"):
        account.numbers[key] = sum(v for k, v in account.numbers.items() if k.endswith(f": {key}"))
    account.note = f"{account.numbers['graphs recorded']} graphs, {account.numbers['graphs replayed']} replays"
    return account


def one(name: str, kind: str, n: int, dtype: torch.dtype, where: Where, account: Account) -> None:
    shape = where.pick(SMALL, DRY)
    more: dict[str, Any] = {"sliding_window": 48} if kind == "gemma2" else {}
    model = LanguageModel(build(shape, dtype, where.device, kind, head_dim=64, **more))
    tokenizer = byte_tokenizer(shape["vocab_size"])
    requests, longest = asked(where, n, shape["vocab_size"]), where.pick(180, 12)
    plain = LocalSampler(model, tokenizer, static_shapes=False, max_running=64)
    static, stepwise = (LocalSampler(model, tokenizer, static_shapes=True, max_running=64) for _ in range(2))
    tight = dtype == torch.float32
    bound = 1e-3 if tight else 0.15
    for temperature in (0.0, 1.0):
        label = f"{name}, temperature {temperature:g}"
        with watched(record=False):
            expected = drawn(stepwise, requests, temperature, longest)
        static.release()
        with watched() as graphs:
            replayed = drawn(static, requests, temperature, longest)
        with watched() as kept:
            again = drawn(static, requests, temperature, longest)
        for key in ("recorded", "replayed"):
            account.numbers[f"{label}: graphs {key}"] = getattr(graphs, key)
        if where.cuda:
            account.true(
                f"{label}: recorded", graphs.recorded > 0 and not graphs.refused, " ".join(graphs.refused)[:300]
            )
            account.true(f"{label}: replayed", graphs.replayed > graphs.recorded)
            account.numbers[f"{label}: recorded by the next call"] = kept.recorded
            account.true(f"{label}: kept", kept.replayed > graphs.replayed)
        agree(f"{label}: with graphs", replayed, expected, account)
        agree(f"{label}: with graphs of the call before", again, expected, account)
        if tight:  # bfloat16 rounds otherwise with another number of rows, and another token may be drawn
            other = drawn(plain, requests, temperature, longest)
            account.at_most(f"{label}: other completions than plain steps", 1 - same(replayed, other), 0.02)
        with forced(replayed, requests):
            scored = drawn(plain, requests, temperature, longest)
        account.true(f"{label}: the same tokens", same(scored, replayed) == 1.0)
        account.at_most(f"{label}: log-probabilities of plain steps", logprob_difference(replayed, scored), bound)
        if temperature:
            largest, mean = learner_difference(model, requests, replayed)
            account.at_most(f"{label}: log-probabilities, learner's, largest", largest, bound)
            account.at_most(f"{label}: log-probabilities, learner's, mean", mean, 1e-4 if tight else 0.02)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)  # in place, as training does it: graphs must read the new weights
    with watched(record=False):
        expected = drawn(stepwise, requests, 1.0, longest)
    found = drawn(static, requests, 1.0, longest)
    account.true(f"{name}: other weights, other tokens", same(found, replayed) < 1.0)
    agree(f"{name}: graphs after weights have changed", found, expected, account)


def agree(label: str, found: Sequence[Rollout], expected: Sequence[Rollout], account: Account) -> None:
    """The same kernels on the same numbers: the same bits."""
    account.at_most(f"{label}: other completions", 1 - same(found, expected), 0.0)
    account.at_most(f"{label}: log-probabilities", logprob_difference(found, expected), 1e-6)
