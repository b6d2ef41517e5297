"""A teacher behind a server: a real model over HTTP, in OpenAI's protocol, with its own likeliest tokens."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.core.errors import DataError
from posttrain.core.types import Sample
from posttrain.losses.linear_logprobs import head_logits
from posttrain.methods.distill import teacher_answers, teacher_model
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.sampling.engine import LocalSampler
from tests.methods.distill.test_distill import metrics_of, run, slow_kl, stage_of

TOP = 3


class Served:
    """A tiny model that answers chat requests; `mangled`: it names its tokens as another tokenizer would."""

    def __init__(self) -> None:
        self.tokenizer = tiny_tokenizer()
        self.model = LanguageModel(tiny_model("qwen2").eval()).requires_grad_(False)
        self.sampler = LocalSampler(self.model, self.tokenizer)
        self.asked = 0
        self.mangled = False
        self.lock = threading.Lock()

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            self.asked += 1
            prompt = self.tokenizer.apply_chat_template(body["messages"], tokenize=True, add_generation_prompt=True)
            ids = list(prompt["input_ids"] if hasattr(prompt, "keys") else prompt)
            # Only letters: a byte that is a part of a character has no text of its own.
            tokens = [self.tokenizer("abcdefg"[(body["seed"] >> 3 * n) % 7])["input_ids"][0] for n in range(4)]
            sample = Sample([*ids, *tokens], [0.0] * len(ids) + [1.0] * len(tokens))
            batch = self.model.pack([sample])
            with torch.no_grad():
                hidden = self.model(batch, "hidden")[batch.predictors_T[batch.weighted_rows[0]]]
                logprobs = head_logits(hidden, self.model.head()).log_softmax(-1)
        content = []
        for token, row in zip(tokens, logprobs, strict=True):
            likely = row.topk(body.get("top_logprobs", 0)).indices.tolist()
            tops = [{"token": self.text(i), "logprob": float(row[i])} for i in likely]
            content.append({"token": self.text(token), "logprob": float(row[token]), "top_logprobs": tops})
        told = {"content": content} if body.get("logprobs") else None
        message = {"role": "assistant", "content": self.tokenizer.decode(tokens)}
        return {"choices": [{"message": message, "finish_reason": "stop", "logprobs": told}]}

    def text(self, token: int) -> str:
        text = self.tokenizer.decode([token])
        return f"{text}{text}" if self.mangled else text if "�" not in text else f"token_id:{token}"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Served, str]]:
    pytest.importorskip("openai")
    for module in (teacher_answers, teacher_model):
        monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")
    model = Served()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = json.dumps(model.answer(body)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield model, f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": "x"}) + "\n" for i in range(6)))
    return path


def taught(url: str, **changes: Any) -> dict[str, Any]:
    base = {"teacher": {"server": {"model": "t", "base_url": url}}, "teacher_text": True, "batch_size": 6}
    return {**base, "max_steps": 1, **changes}


def test_distributions_from_a_server(served: tuple[Served, str], rows: Path, tmp_path: Path) -> None:
    """With nearly all tokens told, the divergence is that of the whole distributions, and the end is certain."""
    model, url = served
    stage = stage_of(rows, **taught(url, top_k=TOP))
    (made,) = run(stage, tmp_path / "a")
    assert model.asked == 6 and len(stage.rows) == 6
    assert all(len(s.tokens) - s.weights.index(1.0) == 5 for s in stage.rows)  # four letters and the end
    total, count = 0.0, 0
    student, teacher = tiny_model("llama"), tiny_model("qwen2")
    for s in stage.rows:
        ids = torch.tensor([list(s.tokens)])
        with torch.no_grad():
            q, p = (m(input_ids=ids).logits[0].double().softmax(-1) for m in (student, teacher))
        for place, weight in enumerate(s.weights):
            if not weight:
                continue
            token, last = s.tokens[place], place == len(s.tokens) - 1
            kept = [token] if last else sorted({token, *p[place - 1].topk(TOP).indices.tolist()})
            one = torch.ones(1, dtype=torch.float64)
            classes = [(one if last and x is p else x[place - 1][kept], x[place - 1]) for x in (p, q)]
            (a, _), (b, _) = classes
            tail_p, tail_q = (1e-7 if last else float(1 - a.sum())), float(1 - b.sum())
            total += float((a * (a / b).log()).sum()) + (0 if last else tail_p * math.log(tail_p / tail_q))
            count += 1
    assert made["divergence"] == pytest.approx(total / count, rel=1e-4)
    again = run(stage_of(rows, **taught(url, top_k=TOP)), tmp_path / "b")
    assert model.asked == 6 and again == metrics_of(tmp_path / "a")  # nothing is asked twice


def test_text_from_a_server_works_across_tokenizers(served: tuple[Served, str], rows: Path, tmp_path: Path) -> None:
    model, url = served
    model.mangled = True
    (made,) = run(stage_of(rows, **taught(url, divergence=None)), tmp_path / "a")
    assert made["loss"] > 0 and "divergence" not in made
    with pytest.raises(DataError, match="tokens are not the student's in 6 of 6 answers.*divergence: null"):
        run(stage_of(rows, **taught(url, top_k=TOP)), tmp_path / "b")


def test_answers_of_a_model_here_are_its_own_tokens(rows: Path, tmp_path: Path, served: tuple[Served, str]) -> None:
    """Rows are the prompt and exactly what the teacher drew, cut answers left out; the loss is on these tokens."""
    drawn = {"max_tokens": 300, "temperature": 1.0}
    stage = stage_of(rows, teacher_text=True, teacher_sampler=drawn, batch_size=6, epochs=1, max_steps=None)
    made = run(stage, tmp_path / "a")
    sampler = served[0].sampler
    assert 0 < len(stage.rows) <= 6
    for s in stage.rows:
        start = s.weights.index(1.0)
        assert s.tokens[-1] in sampler.ends and set(s.weights[start:]) == {1.0}
    expected = slow_kl(list(stage.rows), tiny_model("llama"), tiny_model("qwen2"))
    assert made[0]["divergence"] == pytest.approx(expected, rel=1e-4)
