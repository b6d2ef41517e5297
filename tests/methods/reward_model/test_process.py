"""The process reward model stage: labels by Monte Carlo, the loss against a slow loop, learning, kills, use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification

from posttrain.config import DataConfig, ModelConfig, OptimizerConfig, SystemsConfig
from posttrain.core.files import read_lines
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.data.process_rows import PreparedChains, StepChain, chain_samples
from posttrain.methods.reward_model.process import ProcessRewardConfig, ProcessRewardStage, RowLabelsConfig
from posttrain.methods.reward_model.process_trainer import chain_loss
from posttrain.models.classification_head import open_head
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_tokenizer
from posttrain.rewards.model_rewards import StepReward
from posttrain.rewards.reward_model_scorer import ProcessReward
from posttrain.rewards.stack import RewardStack
from posttrain.runs.registry import prepare_stage
from posttrain.trainer.stage import StageContext
from posttrain.trainer.train_step import Learner

TOKENIZER = tiny_tokenizer()
SOURCE = ModelConfig(source="tiny:llama")


class Judge:
    """Right where no byte of three is in the text: about half of 60 random ones. `left`: calls until it breaks."""

    def __init__(self, left: int = 10**9) -> None:
        self.left, self.texts = left, list[str]()

    def __call__(self, text: str, example: dict[str, Any]) -> float:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        self.texts.append(text)
        return float("z" not in text and "Q" not in text and "7" not in text)


def settings(path: Path, **changes: Any) -> ProcessRewardConfig:
    file = path / "problems.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i} + {i} =", "answer": str(2 * i)}) + "\n" for i in range(12)))
    labels = {
        "kind": "rollouts",
        "problems": {"kind": "rows", "data": {"source": str(file), "rows": [0, 8]}},
        "held_out": {"kind": "rows", "data": {"source": str(file), "rows": [10, 12]}},
        "rewards": {"terms": [{"kind": "function", "name": "judge", "function": "judge"}]},
        "sampler": {"max_tokens": 60},
        "chains": 5,
        "completions": 5,
        "problems_per_batch": 4,
    }
    base: dict[str, Any] = {"labels": {**labels, **changes.pop("labels", {})}, "separator": "e", "batch_size": 4}
    return ProcessRewardConfig.model_validate({**base, "max_steps": 3, "checkpoint_every": 2, **changes})


def carry_out(config: ProcessRewardConfig, folder: Path, judge: Judge, on_step: Any = None) -> dict[str, Any]:
    made = prepare_stage(config, StageContext(TOKENIZER, 2048, {"judge": judge}))
    return made.run(SOURCE, folder, 5, on_step)


def test_labels_are_shares_of_completions_that_end_right_and_a_killed_run_asks_nothing_twice(tmp_path: Path) -> None:
    """Chains of random bytes with some steps. A text that holds a wrong byte is lost: all that goes on from it too."""
    config, judge = settings(tmp_path), Judge()
    told = carry_out(config, tmp_path / "calm", judge)
    rows = read_lines(tmp_path / "calm" / "labels" / "train.jsonl")
    assert [r["problem"] for r in rows] == list(range(8))
    assert len(read_lines(tmp_path / "calm" / "labels" / "held_out.jsonl")) == 2
    chains = [c for r in rows for c in r["chains"]]
    for c in chains:
        text = "".join(c["steps"])
        assert c["outcome"] == (not any(x in text for x in "zQ7")) and text in judge.texts
        assert all(s.endswith("e") for s in c["steps"][:-1])
        for k, target in enumerate(c["targets"]):
            last = k + 1 == len(c["steps"])
            before = "".join(c["steps"][: k + 1])
            assert c["of"][k] == (1 if last else 5) and target == c["right"][k] / c["of"][k]
            if any(x in before for x in "zQ7"):
                assert target == 0
            assert last or sum(t.startswith(before) for t in judge.texts) >= 6  # the chain, and five that go on
    everything = [c for f in ("train", "held_out") for r in read_lines(tmp_path / "calm" / "labels" / f"{f}.jsonl")
                  for c in r["chains"]]  # fmt: skip
    assert len(judge.texts) == len(everything) + sum(n for c in everything for n in c["of"][:-1])
    shares = [t for c in chains for t in c["targets"][:-1]]
    assert len(shares) > 8 and any(0 < t < 1 for t in shares), "no step to be unsure of: the test shows nothing"
    assert told["labels"]["steps"] == sum(len(c["targets"]) for c in chains)

    with pytest.raises(KeyboardInterrupt):
        carry_out(config, tmp_path / "killed", Judge(2 * len(judge.texts) // 3))
    assert len(read_lines(tmp_path / "killed" / "labels" / "train.jsonl")) == 4  # whole batches

    def stop(step: int, *_: Any) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(config, tmp_path / "killed", Judge(), stop)
    silent = Judge(0)  # everything is labelled: nobody is asked
    carry_out(config, tmp_path / "killed", silent)
    names = ["metrics.jsonl", "held_out.json", "held_out/before.jsonl", "held_out/after.jsonl"]
    for name in [*names, "labels/train.jsonl", "labels/held_out.jsonl", "reward_model/reward.json"]:
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "calm" / name).read_text(), name
    a, b = (load_file(tmp_path / w / "reward_model" / "model.safetensors") for w in ("calm", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_hard_labels_are_whether_any_ends_right(tmp_path: Path) -> None:
    carry_out(
        settings(tmp_path, labels={"targets": "hard", "held_out": None, "chains": 3}, max_steps=1),
        tmp_path / "out",
        Judge(),
    )
    chains = [c for r in read_lines(tmp_path / "out" / "labels" / "train.jsonl") for c in r["chains"]]
    for c in chains:
        assert c["targets"] == [float(n > 0) for n in c["right"]]
    assert any(0 < n < 5 for c in chains for n in c["right"][:-1])


def chains(count: int, seed: int = 0) -> list[StepChain]:
    """A step with a q in it is wrong, and so is everything behind it."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(count):
        wrong = int(torch.randint(0, 4, (1,), generator=g))
        steps = ["".join(chr(97 + int(x)) for x in torch.randint(0, 10, (5,), generator=g)) for _ in range(3)]
        steps = [(s[:2] + "q" + s[3:] if k == wrong else s) + "\n" for k, s in enumerate(steps)]
        prompt = TOKENIZER(f"<|im_start|>user\nproblem number {i // 2}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        out.append(StepChain(prompt, steps, [float(k < wrong) for k in range(3)], i // 2, f"made:{i}"))
    return out


def gradients(samples: list[Any], systems: SystemsConfig) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    model = LanguageModel(open_head(SOURCE, "token", 1)[0])
    one, found = Learner(model, OptimizerConfig(), systems, 4), dict[str, torch.Tensor]()

    def keep(norms: object = None) -> float:
        found.update({n: m.grad.clone() for n, m in one.optimizer.masters.items() if m.grad is not None})
        return 1.0

    one.optimizer.clip = keep  # type: ignore[method-assign]
    return one.step(samples, chain_loss).metrics, found


def test_loss_and_gradient_equal_a_slow_loop_and_no_split_changes_them() -> None:
    """Two chains of a problem share its prompt; a step without a label carries nothing.

    Of this seed, since its steps' gradients add up (1.5 times the sum in magnitudes): where they cancel (11 times, seed
    0), what float32 loses in the terms is large beside the sum, whoever adds them, and differs from machine to machine.
    """
    made = chains(5, seed=6)
    made[1] = StepChain(made[1].prompt, made[1].steps, [0.25, None, 1.0], made[1].group)
    samples = chain_samples(made, TOKENIZER)
    metrics, found = gradients(samples, SystemsConfig())
    hf = open_head(SOURCE, "token", 1)[0].eval()
    total, right = torch.zeros(()), 0
    for s in samples:
        logits = hf(input_ids=torch.tensor([list(s.tokens)])).logits[0, :, 0]
        for end, target in zip(s.meta["ends"], s.meta["targets"], strict=True):
            p = torch.sigmoid(logits[end])
            total = total - target * p.log() - (1 - target) * (1 - p).log()
            right += (float(p.detach()) >= 0.5) == (target >= 0.5)
    (total / 14).backward()
    assert metrics["loss_tokens"] == 14 and metrics["accuracy"] == pytest.approx(right / 14)
    assert metrics["loss"] == pytest.approx(float(total.detach()) / 14, abs=1e-5)
    for name, p in hf.named_parameters():
        torch.testing.assert_close(found[f"hf.{name}"], p.grad, atol=1e-5, rtol=1e-4)
    scale = max(float(g.abs().max()) for g in found.values())
    for systems in (SystemsConfig(tokens_per_micro_batch=1), SystemsConfig(share_prefixes=False)):
        other, again = gradients(samples[::-1], systems)
        assert other["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
        assert max(float((again[n] - g).abs().max()) for n, g in found.items()) <= 1e-6 * scale


def test_it_learns_where_chains_go_wrong_and_scores_as_it_was_trained(tmp_path: Path) -> None:
    config = settings(tmp_path, separator="\n", max_steps=40, epochs=30, batch_size=8,
                      optimizer={"lr": 1e-2}, checkpoint_every=100)  # fmt: skip
    train, rest = (PreparedChains(chain_samples(chains(n, seed), TOKENIZER)) for n, seed in ((120, 0), (24, 1)))
    labels = RowLabelsConfig(data=DataConfig(source="made here"))
    stage = ProcessRewardStage(config.model_copy(update={"labels": labels}), StageContext(TOKENIZER, 2048))
    stage.chains, stage.held_out = train, rest
    stage.index = {"kind": "process_reward", "members": [{"folder": "."}], "chat": True, "separator": "\n"}
    told = stage.run(SOURCE, tmp_path / "out", 0)
    before, after = told["held_out"]["before"], told["held_out"]["after"]
    assert before["auc"] < 0.85 and after["auc"] > 0.95 and after["accuracy"] > 0.9, told
    folder = tmp_path / "out" / "reward_model"
    model, item = ProcessReward(str(folder)), read_lines(tmp_path / "out" / "held_out" / "after.jsonl")[3]
    prompt, completion = "problem number 1", "".join(item["steps"])
    found = model.step_scores(prompt, completion)
    assert [completion[a:b] for a, b, _ in found] == item["steps"]
    assert [p for _, _, p in found] == pytest.approx(item["scores"], abs=1e-5)
    theirs = AutoModelForTokenClassification.from_pretrained(folder).eval()
    ids = TOKENIZER(item["prompt"] + completion, return_tensors="pt").input_ids
    ends = [len(TOKENIZER(item["prompt"] + completion[:b]).input_ids) - 1 for _, b, _ in found]
    assert theirs(ids).logits[0, ends, 0].sigmoid().tolist() == pytest.approx(item["scores"], abs=1e-4)
    scores = item["scores"]
    group = RolloutGroup([1], {"messages": [{"role": "user", "content": prompt}]},
                         [Rollout([1], [0.0], "end", t) for t in (completion, " ")])  # fmt: skip
    kinds = {"min": min(scores), "product": scores[0] * scores[1] * scores[2], "last": scores[2],
             "mean": sum(scores) / 3}  # fmt: skip
    by_step = RewardStack([StepReward.Config(source=str(folder), combine="steps")], tokenizer=TOKENIZER)
    tokens = tuple(TOKENIZER(completion).input_ids)  # a byte each
    rollout = Rollout(tokens, (0.0,) * len(tokens), "end", completion)
    (credited,) = by_step([RolloutGroup([1], group.example, [rollout])]).groups[0].rollouts
    assert credited.steps["process_reward"] == [(a, b, pytest.approx(p, abs=1e-5)) for a, b, p in found]
    assert credited.rewards["process_reward"] == pytest.approx(sum(scores) / 3, abs=1e-5)
    parts = [StepReward.Config(name=k, source=str(folder), combine=k) for k in kinds]  # type: ignore[arg-type]
    with RewardStack(parts) as stack:
        full, empty = stack([group]).groups[0].rollouts
    assert full.rewards == pytest.approx(kinds, abs=1e-5)
    assert set(empty.rewards.values()) == {0.0}


def test_labels_that_are_there_train_one_as_well(tmp_path: Path) -> None:
    """A file of steps with people's labels, some of them missing; held-out rows measured before and after."""
    rows = [
        {
            "prompt": f"{i} + 1 =",
            "steps": [f"think {i}", "so", str(i + 1)],
            "labels": [True, None if i % 3 else 0.5, i % 2],
        }
        for i in range(24)
    ]
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    labels = {"kind": "rows", "data": {"source": str(path), "rows": [0, 16]}}
    labels |= {"held_out": {"source": str(path), "rows": [16, 24]}}
    config = ProcessRewardConfig.model_validate({"labels": labels, "batch_size": 4, "max_steps": 3})
    told = prepare_stage(config, StageContext(TOKENIZER, 2048, {})).run(SOURCE, tmp_path / "out", 0, None)
    assert told["held_out"]["before"]["chains"] == 8 and told["held_out"]["after"]["steps"] == 8 * 2 + 2
    assert [m["step"] for m in read_lines(tmp_path / "out" / "metrics.jsonl")] == [0, 1, 2, 3]  # 0: before
    scores = [p for _, _, p in ProcessReward(str(tmp_path / "out" / "reward_model")).step_scores("1 + 1 =", "a\nb\n2")]
    assert len(scores) == 3 and all(0 < p < 1 for p in scores)


@pytest.mark.parametrize("template", [None, "Q: {question}\nA:"])
def test_prompts_are_asked_of_the_model_as_they_were_in_training(template: str | None, tmp_path: Path) -> None:
    """By the chat template, or by the problems' own: the scores of the held-out chains come again from their texts."""
    config = settings(tmp_path, max_steps=1, labels={"chains": 2, "completions": 2, "sampler": {"max_tokens": 30}})
    labels = config.model_dump()["labels"]
    for part in ("problems", "held_out"):
        labels[part]["template"] = template
    config = ProcessRewardConfig.model_validate({**config.model_dump(), "labels": labels})
    carry_out(config, tmp_path / "out", Judge())
    model = ProcessReward(str(tmp_path / "out" / "reward_model"))
    rows = read_lines(tmp_path / "out" / "labels" / "held_out.jsonl")
    items = read_lines(tmp_path / "out" / "held_out" / "after.jsonl")
    texts = [(r["prompt"], "".join(c["steps"])) for r in rows for c in r["chains"]]
    found = model.steps([p for p, _ in texts], [t for _, t in texts])
    assert len(items) == len(texts) and ("Q: " in items[0]["prompt"]) == (template is not None)
    for item, steps in zip(items, found, strict=True):
        assert [p for _, _, p in steps] == pytest.approx(item["scores"], abs=1e-5)
