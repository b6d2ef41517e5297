"""A writer of tasks that follows the requests, and a server that answers with its texts."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def answer_to(request: str, seed: int) -> tuple[str, str]:
    """The finish and the text of an answer: two tasks to keep, three to drop; two examples of each, or one."""
    k = seed % 10_000
    if request.startswith("Can each task"):
        return "end", "Answer: " + ("No" if "Describe" in request.split("Task: ")[-1] else "Yes")
    if request.startswith("Write an example of an input for each label"):
        return "end", f"Example 1\nLabel: yes\nInput: in {k}\nExample 2\nLabel: no\nInput: out {k}\n"
    if request.startswith("Write examples"):
        return "length", f"Example 1\nInput: none\nOutput: text {k}\nExample 2\nInput: a\nOutput: cut"
    if request.startswith("Task: "):
        return "end", "Output: Yes." if seed % 3 else f"Output: {seed}"
    if request.startswith("Rewrite"):
        return "end", f"New task: Explain how thing number {k} of kind {k * 7 % 1000} came to be in {k % 7} steps."
    number = re.search(r"with tasks (\d+) to", request)
    assert number is not None, request
    lines = [
        f"{number[1]}. Describe item {k} with {k * 3 % 997} facts on subject {k * 5 % 991} for reader {k % 13}.",
        f"10. Tell if sentence {k * 11 % 983} speaks of {k * 13 % 977} or {k * 17 % 971} things, {k % 17}.",
        "11. Draw a picture of a house on a hill.",
        "12. Decide whether the review is positive or negative.",
        "13. Cut of",
    ]
    return "length", "\n".join(lines)


@contextmanager
def served_tasks() -> Iterator[str]:
    """Serve the writer by OpenAI's protocol; yields its address, up to /v1."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            finish, text = answer_to(body["messages"][-1]["content"], body["seed"])
            choice = {"message": {"role": "assistant", "content": text}, "index": 0}
            reply = {"choices": [{**choice, "finish_reason": {"end": "stop"}.get(finish, finish)}]}
            data = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
