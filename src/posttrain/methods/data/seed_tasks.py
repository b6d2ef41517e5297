"""Seed tasks of Self-Instruct: written by people, shown to the model, and rows to train on themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.core.errors import DataError
from posttrain.data.readers import packaged_or_own
from posttrain.methods.data.instruction_prompts import prompt_of


@dataclass(frozen=True, slots=True)
class SeedTask:
    """Hold a task that a person wrote.

    Attributes:
        instruction: What is to be done.
        classification: Whether it is answered with one of a few labels.
        instances: Input (empty if the task needs none) and output of each example.
        language: Language of the instruction, as ISO 639 names it.
    """

    instruction: str
    classification: bool
    instances: tuple[Mapping[str, str], ...]
    language: str = "en"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that requests show."""
        return {
            "instruction": self.instruction,
            "classification": self.classification,
            "instances": list(self.instances),
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for supervised fine-tuning of each example."""
        about = {"instruction": self.instruction, "classification": self.classification, "origin": "seed"}
        return [
            {"prompt": prompt_of(self.instruction, one["input"]), "completion": one["output"], **about}
            for one in self.instances
        ]


def read_seed_tasks(path: str) -> list[SeedTask]:
    """Read seed tasks, one a line: instruction, classification, and instances with input and output.

    Args:
        path: Path of the file, or packaged:NAME for one that is part of posttrain.

    Raises:
        DataError: The file can't be read, or a line holds no such task; with its number.
    """
    try:
        lines = packaged_or_own(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"seed tasks {path!r} can't be read: {error}. Expected JSON Lines with a task on each"
        ) from error
    tasks: dict[str, SeedTask] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            task = _task(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(
                f'seed tasks {path!r}, line {number}: {error}. Expected {{"instruction": text, "classification": true '
                'or false, "instances": [{"input": text, "output": text}, ...]}'
            ) from error
        if task.instruction in tasks:
            raise DataError(f"seed tasks {path!r}, line {number}: the instruction stands there already")
        tasks[task.instruction] = task
    kinds = {t.classification for t in tasks.values()}
    if len(kinds) < 2:
        raise DataError(
            f"seed tasks {path!r} hold {len(tasks)} tasks, and no {'other task' if kinds == {True} else 'classification'}: "
            "examples of both kinds are shown to the model"
        )
    return list(tasks.values())


def _task(record: Any) -> SeedTask:
    instruction = " ".join(str(record["instruction"]).split())
    if not isinstance(record["instruction"], str) or not instruction:
        raise ValueError("the instruction is empty, or no text")
    if not isinstance(record["classification"], bool):
        raise ValueError("classification is neither true nor false")
    instances = []
    for one in record["instances"]:
        given, output = one.get("input") or "", one["output"]
        if not isinstance(given, str) or not isinstance(output, str) or not output.strip():
            raise ValueError("an example's output is empty, or no text")
        instances.append({"input": given.strip(), "output": output.strip()})
    if not instances:
        raise ValueError("it has no instances")
    return SeedTask(instruction, record["classification"], tuple(instances), str(record.get("language", "en")))
