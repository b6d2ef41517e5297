"""Files as people have them: what is read is what is written there, and rows are counted as a person counts them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.data.readers import Table, read_table


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
    "x.tsv": [("a\tb\n1\t2\n3\n", r"row 2 has 1 cells, and the header 2"), ("a\ta\n", "two columns are named 'a'")],
    "x.csv": [
        ("a,b\n1,2,3\n", "row 1 has 3 cells"),
        ('a,b\n1,2\n"x" y,3\n', r"row 2: not valid CSV.*quotes inside a cell are doubled"),
    ],
    "x.json": [
        ('{"a": 1}\n{"a": 2}\n', r"line 2: not valid JSON.*name the file \.jsonl"),
        ("3", "expected a list of objects, found int"),
        ("[1]", "row 1: expected an object, found int"),
        ("", "holds no rows"),
    ],
    "x.jsonl": [('{"a": 1}\n\n{"a": \n', "row 3: not valid JSON"), ("[1]\n", "row 1: expected an object, found list")],
    "x.parquet": [("PAR0", "not readable as Parquet")],
}


@pytest.mark.parametrize(("name", "content", "message"), [(n, *case) for n, cases in BAD.items() for case in cases])
def test_files_that_cannot_be_read_say_where(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read(write(tmp_path / name, content))
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["x.tsv", "x.csv", "x.json", "x.jsonl"])
def test_other_encodings_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="expected UTF-8 text.*Save the file as UTF-8"):
        read(write(tmp_path / name, "a\nnaïve\n".encode("latin-1")))


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path / "reviews.tsv", "a\n1\n")
    with pytest.raises(DataError, match=r"no such file\. Did you mean .*reviews\.tsv"):
        read(tmp_path / "review.tsv")
    with pytest.raises(DataError, match=r"ships .*'movie_reviews.tsv'"):
        read("packaged:books.tsv")
    for path in (tmp_path, write(tmp_path / "x.xlsx", "?")):
        with pytest.raises(DataError, match=r"expected a file ending in one of \.tsv"):
            read(path)
    with pytest.raises(DataError, match=r"as a Hub data set \(subset None, split train\) it can't be opened"):
        read("nobody/no-such-data")
