"""Instruction building: from tables and short descriptions of tasks to rows for instruction tuning.

Source: FLAN (arXiv 2109.01652, 2210.11416): many wordings of each task, demonstrations and reasoning in a part of the
rows, inverted tasks, examples-proportional mixing (arXiv 1910.10683), and whole clusters of tasks held out to measure
what is learnt about tasks that were never trained on. See docs/instructions.md.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from posttrain.config.settings import NAME, ModelConfig
from posttrain.core.errors import DataError
from posttrain.core.files import read_lines, stream_lines, write_json
from posttrain.data.instruction_settings import InstructionSettings
from posttrain.data.instruction_tasks import InstructionTask
from posttrain.data.quality_settings import QualitySettings
from posttrain.data.row_quality import count_words
from posttrain.methods.data.data_stage import DataStage, DataStageConfig, refuse_torchrun
from posttrain.methods.data.instruction_files import read_tasks, task_paths
from posttrain.methods.data.instruction_quality import InstructionPreview, InstructionQuality, read_rows

if TYPE_CHECKING:
    from posttrain.data.instruction_builder import InstructionBuilder
    from posttrain.data.instruction_rows import Fits


SHORT_ANSWER = 5
"""Words of an answer that is compared with the expected one; a longer one can be said in too many ways."""

PREVIEWED_ROWS = 20
"""Rows that a preview keeps."""


class InstructionsConfig(DataStageConfig, InstructionSettings, QualitySettings):
    """Instruction building: tables become rows for instruction tuning."""

    one_process = ("method",)
    method: Literal["instructions"] = "instructions"
    name: str = Field("instructions", pattern=NAME, description="Name of the stage's folder in the run.")
    tasks: list[str | InstructionTask] = Field(
        min_length=1,
        max_length=1000,
        description="Task files: paths, patterns such as tasks/*.yaml, packaged:NAME; or tasks as blocks.",
    )
    max_tokens: int | None = Field(
        None,
        ge=16,
        description="Longest row in tokens: demonstrations are left out of longer ones, and then the row itself (both are counted). None: the model's context.",
    )

    def named_settings(self) -> Mapping[str, BaseModel]:
        """Return the tasks that files describe, by name: a run notes and checks their tables like its own."""
        return {task.name: task for task in read_tasks([t for t in self.tasks if isinstance(t, str)])}

    def named_files(self) -> list[Path]:
        """Return the files that `tasks` names."""
        return [path for entry in self.tasks if isinstance(entry, str) for path in task_paths(entry)]


class Instructions(DataStage):
    """Read the tables, hold rows out, mix the tasks, and write the rows."""

    Config = InstructionsConfig
    title = "Instruction building"

    def prepare(self) -> list[tuple[str, Any]]:
        """Read the task files, and check that their tables have the columns that they name."""
        from posttrain.data.instruction_builder import check_tasks
        from posttrain.data.instruction_examples import open_table

        self.tasks = read_tasks(self.config.tasks)
        check_tasks(self.tasks, self.config)
        for task in self.tasks:
            open_table(task)
        return []

    def preview(self, model: ModelConfig, seed: int) -> list[tuple[str, Any]]:
        """Build the rows in a temporary folder, and return their statistics and the first of them."""
        with tempfile.TemporaryDirectory(prefix="posttrain-instructions-") as folder:
            out = Path(folder) / "data"
            stats = self.build(out, Path(folder) / "examples", seed, model)
            first = list(islice(read_rows(out / "rows.jsonl"), PREVIEWED_ROWS))
        return [(self.config.name, InstructionPreview(stats, first))]

    def make(self, model: ModelConfig, folder: Path, seed: int) -> dict[str, Any]:
        refuse_torchrun(self.config.method)
        out, work = folder / "data", folder / "examples"
        stats = self.build(out, work, seed, model)
        counts = {name: task["rows"] for name, task in stats["tasks"].items() if task["rows"]}
        made: dict[str, Any] = {"rows": sum(counts.values()), "tasks": len(counts), **stats["held_out"]}
        made |= {f"left out: {cause}": n for cause, n in stats["dropped"].items()}
        return {"made": made}

    def build(self, out: Path, work: Path, seed: int, model: ModelConfig | None = None) -> dict[str, Any]:
        """Build the rows, and write `out`/rows.jsonl, seen.jsonl, unseen.jsonl (also by what measures them) and stats.json.

        All or nothing is written.

        Args:
            out: The folder that is written.
            work: A folder for the texts of the examples while rows are built; it is removed.
            seed: Seeds everything random.
            model: The model under which the difficulty of rows is measured. None: it is not.

        Returns:
            The content of stats.json.
        """
        from posttrain.core.progress import Track
        from posttrain.data.instruction_builder import InstructionBuilder
        from posttrain.trainer.policy import save_atomically

        config = self.config
        shutil.rmtree(work, ignore_errors=True)  # of an interrupted run: what it holds is made again
        builder = InstructionBuilder(self.tasks, seed, config, work)
        quality = InstructionQuality(config, self.tasks, self.context)
        stats: dict[str, Any] = {}
        try:
            with Track(f"{config.name}: rows read", 1) as track:
                builder.read(partial(_show, track))
                track.say("looking for duplicates, leaks and held-out rows")
            quality.drop(builder)
            builder.split()
            quality.drop_held_out(builder)

            def write(new: Path) -> None:
                new.mkdir()
                stats.update(self._write(builder, new))
                stats["quality"] = quality.measure(new, model)
                write_json(new / "stats.json", stats)

            save_atomically(out, write)
        finally:
            builder.close()
            shutil.rmtree(work, ignore_errors=True)
        return stats

    def _write(self, builder: InstructionBuilder, new: Path) -> dict[str, Any]:
        from posttrain.core.progress import Track

        fits = self._fits()
        total = sum(builder.plan()[1])
        with Track(f"{self.config.name}: rows written", max(1, total)) as track:
            stream_lines(new / "rows.jsonl", _counted(builder.rows(fits), track))
        for name, unseen in (("seen", False), ("unseen", True)):
            stream_lines(new / f"{name}.jsonl", builder.held_out_rows(unseen, fits))
            write_by_measure(new / f"{name}.jsonl")
        stats = builder.stats()
        if not any(task["rows"] for task in stats["tasks"].values()):
            raise DataError(f"stage {self.config.name}: every row is longer than {self._limit():,} tokens")
        held = {"seen": False, "unseen": True}
        stats["held_out"] = {
            f"{name} rows held out": sum(t["held_out_rows"] for t in stats["tasks"].values() if t["held out"] == unseen)
            for name, unseen in held.items()
        }
        return stats

    def _limit(self) -> int | None:
        limits = [n for n in (self.config.max_tokens, self.context.context) if n is not None]
        return min(limits, default=None)

    def _fits(self) -> Fits | None:
        """Return a function that tells if a row fits into the context; None if it has no limit."""
        from posttrain.data.encoding import RowLength

        limit, tokenizer = self._limit(), self.context.tokenizer
        if limit is None or tokenizer is None:
            return None
        length = RowLength(tokenizer)
        return lambda prompt, completion: length.fits(prompt, completion, limit)


def measured_as(row: Mapping[str, Any]) -> str:
    """Return what a held-out row can be measured by.

    choices: the likeliest label (evaluation `choice`). answers: an answer of at most SHORT_ANSWER words, which is right
    or wrong (`generate`). texts: one of many good texts (`perplexity`).
    """
    if row.get("choices"):
        return "choices"
    is_short = count_words(row["completion"]) <= SHORT_ANSWER and not row["rationale"]
    return "answers" if row["type"] in ("question_answering", "extraction") and is_short else "texts"


def write_by_measure(path: Path) -> None:
    """Write the rows of NAME.jsonl also to NAME_choices.jsonl, NAME_answers.jsonl and NAME_texts.jsonl, if they have any."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in read_lines(path):
        rows.setdefault(measured_as(row), []).append(row)
    for measure, found in rows.items():
        stream_lines(path.with_name(f"{path.stem}_{measure}.jsonl"), found)


def _show(track: Any, done: int, total: int) -> None:
    track.set_total(max(1, total))
    track.update(done)


def _counted(rows: Iterable[dict[str, Any]], track: Any) -> Iterable[dict[str, Any]]:
    done = 0
    for done, row in enumerate(rows, 1):
        yield row
        if done % 1000 == 0:
            track.update(done)
    track.update(done)
