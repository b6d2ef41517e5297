"""Special tokens that texts spell are text, those that a template or a rendered text writes are tokens."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.data.chat_template import render_chat
from posttrain.data.learnt_turns import SPELT, render_with_loss
from posttrain.data.sft_rows import prepare
from posttrain.data.special_text import ControlTokens, guard, restore
from posttrain.data.tokenizing import tokenize, tokenize_rendered

from .tokenizers import TEMPLATES, byte_level, merging, sentencepiece

CONTROL = ControlTokens.of(["<|im_end|>", "<|im_start|>", "<s>", "</s>", "[INST]", *(f"<R_{i}>" for i in range(300))])


@pytest.mark.parametrize(
    "text",
    [
        "a <|im_end|> b",
        "<|im_",
        "end|> x",
        " <|im_ \n",
        "> q",
        "<R_17>",
        "",
        "\U00100041 <s> \U0010fffd\U0010ffff",
        "a",
    ],
)
def test_a_guarded_text_has_no_special_token_and_comes_back(text: str) -> None:
    found: Counter[str] = Counter()
    guarded = guard(text, CONTROL, found)
    assert CONTROL.pattern is not None and not CONTROL.pattern.search(guarded) and restore(guarded) == text
    assert found.total() == sum(t in text for t in CONTROL.texts)
    for other in CONTROL.texts:
        for n in range(1, len(other)):  # whatever stands beside it
            assert other not in guard(other[:n], CONTROL) + guard(other[n:], CONTROL)


@pytest.mark.parametrize("make", [byte_level, merging, sentencepiece])
@pytest.mark.parametrize("name", [n for n in TEMPLATES if n not in ("no_end", "needs_two")])
def test_every_turn_may_spell_every_special_token(name: str, make: Any) -> None:
    tokenizer = make(name)
    specials = list(tokenizer.all_special_tokens)
    added = set(tokenizer.added_tokens_decoder) - {tokenizer.convert_tokens_to_ids("<unk>")}

    def control(texts: tuple[str, str, str, str]) -> list[int]:
        roles = ("user", "assistant", "user", "assistant")
        turns: Any = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        samples = render_with_loss(tokenizer, turns, "completion")
        assert (SPELT in samples[0].notes) == ("good" not in texts[0])
        ids, weights = tokenize_rendered(tokenizer, samples)[0][0]
        prompt = tokenize(tokenizer, [render_chat(tokenizer, turns[:3], generation=True)])[0]
        assert ids[: len(prompt)] == prompt and not any(weights[: len(prompt)]) and all(weights[len(prompt) :])
        return [t for t in ids if t in added]

    expected = control(("good day", "good end", "the end", "bad end"))
    for token in specials:
        half = len(token) // 2
        texts = (f"a {token} b", f"{token}a", f"the {token[:half]}", f"{token[half:]} end {token}")
        assert control(texts) == expected, token


def test_special_tokens_are_allowed_on_request(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b <|im_end|> c"}) + "\n")
    tokenizer = byte_level()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = prepare(DataConfig(source=str(path)), tokenizer)
    allowed = prepare(DataConfig(source=str(path), special_tokens="allow"), tokenizer)
    assert list(text.samples[0].tokens).count(end) == 2 and list(allowed.samples[0].tokens).count(end) == 3
    assert text.stats["rendering"] == {SPELT: 1} and not allowed.stats["rendering"]


def beginning() -> Any:
    """Return a tokenizer that puts <s> before a text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level("mistral")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize(
    "row",
    [
        {"text": "<s><|user|>Hi<|assistant|>Ahoy!</s>"},
        {"text": "<s><|user|>Hi<|assistant|>Ahoy!</s>\n"},
        {"text": "<s><s>Hi</s></s>"},
        {"text": "Hi"},
        {"prompt": "<s><|user|>Hi<|assistant|>", "completion": "Ahoy!</s>\n "},
        {"prompt": "Hi", "completion": "Ahoy!</s>"},
        {"prompt": "Hi", "completion": "Ahoy!"},
        {"messages": [{"role": "user", "content": "<s>Hi"}, {"role": "assistant", "content": "Ahoy!</s>\n"}]},
    ],
)
def test_a_text_begins_and_ends_once(row: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    tokenizer = beginning()
    data = prepare(DataConfig(source=str(tmp_path / "rows.jsonl"), chat="messages" in row), tokenizer)
    tokens, weights = list(data.samples[0].tokens), list(data.samples[0].weights)
    assert tokens.count(tokenizer.bos_token_id) == 1 and tokens[0] == tokenizer.bos_token_id
    assert tokens.count(tokenizer.eos_token_id) == 1 and tokens[-1] == tokenizer.eos_token_id and weights[-1]
    if "<|user|>" in str(row):
        assert tokenizer.convert_tokens_to_ids("<|user|>") in tokens  # it is rendered already


@pytest.mark.parametrize("chat", [True, False])
def test_a_tokenizer_without_an_end_token_is_refused(chat: bool, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    tokenizer = byte_level("no_end")
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"no end token.*\n.*\n.*model.add_tokens"):
        prepare(DataConfig(source=str(tmp_path / "rows.jsonl"), chat=chat), tokenizer)


def test_a_long_conversation_takes_time_in_proportion_to_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.data import chat_template

    rendered = 0
    plain = chat_template.apply_template

    def counted(tokenizer: Any, messages: Any, *rest: Any) -> str:
        nonlocal rendered
        rendered += len(messages)
        return plain(tokenizer, messages, *rest)

    monkeypatch.setattr(chat_template, "apply_template", counted)
    turns: Any = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(800)]
    tokenizer = byte_level()
    (sample,) = render_with_loss(tokenizer, turns, "assistant")
    assert [sample.text[a:b] for a, b in sample.spans] == [f"turn {i}<|im_end|>" for i in range(1, 800, 2)]
    assert rendered < 45 * 800
