"""Sampler workers in processes of this machine: with the local engine, or a program in another Python environment."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from posttrain.config import SamplingConfig
from posttrain.core.errors import DataError
from posttrain.core.image_tokens import image_spans
from posttrain.core.types import PartialRollout, Rollout, RolloutGroup
from posttrain.sampling.protocol import Request
from posttrain.sampling.stop_strings import Decode, before_stop
from posttrain.sampling.weight_folder import WeightFolder
from posttrain.sampling.worker_protocol import WorkerError, WorkerLost
from posttrain.sampling.worker_wire import Wire

SHOWN_LINES = 15
"""Lines of a worker's log in the message when it is gone."""


class Child(Protocol):
    """A process that was started."""

    def wait(self) -> int:
        """Wait for its end and return its exit code; negative: the signal that ended it."""

    def kill(self) -> None:
        """End it, and what it started."""


StartChild = Callable[[socket.socket, Path], Child]
"""(the worker's end of the connection, file for what it prints) -> the process."""


class ChildProgram:
    """A program in a process of its own group. See `Child`."""

    def __init__(
        self,
        command: Sequence[str],
        connection: socket.socket,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it.

        Args:
            command: The program; the descriptor of the connection is added as its last argument.
            connection: Its end of the connection.
            log: File that gets what it prints.
            environment: Environment variables besides those of this process.
        """
        number = connection.fileno()
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [*command, str(number)],
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    def wait(self) -> int:
        return self.process.wait()

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)


class ProcessWorker:
    """A sampler worker behind a connection. See `posttrain.sampling.worker_protocol.SamplerWorker`.

    Opening it returns at once; the first look at `context` waits until it is ready.
    """

    def __init__(
        self, launch: StartChild, settings: Mapping[str, Any], weights: WeightFolder, log: Path, decode: Decode
    ) -> None:
        """Start the worker.

        Args:
            launch: Starts its process.
            settings: First message to it: what it opens, and how.
            weights: Where weights are handed over; shared by the workers of a run.
            log: File that gets what it prints.
            decode: (tokens, leave out special ones) -> text.
        """
        self.version = 0
        self.weights, self.log, self.decode = weights, log, decode
        self._begin = log.stat().st_size if log.exists() else 0
        self._replies: dict[int, Future[dict[str, Any]]] = {}
        self._guard, self._count, self._gone = threading.Lock(), 0, ""
        self._order = threading.Lock()  # requests are marked with the version that they are sent after
        ours, theirs = socket.socketpair()
        with theirs:
            self.child = launch(theirs, log)
        self.wire = Wire(ours)
        self._ready: Future[dict[str, Any]] = Future()
        self._readers = [threading.Thread(target=t, daemon=True) for t in (self._read, self._watch)]
        for thread in self._readers:
            thread.start()
        with contextlib.suppress(OSError):  # it is gone already: the reader says so
            self.wire.send(dict(settings))

    @property
    def context(self) -> int:
        """Return the most tokens of a prompt and its completion, once the worker is ready."""
        return int(self._ready.result()["context"])

    def update(self, version: int, weights: Mapping[str, Tensor]) -> None:
        if version <= self.version:
            raise WorkerError(f"weights of version {version} come after version {self.version}: versions must rise")
        with self.weights.version(version, weights) as folder:
            with self._order:
                reply = self._ask({"update": str(folder)})
                self.version = version
            reply.result()

    def submit(self, requests: Sequence[Request], params: SamplingConfig) -> Future[list[RolloutGroup]]:
        out: Future[list[RolloutGroup]] = Future()
        try:
            limits = [self._limit(i, r, params) for i, r in enumerate(requests)]
        except (DataError, WorkerError) as error:
            out.set_exception(error)
            return out
        asked = [
            {"tokens": list(r.tokens), "n": r.n, "seed": r.seed, "max_tokens": limit}
            for r, limit in zip(requests, limits, strict=True)
        ]

        def finish(reply: Future[dict[str, Any]]) -> None:
            try:
                groups = reply.result()["groups"]
                out.set_result(
                    [
                        RolloutGroup(r.tokens, r.example, [self._rollout(values, params, version) for values in group])
                        for r, group in zip(requests, groups, strict=True)
                    ]
                )
            except BaseException as error:
                out.set_exception(error)

        if asked:
            message = {"requests": asked, "params": params.model_dump(include=set(SamplingConfig.model_fields))}
            with self._order:
                version, reply = self.version, self._ask(message)
            reply.add_done_callback(finish)
        else:
            out.set_result([])
        return out

    def close(self) -> None:
        self._lost("it was closed")
        with contextlib.suppress(OSError):
            self.wire.connection.shutdown(socket.SHUT_RDWR)
        self.child.kill()
        for thread in self._readers:
            if thread is not threading.current_thread():
                thread.join()
        self.wire.connection.close()

    def _limit(self, i: int, request: Request, params: SamplingConfig) -> int:
        """Return how many tokens a completion of this prompt may have."""
        length, context = len(request.tokens), self.context
        if not length:
            raise DataError(f"prompt {i} has no tokens; give at least one (the beginning-of-text token, say)")
        if request.n < 1:
            raise DataError(f"prompt {i}: n is {request.n}, and at least one completion must be asked for")
        if image_spans(request.tokens):
            raise DataError(f"prompt {i} has pictures, and sampler workers take text alone: leave sampler.workers out")
        if length >= context:
            raise DataError(
                f"prompt {i} has {length} tokens, and the sampler's context of {context} leaves no room for an "
                "answer: shorten the prompt, or leave it out"
            )
        return min(params.max_tokens, context - length, request.max_tokens or params.max_tokens)

    def _rollout(self, values: Mapping[str, Any], params: SamplingConfig, version: int) -> Rollout:
        """Return a completion as the worker sent it; texts are made here, with the tokenizer of the run."""
        tokens, finish = tuple(values["tokens"]), values["finish"]
        text = None
        if finish == "stop" and tokens[-1] not in params.stop_tokens:
            text = before_stop(tokens, params.stop, self.decode)
        if text is None:
            text = self.decode(tokens[:-1] if finish in ("end", "stop") else tokens, True)
        piece = PartialRollout(len(tokens), version, params.temperature)
        return Rollout(tokens, tuple(values["logprobs"]), finish, text, pieces=(piece,))

    def _ask(self, message: dict[str, Any]) -> Future[dict[str, Any]]:
        """Send a message; the future has the reply."""
        reply: Future[dict[str, Any]] = Future()
        with self._guard:
            gone, number = self._gone, self._count
            if not gone:
                self._count += 1
                self._replies[number] = reply
        if gone:
            reply.set_exception(WorkerLost(gone))
            return reply
        with contextlib.suppress(OSError):  # the reader notices that it is gone, and says how it ended
            self.wire.send({"id": number, **message})
        return reply

    def _read(self) -> None:
        """Hand replies on until the connection ends."""
        try:
            self._ready.set_result(self.wire.receive())
            while True:
                message = self.wire.receive()
                with self._guard:
                    reply = self._replies.pop(message["id"], None)
                if reply is None:
                    continue
                if "error" in message:
                    reply.set_exception(WorkerError(f"the sampler worker refused: {message['error']}"))
                else:
                    reply.set_result(message)
        except (EOFError, OSError):
            self.child.kill()  # it has closed the connection: it is of no more use
            code = self.child.wait()
            self._lost(f"signal {-code}" if code < 0 else f"exit code {code}")

    def _watch(self) -> None:
        """End the connection with the process, even if something that it started holds it open."""
        self.child.wait()
        with contextlib.suppress(OSError):
            self.wire.connection.shutdown(socket.SHUT_RDWR)

    def _lost(self, how: str) -> None:
        """Let all that waits fail."""
        with self._guard:
            if not self._gone:
                self._gone = f"the sampler worker has ended ({how}); {self._printed()}"
            waiting = list(self._replies.values())
            self._replies.clear()
        for reply in [self._ready, *waiting]:
            if not reply.done():
                reply.set_exception(WorkerLost(self._gone))

    def _printed(self) -> str:
        """Return the last lines that it printed, for a message."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(self._begin, self.log.stat().st_size - 20_000))
                lines = file.read().decode(errors="replace").splitlines()[-SHOWN_LINES:]
        except OSError:
            lines = []
        return f"the end of {self.log}:\n" + "\n".join(lines) if lines else f"{self.log} is empty"
