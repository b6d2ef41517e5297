"""Small tables and tasks for the tests of instruction rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.data.instruction_builder import InstructionBuilder
from posttrain.data.instruction_settings import InstructionSettings
from posttrain.data.instruction_tasks import InstructionTask

WORDS = "amber birch cedar delta ember flint grove heath inlet jetty knoll larch marsh north olive pearl quartz".split()


def table(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sentence(i: int) -> str:
    """Return a text that shares few words with those of other numbers."""
    return f"{WORDS[i % 17]}{i} {WORDS[i * 7 % 17]}{i} {WORDS[i * 5 % 17]}{i} {WORDS[i * 3 % 17]}{i}"


def sentiment(tmp_path: Path, count: int = 60, name: str = "sentiment", **more: Any) -> InstructionTask:
    rows = [{"text": sentence(i), "label": i % 2, "why": f"because {i}"} for i in range(count)]
    settings = {"type": "classification", "data": table(tmp_path / f"{name}.jsonl", rows), "output": "{label}"}
    settings |= {"fields": {"input": "{text}"}, "labels": {0: ["negative", "bad"], 1: ["positive", "good"]}}
    return InstructionTask.model_validate({"name": name, **settings, **more})


def built(tasks: Sequence[InstructionTask], folder: Path, seed: int = 0, **settings: Any) -> InstructionBuilder:
    builder = InstructionBuilder(tasks, seed, InstructionSettings(**settings), folder)
    builder.read()
    builder.split()
    return builder
