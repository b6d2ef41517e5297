"""Messages between a process and a sampler worker: JSON objects, each with its length before it.

Imports the standard library alone: workers that run in another Python environment read this file too.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import threading
from pathlib import Path, PurePosixPath
from typing import Any

LENGTH = struct.Struct("!Q")


class Wire:
    """Send and receive messages over a connected socket; any thread may send, one receives."""

    def __init__(self, connection: socket.socket) -> None:
        connection.set_inheritable(False)  # processes that a worker starts must not keep its connection open
        self.connection = connection
        self._sending = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; OSError if the other side is gone."""
        with self._sending:
            self._send(message)

    def _send(self, message: dict[str, Any]) -> None:
        content = json.dumps(message, separators=(",", ":")).encode()
        self.connection.sendall(LENGTH.pack(len(content)) + content)

    def send_with_files(self, message: dict[str, Any], folder: Path) -> None:
        """Send a message and the files of a folder, whose names and sizes are added to it as `files`."""
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        sizes = [[p.relative_to(folder).as_posix(), p.stat().st_size] for p in files]
        with self._sending:
            self._send({**message, "files": sizes})
            for path in files:
                with path.open("rb") as file:
                    self.connection.sendfile(file)

    def receive_files(self, message: dict[str, Any], folder: Path) -> None:
        """Write the files that follow a message into a folder; ValueError for a name that leads out of it."""
        for name, size in message.pop("files"):
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name!r} is no name of a file inside a folder")
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                while size:
                    part = self._read(min(size, 1 << 22))
                    file.write(part)
                    size -= len(part)

    def receive(self) -> dict[str, Any]:
        """Return the next message; EOFError or OSError if the other side is gone."""
        (length,) = LENGTH.unpack(self._read(LENGTH.size))
        return json.loads(self._read(length))  # type: ignore[no-any-return]

    def end_process_with_it(self) -> None:
        """End this process if the connection ends before a message comes: opening a model can take minutes."""

        def watch() -> None:
            try:
                arrived = self.connection.recv(1, socket.MSG_PEEK)
            except OSError:
                arrived = b""
            if not arrived:
                os._exit(1)

        threading.Thread(target=watch, daemon=True).start()

    def waiting(self) -> bool:
        """Return True if there is something to receive, the end of the connection included."""
        return bool(select.select([self.connection], [], [], 0)[0])

    def _read(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self.connection.recv(min(count - len(parts), 1 << 20))
            if not part:
                raise EOFError("the connection has ended")
            parts += part
        return bytes(parts)
