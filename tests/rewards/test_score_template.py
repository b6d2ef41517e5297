"""The template saved with a reward model renders exactly what is scored; tokenizing it adds nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from posttrain.data.template_source import fixed_date, set_template_args
from posttrain.models.tiny_model import CHATML, tiny_tokenizer
from posttrain.rewards.reward_model_scorer import Member
from posttrain.rewards.score_template import scoring_tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n\\n' + m['content'] | trim }}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"
)
NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"  # noqa: E501
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML
LINES = "\n{% for m in messages %}\n<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n  {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # noqa: E501
THINKING = CHATML.replace("{% for", "{{ 'deep ' if deep else 'shallow ' }}{% for", 1)
DATED = "{{ 'Today: ' + strftime_now('%d %B %Y') + '\n' }}" + CHATML
CASES: dict[str, dict[str, Any]] = {
    "chatml": {"template": CHATML},
    "bos in template and tokenizer": {"template": LLAMA3, "bos": True},
    "no end token": {"template": NO_END},
    "refuses system turns": {"template": NO_SYSTEM},
    "white space around": {"template": LINES},
    "arguments": {"template": THINKING, "arguments": {"deep": True}},
    "date": {"template": DATED},
    "system of training": {"template": CHATML, "system": 'Say "hi" é\n{{ braces }}'},
    "several": {"template": {"default": CHATML, "tool_use": CHATML}},
    "plain": {"template": CHATML, "chat": False},
    "plain with bos": {"template": None, "chat": False, "bos": True, "system": "Be good. "},
}


def make(template: Any, bos: bool = False, arguments: dict[str, Any] | None = None, **_: Any) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    set_template_args(tokenizer, arguments or {})
    return tokenizer


@pytest.mark.parametrize("case", CASES)
def test_the_rendered_text_is_the_scored_text(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = CASES[case]
    chat, system = settings.get("chat", True), settings.get("system")
    tokenizer = make(**settings)
    with fixed_date("2024-02-03"):
        scored = Member(None, tokenizer, chat, system)  # type: ignore[arg-type]
        saved, first = scoring_tokenizer(tokenizer, chat, system, scored.answer)
        saved.save_pretrained(tmp_path)
        alone = AutoTokenizer.from_pretrained(tmp_path)  # transformers alone
        again = Member(None, alone, chat, system, first=tuple(first))  # type: ignore[arg-type]
        one = [{"role": "user", "content": "Hello there"}]
        three = [*one, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
        conversations = [(one, " A longer answer,\nin two lines. \n"), (three, "4")]
        expected = [list(scored.answer(*c)) for c in conversations]
        assert [list(again.answer(*c)) for c in conversations] == expected  # posttrain, from the folder
        assert [again.prompt(c[0]) for c in conversations] == [scored.prompt(c[0]) for c in conversations]
    for (turns, completion), ids in zip(conversations, expected, strict=True):
        whole = [*turns, {"role": "assistant", "content": completion}]
        text = alone.apply_chat_template(whole, tokenize=False)
        assert list(alone.apply_chat_template(whole, return_dict=False)) == ids
        assert alone(text)["input_ids"] == ids and alone.decode(ids) == text
    assert not caplog.records and tokenizer.chat_template == settings["template"]


def test_a_template_that_already_ends_there_is_left_as_it_is() -> None:
    tokenizer = make(LLAMA3)
    tokenizer.bos_token = "<|endoftext|>"
    member = Member(None, tokenizer, True)  # type: ignore[arg-type]
    assert scoring_tokenizer(tokenizer, True, None, member.answer)[0].chat_template == LLAMA3


def test_what_no_template_can_do_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "posttrain"):
        saved, _ = scoring_tokenizer(make(CHATML), True, None, lambda turns, completion: [1, 2, 3])
    assert "could not be changed to end where scores are read" in caplog.text and saved.chat_template == CHATML
