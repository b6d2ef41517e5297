"""The reward model stage: the loss against a slow loop, splits that change nothing, learning, kills, ensembles, use."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import posttrain
from posttrain.config import ModelConfig, OptimizerConfig, SystemsConfig
from posttrain.core.errors import DataError
from posttrain.core.files import read_lines
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.data.preference_rows import Pair, prepare_pairs
from posttrain.losses.reward_loss import combine_members
from posttrain.methods.reward_model.pairwise import RewardModelConfig, RewardModelStage
from posttrain.methods.reward_model.pairwise_trainer import bradley_terry_loss, scored_samples, with_room_for
from posttrain.models.classification_head import open_head
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_tokenizer
from posttrain.rewards.model_rewards import ScalarReward
from posttrain.rewards.reward_model_scorer import RewardModel
from posttrain.rewards.stack import RewardStack
from posttrain.trainer.stage import StageContext
from posttrain.trainer.train_step import Learner

TOKENIZER = tiny_tokenizer()


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Random letters; the better answer has q, r or s among its. Lengths differ; prompts are long enough to share."""
    rng = random.Random(seed)

    def letters(n: int) -> list[str]:
        return [rng.choice("abcdefghij ") for _ in range(n)]

    out = []
    for _ in range(count):
        good, bad = letters(rng.randrange(4, 14)), letters(rng.randrange(4, 14))
        good = [rng.choice("qrs") if rng.random() < 0.4 else c for c in good] + ["q"]
        bad = [*bad, "a"]
        strength = {"probability": rng.choice([1.0, 0.9]), "margin": rng.choice([0.0, 0.5])}
        out.append(
            {"prompt": "".join(letters(20)), "chosen": "x" + "".join(good), "rejected": "x" + "".join(bad), **strength}
        )
    return out


def write(path: Path, content: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in content))
    return str(path)


def settings(path: Path, **changes: Any) -> RewardModelConfig:
    source = write(path / "pairs.jsonl", rows(260, 0))
    base: dict[str, Any] = {
        "data": {"source": source, "rows": [0, 200]},
        "held_out": {"source": source, "rows": [200, 230]},
        "evaluate_every": 8,
    }
    base |= {"batch_size": 8, "max_steps": 6, "optimizer": {"lr": 1e-3}, "checkpoint_every": 100}
    return RewardModelConfig.model_validate({**base, **changes})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and held-out ones."""
    config = settings(tmp_path_factory.mktemp("pairs"))
    assert config.held_out is not None
    return tuple(prepare_pairs(d, TOKENIZER, context=2048).items for d in (config.data, config.held_out))  # type: ignore[return-value]


def carry_out(
    config: RewardModelConfig, pairs: list[Pair], held_out: list[Pair], folder: Path, seed: int = 0, on_step: Any = None
) -> dict[str, Any]:
    stage = RewardModelStage(config, StageContext(TOKENIZER, 2048))
    stage.rows, stage.held_out = pairs, held_out
    return stage.run(ModelConfig(source="tiny:llama"), folder, seed, on_step)


def gradients(config: RewardModelConfig, pairs: list[Pair], systems: SystemsConfig) -> tuple[dict[str, float], Any]:
    model = LanguageModel(open_head(ModelConfig(source="tiny:llama"), "sequence", 1)[0])
    one = Learner(
        model, OptimizerConfig(), with_room_for(systems, model, [len(p.chosen) + len(p.rejected) for p in pairs]), 4
    )
    found: dict[str, torch.Tensor] = {}

    def keep(norms: object = None) -> float:
        found.update({n: m.grad.clone() for n, m in one.optimizer.masters.items() if m.grad is not None})
        return 1.0

    one.optimizer.clip = keep  # type: ignore[method-assign]
    samples = [s for i, p in enumerate(pairs) for s in scored_samples(p, i, 0)]
    return one.step(samples, bradley_terry_loss(config)).metrics, found


def test_hard_labels_count_as_certain(prepared: tuple[list[Pair], list[Pair]]) -> None:
    pairs = [p for p in prepared[0] if p.probability == 0.9][:2]
    soft, hard = (
        [s.meta["p"] for i, p in enumerate(pairs) for s in scored_samples(p, i, 0, certain)]
        for certain in (False, True)
    )
    assert soft == [0.9] * 4 and hard == [1.0] * 4


def test_a_stage_with_hard_labels_trains_as_on_rows_without_probabilities(
    prepared: tuple[list[Pair], list[Pair]], tmp_path: Path
) -> None:
    config = settings(tmp_path, labels="hard", max_steps=2, train=["*.down_proj"])
    pairs, held_out = prepared
    certain = [replace(p, probability=1.0) for p in pairs]
    entry = carry_out(config, pairs, held_out, tmp_path / "hard")
    sizes = {n: p.numel() for n, p in open_head(ModelConfig(source="tiny:llama"), "sequence")[0].named_parameters()}
    assert entry["trainable"] == sum(n for name, n in sizes.items() if "down_proj" in name or "score" in name)
    carry_out(config.model_copy(update={"labels": "soft"}), certain, held_out, tmp_path / "soft")
    one, two = (json.loads((tmp_path / f / "held_out.json").read_text())["after"] for f in ("hard", "soft"))
    assert one == two


def test_loss_and_gradient_equal_a_slow_loop_through_transformers(
    prepared: tuple[list[Pair], list[Pair]], tmp_path: Path
) -> None:
    """One sequence at a time through transformers' own model; formulas written out with plain numbers."""
    config = settings(tmp_path, margin_scale=2.0, centring=0.1)
    pairs = prepared[0][3:8]
    assert {p.probability for p in pairs} == {1.0, 0.9} and {p.margin for p in pairs} == {0.0, 0.5}
    metrics, found = gradients(config, pairs, SystemsConfig())
    hf = open_head(ModelConfig(source="tiny:llama"), "sequence", 1)[0]
    total, margins, right = torch.zeros(()), 0.0, 0.0
    for p in pairs:
        c, r = (hf(input_ids=torch.tensor([list(s.tokens)])).logits[0, 0] for s in (p.chosen, p.rejected))
        s = torch.sigmoid(c - r - 2.0 * p.margin)
        total = total - p.probability * s.log() - (1 - p.probability) * (1 - s).log() + 0.1 * (c + r) ** 2
        margins, right = margins + float(c - r), right + float(c > r)
    (total / 5).backward()
    assert metrics["loss"] == pytest.approx(float(total) / 5, abs=1e-5)
    assert metrics["margin"] == pytest.approx(margins / 5, abs=1e-5) and metrics["accuracy"] == right / 5
    assert metrics["loss_tokens"] == 5  # pairs
    for name, p in hf.named_parameters():
        torch.testing.assert_close(found[f"hf.{name}"], p.grad, atol=1e-5, rtol=1e-4)


def test_the_step_is_the_same_for_any_budget_order_and_sharing(
    prepared: tuple[list[Pair], list[Pair]], tmp_path: Path
) -> None:
    """To 1e-6 outright, not of the largest gradient: what the two answers pull at in their prompt cancels out."""
    config = settings(tmp_path)
    pairs = prepared[0][:6]
    metrics, expected = gradients(config, pairs, SystemsConfig(tokens_per_micro_batch=100_000))
    variants = [SystemsConfig(tokens_per_micro_batch=n) for n in (1, 130)] + [SystemsConfig(share_prefixes=False)]
    for order, systems in [(pairs, v) for v in variants] + [(pairs[::-1], variants[1])]:
        other, found = gradients(config, order, systems)
        assert other["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
        for name, g in expected.items():
            assert float((found[name] - g).abs().max()) <= 1e-6, (systems, name)


def test_a_prompt_is_computed_once_for_both_answers(prepared: tuple[list[Pair], list[Pair]]) -> None:
    pair = prepared[0][0]
    model = LanguageModel(open_head(ModelConfig(source="tiny:llama"), "sequence")[0])
    batch = model.pack(scored_samples(pair, 0, 0))
    assert batch.total <= len(pair.chosen) + len(pair.rejected) - pair.prompt


class Killed(Exception):
    pass


@pytest.mark.parametrize("adapter", [pytest.param(None, marks=pytest.mark.long), {"r": 4}], ids=["full", "lora"])
def test_it_learns_an_easy_preference_and_what_was_killed_ends_in_the_same_bits(
    adapter: dict[str, int] | None, prepared: tuple[list[Pair], list[Pair]], tmp_path: Path
) -> None:
    config = settings(tmp_path, adapter=adapter, max_steps=20, epochs=9, checkpoint_every=12,
                      optimizer={"lr": 5e-2 if adapter else 1e-2})  # fmt: skip
    pairs, held_out = prepared
    told = carry_out(config, pairs, held_out, tmp_path / "calm", seed=3)
    before, after = told["held_out"]["before"], told["held_out"]["after"]
    assert before["accuracy"] < 0.75 and after["accuracy"] > 0.93, told
    steps = [m["step"] for m in read_lines(tmp_path / "calm" / "metrics.jsonl") if "held_out/accuracy" in m]
    assert steps == [0, 8, 16, 20]

    def kill(step: int, *_: Any) -> None:
        if step == 13:
            raise Killed

    with pytest.raises(Killed):
        carry_out(config, pairs, held_out, tmp_path / "killed", seed=3, on_step=kill)
    carry_out(config, pairs, held_out, tmp_path / "killed", seed=3)
    for name in ("metrics.jsonl", "held_out.json", "held_out/before.jsonl", "held_out/after.jsonl",
                 "reward_model/reward.json"):  # fmt: skip
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "calm" / name).read_text(), name
    a, b = (load_file(tmp_path / w / "reward_model" / "model.safetensors") for w in ("calm", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert "score.weight" in a and not any("lora" in n for n in a)


def test_an_ensemble_and_its_use_as_a_reward(prepared: tuple[list[Pair], list[Pair]], tmp_path: Path) -> None:
    """Members differ; what the stage measured is what the reward gives on the same answers, rendered from text."""
    config = settings(tmp_path, members=2, adapter={"r": 4}, max_steps=3)
    pairs, held_out = prepared
    folder = tmp_path / "stage"
    carry_out(config, pairs, held_out, folder)
    assert not (folder / "members").exists()
    assert sorted(p.name for p in (folder / "reward_model").iterdir()) == ["0", "1", "reward.json"]
    items = read_lines(folder / "held_out" / "after.jsonl")
    index = json.loads((folder / "reward_model" / "reward.json").read_text())["members"]
    prompts, answers = [i["prompt"] for i in items], [i["chosen_text"] for i in items]
    ensemble = RewardModel(str(folder / "reward_model"))
    scores = ensemble.scores(prompts, answers).double()
    torch.testing.assert_close(scores.T, torch.tensor([[e[0] for e in i["each"]] for i in items]).double(),
                               atol=1e-5, rtol=0)  # fmt: skip
    assert float((scores[0] - scores[1]).abs().max()) > 1e-3
    assert ensemble(prompts, answers) == pytest.approx([i["chosen"] for i in items], abs=1e-5)
    centred = scores - torch.tensor([[m["mean"]] for m in index])
    normed = centred / torch.tensor([[m["std"]] for m in index])
    for kind in ("min", "conservative"):
        made = RewardModel(str(folder / "reward_model"), combine=kind, spread=2.0)(prompts, answers)
        assert made == pytest.approx(combine_members(centred, kind, 2.0).tolist(), abs=1e-5)
    part = ScalarReward.Config(source=str(folder / "reward_model"), normalise=True)
    groups = [
        RolloutGroup([1], {"messages": [{"role": "user", "content": p}]}, [Rollout([1], [0.0], "end", a)])
        for p, a in zip(prompts, answers, strict=True)
    ]
    with RewardStack([part]) as stack:
        found = [g.rollouts[0].rewards["reward_model"] for g in stack(groups).groups]
    assert found == pytest.approx(normed.mean(0).tolist(), abs=1e-5)
    single = RewardModel([str(folder / "reward_model" / "0")], normalise=True)
    assert single(prompts[:3], answers[:3]) == pytest.approx(normed[0, :3].tolist(), abs=1e-5)


def test_empty_and_overlong_completions_are_scored_or_said(
    prepared: tuple[list[Pair], list[Pair]], tmp_path: Path
) -> None:
    config = settings(tmp_path, held_out=None, max_steps=2)
    told = carry_out(config, prepared[0], [], tmp_path / "stage")
    assert "held_out" not in told and not (tmp_path / "stage" / "held_out.json").exists()
    model = RewardModel(str(tmp_path / "stage" / "reward_model"))
    (empty,) = model(["hello"], [""])
    hf = open_head(ModelConfig(source=str(tmp_path / "stage" / "reward_model")), "sequence")[0]
    ids = TOKENIZER(
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<|im_end|>", return_tensors="pt"
    ).input_ids
    assert empty == pytest.approx(float(hf(input_ids=ids).logits), abs=1e-4)
    alone = AutoModelForSequenceClassification.from_pretrained(tmp_path / "stage" / "reward_model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "stage" / "reward_model")
    for prompt, answer in (("hello", "good day"), ("how are you?", "bad\nweather ")):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)  # as every tutorial has it
        assert model([prompt], [answer]) == pytest.approx([float(alone(**ids).logits)], abs=1e-4)
    with pytest.raises(DataError, match=r"\d+ tokens, and the reward model reads 1 to 2048"):
        model(["hello"], ["a" * 3000])


def test_held_out_pairs_that_are_trained_on_are_left_out(tmp_path: Path) -> None:
    source = write(tmp_path / "pairs.jsonl", rows(40, 0))
    stage = {"method": "reward_model", "data": {"source": source, "rows": [0, 30]}, "max_steps": 1, "batch_size": 4}
    recipe = {"name": "r", "model": {"source": "tiny:llama"}}
    held = {"data": {"source": source, "rows": [20, 40]}}
    made = posttrain.Recipe.model_validate({**recipe, "stages": [{**stage, "held_out": held}]})
    result = posttrain.run(made, tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["data"][1]["dropped"] == {"trained on too": 10} and manifest["data"][1]["used"] == 10
    assert manifest["stages"][0]["held_out"]["after"]["pairs"] == 10
    assert not result.model.exists() and manifest["status"] == "done"  # a run that makes no policy
    inside = posttrain.Recipe.model_validate(
        {**recipe, "stages": [{**stage, "held_out": {"data": {"source": source, "rows": [0, 10]}}}]}
    )
    with pytest.raises(DataError, match="10 of 10 held-out rows are trained on too"):
        posttrain.run(inside, tmp_path / "other")
