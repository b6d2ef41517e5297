"""A chat template that renders exactly the text that a reward model scores, for those who read it without posttrain.

A score is read at the end of the answer's turn. Templates of conversations go on after it (ChatML writes a line end),
and others leave out the end token; a score read at another place is the score of an untrained place. The template that
is saved with a reward model ends where scoring ends, and holds what posttrain otherwise adds: the system message of
training, the template's arguments, the date.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.core.errors import DataError
from posttrain.data.template_source import bake_date, template_args

Tokens = Callable[[Sequence[Mapping[str, str]], str], Sequence[int]]
"""(turns of the prompt, completion) -> the tokens that are scored."""

log = logging.getLogger("posttrain")
PROBES = (
    ([{"role": "user", "content": "Hi"}], "Hello. "),
    ([{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "Two?"}],
     "2\n\nand more"),
    ([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}], "Because é."),
)  # fmt: skip
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
ENDS = ("{{ TEXT }}", "{{ TEXT.rstrip() }}", "{{ TEXT.rstrip() }}{{ eos_token }}", "{{ TEXT }}{{ eos_token }}")
"""What may follow a template's text: the first that gives the scored tokens is taken."""


def scoring_tokenizer(tokenizer: Any, chat: bool, system: str | None, tokens: Tokens) -> tuple[Any, list[int]]:
    """Return a tokenizer to save with a reward model: `apply_chat_template` of a conversation gives the scored tokens.

    Tokenizing the rendered text gives them too: the template writes all special tokens, and the tokenizer adds none.

    Args:
        tokenizer: The tokenizer of training.
        chat: The model reads conversations by the chat template; False: their texts joined.
        system: System message that every conversation was given.
        tokens: Computes the tokens that are scored.

    Returns:
        The tokenizer, and the token ids that the one of training puts before a text (for chat: false, where posttrain
        adds them).
    """
    from posttrain.data.template_limits import limit_templates

    limit_templates()
    saved = copy.deepcopy(tokenizer)
    first = _first_tokens(tokenizer)
    _add_nothing(saved)
    sources = (
        tokenizer.chat_template if chat else json.dumps(tokenizer.decode(first)).join(("{{ ", " }}")) + PLAIN_TEMPLATE
    )
    given = template_args(tokenizer) if chat else {}
    for end in ENDS:
        parts = sources if isinstance(sources, Mapping) else {"": sources}
        wrapped = {name: _wrapped(source, end, system, given) for name, source in parts.items()}
        saved.chat_template = wrapped if isinstance(sources, Mapping) else wrapped[""]
        if _agrees(saved, tokens):
            return saved, [] if chat else first
    saved.chat_template = tokenizer.chat_template
    log.warning(
        "the reward model's chat template could not be changed to end where scores are read: other programs must cut "
        "the rendered text after the end of the answer's turn"
    )
    return saved, [] if chat else first


def _wrapped(source: str, end: str, system: str | None, given: Mapping[str, Any]) -> str:
    """Return a template whose text is that of `source` with another end; a generation prompt is left as it is.

    The text of a system message replaces the conversation's own. `{{ '' }}` keeps Jinja from cutting white space beside
    the tags around it.
    """
    before = "".join(f"{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}" for name, value in given.items())
    if system is not None:
        turn = f"{{'role': 'system', 'content': {json.dumps(system, ensure_ascii=False)}}}"
        before += f"{{% set messages = [{turn}] + (messages | rejectattr('role', 'equalto', 'system') | list) %}}"
    if end == ENDS[0] and not before:
        return source
    text = "{% set posttrain_text %}{{ '' }}" + bake_date(source) + "{{ '' }}{% endset %}"
    ended = end.replace("TEXT", "posttrain_text")
    return f"{before}{text}{{% if add_generation_prompt %}}{{{{ posttrain_text }}}}{{% else %}}{ended}{{% endif %}}"


def _agrees(tokenizer: Any, tokens: Tokens) -> bool:
    """Return True if the tokenizer's template gives the scored tokens of all probes that the template accepts."""
    compared = 0
    for turns, completion in PROBES:
        try:
            expected = list(tokens(turns, completion))
        except DataError:  # the template has no place for a system message, say
            continue
        whole = [*turns, {"role": "assistant", "content": completion}]
        try:
            text = tokenizer.apply_chat_template(whole, tokenize=False)
            found = [
                tokenizer.apply_chat_template(whole, return_dict=False),
                tokenizer(text)["input_ids"],
                tokenizer(text, add_special_tokens=False)["input_ids"],
            ]
        except Exception:  # a template may raise anything
            return False
        if any(list(ids) != expected for ids in found):
            return False
        compared += 1
    return compared > 0


def _first_tokens(tokenizer: Any) -> list[int]:
    """Return the special tokens that a tokenizer puts before a text."""
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for i in range(len(whole)):
        if whole[i : i + len(bare)] == bare:
            return list(whole[:i])
    return []


def _add_nothing(tokenizer: Any) -> None:
    """Let a tokenizer add no special tokens to a text."""
    for name in ("add_bos_token", "add_eos_token"):
        if getattr(tokenizer, name, None):
            setattr(tokenizer, name, False)
    if tokenizer("a")["input_ids"] != tokenizer("a", add_special_tokens=False)["input_ids"]:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            from tokenizers.processors import TemplateProcessing

            backend.post_processor = TemplateProcessing(single="$A", pair="$A $B")
