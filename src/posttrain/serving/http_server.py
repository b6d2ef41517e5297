"""HTTP around `ModelApi`: OpenAI's endpoints on the package's bounded server."""

from __future__ import annotations

import hmac
import time
from collections.abc import Sequence
from urllib.parse import unquote

from posttrain.core.secrets import add_secret
from posttrain.serving.api_answers import Json
from posttrain.serving.api_requests import ApiError, ChatBody, CompletionsBody, read_body, read_json_body
from posttrain.serving.bounded_server import BoundedHandler, BoundedServer
from posttrain.serving.model_api import ModelApi


class ApiServer(BoundedServer):
    """Answers OpenAI's requests. models: the model, and the adapters on it. api_key: None: nobody needs one."""

    def __init__(self, host: str, port: int, models: Sequence[ModelApi], api_key: str | None = None) -> None:
        self.base, self.models, self.api_key = models[0], {api.name: api for api in models}, api_key
        if api_key is not None:
            add_secret(api_key)
        self.created = int(time.time())
        super().__init__(host, port, _Handler)


class _Handler(BoundedHandler):
    server: ApiServer

    def get(self, path: str) -> None:
        """Answer questions about the server."""
        if path == "/health":
            running, waiting = self.server.base.batcher.running()
            self.send_json(200, {"status": "ok", "running": running, "waiting": waiting})
            return
        self._check_key()
        if path == "/v1/models":
            self.send_json(200, {"object": "list", "data": list(map(self._described, self.server.models.values()))})
        elif path.startswith("/v1/models/"):
            self.send_json(200, self._described(self._model(unquote(path.removeprefix("/v1/models/")))))
        else:
            raise ApiError(404, "there is no such page: see /v1/models")

    def post(self, path: str) -> None:
        """Answer completions."""
        raw = self.read_body_bytes()  # read first: else it would be taken for the connection's next request
        self._check_key()
        if path not in ("/v1/chat/completions", "/v1/completions"):
            raise ApiError(404, "there is no such endpoint: ask /v1/chat/completions or /v1/completions")
        body = read_json_body(raw)
        if path == "/v1/completions":
            asked = read_body(body, CompletionsBody)
            answer = self._model(asked.model).complete(asked, self.client_gone)
        else:
            chat = read_body(body, ChatBody)
            answer = self._model(chat.model).chat(chat, self.client_gone)
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

    def _model(self, name: str | None) -> ModelApi:
        """Return what answers under a name; without one, the model alone."""
        models = self.server.models
        if name is None:
            return self.server.base
        if name not in models:
            has = (
                f"the models {', '.join(map(repr, models))}"
                if len(models) > 1
                else f"the model {self.server.base.name!r}"
            )
            raise ApiError(404, f"this server has {has}", "model", "model_not_found")
        return models[name]

    def _described(self, api: ModelApi) -> Json:
        of_base = {} if api.adapter is None else {"parent": self.server.base.name}
        return {"id": api.name, "object": "model", "created": self.server.created, "owned_by": "posttrain", **of_base}
