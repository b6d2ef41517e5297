"""Chat templates that would take forever or all memory end in a message; ordinary ones are rendered as before."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from posttrain.config import ModelConfig
from posttrain.core.errors import ModelError
from posttrain.data import template_limits
from posttrain.data.bad_rows import BadRow
from posttrain.data.template_source import apply_template
from posttrain.models.loading import load_tokenizer

DOUBLING = (
    "{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
    "{{{{ ns.x }}}}"
)
GREEDY = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop whose test takes time": "{% for a in range(99999) if range(99999)|sum < 0 %}{% endfor %}",
    "a filter over lists": "{{ ([range(99999)] * 9999)|map('sum')|list|length }}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a product": "{{ 'a' * 10**10 }}",
    "a product of lists": "{{ ([1] * 1000000000)|length }}",
    "a power": "{{ 10**(10**10) }}",
    "texts that double by ~": DOUBLING.format(start="'ab'", step="ns.x ~ ns.x"),
    "texts that double by +": DOUBLING.format(start="'ab'", step="ns.x + ns.x"),
    "lists that double": DOUBLING.format(start="[1]", step="ns.x + ns.x"),
    "lists of lists": DOUBLING.format(start="[1]", step="[ns.x, ns.x]"),
    "dicts of dicts": DOUBLING.format(start="[1]", step="{'a': ns.x, 'b': ns.x}"),
    "dicts by a call": DOUBLING.format(start="[1]", step="dict(a=ns.x, b=ns.x)"),
    "namespaces": DOUBLING.format(start="[1]", step="namespace(a=ns.x, b=ns.x)"),
    "batches": DOUBLING.format(start="[1]", step="(ns.x * 2)|batch(2)|list"),
    "a block that doubles": (
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% set ns.x = y %}{% endfor %}"
    ),
    "much output": "{% set x = 'a' * 9000000 %}{% for i in range(90000) %}{{ x }}{% endfor %}",
    "many texts": (
        "{% set ns = namespace(x=[]) %}{% for i in range(900) %}{% set ns.x = ns.x + ['a' * 9000000] %}{% endfor %}"
    ),
    "a wide filter": "{{ 'a'|center(10000000000) }}",
    "a wide method": "{{ 'a'.ljust(10000000000) }}",
    "a wide number": "{{ '%9999999999d' % 1 }}",
    "a wide value": "{{ '%*d' % (9999999999, 1) }}",
    "a wide format": "{{ '{:9999999999}'.format(1) }}",
    "a wide field": "{{ '{:{w}}'.format(1, w=9999999999) }}",
    "replace": "{{ ('a' * 40000).replace('a', 'b' * 40000) }}",
    "replace as a filter": "{{ ('a' * 40000)|replace('a', 'b' * 40000) }}",
    "join": "{{ (['a' * 80000] * 8000)|join }}",
    "join of an iterator": "{{ range(90000)|map('string')|join('a' * 9000) }}",
    "join as a method": "{{ ('b' * 80000).join('a' * 8000) }}",
    "indent": "{{ ('\n' * 80000)|indent(8000) }}",
    "tabs": "{{ ('\t' * 80000).expandtabs(8000) }}",
    "translate": "{{ ('a' * 90000).translate({97: 'b' * 9000}) }}",
    "sum of lists": "{{ ([[1]] * 100000)|sum(start=[])|length }}",
    "a list in itself": "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns }}",
    "a long template": " " * 2_000_000,
}


@pytest.mark.parametrize("name", GREEDY)
def test_it_ends_in_a_message(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)
    tokenizer = load_tokenizer(ModelConfig(source="tiny:llama", chat_template="{{ messages }}"))
    tokenizer.chat_template = GREEDY[name]
    began = time.thread_time()
    with pytest.raises(ModelError, match="the chat template (takes|makes|joins|has)"):
        apply_template(tokenizer, [{"role": "user", "content": "q"}])
    assert time.thread_time() - began < 10  # not for its speed: without a limit it would be hours


@pytest.mark.parametrize(
    "source",
    ["{% block a %}{{ self.a() }}{% endblock %}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ lipsum() }}"],
)
def test_what_python_or_jinja_refuses_is_a_message_too(source: str) -> None:
    tokenizer = load_tokenizer(ModelConfig(source="tiny:llama"))
    tokenizer.chat_template = source
    with pytest.raises(BadRow, match="the chat template refuses it"):
        apply_template(tokenizer, [{"role": "user", "content": "q"}])


def test_transformers_own_rendering_is_limited_and_gives_the_same_text() -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers.utils import chat_template_utils

    tokenizer = load_tokenizer(ModelConfig(source="tiny:llama"))
    turns = [{"role": "user", "content": "q\n"}, {"role": "assistant", "content": " a {{ 1 }}"}] * 3
    for file in sorted((Path(__file__).parent / "templates").glob("*.jinja")):
        tokenizer.chat_template = file.read_text()
        texts = []
        for environment in (ImmutableSandboxedEnvironment, template_limits.LimitedEnvironment):
            chat_template_utils._compile_jinja_template.cache_clear()
            chat_template_utils.ImmutableSandboxedEnvironment = environment
            for prompt in (False, True):
                try:
                    texts.append(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))
                except Exception as error:
                    texts.append(str(error))
        assert texts[:2] == texts[2:], file
    tokenizer.chat_template = GREEDY["a product"]
    with pytest.raises(ModelError, match="makes a text"):
        tokenizer.apply_chat_template(turns, tokenize=False)


def test_what_real_templates_do_is_far_from_the_limits() -> None:
    """A long document, a thousand turns, large tools."""
    tokenizer = load_tokenizer(ModelConfig(source="tiny:llama"))
    tokenizer.chat_template = (
        "{% set ns = namespace(text='', turns=[]) %}{{ tools|tojson(indent=4) }}{% for m in messages %}"
        "{% set ns.text = ns.text + m.content|trim %}{% set ns.turns = ns.turns + [m] %}"
        "{{ '%-10s' % m.role }}{{ m.content.split('.')|join('!') }}{% endfor %}{{ ns.text }}{{ ns.turns|length }}"
    )
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": {"x": [1] * 50}}} for i in range(500)]
    turns = [{"role": "user", "content": "A sentence. " * 100}] * 1000
    text = apply_template(tokenizer, turns, tools=tools)
    assert len(text) > 2_000_000 and text.endswith("1000")
    assert "a" * 5_000_000 in apply_template(tokenizer, [{"role": "user", "content": "a" * 5_000_000}])


def test_a_method_of_a_text_that_a_loop_has_set() -> None:
    tokenizer = load_tokenizer(ModelConfig(source="tiny:llama"))
    tokenizer.chat_template = (
        "{% for m in messages %}{% set c = m.content %}{{ c.strip() + c.rstrip('b') }}{% endfor %}"
    )
    assert apply_template(tokenizer, [{"role": "user", "content": " ab"}]) == "ab a"
