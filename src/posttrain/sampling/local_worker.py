"""A sampler worker on the local engine: the program that its process runs.

Messages are those of `posttrain.sampling.vllm_worker`. What is asked for while it samples is sampled together.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from posttrain.config import ModelConfig, SamplingConfig
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import open_model, pick_device, pick_dtype
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request
from posttrain.sampling.worker_wire import Wire


def open_worker_sampler(settings: Mapping[str, Any]) -> LocalSampler:
    """Open the model of a worker's first message."""
    model = ModelConfig(source=settings["model"], dtype=settings["dtype"], device=settings["device"])
    opened = open_model(model, pick_dtype(model.dtype, pick_device(model.device)), inference=True)
    return LocalSampler(LanguageModel(opened.hf), opened.tokenizer, **settings["options"])


@torch.no_grad()
def replace_weights(sampler: LocalSampler, weights: Mapping[str, Tensor]) -> None:
    """Replace weights by name. Raises ValueError if the model has no weights of such names."""
    own = sampler.model.base.state_dict()
    if unknown := sorted(set(weights) - set(own)):
        raise ValueError(f"the model has no weights named {unknown[:3]}")
    for name, weight in weights.items():
        own[name].copy_(weight)


def serve_local(wire: Wire) -> None:
    """Answer messages until the connection ends."""
    settings = wire.receive()
    wire.end_process_with_it()
    sampler = open_worker_sampler(settings)
    wire.send({"context": sampler.context})
    while True:
        try:
            messages = [wire.receive()]
            while wire.waiting():
                messages.append(wire.receive())
        except (EOFError, OSError):
            return
        for run in runs(messages):
            try:
                for reply in _sample(sampler, run) if "requests" in run[0] else _update(sampler, run[0]):
                    wire.send(reply)
            except Exception as error:
                for message in run:
                    wire.send({"id": message["id"], "error": f"{type(error).__name__}: {error}"})


def runs(messages: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Split messages into runs that are sampled together: requests in a row with the same settings; updates alone."""
    out: list[list[dict[str, Any]]] = []
    for message in messages:
        if out and "requests" in message and message["params"] == out[-1][0].get("params"):
            out[-1].append(message)
        else:
            out.append([message])
    return out


def _sample(sampler: LocalSampler, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    requests = [
        Request(r["tokens"], r["n"], r["seed"], max_tokens=r["max_tokens"]) for m in messages for r in m["requests"]
    ]
    groups = iter(sampler.sample(requests, SamplingConfig.model_validate(messages[0]["params"])))
    return [
        {
            "id": m["id"],
            "groups": [
                [{"tokens": r.tokens, "logprobs": r.logprobs, "finish": r.finish} for r in next(groups).rollouts]
                for _ in m["requests"]
            ],
        }
        for m in messages
    ]


def _update(sampler: LocalSampler, message: dict[str, Any]) -> list[dict[str, Any]]:
    replace_weights(sampler, load_file(f"{message['update']}/model.safetensors"))
    return [{"id": message["id"]}]


def main() -> None:
    """Serve the connection whose descriptor the command line names."""
    serve_local(Wire(socket.socket(fileno=int(sys.argv[-1]))))
