"""The laboratory that answers sums badly: its tokenizer, its corpus, what it can do, its problems."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.config import SamplingConfig
from posttrain.core.files import write_text
from posttrain.core.types import Sample
from posttrain.data.synthetic import sums as text
from posttrain.lab.lab_settings import Settings, byte_level_bpe
from posttrain.models.language_model import LanguageModel
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request


def build_tokenizer() -> Any:
    """Byte-level BPE, every digit a token of its own, the corpus's words one token each. The same for every seed."""
    texts = (t.prompt + t.completion for t in (text.text_at(0, i) for i in range(8000)))
    return byte_level_bpe(texts, size=512, min_frequency=20, digits=True)


def reader(tokenizer: Any, settings: Settings) -> Callable[[int], list[Sample]]:
    """What is read in a step: no text twice."""
    return lambda step: corpus(tokenizer, settings.seed, step * settings.batch_size, settings.batch_size)


def corpus(tokenizer: Any, seed: int, start: int, count: int) -> list[Sample]:
    """Texts number `start` on, each ending in the end token; every token but the first carries loss."""
    texts = [text.text_at(seed, i) for i in range(start, start + count)]
    encoded = tokenizer([t.prompt + t.completion for t in texts])["input_ids"]
    return [Sample([*ids, tokenizer.eos_token_id], [0.0] + [1.0] * len(ids)) for ids in encoded]


def measure(policy: LanguageModel, tokenizer: Any, settings: Settings, group_size: int = 8) -> dict[str, Any]:
    """Shares of right answers on held-out problems.

    greedy: the likeliest answer; greedy_by_style: with the style's opening given; sampled: at temperature 1; mixed:
    groups of `group_size` samples of a problem that hold right and wrong ones.
    """
    rows = text.sum_problems(settings.seed, settings.measured, held_out=True)
    greedy = {"": answers(policy, tokenizer, rows)}
    for style, opening in text.OPENING.items():
        if opening:
            greedy[style] = answers(policy, tokenizer, rows, opening=opening)
    groups = answers(policy, tokenizer, rows[: len(rows) // 4 or 1], temperature=1.0, n=group_size)
    return {
        "greedy": _share([g[0] for g in greedy.pop("")]),
        "greedy_by_style": {style: _share([g[0] for g in right]) for style, right in greedy.items()},
        "sampled": _share([r for g in groups for r in g]),
        "mixed": _share([0 < sum(g) < len(g) for g in groups]),
        "measured": len(rows),
    }


def answers(
    policy: LanguageModel,
    tokenizer: Any,
    rows: Sequence[Mapping[str, str]],
    temperature: float = 0.0,
    n: int = 1,
    opening: str = "",
    seed: int = 0,
) -> list[list[bool]]:
    """For each problem, whether its answers are right: the completion's last line is the sum."""
    tokens = tokenizer([row["prompt"] + opening for row in rows])["input_ids"]
    requests = [Request(t, n, seed + i) for i, t in enumerate(tokens)]
    groups = LocalSampler(policy, tokenizer).sample(requests, SamplingConfig(temperature=temperature, max_tokens=64))
    return [
        [r.finish == "end" and r.text.rsplit("\n", 1)[-1] == row["answer"] for r in group.rollouts]
        for group, row in zip(groups, rows, strict=True)
    ]


def _share(right: Sequence[bool]) -> float:
    return round(sum(right) / len(right), 4)


def write(folder: Path, settings: Settings) -> None:
    """problems.jsonl to train on and held_out.jsonl, which no corpus holds."""
    for name, count, held_out in (
        ("problems", settings.train_problems, False),
        ("held_out", settings.held_out_problems, True),
    ):
        rows = text.sum_problems(settings.seed, count, held_out)
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def said(result: dict[str, Any]) -> str:
    """A sentence on what was measured."""
    return (
        f"Right on {result['measured']} held-out sums: {result['greedy']:.1%} greedy, {result['sampled']:.1%} sampled; "
        f"careful answers {result['greedy_by_style']['careful']:.1%}. Problems are in the folder."
    )
