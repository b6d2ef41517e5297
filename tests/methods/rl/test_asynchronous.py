"""Asynchronous RL: the synchronous run at staleness 0, the bound per token, what a killed run loses: nothing."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config import ModelConfig, RLConfig, SamplingConfig
from posttrain.core.errors import PosttrainError
from posttrain.core.progress import Phases, Track
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.methods.rl.asynchronous import AsynchronousCollector
from posttrain.methods.rl.rl_metrics import RL_METRICS
from posttrain.methods.rl.rl_stage import StagePrompts
from posttrain.methods.rl.rl_trainer import RLTrainer, hooks_of
from posttrain.methods.rl.rollout_setup import open_rollouts
from posttrain.models.language_model import LanguageModel
from posttrain.rewards.stack import RewardStack
from posttrain.sampling import open_workers
from posttrain.sampling.behaviour_sampler import BehaviourSampler
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import OnDone, Request
from posttrain.sampling.remembering_sampler import RememberingSampler, request_key
from posttrain.sampling.rollout_store import read_rollouts
from posttrain.sampling.thread_worker import ThreadWorker, trained_weights
from posttrain.sampling.worker_protocol import WorkerLost
from posttrain.trainer.loop import train
from posttrain.trainer.policy import LoadedPolicy
from posttrain.trainer.stage import StageRun
from posttrain.trainer.train_step import Learner
from tests.invariants.plugged_in import Counting
from tests.methods.rl.cases import Case
from tests.methods.rl.test_gather import EVERYTHING, FUNCTION, Killed, seldom
from tests.methods.rl.test_policy_gradient import TOKENIZER, model, plain_logprobs, questions, settings
from tests.sampling.test_workers import WarmChild

TURNS = {"kind": "function", "function": "answers", "stop": list("aeiounrst12345 "), "max_turns": 2}
QUIET = Track("t", 1, shown=False)


@contextmanager
def opened(config: RLConfig, folder: Path, function: Any = seldom, answers: Any = Counting) -> Iterator[RLTrainer]:
    """A stage as a recipe opens it."""
    lm = model()
    with ExitStack() as resources:
        learner = Learner(lm, config.optimizer, config.systems, config.steps * config.mini_batches)
        run = StageRun(ModelConfig(source="tiny:llama"), folder, 0, resources)
        functions = {"f": function, "answers": answers}
        loaded, hooks = LoadedPolicy(lm, TOKENIZER, 0, 0), hooks_of(config, 8, 0)
        rollouts = open_rollouts(
            config, loaded, StagePrompts(questions(8)), run, functions, learner=learner, hooks=hooks
        )
        yield RLTrainer(config, learner, *rollouts, model(1) if config.kl.coefficient else None)


def go(trainer: RLTrainer, folder: Path, on_step: Callable[..., None] | None = None) -> dict[str, torch.Tensor]:
    every = trainer.config.checkpoint_every
    train(trainer.learner, trainer, folder, checkpoint_every=every, keep=2, title="t", on_step=on_step)
    return trainer.learner.model.state_dict()


def kept(folder: Path, step: int) -> list[dict[str, Any]]:
    return read_rollouts(folder / "rollouts" / f"step-{step:06d}.parquet")


def trained_prompts(folder: Path, steps: int) -> list[list[int]]:
    """The prompt of each group that was trained on, step by step."""
    return [list({r["group"]: r["problem"] for r in kept(folder, s + 1)}.values()) for s in range(steps)]


@pytest.mark.parametrize("changes", [{**EVERYTHING, "steps": 3, "mini_batches": 1}, {"environment": TURNS, "steps": 2}])
def test_at_staleness_0_it_is_the_synchronous_run_to_the_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    """With exploration and trajectory management, and in turns."""
    weights = []
    for name, block in (("synchronous", None), ("asynchronous", {"max_staleness": 0})):
        config = settings("grpo", **{**changes, "rewards": {"terms": [FUNCTION]}}, asynchronous=block)
        with opened(config, tmp_path / name) as trainer:
            assert isinstance(trainer.collector, AsynchronousCollector) == (block is not None)
            weights.append(go(trainer, tmp_path / name))
    assert all(torch.equal(weights[1][n], w) for n, w in weights[0].items())
    texts = [(tmp_path / f / "metrics.jsonl").read_text() for f in ("synchronous", "asynchronous")]
    assert texts[0] == texts[1]
    for step in range(config.steps):
        assert repr(kept(tmp_path / "synchronous", step + 1)) == repr(kept(tmp_path / "asynchronous", step + 1))


class Slow(Counting):
    """Counts the threads that are in it at once."""

    concurrent = True

    def __init__(self) -> None:
        self.inside = self.most = 0
        self.met = threading.Event()

    def step(self, state: list[str], text: str) -> tuple[str | None, bool]:
        self.inside += 1
        self.most = max(self.most, self.inside)
        if self.inside > 1:
            self.met.set()
        self.met.wait(5)  # until another step's rollouts are collected too
        self.inside -= 1
        return super().step(state, text)


def test_coming_steps_are_sampled_meanwhile_and_no_token_is_older_than_allowed(tmp_path: Path) -> None:
    environment, ahead = Slow(), 2
    config = settings("grpo", environment=TURNS, steps=4, asynchronous={"max_staleness": ahead})
    with opened(config, tmp_path, answers=lambda: environment) as trainer:
        go(trainer, tmp_path)
        drawn = [trainer.collector.draw_prompts(s, 0) for s in range(config.steps)]
    assert environment.most > 1
    assert trained_prompts(tmp_path, config.steps) == drawn
    ages = [[s - p[1] for r in kept(tmp_path, s + 1) for p in r["pieces"]] for s in range(config.steps)]
    assert min(map(min, ages)) >= 0 and 1 <= max(map(max, ages)) <= ahead
    assert all(sum(p[0] for p in r["pieces"]) == len(r["tokens"]) for s in range(4) for r in kept(tmp_path, s + 1))
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [m["staleness_max"] for m in metrics] == [max(of) for of in ages]
    assert any("clip_fraction" in m for m in metrics) and not any(m["stale_completions"] for m in metrics)
    timings = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    shown = {m.name for m in RL_METRICS if m.group == "Overlap"}
    assert all(shown <= set(t) for t in timings) and timings[0]["batches_in_flight"] == ahead
    assert threading.active_count() == 1 + sum("posttrain" not in t.name for t in threading.enumerate()[1:])


@pytest.mark.long
def test_worker_processes_sample_ahead_and_a_lost_one_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_workers, "_launch", lambda config, connection, log: WarmChild(connection))
    sampler, block = {"max_tokens": 9, "workers": 1}, {"max_staleness": 1}
    config = settings("grpo", sampler=sampler, asynchronous=block)

    def on_step(step: int, *_: Any) -> None:
        if step == 1:
            trainer.collector.behaviour.workers.workers[0].child.kill()  # type: ignore[attr-defined]

    with opened(config, tmp_path) as trainer:
        go(trainer, tmp_path, on_step)
        drawn = [trainer.collector.draw_prompts(s, 0) for s in range(3)]
    assert trained_prompts(tmp_path, 3) == drawn
    assert {s - p[1] for s in range(3) for r in kept(tmp_path, s + 1) for p in r["pieces"]} <= {0, 1}
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["mismatch_max"] < 1e-4 and metrics[1]["staleness_max"] == 1


class Changing:
    """A sampler whose weights change after every call; `versions` are all that it had."""

    def __init__(self, lm: LanguageModel, worker: ThreadWorker) -> None:
        self.lm, self.worker = lm, worker
        self.versions = [model()]

    def sample(
        self, requests: Sequence[Request], params: SamplingConfig, on_done: OnDone | None = None
    ) -> list[RolloutGroup]:
        groups = self.worker.sample(requests, params, on_done)
        with torch.no_grad():
            for p in self.lm.parameters():
                p.mul_(1.03)
        self.worker.update(len(self.versions), trained_weights(self.lm))
        self.versions.append(model())
        self.versions[-1].load_state_dict(self.lm.state_dict())
        return groups


def test_partial_rollouts_continue_under_new_weights(tmp_path: Path) -> None:
    """Each piece has the log-probabilities of its own version, and every completion ends within its step."""
    block = {"exploration": {"partial_rollouts": 3}, "asynchronous": {"max_staleness": 4}}
    config, lm = settings("grpo", prompts_per_step=2, **block), model()
    worker = ThreadWorker(lm, TOKENIZER)
    changing, stack = Changing(lm, worker), RewardStack(config.rewards)
    collector = AsynchronousCollector(
        config, LocalSampler(lm, TOKENIZER), changing, stack, questions(), 0,
        behaviour=BehaviourSampler(changing, worker, dict), hooks=hooks_of(config, 8, 0), tokenizer=TOKENIZER,
    )  # fmt: skip
    collector.steps = 1
    batch = collector.collect(0, config.sampler, Phases(QUIET))
    worker.close()
    collector.close()
    several = 0
    for group in batch.groups:
        prompt = questions()[group.problem].tokens
        for r in group.rollouts:
            assert r.finish in ("end", "length") and sum(p.tokens for p in r.pieces) == len(r.tokens)
            assert [p.step for p in r.pieces] == list(range(len(r.pieces)))
            several += len(r.pieces) > 1
            start = 0
            for piece in r.pieces:
                own = plain_logprobs(changing.versions[piece.step], Case(list(prompt), r, 0), 1.0)
                end = start + piece.tokens
                torch.testing.assert_close(own[start:end], torch.tensor(r.logprobs[start:end]), atol=1e-4, rtol=0)
                start = end
    assert several > 4


def test_a_killed_run_trains_on_each_prompt_once_and_samples_nothing_twice(tmp_path: Path) -> None:
    """Killed at several points: after steps with and without a checkpoint, and by what happens in a thread."""
    config = settings("grpo", environment=TURNS, steps=5, checkpoint_every=2, asynchronous={"max_staleness": 2})
    after_step, in_thread, armed = [3], [1], [False]

    class Deadly(Counting):
        def step(self, state: list[str], text: str) -> tuple[str | None, bool]:
            if armed[0]:
                armed[0] = False
                raise Killed
            return super().step(state, text)

    def on_step(step: int, *_: Any) -> None:
        if after_step and step == after_step[0]:
            after_step.pop(0)
            raise Killed
        if in_thread and step == in_thread[0]:
            armed[0] = bool(in_thread.pop())

    in_flight: dict[int, list[tuple[int, ...]]] = {}  # by checkpoint and step: what it has of the step
    for _ in range(3):
        for checkpoint in sorted((tmp_path / "checkpoints").glob("step-*"))[-1:]:
            for state in json.loads((checkpoint / "numbers.json").read_text())["in_flight"]:
                whole = [r for g in state.get("groups", ()) for r in g["rollouts"]]
                whole += [r for *_, of in state.get("sampled", ()) for r in of]
                in_flight[state["step"]] = [tuple(r["tokens"]) for r in whole]
        try:
            with opened(config, tmp_path, answers=Deadly) as trainer:
                go(trainer, tmp_path, on_step)
            break
        except (Killed, PosttrainError) as error:
            assert "Killed" in repr(error)
    assert not in_thread and not after_step and sum(map(len, in_flight.values()))
    for step, whole in in_flight.items():
        assert set(whole) <= {tuple(r["tokens"]) for r in kept(tmp_path, step + 1)}
    assert trained_prompts(tmp_path, 5) == [trainer.collector.draw_prompts(s, 0) for s in range(5)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_what_a_checkpoint_has_of_a_step_is_not_sampled_again_unless_it_is_too_old(tmp_path: Path) -> None:
    """Resumed with the same bound, prompts that were complete are not asked for; with a lower one all are."""
    config = settings("grpo", steps=6, asynchronous={"max_staleness": 3})
    with opened(config, tmp_path) as trainer:
        trainer.step(0, QUIET)
        for flight in trainer.collector.flights.values():  # type: ignore[attr-defined]
            flight.result.result()
        state = json.loads(json.dumps(trainer.state_dict()))
    assert [s["step"] for s in state["in_flight"]] == [1, 2, 3]
    half = state["in_flight"][1]
    sampled = [[i, g["rollouts"]] for i, g in enumerate(half.pop("groups"))]
    asked: list[int] = []
    for ahead, stale, expected in ((3, 0, 8), (1, 8, 8 + 16)):
        with opened(settings("grpo", steps=6, asynchronous={"max_staleness": ahead}), tmp_path) as trainer:
            collector = trainer.collector
            assert isinstance(collector, AsynchronousCollector)
            collector.steps = 4
            worker: Any = collector.behaviour.workers
            seeds = collector._streams(2, (2, 0), 4)  # of a step of which half of the prompts is known
            prompts = [collector.questions[p].tokens for p in collector.draw_prompts(2, 0)]
            keys = [request_key(Request(t, 4, s)) for t, s in zip(prompts, seeds, strict=True)]
            half["sampled"] = [[*keys[i], rollouts] for i, rollouts in sampled[:2]]
            trainer.load_state_dict(state)
            real = worker.sampler.sample

            def sample(requests: Sequence[Request], *args: Any, real: Any = real) -> Any:
                asked.extend(r.n for r in requests)
                return real(requests, *args)

            worker.sampler.sample = sample
            asked.clear()
            first = collector.collect(1, config.sampler, Phases(QUIET))
            second = collector.collect(2, config.sampler, Phases(QUIET))
            assert [b.metrics["stale_completions"] for b in (first, second)] == [0, stale]
            assert sum(asked) == expected
            assert all(p.step >= 2 - ahead for g in second.groups for r in g.rollouts for p in r.pieces)
            assert second.problems == collector.draw_prompts(2, 0)


def test_a_known_seed_with_another_prompt_or_number_is_asked_for(policy_seed: int = 77) -> None:
    """As when a reward differs after a resume, and another prompt gets the further completions."""
    local = LocalSampler(model(), TOKENIZER)
    first, params = Request([5, 6, 7], 2, policy_seed), SamplingConfig(max_tokens=3)
    known = RememberingSampler(local)
    (expected,) = known.sample([first], params)
    state = json.loads(json.dumps(known.state_dict()))
    again = RememberingSampler(local, RememberingSampler.from_state(state))
    for other in (Request([9, 9], 2, policy_seed), Request([5, 6, 7], 3, policy_seed)):
        (found,), (plain,) = again.sample([other], params), local.sample([other], params)
        assert [r.tokens for r in found.rollouts] == [r.tokens for r in plain.rollouts]
    again.sampler = None  # type: ignore[assignment]
    (found,) = again.sample([first], params)
    assert [r.tokens for r in found.rollouts] == [r.tokens for r in expected.rollouts]
    assert RememberingSampler.from_state([[seed, rollouts] for seed, _, rollouts in state]) == {}


def test_waiting_until_workers_take_weights_is_idle_time(tmp_path: Path) -> None:
    """Processes answer first: the learner's waiting for rollouts is in `publish` then."""
    config = settings("grpo", steps=4, asynchronous={"max_staleness": 1})
    with opened(config, tmp_path) as trainer:
        collector = trainer.collector
        assert isinstance(collector, AsynchronousCollector)
        collector.collect(0, config.sampler, Phases(QUIET))
        collector.flights[1].result.result()
        real = collector.behaviour.publish
        collector.behaviour.publish = lambda version: (time.sleep(0.2), real(version))[1]  # type: ignore[method-assign]
        phases = Phases(QUIET)
        collector.collect(1, config.sampler, phases)
        assert collector.timing()["learner_idle_seconds"] == phases.seconds["wait"] >= 0.2
        assert collector.timing()["batches_ready"] == 1


@pytest.mark.parametrize("where", ["the environment", "the sampler", "the weights"])
def test_an_error_in_a_thread_ends_the_run_with_it_and_leaves_it_resumable(where: str, tmp_path: Path) -> None:
    broken = [False]

    class Breaking(Counting):
        def step(self, state: list[str], text: str) -> tuple[str | None, bool]:
            if where == "the environment" and broken[0]:
                raise OSError("no route to the tools")
            return super().step(state, text)

    config = settings("grpo", environment=TURNS, steps=5, checkpoint_every=1, asynchronous={"max_staleness": 1})

    def on_step(step: int, *_: Any) -> None:  # the groups of two more steps may be complete by then
        broken[0] = True

    with pytest.raises(Exception) as raised, opened(config, tmp_path, answers=Breaking) as trainer:
        collector = trainer.collector
        assert isinstance(collector, AsynchronousCollector)
        worker: Any = collector.behaviour.workers
        real, publish = worker.sampler.sample, collector.behaviour.publish

        def sample(*args: Any) -> list[RolloutGroup]:
            if where == "the sampler" and broken[0]:
                raise RuntimeError("out of memory, say")
            return real(*args)

        worker.sampler.sample = sample
        if where == "the weights":
            wrong = {"no such": torch.zeros(1)}
            collector.behaviour.publish = lambda v: worker.update(v, wrong) if v == 1 else publish(v)  # type: ignore[method-assign]
        go(trainer, tmp_path, on_step)
    message = "".join([str(raised.value), *getattr(raised.value, "__notes__", ())])
    expected = {"the environment": "no route", "the sampler": "rollouts of step", "the weights": "no such"}[where]
    assert expected in message
    broken[0] = False
    with opened(config, tmp_path, answers=Breaking) as trainer:
        go(trainer, tmp_path, lambda *_: None)
    assert [len(p) for p in trained_prompts(tmp_path, 5)] == [4] * 5


def test_a_worker_does_in_order_what_it_is_told_and_shares_frozen_weights() -> None:
    """Requests before an update have the weights before it; those that wait are sampled together, as if alone."""
    lm, params = model(), SamplingConfig(max_tokens=6)
    for p in list(lm.parameters())[:2]:
        p.requires_grad_(False)
    requests = [Request(q.tokens, 3, i) for i, q in enumerate(questions(4))]
    before = LocalSampler(lm, TOKENIZER).sample(requests, params)
    worker = ThreadWorker(lm, TOKENIZER)
    shared = [a is b for a, b in zip(lm.parameters(), worker.model.parameters(), strict=True)]
    assert shared == [not p.requires_grad for p in lm.parameters()] and sum(shared) == 2
    begun, held = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        begun.set()
        held.wait(5)

    first = worker.submit(requests[:1], params, hold)
    assert begun.wait(20)
    old = [worker.submit([r], params) for r in requests[1:]]
    with torch.no_grad():
        for p in lm.parameters():
            if p.requires_grad:
                p.mul_(1.1)
    after = LocalSampler(lm, TOKENIZER).sample(requests, params)
    worker.update(3, trained_weights(lm))
    new = worker.submit(requests, params)
    assert worker.version == 3
    held.set()

    def same(found: list[RolloutGroup], expected: list[RolloutGroup], version: int) -> None:
        for group, other in zip(found, expected, strict=True):
            assert [r.tokens for r in group.rollouts] == [r.tokens for r in other.rollouts]
            assert {p.step for r in group.rollouts for p in r.pieces} == {version}

    same([first.result()[0], *(f.result()[0] for f in old)], before, 0)
    same(new.result(), after, 3)
    worker.close()
    worker.close()
    with pytest.raises(WorkerLost):
        worker.submit(requests, params).result()


def test_sampling_and_training_at_once_disturb_neither() -> None:
    """The compiled kernels' memory, and what backward remakes, belong to a thread: both sides get their own numbers."""
    lm, params = model(), SamplingConfig(max_tokens=24)
    requests = [Request(q.tokens, 6, i) for i, q in enumerate(questions(8))]
    cases = [
        Case(list(q.tokens), Rollout(list(range(9, 40)), [-5.0] * 31, "end"), i) for i, q in enumerate(questions())
    ]

    def gradients() -> torch.Tensor:
        lm.zero_grad()
        batch = lm.pack([c.sample(i) for i, c in enumerate(cases)])
        lm(batch, "cross_entropy", batch.targets_N, batch.weights_T[batch.targets_N])[0].backward()
        return torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None])

    expected, alone = gradients(), LocalSampler(lm, TOKENIZER).sample(requests, params)
    worker = ThreadWorker(lm, TOKENIZER)
    for _ in range(3):
        sampling = worker.submit(requests, params)
        while not sampling.done():
            torch.testing.assert_close(gradients(), expected, atol=1e-6, rtol=1e-5)
        for group, other in zip(sampling.result(), alone, strict=True):
            assert [r.tokens for r in group.rollouts] == [r.tokens for r in other.rollouts]
    worker.close()
