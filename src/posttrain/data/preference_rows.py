"""Prepare preferences: two answers to one prompt of which one is better, or single answers that are good or bad.

Both samples of a pair begin with the same prompt tokens, so that the prompt is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.core.types import Message, Sample
from posttrain.data.bad_rows import BadRow, Row
from posttrain.data.cells import is_good_label, is_missing, missing_field, read_number, required_field
from posttrain.data.encoding import Encoded, ParsedRow
from posttrain.data.formats import NO_COMPLETIONS, Record, row_completions, to_record
from posttrain.data.image_turns import IMAGE_COLUMNS
from posttrain.data.parts import PlacedRow
from posttrain.data.row_context import read_history
from posttrain.data.row_fields import SourceRow, source_row
from posttrain.data.rows import PreparedItems, Rows, marked_example
from posttrain.data.sample_store import SampleStore
from posttrain.data.sft_rows import prompt_and_completion
from posttrain.data.stored_items import store_items
from posttrain.data.stored_pairs import Pair, StoredAnswers, StoredPairs, Unpaired
from posttrain.data.turns import answer_text, read_turns, says_nothing, without_flags

PAIRED = ("preference", "hh_rlhf", "ultrafeedback")
"""Layouts that hold two answers."""
ANSWERS = ("prompt", "chosen", "rejected", "completion", "completions", "instruction", "probability", "margin", "text")
"""Columns that `row` of a pair has under other names."""
LABEL_COLUMNS = ("label", "kto_tag")
"""Columns that can say whether an answer is good; kto_tag is LLaMA-Factory's."""


class PreparedPairs(PreparedItems[Pair]):
    """Hold pairs and what the manifest and the report say about them."""

    items: StoredPairs

    @property
    def samples(self) -> SampleStore:
        """Return chosen and rejected by turns."""
        return self.items.store

    def labelled(self, count: int) -> list[list[tuple[str, Sample]]]:
        """Return the answers of the first `count` pairs, each with its label."""
        return [[("chosen", p.chosen), ("rejected", p.rejected)] for p in self.items[:count]]

    def content(self, number: int) -> Hashable:
        """Return a value of a pair; two pairs are the same whichever answer is the better one."""
        return self.items.content(number)


class PreparedUnpaired(PreparedItems[Unpaired]):
    """Hold single answers and what the manifest and the report say about them."""

    items: StoredAnswers

    @property
    def samples(self) -> SampleStore:
        """Return the samples of the answers."""
        return self.items.store

    def labelled(self, count: int) -> list[list[tuple[str, Sample]]]:
        """Return the first `count` answers, each alone with its label."""
        return [[("desirable" if u.desirable else "undesirable", u.sample)] for u in self.items[:count]]

    def content(self, number: int) -> Hashable:
        """Return a value of an answer, after its prompt."""
        return self.samples.content(number)

    def label_of(self, number: int) -> bool:
        """Return True if an answer is a good one."""
        return self.items.is_good(number)


def prepare_pairs(
    config: DataConfig, tokenizer: Any, *, context: int | None = None, margins: bool = True
) -> PreparedPairs:
    """Make pairs of rows laid out as preference, hh_rlhf or ultrafeedback (its best answer against its worst).

    Columns `probability` (that the chosen answer is the better one; below 0.5 the two change places, counted as
    `swapped`) and `margin` are optional; ultrafeedback's margin is the difference of its scores.

    Args:
        config: Settings of the data.
        tokenizer: The tokenizer, with the chat template.
        context: The model's length in tokens.
        margins: The loss uses margins. False: a column with them counts as one without effect.

    Raises:
        DataError: Settings don't fit, or (unless config.on_bad_row is skip) there are bad rows: equal answers, ties,
            empty answers, a chosen answer that repeats the prompt, prompts that don't match, numbers out of their
            range, missing fields, too many tokens.
    """
    _check_loss_on(config)
    if config.prompt is not None or config.classes is not None:
        raise DataError(
            "data.prompt, data.completion and data.classes make one answer a row, and a pair has two. Name the "
            "columns instead: data.columns: {prompt: ..., chosen: ..., rejected: ...}"
        )
    store, texts, stats = store_items(config, tokenizer, context, _PairReader(margins))
    return PreparedPairs(StoredPairs(store, texts), stats)


class _PairReader:
    """Read pairs."""

    samples, images = 2, True
    fields: tuple[tuple[str, str], ...] = (
        ("prompt", "<u4"),
        ("probability", "<f8"),
        ("margin", "<f8"),
        ("swapped", "u1"),
    )

    def __init__(self, margins: bool) -> None:
        self.margins, self.kind = margins, f"pairs, {margins}"

    def check(self, rows: Rows) -> None:
        if any(part.layout not in PAIRED for part in rows.parts):
            raise DataError(
                f"{rows.config.name} is laid out as {rows.layout}, which holds no pairs: expected columns prompt, "
                f"chosen and rejected ({', '.join(PAIRED)}). Rows with single answers and a label are for method: kto"
            )

    def parse(self, row: PlacedRow) -> ParsedRow:
        two = _row_pair(row.row, row.layout, row.config, row.source)
        if not self.margins:
            row.row.notes.read.discard("margin")
        return two

    def make(self, parsed: ParsedRow, encoded: Sequence[Encoded], source: str) -> tuple[list[Sample], dict[str, float]]:
        """Return both answers. Raises BadRow if their tokens are not two answers to one prompt."""
        chosen, rejected = encoded
        prompt = _prompt_length(chosen[1])
        if prompt != _prompt_length(rejected[1]) or chosen[0][:prompt] != rejected[0][:prompt]:
            raise BadRow("the prompts don't match (once rendered: the chat template writes them otherwise)")
        if chosen[0] == rejected[0]:
            raise BadRow("the two answers are equal (once cut or tokenized)")
        return [Sample(*chosen, source), Sample(*rejected, source)], {**parsed.values, "prompt": prompt}

    def statistics(self, rows: Rows, store: SampleStore, tokenizer: Any) -> dict[str, Any]:
        pairs = StoredPairs(store, [])
        swapped = int(np.count_nonzero(store.columns["swapped"][::2]))
        examples = _examples(PreparedPairs(pairs).labelled(2), tokenizer)
        stats = {**rows.statistics(store, tokenizer), "used": len(pairs), "swapped": swapped}
        return {**stats, **pairs.repeats(), "examples": examples}


def prepare_unpaired(config: DataConfig, tokenizer: Any, *, context: int | None = None) -> PreparedUnpaired:
    """Make single answers, each good or bad: by the column `label` (true or false), or by a rating and data.classes.

    data.classes has two names then, the bad one first.

    Args:
        config: Settings of the data.
        tokenizer: The tokenizer, with the chat template.
        context: The model's length in tokens.

    Raises:
        DataError: As for `prepare_pairs`; reasons are missing fields, unknown labels, empty answers, a good answer
            that repeats the prompt, too many tokens.
    """
    _check_loss_on(config)
    if config.classes is not None and len(config.classes.names) != 2:
        raise DataError(f"data.classes.names are {config.classes.names}: expected two, the bad one first")
    store, texts, stats = store_items(config, tokenizer, context, _AnswerReader())
    return PreparedUnpaired(StoredAnswers(store, texts), stats)


class _AnswerReader:
    """Read single answers with a label."""

    kind, samples, images = "answers", 1, True
    fields: tuple[tuple[str, str], ...] = (("prompt", "<u4"), ("desirable", "u1"))

    def check(self, rows: Rows) -> None:
        if rows.config.classes is None and not any(rows.has(name) for name in LABEL_COLUMNS):
            raise DataError(
                f"{rows.config.name} has no column label (true or false), and its columns are {rows.columns}. "
                "Name it (data.columns: {label: thumbs_up}), or make it of a number: data.classes: {column: rating, "
                "cuts: [3], names: [bad, good]}"
            )

    def parse(self, row: PlacedRow) -> ParsedRow:
        classes = row.config.classes
        desirable = _is_good(row.row) if classes is None else row.row["label"] == classes.names[1]
        record = _without_flags(row.record(), "the answer")
        _check_answer(record, "the answer")
        if desirable:
            _check_repetition(record)
        about = {**_other_columns(row.row), **prompt_and_completion(record, row.source), "label": desirable}
        return ParsedRow([record], about, {"desirable": desirable})

    def make(self, parsed: ParsedRow, encoded: Sequence[Encoded], source: str) -> tuple[list[Sample], dict[str, float]]:
        return [Sample(*encoded[0], source)], {**parsed.values, "prompt": _prompt_length(encoded[0][1])}

    def statistics(self, rows: Rows, store: SampleStore, tokenizer: Any) -> dict[str, Any]:
        answers = StoredAnswers(store, [])
        examples = _examples(PreparedUnpaired(answers).labelled(3), tokenizer)
        stats = {**rows.statistics(store, tokenizer), "desirable": answers.good}
        return {**stats, **answers.repeats(), "examples": examples}


def _examples(answers: Sequence[Sequence[tuple[str, Sample]]], tokenizer: Any) -> list[dict[str, Any]]:
    return [marked_example(sample, tokenizer, label=label) for item in answers for label, sample in item]


def _check_loss_on(config: DataConfig) -> None:
    if config.loss_on != "completion":
        raise DataError(
            f"data.loss_on is {config.loss_on!r}, and preferences compare completions: leave it at completion"
        )


def _other_columns(row: Row) -> Row:
    return {k: v for k, v in row.items() if k not in ANSWERS and k not in IMAGE_COLUMNS}


def _row_pair(row: SourceRow, layout: str, config: DataConfig, source: str) -> ParsedRow:
    """Return the answers of a row, checked. Raises BadRow."""
    if layout == "ultrafeedback":
        chosen, rejected, margin = _best_and_worst(row, config)
    else:
        chosen, rejected, margin = *two_records(row, layout, config), 0.0
    probability = 1.0 if row.get("probability") is None else read_number(row["probability"], "probability")
    if not 0 <= probability <= 1:
        raise BadRow(f"probability out of range: it is {probability:g}, expected a number from 0 to 1")
    if probability == 0.5:
        raise BadRow("a tie: its probability is 0.5")
    if row.get("margin") is not None:
        margin = read_number(row["margin"], "margin")
    if not 0 <= margin < math.inf:
        raise BadRow(f"margin out of range: it is {margin:g}, expected a difference of scores, 0 or more")
    check_pair(chosen, rejected)
    swapped = probability < 0.5
    if swapped:
        chosen, rejected, probability = rejected, chosen, 1 - probability
    _check_repetition(chosen)
    answers = {**prompt_and_completion(chosen, source), "rejected": answer_text(rejected.messages[-1])}
    values = {"probability": probability, "margin": margin, "swapped": swapped}
    return ParsedRow([chosen, rejected], {**_other_columns(row), **answers}, values)


def two_records(row: Row, layout: str, config: DataConfig) -> tuple[Record, Record]:
    """Return the chosen and the rejected answer of a row, each read as supervised fine-tuning reads the chosen one.

    Args:
        row: The row.
        layout: Its layout, preference or hh_rlhf.
        config: Settings of the data.

    Raises:
        BadRow: A field is missing, the two answers differ in form, the column prompt differs from the conversation, or
            a flag of an answer asks for no loss.
    """
    row = source_row(row, config.ignore)
    answers = [required_field(row, name) for name in ("chosen", "rejected")]
    in_turns = [isinstance(answer, list | dict) for answer in answers]
    if layout == "preference" and in_turns[0] != in_turns[1]:
        raise BadRow("one answer is text and the other a list of turns")
    chosen, rejected = (to_record(row.replaced(chosen=answer), layout, config) for answer in answers)
    if layout == "preference" and isinstance(answers[0], list) and not is_missing(row.peek("prompt")):
        _check_same_prompt(row, chosen.messages[:-1])
    return _without_flags(chosen, "the chosen answer"), _without_flags(rejected, "the rejected answer")


def _without_flags(record: Record, name: str) -> Record:
    """Return a record without flags on its turns: the answer has loss and no other turn. Raises BadRow otherwise."""
    if record.messages and record.messages[-1].get("train") is False:
        raise BadRow(
            f"{name} is marked as having no loss, and a preference is a loss on it",
            "Leave such rows out, or the flag: data.ignore: [weight] (or train, training, ...)",
        )
    return replace(record, messages=without_flags(record.messages))


def check_pair(chosen: Record, rejected: Record) -> None:
    """Check that two records are different answers of an assistant to one prompt. Raises BadRow."""
    _check_answer(chosen, "the chosen answer")
    _check_answer(rejected, "the rejected answer")
    (*before, one), (*other_before, other) = chosen.messages, rejected.messages
    if before != other_before:
        raise BadRow("the prompts don't match" + _difference(before, other_before))
    if _comparable(one) == _comparable(other):
        raise BadRow("the two answers are equal")
    if chosen.tools != rejected.tools or chosen.template_args != rejected.template_args:
        raise BadRow("the prompts don't match (other tools or template arguments)")


def _comparable(message: Message) -> Message:
    return {**message, "content": message["content"].strip()}


def _check_same_prompt(row: SourceRow, before: Sequence[Message]) -> None:
    """Check that a row's column `prompt` agrees with the turns before its answer. Raises BadRow.

    A text must be one of the user's turns; a list must be all turns except the system's and those of the column
    `history`.
    """
    prompt = row["prompt"]
    if isinstance(prompt, str):
        if prompt.strip() not in [m["content"].strip() for m in before if m["role"] == "user"]:
            raise BadRow("the prompts don't match (the column prompt is no turn of the chosen conversation)")
    elif isinstance(prompt, list) and prompt:
        in_column = [_without_role(m) for m in read_turns(prompt, "prompt", row.notes) if m["role"] != "system"]
        in_conversation = [_without_role(m) for m in before if m["role"] != "system"][len(read_history(row)) :]
        if in_column[-1:] != in_conversation[-1:]:
            raise BadRow("the prompts don't match (the column prompt ends otherwise than the chosen conversation's)")
        if in_column != in_conversation:
            raise BadRow("the prompts don't match (the column prompt has other earlier turns than the conversation)")


def _without_role(message: Message) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name not in ("role", "train", "images")}


def _best_and_worst(row: SourceRow, config: DataConfig) -> tuple[Record, Record, float]:
    """Return the first of the best completions, the last of the worst, and the difference of their scores.

    Answers without a score don't take part.
    """
    if row.get("completions") is None:
        raise BadRow(NO_COMPLETIONS)
    completions = row_completions(row)
    rated = [
        (read_number(c["overall_score"], "overall_score"), c) for c in completions if c.get("overall_score") is not None
    ]
    if len(rated) < 2:
        raise BadRow(f"fewer than two scored answers ({len(rated)} of {len(completions)})")
    best = max(rated, key=lambda r: r[0])
    worst = min(reversed(rated), key=lambda r: r[0])
    if best[0] == worst[0]:
        raise BadRow(f"a tie: all scores are {best[0]:g}")
    one, other = (to_record(row.replaced(completions=[c]), "ultrafeedback", config) for _, c in (best, worst))
    return one, other, best[0] - worst[0]


def _check_answer(record: Record, name: str) -> None:
    """Check that there is a prompt, and an assistant's turn with text. Raises BadRow."""
    if record.text is not None:
        raise BadRow("no prompt and answer in it")
    *before, last = record.messages
    if last["role"] != "assistant":
        raise BadRow(f"the last turn is not the assistant's ({name} ends with the {last['role']}'s)")
    if says_nothing(last):
        raise BadRow(f"{name} is empty")
    if all(says_nothing(m) for m in before):
        raise BadRow("empty prompt")


def _check_repetition(record: Record) -> None:
    answer = record.messages[-1]["content"].strip()
    before = [m["content"] for m in record.messages[:-1]]
    if answer and answer in (before[-1].strip(), "".join(before).strip()):
        raise BadRow("the chosen answer equals the prompt")


def _difference(one: Sequence[Message], other: Sequence[Message]) -> str:
    if len(one) != len(other):
        return f" ({len(one)} turns before the chosen answer, {len(other)} before the rejected one)"
    turn = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    return f" (turn {turn + 1} differs)"


def _is_good(row: SourceRow) -> bool:
    name = next((name for name in LABEL_COLUMNS if not is_missing(row.peek(name))), None)
    if name is None:
        raise missing_field("label", row.peek("label"))
    return is_good_label(row[name], name)


def _prompt_length(weights: Sequence[float]) -> int:
    return next(i for i, w in enumerate(weights) if w)
