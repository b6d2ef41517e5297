"""Texts of the items of an evaluation, without the wording of its prompts, to look for them in rows to train on."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping
from typing import Any

from posttrain.config.evaluation import EvaluationBase
from posttrain.data.leaks import LEAST_WORDS
from posttrain.data.parts import PlacedRow
from posttrain.data.row_quality import count_words
from posttrain.eval.behaviour_evaluation import BehaviourConfig
from posttrain.eval.evaluation_tasks import ProblemsEvaluationConfig, RowsConfig, make_evaluation


def item_texts(config: Any, tokenizer: Any, context: int | None) -> list[list[str]] | None:
    """Return the texts of each item of an evaluation, as `LeakIndex.add` takes them.

    Of a prompt made by a template, these are the columns that it names; otherwise every turn of the user (without the
    instruction of a source of problems) and of the assistant. An answer of fewer than four words (a label, say) is left
    out: it says nothing about an item.

    Args:
        config: Settings of the evaluation; they name no stage.
        tokenizer: The model's tokenizer.
        context: The model's length in tokens; None: unknown.

    Returns:
        A list for each item. None: it is an evaluation from elsewhere, which does not tell what its items are.

    Raises:
        DataError: Its data can't be read.
    """
    if isinstance(config, EvaluationBase) and not config.compares_items:
        return []
    if isinstance(config, BehaviourConfig):
        return [[p.text for p in item.prompts] for item in make_evaluation(config).read(tokenizer, context).items]
    if isinstance(config, RowsConfig):
        from posttrain.data.rows import open_rows

        return open_rows(config.data).read(_row_texts)
    if isinstance(config, ProblemsEvaluationConfig):
        asked = make_evaluation(config).read(tokenizer, context)
        data = getattr(config.problems, "data", None)
        columns = columns_named_in(getattr(data, "prompt", None))
        behind = f"\n{instruction}" if (instruction := getattr(config.problems, "instruction", None)) else ""
        return [_problem_texts(item.problem, columns, behind) for item in asked.items]
    return None


def columns_named_in(template: str | None) -> list[str]:
    """Return the columns that a template names."""
    named = [name for _, name, _, _ in string.Formatter().parse(template or "") if name]
    return list(dict.fromkeys(named))


def _row_texts(placed: PlacedRow) -> list[str]:
    record, config = placed.record(), placed.config
    if config.prompt is not None:
        prompts = [placed.row.get(name) for name in columns_named_in(config.prompt)]
        answers = [placed.row.get(name) for name in columns_named_in(config.completion)]
        return _chosen(prompts, answers)
    if not record.messages:
        return [record.text or ""]
    by_role: dict[str, list[Any]] = {"user": [], "assistant": []}
    for message in record.messages:
        by_role.get(message["role"], []).append(message["content"])
    return _chosen(by_role["user"], by_role["assistant"])


def _problem_texts(problem: Mapping[str, Any], columns: Iterable[str], instruction: str) -> list[str]:
    prompts = [problem[name] for name in columns if name in problem]
    if not prompts:
        # the instruction is the same in all items: a short question is looked for without it
        prompts = [m["content"].removesuffix(instruction) for m in problem["messages"] if m["role"] == "user"]
    return _chosen(prompts, [problem.get("answer")])


def _chosen(prompts: Iterable[Any], answers: Iterable[Any]) -> list[str]:
    texts = [str(text) for text in prompts if text is not None]
    long = [str(text) for text in answers if text is not None and count_words(str(text)) >= LEAST_WORDS]
    return list(dict.fromkeys([*texts, *long]))
