"""A sampler worker on vLLM, as a program that runs in vLLM's own Python environment: PYTHON vllm_worker.py CONNECTION.

It imports vLLM, the standard library and two files beside it that need nothing else. Tokens come in and tokens go out;
texts are made by the process that asked. Log-probabilities are those of the distribution that was drawn from
(vLLM's `processed_logprobs`): temperature, cut-offs and forbidden tokens applied.

Messages in: the settings, once; then {id, requests, params} and {id, update: folder}. Messages out: {context}, once;
then {id, groups}, {id} or {id, error}. Messages are carried out in order: an update waits until what was asked for
before it is complete, and what came after it waits for the update.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import socket
import sys
import tempfile
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any

STOP_STRINGS = "stop_strings"
DEFAULTS: dict[str, dict[str, Any]] = {
    # On a CPU vLLM 0.32 fails if it computes a part of a prompt whose completion has a seed.
    "cpu": {"enforce_eager": True, "max_num_seqs": 128, "enable_chunked_prefill": False},
    "cuda": {"gpu_memory_utilization": 0.3},
}
"""Engine settings where the recipe gives none: on a GPU a share of the memory, since the learner needs the rest."""
CPU_CACHE = 2 * 2**30
"""Bytes for keys and values on a CPU."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for."""
NEVER = -1e9
"""Added to the logits of ids that no token has."""


def beside(name: str) -> ModuleType:
    """Import a file of this folder by its path: the package is not installed in this environment."""
    spec = importlib.util.spec_from_file_location(f"posttrain_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seed_of(seed: int, number: int) -> int:
    """Return the seed of one completion, of 63 bits as vLLM takes them."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest(), "big") >> 1


class RunningRow:
    """A completion that runs."""

    def __init__(self, job: Job, request: int, number: int) -> None:
        self.job, self.request, self.number = job, request, number
        self.tokens: list[int] = []
        self.logprobs: list[float] = []


class Job:
    """The requests of one message."""

    def __init__(self, message: dict[str, Any]) -> None:
        self.id, self.params = message["id"], message["params"]
        self.groups: list[list[Any]] = [[None] * r["n"] for r in message["requests"]]
        self.left = sum(r["n"] for r in message["requests"])


class Engine:
    """vLLM's engine in this process, and the completions that run in it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform

        cpu = current_platform.is_cpu()
        options = dict(DEFAULTS["cpu" if cpu else "cuda"])
        if settings["max_running"]:
            options["max_num_seqs"] = settings["max_running"]
        if settings["cache_bytes"] or cpu:
            options["kv_cache_memory_bytes"] = settings["cache_bytes"] or CPU_CACHE
        self.adapter = settings["adapter"]
        if self.adapter:
            room = min((r for r in LORA_RANKS if r >= self.adapter["r"]), default=self.adapter["r"])
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}
        options |= settings["options"]
        self.folder = settings["model"]
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=self.folder,
                dtype=settings["dtype"],
                skip_tokenizer_init=True,
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
                **options,
            )
        )
        self.context = int(self.engine.model_config.max_model_len)
        self.ends = settings["ends"]
        self.forbidden = dict.fromkeys(settings["textless"], NEVER)
        self.rows: dict[str, RunningRow] = {}
        self.started = 0
        self.stop_strings = beside(STOP_STRINGS)
        self._tokenizer: Any = None
        self._lora: Any = None
        if self.adapter:
            self._load_adapter(Path(self.folder) / "adapter")

    def start(self, job: Job, requests: list[dict[str, Any]]) -> None:
        """Start all completions of a job; those of one prompt share its keys and values by prefix caching."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params, ends = job.params, sorted({*self.ends, *job.params["stop_tokens"]})
        for i, request in enumerate(requests):
            for j in range(request["n"]):
                sampling = SamplingParams(
                    temperature=params["temperature"],
                    top_k=params["top_k"],
                    top_p=params["top_p"],
                    min_p=params["min_p"],
                    seed=seed_of(request["seed"], j),
                    max_tokens=request["max_tokens"],
                    min_tokens=min(params["min_tokens"], request["max_tokens"]),
                    stop_token_ids=ends,
                    ignore_eos=True,  # the end token is among the stop tokens
                    logit_bias=self.forbidden or None,
                    detokenize=False,
                    logprobs=0,
                    output_kind=RequestOutputKind.DELTA if params["stop"] else RequestOutputKind.FINAL_ONLY,
                )
                name = str(self.started)
                self.started += 1
                self.rows[name] = RunningRow(job, i, j)
                self.engine.add_request(
                    name, {"prompt_token_ids": request["tokens"]}, sampling, lora_request=self._lora
                )

    def step(self) -> list[Job]:
        """Draw one more token for every completion that runs; return the jobs that are complete."""
        complete = []
        for output in self.engine.step():
            row = self.rows.get(output.request_id)
            if row is None:  # was cut by a stop string
                continue
            finish = self._add(row, output)
            if finish:
                del self.rows[output.request_id]
                job = row.job
                job.groups[row.request][row.number] = {
                    "tokens": row.tokens, "logprobs": row.logprobs, "finish": finish,
                }  # fmt: skip
                job.left -= 1
                if not job.left:
                    complete.append(job)
        return complete

    def _add(self, row: RunningRow, output: Any) -> str:
        """Add the newest tokens to a completion; return why it ends with them ("": it continues)."""
        new, params = output.outputs[0], row.job.params
        for token, logprobs in zip(new.token_ids, new.logprobs or [], strict=True):
            row.tokens.append(int(token))
            row.logprobs.append(float(logprobs[token].logprob))
            ended = token in self.ends or token in params["stop_tokens"]
            if params["stop"] and not ended and len(row.tokens) >= params["min_tokens"]:
                if self.stop_strings.before_stop(row.tokens, params["stop"], self._decode) is not None:
                    if not output.finished:
                        self.engine.abort_request([output.request_id])
                    return "stop"
        if not output.finished:
            return ""
        if new.finish_reason == "length":
            return "length"
        if new.finish_reason != "stop":
            raise RuntimeError(f"vLLM ended a completion with {new.finish_reason!r}: expected 'stop' or 'length'")
        return "end" if row.tokens[-1] in self.ends else "stop"

    def _decode(self, tokens: Any, plain: bool) -> str:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self.folder)
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=plain))

    def drop(self, job: Job) -> None:
        """Abort the completions of a job."""
        names = [name for name, row in self.rows.items() if row.job is job]
        for name in names:
            del self.rows[name]
        self.engine.abort_request(names)

    def update(self, folder: str) -> None:
        """Load weights, or an adapter's, from a folder with safetensors files; nothing may run."""
        if self.adapter:
            self._load_adapter(Path(folder))
        else:
            self.engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM kept keys and values of the weights before the update")

    def _load_adapter(self, folder: Path) -> None:
        from vllm.lora.request import LoRARequest

        with tempfile.TemporaryDirectory() as work:
            (Path(work) / "adapter_config.json").write_text(json.dumps(self.adapter))
            (Path(work) / "adapter_model.safetensors").symlink_to(folder.resolve() / "model.safetensors")
            if not self.engine.add_lora(LoRARequest("policy", 1, work, load_inplace=True)):
                raise RuntimeError("vLLM did not take the adapter")
            self._lora = LoRARequest("policy", 1, work)  # known by its number: the folder is not read again


def handle(engine: Engine, wire: Any, message: dict[str, Any]) -> None:
    """Begin what a message asks for; what goes wrong is answered.

    Args:
        engine: The engine.
        wire: The connection.
        message: Requests, or a folder of weights.
    """
    job = None
    try:
        if "update" in message:
            engine.update(message["update"])
            wire.send({"id": message["id"]})
        else:
            job = Job(message)
            engine.start(job, message["requests"])
    except Exception as error:
        if job is not None:
            engine.drop(job)
        wire.send({"id": message["id"], "error": f"{type(error).__name__}: {error}"})


def serve_vllm(wire: Any) -> None:
    """Answer messages until the connection ends."""
    settings = wire.receive()
    wire.end_process_with_it()
    engine = Engine(settings)
    wire.send({"context": engine.context})
    queue: deque[dict[str, Any]] = deque()
    while True:
        while wire.waiting() or not (engine.rows or queue):
            try:
                queue.append(wire.receive())
            except (EOFError, OSError):
                return
        while queue and not (engine.rows and "update" in queue[0]):
            handle(engine, wire, queue.popleft())
        for job in engine.step() if engine.rows else ():
            wire.send({"id": job.id, "groups": job.groups})


def main() -> None:
    """Serve the connection whose descriptor the command line names."""
    own = str(Path(__file__).parent)
    sys.path[:] = [p for p in sys.path if p != own]  # files of this folder must hide no module of vLLM's
    serve_vllm(beside("worker_wire").Wire(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
