"""A row that can't be read is left out and counted in the same way by everything that reads rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import DataConfig
from posttrain.config.feedback import PairsConfig, ThumbsConfig
from posttrain.core.errors import DataError
from posttrain.data.bad_rows import LISTED_ROWS, REASONS, BadRow, BadRows
from posttrain.data.human_feedback import read_answers
from posttrain.data.preference_rows import prepare_pairs, prepare_unpaired
from posttrain.data.process_rows import read_step_chains
from posttrain.data.prompt_sources import RowPrompts
from posttrain.data.prompts import load_prompts
from posttrain.data.sft_rows import prepare
from tests.data.tokenizers import byte_level

TOKENIZER = byte_level("chatml")
PAIR = {"prompt": "q?", "chosen": "yes", "rejected": "no"}
CONSUMERS: dict[str, tuple[dict[str, Any], Callable[[DataConfig], Any]]] = {
    "sft": ({"prompt": "q?", "completion": "yes"}, lambda c: prepare(c, TOKENIZER)),
    "pairs": (PAIR, lambda c: prepare_pairs(c, TOKENIZER)),
    "unpaired": ({"prompt": "q?", "completion": "yes", "label": True}, lambda c: prepare_unpaired(c, TOKENIZER)),
    "process": ({"prompt": "q?", "steps": ["a"], "labels": [1]}, lambda c: read_step_chains(c, TOKENIZER, "\n")),
    "prompts": (
        {"prompt": "q?", "answer": "yes"},
        lambda c: load_prompts(RowPrompts.Config(data=c), TOKENIZER, context=None),
    ),
    "feedback": (PAIR, lambda c: read_answers(PairsConfig(data=c))),
    "thumbs": (
        {"prompt": "q?", "completion": "yes", "label": "up"},
        lambda c: read_answers(ThumbsConfig(data=c, label="label")),
    ),
}


@pytest.mark.parametrize("name", CONSUMERS)
def test_every_consumer_counts_rows_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    row, consume = CONSUMERS[name]
    path = tmp_path / "rows.jsonl"
    cut = json.dumps({**row, "prompt": "half \ud83d"})
    path.write_text("\n".join([cut, json.dumps(row), '{"prompt": ', json.dumps({**row, "more": {"\udfff": 1}})]) + "\n")
    with pytest.raises(DataError) as error:
        consume(DataConfig(source=str(path)))
    lines = str(error.value).split("\n")
    assert lines[0] == "3 of 4 rows can't be used (2 lone surrogate, 1 not valid JSON):"
    assert lines[1] == "  rows.jsonl:1: lone surrogate: \\ud83d in 'prompt'"
    assert lines[2].startswith("  rows.jsonl:3: not valid JSON: Expecting value")
    assert lines[3] == "  rows.jsonl:4: lone surrogate: \\udfff in 'more'"
    assert lines[4].startswith("A lone surrogate is half of a character")
    stats = consume(DataConfig(source=str(path), on_bad_row="skip")).stats
    assert stats["used"] == 1
    assert stats["dropped"].items() >= {"lone surrogate": 2, "not valid JSON": 1}.items()
    assert [(b["file"], b["row"]) for b in stats["bad_rows"]] == [("rows.jsonl", n) for n in (1, 3, 4)]


@pytest.mark.parametrize("write", [json.dumps, str, lambda turns: str(turns).replace("}, {", "}\n {")])
@pytest.mark.parametrize("columns", [("messages",), ("prompt", "completion"), ("prompt", "chosen", "rejected")])
def test_lists_in_csv_cells_are_recognised(tmp_path: Path, columns: tuple[str, ...], write: Callable[..., str]) -> None:
    turns = [{"role": "user", "content": "it's"}, {"role": "assistant", "content": "a"}]
    cells = ",".join('"' + write(turns).replace('"', '""') + '"' for _ in columns)
    path = tmp_path / "x.csv"
    path.write_text(",".join(columns) + "\n" + cells + "\n")
    consume = prepare_pairs if "chosen" in columns else prepare
    with pytest.raises(DataError) as error:
        consume(DataConfig(source=str(path)), TOKENIZER)
    assert f"x.csv:1: a list as text: {columns[0]!r} holds a list of turns as" in str(error.value)
    assert "Save the table as .jsonl or .parquet" in str(error.value)


def test_brackets_in_csv_cells_are_text(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('prompt,completion\n[a] or [b]?,"[1, 2]"\n"[{x","[{""key"": 1}]"\n')
    assert prepare(DataConfig(source=str(path)), TOKENIZER).stats["used"] == 2


def test_json_text_in_a_jsonl_field_is_text(tmp_path: Path) -> None:
    """A model may be taught to write conversations as JSON; only a file of cells can't say what is meant."""
    row = {"prompt": "Write a chat.", "completion": json.dumps([{"role": "user", "content": "Hi"}])}
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert prepare(DataConfig(source=str(path)), TOKENIZER).stats["used"] == 1


def test_memory_of_bad_rows_is_bounded() -> None:
    bad = BadRows("skip")
    for i in range(LISTED_ROWS + 5):
        bad.add(f"f:{i + 1}", BadRow(f"reason {i}", f"hint {i}"))
    assert bad.count == sum(bad.dropped.values()) == LISTED_ROWS + 5
    assert len(bad.rows) == LISTED_ROWS and len(bad.dropped) == REASONS + 1
    with pytest.raises(DataError) as error:
        bad.check(10**6, 0)
    assert len(str(error.value).split("\n")) == 1 + 10 + 1 + 10 + 1
