"""Read task files: YAML with one task, or a list of them, each checked as a whole with file and line."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from posttrain.config.settings import SourceConfig
from posttrain.core.errors import DataError, RecipeError
from posttrain.core.files import named_path, read_small_text
from posttrain.data.instruction_tasks import InstructionTask
from posttrain.data.readers import packaged_or_own
from posttrain.recipe.documents import Document, parse_document
from posttrain.recipe.messages import explain

NOT_FILES = ("packaged:", "lab:", "reasoning-gym:", "stage:")


def task_paths(entry: str) -> list[Path]:
    """Return the files that a path, a pattern such as tasks/*.yaml, or packaged:NAME names, in order of their names.

    Raises:
        DataError: There is none.
    """
    path = packaged_or_own(entry)
    if path.is_file():
        return [path]
    if path.is_dir():
        raise DataError(f"tasks: {entry!r} is a folder; name its files: {entry.rstrip('/')}/*.yaml")
    found = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(entry) else []
    if not found:
        raise DataError(f"tasks: {entry!r}: there is no such file; expected the path of a task's .yaml, or a pattern")
    return [Path(name) for name in found]


def read_tasks(entries: Sequence[str | InstructionTask]) -> list[InstructionTask]:
    """Return the tasks of files, and those that are given as they are.

    Args:
        entries: Paths of YAML files with a task or a list of tasks, patterns, packaged:NAME, or tasks.

    Raises:
        DataError: A file can't be read, a task is wrong (with its file, line and key), or two tasks have one name.
    """
    tasks: list[InstructionTask] = []
    origins: dict[str, str] = {}
    for entry in entries:
        if isinstance(entry, InstructionTask):
            found = [(entry, "the recipe")]
        else:
            found = [(task, str(path)) for path in task_paths(entry) for task in read_task_file(path)]
        for task, origin in found:
            if task.name in origins:
                raise DataError(
                    f"two tasks are named {task.name!r} (in {origins[task.name]} and in {origin}); give each another name"
                )
            origins[task.name] = origin
            tasks.append(task)
    return tasks


def read_task_file(path: Path) -> list[InstructionTask]:
    """Return the tasks of a YAML file; paths in it are relative to its folder. Raises DataError with file and line."""
    try:
        document = parse_document(read_small_text(path), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"task file {path}: can't be read: {error}") from error
    except RecipeError as error:
        raise DataError(str(error)) from error
    if not isinstance(document.data, dict | list) or not document.data:
        raise DataError(f"task file {path}: expected a task (name, type, data, fields, output) or a list of tasks")
    tasks: list[InstructionTask] = []
    problems = list(document.problems)
    for number, part in enumerate(_parts(document)):
        try:
            if not isinstance(part.data, dict):
                raise DataError(f"{path}: item {number + 1} is no task: expected a mapping, got {part.data!r:.80}")
            tasks.append(_beside(InstructionTask.model_validate(part.data), path))
        except ValidationError as error:
            explain(error, part)
            problems += part.problems + ([f"and {part.more:,} more"] if part.more else [])
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise DataError(f"task file {path} has {len(problems)} problem{'s' * (len(problems) != 1)}:{lines}")
    return tasks


def _parts(document: Document) -> list[Document]:
    """Return a document of each task, whose messages name it."""
    if isinstance(document.data, dict):
        return [_part(document.data, document.places)]
    return [
        _part(item, {k[1:]: v for k, v in document.places.items() if k[0] == i}, f"item {i + 1}")
        for i, item in enumerate(document.data)
    ]


def _part(data: Any, places: dict[Any, str], otherwise: str = "the task") -> Document:
    name = data.get("name") if isinstance(data, dict) else None
    return Document(data, places, root=InstructionTask, name=f"task {name!r}" if isinstance(name, str) else otherwise)


def _beside(task: InstructionTask, path: Path) -> InstructionTask:
    """Return a task whose sources are found beside its file; what is not there stays as it is."""

    def moved(source: str) -> str:
        if source.startswith("stage:"):
            raise DataError(
                f"{path}: task {task.name!r} reads {source}, and a file can't name a stage: write the task into the "
                "recipe's list of tasks"
            )
        if source.startswith(NOT_FILES):
            return source
        beside = path.parent / named_path(source)
        return str(beside) if beside.is_file() else source

    data = task.data
    sources: Any = moved(data.source) if isinstance(data.source, str) else []
    if isinstance(data.source, list):
        sources = [
            entry.model_copy(update={"source": moved(entry.source)})
            if isinstance(entry, SourceConfig)
            else moved(entry)
            for entry in data.source
        ]
    return task.model_copy(update={"data": data.model_copy(update={"source": sources})})
