"""Prompt and prefix tuning, ours beside peft with TRL's SFTTrainer: same model, tokens, initial values and settings.

    python benchmarks/soft_prompts.py                          # CPU, SmolLM2-135M-Instruct
    python benchmarks/soft_prompts.py --kinds prompt --batch 8

Every trainer runs in a process of its own; the conversations are those of `sft.py`. The script fails where the first
two losses differ by more than 1e-5. Its last line is `speed= memory=` of the kind that gains least, with the same
settings on both sides (one pass a step); the lines above have each kind, and TRL one conversation at a time, its
fastest setting.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import sft
import torch
from common import Batch, counts, in_child, median, peak_memory_mib, read_json, use_route, write_json

HERE = Path(__file__).resolve()
TOLERANCE = 1e-5


def run_ours(job: sft.Job, batches: list[Batch]) -> dict[str, Any]:
    """posttrain's learner with a soft prompt."""
    from posttrain.config import AdapterConfig, ModelConfig, OptimizerConfig, SystemsConfig
    from posttrain.core.types import Sample
    from posttrain.models.adapters import attach
    from posttrain.models.language_model import LanguageModel
    from posttrain.models.loading import load_model
    from posttrain.trainer.train_step import Learner

    kind, tokens = job.settings["kind"], job.settings["tokens"]
    hf, _ = load_model(ModelConfig(source=job.model, device=job.device))
    given = {"init": "random"} if kind == "prompt" else {}
    model = attach(hf, AdapterConfig(kind=kind, tokens=tokens, **given), job.seed)
    optimizer = OptimizerConfig(lr=job.lr, schedule="constant", warmup=0, weight_decay=job.weight_decay)
    learner = Learner(LanguageModel(model), optimizer, SystemsConfig(), total_steps=len(batches))
    found: dict[str, Any] = {"losses": [], "marks": [time.perf_counter()]}
    for batch in batches:
        samples = [Sample(c["input_ids"], [0.0, *map(float, c["completion_mask"][1:])]) for c in batch]
        found["losses"].append(learner.step(samples).metrics["loss"])
        found["marks"].append(time.perf_counter())
    return found


def peer_model(job: sft.Job) -> Any:
    """The model under peft, its parameters drawn as ours are: right after seeding."""
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, attn_implementation="sdpa")
    tokens, width = job.settings["tokens"], model.get_input_embeddings().weight.shape[1]
    torch.manual_seed(job.seed)
    if job.settings["kind"] == "prefix":
        own = {"num_virtual_tokens": tokens, "prefix_projection": True}
        return get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", **own))
    values = torch.rand(tokens, width) - 0.5
    model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens))
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(values)
    return model


def child(path: str) -> None:
    """Run one job, and write what it measured beside it."""
    job = sft.Job(**read_json(path))
    if job.threads:
        torch.set_num_threads(job.threads)
    use_route(job.route)
    batches = read_json(job.batches)
    result = run_ours(job, batches) if job.who == "ours" else sft.run_trl(job, batches, peer_model)
    marks = result.pop("marks")
    seconds = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    rates = [counts(batch)["tokens"] / s for batch, s in zip(batches, seconds, strict=True)]
    write_json(path + ".out", {**result, "rates": rates, "peak_mib": peak_memory_mib(job.device)})


def launch(job: sft.Job, python: str, folder: Path) -> dict[str, Any]:
    """Run a job in a process of its own and return its figures."""
    result = in_child(asdict(job), python, HERE, folder)
    result["tokens_per_second"] = median(result["rates"][1:])
    name = "posttrain" if job.who == "ours" else f"peft + TRL, {job.settings['per_device']} in a pass"
    print(f"  {name:<32}{result['tokens_per_second']:9.1f} tokens/s{result['peak_mib']:9.0f} MiB", flush=True)
    return result  # type: ignore[no-any-return]


def compare(kind: str, args: argparse.Namespace, base: sft.Job, folder: Path) -> dict[str, Any]:
    """Measure one kind: ours, TRL with the same settings, TRL in its fastest."""
    print(f"\n{kind}, {args.tokens} virtual tokens:", flush=True)
    own = {"kind": kind, "tokens": args.tokens}
    figures: dict[str, Any] = {}
    for name, who, more in (
        ("ours", "ours", {}),
        ("one_pass", "trl", {"per_device": args.batch}),
        ("best", "trl", {"per_device": 1}),
    ):
        job = sft.Job(**{**asdict(base), "who": who, "settings": own | more})
        figures[name] = launch(job, sys.executable if who == "ours" else args.peer_python, folder)
    for name in ("one_pass", "best"):
        # Before and after one update: each step of AdamW makes rounding errors of small gradients as large as a step.
        both = zip(figures["ours"]["losses"][:2], figures[name]["losses"][:2], strict=True)
        apart = max(abs(a - b) for a, b in both)
        figures[name]["loss_difference"] = apart
        if not apart <= TOLERANCE:
            raise SystemExit(
                f"{kind}: losses differ by {apart:.2g}: {figures['ours']['losses']}, {name} {figures[name]}"
            )
        figures[name]["speed"] = figures["ours"]["tokens_per_second"] / figures[name]["tokens_per_second"]
        figures[name]["memory"] = figures["ours"]["peak_mib"] / figures[name]["peak_mib"]
        print(f"  {kind} {name}: losses agree to {apart:.1e}, speed={figures[name]['speed']:.2f} "
              f"memory={figures[name]['memory']:.2f}", flush=True)  # fmt: skip
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--kinds", nargs="+", default=["prompt", "prefix"], choices=["prompt", "prefix"])
    parser.add_argument("--tokens", type=int, default=20, help="virtual tokens")
    parser.add_argument("--steps", type=int, default=2, help="timed steps, after one that is not")
    parser.add_argument("--batch", type=int, default=16, help="conversations a step")
    parser.add_argument("--shortest", type=int, default=20)
    parser.add_argument("--longest", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--model", default=None, help="folder of a model; default: SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, default=sft.REVIEWS)
    parser.add_argument("--peer-python", default=sys.executable, help="Python of an environment with TRL")
    parser.add_argument("--json", type=Path, default=None, help="file for the figures")
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    args.gpu = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        location, _, batches = sft.prepare(args, folder)
        write_json(folder / "batches.json", batches)
        base = sft.Job(
            "ours",
            location,
            str(folder / "batches.json"),
            "cpu",
            False,
            "default",
            args.lr,
            0.0,
            args.seed,
            args.threads,
        )
        figures = {kind: compare(kind, args, base, folder) for kind in args.kinds}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    speed = min(found["one_pass"]["speed"] for found in figures.values())
    memory = max(found["one_pass"]["memory"] for found in figures.values())
    print(f"\nspeed={speed:.2f} memory={memory:.2f}")


if __name__ == "__main__":
    main()
