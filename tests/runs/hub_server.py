"""A server that speaks the part of the Hub's HTTP interface that an upload uses, and keeps what it is sent."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_" + "a1B2c3D4e5F6" * 3


@dataclass
class HubState:
    """Hold repositories (name → private), their files, large objects by hash, and the messages of commits."""

    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    state: HubState
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, value: Any, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_HEAD(self) -> None:
        self.answer(200, {})

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid user token."})
        if self.path.startswith("/api/whoami"):
            return self.answer(200, {"type": "user", "name": "me", "orgs": []})
        name = re.fullmatch(r"/api/models/([^/]+/[^/]+)", self.path.split("?")[0])
        if name is None or name[1] not in self.state.private:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        names = sorted(self.state.files[name[1]])
        info = {"id": name[1], "sha": self.state.head, "private": self.state.private[name[1]]}
        self.answer(200, info | {"siblings": [{"rfilename": n} for n in names], "tags": [], "downloads": 0})

    def do_PUT(self) -> None:
        content = self.body()
        assert self.path == f"/large/{hashlib.sha256(content).hexdigest()}"
        self.state.objects[self.path.removeprefix("/large/")] = content
        self.answer(200, {})

    def do_POST(self) -> None:
        body = self.body()
        if self.path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.state.private[name], self.state.files[name] = asked["visibility"] == "private", {}
            return self.answer(200, {"url": f"http://{self.headers['Host']}/{name}", "id": name})
        if self.path.endswith("/info/lfs/objects/batch"):
            href = f"http://{self.headers['Host']}/large/"
            objects = json.loads(body)["objects"]
            actions = [{**o, "actions": {"upload": {"href": href + o["oid"]}}} for o in objects]
            return self.answer(200, {"transfer": "basic", "objects": actions})
        place = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path.split("?")[0])
        assert place is not None, self.path
        if place[2] == "preupload":
            large = {f["path"]: f["path"].endswith(".safetensors") for f in json.loads(body)["files"]}
            modes = [{"path": p, "uploadMode": "lfs" if is_l else "regular"} for p, is_l in large.items()]
            return self.answer(200, {"files": [m | {"shouldIgnore": False} for m in modes]})
        self.commit(place[1], [json.loads(line) for line in body.splitlines()])

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.state.files[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                assert value["parentCommit"] == self.state.head
                self.state.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.state.objects[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        url = f"http://{self.headers['Host']}/{name}/commit/{self.state.head}"
        self.answer(200, {"commitUrl": url, "commitOid": self.state.head, "success": True})


@contextmanager
def hub() -> Iterator[tuple[str, HubState]]:
    """Serve on a free port of this machine; yield (address, what it holds)."""
    state = HubState()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", state
    finally:
        server.shutdown()
        server.server_close()
