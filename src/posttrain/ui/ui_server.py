"""The server of the pages: on loopback, for whoever has the token that the command printed."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from posttrain.core.errors import CheckpointError, PosttrainError
from posttrain.core.secrets import hide_secrets
from posttrain.serving.api_requests import ApiError, read_json_body
from posttrain.serving.bounded_server import BoundedHandler, BoundedServer
from posttrain.ui.actions import ACTIONS
from posttrain.ui.chat_models import ChatRequest, read_request
from posttrain.ui.pages import PAGES, UiState
from posttrain.ui.templates import POLICY, render_ui, static_file

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
REPORT_POLICY = (
    "sandbox allow-scripts allow-popups; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:"
)
"""Policy of a run's report, whose file others may have written: it gets an origin of its own, without the cookie."""


class UiServer(BoundedServer):
    """Serves the pages. port: 0: any free one. state: The runs that they show."""

    def __init__(self, port: int, state: UiState) -> None:
        self.state, self.token = state, secrets.token_urlsafe(24)
        super().__init__("127.0.0.1", port, _UiHandler)

    @property
    def address(self) -> str:
        """Return the address to open, with the token."""
        return f"http://127.0.0.1:{self.server_port}/?token={self.token}"

    @property
    def cookie(self) -> str:
        """Return the name of the cookie: cookies do not tell ports apart, and several pages may be served."""
        return f"posttrain-{self.server_port}"


class _UiHandler(BoundedHandler):
    server: UiServer

    def get(self, path: str) -> None:
        """Answer with a page, a part of one, or a file that pages load."""
        query = parse_qs(urlsplit(self.path).query)
        if "token" in query:
            self._log_in(query["token"][0])
            return
        self._check_token()
        if path.startswith("/static/"):
            found = static_file(path.removeprefix("/static/"))
            if found is None:
                raise ApiError(404, "there is no such file")
            self._send_text(200, *found)
        elif path == "/report":
            self._send_report(query)
        elif path in PAGES:
            text = self._refused_as_error(lambda: PAGES[path](self.server.state, query))
            self._send_text(200 if text is not None else 204, text or "")
        else:
            raise ApiError(404, "there is no such page")

    def post(self, path: str) -> None:
        """Carry out an action of a page."""
        raw = self.read_body_bytes()  # first: else it would be taken for the connection's next request
        self._check_token()
        self._check_origin()
        body = read_json_body(raw)
        if path == "/chat":
            asked = self._refused_as_error(lambda: read_request(ChatRequest, body))
            state = self.server.state
            self.stream_events(self._refused_as_error(lambda: state.chats.answer(asked, self.client_gone)))
        elif path in ACTIONS:
            self.send_json(200, self._refused_as_error(lambda: ACTIONS[path](self.server.state, body)), HEADERS)
        else:
            raise ApiError(404, "there is no such action")

    # ------------------------------------------------------------------------------------------------------- checks
    def _log_in(self, token: str) -> None:
        """Put the token into a cookie, so that it stays in no address, no history and no screenshot."""
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise ApiError(401, "the token is wrong: open the address that `posttrain ui` printed last")
        cookie = f"{self.server.cookie}={self.server.token}; HttpOnly; SameSite=Strict; Path=/"
        self.send_data(303, b"", "text/plain", {**HEADERS, "Location": "/", "Set-Cookie": cookie})

    def _check_token(self) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        try:
            morsel = SimpleCookie(self.headers.get("Cookie", "")).get(self.server.cookie)
        except CookieError:
            morsel = None
        given = given or (morsel.value if morsel else "")
        if not hmac.compare_digest(given.encode("latin-1", "replace"), self.server.token.encode()):
            raise ApiError(401, "open the address that `posttrain ui` printed: it has the token that lets you in")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise ApiError(403, "another site asked for this page: open it from its own")

    def _check_origin(self) -> None:
        """Refuse actions that another page asks for: the browser names the page's origin."""
        origin = self.headers.get("Origin")
        by_header = self.headers.get("Authorization") is not None
        if origin != f"http://{self.headers.get('Host')}" and not (origin is None and by_header):
            raise ApiError(403, "another page asked for this action")

    # ------------------------------------------------------------------------------------------------------ answers
    def _refused_as_error(self, action: Any) -> Any:
        try:
            return action()
        except PosttrainError as error:
            raise ApiError(404 if isinstance(error, CheckpointError) else 400, hide_secrets(str(error))) from error

    def _send_report(self, query: Mapping[str, list[str]]) -> None:
        run = self._refused_as_error(lambda: self.server.state.run_of(query))
        try:
            text = (run.folder / "report.html").read_text(encoding="utf-8")
        except OSError as error:
            raise ApiError(404, f"{run.key} has no report yet: it is written when the run ends") from error
        self._send_text(200, text, headers={"Content-Security-Policy": REPORT_POLICY})

    def _send_text(
        self, status: int, text: str, kind: str = "text/html; charset=utf-8", headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_data(status, text.encode("utf-8", "replace"), kind, {**HEADERS, **(headers or {})})

    def send_api_error(self, error: ApiError) -> None:
        """Write an error as a page, or as JSON for the pages' scripts."""
        if self.command == "POST":
            self.send_json(error.status, {"error": str(error)}, HEADERS)
        else:
            self._send_text(error.status, render_ui("error.html.j2", status=error.status, message=str(error), here=""))
