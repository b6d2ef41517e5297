"""The HTTP server of the package: Python's own, a thread for each connection, everything in it bounded."""

from __future__ import annotations

import json
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from posttrain.core.errors import ModelError
from posttrain.core.secrets import hide_secrets
from posttrain.core.visible_text import visible
from posttrain.serving.api_requests import ApiError

LARGEST_REQUEST = 4 * 2**20
"""Most bytes of a request."""
MOST_CONNECTIONS = 256
SILENCE = 60.0
"""Seconds without a byte after which a connection is closed, while a request is read or written."""
BODY_SECONDS = 120.0
"""Seconds in which a body has to arrive."""
WRITING = 5.0
"""Seconds in which clients can take the rest of their answers when the server stops."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ClientGone(Exception):
    """Report that whoever asked has closed the connection."""


def check_port(host: str, port: int) -> None:
    """Raise ModelError unless an address can be listened on: known before a model is loaded for it."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            raise port_error(f"{host}:{port}", error) from error


def port_error(place: str, error: OSError) -> ModelError:
    """Return the error of an address that can't be listened on."""
    return ModelError(f"{place} can't be listened on ({error.strerror}): give another --port")


class BoundedServer(ThreadingHTTPServer):
    """Listen, and give each connection to a thread. handler: answers the requests of a connection."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, handler: type[BoundedHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.host = host
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._idle = threading.Condition()
        self._answering = 0
        super().__init__((host, port), handler)

    def server_bind(self) -> None:
        """Bind without looking up the machine's name, which may take seconds."""
        if self.allow_reuse_address:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or refuse it if there are too many."""
        if not self._places.acquire(blocking=False):
            with suppress(OSError):
                request.settimeout(1)
                request.sendall(_refusal())
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection, and give its place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request that is being answered inside the `with` block."""
        with self._idle:
            self._answering += 1
        try:
            yield
        finally:
            with self._idle:
                self._answering -= 1
                self._idle.notify_all()

    def finish_writing(self) -> None:
        """Wait for answers that are computed and not yet written."""
        with self._idle:
            self._idle.wait_for(lambda: not self._answering, WRITING)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what failed on standard error, unless it is only that a client left."""
        if not isinstance(sys.exception(), OSError):
            _report()


def _refusal() -> bytes:
    body = json.dumps(ApiError(503, "too many connections: ask again later").body()).encode()
    head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close"
    return f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _report() -> None:
    sys.stderr.write(visible(hide_secrets(traceback.format_exc())))


class BoundedHandler(BaseHTTPRequestHandler):
    """Read requests within limits and write answers; a subclass has `get` and `post`."""

    server: BoundedServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "posttrain", ""
    timeout = SILENCE
    disable_nagle_algorithm = True

    def get(self, path: str) -> None:
        """Answer a GET. path: without its query."""
        raise NotImplementedError

    def post(self, path: str) -> None:
        """Answer a POST. path: without its query."""
        raise NotImplementedError

    def log_message(self, format: str, *args: Any) -> None:
        """Write no log of requests."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that is no HTTP, or has an unknown method, as other errors are answered.

        Args:
            code: HTTP status.
            message: What is wrong.
            explain: Not used.
        """
        self.close_connection = True
        self.send_api_error(ApiError(code, message or "the request can't be read"))

    def do_GET(self) -> None:
        """Answer a GET."""
        self._answer(self.get)

    def do_POST(self) -> None:
        """Answer a POST."""
        self._answer(self.post)

    def _answer(self, method: Any) -> None:
        self._streaming = False
        try:
            with self.server.answering():
                self._check_host()
                method(urlsplit(self.path).path.rstrip("/"))
        except (ClientGone, OSError):  # a timeout too: whoever asked is not there
            self.close_connection = True
        except ApiError as error:
            self._fail(error)
        except Exception:
            _report()
            self._fail(ApiError(500, "the server failed; its operator sees why"))

    def _check_host(self) -> None:
        """Refuse names of other hosts on loopback: a web page could ask us under a name that it controls."""
        host = self.headers.get("Host", "")
        name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
        if self.server.host in LOOPBACK and host and name.lower() not in LOOPBACK:
            raise ApiError(403, "this server answers to localhost alone")

    def read_body_bytes(self) -> bytes:
        """Return the body of a request, which has to be of JSON's type and no larger than `LARGEST_REQUEST`.

        Raises:
            ApiError: It is larger, has another type, or its length is not known.
            ClientGone: It does not arrive.
        """
        length = self.headers.get("Content-Length", "")
        self.close_connection = True  # until the body is read
        if self.headers.get("Transfer-Encoding") or not (length.isascii() and length.isdigit()):
            raise ApiError(411, "the request has no Content-Length")
        if len(length) > 12 or int(length) > LARGEST_REQUEST:
            raise ApiError(413, f"the body is larger than {LARGEST_REQUEST // 2**20} MiB")
        # No web page sends this type to another site without asking first, and that is never allowed.
        if self.headers.get_content_type() != "application/json":
            raise ApiError(415, "expected Content-Type: application/json")
        parts, left, until = list[bytes](), int(length), time.monotonic() + BODY_SECONDS
        while left:
            part = self.rfile.read1(min(left, 1 << 16))
            if not part or time.monotonic() > until:
                raise ClientGone
            parts.append(part)
            left -= len(part)
        self.close_connection = self.headers.get("Connection", "").lower() == "close"
        return b"".join(parts)

    def client_gone(self) -> bool:
        """Return True if the client has closed the connection."""
        with suppress(OSError, ValueError):
            seen = select.poll()  # not select(), which takes no file whose number is over 1,023
            seen.register(self.connection, select.POLLIN)
            if not seen.poll(0):
                return False
            return not self.connection.recv(1, socket.MSG_PEEK)
        return True

    def send_data(self, status: int, data: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
        """Write a whole answer.

        Args:
            status: HTTP status.
            data: The body.
            kind: Its Content-Type.
            headers: Further headers.
        """
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_json(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        """Write a whole answer as JSON.

        Args:
            status: HTTP status.
            body: The value.
            headers: Further headers.
        """
        self.send_data(status, json.dumps(body, ensure_ascii=False).encode(), "application/json", headers)

    def send_api_error(self, error: ApiError) -> None:
        """Write an answer that is an error."""
        self.send_json(error.status, error.body(), {"Retry-After": "1"} if error.status in (429, 503) else {})

    def stream_events(self, events: Iterator[Any], last: bytes = b"") -> None:
        """Write server-sent events, each a value as JSON, as they come. last: what follows them."""
        with closing(events):  # type: ignore[type-var]
            self.send_response(200)
            for name, value in (
                ("Content-Type", "text/event-stream; charset=utf-8"),
                ("Cache-Control", "no-cache"),
                ("Transfer-Encoding", "chunked"),
            ):
                self.send_header(name, value)
            self.end_headers()
            self._streaming = True
            for event in events:
                self._chunk(_event(event))
            if last:
                self._chunk(last)
            self._chunk(b"")

    def _fail(self, error: ApiError) -> None:
        with suppress(OSError):
            if self._streaming:  # the status was sent: an event says it, as OpenAI's clients expect
                self._chunk(_event(error.body()))
                self._chunk(b"")
            else:
                self.send_api_error(error)

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
