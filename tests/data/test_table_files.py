"""Files are read a row at a time: by a mask, at a position, and in memory that doesn't grow with the file."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from posttrain.data import table_files
from posttrain.data.bad_rows import BadRow
from posttrain.data.table_files import FILE_READERS, TableFile

VALUES = ["plain", 'say "hi", twice', "two\nlines", "é 😀\u2028", "", "a\rb", " spaces ", "x" * 300]


def write(path: Path, rows: list[dict[str, Any]]) -> TableFile:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        text = "".join(json.dumps(r, ensure_ascii=i % 2 == 0) + "\r\n" * (1 + i % 3) for i, r in enumerate(rows))
        path.write_bytes(("\ufeff" + text).encode())
    elif path.suffix == ".tsv":
        lines = ["a\tb", *(f"{r['a']}\t{r['b']}" + "\n" * (i % 2) for i, r in enumerate(rows))]
        path.write_bytes("\n".join(lines).encode())
    else:
        quoted = ["\ufeffa,b", *(",".join('"' + str(r[c]).replace('"', '""') + '"' for c in "ab") for r in rows)]
        path.write_bytes("\r\n".join(quoted).replace("\r\n", "\r\n\r\n", 1).encode())
    return FILE_READERS[path.suffix](path)


@pytest.mark.parametrize("ending", FILE_READERS)
def test_by_a_mask_and_at_a_position(tmp_path: Path, ending: str) -> None:
    rng = random.Random(0)
    values = [v for v in VALUES if ending != ".tsv" or not {"\n", "\r"} & set(v)]
    rows = [{"a": rng.choice(values), "b": str(i)} for i in range(40)]
    file = write(tmp_path / f"x{ending}", rows)
    everything = list(file.scan())
    assert [f.row for f in everything] == rows and file.count == 40
    assert [f.ordinal for f in everything] == list(range(40))
    for found in rng.sample(everything, 10):
        assert file.row_at(found.position) == found.row
        assert FILE_READERS[ending](file.path).row_at(found.position) == found.row  # nothing was read before
    for wanted in ([0], [39], [3, 17, 18], [], list(range(40))):
        mask = bytes(i in wanted for i in range(40))
        assert list(file.scan(mask)) == [everything[i] for i in wanted]


def test_numbers_are_those_of_lines_and_records(tmp_path: Path) -> None:
    rows = [{"a": "x\ny", "b": str(i)} for i in range(4)]
    assert [f.number for f in write(tmp_path / "x.csv", rows).scan()] == [2, 3, 4, 5]  # a blank line after the header
    assert [f.number for f in write(tmp_path / "x.jsonl", rows).scan()] == [1, 2, 4, 7]
    (tmp_path / "y.csv").write_bytes(b'a,b\r1,2\r"3\r",4\r5\r')  # carriage returns alone end lines
    found = list(FILE_READERS[".csv"](tmp_path / "y.csv").scan())
    assert [f.row for f in found[:2]] == [{"a": "1", "b": "2"}, {"a": "3\r", "b": "4"}] and found[2].number == 3
    assert isinstance(found[2].row, BadRow)
    assert FILE_READERS[".csv"](tmp_path / "y.csv").row_at(found[1].position) == found[1].row


@pytest.mark.parametrize("ending", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, ending: str) -> None:
    rows = [{"a": f"{i}" * 40, "b": str(i)} for i in range(5_000)]
    file = write(tmp_path / f"x{ending}", rows)
    size = sum(len(r["a"]) for r in rows)
    del rows
    next(file.scan())
    tracemalloc.start()
    count = sum(1 for _ in file.scan())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 5_000 and peak < size / 6


def test_a_text_of_a_parquet_file_that_is_not_utf8(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.array([b"fine", b"na\xefve", b"too"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"a": texts}), tmp_path / "x.parquet")
    one, two, three = (found.row for found in FILE_READERS[".parquet"](tmp_path / "x.parquet").scan())
    assert (one, three) == ({"a": "fine"}, {"a": "too"}) and "expected UTF-8 text: byte 0xef" in str(two)


def test_a_large_json_file_gets_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(table_files, "LARGE_JSON", 100)
    file = write(tmp_path / "x.json", [{"a": "x" * 200}])
    assert file.count == 1
    (message,) = caplog.messages
    assert "are read into memory at once. As .jsonl" in message and message.endswith("jq -c '.[]' x.json > new.jsonl")
