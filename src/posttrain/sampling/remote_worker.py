"""Sampler workers behind an address: `sampler_server.py` on another machine or in another environment starts them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from pathlib import Path

from posttrain.sampling import sampler_server
from posttrain.sampling.worker_protocol import WorkerError
from posttrain.sampling.worker_wire import Wire

CONNECT_SECONDS = 60.0
"""How long a server may be away, or serve another run, before a run stops."""


class RemoteChild:
    """The worker of a server. See `posttrain.sampling.process_worker.Child`.

    It relays messages between the run's connection and the server's, and sends the files that they name.
    """

    def __init__(self, address: str, engine: str, connection: socket.socket, log: Path) -> None:
        """Connect to the server.

        Args:
            address: HOST:PORT of the server.
            engine: The engine that the run asks for.
            connection: The worker's end of the run's connection.
            log: File that gets what the worker printed last, when it has ended.

        Raises:
            WorkerError: There is no server, it serves another run, or has another token or engine.
        """
        self.address, self.log, self.code = address, log, 1
        self.ended = threading.Event()
        self.far = Wire(connect(address, engine))
        self.near = Wire(connection.dup())
        for target in (self._from_run, self._from_server):
            threading.Thread(target=target, daemon=True).start()

    def wait(self) -> int:
        self.ended.wait()
        return self.code

    def kill(self) -> None:
        for wire in (self.far, self.near):
            with contextlib.suppress(OSError):
                wire.connection.shutdown(socket.SHUT_RDWR)

    def _from_run(self) -> None:
        try:
            settings = self.near.receive()
            self.far.send_with_files(settings, Path(settings["model"]))
            while True:
                message = self.near.receive()
                if "update" in message:
                    self.far.send_with_files(message, Path(message["update"]))
                else:
                    self.far.send(message)
        except (EOFError, OSError):
            self.kill()

    def _from_server(self) -> None:
        text = f"the connection to the sampler server at {self.address} has ended\n"
        try:
            while True:
                message = self.far.receive()
                if "ended" in message:
                    self.code, text = int(message["ended"]), message["printed"]
                    break
                self.near.send(message)
        except (EOFError, OSError):
            pass
        with self.log.open("a") as file:
            file.write(text)
        self.kill()
        self.ended.set()


def connect(address: str, engine: str) -> socket.socket:
    """Return a connection to a server that has proved that it has the token, and runs this engine.

    Args:
        address: HOST:PORT.
        engine: Name of the engine.

    Raises:
        WorkerError: There is none.
    """
    try:
        secret = sampler_server.token()
    except ValueError as error:
        raise WorkerError(f"sampler.address is {address}: {error}") from None
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=10)
            connection.settimeout(max(1.0, deadline - time.monotonic()))
            known = sampler_server.introduce(connection, secret)
            break
        except TimeoutError:
            raise WorkerError(f"the sampler server at {address} does not answer: it may serve another run") from None
        except (OSError, EOFError) as error:
            if time.monotonic() > deadline:
                raise WorkerError(
                    f"there is no sampler server at {address} ({error}): start it there "
                    f"({sampler_server.TOKEN}=... PYTHON sampler_server.py {address}), and run the same command again"
                ) from error
            time.sleep(1)
    if not known:
        connection.close()
        raise WorkerError(f"the sampler server at {address} has another token than {sampler_server.TOKEN} here")
    there = Wire(connection).receive()["engine"]
    if there != engine:
        connection.close()
        raise WorkerError(
            f"sampler.backend is {engine}, and the server at {address} runs {there}: start it with --engine {engine}"
        )
    connection.settimeout(None)
    sampler_server.keep_alive(connection)
    return connection
