"""Files of a run that hold something else, are no files, or have odd names: a message or a page, never a traceback."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from posttrain.cli.inspect_rollouts import print_chains, print_rollouts
from posttrain.core.errors import CheckpointError, DataError
from posttrain.core.files import numbered, read_lines, read_object
from posttrain.report import build_report

ODD = {
    "evaluations/comparison.json": [
        [{"task": "sentiment", "before": 5, "after": [], "n": "q"}],
        [{"task": ["sentiment"]}],
        [{"task": "sentiment", "before": {"value": "high"}, "after": {"value": 1}, "difference": None}],
    ],
    "evaluations/after/sentiment.json": [
        {"kind": 7, "metric": [], "value": "x"},
        {"strategies": 5},
        {"strategies": [5]},
    ],
    "evaluations/before/sentiment.samples.json": [5, [5], {"a": 1}],
    "stages/1-sft/method.json": [{"metrics": [{"name": []}], "title": {"a": 1}}, {"metrics": 7}],
    "stages/1-sft/best_step.json": [{"best_step": "x", "model_step": [], "held_out_loss": 7}],
    "stages/1-sft/timings.jsonl": [{"step": 1, "phases": 7}, {"step": True, "seconds": {}}],
    "stages/1-sft/judge.json": [{"people": 7}, [1], {"judge": 5, "cost": {"questions": "many"}}],
    "stages/1-sft/held_out.json": [{"kind": "reward_model", "before": {}, "after": {"calibration": 5}}],
}


@pytest.mark.parametrize("name", ODD)
def test_values_of_another_kind_are_a_page_or_a_message(name: str, make_run: Callable[..., Path]) -> None:
    """Of a finished run, whose files have checksums, the message names the file; of another, it says what it met."""
    for value in ODD[name]:
        for finished in (True, False):
            run = make_run(steps=3)
            path, manifest = run / name, json.loads((run / "manifest.json").read_text())
            before = path.read_bytes() if path.exists() else None
            manifest["artifacts"] = {name: hashlib.sha256(before or b"").hexdigest()} if finished else {}
            (run / "manifest.json").write_text(json.dumps(manifest))
            path.write_text(json.dumps(value) + "\n")
            try:
                page = build_report(run).read_text()
                assert not finished or f"{name} was changed" in page
            except CheckpointError as error:
                assert (name if finished else "a file of the run") in str(error)
            path.unlink() if before is None else path.write_bytes(before)


def test_a_mistake_of_the_page_is_not_blamed_on_files(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(steps=3)
    manifest, name = json.loads((run / "manifest.json").read_text()), "recipe.yaml"
    manifest["artifacts"] = {name: hashlib.sha256((run / name).read_bytes()).hexdigest()}
    (run / "manifest.json").write_text(json.dumps(manifest))

    def broken(_: Any) -> str:
        raise TypeError("a mistake")

    monkeypatch.setattr("posttrain.report.build.render_page", broken)
    with pytest.raises(TypeError, match="a mistake"):
        build_report(run)


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop"])
def test_what_is_no_file_is_not_waited_for(kind: str, make_run: Callable[..., Path]) -> None:
    run = make_run(steps=3)
    lines = ("stages/1-sft/metrics.jsonl", "evaluations/before/language.jsonl")
    for name in (*ODD, *lines, "manifest.json", "recipe.yaml"):
        path = run / name
        path.unlink(missing_ok=True)
        {"folder": path.mkdir, "pipe": lambda p=path: os.mkfifo(p), "loop": lambda p=path: p.symlink_to(p.name)}[kind]()
        if kind != "loop":
            for read in (read_object, read_lines):
                with pytest.raises(CheckpointError, match="it is no file"):
                    read(path)
    build_report(run)


def test_names_that_only_look_like_numbers_are_passed_over(make_run: Callable[..., Path]) -> None:
    """Python's isdigit() is true of superscripts, which are no integers."""
    run, out = make_run(steps=3), Console(file=io.StringIO())
    for name in ("stages/²-x/chains", "stages/²-x/rollouts", "evaluations/²-x", "stages/-x"):
        (run / name).mkdir(parents=True)
    (run / "stages/²-x/chains/chunk-²²²²²².jsonl").touch()
    for name in ("step-²²²²²².parquet", "step--1.parquet", "step-7.parquet"):
        (run / "stages/1-sft" / name).touch()
    assert build_report(run).is_file() and list(numbered(run / "stages/1-sft", "step-", ".parquet")) == [7]
    assert not print_chains(run, out)
    with pytest.raises(DataError, match="no rollouts"):
        print_rollouts(run, out)
