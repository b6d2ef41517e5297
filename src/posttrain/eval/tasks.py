"""Run evaluations on a model. Every item and answer is kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from posttrain.config import EvaluationConfig, ModelConfig
from posttrain.core.files import Lines, read_lines, read_object, write_json
from posttrain.core.item_statistics import summarize
from posttrain.core.progress import Track
from posttrain.eval.evaluation_tasks import Chunk, EvaluationItems, EvaluationRun, make_evaluation
from posttrain.eval.item_parts import ItemPart, item_part
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import context_length, load_model
from posttrain.models.verification import verify
from posttrain.rewards.reward import RewardFunctions
from posttrain.rewards.reward_log import LOG


def evaluate_model(
    config: ModelConfig,
    tasks: Sequence[EvaluationConfig],
    folder: Path,
    seed: int = 0,
    functions: RewardFunctions | None = None,
    part: ItemPart = "report",
) -> list[dict[str, Any]]:
    """Open a model and run evaluations on it, without those whose files are in the folder already.

    Args:
        config: The model.
        tasks: The evaluations.
        folder: Folder of the files.
        seed: Seeds everything random.
        functions: Rewards given from Python, by name.
        part: Which items of evaluations with `validation` are measured.

    Returns:
        The summaries, in the order of `tasks`.
    """
    pending = [t for t in tasks if not (folder / f"{t.name}.json").exists()]
    if pending:
        hf, tokenizer = load_model(config, inference=True)
        model = LanguageModel(hf).eval()
        verify(model)
        for task in pending:
            with ExitStack() as until:
                data = task_data(task, tokenizer, context_length(config), part)
                run = EvaluationRun(model, tokenizer, data, seed, functions or {}, until, folder / LOG, config)
                run_task(task, run, folder)
    return [read_object(folder / f"{t.name}.json") for t in tasks]


def task_data(task: EvaluationConfig, tokenizer: Any, context: int | None, part: ItemPart = "report") -> Any:
    """Read the data of an evaluation.

    Args:
        task: The evaluation.
        tokenizer: The model's tokenizer.
        context: The model's length in tokens; None: unknown.
        part: Which items of an evaluation with `validation` are wanted.

    Raises:
        DataError: It can't be read.
    """
    return item_part(make_evaluation(task).read(tokenizer, context), task, part)


def run_task(task: EvaluationConfig, run: EvaluationRun, folder: Path) -> dict[str, Any]:
    """Run one evaluation: TASK.jsonl gets every item, TASK.json the summary, TASK.samples.json some answers.

    Items are written chunk by chunk, so that an interrupted evaluation continues after the last one. The chunks are
    always the same, and so are the numbers.

    Args:
        task: The evaluation.
        run: What it works with.
        folder: Folder of the files.

    Raises:
        RewardError: A reward that judges, ranks or scores fails.
    """
    began = time.perf_counter()
    evaluation = make_evaluation(task)
    items = _kept(folder, task.name, list(evaluation.chunks(run)))
    summary = {"task": task.name, "kind": task.measures, **summarize(items, task.measures, seed=run.seed)}
    summary |= evaluation.summary(items, run.seed)
    return _leave(folder, summary, evaluation.examples(run, items), began)


def _kept(folder: Path, name: str, chunks: Sequence[Chunk]) -> EvaluationItems:
    """Return the items of all chunks, without computing those again that an interrupted process has left."""
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / f"{name}.partial.jsonl"
    done = len(read_lines(work))
    total, end = sum(size for size, _ in chunks), 0
    with Track(f"{folder.name}: {name}", total) as track:
        kept = [0]
        for size, _ in chunks:
            kept.append(kept[-1] + size)
        done = max(k for k in kept if k <= done)  # whole chunks only
        track.first = track.done = done
        lines = Lines(work, done)
        for size, compute in chunks:
            end += size
            if end <= done:
                continue
            for item in compute(track):
                lines.add(item)
            track.update(end)
        lines.close()
    return read_lines(work)


def _leave(folder: Path, summary: dict[str, Any], samples: EvaluationItems, began: float) -> dict[str, Any]:
    """Write the files of a finished evaluation, the summary last: it shows that the others are complete."""
    name = summary["task"]
    summary["seconds"] = round(time.perf_counter() - began, 2)
    write_json(folder / f"{name}.samples.json", samples)
    (folder / f"{name}.partial.jsonl").replace(folder / f"{name}.jsonl")
    write_json(folder / f"{name}.json", summary)
    return summary
