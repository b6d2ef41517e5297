"""What `make gpu` runs on a GPU, run with tiny sizes on this machine's CPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """Return the program as a module: this process has the imports that it begins with."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))  # which it sets for its items
    return importlib.import_module("gpu.run")


@pytest.mark.slow
def test_one_item_that_samples_and_trains_runs_dry(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["run.py", "--dry", "--json", str(figures), "--only", "device,grpo"])
    assert run.main() == 0
    found = json.loads(figures.read_text())["items"]
    assert {name: item["status"] for name, item in found.items()} == {"device": "ok", "grpo": "ok"}


@pytest.mark.long
def test_all_that_make_gpu_runs_runs_dry(run: ModuleType, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "run.py"), "--dry", "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = json.loads(figures.read_text())["items"]
    assert list(found) == [item.name for item in run.ITEMS]
    assert all(item["status"] == "ok" for item in found.values())


def test_targets_are_met_or_not_on_the_card_that_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    targets = importlib.import_module("gpu.targets")
    numbers: dict[str, dict[str, object]] = {
        "device": {"device": "NVIDIA H100"},
        "speed sft 0.5B": {"of the card's rate": 0.23, "tokens per second": 65_000.0},
        "speed sft 0.5B, compiled": {"of the card's rate": 0.51, "tokens per second": 140_000.0},
        "speed trl sft 0.5B": {"tokens per second": 100_000.0},
        "speed dpo 0.5B": {"pairs per second": 18.0},
        "speed trl dpo 0.5B": {"pairs per second": 10.0},
        "speed grpo 0.5B": {},
        "speed decoding 1.5B": {"of the bandwidth": 0.6},
    }
    lines = targets.reached({name: {"numbers": n} for name, n in numbers.items()})
    assert lines[0] == "targets (an H100), on NVIDIA H100"
    shown = [line.split("  ")[-1].split("; ") for line in lines[1:]]
    assert [part[-1].rsplit(": ")[-1] for part in shown] == ["met", "NOT MET", "met", "wanted 3 times", "met"]
    assert "51.0%" in lines[1] and "1.40 times" in lines[2] and "1.80 times" in lines[3] and "not measured" in lines[4]
    numbers["device"]["device"] = "cpu"
    assert "says nothing" in targets.reached({name: {"numbers": n} for name, n in numbers.items()})[1]


def test_what_fails_is_told_and_what_there_is_no_time_for_is_skipped(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.import_module("gpu.base"), "die", lambda where: os._exit(3), raising=False)
    items = {"broken": "base:nothing", "dead": "base:die", "device": "run:device"}
    monkeypatch.setattr(run, "ITEMS", [run.Item(name, home, 1) for name, home in items.items()])
    figures = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["run.py", "--dry", "--json", str(figures)])
    assert run.main() == 1
    assert "1 ok, 2 failed, 0 skipped" in capsys.readouterr().out
    found = json.loads(figures.read_text())["items"]
    assert "has no attribute 'nothing'" in found["broken"]["failed"][0] and found["device"]["status"] == "ok"
    assert "ended with status 3" in found["dead"]["failed"][0]
    monkeypatch.setattr(sys, "argv", ["run.py", "--dry", "--minutes", "0"])
    assert run.main() == 0
    assert "0 ok, 0 failed, 3 skipped" in capsys.readouterr().out
