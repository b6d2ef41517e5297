"""The command of examples/data: complete or not at all, resumed, and clear about what can't be had."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "data"
sys.path.insert(0, str(EXAMPLES))

import fetch  # noqa: E402
from downloads import Downloads, FetchError, list_text, run, unpack  # noqa: E402
from tables import Table, tsv_text  # noqa: E402

TASK = {"name": "t", "type": "paraphrase", "data": {"source": "t.jsonl"}, "fields": {"input": "{a}"}, "output": "{b}"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what was fetched, from two sources: good, and one that can't be had after its first table."""
    made: list[str] = []

    def good(_: Any) -> Any:
        made.append("good")
        table = Table("t", [TASK], unique=("a",))
        for a in ("one", "two", "one"):
            table.add(a=a, b=a.upper())
        table.drop("too short", "x")
        yield table

    def bad(_: Any) -> Any:
        made.append("bad")
        yield Table("u", [TASK], rows=[{"a": "1", "b": "2"}])
        raise FetchError("the archive is closed")

    for name, function in (("good_source", good), ("bad_source", bad)):
        module: Any = SimpleNamespace(ABOUT=name, LICENCE="MIT", make_tables=function)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(fetch, "SOURCES", {"good": "good_source", "bad": "bad_source"})
    return made


def test_tables_task_files_and_counts(calls: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch.main([str(tmp_path), "--only", "good"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert rows == [{"a": "one", "b": "ONE"}, {"a": "two", "b": "TWO"}]
    assert "name: t" in (tmp_path / "t.yaml").read_text()
    counts = json.loads((tmp_path / ".done" / "good.json").read_text())["tables"]["t.jsonl"]
    assert counts["rows"] == 2 and counts["dropped"] == {"the same row twice": 1, "too short": 1}
    printed = capsys.readouterr().out
    assert "Licence: MIT" in printed and "t.jsonl: 2 rows (dropped: 1 the same row twice; 1 too short)" in printed


def test_what_is_complete_is_not_fetched_again(
    calls: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch.main([str(tmp_path)]) == 1
    assert "bad: the archive is closed" in capsys.readouterr().err and not (tmp_path / ".done" / "bad.json").exists()
    assert fetch.main([str(tmp_path)]) == 1 and calls == ["good", "bad", "bad"]
    (tmp_path / "t.jsonl").unlink()
    fetch.main([str(tmp_path), "--only", "good"])
    fetch.main([str(tmp_path), "--only", "good", "--fresh"])
    assert calls == ["good", "bad", "bad", "good", "good"]


def test_wrong_calls_are_refused(calls: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for given, message in (([], "name the FOLDER"), (["x", "--only", "goood"], "invalid choice: 'goood'")):
        with pytest.raises(SystemExit):
            fetch.main(given)
        assert message in capsys.readouterr().err
    assert fetch.main(["--list"]) == 0 and "good: good_source. Licence: MIT." in capsys.readouterr().out


def test_messages_of_what_can_not_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FetchError, match="package lists: there is no program no-such-program here"):
        run(["no-such-program"], "package lists")
    with pytest.raises(FetchError, match=r"(?s)the wheel can't be had \(sh ended with 3\):\n  No matching"):
        run(["sh", "-c", "echo No matching version >&2; exit 3"], "the wheel")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(FetchError, match="no-such-package 1.0 from the Python index can't be had"):
        Downloads(tmp_path).wheel("no-such-package", "1.0")
    assert not (tmp_path / "no-such-package-1.0").exists()  # a folder of this name would be taken for complete


@pytest.mark.parametrize(
    ("lists", "code", "message"),
    [
        ("", 0, "left no list"),
        ("", 100, r"package lists of Debian can't be had \(apt-get ended with 100\)"),
        ("a_Packages", 100, None),  # one of several sources failed
        ("a_Packages", 0, None),
    ],
)
def test_lists_of_packages_that_can_be_had_are_used(
    lists: str, code: int, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "apt-get"
    program.parent.mkdir()
    place = tmp_path / "data" / "apt-en" / "lists"
    write = f"echo Package: x > {place}/{lists}" if lists else "true"
    program.write_text(f"#!/bin/sh\n[ -d {place}/partial ] || exit 9\n{write}\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    if message is None:
        assert [path.name for path in Downloads(tmp_path / "data").apt_lists(["en"])] == [lists]
        program.write_text("#!/bin/sh\nexit 1\n")  # what is complete is not fetched again
        assert Downloads(tmp_path / "data").apt_lists(["en"])
    else:
        with pytest.raises(FetchError, match=message):
            Downloads(tmp_path / "data").apt_lists(["en"])


def test_a_download_that_is_there_is_used(tmp_path: Path) -> None:
    (tmp_path / "thing-1.0").mkdir()
    assert Downloads(tmp_path).wheel("thing", "1.0") == tmp_path / "thing-1.0"


def test_archives_and_lists(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("a/data.txt", "x")
    unpack(tmp_path / "a.whl", tmp_path)
    assert (tmp_path / "a" / "data.txt").read_text() == "x"
    import gzip
    import lzma

    (tmp_path / "l.gz").write_bytes(gzip.compress("Ü".encode()))
    (tmp_path / "l.xz").write_bytes(lzma.compress("Ü".encode()))
    (tmp_path / "l").write_text("Ü")
    assert {list_text(tmp_path / name) for name in ("l.gz", "l.xz", "l")} == {"Ü"}
    with pytest.raises(ValueError, match="a tab or a line end"):
        tsv_text([{"a": "x\ty"}])


def test_each_task_file_has_a_source() -> None:
    """The files in tasks/ are named as the tables are, and each name appears in a converter."""
    code = "".join(path.read_text() for path in EXAMPLES.glob("*.py"))
    for path in (EXAMPLES / "tasks").glob("*.yaml"):
        stem = path.stem if not path.stem.startswith("paraphrases_") else "paraphrases_"
        assert f'"{stem}' in code, path.name
