"""Measure how hard rows are for a model: the loss of their expected outputs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from posttrain.config.settings import DataConfig, ModelConfig


def first_rows_of_tasks(rows: Iterable[Mapping[str, Any]], count: int) -> dict[str, list[Mapping[str, Any]]]:
    """Return the first rows of each task, `count` at most, by the task's name."""
    out: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if len(out[row["task"]]) < count:
            out[row["task"]].append(row)
    return dict(out)


def measure_difficulty(
    config: ModelConfig, rows: Mapping[str, list[Mapping[str, Any]]], context: int | None
) -> dict[str, Any]:
    """Compute the mean negative log-likelihood per token of the expected outputs of each task, under a model.

    A prompt is read through the model's chat template, or as plain text if it has none.

    Args:
        config: The model.
        rows: Rows by task, as `first_rows_of_tasks` returns them.
        context: The model's length in tokens. Longer rows are not measured, and counted. None: no limit.

    Returns:
        For each task: rows, tokens, nll (the mean per token, in nats), low and high (its 95% interval, by rows), too_long.
    """
    from posttrain.core.progress import Track
    from posttrain.core.ragged import micro_batches
    from posttrain.data.encoding import prompt_with_completion
    from posttrain.eval.likelihood_tasks import CHUNK_TOKENS, score
    from posttrain.models.language_model import LanguageModel
    from posttrain.models.loading import load_model
    from posttrain.models.verification import verify

    hf, tokenizer = load_model(config)
    model = LanguageModel(hf).eval()
    verify(model)
    data = DataConfig(source="rows.jsonl", chat=bool(getattr(tokenizer, "chat_template", None)))
    out: dict[str, Any] = {}
    with Track("difficulty of rows", sum(map(len, rows.values()))) as track:
        for task, chosen in rows.items():
            samples = [
                prompt_with_completion(
                    {"messages": _turns(row), "source": row["place"]}, row["completion"], tokenizer, data
                )
                for row in chosen
            ]
            fits = [s for s in samples if context is None or len(s) <= context]
            batches = micro_batches([len(s) for s in fits], CHUNK_TOKENS) if fits else []
            losses = [(-total, count) for batch in batches for total, count in score(model, [fits[i] for i in batch])]
            out[task] = {"rows": len(fits), "too_long": len(samples) - len(fits), **_mean(losses)}
            track.update(sum(len(rows[name]) for name in out))
    return out


def _turns(row: Mapping[str, Any]) -> list[Any]:
    prompt = row["prompt"]
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _mean(losses: list[tuple[float, int]]) -> dict[str, float]:
    from posttrain.core.statistics import perplexity_interval

    if not losses:
        return {"tokens": 0}
    value, low, high = (math.log(x) for x in perplexity_interval(losses))
    return {"tokens": sum(count for _, count in losses), "nll": value, "low": low, "high": high}
