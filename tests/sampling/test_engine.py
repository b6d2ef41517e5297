"""The local sampler against transformers' generate, against the learner, and against itself in other company."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from posttrain.config import AdapterConfig, SamplingConfig
from posttrain.core.errors import DataError, ModelError
from posttrain.core.types import Rollout, RolloutGroup, Sample
from posttrain.cpu import library as native
from posttrain.models.adapters import attach
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import SPECIAL, tiny_model, tiny_tokenizer
from posttrain.sampling import engine
from posttrain.sampling.cuda_graphs import rounded
from posttrain.sampling.engine import LocalSampler, Session
from posttrain.sampling.protocol import Request
from posttrain.sampling.steps_ahead import StepsAhead
from tests.core.test_ragged import TYPES

TOKENIZER = tiny_tokenizer()


def spread(hf: Any) -> Any:
    """A random model with more decided opinions, so that rounding does not decide between near equals."""
    with torch.no_grad():
        for p in hf.parameters():
            if p.ndim > 1:
                p.mul_(4)
    return hf


def sampler(kind: str = "llama", settings: dict[str, Any] | None = None, **options: Any) -> LocalSampler:
    model = LanguageModel(spread(tiny_model(kind, **(settings or {}))))
    return LocalSampler(model, TOKENIZER, **options)


def prompts(count: int = 6, seed: int = 0, low: int = 1, high: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 250, int(rng.integers(low, high))).tolist() for _ in range(count)]


def tokens(groups: list[RolloutGroup]) -> list[list[tuple[int, ...]]]:
    return [[tuple(r.tokens) for r in g.rollouts] for g in groups]


@pytest.mark.parametrize(("kind", "settings"), TYPES, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_greedy_equals_generate_and_logprobs_equal_the_learner_s(kind: str, settings: dict[str, Any]) -> None:
    """Every model type, windows and caps included, one completion a prompt and several that share it."""
    s = sampler(kind, settings)
    asked = prompts(4)
    assert min(map(len, asked)) < 7 and max(map(len, asked)) > 16  # within a window, and far beyond
    reference = spread(tiny_model(kind, **settings)).eval()
    expected = [
        reference.generate(torch.tensor([p]), max_new_tokens=10, do_sample=False, eos_token_id=2)[0, len(p) :].tolist()
        for p in asked
    ]
    for n in (1, 2):
        groups = s.sample([Request(p, n=n) for p in asked], SamplingConfig(temperature=0, max_tokens=10))
        assert [[list(r.tokens) for r in g.rollouts] for g in groups] == [[e] * n for e in expected]
        check_logprobs(s, groups, 1.0)
        params = SamplingConfig(temperature=1.7, max_tokens=30 // n)
        drawn = s.sample([Request(p, n=n, seed=i) for i, p in enumerate(asked)], params)
        check_logprobs(s, drawn, 1.7)


@pytest.mark.parametrize(("kind", "settings"), TYPES, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_static_shapes_change_nothing(kind: str, settings: dict[str, Any]) -> None:
    """Rows, columns and prompts that nobody asked for are computed along, and nothing of them shows."""
    asked = prompts(5, seed=1)
    params = SamplingConfig(max_tokens=12)
    model = LanguageModel(spread(tiny_model(kind, **settings)))
    samplers = [LocalSampler(model, TOKENIZER, max_running=7, static_shapes=on) for on in (False, True, True)]
    samplers[2].ahead = True
    for n in (1, 3):
        requests = [Request(p, n=n, seed=i) for i, p in enumerate(asked)]
        plain, *others = (s.sample(requests, params) for s in samplers)
        for static in others:
            assert tokens(static) == tokens(plain)
            for a, b in zip(static, plain, strict=True):
                for x, y in zip(a.rollouts, b.rollouts, strict=True):
                    np.testing.assert_allclose(x.logprobs, y.logprobs, atol=1e-5)


@pytest.mark.parametrize("n", [1, 3])
def test_steps_that_start_before_the_last_is_read_draw_the_same(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Many completions that end at different times, by their limit, an end token or a stop string, as slots free."""
    s, ahead = (sampler("llama", {}, max_running=20, static_shapes=True) for _ in range(2))
    ahead.ahead, started = True, []
    for name in ("_begin", "_next"):
        own = getattr(StepsAhead, name)
        monkeypatch.setattr(StepsAhead, name, lambda self, *a, own=own: started.append(bool(a)) or own(self, *a))
    requests = [Request(p, n=n, seed=i, max_tokens=5 + 7 * (i % 9)) for i, p in enumerate(prompts(40, seed=3))]
    params = SamplingConfig(max_tokens=60, min_tokens=2, stop=[TOKENIZER.decode([7])])
    expected, found = s.sample(requests, params), ahead.sample(requests, params)
    assert tokens(found) == tokens(expected)
    assert {r.finish for g in found for r in g.rollouts} == {"end", "length", "stop"}
    assert sum(started) > len(started) / 4 and not all(started)


@pytest.mark.parametrize("n", [1, 3])
def test_compiled_kernels_change_nothing(monkeypatch, n: int) -> None:
    """The same completions through torch alone."""
    requests = [Request(p, n=n, seed=i) for i, p in enumerate(prompts(7, seed=2))]
    params = SamplingConfig(max_tokens=25)
    found = sampler("llama", {}).sample(requests, params)
    monkeypatch.setattr(native, "_state", {"kernels": None, "why": "a test"})
    plain = sampler("llama", {}).sample(requests, params)
    assert tokens(found) == tokens(plain)
    for a, b in zip(found, plain, strict=True):
        for x, y in zip(a.rollouts, b.rollouts, strict=True):
            np.testing.assert_allclose(x.logprobs, y.logprobs, atol=1e-5)


def test_sizes_are_few_and_never_too_small() -> None:
    for most in (1, 5, 100, 512):
        sizes = {rounded(n, most) for n in range(1, most + 1)}
        assert all(n <= rounded(n, most) <= min(most, max(1, 1.5 * n)) for n in range(1, most + 1))
        assert len(sizes) <= 2 * most.bit_length()
    assert [rounded(n, 1000, 128) for n in (1, 128, 129, 193, 900)] == [128, 128, 192, 256, 1000]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("n", [1, 4])
def test_recorded_steps_give_the_same_completions(n: int) -> None:
    """CUDA graphs against the same kernels one after the other."""
    model = LanguageModel(spread(tiny_model("llama")).cuda())
    requests = [Request(p, n=n, seed=i) for i, p in enumerate(prompts(9))]
    params = SamplingConfig(max_tokens=40)
    recorded = LocalSampler(model, TOKENIZER).sample(requests, params)
    assert tokens(recorded) == tokens(LocalSampler(model, TOKENIZER, static_shapes=False).sample(requests, params))


def check_logprobs(s: LocalSampler, groups: list[RolloutGroup], temperature: float) -> None:
    made = [(g.prompt, r) for g in groups for r in g.rollouts]
    batch = s.model.pack([Sample([*p, *r.tokens], [0.0] * len(p) + [1.0] * len(r.tokens)) for p, r in made], False)
    learner = torch.zeros(batch.total)
    learner[batch.targets_N] = s.model(batch, temperature=temperature)[0].detach()
    for (prompt, r), row in zip(made, batch.rows, strict=True):
        assert float((learner[row[len(prompt) :]] - torch.tensor(r.logprobs)).abs().max()) < 1e-4


def test_a_seed_gives_the_same_completion_whatever_else_is_sampled() -> None:
    params, s = SamplingConfig(max_tokens=20, top_p=0.95), sampler()
    asked = [Request(p, n=3, seed=i) for i, p in enumerate(prompts(9))]
    crowd = s.sample(asked, params)
    alone = [s.sample([r], params)[0] for r in asked]
    assert tokens(crowd) == tokens(alone)
    for options in ({"max_running": 1}, {"max_running": 4}, {"max_running": 7, "memory_mb": 0.2}):
        assert tokens(LocalSampler(s.model, TOKENIZER, **options).sample(asked, params)) == tokens(crowd)
    assert tokens(s.sample(asked[::-1], params)) == tokens(crowd)[::-1]
    one = [Request(r.tokens, n=1, seed=r.seed) for r in asked]
    assert [g[0] for g in tokens(s.sample(one, params))] == [g[0] for g in tokens(crowd)]
    assert len({g[j] for g in tokens(crowd) for j in range(3)}) == 27  # different seeds and numbers: different answers
    twice = tokens(s.sample([asked[0], asked[0]], params))
    assert twice[0] == twice[1]


def test_prompts_are_computed_once_slots_do_not_idle_and_memory_holds(monkeypatch) -> None:
    """27 completions of nine prompts where 51 KiB hold a few: each prompt goes through the model once, no slot is free
    at a step for which a completion of a computed prompt waits, and keys and values never take more."""
    s = sampler(memory_mb=0.05)
    asked = [Request(p, n=3, seed=i) for i, p in enumerate(prompts(9))]
    computed: list[tuple[int, ...]] = []
    running: list[int] = []
    prefill, step = LocalSampler.prefill, Session._step

    def counting(self: LocalSampler, given: Any, keep: Any) -> Any:
        computed.extend(tuple(p) for p in given if list(p) != [0])  # [0]: how a token's size is found
        return prefill(self, given, keep)

    def watching(self: Session) -> None:
        regions = [self.own, *([self.shared] if self.shared is not None else [])]
        held = sum(r.bytes() for r in regions)
        assert held <= 0.05 * 2**20 and not (self.open and self.free_slots)
        running.append(len(self.rows))
        step(self)

    monkeypatch.setattr(LocalSampler, "prefill", counting)
    monkeypatch.setattr(Session, "_step", watching)
    s.sample(asked, SamplingConfig(max_tokens=20))
    assert sorted(computed) == sorted(tuple(r.tokens) for r in asked)
    assert 2 <= max(running) < 27 and running.count(max(running)) > len(running) / 2


@pytest.mark.parametrize("n", [1, 4])
def test_while_prompts_wait_less_than_an_eighth_of_the_slots_is_free(n: int, monkeypatch) -> None:
    """At every step, the first included; also where completions end with their first token, and where few prompts fit
    into a prefill."""
    monkeypatch.setitem(engine.PREFILL_TOKENS, "cpu", 40)
    s = sampler(max_running=24)
    s.ends = frozenset(range(0, 259, 16))  # lengths as good as exponential, 17 on average
    steps, idle = 0, 0
    step = Session._step

    def watching(self: Session) -> None:
        nonlocal steps, idle
        free, slots = len(self.free_slots), len(self.free_slots) + len(self.rows)
        assert slots == 24 and not (self.waiting and free >= 24 // 8)
        steps, idle = steps + bool(self.waiting), idle + bool(self.waiting and free)
        step(self)

    monkeypatch.setattr(Session, "_step", watching)
    groups = s.sample([Request(p, n=n, seed=i) for i, p in enumerate(prompts(160 // n))], SamplingConfig(max_tokens=60))
    lengths = [len(r.tokens) for g in groups for r in g.rollouts]
    assert lengths.count(1) > 3 and max(lengths) > 40
    assert idle and steps > 20  # it is a bound that is made use of


def test_frequencies_are_the_model_s() -> None:
    """First tokens of 4,000 completions against the softmax of the model's own logits."""
    s = sampler()
    prompt = prompts(1)[0]
    group = s.sample([Request(prompt, n=4000, seed=5)], SamplingConfig(max_tokens=1))[0]
    share = torch.bincount(torch.tensor([r.tokens[0] for r in group.rollouts]), minlength=259) / 4000
    s.model.base.set_attn_implementation("eager")
    p = s.model.base(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    assert float((share - p).abs().max()) < 4 * float((p * (1 - p) / 4000).max().sqrt())


def test_why_each_ends() -> None:
    s = sampler()
    free = s.sample([Request([5, 6, 7], n=40, seed=1)], SamplingConfig(max_tokens=60))[0]
    ended = [r for r in free.rollouts if r.finish == "end"]
    assert ended and all(r.tokens[-1] == 2 and 2 not in r.tokens[:-1] for r in ended)
    assert all(len(r.tokens) == 60 for r in free.rollouts if r.finish == "length")
    assert {r.finish for r in free.rollouts} == {"end", "length"}
    held = s.sample([Request([5, 6, 7], n=40, seed=1)], SamplingConfig(max_tokens=60, min_tokens=30))[0]
    assert all(len(r.tokens) > 30 for r in held.rollouts)
    first = free.rollouts[0].tokens
    stopped = s.sample([Request([5, 6, 7], n=1, seed=1)], SamplingConfig(max_tokens=60, stop_tokens=[first[4]]))[0]
    (r,) = stopped.rollouts
    assert r.finish == "stop" and r.tokens == first[: first.index(first[4]) + 1]


def test_stop_strings_end_a_completion_and_stay_out_of_its_text() -> None:
    s = sampler()
    free = s.sample([Request([5, 6, 7], n=1, seed=1)], SamplingConfig(max_tokens=40))[0].rollouts[0]
    text = TOKENIZER.decode(free.tokens[:20], skip_special_tokens=False)
    stop = text[9:12]
    params = SamplingConfig(max_tokens=40, stop=[stop, "never said"])
    r = s.sample([Request([5, 6, 7], n=1, seed=1)], params)[0].rollouts[0]
    assert r.finish == "stop" and r.tokens == free.tokens[: len(r.tokens)]
    whole = TOKENIZER.decode(r.tokens, skip_special_tokens=False)
    assert whole.endswith(stop) and r.text == whole[: whole.find(stop)]


@pytest.mark.parametrize("at_least", [20, 1])
def test_a_stop_string_before_the_minimum_is_text(at_least: int) -> None:
    """What counts is completed by token number min_tokens or a later one: there the completion ends and is cut."""
    s, found = sampler(), 0
    for seed in range(12):
        if found >= 8:
            break
        asked = [Request([5, 6, 7], seed=seed)]
        free = s.sample(asked, SamplingConfig(max_tokens=60, min_tokens=at_least))[0].rollouts[0]
        said = [TOKENIZER.decode([t]) for t in free.tokens]
        for stop in {c for c in said if c.isascii() and c.isalnum() and c not in "".join(SPECIAL)}:
            places = [i for i, c in enumerate(said) if c == stop]
            counting = [i for i in places if i + 1 >= at_least]
            if not counting or (at_least > 1 and places[0] == counting[0]):
                continue
            params = SamplingConfig(max_tokens=60, min_tokens=at_least, stop=[stop])
            (r,) = s.sample(asked, params)[0].rollouts
            assert r.finish == "stop" and r.tokens == free.tokens[: counting[0] + 1]
            assert r.text == TOKENIZER.decode(free.tokens[: counting[0]], skip_special_tokens=True)
            found += 1
    assert found >= 5


def test_special_tokens_are_not_shown_whatever_ends_a_completion() -> None:
    """What a stop string ended is decoded like any other text; its tokens are kept as they were drawn."""
    s, found = sampler(), 0
    with torch.no_grad():
        s.model.base.get_output_embeddings().weight[0] *= 3
    for seed in range(40):
        if found >= 5:
            break
        asked = [Request([5, 6, 7], seed=seed)]
        free = s.sample(asked, SamplingConfig(max_tokens=40))[0].rollouts[0]
        said = [TOKENIZER.decode([t]) for t in free.tokens]
        special = [i for i, t in enumerate(free.tokens) if t == 0]
        later = [i for i in range(special[0], len(said)) if said[i].isalnum()] if special else []
        stop = next((said[i] for i in later if said.index(said[i]) == i and said[i] not in "".join(SPECIAL)), None)
        if stop is None:
            continue
        (r,) = s.sample(asked, SamplingConfig(max_tokens=40, stop=[stop]))[0].rollouts
        at = said.index(stop)
        assert r.finish == "stop" and r.tokens == free.tokens[: at + 1] and r.logprobs == free.logprobs[: at + 1]
        assert r.text == TOKENIZER.decode(free.tokens[:at], skip_special_tokens=True) and "<|" not in r.text
        found += 1
    assert found >= 5


def test_memory_is_shared_by_the_ranks_of_a_machine(monkeypatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = sampler().allowed_bytes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert sampler().allowed_bytes() == whole / 4
    assert sampler(memory_mb=3).allowed_bytes() == 3 * 2**20  # what is named is each rank's own


def test_a_request_may_be_shorter_than_the_rest() -> None:
    s = sampler()
    params = SamplingConfig(max_tokens=12, min_tokens=12)
    asked = [Request([5, 6, 7], n=2, seed=1, max_tokens=m) for m in (3, None, 40)]
    groups = s.sample(asked, params)
    assert [[len(r.tokens) for r in g.rollouts] for g in groups] == [[3, 3], [12, 12], [12, 12]]
    assert groups[0].rollouts[0].tokens == groups[1].rollouts[0].tokens[:3]
    with pytest.raises(DataError, match="max_tokens is 0"):
        s.sample([Request([5], max_tokens=0)], params)


def test_an_empty_completion_is_one() -> None:
    s = sampler()
    params = SamplingConfig(temperature=0, max_tokens=3)
    first = s.sample([Request([5, 6, 7])], params)[0].rollouts[0].tokens[0]
    s.ends = frozenset({first})
    (r,) = s.sample([Request([5, 6, 7])], params)[0].rollouts
    assert (list(r.tokens), r.finish, r.text) == ([first], "end", "")


def test_with_adapters_on_and_unmerged() -> None:
    hf = attach(spread(tiny_model("llama")), AdapterConfig(r=4), seed=0)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    s = LocalSampler(LanguageModel(hf), TOKENIZER)
    asked = [Request(p, n=2, seed=3) for p in prompts(3)]
    groups = s.sample(asked, SamplingConfig(max_tokens=10))
    check_logprobs(s, groups, 1.0)
    assert tokens(groups) != tokens(sampler().sample(asked, SamplingConfig(max_tokens=10)))


def test_weights_are_the_learner_s_own() -> None:
    """A change of the weights is seen by the next call, and the training mode is as it was."""
    s = sampler()
    s.model.train()
    before = tokens(s.sample([Request([5, 6, 7], seed=1)], SamplingConfig(max_tokens=8)))
    with torch.no_grad():
        s.model.base.get_decoder().layers[0].mlp.down_proj.weight.mul_(-3)
    after = s.sample([Request([5, 6, 7], seed=1)], SamplingConfig(max_tokens=8))
    assert tokens(after) != before and s.model.training
    check_logprobs(s, after, 1.0)


def test_the_context_bounds_every_completion() -> None:
    s = sampler(settings={"max_position_embeddings": 24})
    groups = s.sample([Request([5] * 20, n=2), Request([5] * 23)], SamplingConfig(max_tokens=50, min_tokens=50))
    assert [[len(r.tokens) for r in g.rollouts] for g in groups] == [[4, 4], [1]]
    with pytest.raises(DataError, match=r"prompt 1 has 24 tokens, and the model's context of 24 leaves no room"):
        s.sample([Request([5]), Request([5] * 24)], SamplingConfig())


def test_what_cannot_be_asked() -> None:
    s = sampler()
    assert s.sample([], SamplingConfig()) == []
    with pytest.raises(DataError, match="prompt 0 has no tokens"):
        s.sample([Request([])], SamplingConfig())
    with pytest.raises(DataError, match="n is 0"):
        s.sample([Request([5], n=0)], SamplingConfig())
    with pytest.raises(ModelError, match="raise memory_mb"):
        sampler(memory_mb=0.01).sample([Request([5] * 50)], SamplingConfig(max_tokens=500))


def test_done_is_told_as_it_happens_and_examples_go_along() -> None:
    told: list[tuple[int, int, Rollout]] = []
    asked = [Request(p, n=2, seed=i, example={"answer": i}) for i, p in enumerate(prompts(4))]
    groups = sampler(max_running=3).sample(asked, SamplingConfig(max_tokens=9), lambda i, j, r: told.append((i, j, r)))
    assert sorted((i, j) for i, j, _ in told) == [(i, j) for i in range(4) for j in range(2)]
    assert all(groups[i].rollouts[j] is r for i, j, r in told)
    assert [g.example["answer"] for g in groups] == [0, 1, 2, 3]
