"""Arguments and dates of chat templates: the same for everything that renders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import ModelConfig
from posttrain.core.errors import ModelError
from posttrain.data.bad_rows import BadRow
from posttrain.data.chat_template import render_chat
from posttrain.data.template_source import (
    apply_template,
    fixed_date,
    set_template_args,
    template_args,
    template_identity,
    template_variables,
)
from posttrain.models.loading import load_tokenizer
from posttrain.recipe.parsing import load_recipe
from posttrain.runs.run_folder import CHECK_FIELD
from posttrain.runs.runner import run

from .tokenizers import byte_level

ASK = [{"role": "user", "content": "q"}]
SWITCH = (
    "{% set sure = true %}{% if not loud is defined %}{% set loud = false %}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if loud %}!{% endif %}{% if shy %}?{% endif %}"
)
DATED = (
    "{%- macro day() -%}{{ strftime_now('%d %b %Y') }}{%- endmacro -%}{% if strftime_now is defined %}"
    "<|im_start|>system\n{{ day() }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_arguments_of_recipe_and_row(tmp_path: Path) -> None:
    config = ModelConfig(source="tiny:llama", chat_template=SWITCH, chat_template_args={"loud": True})
    tokenizer = load_tokenizer(config)
    assert render_chat(tokenizer, ASK) == "q!"
    assert render_chat(tokenizer, ASK, arguments={"shy": 1}) == "q!?"
    assert render_chat(tokenizer, ASK, arguments={"loud": False}) == "q"
    # What opens the saved tokenizer later renders alike.
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    again = load_tokenizer(ModelConfig(source=str(tmp_path)))
    assert template_args(again) == {"loud": True} and render_chat(again, ASK) == "q!"
    assert template_identity(again) == template_identity(tokenizer)
    assert template_identity(again) != template_identity(load_tokenizer(ModelConfig(source="tiny:llama")))


def test_unknown_arguments_are_refused_with_those_that_the_template_reads() -> None:
    assert template_variables(SWITCH) == {"loud", "shy"}
    tokenizer = byte_level()
    tokenizer.chat_template = SWITCH
    for wrong in ("lout", "sure_", "messages", "tokenize", "m"):
        with pytest.raises(ModelError, match=f"no argument '{wrong}'. Arguments of the chat template: loud, shy"):
            set_template_args(tokenizer, {wrong: True})
    with pytest.raises(BadRow, match="no argument 'lout'") as caught:
        render_chat(tokenizer, ASK, arguments={"lout": 1})
    assert "loud, shy" in caught.value.hint
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        set_template_args(tokenizer, {"loud": True})


@pytest.mark.parametrize("lead", ["", "\n", "  ", " \n "])
def test_the_date_is_fixed_and_the_rest_of_the_text_is_what_transformers_writes(lead: str) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = lead + DATED
    plain = tokenizer.apply_chat_template(ASK, tokenize=False)
    with fixed_date("2024-02-29"):
        text = apply_template(tokenizer, ASK)
    assert "29 Feb 2024" in text and text.replace("29 Feb 2024", "") == plain.replace(apply_day(), "")
    tokenizer.chat_template = "{{ strftime_now('%A, %-d %B %Y, %j %H:%M') }}"
    with fixed_date("2024-02-05"):
        assert apply_template(tokenizer, ASK) == "Monday, 5 February 2024, 036 00:00"


def apply_day() -> str:
    """Today as transformers writes it."""
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}"
    return str(tokenizer.apply_chat_template(ASK, tokenize=False))


def test_a_run_keeps_the_date_of_its_first_day(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    changes = ["name=r", "model.source=tiny:llama", "model.device=cpu", f"stages.sft.data.source={rows}"]
    changes += ["stages.sft.max_steps=1", "evaluate=[]", "stages.sft.optimizer.warmup=0"]
    recipe = load_recipe("sft", changes)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"chat_template": DATED})})
    folder = tmp_path / "run"
    with fixed_date("2024-02-28"):
        run(recipe, folder)
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    assert manifest["date"] == "2024-02-28"
    # Resumed on another day, the rows are read again and must be the same.
    manifest.pop(CHECK_FIELD)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "status": "stopped"}))
    with fixed_date("2024-02-29"):
        run(recipe, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    text = "".join(piece for piece, _ in manifest["data"][0]["examples"][0]["pieces"])
    assert manifest["resumed"] == 1 and manifest["date"] == "2024-02-28" and "28 Feb 2024" in text
