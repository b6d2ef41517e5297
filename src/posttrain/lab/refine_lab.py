"""The laboratory of self-refine, whose model checks sums better than it answers them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.data.synthetic import refine_talks as talks
from posttrain.data.synthetic import sums
from posttrain.lab.lab_settings import byte_level_bpe
from posttrain.lab.talk_lab import CHAT_TEMPLATE, TalkLab, last_line_of, written_talk


class RefineLab(TalkLab):
    """Hold what is specific to the laboratory of self-refine: sums with carries."""

    problems_name = "sums"
    talk_at = staticmethod(talks.talk_at)
    rows = staticmethod(sums.sum_problems)

    @staticmethod
    def make_tokenizer() -> Any:
        """Make a tokenizer with one token for every digit and every word of the talks, the same for every seed."""
        texts = (written_talk(talks.talk_at(0, i)) for i in range(8000))
        tokenizer = byte_level_bpe(texts, size=512, min_frequency=20, digits=True)
        tokenizer.chat_template = CHAT_TEMPLATE
        return tokenizer

    @staticmethod
    def is_right(text: str, row: Mapping[str, Any]) -> bool:
        """Return True if the last line of an answer is the sum."""
        return last_line_of(text) == row["answer"]
