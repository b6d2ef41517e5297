"""A sampler worker for runs on other machines: it listens on an address, for whoever has the token.

    POSTTRAIN_SAMPLER_TOKEN=... vllm-env/bin/python sampler_server.py HOST:PORT [--engine vllm]

Imports the standard library and a file beside it: it runs in vLLM's own Python environment. A connection brings the
model and starts a worker (`vllm_worker.py`, or posttrain's engine), which ends with the connection; one run is served
at a time. Messages are those of a worker on the same machine, with files after those that name a folder there.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import hmac
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

TOKEN = "POSTTRAIN_SAMPLER_TOKEN"
SHORTEST_TOKEN = 16
NONCE = 32
PRINTED = 3000
"""Bytes of the end of a worker's log that are sent when it has ended."""
LOCAL = "from posttrain.sampling.local_worker import main; main()"
ENGINES = ("vllm", "local")


def _beside(name: str) -> Any:
    """Import a file of this folder by its path: the package need not be installed in this environment."""
    spec = importlib.util.spec_from_file_location(f"posttrain_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def token() -> str:
    """Return the token of the environment; ValueError if there is none."""
    value = os.environ.get(TOKEN, "")
    if len(value) < SHORTEST_TOKEN:
        raise ValueError(
            f"the environment variable {TOKEN} must hold a secret of at least {SHORTEST_TOKEN} characters, the same "
            "for the sampler's server and the run (openssl rand -hex 16 makes one)"
        )
    return value


def keep_alive(connection: socket.socket) -> None:
    """Notice within about a minute that the other machine is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 60_000)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def admit(connection: socket.socket, secret: str) -> bool:
    """Return True if the other side has the secret, and prove that this side has it; it is not sent."""
    own = secrets.token_bytes(NONCE)
    connection.sendall(own)
    nonce, proof = _exactly(connection, NONCE), _exactly(connection, NONCE)
    if not hmac.compare_digest(proof, _proof(secret, b"run", own + nonce)):
        return False
    connection.sendall(_proof(secret, b"sampler", own + nonce))
    return True


def introduce(connection: socket.socket, secret: str) -> bool:
    """Prove to a server that this side has the secret; return True if the server has it too."""
    nonce, own = _exactly(connection, NONCE), secrets.token_bytes(NONCE)
    connection.sendall(own + _proof(secret, b"run", nonce + own))
    try:
        return hmac.compare_digest(_exactly(connection, NONCE), _proof(secret, b"sampler", nonce + own))
    except (EOFError, ConnectionError):
        return False


def _proof(secret: str, side: bytes, nonces: bytes) -> bytes:
    return hmac.digest(secret.encode(), side + nonces, hashlib.sha256)


def _exactly(connection: socket.socket, count: int) -> bytes:
    out = b""
    while len(out) < count:
        part = connection.recv(count - len(out))
        if not part:
            raise EOFError("the connection has ended")
        out += part
    return out


class WorkerProgram:
    """The program of a worker, in a process group of its own."""

    def __init__(self, engine: str, connection: socket.socket, log: Path) -> None:
        """Start it.

        Args:
            engine: Name of the engine.
            connection: The worker's end of its connection.
            log: File that gets what it prints.
        """
        program = ["-P", "-c", LOCAL] if engine == "local" else [str(Path(__file__).with_name("vllm_worker.py"))]
        number = connection.fileno()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *program, str(number)],
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, "VLLM_NO_USAGE_STATS": "1", TOKEN: ""},
                start_new_session=True,
            )

    def wait(self) -> int:
        """Wait for its end and return its exit code; negative: the signal that ended it."""
        return self.process.wait()

    def kill(self) -> None:
        """End it, and what it started."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Served:
    """One run's worker: it relays messages, and keeps the files that they come with while they are needed."""

    def __init__(self, wire: Any, start: Callable[[socket.socket, Path], Any], folder: Path) -> None:
        """Receive the model and start the worker.

        Args:
            wire: The connection to the run.
            start: (the worker's end of a connection, its log) -> its process.
            folder: For files.
        """
        self.wire, self.folder = wire, folder
        settings = wire.receive()
        wire.receive_files(settings, folder / "model")
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = start(theirs, folder / "log")
        self.worker = type(wire)(ours)
        self.worker.send({**settings, "model": str(folder / "model")})
        self.updates: dict[int, Path] = {}

    def relay(self) -> None:
        """Relay until the run or the worker ends; then end the worker and say how it ended."""
        reader = threading.Thread(target=self._from_run, daemon=True)
        reader.start()
        try:
            while True:
                message = self.worker.receive()
                if (folder := self.updates.pop(message.get("id"), None)) is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                self.wire.send(message)
        except (EOFError, OSError):
            pass
        self.process.kill()
        code = self.process.wait()
        with contextlib.suppress(OSError):
            printed = (self.folder / "log").read_bytes()[-PRINTED:].decode(errors="replace")
            self.wire.send({"ended": code, "printed": printed})
            self.wire.connection.shutdown(socket.SHUT_RDWR)
        reader.join()

    def _from_run(self) -> None:
        try:
            while True:
                message = self.wire.receive()
                if "update" in message:
                    folder = self.folder / f"update-{message['id']}"
                    self.wire.receive_files(message, folder)
                    self.updates[message["id"]] = folder
                    message["update"] = str(folder)
                self.worker.send(message)
        except (EOFError, OSError, ValueError):
            with contextlib.suppress(OSError):
                self.worker.connection.shutdown(socket.SHUT_RDWR)


def serve(
    listener: socket.socket, secret: str, engine: str, start: Callable[[socket.socket, Path], Any], scratch: Path
) -> None:
    """Serve one run after the other until the listener is closed.

    Args:
        listener: A listening socket.
        secret: The token.
        engine: Name of the engine, which runs compare with the one that they ask for.
        start: (the worker's end of a connection, its log) -> its process, with `wait` and `kill`.
        scratch: Folder for the models and weights of runs.
    """
    while True:
        try:
            connection, peer = listener.accept()
        except OSError:
            return
        with connection, tempfile.TemporaryDirectory(dir=scratch) as folder:
            try:
                connection.settimeout(20)
                if not admit(connection, secret):
                    print(f"{peer[0]} was refused: it has another token", flush=True)
                    continue
                connection.settimeout(None)
                keep_alive(connection)
                wire = _beside("worker_wire").Wire(connection)
                wire.send({"engine": engine})
                print(f"serving a run on {peer[0]}", flush=True)
                served = Served(wire, start, Path(folder))
                try:
                    served.relay()
                finally:
                    served.process.kill()
                print(f"the run on {peer[0]} has ended", flush=True)
            except (EOFError, OSError, ValueError) as error:
                print(f"the connection of {peer[0]} has ended: {error}", flush=True)


def main() -> None:
    """Listen on the address of the command line."""
    parser = argparse.ArgumentParser(description="Serve a sampler worker to runs of posttrain on other machines.")
    parser.add_argument("address", help="HOST:PORT to listen on")
    parser.add_argument("--engine", choices=ENGINES, default="vllm", help="vllm, or posttrain's own (local)")
    parser.add_argument("--scratch", type=Path, help="folder for models and weights (default: the temporary folder)")
    given = parser.parse_args()
    host, _, port = given.address.rpartition(":")
    try:
        secret = token()
        listener = socket.create_server((host.strip("[]"), int(port)))
    except (ValueError, OSError) as error:
        parser.error(f"{given.address}: {error}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the worker and its files go
    print(f"listening on {given.address}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        serve(listener, secret, given.engine, partial(WorkerProgram, given.engine), given.scratch)


if __name__ == "__main__":
    main()
