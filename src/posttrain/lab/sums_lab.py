"""The laboratory whose model answers sums badly: tokenizer, corpus, measurement, problems."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.config import SamplingConfig
from posttrain.core.files import write_text
from posttrain.core.types import Sample
from posttrain.data.synthetic import sums
from posttrain.lab.lab_settings import LabSettings, byte_level_bpe
from posttrain.models.language_model import LanguageModel
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request


def sums_tokenizer() -> Any:
    """Make a tokenizer with one token for every digit and every word of the corpus, the same for every seed."""
    texts = (t.prompt + t.completion for t in (sums.text_at(0, i) for i in range(8000)))
    return byte_level_bpe(texts, size=512, min_frequency=20, digits=True)


class SumsLab:
    """Hold what is specific to the laboratory of sums."""

    steps = 800
    batch_size = 128

    def __init__(self, settings: LabSettings, tokenizer: Any = None) -> None:
        self.settings, self.tokenizer = settings, tokenizer or sums_tokenizer()

    def batch(self, step: int) -> list[Sample]:
        """Return the texts of a pretraining step; none is repeated."""
        size = self.settings.batch_size
        return corpus(self.tokenizer, self.settings.seed, range(step * size, (step + 1) * size))

    def measure(self, policy: LanguageModel, group_size: int = 8) -> dict[str, Any]:
        """Return the shares of right answers to held-out problems.

        greedy: the likeliest answer; greedy_by_style: after the first words of a style; sampled: at temperature 1;
        mixed: groups of `group_size` samples of a problem with both right and wrong ones.
        """
        rows = sums.sum_problems(self.settings.seed, self.settings.measured, held_out=True)
        greedy = {
            style: _share([right[0] for right in check_answers(policy, self.tokenizer, rows, opening=opening)])
            for style, opening in {"": "", **{s: o for s, o in sums.OPENING.items() if o}}.items()
        }
        groups = check_answers(policy, self.tokenizer, rows[: len(rows) // 4 or 1], temperature=1.0, n=group_size)
        return {
            "greedy": greedy.pop(""),
            "greedy_by_style": greedy,
            "sampled": _share([r for g in groups for r in g]),
            "mixed": _share([0 < sum(g) < len(g) for g in groups]),
            "measured": len(rows),
        }

    def write(self, folder: Path) -> None:
        """Write problems.jsonl to train on, and held_out.jsonl, which is in no corpus."""
        write_problems(self.settings, folder)

    @staticmethod
    def describe(result: Mapping[str, Any]) -> str:
        """Return a sentence about the measurement."""
        return (
            f"Right on {result['measured']} held-out sums: {result['greedy']:.1%} greedy, {result['sampled']:.1%} "
            f"sampled; careful answers {result['greedy_by_style']['careful']:.1%}. Problems are in the folder."
        )


def write_problems(settings: LabSettings, folder: Path) -> None:
    """Write problems.jsonl to train on, and held_out.jsonl, whose sums are in no corpus."""
    sides = (("problems", settings.train_problems, False), ("held_out", settings.held_out_problems, True))
    for name, count, held_out in sides:
        rows = sums.sum_problems(settings.seed, count, held_out)
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def corpus(tokenizer: Any, seed: int, numbers: Sequence[int]) -> list[Sample]:
    """Return texts of the corpus, each ending in the end token; every token but the first carries loss.

    Args:
        tokenizer: The tokenizer.
        seed: Seed of the corpus.
        numbers: Numbers of the texts.
    """
    texts = [sums.text_at(seed, i) for i in numbers]
    encoded = tokenizer([t.prompt + t.completion for t in texts])["input_ids"]
    return [Sample([*ids, tokenizer.eos_token_id], [0.0] + [1.0] * len(ids)) for ids in encoded]


def check_answers(
    policy: LanguageModel,
    tokenizer: Any,
    rows: Sequence[Mapping[str, str]],
    temperature: float = 0.0,
    n: int = 1,
    opening: str = "",
) -> list[list[bool]]:
    """Sample answers to problems, and return for each answer True if its last line is the sum.

    Args:
        policy: The model.
        tokenizer: The tokenizer.
        rows: Problems: prompt and answer.
        temperature: Sampling temperature; 0 for the likeliest answer.
        n: Number of answers to each problem.
        opening: First words of the answer.
    """
    tokens = tokenizer([row["prompt"] + opening for row in rows])["input_ids"]
    requests = [Request(t, n, seed) for seed, t in enumerate(tokens)]
    groups = LocalSampler(policy, tokenizer).sample(requests, SamplingConfig(temperature=temperature, max_tokens=64))
    return [
        [r.finish == "end" and r.text.rsplit("\n", 1)[-1] == row["answer"] for r in group.rollouts]
        for group, row in zip(groups, rows, strict=True)
    ]


def _share(right: Sequence[bool]) -> float:
    return round(sum(right) / len(right), 4)
