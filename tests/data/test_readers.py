"""Files as people have them: what is read is what is written there, and rows are counted as a person counts them."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from posttrain.config import DataConfig
from posttrain.core.errors import DataError, ModelError
from posttrain.data.rows import open_rows
from tests.data.tables import Table, read_table


def read(*paths: Path | str) -> Table:
    return read_table(DataConfig(source=[str(p) for p in paths] if len(paths) > 1 else str(paths[0])))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_tsv_takes_every_character_as_it_is(tmp_path: Path) -> None:
    text = 'a\tb\r\n"quoted\tNA\n\nshe said ""no\u2028"\t\n'
    table = read(write(tmp_path / "x.tsv", "\ufeff" + text))
    assert table.rows == [{"a": '"quoted', "b": "NA"}, {"a": 'she said ""no\u2028"', "b": ""}]
    assert table.places == [("x.tsv", 1), ("x.tsv", 3)]  # the blank line is counted


def test_csv_with_quotes_and_line_ends_in_cells(tmp_path: Path) -> None:
    table = read(write(tmp_path / "x.csv", 'a,b\n"one, ""two""\nthree",NA\n\n4,5\n'))
    assert table.rows == [{"a": 'one, "two"\nthree', "b": "NA"}, {"a": "4", "b": "5"}]
    assert table.places == [("x.csv", 1), ("x.csv", 3)]


def test_json_and_jsonl(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": ["x", None]}, {"a": "é 👩‍👩‍👧", "c": {"d": 1.5}}]
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    table = read(write(tmp_path / "x.jsonl", "\ufeff" + lines.replace("\n", "\n\n") + "\n"))
    assert table.rows == rows and table.places == [("x.jsonl", 1), ("x.jsonl", 3)]
    for value in (rows, {"data": rows, "version": 2}):
        assert read(write(tmp_path / "x.json", json.dumps(value))).rows == rows
    columns = {"a": [1, 2], "b": ["x", "y"]}
    assert read(write(tmp_path / "x.json", json.dumps(columns))).rows == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


def test_parquet(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"a": "NA", "b": [{"role": "user", "content": "x"}]}, {"a": None, "b": []}]
    Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    table = read(tmp_path / "x.parquet")
    assert table.rows == rows and table.places == [("x.parquet", 1), ("x.parquet", 2)]


def test_several_sources_and_hashes(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    one, two = write(tmp_path / "x.tsv", "a\n1\n"), write(tmp_path / "sub" / "x.tsv", "a\n2\n")
    table = read(one, two)
    assert [r["a"] for r in table.rows] == ["1", "2"]
    assert table.places == [("x.tsv", 1), (str(two), 1)]  # the same name twice: told apart by the path
    assert table.hashes == {
        "x.tsv": hashlib.sha256(b"a\n1\n").hexdigest(),
        str(two): hashlib.sha256(b"a\n2\n").hexdigest(),
    }


def test_the_reviews_that_come_along() -> None:
    table = read("packaged:movie_reviews.tsv")
    assert len(table.rows) == 10_605
    assert table.rows[0]["text"].startswith("The Rock is destined to be the 21st Century's new ''Conan''")


BAD = {
    "x.tsv": [("a\ta\n", "two columns are named 'a'"), ("a,b\n1,2\n", r"separated by commas .* name the file \.csv")],
    "x.csv": [
        ("prompt;completion\n1,5;2\n", r"separated by semicolons \(columns prompt, completion\), .*with commas"),
        ("a\tb\n1\t2\n", r"separated by tabs .*name the file \.tsv"),
        ("sep=;\na;b\n", "a note for a spreadsheet. Remove this line"),
        ('a,b\n1,2\n3,"4\n5,6\n7,8\n', "row 2: a quote opens a cell and is not closed.*3 lines later"),
        ('"a" b,c\n', "the header is not valid CSV"),
        ("naïve\n1\n".encode("latin-1"), "the header: expected UTF-8 text: byte 0xef"),
    ],
    "x.json": [
        ('{"a": 1}\n{"a": 2}\n', r"line 2: not valid JSON.*name the file \.jsonl"),
        ("3", "expected a list of objects, found int"),
        ("", "holds no rows"),
        ('{"train": [{"a": 1}], "test": [{"a": 2}]}', r"several tables.*\(train: 1 objects, test: 1 objects\).*jq -c"),
        ('{"train": [{"a": 1}], "test": []}', r"several tables.*jq -c '\.\[\"train\"\]\[\]' x\.json > new\.jsonl"),
        ('{"prompt": "a", "completion": "b"}', "one object with the fields 'prompt', 'completion'"),
        ('{"prompt": {"0": "a"}, "answer": {"0": "b"}}', "as pandas writes.*orient='records', lines=True"),
        ('{"a": ["x", "y"], "b": ["z"]}', r"columns of different lengths \(a: 2, b: 1\)"),
        ('{"data": [{"a": 1}], "data": [{"a": 2}]}', "a key is given twice: 'data'"),
        ("[" * 100_000, "not valid JSON"),
        ("[é]".encode("latin-1"), "expected UTF-8 text.*Save the file as UTF-8"),
    ],
    "x.jsonl": [
        ('{\n  "a": 1\n}\n{\n  "a": 2\n}\n', "indented JSON: an object takes several lines.*jq -c . x.jsonl"),
        ('{"a": 1,\n "b": 2}\n', "indented JSON"),
        ('{\n"a": "' + "x" * 2**20 + '"\n}\n', "indented JSON"),
        ('[{"a": 1}]\n', r"a JSON list, and a \.jsonl file has one object a line\. Name the file \.json"),
        ('[\n {"a": 1}\n]\n', "Name the file .json"),
        ('{"a": 1}\r{"a": 2}\r', "carriage returns alone"),
        ("{}\n".encode("utf-16"), "byte order mark says UTF-16"),
    ],
    "x.parquet": [("PAR0", "not readable as Parquet")],
}


@pytest.mark.parametrize(("name", "content", "message"), [(n, *case) for n, cases in BAD.items() for case in cases])
def test_files_that_cannot_be_read_say_where(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read(write(tmp_path / name, content))
    assert name in str(error.value)


BAD_ROWS = {
    "x.tsv": [
        ("a\tb\n1\t2\n3\n4\t5\n", 2, "wrong number of cells: it has 1, and the header has 2"),
        ("a\n1\nnaïve\n2\n".encode("latin-1"), 2, "expected UTF-8 text: byte 0xef at 2"),
    ],
    "x.csv": [
        ("a,b\n1,2,3\n4,5\n", 1, "wrong number of cells: it has 3, and the header has 2"),
        ('a,b\n1,2\n"x" y,3\n4,5\n', 2, "not valid CSV: .*quotes inside a cell are doubled"),
        ('a\n1\n"two\nnaïve"\n2\n'.encode("latin-1"), 2, "expected UTF-8 text: byte 0xef"),
    ],
    "x.json": [
        ('[{"a": 1}, 2]', 2, "expected an object, found int"),
        ('[{"a": "\\ud83d"}, {"a": 1}]', 1, "lone surr"),
        ('[{"a": 1}, {"a": 1, "b": 2, "a": 1}, {"a": 2}]', 2, "a key is given twice: 'a' in one object"),
        ('{"data": [{"a": [{"b": [{"c": 1, "c": 2}]}]}, {"a": 2}]}', 1, "a key is given twice: 'c'"),
        ('{"a": [{"b": 1, "b": 2}, {}]}', 1, "a key is given twice: 'b'"),
    ],
    "x.jsonl": [
        ('{"a": 1}\n\n{"a": \n{"a": 2}\n', 3, "not valid JSON: Expecting value"),
        ('{"a": 1}\n[1]\n', 2, "expected an object, found list"),
        ('{"a": 1}\n{"a": 1}{"a": 2}\n', 2, "not valid JSON: Extra data"),
        ('{"a": 1}\n{"a": ' + "[" * 100_000 + "\n", 2, "not valid JSON: nested too deeply"),
        ('{"a": 1}\n{"a": ' + "1" * 5000 + "}\n", 2, "not valid JSON: Exceeds the limit"),
        ('{"a": 1, "a": 1}\n{"a": 1}\n', 1, "a key is given twice: 'a' in one object"),
        ('{"a": 1}\n{"a": [{"role": "user", "content": "x", "content": "y"}]}\n', 2, "given twice: 'content'"),
        (b'{"a": "\xe9"}\n{"a": 1}\n', 1, "expected UTF-8 text: byte 0xe9 at 7"),
        ('{"a": 1}\n{"a": "cut \\ud83d"}\n', 2, r"lone surrogate: \\ud83d in 'a'"),
        ('{"a": 1}\n{"a": [{"b": ["\\uDC00\\ud83d"]}]}\n', 2, r"lone surrogate: \\udc00 in 'a'"),
        ('{"a": 1}\n{"a": {"\\udbff": 2}}\n', 2, r"lone surrogate: \\udbff in 'a'"),
        ('{"a": 1}\n{"\\ud800": 2}\n', 2, "lone surrogate: .* in the name of a field"),
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "row", "reason"), [(n, *case) for n, cases in BAD_ROWS.items() for case in cases]
)
def test_a_row_that_cannot_be_read_is_a_bad_row(
    tmp_path: Path, name: str, content: str | bytes, row: int, reason: str
) -> None:
    source = str(write(tmp_path / name, content))
    rows = open_rows(DataConfig(source=source), "any")
    read = rows.read(lambda r: r.row)
    assert len(read) == len(rows.order) - rows.bad.count
    first = rows.bad.rows[0]
    assert (first["file"], first["row"]) == (name, row) and re.search(reason, first["reason"])
    with pytest.raises(DataError, match=rf"{name}:{row}: "):
        rows.check(len(read))


def test_pairs_of_surrogates_are_characters(tmp_path: Path) -> None:
    table = read(write(tmp_path / "x.jsonl", '{"a": "\\ud83d\\ude00 \\\\ud83d"}\n'))
    assert table.rows == [{"a": "😀 \\ud83d"}] and not table.bad


def test_a_source_without_any_readable_row(tmp_path: Path) -> None:
    for name, content in (("x.jsonl", "{\n"), ("y.jsonl", "oops\nno\n"), ("x.tsv", "a\tb\n1\n")):
        for policy in ("stop", "skip"):
            with pytest.raises(DataError, match=f"{name}:1: (not valid JSON|wrong number)|indented JSON"):
                open_rows(DataConfig(source=str(write(tmp_path / name, content)), on_bad_row=policy))


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path / "reviews.tsv", "a\n1\n")
    with pytest.raises(DataError, match=r"no such file\. Did you mean .*reviews\.tsv"):
        read(tmp_path / "review.tsv")
    with pytest.raises(DataError, match=r"ships .*'movie_reviews.tsv'"):
        read("packaged:books.tsv")
    for path in (tmp_path, write(tmp_path / "x.xlsx", "?")):
        with pytest.raises(DataError, match=r"expected a file ending in one of \.tsv"):
            read(path)
    with pytest.raises(ModelError, match="'nobody/no-such-data' is not on this machine and not in the Hub's cache"):
        read("nobody/no-such-data")


def test_parquet_with_two_columns_or_fields_of_a_name(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    struct = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["b", "b"])
    for table, message in ((columns, "two columns are named 'a'"), (pa.table({"a": struct}), "duplicate field names")):
        pq.write_table(table, tmp_path / "x.parquet")
        with pytest.raises(DataError, match=rf"x\.parquet: .*{message}"):
            read(tmp_path / "x.parquet")
