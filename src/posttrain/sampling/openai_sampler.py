"""A sampler behind an OpenAI-compatible server: text alone, for judges and teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.config import SamplingConfig, ServerConfig
from posttrain.core.errors import DataError, ModelError
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.sampling.openai_client import NOT_IN_PROTOCOL, Reply, Server
from posttrain.sampling.protocol import OnDone, Request

FINISH = {"stop": "end", "length": "length"}


class OpenAISampler:
    """Samples from a server. See `posttrain.sampling.protocol.Sampler`.

    What is asked are the `messages` of a request's example (else its `prompt`, as the user's turn): a server takes
    text, and the request's token ids are only handed on. Rollouts hold text, neither tokens nor log-probabilities. A
    request that the server refuses, or filters, comes back with finish ``error`` and the reason as its text.

    Attributes:
        spent: Tokens that the server read and wrote in the last call of `sample`, by request and completion.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.server = Server(config)
        self.spent: list[list[int]] = []

    def sample(
        self, requests: Sequence[Request], params: SamplingConfig, on_done: OnDone | None = None
    ) -> list[RolloutGroup]:
        """Make one request for each completion, each with its seed.

        Args:
            requests: The prompts, as messages or text in their examples.
            params: How tokens are drawn.
            on_done: Called as each completion ends.

        Raises:
            ServerError: The server keeps failing.
            ModelError: A setting is missing in the protocol.
            DataError: A request has no messages and no prompt.
        """
        for name, off in NOT_IN_PROTOCOL.items():
            if getattr(params, name, off) != off:
                raise ModelError(
                    f"sampler.{name} is not in OpenAI's protocol: leave it out, or give the server's own in "
                    "server.options"
                )
        bodies: list[dict[str, Any]] = []
        places: list[tuple[int, int]] = []
        for i, request in enumerate(requests):
            if request.n < 1:
                raise DataError(f"prompt {i}: n is {request.n}, and at least one completion must be asked for")
            seeds = np.random.SeedSequence(request.seed).generate_state(request.n)
            for j in range(request.n):
                bodies.append(
                    {
                        "messages": _messages(i, request.example),
                        "temperature": params.temperature,
                        "top_p": params.top_p,
                        "max_tokens": request.max_tokens or params.max_tokens,
                        "seed": int(seeds[j] >> 1),
                        "stop": params.stop or None,
                    }
                )
                places.append((i, j))
        done: list[dict[int, Rollout]] = [{} for _ in requests]
        self.spent = [[0] * r.n for r in requests]

        def keep(number: int, reply: Reply) -> None:
            i, j = places[number]
            done[i][j] = _rollout(reply)
            self.spent[i][j] = reply.prompt_tokens + reply.completion_tokens
            if on_done is not None:
                on_done(i, j, done[i][j])

        self.server.ask(bodies, keep)
        return [
            RolloutGroup(r.tokens, r.example, [d[j] for j in range(r.n)]) for r, d in zip(requests, done, strict=True)
        ]


def _messages(i: int, example: Mapping[str, Any]) -> list[dict[str, Any]]:
    if example.get("tools") or example.get("template_args"):
        raise DataError(f"prompt {i} has tools or template arguments, which a server is not given. Sample it locally")
    if example.get("messages"):
        return [dict(m) for m in example["messages"]]
    if isinstance(example.get("prompt"), str):
        return [{"role": "user", "content": example["prompt"]}]
    raise DataError(
        f"prompt {i}: a server needs text, and the example has neither messages nor prompt: {sorted(example)}"
    )


def _rollout(reply: Reply) -> Rollout:
    if reply.refused:
        return Rollout((), (), "error", reply.refused)
    if reply.finish not in FINISH:
        return Rollout((), (), "error", f"the server ended it with {reply.finish or 'no reason'}")
    return Rollout((), (), FINISH[reply.finish], reply.text)
