"""The laboratory of self-refine, whose model checks sums better than it answers them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.data.synthetic import refine_talks as talks
from posttrain.data.synthetic import sums
from posttrain.lab.talk_lab import TalkLab, last_line_of


class RefineLab(TalkLab):
    """Hold what is specific to the laboratory of self-refine: sums with carries."""

    problems_name = "sums"
    digits = True
    talk_at = staticmethod(talks.talk_at)
    rows = staticmethod(sums.sum_problems)

    @staticmethod
    def is_right(text: str, row: Mapping[str, Any]) -> bool:
        """Return True if the last line of an answer is the sum."""
        return last_line_of(text) == row["answer"]
