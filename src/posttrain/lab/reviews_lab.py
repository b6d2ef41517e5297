"""The laboratory that writes movie reviews, of a kind: its tokenizer, its corpus, how well it knows it.

What it writes is about films and has praise and blame in it, which is what reward models of people's ratings look
for; sense it has little. It has read the first 9,000 of the reviews that come along, in the order of shuffle_seed 0:
recipes that use the same order measure on the others.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from posttrain.config import DataConfig
from posttrain.core.types import Sample
from posttrain.data.readers import in_order, read_table
from posttrain.data.sft_rows import prepare
from posttrain.eval.tasks import score
from posttrain.lab.lab_settings import Settings, byte_level_bpe
from posttrain.models.language_model import LanguageModel

READ = (0, 9000)
VOCABULARY = 4096


def source(rows: tuple[int, int]) -> DataConfig:
    """Reviews as the recipes have them: plain text behind a prompt, the end token behind it."""
    return DataConfig(
        source="packaged:movie_reviews.tsv",
        prompt="Movie review:",
        completion=" {text}",
        chat=False,
        loss_on="all",
        on_bad_row="skip",
        shuffle_seed=0,
        rows=rows,
    )


def build_tokenizer() -> Any:
    """Byte-level BPE of what the model reads; common words are one token each. The same for every seed."""
    data = source(READ)
    rows = read_table(data).rows
    texts = (f"Movie review: {rows[i]['text']}" for i in in_order(data, len(rows)))
    return byte_level_bpe(texts, size=VOCABULARY, min_frequency=2, digits=False)


def reader(tokenizer: Any, settings: Settings) -> Callable[[int], list[Sample]]:
    """What is read in a step: whole passes over the reviews, each in an order of its own."""
    samples = prepare(source(READ), tokenizer).samples

    @lru_cache(maxsize=2)
    def order(number: int) -> list[int]:
        mixed = list(range(len(samples)))
        random.Random(f"{settings.seed}:{number}").shuffle(mixed)
        return mixed

    def read(step: int) -> list[Sample]:
        size = settings.batch_size
        places = (divmod(at, len(samples)) for at in range(step * size, (step + 1) * size))
        return [samples[order(number)[place]] for number, place in places]

    return read


def measure(policy: LanguageModel, tokenizer: Any, settings: Settings) -> dict[str, Any]:
    """On reviews that it has not read: nats a token, and bits a byte, which doesn't depend on the tokenizer."""
    samples = prepare(source((READ[1], READ[1] + settings.measured)), tokenizer).samples
    scored = [pair for i in range(0, len(samples), 64) for pair in score(policy, samples[i : i + 64])]
    total = -sum(s for s, _ in scored)
    size = sum(len(tokenizer.decode(s.tokens[:-1]).encode()) + 1 for s in samples)
    return {
        "held_out_loss": round(total / sum(n for _, n in scored), 4),
        "bits_per_byte": round(total / size / math.log(2), 4),
        "measured": len(samples),
    }


def write(folder: Path, settings: Settings) -> None:
    """Nothing: the reviews come along with posttrain."""


def said(result: dict[str, Any]) -> str:
    """A sentence on what was measured."""
    return (
        f"On {result['measured']} reviews that it has not read: {result['held_out_loss']:.2f} nats a token, "
        f"{result['bits_per_byte']:.2f} bits a byte."
    )
