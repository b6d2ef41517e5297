"""Tokenised rows on the disk: the same samples, made once, and made again whenever anything differs."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.data import sample_cache, stored_items
from posttrain.data.readers import find_sources
from posttrain.data.sample_cache import ENTRY_HEADER, cache_key, cached_store, tokenizer_identity
from posttrain.data.sample_store import TOKENS
from posttrain.data.sft_rows import Prepared, prepare
from posttrain.data.template_source import fixed_date, set_template_args
from tests.data.tokenizers import byte_level


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sample_cache, "CACHED_FROM", 0)
    return tmp_path / "cache" / "data"


def write(path: Path, count: int = 30) -> str:
    rows = [{"prompt": f"{i}?", "completion": "x" * (i % 7) + f" {i}.", "id": i} for i in range(count)]
    lines = [json.dumps(row) for row in rows]
    lines[4] = '{"prompt": "cut'
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def settings(source: str, **changes: Any) -> DataConfig:
    return DataConfig(source=source, on_bad_row="skip", shuffle_seed=3, rows=(2, 25), **changes)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test fail if rows are tokenised."""

    def fail(*args: Any) -> None:
        raise AssertionError("rows are tokenised again")

    monkeypatch.setattr(stored_items, "encode_stream", fail)


def content(prepared: Prepared) -> Any:
    return list(prepared.samples), list(prepared.rows), json.loads(json.dumps(prepared.stats))


def test_the_same_samples_with_and_without_the_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tokenizer = settings(write(tmp_path / "a.jsonl")), byte_level("chatml")
    made = prepare(config, tokenizer)
    assert len(made.samples) == made.stats["used"] in (22, 23) and (cache / cache_key_of(config, tokenizer)).is_dir()
    forbid(monkeypatch)
    assert content(prepare(config, byte_level("chatml"))) == content(made)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(str(config.source), moved / "a.jsonl")
    found = prepare(settings(str(moved / "a.jsonl")), tokenizer)  # the content counts, not where it is
    assert list(found.samples) == list(made.samples) and found.stats["source"] == str(moved / "a.jsonl")
    monkeypatch.undo()
    assert content(prepare(settings(str(moved / "a.jsonl")), tokenizer)) == content(found)


def cache_key_of(config: DataConfig, tokenizer: Any, context: int | None = None) -> str:
    return cache_key(config, find_sources(config), tokenizer, context)


def test_whatever_changes_tokens_changes_the_key(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl")
    tokenizer = byte_level("chatml")
    keys = [cache_key_of(settings(source), tokenizer)]
    assert keys[0] == cache_key_of(settings(source), byte_level("chatml"))
    for changes in ({"system": "Be kind."}, {"loss_on": "all"}, {"max_tokens": 30}, {"chat": False}):
        keys.append(cache_key_of(settings(source, **changes), tokenizer))
    keys.append(cache_key_of(settings(source), tokenizer, 40))
    keys.append(cache_key_of(settings([{"source": source, "max_rows": 20}]), tokenizer))  # type: ignore[arg-type]
    other = byte_level("chatml")
    other.chat_template += " "
    keys.append(cache_key_of(settings(source), other))
    for text in ("<|new|>", "<|newer|>"):
        other.add_special_tokens({"additional_special_tokens": [text]})
        keys.append(cache_key_of(settings(source), other))
    dated = byte_level("chatml")
    dated.chat_template = "{{ strftime_now('%d') }}{{ enable }}" + dated.chat_template
    for date in ("2024-02-01", "2024-02-02"):
        with fixed_date(date):
            keys.append(cache_key_of(settings(source), dated))
    set_template_args(dated, {"enable": True})
    with fixed_date("2024-02-02"):
        keys.append(cache_key_of(settings(source), dated))
    write(tmp_path / "a.jsonl", 31)
    keys.append(cache_key_of(settings(source), tokenizer))
    assert len(set(keys)) == len(keys)


def test_a_tokenizer_is_known_by_its_content(tmp_path: Path) -> None:
    tokenizer = byte_level("chatml")
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    before = tokenizer_identity(again)
    again(["a", "longer"], padding=True, truncation=True, max_length=3)
    assert tokenizer_identity(again) == before  # how it was called last does not count
    again.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
    assert tokenizer_identity(again) != before


def test_a_damaged_entry_is_made_again(tmp_path: Path, cache: Path) -> None:
    config, tokenizer = settings(write(tmp_path / "a.jsonl")), byte_level("chatml")
    made = content(prepare(config, tokenizer))
    entry = cache / cache_key_of(config, tokenizer)
    for name in (TOKENS, "start.npy", ENTRY_HEADER):
        for damage in (lambda data: data[:-1], lambda data: b"", lambda data: data[:40] + b"\x07" + data[41:]):
            if name == TOKENS and len(damage(b"x" * 99)) == 99:
                continue  # found when a sample is read
            (entry / name).write_bytes(damage((entry / name).read_bytes()))
            assert content(prepare(config, tokenizer)) == made
    (entry / TOKENS).unlink()
    (cache / f".{entry.name}.writing").mkdir()  # a process died here
    (cache / f".{entry.name}.writing" / "old").touch()
    assert content(prepare(config, tokenizer)) == made
    assert sorted(p.name for p in cache.iterdir()) == [f".{entry.name}.lock", entry.name]


def test_bad_rows_leave_no_entry(tmp_path: Path, cache: Path) -> None:
    config = DataConfig(source=write(tmp_path / "a.jsonl"))
    for _ in range(2):
        with pytest.raises(DataError, match="1 of 30 rows can't be used.*\n  a.jsonl:5: not valid JSON"):
            prepare(config, byte_level("chatml"))
    assert [p.name for p in cache.iterdir() if not p.name.endswith(".lock")] == []


def test_old_entries_make_room(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level("chatml")
    configs = [settings(write(tmp_path / f"{name}.jsonl")) for name in "abc"]
    keys = [cache_key_of(config, tokenizer) for config in configs]
    first = [prepare(config, tokenizer) for config in configs[:2]]
    expected = list(prepare(configs[1], tokenizer).samples)
    for age, key in zip((100, 200), keys, strict=False):  # b was used longer ago than a
        os.utime(cache / key / ENTRY_HEADER, (time.time() - age,) * 2)
    size = sum(p.stat().st_size for p in (cache / keys[0]).iterdir())
    monkeypatch.setenv("POSTTRAIN_DATA_CACHE_GB", str(2.5 * size / 1e9))
    prepare(configs[2], tokenizer)
    assert {p.name for p in cache.iterdir() if not p.name.startswith(".")} == {keys[0], keys[2]}
    assert list(first[1].samples) == expected  # still readable by who has opened it


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, cache: Path) -> None:
    cache.parent.write_text("a file")
    with pytest.raises(DataError, match=r"tokenised rows are kept in .*POSTTRAIN_CACHE"):
        prepare(settings(write(tmp_path / "a.jsonl")), byte_level("chatml"))


def test_processes_that_need_the_same_entry_wait_for_it(tmp_path: Path, cache: Path) -> None:
    """Each of four processes notes when it writes: one does, the others open what it wrote."""
    notes = tmp_path / "notes"

    def make(folder: Path) -> Any:
        with notes.open("a") as f:
            f.write("made\n")
        time.sleep(0.2)
        writer = sample_cache_writer(folder)
        return writer.finish(), {"a": 1}

    children = []
    for _ in range(4):
        child = os.fork()
        if not child:
            store, kept = cached_store("key", make)
            os._exit(0 if len(store) == 1 and kept == {"a": 1} else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert notes.read_text() == "made\n"


def sample_cache_writer(folder: Path) -> Any:
    from posttrain.core.types import Sample
    from posttrain.data.sample_store import SampleWriter

    writer = SampleWriter(["f"], 10, folder)
    writer.add(0, Sample([1, 2], [0.0, 1.0], "f:1"), 0, 1, 0)
    return writer
