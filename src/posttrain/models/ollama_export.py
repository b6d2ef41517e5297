"""Write a Modelfile, by which Ollama serves a GGUF file with the chat template that the model was trained with.

Ollama has templates in Go's language, not in Jinja, so the parts around each role's text are found by rendering the
model's own template with marks in the place of texts. What was found is used only if it gives the same text as the
template for conversations of several shapes; a template that does more (dates, thoughts that are cut, other text for
a first turn) is refused rather than approximated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.core.errors import ModelError
from posttrain.data.bad_rows import BadRow
from posttrain.data.template_source import apply_template, template_args

Turn = tuple[str, str]
"""(role, text)."""
TEXT_MARK = "\u2042text\u2042"
SHAPES: list[list[str]] = [
    ["user"], ["system", "user"], ["user", "assistant", "user"], ["system", "user", "assistant", "user"],
    ["user", "assistant", "user", "assistant", "user"],
]  # fmt: skip
"""Roles of the conversations that are compared."""


@dataclass(frozen=True)
class TurnParts:
    """Hold what a chat template writes around texts.

    Attributes:
        around: Role -> (text before, text after).
        unasked: What is written before a conversation that has no system turn.
        generation: What is written for the model to continue.
    """

    around: dict[str, tuple[str, str]]
    unasked: str
    generation: str

    def render(self, turns: Sequence[Turn]) -> str:
        """Return the text of a conversation, with the generation prompt."""
        parts = [] if turns[0][0] == "system" else [self.unasked]
        parts += [self.around[role][0] + text + self.around[role][1] for role, text in turns]
        return "".join([*parts, self.generation])


def turn_parts(tokenizer: Any) -> TurnParts:
    """Find what a tokenizer's chat template writes around texts.

    Raises:
        ModelError: There is no template, or it is more than text around turns.
    """
    if not tokenizer.chat_template:
        raise ModelError("a Modelfile needs the chat template, and the tokenizer has none: export --to gguf instead")
    ids = tokenizer("a")["input_ids"]
    begins = bool(ids) and ids[0] == tokenizer.bos_token_id  # llama.cpp writes it then, before the template's text

    def text(roles: Sequence[str], generation: bool = True) -> str:
        turns = [{"role": role, "content": f"{TEXT_MARK}{i}."} for i, role in enumerate(roles)]
        found = apply_template(tokenizer, turns, generation, None, template_args(tokenizer))
        return found.removeprefix(tokenizer.bos_token) if begins else found

    def between(found: str, i: int) -> str:
        """Text from turn i to the next one; -1: before the first."""
        after = found.split(f"{TEXT_MARK}{i}.", 1)[1] if i >= 0 else found
        return after.split(TEXT_MARK, 1)[0]

    try:
        long = text(["system", "user", "assistant", "user", "assistant", "user"])
        short, plain = text(["user"]), text(["system", "user"], False)
        full = text(["system", "user", "assistant"], False)
    except BadRow as error:
        raise refusal(f"it refuses a conversation: {error}") from error
    if long.count(TEXT_MARK) != 6 or short.count(TEXT_MARK) != 1:
        raise refusal("it leaves out a text, or writes one twice")
    # What ends a turn is what two texts of different next turns begin with.
    user_end = plain.rsplit(f"{TEXT_MARK}1.", 1)[1]
    assistant_end = full.rsplit(f"{TEXT_MARK}2.", 1)[1]
    user_start = _after(between(long, 2), assistant_end)
    system_end = between(long, 0).removesuffix(user_start)
    around = {
        "system": (between(long, -1), system_end),
        "user": (user_start, user_end),
        "assistant": (_after(between(long, 1), user_end), assistant_end),
    }
    generation = _after(short.split(f"{TEXT_MARK}0.", 1)[1], user_end)
    parts = TurnParts(around, between(short, -1).removesuffix(user_start), generation)
    for roles in SHAPES:
        turns = [(role, f"{TEXT_MARK}{i}.") for i, role in enumerate(roles)]
        if parts.render(turns) != text(roles):
            raise refusal(f"it writes turns of {', '.join(roles)} in another way than it writes them alone")
    return parts


def refusal(why: str) -> ModelError:
    """Return the error of a template that Ollama can't be told."""
    return ModelError(
        f"the chat template can't be written for Ollama: {why}. export --to gguf writes the template into the file, "
        "which llama.cpp's own server reads"
    )


def _after(text: str, start: str) -> str:
    if not text.startswith(start):
        raise refusal(f"after a turn there is {text[:60]!r} and not {start[:60]!r}")
    return text[len(start) :]


def go_template(parts: TurnParts) -> str:
    """Return the template in Ollama's language: `.Messages` one after the other, then the generation prompt."""
    branches = [
        f'{{{{ {word} eq .Role "{role}" }}}}{_literal(before)}{{{{ .Content }}}}{_literal(after)}'
        for word, (role, (before, after)) in zip(("if", "else if", "else if"), parts.around.items(), strict=True)
    ]
    unasked = f"{{{{ if not .System }}}}{_literal(parts.unasked)}{{{{ end }}}}" if parts.unasked else ""
    return (
        f"{unasked}{{{{ range .Messages }}}}{''.join(branches)}{{{{ end }}}}{{{{ end }}}}{_literal(parts.generation)}"
    )


def _literal(text: str) -> str:
    """Return text as it stands in a Go template: braces that would begin an action are printed by one."""
    return text.replace("{{", '{{ "{{" }}')


def write_modelfile(tokenizer: Any, ends: Sequence[int], gguf: Path, folder: Path) -> Path:
    """Write `Modelfile` beside a GGUF file.

    Args:
        tokenizer: The model's tokenizer, with its chat template.
        ends: Tokens that end an answer.
        gguf: The file, in `folder`.
        folder: Where to write.

    Raises:
        ModelError: The chat template can't be written in Ollama's language.
    """
    template = go_template(turn_parts(tokenizer))
    if '"""' in template:
        raise refusal('it has """ in it, which ends a text in a Modelfile')
    stops = dict.fromkeys(tokenizer.convert_ids_to_tokens(int(i)) for i in ends)
    lines = [f"FROM ./{gguf.name}", f'TEMPLATE """{template}"""']
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    file = folder / "Modelfile"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
