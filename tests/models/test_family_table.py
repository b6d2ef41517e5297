"""The memory in docs/families.md is what the script finds, on one of the published models."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import family_table as tool


def test_the_page_has_the_row_that_is_planned() -> None:
    row = tool.measure(tool.MODELS["gemma-3-1b"])
    assert row.cells("gemma-3-1b") in tool.DOCS.read_text(encoding="utf-8").splitlines()
    assert row.best(1) == "–" and row.best(1000) == "every weight"


def test_sizes_that_are_not_the_published_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="billion parameters"):
        tool.measure(replace(tool.MODELS["Qwen2.5-0.5B"], num_hidden_layers=2))
