"""Several sources in one block: each with settings, layout, cap and counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.data.rows import open_rows
from posttrain.data.sft_rows import Prepared, prepare
from tests.data.tokenizers import byte_level

TOKENIZER = byte_level("chatml")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chats(name: str, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {i}?", "completion": f"{name} {i}."} for i in range(count)]


def completions(prepared: Prepared) -> list[str]:
    return [row["completion"] for row in prepared.rows]


def test_each_source_has_its_settings_and_layout(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", chats("one", 2))
    two = write(tmp_path / "two.jsonl", [{"question": "q", "text": "t"}])
    three = write(tmp_path / "three.jsonl", [{"instruction": "Do", "output": "done"}])
    sources: list[Any] = [
        one,
        {"source": two, "prompt": "About {title}: {text}", "completion": "{title}", "columns": {"title": "question"}},
        {"source": three, "system": "", "chat": False},
    ]
    config = DataConfig(source=sources, system="Be kind.")
    prepared = prepare(config, TOKENIZER)
    texts = [TOKENIZER.decode(s.tokens) for s in prepared.samples]
    assert [s.source for s in prepared.samples] == ["one.jsonl:1", "one.jsonl:2", "two.jsonl:1", "three.jsonl:1"]
    assert texts[0].startswith("<|im_start|>system\nBe kind.<|im_end|>") and texts[3] == "Dodone<|im_end|>"
    assert "user\nAbout q: t<|im_end|>" in texts[2]
    assert prepared.stats["layout"] == "prompt_completion, template, alpaca"
    assert prepared.stats["sources"] == [
        {"source": "one.jsonl", "layout": "prompt_completion", "in_source": 2, "rows": 2, "used": 2},
        {"source": "two.jsonl", "layout": "template", "in_source": 1, "rows": 1, "used": 1},
        {"source": "three.jsonl", "layout": "alpaca", "in_source": 1, "rows": 1, "used": 1},
    ]
    assert list(prepared.stats["sha256"]) == ["one.jsonl", "two.jsonl", "three.jsonl"]
    written = config.model_dump(mode="json")  # as a run's folder has it: a default must not become a setting
    assert written["source"] == sources and DataConfig.model_validate(written) == config


def test_caps_and_ranges_of_a_source(tmp_path: Path) -> None:
    one, two = (write(tmp_path / f"{name}.jsonl", chats(name, 10)) for name in ("one", "two"))

    def taken(*sources: Any, **settings: Any) -> list[str]:
        return completions(prepare(DataConfig(source=list(sources), **settings), TOKENIZER))

    assert taken({"source": one, "max_rows": 2}, {"source": two, "rows": [3, 5]}) == [
        "one 0.",
        "one 1.",
        "two 3.",
        "two 4.",
    ]
    shuffled = taken({"source": one, "shuffle_seed": 4})
    assert shuffled != sorted(shuffled) and sorted(shuffled) == sorted(c["completion"] for c in chats("one", 10))
    # The cap takes the first of the shuffled rows, by the seed of the source or of the block.
    assert taken({"source": one, "shuffle_seed": 4, "max_rows": 3}) == shuffled[:3]
    assert set(taken({"source": one, "max_rows": 3}, shuffle_seed=4)) == set(shuffled[:3])
    assert taken({"source": one, "shuffle_seed": 4, "rows": [2, 9], "max_rows": 3}) == shuffled[2:5]
    assert len(taken({"source": one, "max_rows": 30})) == 10
    # The block's range counts the rows of all sources.
    assert taken({"source": one, "max_rows": 2}, two, rows=(1, 4)) == ["one 1.", "two 0.", "two 1."]
    both = taken(one, two, shuffle_seed=1)
    assert taken(one, two, shuffle_seed=1, rows=(5, 9)) == both[5:9]
    stats = prepare(DataConfig(source=[{"source": one, "max_rows": 2}, two], rows=(1, 4)), TOKENIZER).stats
    assert [(s["in_source"], s["rows"], s["used"]) for s in stats["sources"]] == [(10, 1, 1), (10, 2, 2)]
    with pytest.raises(DataError, match=r"rows is \[3, 11\], and .*two.jsonl has rows 0 to 10"):
        taken(one, {"source": two, "rows": [3, 11]})


def test_bad_rows_stop_or_are_skipped_by_source(tmp_path: Path) -> None:
    clean = write(tmp_path / "clean.jsonl", chats("a", 2))
    dirty = write(tmp_path / "dirty.jsonl", [*chats("b", 1), {"prompt": "no answer", "completion": ""}])
    skipped = DataConfig(source=[clean, {"source": dirty, "on_bad_row": "skip"}])
    stats = prepare(skipped, TOKENIZER).stats
    assert stats["used"] == 3 and stats["dropped"] == {"empty completion": 1}
    assert [(s["rows"], s["used"]) for s in stats["sources"]] == [(2, 2), (2, 1)]
    for source in ([clean, dirty], [{"source": clean, "on_bad_row": "skip"}, dirty]):
        with pytest.raises(DataError, match="1 of 4 rows.*\n  dirty.jsonl:2: empty completion"):
            prepare(DataConfig(source=source), TOKENIZER)
    stopped = DataConfig(source=[clean, {"source": dirty, "on_bad_row": "stop"}], on_bad_row="skip")
    with pytest.raises(DataError, match="1 of 4 rows"):
        prepare(stopped, TOKENIZER)


def test_the_same_source_twice_and_the_same_name_twice(tmp_path: Path) -> None:
    one, two = write(tmp_path / "x.jsonl", chats("one", 4)), write(tmp_path / "sub" / "x.jsonl", chats("two", 1))
    config = DataConfig(source=[{"source": one, "rows": [0, 1]}, two, {"source": one, "rows": [2, 3]}, two])
    assert [s.source for s in prepare(config, TOKENIZER).samples] == [
        "x.jsonl:1",
        f"{two}:1",
        f"{one}:3",
        f"{two} (2):1",
    ]


def test_an_empty_source_and_an_unknown_setting(tmp_path: Path) -> None:
    one, none = write(tmp_path / "one.jsonl", chats("one", 1)), write(tmp_path / "none.jsonl", [])
    with pytest.raises(DataError, match="none.jsonl holds no rows"):
        open_rows(DataConfig(source=[one, none]))
    with pytest.raises(ValueError, match="weigth"):
        DataConfig(source=[{"source": one, "weigth": 2}])


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "one.jsonl", chats("one", 3))
    rows = open_rows(DataConfig(source=path))
    assert rows.hashes
    write(Path(path), chats("one", 5))
    with pytest.raises(DataError, match="the file changed after it was opened"):
        rows.read(lambda row: row)
