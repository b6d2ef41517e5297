"""The table of docs/templates.md, on small templates of the shapes that published ones have: no cell is wrong."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.models.tiny_model import tiny_tokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import template_table as tool  # noqa: E402

TEMPLATES = {f.stem: f.read_text() for f in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
PLAIN = {"tools", "call", "result", "two calls"}
REFUSED: dict[str, set[str]] = {
    "think_closing_prompt": {"reasoning", "think", "all reasoning", *PLAIN},
    "no_system_and_alternating": {"system", "two answers", "empty", *PLAIN},
    "end_before_next_only": {"two answers", *PLAIN},
    "other_end_for_last": {"two answers", *PLAIN},
    "tools_required": set(),
    "arguments_as_text": set(),
    "results_skipped": {"result", "two calls"},
}
"""Conversations that each template has to refuse; those with tools where it shows none."""


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_cell_is_right_or_refused(name: str) -> None:
    tokenizer = tool.with_template(tiny_tokenizer(), TEMPLATES[name])
    cells = {c.name: tool.judge(c, tokenizer) for c in tool.cases(*tool.special_pair(tokenizer))}
    assert not {n: c.reason for n, c in cells.items() if c.outcome == "WRONG"}
    assert {n for n, c in cells.items() if c.outcome == "refused"} == REFUSED.get(name, PLAIN)


def test_the_judge_sees_what_is_wrong() -> None:
    """A learner that puts the loss elsewhere, or trains another text, is found out."""
    tokenizer = tool.with_template(tiny_tokenizer(), TEMPLATES["chatml"])
    case = next(c for c in tool.cases(*tool.special_pair(tokenizer)) if c.name == "turns")
    (sample,) = tool.render_with_loss(tokenizer, case.messages, "completion")
    start, end = sample.spans[0]

    def outcome(**changes: Any) -> str:
        faulty = replace(sample, **changes)
        return str(tool.judge_samples(case, tokenizer, [faulty]).outcome)

    assert outcome() == "right"
    for span in ((start, end - len("<|im_end|>")), (start + 1, end), (start - 5, end), (1, end)):
        assert outcome(spans=(span,)) == "WRONG"
    assert outcome(text=sample.text.replace("Lisbon", "Berlin")) == "WRONG"
