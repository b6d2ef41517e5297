"""HTTP around `ModelApi`: OpenAI's endpoints on the package's bounded server."""

from __future__ import annotations

import hmac
import time
from urllib.parse import unquote

from posttrain.core.secrets import add_secret
from posttrain.serving.api_answers import Json
from posttrain.serving.api_requests import ApiError, ChatBody, CompletionsBody, read_body, read_json_body
from posttrain.serving.bounded_server import BoundedHandler, BoundedServer
from posttrain.serving.model_api import ModelApi


class ApiServer(BoundedServer):
    """Answers OpenAI's requests. completions: what answers. api_key: None: nobody needs one."""

    def __init__(self, host: str, port: int, completions: ModelApi, api_key: str | None = None) -> None:
        self.completions, self.api_key = completions, api_key
        if api_key is not None:
            add_secret(api_key)
        self.created = int(time.time())
        super().__init__(host, port, _Handler)


class _Handler(BoundedHandler):
    server: ApiServer

    def get(self, path: str) -> None:
        """Answer questions about the server."""
        if path == "/health":
            running, waiting = self.server.completions.batcher.running()
            self.send_json(200, {"status": "ok", "running": running, "waiting": waiting})
            return
        self._check_key()
        model = self._model()
        if path == "/v1/models":
            self.send_json(200, {"object": "list", "data": [model]})
        elif path.startswith("/v1/models/"):
            self._check_model(unquote(path.removeprefix("/v1/models/")))
            self.send_json(200, model)
        else:
            raise ApiError(404, "there is no such page: see /v1/models")

    def post(self, path: str) -> None:
        """Answer completions."""
        raw = self.read_body_bytes()  # read first: else it would be taken for the connection's next request
        self._check_key()
        completions, gone = self.server.completions, self.client_gone
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
            self.send_json(200, answer)
        else:
            self.stream_events(answer, b"data: [DONE]\n\n")

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
