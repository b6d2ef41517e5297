"""Evaluations by likelihood and by greedy answers: choices, perplexity, matches."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from posttrain.core.errors import DataError
from posttrain.data.encoding import prompt_tokens, prompt_with_completion
from posttrain.eval.item_pictures import item_pictures
from posttrain.sampling.greedy import greedy

if TYPE_CHECKING:
    from posttrain.core.types import Sample as TrainingSample
    from posttrain.eval.evaluation_tasks import ChoiceTask, Chunk, EvaluationItems, EvaluationRun, GenerateTask
    from posttrain.models.language_model import LanguageModel

CHUNK_TOKENS = 8192
"""Tokens of one forward pass: also how much is done again after a crash."""


def chunks_by_tokens(sizes: Sequence[int], compute: Callable[[range], EvaluationItems]) -> Iterator[Chunk]:
    """Yield consecutive items whose sizes add up to at most CHUNK_TOKENS (one item at least) as chunks."""

    def chunk(start: int, end: int) -> Chunk:
        return end - start, lambda track: compute(range(start, end))

    start, load = 0, 0
    for i, size in enumerate(sizes):
        if i > start and load + size > CHUNK_TOKENS:
            yield chunk(start, i)
            start, load = i, 0
        load += size
    if start < len(sizes):
        yield chunk(start, len(sizes))


@torch.no_grad()
def score(model: LanguageModel, samples: Sequence[TrainingSample]) -> list[tuple[float, int]]:
    """Return (sum of weighted log-probabilities, number of weighted tokens) of each sample."""
    batch = model.pack(list(samples))
    weighted = torch.zeros(batch.total, dtype=torch.bool, device=model.device)
    weights = [torch.tensor(list(s.weights), dtype=torch.float64) for s in samples]
    for row, w in zip(batch.rows, weights, strict=True):
        weighted[row[w.to(row.device).nonzero().squeeze(1)]] = True
    targets = weighted.nonzero().squeeze(1)
    logprobs = torch.zeros(batch.total, dtype=torch.float64)
    logprobs[targets.cpu()] = model(batch, targets_N=targets)[0].double().cpu()
    return [
        (float((logprobs[row.cpu()] * w).sum()), int((w != 0).sum()))
        for row, w in zip(batch.rows, weights, strict=True)
    ]


def choice_chunks(run: EvaluationRun, config: ChoiceTask.Config) -> Iterator[Chunk]:
    """Compute the accuracy of the likeliest choice: argmax over c of log p(c | prompt), summed or a token's mean.

    Raises:
        DataError: The expected completion of a row is not among its choices.
    """
    sets = []
    for row in run.data.rows:
        choices = list(config.choices or row.get("choices") or [])
        if row["completion"] not in choices:
            raise DataError(
                f"evaluation {config.name}: {row.get('source', 'a row')} expects {row['completion']!r}, which is not "
                f"among its choices {choices}. Give `choices` in the recipe, or a column 'choices' that contains it"
            )
        sets.append([(c, prompt_with_completion(row, c, run.tokenizer, config.data)) for c in choices])

    def compute(numbers: range) -> EvaluationItems:
        scores = iter(score(run.model, [s for i in numbers for _, s in sets[i]]))
        items = []
        for i in numbers:
            by_choice = {}
            for choice, _ in sets[i]:
                total, count = next(scores)
                by_choice[choice] = total if config.normalize == "sum" else total / max(1, count)
            best = max(by_choice, key=lambda c: by_choice[c])
            row = run.data.rows[i]
            item = {"id": i, "prompt": row["prompt_text"], "expected": row["completion"], "prediction": best}
            item |= {"correct": best == row["completion"], "scores": by_choice}
            items.append({**item, **item_pictures(i, sets[i][0][1].tokens)})
        return items

    return chunks_by_tokens([sum(len(s) for _, s in choices) for choices in sets], compute)


def generate_chunks(run: EvaluationRun, config: GenerateTask.Config) -> Iterator[Chunk]:
    """Compute the accuracy of greedy answers that match the expected one."""
    prompts = [prompt_tokens(row, run.tokenizer, config.data) for row in run.data.rows]

    def compute(numbers: range) -> EvaluationItems:
        items = []
        answers = greedy(run.model, run.tokenizer, [prompts[i] for i in numbers], config.max_new_tokens)
        for i, answer in zip(numbers, answers, strict=True):
            row, text = run.data.rows[i], run.tokenizer.decode(answer, skip_special_tokens=True)
            right = matches(text, row["completion"], config.match)
            item = {"id": i, "prompt": row["prompt_text"], "expected": row["completion"], "output": text}
            items.append({**item, "correct": right, **item_pictures(i, prompts[i])})
        return items

    return chunks_by_tokens([len(p) + config.max_new_tokens for p in prompts], compute)


def perplexity_chunks(run: EvaluationRun) -> Iterator[Chunk]:
    """Compute the negative log-likelihood of the loss tokens of each row."""

    def compute(numbers: range) -> EvaluationItems:
        scores = score(run.model, [run.data.samples[i] for i in numbers])
        return [{"id": i, "nll": -total, "tokens": count} for i, (total, count) in zip(numbers, scores, strict=True)]

    return chunks_by_tokens([len(s) for s in run.data.samples], compute)


def greedy_answers(run: EvaluationRun, config: ChoiceTask.Config | GenerateTask.Config) -> EvaluationItems:
    """Return greedy answers to the first rows, for reading side by side."""
    rows = run.data.rows[: config.show]
    prompts = [prompt_tokens(row, run.tokenizer, config.data) for row in rows]
    answers = greedy(run.model, run.tokenizer, prompts, config.max_new_tokens)
    texts = [run.tokenizer.decode(a, skip_special_tokens=True) for a in answers]
    return [
        {"prompt": r["prompt_text"], "expected": r["completion"], "output": text, **item_pictures(i, prompts[i])}
        for i, (r, text) in enumerate(zip(rows, texts, strict=True))
    ]


def matches(output: str, expected: str, how: str) -> bool:
    """Return True if a generated answer is right; case, surrounding space and a final full stop do not count.

    Args:
        output: The answer.
        expected: The right one.
        how: exact: the same text. contains: the expected text somewhere. first_word: the first word is the expected
            one. numeric: the last number in the output equals the last one in the expected text (1,234.50 is 1234.5);
            an output without a number is wrong.
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
