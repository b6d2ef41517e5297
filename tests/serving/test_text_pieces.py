"""Text in pieces: together they are the text, none is taken back, and none holds a part of a stop string or a call."""

from __future__ import annotations

import random

import pytest

from posttrain.data.tool_calls import calls_in_text
from posttrain.models.tiny_model import tiny_tokenizer
from posttrain.sampling.stop_strings import before_stop
from posttrain.serving.text_pieces import TextPieces

TOKENIZER = tiny_tokenizer()


def decode(tokens, plain=True) -> str:
    return TOKENIZER.decode(list(tokens), skip_special_tokens=plain)


def test_random_texts_with_stop_strings() -> None:
    """Bytes of texts with characters of up to four bytes, special tokens among them, ended by a stop string or not."""
    rng = random.Random(0)
    stopped = 0
    for _ in range(150):
        text = "".join(rng.choice(["a", "b", "ab", "é", "🙂", "\n", "<|im_start|>"]) for _ in range(12))
        tokens, stops = TOKENIZER(text)["input_ids"], rng.sample(["abb", "b\nb", "é🙂", "aa", "🙂<|im_start|>a"], 2)
        pieces, out = TextPieces(decode, stops), ""
        for end in range(1, len(tokens) + 1):
            whole = before_stop(tokens[:end], stops, decode)
            if whole is not None or end == len(tokens):
                break
            out += pieces.add(tokens[end - 1])
            assert "\ufffd" not in out
        stopped += whole is not None
        whole = decode(tokens) if whole is None else whole
        assert whole.startswith(out) and out + pieces.finish(whole) == whole
    assert 30 < stopped < 140


CALL = '{"name": "add", "arguments": {"a": 1, "b": [2]}}'
ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("It is 3.", "It is 3.", []),
        (f"<tool_call>\n{CALL}\n</tool_call>", "", [ADD]),
        (f"I add.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}", "I add.", [ADD, ADD]),
        (CALL.replace("arguments", "parameters"), "", [ADD]),
        (f" [{CALL}, {CALL}]", "", [ADD, ADD]),
        (CALL.replace("add", "other"), CALL.replace("add", "other"), []),  # an answer in JSON
        ("<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
        ('{"answer": 3}', '{"answer": 3}', []),
        ("[" * 5000, "[" * 5000, []),
    ],
)
def test_calls_in_answers(text: str, content: str, calls: list) -> None:
    assert calls_in_text(text, {"add"}) == (content, calls)
    pieces, out = TextPieces(decode, (), True), ""
    for token in TOKENIZER(text)["input_ids"][:300]:
        out += pieces.add(token)
    assert "<tool_call" not in out and not out.lstrip().startswith(("{", "["))
    assert len(text) > 300 or (out + pieces.finish(content)).strip() == content.strip()
