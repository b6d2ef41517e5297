"""Run tasks of lm-eval on the engine, and make items of its samples."""

from __future__ import annotations

import numbers
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from posttrain.core.errors import DataError, MissingExtraError, PosttrainError, RecipeError

if TYPE_CHECKING:
    from posttrain.core.progress import Track
    from posttrain.eval.evaluation_tasks import Chunk, EvaluationItems, EvaluationRun
    from posttrain.eval.lm_eval_evaluation import LmEvalTask

BOOTSTRAP = 1000
"""Draws of lm-eval's standard errors of metrics that are no means."""


@dataclass(frozen=True)
class LoadedTask:
    """Hold a task of lm-eval whose data is there.

    Attributes:
        count: Number of documents that are measured.
        manager: lm-eval's index, in which it is.
        stats: The manifest's entry.
    """

    count: int
    manager: Any
    stats: dict[str, Any] = field(default_factory=dict)


def require_lm_eval() -> Any:
    """Return the module lm_eval. Raises MissingExtraError."""
    try:
        import lm_eval
    except ImportError as error:
        raise MissingExtraError(
            f"evaluations of kind lm_eval need lm-eval ({error}): pip install 'posttrain[lm-eval]'"
        ) from error
    return lm_eval


@lru_cache(maxsize=4)
def _task_manager(folder: str | None, with_own: bool) -> Any:
    """Return lm-eval's index of the tasks in a folder and, `with_own`, of those in its wheel."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=with_own)


def _load(config: LmEvalTask.Config) -> tuple[Any, dict[str, Any]]:
    """Return the index in which the task is found, and the leaf tasks by name."""
    # lm-eval reads its thousands of YAML files for an index, half a minute's work that a task of the user's needs not.
    if config.tasks_folder is not None or Path(config.task).is_file():
        with suppress(KeyError):
            return _found(config, _task_manager(config.tasks_folder, False))
    manager = _task_manager(config.tasks_folder, True)
    try:
        return _found(config, manager)
    except KeyError as error:
        near = manager.match_tasks([f"*{config.task}*"])[:8]
        hint = f" Tasks with that in their name: {', '.join(near)}." if near else ""
        raise RecipeError(
            f"evaluation {config.name}: lm-eval has no task, group or tag {config.task!r}, and there is no such YAML "
            f"file.{hint} Name a folder of your own tasks with tasks_folder (--lm-eval-folder)"
        ) from error


def _found(config: LmEvalTask.Config, manager: Any) -> tuple[Any, dict[str, Any]]:
    """Return an index and the leaf tasks that it has by this name. Raises KeyError if it has none."""
    try:
        return manager, dict(manager.load([config.task])["tasks"])
    except Exception as error:  # whatever the task's data set, template or function does
        if isinstance(error, KeyError) and "is not a registered" in str(error):
            raise
        raise DataError(
            f"evaluation {config.name}: lm-eval can't load the task {config.task}: {type(error).__name__}: "
            f"{str(error)[:300]}. If its data is on the Hub, it is needed in the cache of `datasets` or by network; a "
            "task of yours can name local files (dataset_path: json, dataset_kwargs: {data_files: ...})"
        ) from error


def load_task(config: LmEvalTask.Config, tokenizer: Any) -> LoadedTask:
    """Load a task, to know early that it and its data are there.

    Args:
        config: The settings.
        tokenizer: The model's tokenizer.

    Raises:
        MissingExtraError: lm-eval is not installed.
        RecipeError: lm-eval has no such task, or it can't be run here.
        DataError: Its data can't be read.
    """
    require_lm_eval()
    if config.chat and not getattr(tokenizer, "chat_template", None):
        raise RecipeError(
            f"evaluation {config.name}: chat is true, and the tokenizer has no chat template: give "
            "model.chat_template, or set chat to false"
        )
    manager, tasks = _load(config)
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise RecipeError(
                f"evaluation {config.name}: lm-eval's task {name} runs programs that the model writes, without a "
                "sandbox. Measure programs by kind: sample, with a judge of kind unit_tests and problems of human_eval"
            )
        if getattr(task, "MULTIMODAL", False):
            raise RecipeError(f"evaluation {config.name}: lm-eval's task {name} has pictures, which are not read here")
    counts = {name: min(len(task.eval_docs), config.limit or len(task.eval_docs)) for name, task in tasks.items()}
    total = sum(counts.values())
    if not total:
        raise DataError(f"evaluation {config.name}: lm-eval's task {config.task} has no documents")
    whole = sum(len(task.eval_docs) for task in tasks.values())
    stats = {
        "source": f"lm-eval: {config.task}", "sha256": {}, "layout": "lm-eval", "rows": whole, "used": total,
        "dropped": {}, "bad_rows": [], "truncated": 0, "tokens": 0, "loss_tokens": 0, "longest": 0, "median": 0,
        "duplicates": 0, "examples": [],
    }  # fmt: skip
    return LoadedTask(total, manager, stats)


def task_chunks(run: EvaluationRun, config: LmEvalTask.Config) -> Iterator[Chunk]:
    """Yield the whole task as one chunk."""
    yield run.data.count, lambda track: task_items(run, config, track)


def task_items(run: EvaluationRun, config: LmEvalTask.Config, track: Track) -> EvaluationItems:
    """Run the task, and return its documents as items; the first one has lm-eval's results as `lm_eval`.

    Args:
        run: What the evaluation works with.
        config: The settings.
        track: Its progress.

    Raises:
        DataError: The task fails, or none of its metrics has a number for each document.
    """
    lm_eval = require_lm_eval()
    from posttrain.eval.lm_eval_model import EngineLM

    model = EngineLM(run.model, run.tokenizer, run.seed, lambda what, total: track.counter(what, total, 16))
    with same_random_state(), redirect_stderr(StringIO()):  # its progress bars: `track` shows the same
        try:
            results = lm_eval.simple_evaluate(
                model=model,
                tasks=[config.task],
                num_fewshot=config.shots,
                limit=config.limit,
                bootstrap_iters=BOOTSTRAP,
                system_instruction=config.system,
                apply_chat_template=config.chat,
                fewshot_as_multiturn=config.chat,
                task_manager=run.data.manager,
            )
        except PosttrainError:
            raise
        except Exception as error:
            raise DataError(
                f"evaluation {config.name}: lm-eval's task {config.task} fails: {type(error).__name__}: {error}"
            ) from error
    items = [item for name, samples in results["samples"].items() for item in _items(config, results, name, samples)]
    kept = {"results": _figures(results["results"]), "groups": _figures(results.get("groups") or {})}
    kept |= {"shots": results["n-shot"], "versions": results["versions"], "lm_eval": lm_eval.__version__}
    return [{**items[0], "lm_eval": kept}, *items[1:]]


@contextmanager
def same_random_state() -> Iterator[None]:
    """Leave the global generators as they were: lm-eval seeds them, and what follows in a run must not depend on it."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _figures(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return lm-eval's numbers by task, "metric,filter" → number, with their standard errors."""
    return {
        task: {key: float(v) for key, v in values.items() if isinstance(v, numbers.Real) and "," in key}
        for task, values in results.items()
    }


def _items(
    config: LmEvalTask.Config, results: Mapping[str, Any], task: str, samples: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the documents of a leaf task; a task with several filters has a sample of each document for each."""
    documents: dict[int, dict[str, dict[str, Any]]] = {}
    for sample in samples:
        documents.setdefault(sample["doc_id"], {})[sample["filter"]] = sample
    metric, chosen = _headline(config, results, task, next(iter(documents.values())))
    for number, by_filter in sorted(documents.items()):
        sample = by_filter[chosen]
        values = {
            f"{name},{which}": value
            for which, one in by_filter.items()
            for name in one["metrics"]
            if (value := metric_number(one[name])) is not None
        }
        yield {
            "id": f"{task}:{number}",
            "source": f"{task}:{number}",
            **_texts(sample),
            "value": values[f"{metric},{chosen}"],
            "metrics": values,
        }


def metric_number(value: Any) -> float | None:
    """Return a metric's number for one document: itself, or of (log-likelihood, units) that of a unit; else None."""
    if isinstance(value, numbers.Real | np.bool_):
        return float(value)
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, numbers.Real) for v in value):
        return float(value[0]) / max(1.0, float(value[1]))
    return None


def _headline(
    config: LmEvalTask.Config, results: Mapping[str, Any], task: str, document: Mapping[str, Mapping[str, Any]]
) -> tuple[str, str]:
    """Return the metric and the filter that tables compare."""
    chosen = config.filter or next(iter(document))
    if chosen not in document:
        raise RecipeError(f"evaluation {config.name}: {task} has no filter {chosen!r}: there are {', '.join(document)}")
    sample, better = document[chosen], results["higher_is_better"].get(task, {})
    # A pair is a log-likelihood and its units: more of it is better, whatever is made of their sum.
    known = [name for name in sample["metrics"] if metric_number(sample[name]) is not None]
    usable = [name for name in known if better.get(name, True) or isinstance(sample[name], tuple | list)]
    wanted = config.metric or (usable[0] if usable else None)
    if wanted not in usable:
        raise RecipeError(
            f"evaluation {config.name}: {task} has {', '.join(sample['metrics'])}, and "
            f"{'no metric' if wanted is None else repr(wanted) + ' is not one'} with a number for each document of "
            f"which more is better: set metric to one of {', '.join(usable) or 'another task'}"
        )
    return str(wanted), chosen


def _texts(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return prompt, expected answer and output of a sample: of choices, the likeliest one."""
    arguments, target, given = sample["arguments"], sample["target"], sample["filtered_resps"]
    prompt, output = str(arguments[0][0]), given[0]
    if isinstance(output, tuple | list):
        best = max(range(len(given)), key=lambda i: given[i][0])
        output = arguments[best][1]
        if isinstance(target, int) and 0 <= target < len(arguments):
            target = arguments[target][1]
    elif not isinstance(output, str):  # the log-likelihood of a whole text
        return {"prompt": "", "expected": "", "output": prompt}
    return {"prompt": prompt, "expected": str(target), "output": str(output)}
