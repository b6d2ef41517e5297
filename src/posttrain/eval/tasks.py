"""Evaluation tasks: choices by likelihood, greedy answers by match, perplexity; many samples; scores.

Every item and answer is kept.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from posttrain.config import EvaluationConfig, ModelConfig, SampleConfig, ScoreConfig, TaskConfig
from posttrain.core.errors import DataError
from posttrain.core.files import Lines, read_lines, write_json
from posttrain.core.progress import Track
from posttrain.core.statistics import summarize
from posttrain.core.types import Sample
from posttrain.data.encoding import prompt_tokens, prompt_with_completion
from posttrain.data.prompts import PromptSet, load_prompts
from posttrain.data.sft_rows import Prepared, prepare
from posttrain.eval import sampled_tasks as sampled
from posttrain.eval import scored_tasks as scored
from posttrain.models.language_model import LanguageModel, verify
from posttrain.models.loading import context_length, load_model
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.greedy import greedy

Items = list[dict[str, Any]]
CHUNK_TOKENS = 8192
"""Tokens of one forward pass: also how much is done again after a crash."""


def evaluate_model(
    config: ModelConfig,
    tasks: Sequence[EvaluationConfig],
    folder: Path,
    seed: int = 0,
    functions: sampled.Functions | None = None,
) -> list[dict[str, Any]]:
    """Open a model and run tasks on it; the files go to `folder`. Returns the summaries, in the order of the tasks.

    functions: rewards that the tasks name and that live in this program.
    """
    pending = [t for t in tasks if not (folder / f"{t.name}.json").exists()]
    if pending:
        hf, tokenizer = load_model(config)
        model = LanguageModel(hf).eval()
        verify(model)
        for task in pending:
            data = task_data(task, tokenizer, context_length(config))
            if isinstance(data, PromptSet):
                assert isinstance(task, SampleConfig | ScoreConfig)
                run_asked(model, tokenizer, task, data, folder, seed, functions)
            else:
                assert isinstance(task, TaskConfig)
                run_task(model, tokenizer, task, data, folder, seed)
    return [json.loads((folder / f"{t.name}.json").read_text()) for t in tasks]


def task_data(task: EvaluationConfig, tokenizer: Any, context: int | None) -> Prepared | PromptSet:
    """What a task asks. Raises DataError where that can't be read."""
    if isinstance(task, SampleConfig | ScoreConfig):
        return load_prompts(task.problems, tokenizer, context=context)
    return prepare(task.data, tokenizer, context=context)


def run_task(
    model: LanguageModel, tokenizer: Any, task: TaskConfig, prepared: Prepared, folder: Path, seed: int = 0
) -> dict[str, Any]:
    """Run one task; TASK.jsonl gets every item, TASK.json the summary, TASK.samples.json some greedy answers.

    Items are written chunk by chunk; after a crash the chunks that are there are not made again. Chunks are the same
    whatever was there, so the numbers are too.
    """
    began = time.perf_counter()
    chunks = [(size, _untracked(make)) for size, make in KINDS[task.kind](model, tokenizer, task, prepared)]
    items = _kept(folder, task.name, chunks)
    summary = {"task": task.name, "kind": task.kind, **summarize(items, task.kind, seed=seed)}
    return _leave(folder, summary, _samples(model, tokenizer, task, prepared), began)


def run_asked(
    model: LanguageModel,
    tokenizer: Any,
    task: SampleConfig | ScoreConfig,
    questions: PromptSet,
    folder: Path,
    seed: int = 0,
    functions: sampled.Functions | None = None,
) -> dict[str, Any]:
    """The same for a task of sampled answers, many a question or scored. Raises RewardError where what judges, ranks or
    scores fails."""
    began = time.perf_counter()
    if isinstance(task, SampleConfig):
        with sampled.stack_of(task, functions) as rewards:
            items = _kept(folder, task.name, list(sampled.chunks(model, tokenizer, task, questions, seed, rewards)))
        about = sampled.summary_of(task, items, seed)
    else:
        with RewardStack([task.scorer], functions) as rewards:
            items = _kept(folder, task.name, scored.chunks(model, tokenizer, task, questions, seed, rewards))
        about = scored.about(items)
    summary = {"task": task.name, "kind": task.kind, **summarize(items, task.kind, seed=seed), **about}
    shown = [{name: i[name] for name in ("prompt", "expected", "output")} for i in items[: task.show]]
    return _leave(folder, summary, shown, began)


def _untracked(make: Callable[[], Items]) -> Callable[[Track], Items]:
    return lambda track: make()


def _kept(folder: Path, name: str, chunks: Sequence[tuple[int, Callable[[Track], Items]]]) -> Items:
    """The items of all chunks, those that an earlier process made taken from where it left them."""
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / f"{name}.partial.jsonl"
    done = len(read_lines(work))
    total, at = sum(size for size, _ in chunks), 0
    with Track(f"{folder.name}: {name}", total) as track:
        kept = [0]
        for size, _ in chunks:
            kept.append(kept[-1] + size)
        done = max(k for k in kept if k <= done)  # whole chunks only
        track.first = track.done = done
        lines = Lines(work, done)
        for size, compute in chunks:
            at += size
            if at <= done:
                continue
            for item in compute(track):
                lines.add(item)
            track.update(at)
        lines.close()
    return read_lines(work)


def _leave(folder: Path, summary: dict[str, Any], samples: Items, began: float) -> dict[str, Any]:
    """The files of a finished task, the summary last: it says that the others are there."""
    name = summary["task"]
    summary["seconds"] = round(time.perf_counter() - began, 2)
    write_json(folder / f"{name}.samples.json", samples)
    (folder / f"{name}.partial.jsonl").replace(folder / f"{name}.jsonl")
    write_json(folder / f"{name}.json", summary)
    return summary


Chunk = tuple[int, Callable[[], Items]]


def _in_chunks(sizes: Sequence[int], budget: int = CHUNK_TOKENS) -> Iterator[range]:
    """Consecutive runs of items whose sizes sum to at most the budget (one item at least)."""
    start, load = 0, 0
    for i, size in enumerate(sizes):
        if i > start and load + size > budget:
            yield range(start, i)
            start, load = i, 0
        load += size
    if start < len(sizes):
        yield range(start, len(sizes))


@torch.no_grad()
def score(model: LanguageModel, samples: Sequence[Sample]) -> list[tuple[float, int]]:
    """(sum of weighted log-probabilities, number of weighted tokens) of each sample; shared prefixes computed once."""
    batch = model.pack(list(samples))
    asked = torch.zeros(batch.total, dtype=torch.bool, device=model.device)
    weights = [torch.tensor(list(s.weights), dtype=torch.float64) for s in samples]
    for row, w in zip(batch.rows, weights, strict=True):
        asked[row[w.to(row.device).nonzero().squeeze(1)]] = True
    targets = asked.nonzero().squeeze(1)
    logprobs = torch.zeros(batch.total, dtype=torch.float64)
    logprobs[targets.cpu()] = model(batch, targets_N=targets)[0].double().cpu()
    return [
        (float((logprobs[row.cpu()] * w).sum()), int((w != 0).sum()))
        for row, w in zip(batch.rows, weights, strict=True)
    ]


def _choice(model: LanguageModel, tokenizer: Any, task: TaskConfig, prepared: Prepared) -> Iterator[Chunk]:
    """Accuracy of the likeliest choice: argmax over c of log p(c | prompt), summed or a token's mean."""
    sets = []
    for row in prepared.rows:
        choices = list(task.choices or row.get("choices") or [])
        if row["completion"] not in choices:
            raise DataError(
                f"evaluation {task.name}: {row.get('source', 'a row')} expects {row['completion']!r}, which is not "
                f"among its choices {choices}. Give `choices` in the recipe, or a column 'choices' that holds it"
            )
        sets.append([(c, prompt_with_completion(row, c, tokenizer, task.data)) for c in choices])

    def compute(run: range) -> Callable[[], Items]:
        def go() -> Items:
            scored = iter(score(model, [s for i in run for _, s in sets[i]]))
            items = []
            for i in run:
                scores = {}
                for choice, _ in sets[i]:
                    total, count = next(scored)
                    scores[choice] = total if task.normalize == "sum" else total / max(1, count)
                best = max(scores, key=lambda c: scores[c])
                row = prepared.rows[i]
                item = {"id": i, "prompt": row["prompt_text"], "expected": row["completion"], "prediction": best}
                items.append({**item, "correct": best == row["completion"], "scores": scores})
            return items

        return go

    for run in _in_chunks([sum(len(s) for _, s in choices) for choices in sets]):
        yield len(run), compute(run)


def _generate(model: LanguageModel, tokenizer: Any, task: TaskConfig, prepared: Prepared) -> Iterator[Chunk]:
    """Accuracy of greedy answers that match the expected one."""
    prompts = [prompt_tokens(row, tokenizer, task.data) for row in prepared.rows]

    def compute(run: range) -> Callable[[], Items]:
        def go() -> Items:
            items = []
            answers = greedy(model, tokenizer, [prompts[i] for i in run], task.max_new_tokens)
            for i, answer in zip(run, answers, strict=True):
                row, text = prepared.rows[i], tokenizer.decode(answer, skip_special_tokens=True)
                right = matches(text, row["completion"], task.match)
                item = {"id": i, "prompt": row["prompt_text"], "expected": row["completion"], "output": text}
                items.append({**item, "correct": right})
            return items

        return go

    for run in _in_chunks([len(p) + task.max_new_tokens for p in prompts]):
        yield len(run), compute(run)


def _perplexity(model: LanguageModel, tokenizer: Any, task: TaskConfig, prepared: Prepared) -> Iterator[Chunk]:
    """exp of the mean negative log-likelihood of the loss tokens."""

    def compute(run: range) -> Callable[[], Items]:
        def go() -> Items:
            scored = score(model, [prepared.samples[i] for i in run])
            return [{"id": i, "nll": -total, "tokens": count} for i, (total, count) in zip(run, scored, strict=True)]

        return go

    for run in _in_chunks([len(s) for s in prepared.samples]):
        yield len(run), compute(run)


KINDS: dict[str, Callable[[LanguageModel, Any, TaskConfig, Prepared], Iterator[Chunk]]] = {
    "choice": _choice,
    "generate": _generate,
    "perplexity": _perplexity,
}


def matches(output: str, expected: str, how: str) -> bool:
    """Whether a generated answer is right; case, surrounding space and a full stop at the end do not count.

    exact: the same text. contains: the expected text somewhere. first_word: the first word is the expected one.
    numeric: the last number in the output equals the last one in the expected text (1,234.50 is 1234.5); an output
    without a number is wrong.
    """
    out, want = (t.strip().casefold().rstrip(".").strip() for t in (output, expected))
    if how == "exact":
        return out == want
    if how == "contains":
        return want in out
    if how == "first_word":
        words = re.findall(r"\w+", out)
        return bool(words) and words[0] == want
    if how == "numeric":
        numbers = [re.findall(r"-?\d[\d,]*(?:\.\d+)?", t) for t in (out, want)]
        if not all(numbers):
            return False
        a, b = (float(n[-1].replace(",", "")) for n in numbers)
        return abs(a - b) <= 1e-6 * max(1.0, abs(b))
    raise ValueError(f"match must be exact, contains, first_word or numeric, and is {how!r}")


def _samples(model: LanguageModel, tokenizer: Any, task: TaskConfig, prepared: Prepared) -> Items:
    """Greedy answers to the first `show` items, for reading side by side."""
    rows = [] if task.kind == "perplexity" else prepared.rows[: task.show]
    prompts = [prompt_tokens(row, tokenizer, task.data) for row in rows]
    answers = greedy(model, tokenizer, prompts, task.max_new_tokens)
    return [
        {
            "prompt": r["prompt_text"],
            "expected": r["completion"],
            "output": tokenizer.decode(a, skip_special_tokens=True),
        }
        for r, a in zip(rows, answers, strict=True)
    ]
