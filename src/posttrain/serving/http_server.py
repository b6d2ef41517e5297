"""HTTP around `ModelApi`: Python's own server with a thread for each connection, everything in it bounded."""

from __future__ import annotations

import hmac
import json
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from posttrain.core.secrets import add_secret, hide_secrets
from posttrain.core.visible_text import visible
from posttrain.serving.api_answers import Json
from posttrain.serving.api_requests import ApiError, ChatBody, CompletionsBody, read_body, read_json_body
from posttrain.serving.model_api import ClientGone, ModelApi

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


class ApiServer(ThreadingHTTPServer):
    """Listens, and gives each connection to a thread. completions: what answers. api_key: None: nobody needs one."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, completions: ModelApi, api_key: str | None = None) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.completions, self.api_key, self.host = completions, api_key, host
        if api_key is not None:
            add_secret(api_key)
        self.created = int(time.time())
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._idle = threading.Condition()
        self._answering = 0
        super().__init__((host, port), _Handler)

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


class _Handler(BaseHTTPRequestHandler):
    server: ApiServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "posttrain", ""
    timeout = SILENCE
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Write no log of requests."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that is no HTTP, or has an unknown method, in the protocol's shape."""
        self.close_connection = True
        self._send_error(ApiError(code, message or "the request can't be read"))

    def do_GET(self) -> None:
        """Answer questions about the server."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Answer completions."""
        self._answer(self._post)

    def _answer(self, method: Any) -> None:
        self.streaming = False
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

    def _get(self, path: str) -> None:
        if path == "/health":
            running, waiting = self.server.completions.batcher.running()
            self._send(200, {"status": "ok", "running": running, "waiting": waiting})
            return
        self._check_key()
        model = self._model()
        if path == "/v1/models":
            self._send(200, {"object": "list", "data": [model]})
        elif path.startswith("/v1/models/"):
            self._check_model(unquote(path.removeprefix("/v1/models/")))
            self._send(200, model)
        else:
            raise ApiError(404, "there is no such page: see /v1/models")

    def _post(self, path: str) -> None:
        raw = self._body()  # read first: else it would be taken for the connection's next request
        self._check_key()
        completions, gone = self.server.completions, self._gone
        if path not in ("/v1/chat/completions", "/v1/completions"):
            raise ApiError(404, "there is no such endpoint: ask /v1/chat/completions or /v1/completions")
        body = read_json_body(raw)
        if path == "/v1/completions":
            asked = read_body(body, CompletionsBody)
            self._check_model(asked.model)
            answer = completions.complete(asked, gone)
        else:
            chat = read_body(body, ChatBody)
            self._check_model(chat.model)
            answer = completions.chat(chat, gone)
        if isinstance(answer, dict):
            self._send(200, answer)
        else:
            self._stream(answer)

    # ------------------------------------------------------------------------------------------------------- checks
    def _check_host(self) -> None:
        """Refuse names of other hosts on loopback: a web page could ask us under a name that it controls."""
        host = self.headers.get("Host", "")
        name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
        if self.server.host in LOOPBACK and host and name.lower() not in LOOPBACK:
            raise ApiError(403, "this server answers to localhost alone")

    def _check_key(self) -> None:
        if self.server.api_key is None:
            return
        kind, _, key = self.headers.get("Authorization", "").partition(" ")
        given = key.strip().encode("latin-1", "replace") if kind.lower() == "bearer" else b""
        if not hmac.compare_digest(given, self.server.api_key.encode()):
            raise ApiError(401, "the key is missing or wrong: Authorization: Bearer KEY", None, "invalid_api_key")

    def _check_model(self, name: str | None) -> None:
        own = self.server.completions.name
        if name not in (None, own):
            raise ApiError(404, f"this server has the model {own!r}", "model", "model_not_found")

    def _model(self) -> Json:
        name = self.server.completions.name
        return {"id": name, "object": "model", "created": self.server.created, "owned_by": "posttrain"}

    def _body(self) -> bytes:
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

    def _gone(self) -> bool:
        """Return True if the client has closed the connection."""
        with suppress(OSError, ValueError):
            if not select.select([self.connection], [], [], 0)[0]:
                return False
            return not self.connection.recv(1, socket.MSG_PEEK)
        return True

    # ------------------------------------------------------------------------------------------------------ answers
    def _send(self, status: int, body: Json, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body, ensure_ascii=False).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _send_error(self, error: ApiError) -> None:
        retry = {"Retry-After": "1"} if error.status in (429, 503) else {}
        self._send(error.status, error.body(), retry)

    def _fail(self, error: ApiError) -> None:
        with suppress(OSError):
            if self.streaming:  # the status was sent: an event says it, as OpenAI's clients expect
                self._chunk(_event(error.body()))
                self._chunk(b"")
            else:
                self._send_error(error)

    def _stream(self, chunks: Iterator[Json]) -> None:
        with closing(chunks):  # type: ignore[type-var]
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Cache-Control", "no-cache")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.streaming = True
            for chunk in chunks:
                self._chunk(_event(chunk))
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def _event(value: Json) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
