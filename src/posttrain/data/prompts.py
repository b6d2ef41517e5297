"""Load prompts from any source, and render them as the model reads them, generation prompt included."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from posttrain.config import DataConfig
from posttrain.config.problems import PROMPTS
from posttrain.core.errors import DataError
from posttrain.core.image_tokens import picture_keys
from posttrain.data.bad_rows import BadRow, BadRows, Row, check_values
from posttrain.data.cells import is_missing, read_text, required_field
from posttrain.data.chat_template import NO_PICTURES, Conversation
from posttrain.data.demonstrations import load_demonstrations
from posttrain.data.encoding import require_chat_template, with_pictures
from posttrain.data.formats import Record, to_record
from posttrain.data.image_turns import IMAGE_COLUMNS, without_images
from posttrain.data.learnt_turns import CUT_REASONING, SPELT
from posttrain.data.mixing import refuse_weights
from posttrain.data.parts import PlacedRow
from posttrain.data.pictures import Picture
from posttrain.data.plain_text import join_texts, plain_prompts
from posttrain.data.row_context import TEMPLATE_COLUMNS, TOOL_COLUMNS
from posttrain.data.row_fields import MEDIA, SourceRow
from posttrain.data.rows import PreparedItems, Rows, count_repeats, manifest_entry, open_rows
from posttrain.data.special_text import restore
from posttrain.data.tokenizing import tokenize
from posttrain.data.turns import make_message, read_turns, says_nothing, without_flags

if TYPE_CHECKING:
    from posttrain.data.prompt_sources import PromptRow, RowPrompts

OWN_FIELDS = {"messages", "prompt", "answer", "source", "template_args"}
"""Fields of a problem that take the place of the row's columns of these names."""
NO_ANSWER = "(no answer)"
"""Stands for the answer of a problem that has none; no reward takes it for a right one."""


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """Hold a prompt as the model reads it.

    Attributes:
        tokens: Token ids that the model continues.
        text: The same as text.
        problem: The row, which rewards see.
    """

    tokens: list[int]
    text: str
    problem: PromptRow

    @property
    def source(self) -> str:
        """Return the place of the row."""
        return str(self.problem["source"])


class PromptSet(PreparedItems[RenderedPrompt]):
    """Hold all prompts of a source, in order, and the manifest's entry about them."""

    noun = "problems"
    advice = (
        "Give held_out.problems other rows; or, for reasoning-gym, which makes item i from seed + i, a seed farther "
        "away than the problems' size"
    )

    def content(self, number: int) -> Hashable:
        """Return the text of a prompt, with its pictures."""
        return (self.items[number].text, *picture_keys(self.items[number].tokens))


def load_prompts(config: Any, tokenizer: Any, *, context: int | None, images: bool = False) -> PromptSet:
    """Load the prompts of a source, and render and tokenize them.

    Args:
        config: Settings of a source of prompts (a recipe's `problems`).
        tokenizer: The tokenizer; its chat template renders the prompts unless the settings have their own.
        context: The model's length in tokens. A prompt that leaves no room for an answer is a bad row.
        images: Prompts may have pictures. False: such a prompt is a bad row.

    Raises:
        DataError: The source can't be read, or (unless data.on_bad_row is skip) there are bad rows.
    """
    source, rows, bad = _load(config)
    total = len(rows) + sum(bad.counts.values())
    data = getattr(config, "data", None)
    in_chat = uses_chat_template(config, tokenizer)
    if not in_chat and config.demonstrations is not None and config.demonstrations.style == "turns":
        raise DataError("demonstrations.style is turns, and these prompts are plain text: set it to text")
    if in_chat:
        where = "data." if data is not None else ""
        require_chat_template(tokenizer, f"{where}chat=false to ask in plain text, or problems.template")
    limit = min(getattr(data, "max_tokens", None) or 2**62, (context or 2**62) - 1)
    special, notes = getattr(data, "special_tokens", "text"), Counter[str]()
    texts: list[tuple[PromptRow, str, tuple[Picture, ...]]] = []
    for row in rows:
        with bad.collect(row["source"]):
            rendered = _render(row, tokenizer, special, notes) if in_chat else (_plain(row, config.template), ())
            if rendered[1] and not images:
                raise BadRow(NO_PICTURES)
            texts.append((row, *rendered))
    items: list[RenderedPrompt] = []
    whole = [text for _, text, _ in texts]
    encoded = tokenize(tokenizer, whole) if in_chat else plain_prompts(whole, tokenizer, special)
    for (row, text, pictures), written in zip(texts, encoded, strict=True):
        with bad.collect(row["source"]):
            ids = with_pictures(written, pictures, tokenizer)
            if not ids:
                raise BadRow("empty prompt")
            if len(ids) > limit:
                raise BadRow(f"too long (the prompt has {len(ids)} tokens, and the limit is {limit})")
            items.append(RenderedPrompt(ids, restore(text), row))
    bad.check(total, len(items))
    stats = manifest_entry(
        [len(p.tokens) for p in items],
        bad,
        getattr(source, "title", config.kind),
        layout=config.kind,
        rows=total,
        duplicates=count_repeats((*p.tokens, *picture_keys(p.tokens)) for p in items),
        examples=[{"text": f"{p.source}, answer {p.problem['answer']}", "pieces": [[p.text, 0.0]]} for p in items[:3]],
        rendering={name: number for name, number in notes.items() if number},
    )
    if hasattr(source, "rows"):
        stats.update(sha256=source.rows.hashes, **source.rows.by_source(), **source.rows.fields.entry())
    return PromptSet(items, stats)


def uses_chat_template(config: Any, tokenizer: Any) -> bool:
    """Return True if the prompts of these settings are rendered through the chat template."""
    if config.template is not None:
        return False
    return bool(getattr(tokenizer, "chat_template", None)) if config.in_chat is None else bool(config.in_chat)


def _load(config: Any) -> tuple[Any, list[PromptRow], BadRows]:
    """Return the source, its rows, each with all the fields of a PromptRow, and the rows that can't be used."""
    source = PROMPTS.load(config.kind)
    if isinstance(source, type):
        source = source(config)
        loaded = list(source.load())
    else:
        loaded = list(source(**PROMPTS.own_settings(config)))
    bad = source.rows.bad if hasattr(source, "rows") else BadRows("skip")
    shown = None if config.demonstrations is None else load_demonstrations(config.demonstrations)
    rows = []
    for i, row in enumerate(loaded):
        place = str(row.get("source") or f"{config.kind}:{i}")
        with bad.collect(place):
            check_values(dict(row))
            prompt = _prompt_of(row)
            if shown is not None:  # rewards see the question alone, as `prompt`
                prompt["messages"] = shown.before(prompt["messages"], config.demonstrations.style)
            rows.append({**row, **prompt, "answer": row.get("answer", NO_ANSWER), "source": place})
    return source, rows, bad


def _prompt_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the turns of a prompt, and as `prompt` the text of the user's last turn."""
    prompt = row.get("prompt") if row.get("messages") is None else row["messages"]
    if isinstance(prompt, list | tuple):
        messages = list(without_flags(read_turns(prompt, "prompt"))) if prompt else []
    else:
        messages = [] if is_missing(prompt) else [make_message("user", read_text(prompt, "prompt"))]
    if not messages or says_nothing(messages[-1]):
        raise BadRow("empty question")
    if messages[-1]["role"] not in ("user", "tool"):
        raise BadRow(f"the prompt ends with a turn of the {messages[-1]['role']}, expected the user's or a tool's")
    user = [m for m in messages if m["role"] == "user"] or messages
    return {"messages": messages, "prompt": without_images(user[-1])["content"]}


def _render(
    row: PromptRow, tokenizer: Any, special_tokens: str, notes: Counter[str]
) -> tuple[str, tuple[Picture, ...]]:
    """Return a prompt by the chat template with its pictures, and count in `notes` what is worth telling."""
    tools, arguments = row.get("tools") or (), row.get("template_args")
    conversation = Conversation(tokenizer, row["messages"], tools, arguments, special_tokens)
    text = conversation.render(generation=True)
    notes[CUT_REASONING] += conversation.check(text, generation=True)
    notes[SPELT] += conversation.specials.total()
    return text, conversation.pictures


def _plain(row: PromptRow, template: str | None) -> str:
    """Return a prompt as plain text."""
    text = join_texts(row)
    return text if template is None else template.replace("{question}", text)


def rows_of_table(config: RowPrompts.Config) -> tuple[list[PromptRow], Rows]:
    """Read the rows of a table as problems: the conversation before the last turn, and the answer."""
    refuse_weights(config.data, "prompts")
    rows = open_rows(config.data, None if config.answers else "prompt")

    def problem(row: PlacedRow) -> PromptRow:
        record = row.record() if config.answers else _prompt_alone(row.row, row.config)
        row.row.notes.passed_on = row.row.keys() - OWN_FIELDS
        return _problem(_move_first_words(record, config.answer_prefix_words), row.row, row.source, config.instruction)

    return rows.read(problem, refused=MEDIA - set(IMAGE_COLUMNS)), rows


def _prompt_alone(row: SourceRow, data: DataConfig) -> Record:
    """Read the column prompt, text or turns (or data.prompt), with NO_ANSWER as the answer."""
    if data.prompt is None:
        required_field(row, "prompt")
        row = row.replaced(completion=NO_ANSWER)
    return replace(to_record(row, "prompt_completion", data), extra={"answer": NO_ANSWER})


def template_columns(problem: PromptRow) -> dict[str, Any]:
    """Return the columns by which rows made of a problem have its tools and template arguments."""
    columns = {"tools": problem.get("tools"), "chat_template_kwargs": problem.get("template_args")}
    return {name: value for name, value in columns.items() if value}


def require_plain_context(prompts: Sequence[RenderedPrompt], where: str) -> None:
    """Check that no prompt has tools or template arguments. Raises DataError; `where` tells what can't show them."""
    for prompt in prompts:
        if columns := template_columns(prompt.problem):
            names = " and ".join(columns)
            raise DataError(f"{where} can't show {names}, which {prompt.source} has. Leave such rows out")


def _move_first_words(record: Record, words: int) -> Record:
    """Move the first words of the answer to the end of the prompt, as they are written."""
    if not words:
        return record
    if [m["role"] for m in record.messages[-2:]] != ["user", "assistant"]:
        raise BadRow("no prompt and answer in it to take the first words of")
    *before, question, answer = record.messages
    first = re.match(rf"(?:\s*\S+){{{words}}}", answer["content"])
    rest = answer["content"][first.end() :] if first else ""
    if first is None or not rest.strip():
        raise BadRow(f"an answer of no more than {words} words: nothing is left to continue with")
    turns = make_message("user", question["content"] + first[0]), make_message("assistant", rest)
    return replace(record, messages=(*before, *turns), extra={**(record.extra or {}), "answer": rest})


def _problem(record: Record, row: Row, source: str, instruction: str | None) -> PromptRow:
    """Return a record as a problem; its last turn is the answer if the layout has no other."""
    if not record.messages or record.messages[-1]["role"] != "assistant":
        raise BadRow("no question and answer: expected a layout with both, such as verifiable (prompt, answer)")
    answer = (record.extra or {}).get("answer", record.messages[-1]["content"])
    if not str(answer).strip():
        calls = " (the last turn only calls tools)" if record.messages[-1].get("tool_calls") else ""
        raise BadRow(f"empty answer{calls}")
    prompt = _prompt_of({"messages": list(record.messages[:-1])})
    if instruction:
        asked = next(m for m in reversed(prompt["messages"]) if m["role"] == "user")
        asked["content"] = f"{asked['content']}\n{instruction}"
        prompt["prompt"] = without_images(asked)["content"]
    read = {*TOOL_COLUMNS, *TEMPLATE_COLUMNS, *IMAGE_COLUMNS, "template_args"}
    columns = {name: value for name, value in row.items() if name not in read}
    context = {"tools": list(record.tools), "template_args": record.template_args}
    given = {name: value for name, value in context.items() if value}
    return {**columns, **(record.extra or {}), "answer": answer, "source": source, **given, **prompt}
