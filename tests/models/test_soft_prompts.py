"""Soft prompts: the same loss and gradients as a slow loop and as peft, however a step is split; saved and opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from pydantic import ValidationError

from posttrain.config import (
    AdapterConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    SamplingConfig,
    SystemsConfig,
    TrainConfig,
)
from posttrain.core.errors import ModelError
from posttrain.core.ragged import VirtualTokens, pack
from posttrain.core.types import Sample
from posttrain.methods.sft import SFT, SFTConfig
from posttrain.models.adapters import attach, count_parameters, merge
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_model
from posttrain.models.saving import save_trained
from posttrain.models.soft_prompt import soft_prompt_inputs
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.models.verification import own_attention, verify
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request
from posttrain.trainer.stage import StageContext
from posttrain.trainer.token_budget import token_budget
from posttrain.trainer.train_step import Learner, cross_entropy
from tests.conftest import family, random_samples

KINDS: dict[str, dict[str, Any]] = {
    "prompt": {"kind": "prompt", "tokens": 5},
    "prefix": {"kind": "prefix", "tokens": 5, "hidden": 24},
    "p_tuning_v2": {"kind": "p_tuning_v2", "tokens": 5},
    "p_tuning": {"kind": "p_tuning", "template": "{v:2}{context}{v:3}{target}", "hidden": 12},
    "p_tuning in front": {"kind": "p_tuning", "template": "{v:4}{context}{target}"},
}
IN_PEFT = [kind for kind in KINDS if kind != "p_tuning"]
FAMILIES = ["llama", "qwen3", "gemma2", "gpt2"]


def adapted(kind: str, family: str = "llama") -> LanguageModel:
    hf = attach(tiny_model(family), AdapterConfig(**KINDS[kind]), seed=1, tokenizer=tiny_tokenizer())
    return LanguageModel(hf)


def learner(kind: str, systems: SystemsConfig | None = None) -> Learner:
    return Learner(adapted(kind), OptimizerConfig(lr=1e-2), systems or SystemsConfig(), 10)


def gradients(kind: str, samples: list[Sample], systems: SystemsConfig) -> tuple[float, dict[str, torch.Tensor]]:
    one, found = learner(kind, systems), dict[str, torch.Tensor]()

    def keep(norms: object) -> float:
        found.update({n: m.grad.clone() for n, m in one.optimizer.masters.items() if m.grad is not None})
        return 1.0

    one.optimizer.clip = keep  # type: ignore[method-assign]
    return one.step(samples).metrics["loss"], found


def slow_loss(model: LanguageModel, samples: list[Sample]) -> torch.Tensor:
    """One sequence at a time through transformers alone, the virtual tokens put in by hand."""
    total, virtual = torch.zeros(()), model.virtual
    assert virtual is not None
    with own_attention(model):
        for s in samples:
            target = next(i for i, w in enumerate(s.weights) if w)
            tokens = torch.tensor([s.tokens])
            inputs = soft_prompt_inputs(model.hf, tokens, target)
            if not virtual.computed:
                inputs["input_ids"] = tokens
            logits = model.base(**inputs).logits[0]
            places = [
                i + (virtual.front + virtual.before_target * (i >= target)) * virtual.computed for i in range(len(s))
            ]
            for i in range(1, len(s)):
                predictor = places[i] - 1
                total = total - s.weights[i] * logits[predictor].log_softmax(-1)[s.tokens[i]]
    return total / sum(sum(s.weights) for s in samples)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_equal_a_slow_loop(kind: str) -> None:
    samples = random_samples(4)
    model = adapted(kind)
    expected = slow_loss(model, samples)
    expected.backward()
    loss, found = gradients(kind, samples, SystemsConfig())
    assert loss == pytest.approx(float(expected.detach()), abs=1e-5)
    wanted = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert wanted.keys() == found.keys() and all("prompt_encoder" in name for name in found)
    for name, g in wanted.items():
        assert g is not None and g.any(), name
        assert float((found[name] - g).abs().max()) < 1e-5, name


@pytest.mark.parametrize("kind", IN_PEFT)
def test_loss_and_gradient_equal_pefts(kind: str) -> None:
    """A padded batch through peft's own forward pass, with its own loss."""
    samples, model = random_samples(4), adapted(kind)
    width = max(len(s) for s in samples)
    ids = torch.zeros(4, width, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, s in enumerate(samples):
        n, tokens = len(s), torch.tensor(s.tokens)
        ids[i, :n], mask[i, :n] = tokens, 1
        labels[i, :n] = torch.where(torch.tensor(s.weights) > 0, tokens, -100)
    with own_attention(model):
        theirs = model.hf(input_ids=ids, attention_mask=mask, labels=labels).loss
    theirs.backward()
    loss, found = gradients(kind, samples, SystemsConfig())
    assert loss == pytest.approx(float(theirs.detach()), abs=1e-5)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and float((found[name] - p.grad).abs().max()) < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [lambda: random_samples(9), family], ids=["apart", "sharing"])
def test_the_step_is_the_same_for_any_split(kind: str, make: Any) -> None:
    samples = make()
    loss, expected = gradients(kind, samples, SystemsConfig(tokens_per_micro_batch=100_000))
    norm = sum(float(g.square().sum()) for g in expected.values()) ** 0.5
    for systems in (
        SystemsConfig(tokens_per_micro_batch=1),
        SystemsConfig(share_prefixes=False),
        SystemsConfig(tokens_per_micro_batch=64, activation_checkpointing=True),
    ):
        other, found = gradients(kind, samples, systems)
        assert other == pytest.approx(loss, rel=1e-6)
        apart = sum(float((found[name] - g).square().sum()) for name, g in expected.items()) ** 0.5
        assert apart <= 2e-6 * norm, systems


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["prompt", "p_tuning", "p_tuning_v2"])
def test_every_model_type_agrees_with_transformers(kind: str, family: str) -> None:
    """`verify` compares the ragged pass with transformers' ; gemma2 has soft caps and windows."""
    assert verify(adapted(kind, family)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_virtual_tokens_alone(kind: str) -> None:
    one, samples = learner(kind), random_samples(4)
    before = {n: p.detach().clone() for n, p in one.model.named_parameters() if not p.requires_grad}
    losses = [one.step(samples).metrics["loss"] for _ in range(4)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[n]) for n, p in one.model.named_parameters() if n in before)
    trained = {"prompt": 5 * 32, "p_tuning_v2": 5 * 2 * 2 * 16, "prefix": 5 * 16 + 16 * 24 + 24 + 24 * 64 + 64}
    assert count_parameters(one.model)[1] == trained.get(kind, count_parameters(one.model)[1])


def saved(kind: str, folder: Path) -> tuple[LanguageModel, Path]:
    one = learner(kind)
    for _ in range(2):
        one.step(random_samples(4))
    config = AdapterConfig(**KINDS[kind])
    save_trained(
        one.model, tiny_tokenizer(), ModelConfig(source="tiny:llama"), folder / "model", config, False, 1, None
    )
    return LanguageModel(one.model.hf), folder / "model"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_opens_again(kind: str, tmp_path: Path) -> None:
    trained, folder = saved(kind, tmp_path)
    opened = LanguageModel(load_model(ModelConfig(source=str(folder)))[0])
    batch = trained.pack(random_samples(3))
    with torch.no_grad():
        assert torch.allclose(trained(batch)[0], opened(opened.pack(random_samples(3)))[0], atol=1e-6)
    if kind == "p_tuning":
        with pytest.raises(KeyError, match="POSTTRAIN_P_TUNING"):
            PeftModel.from_pretrained(tiny_model("llama"), folder)
        return
    theirs = PeftModel.from_pretrained(tiny_model("llama").eval(), folder)
    tokens = torch.tensor([random_samples(1)[0].tokens])
    logits = theirs(input_ids=tokens).logits[:, -tokens.shape[1] :]
    hidden = opened(opened.pack([Sample(tokens[0].tolist(), [0.0] * tokens.shape[1])]), "hidden")
    ours = hidden[-tokens.shape[1] :] @ opened.base.get_output_embeddings().weight.T
    assert float((logits[0] - ours).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_sampler_continues_a_soft_prompt(kind: str) -> None:
    """Greedy answers are those of transformers' generate; several completions share a prompt; probabilities agree."""
    model = adapted(kind).eval()
    sampler = LocalSampler(model, tiny_tokenizer())
    sampler.ends, model.base.generation_config.eos_token_id = frozenset(), None
    prompts = [s.tokens[:n] for s, n in zip(random_samples(3, low=30), (4, 9, 25), strict=True)]
    params = SamplingConfig(temperature=0.0, max_tokens=6)
    groups = sampler.sample([Request(p, 1 + i) for i, p in enumerate(prompts)], params)
    singles = sampler.sample([Request(p) for p in prompts], params)
    for prompt, group, single in zip(prompts, groups, singles, strict=True):
        with own_attention(model), torch.no_grad():
            inputs = soft_prompt_inputs(model.hf, torch.tensor([prompt]))
            first = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
            options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
            mask = torch.ones(next(iter(inputs.values())).shape[:2], dtype=torch.long)
            theirs = model.base.generate(**inputs, attention_mask=mask, **options)[0, first:].tolist()
        assert all(list(r.tokens) == theirs for r in [*group.rollouts, *single.rollouts])
        rollout = group.rollouts[0]
        sample = Sample([*prompt, *rollout.tokens], [0.0] * len(prompt) + [1.0] * 6)
        batch = model.pack([sample])
        with torch.no_grad():
            assert torch.allclose(model(batch)[0], torch.tensor(rollout.logprobs), atol=1e-5)


@pytest.mark.parametrize("kind", ["prompt", "p_tuning_v2"])
def test_steps_of_few_shapes_see_the_soft_prompt(kind: str) -> None:
    model, params = adapted(kind).eval(), SamplingConfig(temperature=1.0, max_tokens=6)
    requests = [Request([5, 6, 7], 3, seed=1), Request([8, 9, 10, 11], 2, seed=2)]
    plain, static = (
        LocalSampler(model, tiny_tokenizer(), static_shapes=static).sample(requests, params) for static in (False, True)
    )
    assert [[r.tokens for r in g.rollouts] for g in plain] == [[r.tokens for r in g.rollouts] for g in static]


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    ],
    ids=["prompt", "prefix with an MLP", "prefix", "p_tuning by an MLP"],
)
def test_what_peft_made_and_saved_opens(config: Any, tmp_path: Path) -> None:
    theirs = get_peft_model(tiny_model("llama").eval(), config)
    theirs.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "tiny:llama"}))
    ours = LanguageModel(load_model(ModelConfig(source=str(tmp_path)))[0])
    sample = random_samples(1)[0]
    tokens = torch.tensor([sample.tokens])
    expected = theirs(input_ids=tokens).logits[0, -len(sample) :].log_softmax(-1)
    batch = ours.pack([sample])
    with torch.no_grad():
        found = ours(batch, targets_N=batch.rows[0][1:])[0]
    assert torch.allclose(found, expected[:-1].gather(1, tokens[0, 1:, None])[:, 0], atol=1e-5)


def test_a_sequence_that_the_context_does_not_hold_is_refused() -> None:
    model = adapted("prompt", "gpt2")
    room = model.base.config.n_positions - 5
    tokens = [5] * (room + 1)
    with pytest.raises(ModelError, match="positions with the soft prompt, and the model's context is"):
        model(model.pack([Sample(tokens, [0.0] * len(tokens))]), "hidden")
    assert model(model.pack([Sample(tokens[1:], [0.0] * room)]), "hidden").shape[0] == room + 5
    context = StageContext(None, 100)
    assert SFT(SFTConfig(data={"source": "a"}, adapter=KINDS["p_tuning"]), context).context.context == 95
    with pytest.raises(ModelError, match="99 virtual tokens leave no room"):
        SFT(SFTConfig(data={"source": "a"}, adapter={"kind": "prompt", "tokens": 99}), context)


def test_the_token_budget_counts_virtual_tokens() -> None:
    """Those inside each sequence; those in front, which each pass computes anew, are a small part of it."""
    samples = [Sample([5] * 10, [0.0] * 5 + [1.0] * 5) for _ in range(6)]
    config = AdapterConfig(kind="p_tuning", template="{context}{v:50}{target}")
    hf = attach(tiny_model("llama"), config, 0)
    systems = SystemsConfig(tokens_per_micro_batch=130, share_prefixes=False)
    result = Learner(LanguageModel(hf), OptimizerConfig(), systems, 1).step(samples)
    assert (result.micro_batches, result.computed_tokens) == (3, 360)
    for tokens, budget in ((20, 768), (100, 1600)):
        config = AdapterConfig(kind="prompt", tokens=tokens, init="random")
        assert token_budget(SystemsConfig(), LanguageModel(attach(tiny_model("llama"), config, 0))) == budget
    assert token_budget(SystemsConfig(), adapted("prefix")) == 768


def test_initial_values() -> None:
    tokenizer, hf = tiny_tokenizer(), tiny_model("llama")
    rows = hf.get_input_embeddings().weight

    def start(**settings: Any) -> torch.Tensor:
        model = attach(hf, AdapterConfig(kind="prompt", **settings), seed=3, tokenizer=tokenizer)
        weight: torch.Tensor = model.prompt_encoder["default"].embedding.weight.detach()
        return weight

    ids = tokenizer("ab", add_special_tokens=False)["input_ids"]
    text = start(init="text", text="ab", tokens=5)
    assert torch.equal(text, rows[(ids * 5)[:5]])
    labels = start(init="labels", labels=["ab", "a"], tokens=3)
    assert torch.allclose(labels[0], rows[ids].mean(0)) and (labels[2] == rows).all(1).any()
    drawn = start(tokens=50)
    assert all((row == rows).all(1).any() for row in drawn) and torch.equal(drawn, start(tokens=50))
    random = start(init="random", tokens=50)
    assert -0.5 <= float(random.min()) < -0.4 and 0.4 < float(random.max()) < 0.5


def test_a_prefix_starts_as_the_text_itself() -> None:
    """Keys and values of a text: the model behind the prefix predicts what it predicts behind the text."""
    tokenizer = tiny_tokenizer()
    config = AdapterConfig(kind="p_tuning_v2", tokens=6, init="text", text="abcdef")
    ids = tokenizer("abcdef", add_special_tokens=False)["input_ids"][:6]
    hf = tiny_model("llama")
    plain = LanguageModel(tiny_model("llama"))
    model = LanguageModel(attach(hf, config, seed=0, tokenizer=tokenizer))
    sample = [7, 8, 9, 10]
    assert len(ids) == 6
    with torch.no_grad():
        behind = model(model.pack([Sample(sample, [0, 1, 1, 1])]))[0]
        written = plain(plain.pack([Sample([*ids, *sample], [0.0] * 7 + [1.0] * 3)]))[0]
    assert torch.allclose(behind, written, atol=1e-5)


def test_a_batch_lays_virtual_tokens_once() -> None:
    samples = [Sample([5, 6, 7], [0, 0, 1]), Sample([5, 6, 8, 9], [0, 0, 1, 1])]
    batch = pack(samples, virtual=VirtualTokens(3, 2))
    assert batch.total == 3 + 2 * 2 + 3 + 4 and batch.parents == (-1, 0, 0)
    assert batch.virtual_ids is not None and batch.virtual_ids.tolist() == [0, 1, 2, 3, 4, 3, 4]
    assert [batch.tokens_T[row].tolist() for row in batch.rows] == [list(s.tokens) for s in samples]
    assert batch.positions_T[batch.rows[1]].tolist() == [3, 4, 7, 8] and batch.longest == 9
    keys = pack(samples, virtual=VirtualTokens(3, computed=False))
    assert keys.total == 7 and keys.positions_T[keys.rows[0]].tolist() == [3, 4, 5]
    seen = keys.behind_keys(3)
    assert seen.starts == (0, 3, 6) and seen.parents == (-1, 0, 0) and seen.subtree_ends[0] == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "prompt", "r": 8}, "prompt has no setting r .it has: tokens, init, text, labels"),
        ({"kind": "lora", "tokens": 8}, "lora has no setting tokens"),
        ({"kind": "prompt", "init": "text"}, "init is 'text' and text is missing"),
        ({"kind": "prompt", "text": "a"}, "text is set"),
        ({"kind": "prompt", "init": "labels", "labels": ["a", "b"], "tokens": 1}, "2 labels need"),
        ({"kind": "p_tuning", "template": "{context} is {v:3}{target}"}, "expected .v:NUMBER."),
        ({"kind": "p_tuning", "template": "{context}{target}"}, "expected .v:NUMBER."),
        ({"kind": "prompts"}, "Did you mean prompt"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AdapterConfig(**settings)


def test_settings_are_read_as_they_were_written() -> None:
    for settings in KINDS.values():
        config = SFTConfig(data={"source": "a"}, adapter=settings)
        assert not config.merge and SFTConfig(**config.model_dump()) == config
    with pytest.raises(ValidationError, match="virtual tokens before the target are for sft"):
        TrainConfig(method="dpo", adapter=KINDS["p_tuning"])
    with pytest.raises(ValidationError, match="leave merge out. Virtual tokens.*posttrain bake"):
        TrainConfig(method="sft", adapter={"kind": "prompt"}, merge=True)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"adapter": {"kind": "prompt"}}, None),
        ({"adapter": {"kind": "prompt", "tokens": 5}}, None),
        ({"adapter": {"kind": "lora"}, "start": "base"}, None),
        ({"adapter": {"kind": "prompt", "tokens": 6}}, "adapter.tokens is 6, and the soft prompt of stage 'one'"),
        ({"adapter": {"kind": "lora"}}, "stage 'two' starts from the soft prompt .prompt. of stage 'one'"),
        ({"start": "stage:one"}, "with adapter: .kind: prompt"),
        ({"adapter": {"kind": "p_tuning_v2"}}, "with adapter: .kind: prompt"),
    ],
)
def test_a_recipe_continues_a_soft_prompt_as_one(second: dict[str, Any], message: str | None) -> None:
    """Checked before the first stage is trained."""
    one = {"method": "sft", "name": "one", "data": {"source": "a"}, "adapter": KINDS["prompt"]}
    two = {"method": "dpo", "name": "two", "data": {"source": "b"}, **second}
    recipe = {"name": "r", "model": {"source": "tiny:llama"}, "stages": [one, two]}
    if message is None:
        Recipe.model_validate(recipe)
        recipe["model"], message = {"source": "tiny:llama", "add_tokens": ["<x>"]}, "model.add_tokens adds such rows"
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(recipe)


def test_what_can_not_be_done_says_so() -> None:
    hf = adapted("prompt").hf
    for merging in (lambda: merge(hf), hf.merge_and_unload, hf.merge_adapter):
        with pytest.raises(ModelError, match="virtual tokens are no change of any weight.*posttrain bake"):
            merging()
    checkpointed = tiny_model("llama")
    checkpointed.gradient_checkpointing_enable()
    with pytest.raises(ModelError, match="systems.activation_checkpointing recomputes layers with prefixes"):
        attach(checkpointed, AdapterConfig(kind="prefix"), 0)
    with pytest.raises(ModelError, match="soft prompt needs attention that goes through"), pytest.warns(UserWarning):
        adapted("prompt", "mamba")
    with pytest.raises(ModelError, match="without a trained row"):
        attach(tiny_model("llama"), AdapterConfig(kind="prompt"), 0, new_tokens=[5], tokenizer=tiny_tokenizer())
    with pytest.raises(ModelError, match="lora can't be trained on top of the soft prompt"):
        attach(adapted("prompt").hf, AdapterConfig(), 0)
    with pytest.raises(ModelError, match="continue it with adapter kind p_tuning_v2"):
        attach(adapted("p_tuning_v2").hf, AdapterConfig(kind="prompt"), 0, tokenizer=tiny_tokenizer())


def test_without_the_adapter_there_is_the_model_that_the_stage_started_from() -> None:
    model, plain = adapted("prompt"), LanguageModel(tiny_model("llama"))
    samples = random_samples(3)
    with torch.no_grad(), model.hf.disable_adapter():
        assert torch.equal(model(model.pack(samples))[0], plain(plain.pack(samples))[0])
    first = model.soft_prompt
    assert first is not None
    continued = LanguageModel(attach(model.hf, AdapterConfig(kind="prompt"), 0, tokenizer=tiny_tokenizer()))
    start = cross_entropy(continued, continued.pack(samples), 1.0)[0].detach()
    with torch.no_grad():
        continued.hf.prompt_encoder["default"].embedding.weight.add_(1.0)
        assert not torch.equal(cross_entropy(continued, continued.pack(samples), 1.0)[0], start)
        with continued.hf.disable_adapter():
            assert torch.equal(cross_entropy(continued, continued.pack(samples), 1.0)[0], start)
