"""Preference stages: steps however they are split, the reference's numbers, held-out preferences, online pairs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.config import OptimizerConfig, SystemsConfig
from posttrain.core.errors import DataError
from posttrain.core.types import Rollout, Sample
from posttrain.data.preference_rows import Pair, Unpaired
from posttrain.losses import preference_loss as pref
from posttrain.methods.preference.objectives import PRESETS, answer_sample, kto_loss, objective, pair_loss, pair_samples
from posttrain.methods.preference.offline import PreferenceConfig
from posttrain.methods.preference.online import OnlineDPOConfig
from posttrain.methods.preference.online_trainer import best_and_worst
from posttrain.methods.preference.pair_trainer import measure_preferences, preference_data, with_reference
from posttrain.methods.rl.sequence_logprobs import TrainingSequence
from posttrain.models.adapters import attach
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.runs.registry import prepare_stage
from posttrain.trainer import reference_model as reference_module
from posttrain.trainer.reference_model import Reference, answer_sums, fingerprint, sums_of, without_adapters
from posttrain.trainer.stage import StageContext
from posttrain.trainer.train_step import Learner, _units

PAIRED = sorted(set(PRESETS) - {"kto"})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def draw(rng: np.random.Generator, low: int, high: int) -> list[int]:
    return rng.integers(3, 250, int(rng.integers(low, high))).tolist()  # type: ignore[no-any-return]


def sample(prompt: list[int], answer: list[int]) -> Sample:
    return Sample([*prompt, *answer], [0.0] * len(prompt) + [1.0] * len(answer))


def random_pairs(count: int, seed: int = 0, soft: bool = False) -> list[Pair]:
    """Prompts of 18 to 40 tokens, so that they are shared, two answers of 1 to 25."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        prompt = draw(rng, 18, 40)
        a, b = draw(rng, 1, 25), draw(rng, 1, 25)
        p = float(rng.uniform(0.55, 1)) if soft else 1.0
        out.append(Pair(sample(prompt, a), sample(prompt, b), len(prompt), p, source=f"f:{i}"))
    return out


def random_answers(count: int, seed: int = 0) -> list[Unpaired]:
    return [Unpaired(p.chosen, p.prompt, i % 3 > 0, p.source) for i, p in enumerate(random_pairs(count, seed))]


def config_of(method: str, **settings: Any) -> PreferenceConfig:
    return PreferenceConfig.model_validate({"method": method, "data": {"source": "unused.jsonl"}, **settings})


def slow_logprob(model: Any, s: Sample, prompt: int) -> torch.Tensor:
    """Of a whole answer, by transformers' own forward."""
    ids = torch.tensor(s.tokens)
    logits = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
    return logits[prompt - 1 : -1].gather(1, ids[prompt:, None]).sum()  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------- the step
@pytest.mark.parametrize("method", PAIRED)
def test_a_step_does_not_depend_on_how_it_is_split(method: str) -> None:
    """Loss, metrics and gradient norm at 1e-6 from one pass to a pair a pass, prompts shared or not, in any order."""
    pairs = random_pairs(6, soft=True)
    frozen = LanguageModel(tiny_model("llama", seed=1))
    refs = sums_of(frozen, [pair_samples(p, i) for i, p in enumerate(pairs)], SystemsConfig())
    found = []
    for budget, share, order in ((4096, True, 1), (120, True, -1), (30, True, 1), (200, False, 1)):
        systems = SystemsConfig(tokens_per_micro_batch=budget, share_prefixes=share)
        learner = Learner(LanguageModel(tiny_model("llama")), OptimizerConfig(), systems, 1)
        what = objective(config_of(method))
        mine, given = pairs[::order], refs[::order]
        loss = pair_loss(what, mine, given if what.preset.reference else None)
        result = learner.step([s for n, p in enumerate(mine) for s in pair_samples(p, n)], loss)
        found.append(result)
        for name, value in result.metrics.items():
            assert value == pytest.approx(found[0].metrics[name], rel=2e-6, abs=2e-6), name
    assert [f.micro_batches for f in found][0] == 1 and found[2].micro_batches == 6
    assert found[0].computed_tokens < found[3].computed_tokens  # prompts once


def test_the_loss_of_a_step_by_the_model_s_own_forward() -> None:
    """DPO's loss, margin and accuracy, written down again from transformers' logits."""
    pairs, policy, frozen = random_pairs(4), tiny_model("llama"), tiny_model("llama", seed=1)
    losses, margins = [], []
    with torch.no_grad():
        for p in pairs:
            h = sum(
                sign * (slow_logprob(policy, s, p.prompt) - slow_logprob(frozen, s, p.prompt))
                for sign, s in ((1, p.chosen), (-1, p.rejected))
            )
            margins.append(0.1 * float(h))
            losses.append(math.log(1 + math.exp(-margins[-1])))
    units = [pair_samples(p, i) for i, p in enumerate(pairs)]
    refs = sums_of(LanguageModel(frozen), units, SystemsConfig())
    learner = Learner(LanguageModel(policy), OptimizerConfig(), SystemsConfig(), 1)
    result = learner.step([s for u in units for s in u], pair_loss(objective(config_of("dpo")), pairs, refs)).metrics
    assert result["loss"] == pytest.approx(sum(losses) / 4, abs=1e-6)
    assert result["margin"] == pytest.approx(sum(margins) / 4, abs=1e-5)
    assert result["log_ratio"] == pytest.approx(sum(margins) / 0.4, abs=1e-4)
    assert result["accuracy"] == sum(m > 0 for m in margins) / 4
    assert result["margin"] == pytest.approx(result["reward_chosen"] - result["reward_rejected"], abs=1e-6)


@pytest.mark.parametrize("method", PAIRED)
def test_every_loss_of_a_step_by_the_model_s_own_forward(method: str) -> None:
    """As the papers write them, soft labels q apart: sums or means over tokens, ratios or log-probabilities, the term
    for the chosen answer. Default numbers of each method, docs/preference.md."""
    pairs, policy, frozen = random_pairs(4), tiny_model("llama"), tiny_model("llama", seed=1)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    total = 0.0
    with torch.no_grad():
        for p in pairs:
            lengths = [len(s.tokens) - p.prompt for s in (p.chosen, p.rejected)]
            c, r = (float(slow_logprob(policy, s, p.prompt)) for s in (p.chosen, p.rejected))
            c_ref, r_ref = (float(slow_logprob(frozen, s, p.prompt)) for s in (p.chosen, p.rejected))
            c_mean, r_mean = c / lengths[0], r / lengths[1]
            h = (c - c_ref) - (r - r_ref)
            h_mean = (c - c_ref) / lengths[0] - (r - r_ref) / lengths[1]
            odds = (c_mean - math.log(1 - math.exp(c_mean))) - (r_mean - math.log(1 - math.exp(r_mean)))
            total += {
                "dpo": lambda h=h: -math.log(sigmoid(0.1 * h)),
                "cdpo": lambda h=h: -0.9 * math.log(sigmoid(0.1 * h)) - 0.1 * math.log(sigmoid(-0.1 * h)),
                "robust_dpo": lambda h=h: (-0.9 * math.log(sigmoid(0.1 * h)) + 0.1 * math.log(sigmoid(-0.1 * h))) / 0.8,
                "dpo_norm": lambda h=h_mean: -math.log(sigmoid(5.0 * h)),
                "ipo": lambda h=h_mean: (h - 1 / (2 * 0.1)) ** 2,
                "cpo": lambda c=c, r=r, m=c_mean: -math.log(sigmoid(0.1 * (c - r))) - m,
                "simpo": lambda c=c_mean, r=r_mean: -math.log(sigmoid(2.0 * (c - r) - 1.0)),
                "orpo": lambda o=odds, m=c_mean: -0.1 * math.log(sigmoid(o)) - m,
            }[method]()
    units = [pair_samples(p, i) for i, p in enumerate(pairs)]
    refs = sums_of(LanguageModel(frozen), units, SystemsConfig())
    learner, what = Learner(LanguageModel(policy), OptimizerConfig(), SystemsConfig(), 1), objective(config_of(method))
    given = refs if what.preset.reference else None
    result = learner.step([s for u in units for s in u], pair_loss(what, pairs, given)).metrics
    assert result["loss"] == pytest.approx(total / 4, rel=1e-5)


def test_kto_does_not_depend_on_how_it_is_split() -> None:
    answers = random_answers(7)
    given = preference_data(answers, 0, None, mismatch=True)
    refs = sums_of(LanguageModel(tiny_model("llama", seed=1)), given.units, SystemsConfig())
    found = []
    for budget in (4096, 90, 1):
        learner = Learner(
            LanguageModel(tiny_model("llama")), OptimizerConfig(), SystemsConfig(tokens_per_micro_batch=budget), 1
        )
        what = objective(config_of("kto", desirable_weight=1.3))
        samples = [answer_sample(a, n) for n, a in enumerate(answers)]
        found.append(learner.step(samples, kto_loss(what, answers, refs, 0.4)).metrics)
        assert found[-1] == pytest.approx(found[0], rel=2e-6, abs=2e-6)
    assert found[0]["kl"] == pytest.approx(0.4)
    losses = []
    with torch.no_grad():
        policy = tiny_model("llama")
        for a, (ref,) in zip(answers, refs, strict=True):
            over = 0.1 * (float(slow_logprob(policy, a.sample, a.prompt)) - ref - 0.4) * (1 if a.desirable else -1)
            losses.append((1.3 if a.desirable else 1.0) / (1 + math.exp(over)))
    assert found[0]["loss"] == pytest.approx(sum(losses) / 7, abs=1e-6)


def test_a_pair_stays_whole_whatever_the_budget() -> None:
    pairs = random_pairs(3)
    samples = [s for n, p in enumerate(pairs) for s in pair_samples(p, n)]
    assert [members for _, members in _units(samples, 1)] == [[0, 1], [2, 3], [4, 5]]
    sizes = [len(p.chosen) + len(p.rejected) - p.prompt for p in pairs]
    assert [size for size, _ in _units(samples, 10_000)] == sizes


def test_each_method_moves_what_it_means_to() -> None:
    """A few steps: the margin of the implicit rewards grows under every method, and its loss falls."""
    pairs = random_pairs(2)
    for method in PAIRED:
        policy = LanguageModel(tiny_model("llama"))
        units = [pair_samples(p, i) for i, p in enumerate(pairs)]
        what = objective(config_of(method, beta=1.0))
        refs = sums_of(policy, units, SystemsConfig()) if what.preset.reference else None
        learner = Learner(policy, OptimizerConfig(lr=3e-3, schedule="constant", warmup=0), SystemsConfig(), 5)
        steps = [learner.step([s for u in units for s in u], pair_loss(what, pairs, refs)).metrics for _ in range(5)]
        assert steps[-1]["margin"] > steps[0]["margin"] + 0.05, method
        assert steps[-1]["loss"] < steps[0]["loss"], method


# ------------------------------------------------------------------------------------------- the reference
def test_reference_numbers_are_kept_by_content(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = random_pairs(5)
    policy = LanguageModel(tiny_model("llama"))
    monkeypatch.setattr(reference_module, "UNITS_PER_CHUNK", 2)
    first = with_reference(Reference(policy, SystemsConfig()), preference_data(pairs, 0, None), "reference")
    plain = tiny_model("llama")
    with torch.no_grad():
        for p, (chosen, rejected) in zip(pairs, first.reference or [], strict=True):
            assert chosen == pytest.approx(float(slow_logprob(plain, p.chosen, p.prompt)), abs=1e-4)
            assert rejected == pytest.approx(float(slow_logprob(plain, p.rejected, p.prompt)), abs=1e-4)
    files = sorted(cache.rglob("*.npy"))
    assert len(files) == 3

    calls: list[int] = []
    real = sums_of

    def counted(model: LanguageModel, units: Any, systems: SystemsConfig) -> Any:
        calls.append(len(units))
        return real(model, units, systems)

    monkeypatch.setattr(reference_module, "sums_of", counted)
    again = with_reference(Reference(policy, SystemsConfig()), preference_data(pairs, 0, None), "reference")
    assert again.reference == first.reference and not calls  # nothing is computed twice
    files[1].write_bytes(files[1].read_bytes()[:-3])  # cut short: as if it were not there
    mended = with_reference(Reference(policy, SystemsConfig()), preference_data(pairs, 0, None), "reference")
    assert mended.reference == first.reference and len(calls) == 1
    other = LanguageModel(tiny_model("llama", seed=1))
    assert (
        with_reference(Reference(other, SystemsConfig()), preference_data(pairs, 0, None), "r").reference
        != first.reference
    )
    with_reference(Reference(policy, SystemsConfig()), preference_data(random_pairs(5, seed=9), 0, None), "r")
    assert len(calls) == 7  # another model, other rows: three chunks each


def test_sums_of_long_answers_are_kept_to_the_last_token(cache: Path) -> None:
    """Of a thousand nats float32 keeps 6e-5; the tokens' own numbers are added in float64 and stay so in the cache."""
    policy = LanguageModel(tiny_model("llama"))
    long, short = ([5 + i * step % 90 for i in range(100 + step)] for step in (20, 7))
    unit = pair_samples(Pair(sample([1, 2, 3], long), sample([1, 2, 3], short), 3), 0)
    with torch.no_grad():
        batch = policy.pack(list(unit))
        sums, lengths = answer_sums(policy, batch)
        rows = [row[torch.tensor(s.weights) != 0] for row, s in zip(batch.rows, unit, strict=True)]
        tokens = policy(batch, "logprobs", torch.cat(rows))[0].tolist()
    first, second = tokens[: len(rows[0])], tokens[len(rows[0]) :]
    assert sums.dtype == torch.float64 and lengths.tolist() == [len(first), len(second)]
    assert sums.tolist() == pytest.approx([math.fsum(first), math.fsum(second)], abs=1e-10)
    assert abs(math.fsum(first)) > 500
    for _ in range(2):  # as it is made, and from the cache
        assert Reference(policy, SystemsConfig()).sums([unit], "r") == [sums.tolist()]


def test_the_reference_of_adapters_is_the_model_below_them() -> None:
    """Switched off for it, whatever they have learnt; and the cache knows that it is the same model."""
    from posttrain.config import AdapterConfig

    bare, pairs = LanguageModel(tiny_model("llama")), random_pairs(3)
    units = [pair_samples(p, i) for i, p in enumerate(pairs)]
    policy = LanguageModel(attach(tiny_model("llama"), AdapterConfig(r=4), 0))
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(1))
    assert fingerprint(policy) == fingerprint(bare)
    expected = sums_of(bare, units, SystemsConfig())
    with without_adapters(policy):
        off = sums_of(policy, units, SystemsConfig())
    on = sums_of(policy, units, SystemsConfig())
    np.testing.assert_allclose(off, expected, atol=1e-4)
    assert np.abs(np.array(on) - np.array(expected)).max() > 0.1
    np.testing.assert_allclose(Reference(policy, SystemsConfig()).sums(units, "r"), expected, atol=1e-4)


def test_mismatched_answers() -> None:
    """Every prompt gets another item's answer; none that is its own, none that makes it too long."""
    answers = random_answers(9)
    made = preference_data(answers, 0, None, mismatch=True)
    for a, (m,) in zip(answers, made.mismatched, strict=True):
        assert list(m.tokens[: a.prompt]) == list(a.sample.tokens[: a.prompt]) and m.meta["shared"] == a.prompt
        assert list(m.tokens[a.prompt :]) != list(a.sample.tokens[a.prompt :])
    assert [list(u[0].tokens) for u in made.mismatched] == [
        list(u[0].tokens) for u in preference_data(answers, 0, None, mismatch=True).mismatched
    ]
    short = preference_data(answers, 0, 30, mismatch=True)
    assert all(len(m[0]) <= 30 for m in short.mismatched if m) and not all(short.mismatched)
    assert list(preference_data(answers[:1], 0, None, mismatch=True).mismatched) == [()]


# ------------------------------------------------------------------------------------------- held out
def test_held_out_by_hand() -> None:
    """A model that is its own reference tells nothing apart: half right, no margin. Another one: counted by hand."""
    pairs, frozen = random_pairs(5, seed=4), LanguageModel(tiny_model("llama"))
    given = with_reference(Reference(frozen, SystemsConfig()), preference_data(pairs, 0, None), "r")
    config = config_of("dpo")
    same = measure_preferences(objective(config), frozen, given, config)
    assert same["held_out/margin"] == pytest.approx(0, abs=1e-5)
    policy = tiny_model("llama", seed=2)
    margins = []
    with torch.no_grad():
        for p, (c, r) in zip(pairs, given.reference or [], strict=True):
            better, worse = (float(slow_logprob(policy, s, p.prompt)) for s in (p.chosen, p.rejected))
            margins.append(0.1 * ((better - c) - (worse - r)))
    found = measure_preferences(objective(config), LanguageModel(policy), given, config)
    assert found["held_out/accuracy"] == sum(m > 0 for m in margins) / 5
    assert found["held_out/margin"] == pytest.approx(sum(margins) / 5, abs=1e-5)
    assert found["held_out/loss"] == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins) / 5, abs=1e-5)
    what, data, plain = objective(config_of("orpo")), preference_data(pairs, 0, None), tiny_model("llama", seed=2)
    orpo = measure_preferences(what, LanguageModel(policy), data, config)
    with torch.no_grad():
        means = [
            [float(slow_logprob(plain, s, p.prompt)) / (len(s) - p.prompt) for s in (p.chosen, p.rejected)]
            for p in pairs
        ]
    odds = [[x - math.log(1 - math.exp(x)) for x in row] for row in means]
    losses = [0.1 * math.log(1 + math.exp(r - c)) - x for (c, r), (x, _) in zip(odds, means, strict=True)]
    assert orpo["held_out/loss"] == pytest.approx(sum(losses) / 5, abs=1e-5)


def test_held_out_labels_by_hand() -> None:
    """Single answers: of all couples of a good and a bad one, how many are ranked right."""
    answers, frozen = random_answers(6), LanguageModel(tiny_model("llama"))
    given = with_reference(Reference(frozen, SystemsConfig()), preference_data(answers, 0, None), "r")
    policy, config = tiny_model("llama", seed=2), config_of("kto")
    with torch.no_grad():
        rewards = [
            0.1 * (float(slow_logprob(policy, a.sample, a.prompt)) - ref)
            for a, (ref,) in zip(answers, given.reference or [], strict=True)
        ]
    couples = [
        rewards[i] - rewards[j] for i in range(6) for j in range(6) if answers[i].desirable and not answers[j].desirable
    ]
    found = measure_preferences(objective(config), LanguageModel(policy), given, config)
    assert found["held_out/accuracy"] == sum(c > 0 for c in couples) / len(couples) and len(couples) == 8
    assert found["held_out/margin"] == pytest.approx(sum(couples) / 8, abs=1e-5)
    signs = [1 if a.desirable else -1 for a in answers]
    losses = [1 - 1 / (1 + math.exp(-s * r)) for s, r in zip(signs, rewards, strict=True)]  # the baseline is 0 here
    assert found["held_out/loss"] == pytest.approx(sum(losses) / 6, abs=1e-5)


# ------------------------------------------------------------------------------------------- settings, getting ready
def test_methods_own_numbers_and_the_recipe_s() -> None:
    beta = {m: objective(config_of(m)).beta for m in PRESETS}
    assert beta == {**dict.fromkeys(PRESETS, 0.1), "dpo_norm": 5.0, "simpo": 2.0}
    assert objective(config_of("cdpo")).smoothing == 0.1 and objective(config_of("dpo")).smoothing == 0
    assert objective(config_of("robust_dpo", label_smoothing=0.2)).smoothing == 0.2
    assert [objective(config_of(m)).nll for m in ("dpo", "orpo", "cpo")] == [0, 1, 1]
    assert objective(config_of("cpo", nll_weight=0)).nll == 0  # 0 is a number of the recipe's, not a missing one
    assert {m for m in PRESETS if not objective(config_of(m)).preset.reference} == {"orpo", "simpo", "cpo"}
    for method, settings, message in (
        ("dpo", {"label_smoothing": 0.1}, "belongs to cdpo and robust_dpo, and this is dpo"),
        ("dpo", {"gamma": 1}, "gamma belongs to simpo"),
        ("kto", {"nll_weight": 1}, "kto's answers come singly"),
        ("orpo", {"desirable_weight": 2}, "belong to kto, and this is orpo"),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(method, **settings)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_held_out_rows_that_are_trained_on_are_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(6)]
    turned = {"prompt": "p", "chosen": "bad 3", "rejected": "good 3"}  # the same two answers
    trained, held = write(tmp_path / "a.jsonl", rows[:4]), write(tmp_path / "b.jsonl", [*rows[4:], turned])
    config = config_of("dpo", data={"source": trained}, held_out={"data": {"source": held}})
    setting = StageContext(tiny_tokenizer(), None)
    (_, one), (title, other) = prepare_stage(config, setting).data
    assert title == "preference held out" and (one.stats["used"], other.stats["used"]) == (4, 2)
    assert other.stats["dropped"] == {"trained on too": 1}
    same = config_of("dpo", data={"source": trained}, held_out={"data": {"source": trained}})
    with pytest.raises(DataError, match=r"4 of 4 held-out rows are trained on too \(for example a.jsonl:1\)"):
        prepare_stage(same, setting)


def test_kto_needs_both_kinds(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": f"{i}", "label": True} for i in range(3)]
    config = config_of("kto", data={"source": write(tmp_path / "a.jsonl", rows)})
    with pytest.raises(DataError, match="all 3 answers are good ones, and kto learns by telling good ones from bad"):
        prepare_stage(config, StageContext(tiny_tokenizer(), None))


@pytest.mark.parametrize(("good", "bad", "held"), [(2, 1, 0), (1, 1, 0), (2, 2, 2), (9, 2, 2)])
def test_a_fraction_of_few_answers_is_no_error(tmp_path: Path, good: int, bad: int, held: int) -> None:
    rows = [{"prompt": "p", "completion": f"{i}", "label": i < good} for i in range(good + bad)]
    config = config_of("kto", data={"source": write(tmp_path / "a.jsonl", rows)}, held_out=0.1)
    stage = prepare_stage(config, StageContext(tiny_tokenizer(), None))
    assert (len(stage.rows), len(stage.held_out)) == (good + bad - held, held)


# ------------------------------------------------------------------------------------------- online
def sequence(group: int, tokens: list[int], reward: float) -> TrainingSequence:
    return TrainingSequence([5, 6, 7], Rollout(tokens, [-1.0] * len(tokens), "end", reward=reward), group)


def test_the_best_is_preferred_to_the_worst_and_ties_give_nothing() -> None:
    given = [
        sequence(0, [1, 2], 0.5), sequence(0, [3], 1.0), sequence(0, [4], 1.0),
        sequence(0, [8], -1.0), sequence(0, [9], -1.0),
        sequence(1, [1], 1.0), sequence(1, [2], 1.0),  # rewards tie
        sequence(2, [1], 1.0), sequence(2, [1], 0.0),  # one completion, judged twice
        sequence(3, [], 0.0), sequence(3, [1], 1.0),  # nothing was said
    ]  # fmt: skip
    (pair,) = best_and_worst(given)
    assert list(pair.chosen.tokens) == [5, 6, 7, 3] and list(pair.rejected.tokens) == [5, 6, 7, 9]
    assert (pair.prompt, pair.margin, list(pair.chosen.weights)) == (3, 2.0, [0, 0, 0, 1])


def test_online_settings() -> None:
    given = {"problems": {"kind": "lab"}, "rewards": {"terms": [{"kind": "exact"}]}}
    config = OnlineDPOConfig.model_validate({**given, "loss": "simpo", "gamma": 0.5, "group_size": 4})
    what = objective(config)
    assert not what.preset.reference and (what.gamma, what.beta) == (0.5, 2.0)
    assert config.group_size == 4
    for changes, message in (
        ({"gamma": 1}, "gamma belongs to simpo"),
        ({"sampler": {"temperature": 0}}, "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            OnlineDPOConfig.model_validate({**given, **changes})


def test_prompts_without_a_pair_count_as_zeros_of_the_mean() -> None:
    pairs = random_pairs(3)
    units = [pair_samples(p, i) for i, p in enumerate(pairs)]
    losses = []
    for count in (3, 6):
        learner = Learner(LanguageModel(tiny_model("llama")), OptimizerConfig(), SystemsConfig(), 1)
        loss = pair_loss(objective(config_of("simpo")), pairs, None, count)
        losses.append(learner.step([s for u in units for s in u], loss).metrics)
    assert losses[1]["loss"] == pytest.approx(losses[0]["loss"] / 2)
    assert losses[1]["margin"] == pytest.approx(losses[0]["margin"])  # means of what there is
    assert float(pref.dpo(torch.zeros(1))) == pytest.approx(math.log(2))
