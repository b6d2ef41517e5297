"""Turn records into token ids and loss weights, by the chat template or as plain text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.core.image_tokens import beginning
from posttrain.core.progress import Track
from posttrain.core.types import Message, Sample
from posttrain.data.bad_rows import BadRow
from posttrain.data.chat_template import NO_PICTURES, render_prompt
from posttrain.data.formats import Record
from posttrain.data.image_reader import image_reader
from posttrain.data.image_turns import IMAGE_COLUMNS, pictures_of
from posttrain.data.learnt_turns import OWN_TEXT, Rendered, render_with_loss
from posttrain.data.parts import PlacedRow
from posttrain.data.pictures import Picture
from posttrain.data.plain_text import PlainTurns, encode_plain, join_texts, plain_prompts, plain_turns
from posttrain.data.rows import REFUSED_COLUMNS, Rows
from posttrain.data.tokenizing import Encoded, tokenize, tokenize_rendered

BATCH = 1000
"""Rows tokenized at a time."""
BATCH_CHARACTERS = 2_000_000
"""Length of their texts, at most."""
_Parsed = tuple[int, tuple[PlacedRow, "ParsedRow"]]


def require_chat_template(
    tokenizer: Any, instead: str = "data.chat=false to join prompt and completion as plain text"
) -> None:
    """Raise DataError if the tokenizer has no chat template; `instead` says how to do without."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"the tokenizer has no chat template, as base models have none. Give model.chat_template, or {instead}"
        )


def token_limit(config: DataConfig, context: int | None) -> int:
    """Return the largest number of tokens of a sample, given the model's length in tokens."""
    return min(config.max_tokens or context or 2**62, context or 2**62)


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """Hold what a row says, before its texts are tokenised.

    Attributes:
        records: Conversations or texts, one for each sample.
        about: Prompt and answers as text, for evaluation and reports, and other columns of the row.
        values: Numbers that are kept with each sample.
    """

    records: Sequence[Record]
    about: dict[str, Any]
    values: dict[str, float] = field(default_factory=dict)


class EncodedRow(NamedTuple):
    """Hold the samples of a row; of a conversation whose turns are learnt in separate texts, those of one text.

    Attributes:
        rank: Place of the row in the order.
        row: The row.
        parsed: What it says.
        samples: Its samples, one for each record.
        values: Numbers that are kept with each sample.
    """

    rank: int
    row: PlacedRow
    parsed: ParsedRow
    samples: list[Sample]
    values: dict[str, float]


class RowReader(Protocol):
    """Read samples from rows.

    Attributes:
        images: True if it reads rows with pictures.
    """

    images: bool

    def parse(self, row: PlacedRow) -> ParsedRow:
        """Return what the row says. Raises BadRow."""

    def make(self, parsed: ParsedRow, encoded: Sequence[Encoded], source: str) -> tuple[list[Sample], dict[str, float]]:
        """Return the samples of a row and the numbers that are kept with each of them.

        Args:
            parsed: What the row says.
            encoded: Tokens and weights of each record.
            source: Place of the row.

        Raises:
            BadRow: The tokens can't be used.
        """


def encode_stream(rows: Rows, reader: RowReader, tokenizer: Any, context: int | None) -> Iterator[EncodedRow]:
    """Read rows and make samples of each, as the rows are in their files; only a few are in memory.

    Bad rows are collected, and cut ones counted.

    Args:
        rows: The rows; the caller has to check them at the end.
        reader: Reads a row.
        tokenizer: The tokenizer.
        context: The model's length in tokens.

    Raises:
        DataError: The tokenizer has no chat template.
    """

    refused = REFUSED_COLUMNS - set(IMAGE_COLUMNS) if reader.images else REFUSED_COLUMNS

    def parse(row: PlacedRow) -> tuple[PlacedRow, ParsedRow]:
        parsed = reader.parse(row)
        if row.config.chat and any(record.messages for record in parsed.records):
            require_chat_template(tokenizer)
        if not reader.images and any(pictures_of(record.messages) for record in parsed.records):
            raise BadRow(NO_PICTURES)
        return row, parsed

    total, done = len(rows.order), 0
    with Track("tokenizing", total, shown=total > 5 * BATCH and os.environ.get("RANK", "0") == "0") as progress:
        for batch in _batches(rows.stream(parse, refused)):
            yield from _encode_batch(batch, rows, reader, tokenizer, context)
            done += len(batch)
            progress.update(done)


def _encode_batch(
    batch: Sequence[_Parsed], rows: Rows, reader: RowReader, tokenizer: Any, context: int | None
) -> Iterator[EncodedRow]:
    rendered = []
    for rank, (row, parsed) in batch:
        with rows.bad.collect(row.source):
            rendered.append((rank, row, parsed, [_render(record, tokenizer, row.config) for record in parsed.records]))
    encoded = iter(_encode([r for *_, several in rendered for texts in several for r in texts], tokenizer))
    for rank, row, parsed, several in rendered:
        # One record may be several samples (see `learnt_turns`); the two answers of a pair are one each.
        found = [[next(encoded) for _ in texts] for texts in several]
        with rows.bad.collect(row.source):
            for texts, of_record in zip(several, found, strict=True):
                _put_pictures(texts, of_record, tokenizer)
            parts = [[sample for samples in of_record for sample in samples] for of_record in found]
            limit, samples = token_limit(row.config, context), list(zip(*parts, strict=True))
            made = [reader.make(parsed, _fit(sample, limit, row.config), row.source) for sample in samples]
            rows.truncated += any(len(tokens) > limit for sample in samples for tokens, _ in sample)
            rows.add_notes(note for texts in several for r in texts for note in r.notes.items())
            rows.add_notes((OWN_TEXT, len(samples) - 1) for of_record in found for samples in of_record)
            yield from (EncodedRow(rank, row, parsed, *item) for item in made)


def _put_pictures(texts: Sequence[Rendered | PlainTurns], encoded: list[list[Encoded]], tokenizer: Any) -> None:
    """Put the tokens of pictures in place of their placeholders, in the samples of each text. Raises BadRow.

    Args:
        texts: The texts of a record.
        encoded: Their samples, which are replaced.
        tokenizer: The tokenizer.
    """
    for i, text in enumerate(texts):
        if isinstance(text, Rendered) and text.pictures:
            reader = image_reader(tokenizer)
            encoded[i] = [reader.expand(*sample, text.pictures) for sample in encoded[i]]


def _batches(items: Iterable[_Parsed]) -> Iterator[list[_Parsed]]:
    """Divide rows into batches by their number and the length of their texts."""
    batch: list[_Parsed] = []
    size = 0
    for item in items:
        batch.append(item)
        size += sum(_length(record) for record in item[1][1].records)
        if len(batch) == BATCH or size > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _length(record: Record) -> int:
    return len(record.text or "") + sum(len(message["content"]) for message in record.messages)


def _fit(parts: Sequence[Encoded], limit: int, config: DataConfig) -> list[Encoded]:
    """Cut what is longer than `limit`. Raises BadRow if it must not be cut, or if no token with loss is left."""
    most = max(len(tokens) for tokens, _ in parts)
    if most > limit and config.on_long == "bad_row":
        raise BadRow(f"too long ({most} tokens, and the limit is {limit})")
    try:
        cut = [(beginning(tokens, limit), weights[:limit]) for tokens, weights in parts]
    except ValueError as error:
        raise BadRow(f"too long ({most} tokens, and the limit is {limit}), and no image is cut: {error}") from error
    if not all(any(weights) for _, weights in cut):
        raise BadRow("no loss token left" + (f" (cut at {limit} tokens)" if most > limit else ""))
    return cut


def _render(record: Record, tokenizer: Any, config: DataConfig) -> Sequence[Rendered | PlainTurns]:
    """Return the texts of a record: one, or several if turns of a conversation are learnt in texts of their own."""
    if record.messages and config.chat:
        return render_with_loss(
            tokenizer, record.messages, config.loss_on, record.tools, record.template_args, config.special_tokens
        )
    return [plain_turns(record, tokenizer, config)]


def _encode(rendered: Sequence[Rendered | PlainTurns], tokenizer: Any) -> list[list[Encoded]]:
    """Return tokens and weights of each, tokenizing in few calls: one sample, seldom several."""
    from_chat = iter(tokenize_rendered(tokenizer, [r for r in rendered if isinstance(r, Rendered)]))
    from_plain = iter(encode_plain([r for r in rendered if isinstance(r, PlainTurns)], tokenizer))
    return [next(from_chat) if isinstance(r, Rendered) else [next(from_plain)] for r in rendered]


def prompt_tokens(row: dict[str, Any], tokenizer: Any, config: DataConfig) -> list[int]:
    """Return the token ids of a row's prompt, generation prompt included, as a model that answers it reads them.

    Args:
        row: A row with `messages`, possibly `tools` and `template_args`, and `source` for messages of errors.
        tokenizer: The tokenizer.
        config: Settings of the data.

    Raises:
        DataError: The chat template refuses the row, or plain text can't show it.
    """
    try:
        if not config.chat:
            return plain_prompts([join_texts(row)], tokenizer, config.special_tokens)[0]
        text, pictures = render_prompt(tokenizer, row["messages"], **_template_fields(row, config))
        return with_pictures(tokenize(tokenizer, [text])[0], pictures, tokenizer)
    except BadRow as error:
        raise DataError(f"{row.get('source', 'a row')}: {error}") from error


def with_pictures(tokens: list[int], pictures: Sequence[Picture], tokenizer: Any) -> list[int]:
    """Return the tokens of a rendered prompt with those of its pictures in place of placeholders.

    Args:
        tokens: The tokens.
        pictures: The pictures, in order.
        tokenizer: The tokenizer.

    Raises:
        BadRow: A picture can't be read.
    """
    return image_reader(tokenizer).expand(tokens, [0.0] * len(tokens), pictures)[0] if pictures else tokens


class RowLength:
    """Count the tokens of a prompt with its answer as they are trained on, in the chat template if there is one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._config = DataConfig(source="", chat=bool(getattr(tokenizer, "chat_template", None)))
        pair: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        self._one = self.tokens("a", "b")
        self._more = self.tokens([*pair, pair[0]], "b") - self._one

    def tokens(self, prompt: str | Sequence[Message], completion: str) -> int:
        """Return the number of tokens; if the template refuses the turns, that of the texts."""
        turns: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        row: dict[str, Any] = {"messages": tuple(turns)}
        with suppress(DataError):
            return len(prompt_with_completion(row, completion, self.tokenizer, self._config, end=True))
        return sum(map(len, tokenize(self.tokenizer, [*(str(turn["content"]) for turn in turns), completion])))

    def fits(self, prompt: str | Sequence[Message], completion: str, limit: int) -> bool:
        """Return True if there are at most `limit` tokens; short texts are not tokenized, as a token is a byte or more.

        Args:
            prompt: A text, or turns.
            completion: The answer.
            limit: The number of tokens.
        """
        texts = [prompt] if isinstance(prompt, str) else [str(turn["content"]) for turn in prompt]
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in (*texts, completion))
        if size + self._one + self._more * (len(texts) // 2) <= limit:
            return True
        return self.tokens(prompt, completion) <= limit


def _template_fields(row: Mapping[str, Any], config: DataConfig) -> dict[str, Any]:
    """Return what `render_prompt` takes besides the turns."""
    return {
        "tools": row.get("tools") or (),
        "arguments": row.get("template_args"),
        "special_tokens": config.special_tokens,
    }


def prompt_with_completion(
    row: dict[str, Any], completion: str, tokenizer: Any, config: DataConfig, end: bool = False
) -> Sample:
    """Return the row's prompt with a completion, whose tokens have weight 1.

    Args:
        row: A row with `messages`, possibly `tools` and `template_args`, and `source` for messages of errors.
        completion: Text of the answer.
        tokenizer: The tokenizer.
        config: Settings of the data.
        end: Give the token that ends the answer weight 1 too.

    Raises:
        DataError: The completion is empty, or the chat template refuses the row.
    """
    answer: Message = {"role": "assistant", "content": completion}
    tools, arguments = tuple(row.get("tools") or ()), row.get("template_args")
    record = Record((*row["messages"], answer), tools=tools, template_args=arguments)
    try:
        (rendered,) = _render(record, tokenizer, config.model_copy(update={"loss_on": "completion"}))
    except BadRow as error:
        raise DataError(f"{row.get('source', 'a row')}: {error}") from error
    if not end:
        rendered = rendered.without_end()
    samples = [_encode([rendered], tokenizer)[0]]
    try:
        _put_pictures([rendered], samples, tokenizer)
    except BadRow as error:
        raise DataError(f"{row.get('source', 'a row')}: {error}") from error
    tokens, weights = samples[0][0]
    return Sample(tokens, weights, row.get("source", ""))
