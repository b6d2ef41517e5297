"""The laboratory whose model writes movie reviews: tokenizer, corpus, measurement.

Its texts are about films and contain praise and blame, which is what reward models of people's ratings look for; they
have little sense. It is trained on the first 9,000 of the packaged reviews in the order of shuffle_seed 0: recipes that
use the same order measure on the others.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from posttrain.config import DataConfig
from posttrain.core.types import Sample
from posttrain.data.rows import open_rows
from posttrain.data.sft_rows import prepare
from posttrain.eval.likelihood_tasks import score
from posttrain.lab.lab_settings import LabSettings, byte_level_bpe
from posttrain.models.language_model import LanguageModel

TRAINED_ROWS = (0, 9000)
VOCABULARY = 4096


def reviews_data(rows: tuple[int, int]) -> DataConfig:
    """Return the settings of reviews as the recipes have them: plain text after a prompt, then the end token."""
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


def reviews_tokenizer() -> Any:
    """Make a tokenizer of the reviews that are trained on: common words are one token. The same for every seed."""
    texts = open_rows(reviews_data(TRAINED_ROWS)).read(lambda row: f"Movie review: {row.row['text']}")
    return byte_level_bpe(texts, size=VOCABULARY, min_frequency=2, digits=False)


class ReviewsLab:
    """Hold what is specific to the laboratory of reviews."""

    steps = 420
    batch_size = 128

    def __init__(self, settings: LabSettings, tokenizer: Any = None) -> None:
        self.settings, self.tokenizer = settings, tokenizer or reviews_tokenizer()
        self._order = lru_cache(maxsize=2)(self._shuffled)

    @cached_property
    def samples(self) -> Sequence[Sample]:
        """Return the reviews that are trained on."""
        return prepare(reviews_data(TRAINED_ROWS), self.tokenizer).samples

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.samples)))
        random.Random(f"{self.settings.seed}:{epoch}").shuffle(order)
        return order

    def batch(self, step: int) -> list[Sample]:
        """Return the reviews of a pretraining step: whole epochs, each in another order."""
        size = self.settings.batch_size
        places = (divmod(i, len(self.samples)) for i in range(step * size, (step + 1) * size))
        return [self.samples[self._order(epoch)[i]] for epoch, i in places]

    def measure(self, policy: LanguageModel) -> dict[str, Any]:
        """Return the loss on held-out reviews, in nats a token, and in bits a byte, which no tokenizer changes."""
        first = TRAINED_ROWS[1]
        samples = prepare(reviews_data((first, first + self.settings.measured)), self.tokenizer).samples
        scored = [pair for i in range(0, len(samples), 64) for pair in score(policy, samples[i : i + 64])]
        total = -sum(s for s, _ in scored)
        size = sum(len(self.tokenizer.decode(s.tokens[:-1]).encode()) + 1 for s in samples)
        return {
            "held_out_loss": round(total / sum(n for _, n in scored), 4),
            "bits_per_byte": round(total / size / math.log(2), 4),
            "measured": len(samples),
        }

    def write(self, folder: Path) -> None:
        """Write nothing: the reviews ship with posttrain."""

    @staticmethod
    def describe(result: Mapping[str, Any]) -> str:
        """Return a sentence about the measurement."""
        return (
            f"On {result['measured']} reviews that it was not trained on: {result['held_out_loss']:.2f} nats a token, "
            f"{result['bits_per_byte']:.2f} bits a byte."
        )
