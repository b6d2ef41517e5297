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
        content = json.dumps(message, separators=(",", ":")).encode()
        with self._sending:
            self.connection.sendall(LENGTH.pack(len(content)) + content)

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
