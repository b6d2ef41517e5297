"""A small judge, `transformers serve` around it, and a proxy before that server that does what networks do."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from posttrain.config import JudgeConfig, ModelConfig
from posttrain.data.comparisons import AnswerPair
from posttrain.judge.judge_prompts import question
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer

PAIRS = [
    AnswerPair(f"Name a number near {i}.", f"It is {i * 37 % 11}.", f"Perhaps {i * 53 % 17}, or so.", f"p:{i}", human)
    for i, human in enumerate([0.9, 0.2] * 6)
]
"""Twelve pairs; people prefer the first of every other one."""


def make_judge(folder: Path) -> Path:
    """A tiny Llama whose next token is A or B, nothing else, and which of them depends on what it is asked of PAIRS.

    Its head has two rows that are not zero, w and -w, so one of their logits is above the zeros of all others. w is the
    direction in which the last hidden states of the questions differ most, so that both letters come up.
    """
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", len(tokenizer), seed=3)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(20)
            layer.self_attn.o_proj.weight.mul_(20)
        config = JudgeConfig(model=ModelConfig(source=str(folder)))
        asked = [question(config, p.prompt, order, ()) for p in PAIRS for order in ((p.a, p.b), (p.b, p.a))]
        texts = [
            tokenizer.apply_chat_template([{"role": "user", "content": a}], tokenize=False, add_generation_prompt=True)
            for a in asked
        ]
        hidden = torch.stack(
            [model.model(torch.tensor([tokenizer(t)["input_ids"]])).last_hidden_state[0, -1] for t in texts]
        )
        mean = hidden.mean(0)
        _, _, directions = torch.linalg.svd(hidden - mean, full_matrices=False)
        w = directions[0] - (directions[0] @ mean) / (mean @ mean) * mean
        a, b = (tokenizer(x)["input_ids"][0] for x in "AB")
        head = model.lm_head.weight
        head.zero_()
        head[a], head[b] = 400 * w, -400 * w
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def served(model: Path, log: Path, python: str = "") -> Iterator[str]:
    """`transformers serve` of a model's folder on this machine; its address, up to /v1. python: one that has vLLM,
    which serves it instead, in float32."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model), "--device", "cpu"]
    if python:
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "float32"]
        command += ["--enforce-eager", "--max-model-len", "1024", "--logprobs-mode", "raw_logprobs"]
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=out,
            stderr=out,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
            start_new_session=True,
        )
    try:
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, log.read_text()[-3000:]
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


Fault = Callable[[int, str], str]
"""(number of the request, what is asked) → the fault it meets, "" for none."""


class Proxy:
    """Passes requests on, or doesn't. asked: the questions in their order of arrival; passed: those passed on."""

    def __init__(self, upstream: str, fault: Fault = lambda n, q: "", delay: float = 0.0) -> None:
        self.upstream, self.fault, self.delay = upstream, fault, delay
        self.asked: list[str] = []
        self.passed: list[str] = []
        self.times: list[float] = []
        self.active = self.most = 0
        self.slow = 4.0  # seconds that an answer comes late
        self.lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                try:
                    proxy.handle(self)
                finally:
                    with proxy.lock:
                        proxy.active -= 1

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def seen(self, body: dict[str, Any]) -> None:
        """A request has come; a test may look at it."""

    def handle(self, h: BaseHTTPRequestHandler) -> None:
        body = h.rfile.read(int(h.headers["Content-Length"]))
        self.seen(json.loads(body))
        question = json.loads(body)["messages"][-1]["content"]
        with self.lock:
            self.active += 1
            self.most = max(self.most, self.active)
            number = len(self.asked)
            self.asked.append(question)
            self.times.append(time.monotonic())
        fault = self.fault(number, question)
        time.sleep(self.delay)
        if fault == "429":
            return self.send(h, 429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0.3"})
        if fault in ("400", "401", "500", "503"):
            return self.send(h, int(fault), b'{"error": {"message": "no"}}')
        if fault == "drop":
            h.connection.shutdown(socket.SHUT_RDWR)
            h.close_connection = True
            return None
        with self.lock:
            self.passed.append(question)
        request = urllib.request.Request(
            self.upstream + "/chat/completions", body, {"Content-Type": "application/json"}
        )
        try:
            answer = urllib.request.urlopen(request, timeout=60).read()
        except urllib.error.HTTPError as error:  # the server's own trouble is handed on as it is
            return self.send(h, error.code, error.read())
        if fault == "slow":
            time.sleep(self.slow)
        if fault == "drop after":  # the answer was made, and is lost on its way
            h.send_response(200)
            h.send_header("Content-Length", str(len(answer)))
            h.end_headers()
            h.wfile.write(answer[: len(answer) // 2])
            h.wfile.flush()
            h.connection.shutdown(socket.SHUT_RDWR)
            h.close_connection = True
            return None
        if fault == "truncated":
            answer = answer[: len(answer) // 2]
        if fault == "wrong":
            answer = b'{"object": "chat.completion", "choices": []}'
        if fault == "html":
            answer = b"<html>Bad gateway</html>"
        if fault == "no text":
            answer = b'{"choices": [{"message": {"role": "assistant", "content": 7}, "finish_reason": "stop"}]}'
        return self.send(h, 200, answer)

    def send(self, h: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        try:
            h.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                h.send_header(name, value)
            h.send_header("Content-Length", str(len(body)))
            h.end_headers()
            h.wfile.write(body)
        except OSError:
            pass  # whoever asked has gone

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
